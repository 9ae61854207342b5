"""The jumpstart wing."""
