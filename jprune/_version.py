"""The version, in a module that every part of the package can import."""

__version__ = "0.1.0"  # pyproject.toml and CITATION.cff have the same
