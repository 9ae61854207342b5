"""Shows the doctests of our docstrings as code: Griffe knows them only under a heading of their own."""

import re

import griffe


def with_headings(text: str) -> str:
    """Put every paragraph that starts with a prompt under ``Examples:``."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(
        "Examples:\n" + "\n".join(f"    {line}" for line in paragraph.splitlines())
        if paragraph.startswith(">>> ")
        else paragraph
        for paragraph in paragraphs
    )


class DoctestSections(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj, **kwargs):
        """Called once for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = with_headings(obj.docstring.value)
