"""Tables as Markdown."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, right: bool = False) -> str:
    r"""Format a table as Markdown.

    Args:
      header: name of each column.
      rows: one cell for each column; ``|`` within a cell becomes ``/``.
      right: align all columns but the first to the right.

    >>> print(table(["width", "accuracy"], [[4, ".97"]]))
    | width | accuracy |
    | --- | --- |
    | 4 | .97 |
    <BLANKLINE>
    """
    rule = ["---", *["---:" if right else "---"] * (len(header) - 1)]
    lines = [header, rule, *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |\n" for line in lines)
