"""The message if a package of an optional extra is not installed."""


def missing(what: str, extra: str) -> str:
    """A message that ends with how to install an extra.

    Args:
      what: what needs which package.
      extra: the extra of pyproject.toml.

    >>> missing("figures need matplotlib", "report")
    "figures need matplotlib: pip install 'jprune[report]' (in a clone: pip install '.[report]')"
    """
    return f"{what}: pip install 'jprune[{extra}]' (in a clone: pip install '.[{extra}]')"
