"""An audit as one self-contained HTML page: it loads no external resources, and every name is escaped."""

import base64
import hashlib
import importlib.resources
import io
import itertools
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from jprune._extras import missing
from jprune._version import __version__
from jprune.files import write_text
from jprune.recall.inference.regression import compare_at_equal_accuracy
from jprune.recall.inputs.raw import InputError
from jprune.recall.report import display
from jprune.recall.report.captions import captions
from jprune.recall.report.findings import findings
from jprune.recall.report.headline import headline, subject
from jprune.recall.report.svg import inline_svg
from jprune.recall.report.words import kind, one_compressed, one_dense
from jprune.recall.tables.frames import UNSTATED, AuditTables, Row

_MOST_EXAMPLES = 24
_MOST_PIXELS = 256  # of an image's longer side


def write_html(
    audit: AuditTables,
    path: str | Path,
    *,
    images: object = None,
    title: str = "Recall audit",
    date: str | None = None,
) -> None:
    """Write the page, whole or not at all.

    Args:
      audit: what to report.
      path: the file to write.
      images: the test examples, (examples, height, width) or (examples, height, width, channels) with
        1, 3 or 4 channels: uint8, or numbers that are scaled to their own range. The page then shows
        examples that pruning changes.
      title: heading of the page.
      date: put into the footer as it is; without it the same audit gives the same bytes.

    Raises:
      ImportError: the extra ``report`` is not installed.
      InputError: ``images`` has a wrong shape, or a different number of examples than the audit.
      OSError: the file cannot be written.
    """
    write_text(path, page(audit, images=images, title=title, date=date))


def page(audit: AuditTables, *, images: object = None, title: str = "Recall audit", date: str | None = None) -> str:
    """Return the page that ``write_html`` writes."""
    try:
        import jinja2  # noqa: PLC0415 (an extra)
        from markupsafe import Markup  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(missing("the HTML report needs jinja2", "report")) from error
    from jprune.recall.report import figures as drawings  # noqa: PLC0415 (matplotlib is an extra)

    template, style, script = (_asset(name) for name in ("page.html.j2", "page.css", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    words = captions(audit)
    figures = [
        {
            "name": name,
            "wide": figure.get_figwidth() > 5,
            "title": words[name].title,
            "caption": words[name].text,
            "svg": Markup(inline_svg(figure, name, words[name].alternative)),
        }
        for name, figure in drawings.figures(audit).items()
    ]
    examples, examples_of = _examples(audit, images)
    written = environment.from_string(template).render(
        title=title,
        date=date,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        about=_about(audit),
        headline=headline(audit),
        warnings=audit.warnings,
        findings=[
            (score, list(answers)) for score, answers in itertools.groupby(findings(audit), key=lambda f: f.score)
        ],
        tables=display.tables(audit, at_equal_accuracy(audit)),
        figures=figures,
        stacks=[
            (display.stack_key(score, ratio), _stack_label(score, ratio))
            for score, ratio in zip(audit.summary["score"], audit.summary["ratio"], strict=True)
        ],
        examples=examples,
        examples_of=examples_of,
        level=f"{100 * audit.level:g}%",
        paired=audit.paired,
        after=kind(audit),
        one_dense=one_dense(audit),
        one_compressed=one_compressed(audit),
        named=audit.named,
        counts_alone=bool(audit.summary["lost"].isna().all()),
        margin=f"{audit.margin:g}",
        opened=display.stack_key(*subject(audit)),
    )
    return isolated(written, [*audit.class_names, *audit.scores, *_of_groups(audit)])


def isolated(written: str, names: Iterable[str]) -> str:
    r"""Isolate names that are written from right to left, which would reverse the order of the numbers around them.

    Args:
      written: the page.
      names: every name that sentences of the page may hold.

    >>> print(ascii(isolated("class \u05d0: -29.3 points", ["\u05d0", "cat"])))
    'class \u2068\u05d0\u2069: -29.3 points'
    """
    import markupsafe  # noqa: PLC0415 (an extra)

    reversing = {name for name in names if any(unicodedata.bidirectional(c) in ("R", "AL") for c in name)}
    if not reversing:
        return written
    escaped = sorted((re.escape(str(markupsafe.escape(name))) for name in reversing), key=len, reverse=True)
    return re.sub(rf"(?<!\w)(?:{'|'.join(escaped)})(?!\w)", "\u2068\\g<0>\u2069", written)


def at_equal_accuracy(audit: AuditTables) -> pd.DataFrame:
    """Compare every pair of scores at equal loss of accuracy; one row per pair.

    Scores that do not share their dense models have models of their own. An alpha that is undefined, 0 or negative has
    no logarithm: it is left out and counted in ``left_out``, like that of a model at chance.
    """
    rows = []
    collapsed = audit.alphas["collapsed"].astype(bool)
    frame = audit.alphas[["score", "ratio", "model", "alpha", "alpha_null"]].assign(
        alpha=audit.alphas["alpha"].mask(collapsed)
    )
    if not (audit.shared and audit.paired):
        frame["model"] = frame["score"] + " " + frame["model"].astype(str)
    positive = frame[~((frame["alpha"] <= 0) | (frame["alpha_null"] <= 0))]
    for first, second in itertools.combinations(audit.scores, 2):
        pair, given = {"score": first, "other_score": second}, frame["score"].isin([first, second])
        without = [score for score in (first, second) if score not in set(positive["score"])]
        if without:
            reason = f"no alpha of {' and '.join(without)} is above 0"
            rows.append(pair | {"observations": 0, "left_out": int(given.sum()), "reason": reason})
            continue
        found = compare_at_equal_accuracy(positive, first, second, level=audit.level)
        rows.append(
            pair
            | {
                "difference": found.difference,
                "low": found.low,
                "high": found.high,
                "p": found.p_value,
                "slope": found.slope,
                "parallel_p": found.parallel_p_value,
                "observations": found.observations,
                "left_out": int(given.sum()) - found.observations,
                "reason": found.reason,
            }
        )
    return pd.DataFrame(rows)


def _stack_label(score: str, ratio: float) -> str:
    """The score and ratio, or the name, of a set of models."""
    if ratio == UNSTATED:
        return score
    if ratio == 1:
        return "control" if score in ("pruned", "control") else f"{score}, control"
    return f"{ratio:g}x" if score == "pruned" else f"{score} at {ratio:g}x"


def _of_groups(audit: AuditTables) -> list[str]:
    return [str(name) for column in ("attribute", "group") for name in audit.groups[column].unique()]


def _dense_counts(audit: AuditTables) -> pd.DataFrame:
    return audit.dense.groupby("score", sort=False).size().reset_index(name="models")


def _models(counts: "pd.Series[int]") -> str:
    """The number of models in words: 1 model, 5 models, 3 to 5 models."""
    low, high = int(counts.min()), int(counts.max())
    return f"{low if low == high else f'{low} to {high}'} model{'s' * (high != 1)}"


def _about(audit: AuditTables) -> str:
    models, dense = (_models(frame["models"]) for frame in (audit.summary, _dense_counts(audit)))
    examples, classes = audit.examples, len(audit.class_names)
    start = f"{examples:,} test example{'s' * (examples != 1)} of {classes} class{'es' * (classes != 1)}; "
    if audit.named:
        each = " each" * (len(audit.scores) > 1)
        return (
            f"{start}dense ({dense}) compared with {', '.join(audit.scores)} ({models}{each}); "
            f"{100 * audit.level:g}% intervals."
        )
    ratios = ", ".join(f"{ratio:g}" for ratio in audit.ratios)
    pruned = [score for score in audit.scores if (audit.summary["ratio"][audit.summary["score"] == score] != 1).any()]
    scores = "" if pruned in ([], ["pruned"]) else f" pruned by {', '.join(pruned)}"
    return (
        f"{start}{dense} before and {models} after compression{scores}, at ratio{'s' * (len(audit.ratios) > 1)} "
        f"{ratios}; {100 * audit.level:g}% intervals."
    )


def _asset(name: str) -> str:
    return importlib.resources.files("jprune.recall.report").joinpath(name).read_text(encoding="utf-8")


def _examples(audit: AuditTables, images: object) -> tuple[list[Row], str]:
    """The examples to show, and which score and ratio they are of: the last that changed any."""
    if images is None:
        return [], ""
    pictures, low, high = _pictures(images, audit.examples)
    if not len(audit.pies):
        return [], ""
    last = audit.pies.iloc[-1]
    rows = audit.pies[(audit.pies["score"] == last["score"]) & (audit.pies["ratio"] == last["ratio"])]
    shown = []
    for row in rows.head(_MOST_EXAMPLES).to_dict("records"):
        source, width, height = _png(pictures[row["example"]], low, high)
        names = {key: audit.class_names[row[key]] for key in ("label", "dense", "pruned")}
        shown.append({"index": row["example"], "source": source, "width": width, "height": height, **names})
    where = _stack_label(last["score"], last["ratio"])
    return shown, f"{where}: {len(shown)} of {len(rows)}"


def _pictures(images: object, examples: int) -> tuple[np.ndarray, float, float]:
    """Images as they are, (examples, height, width[, channels]), and the numbers that are black and white."""
    given = np.asarray(images)
    grey = given.ndim == 3 or (given.ndim == 4 and given.shape[-1] == 1)
    if given.ndim not in (3, 4) or not (grey or given.shape[-1] in (3, 4)) or 0 in given.shape:
        wanted = "(examples, height, width) or (examples, height, width, channels) with 1, 3 or 4 channels"
        raise InputError(f"images must have shape {wanted}, got {given.shape}")
    if len(given) != examples:
        raise InputError(f"images has {len(given)} examples, the labels {examples}")
    if given.dtype.kind not in "iufb":
        raise InputError(f"images must contain numbers, got dtype {given.dtype}")
    given = given.reshape(given.shape[:3]) if grey else given
    if given.dtype == np.uint8:
        return given, 0.0, 255.0
    low, high = float(given.min()), float(given.max())
    if not np.isfinite([low, high]).all():
        raise InputError("images contain NaN or infinity")
    return given, low, high


def _png(picture: np.ndarray, low: float, high: float) -> tuple[str, int, int]:
    """A picture as a data URI, with its width and height in pixels."""
    from PIL import Image  # noqa: PLC0415 (comes with matplotlib)

    pixels = np.round((picture.astype(np.float64) - low) / (high - low or 1.0) * 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    image.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), image.width, image.height
