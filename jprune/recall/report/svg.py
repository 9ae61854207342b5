"""Convert matplotlib figures to inline SVG with the colors, fonts and dark mode of the page."""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

from jprune.recall.report.panels import FAINT, INK, MUTED, RULE, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_VARIABLES = {
    "#000000": "var(--ink)",
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    FAINT: "var(--faint)",
    **{color: f"var(--s{index})" for index, color in enumerate(SERIES)},
}
_PIXELS_PER_INCH = 96  # CSS pixels
_LEAST = 0.64  # scale to which a figure shrinks before it scrolls


def inline_svg(figure: "Figure", name: str, alternative: str) -> str:
    """Draw a figure as an ``<svg>`` element for an HTML page.

    Text stays text, so that it can be read aloud, searched and selected; every name in it is escaped as XML. Figure
    colors become CSS variables of the page. Ids contain ``name``, so that several figures can share a page. The same
    figure gives the same text.

    Args:
      figure: the figure to draw.
      name: letters that no other figure of the page uses.
      alternative: text alternative of the figure.
    """
    import matplotlib  # noqa: PLC0415 (an extra)

    width = figure.get_figwidth() * _PIXELS_PER_INCH
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # the browser uses its own fonts
        figure.savefig(buffer, format="svg", metadata={"Date": None}, dpi=150)
    root = ET.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.removeprefix(_SVG) in ("metadata", "style"):  # the page has its own
                parent.remove(child)
    for element in root.iter():
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = {key.removeprefix(_XLINK): _in_page(key, value, name) for key, value in element.attrib.items()}
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("style", f"width: 100%; max-width: {width:.0f}px; min-width: {_LEAST * width:.0f}px")
    root.set("role", "img")
    root.set("aria-label", alternative)
    return ET.tostring(root, encoding="unicode")


def _in_page(key: str, value: str, name: str) -> str:
    """Return an attribute's value with the page's colors, font and ids."""
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key in ("d", "x", "y", "transform"):
        return re.sub(r"(\.\d\d)\d+", r"\1", " ".join(value.split()))
    if key == "style":
        value = re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), value)
        return re.sub(r"((?:^|; )font(?:-family)?:(?: [\d.]+px)?) [^;]*", r"\1 system-ui, sans-serif", value)
    return value
