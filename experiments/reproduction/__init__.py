"""The reproduction page, rebuilt from the committed tables of results."""
