"""The jumpstart study: do thin, deep networks train?"""
