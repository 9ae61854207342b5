"""The version of the package, in a module without imports."""

__version__ = "0.1.0"  # pyproject.toml and CITATION.cff have the same
