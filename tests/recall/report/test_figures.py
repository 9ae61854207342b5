"""Figures: their data are the audit's numbers, their names are text, nothing global is touched."""

import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from jprune import recall
from jprune.recall.report import figures, panels
from jprune.recall.report.captions import captions
from jprune.recall.report.svg import inline_svg
from tests.recall import audits

CASES = (audits.one_score, audits.two_scores, audits.one_model, audits.undefined)


@pytest.fixture(scope="module")
def drawn():
    return audits.two_scores().figures()


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_there_is_a_figure_for_every_caption_and_no_window():
    audit = audits.two_scores()
    assert set(audit.figures()) == set(captions(audit))
    assert all(isinstance(figure, Figure) for figure in audit.figures().values())
    assert "matplotlib.pyplot" not in sys.modules or not mpl.pyplot.get_fignums()


@pytest.mark.parametrize("make", CASES)
@pytest.mark.quick(1)
def test_every_figure_of_every_audit_draws_without_a_warning(make):
    for name, figure in make().figures().items():
        assert inline_svg(figure, name, "x").startswith("<svg")


def test_one_model_has_no_box_plot():
    assert "boxes" not in audits.one_model().figures()


def test_alpha_by_ratio_draws_means_with_their_intervals(drawn):
    axes = drawn["alpha"].axes[0]
    summary = audits.two_scores().summary
    lines = [line for line in axes.lines if line.get_marker() in "os"]
    for line, score in zip(lines, audits.two_scores().scores, strict=True):
        rows = summary[summary["score"] == score]
        np.testing.assert_allclose(line.get_ydata(), rows["alpha"])
    ends = np.concatenate([np.array(bars.get_segments())[:, :, 1] for bars in axes.collections])
    np.testing.assert_allclose(ends, summary[["alpha_low", "alpha_high"]])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["control", "2", "10"]


def test_scatter_draws_every_class_of_every_model_and_the_pooled_slope(drawn):
    audit = audits.two_scores()
    shown = [axes for axes in drawn["scatter"].axes if axes.axison]
    assert len(shown) == len(audit.summary) == 5
    by_title = {axes.get_title().split("\n")[0]: axes for axes in shown}
    axes = by_title["magnitude, 10x"]
    rows = audit.recalls[(audit.recalls["score"] == "magnitude") & (audit.recalls["ratio"] == 10)]
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points, rows[["balance_dense", "balance"]])
    x, y = (np.asarray(values) for values in axes.lines[1].get_data())
    slope = (points[:, 0] @ points[:, 1]) / (points[:, 0] @ points[:, 0])
    np.testing.assert_allclose(y, slope * x)
    row = audit.summary[(audit.summary["score"] == "magnitude") & (audit.summary["ratio"] == 10)].iloc[0]
    expected = f"alpha {slope:.2f} {row['alpha_mark']}, r² {row['r2']:.2f}, accuracy {row['accuracy']:.3f}"
    assert axes.get_title().split("\n")[1] == expected


def test_recall_by_class_draws_dense_then_every_ratio(drawn):
    audit = audits.two_scores()
    axes = drawn["recall"].axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["dense", "control", "2", "10"]
    rows = audit.classes[(audit.classes["score"] == "magnitude") & (audit.classes["class"] == "$x^2$")]
    line = axes.lines[texts(axes).index("$x^2$")]
    np.testing.assert_allclose(line.get_ydata(), [rows["recall_dense"].iloc[0], *rows["recall"]])


def test_many_classes_name_only_those_that_lost_most():
    rng = np.random.default_rng(0)
    dense = rng.integers(80, 100, (3, 40))
    pruned = dense - rng.integers(0, 40, dense.shape)
    audit = recall.audit_counts(dense, {4: pruned}, support=[100] * 40)
    axes = figures.recall_by_class(audit).axes[0]
    assert len(axes.lines) == 40
    lost = audit.classes.sort_values("change", kind="stable")["class"].head(8)
    assert texts(axes) == lost.tolist()


def test_many_points_are_drawn_as_pixels():
    rng = np.random.default_rng(0)
    dense = rng.integers(80, 100, (20, 100))
    audit = recall.audit_counts(dense, {4: dense - rng.integers(0, 40, dense.shape)}, support=[100] * 100)
    text = inline_svg(figures.balance_scatter(audit), "scatter", "x")
    assert "data:image/png;base64," in text
    assert len(text) < 300_000


def test_trade_off_and_variance_and_null_draw_the_summary(drawn):
    audit = audits.two_scores()
    rows = audit.summary[audit.summary["score"] == "magnitude"]
    trade = next(line for line in drawn["tradeoff"].axes[0].lines if line.get_marker() == "o")
    np.testing.assert_allclose(trade.get_data(), [100 * rows["accuracy"], rows["alpha"]])
    variance = drawn["variance"].axes[0].lines[0]
    np.testing.assert_allclose(
        variance.get_ydata(), [rows["balance_variance_dense"].iloc[0], *rows["balance_variance"]]
    )
    points = drawn["null"].axes[0].collections[0].get_offsets()
    of_models = audit.alphas[audit.alphas["score"] == "magnitude"]
    np.testing.assert_allclose(points, of_models[["alpha_null", "alpha"]])


def test_box_plots_of_several_audits_share_an_axis():
    figure = figures.alpha_boxes({"<first>": audits.one_score(), "second": audits.two_scores()})
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == ("<first>", "second")
    assert left.get_ylim() == right.get_ylim()
    audit = audits.one_score()
    medians = audit.alphas.groupby("ratio")["alpha"].median()
    drawn = [line.get_ydata()[0] for line in left.lines if line.get_linewidth() == 2 and len(line.get_ydata())]
    np.testing.assert_allclose(drawn, medians)


@pytest.fixture(scope="module")
def many():
    """Nine scores, more than the number of colours."""
    names = ["magnitude", "random", "a score with a name that is far too long", *"abcdef"]
    rng = np.random.default_rng(0)
    dense = rng.integers(80, 100, (3, 5))
    ratios = (1, 2, 4, 8)
    pruned = {name: {ratio: dense - rng.integers(0, 4 * ratio, dense.shape) for ratio in ratios} for name in names}
    return recall.audit_counts(dense, pruned, support=[100] * 5)


@pytest.fixture(scope="module")
def many_drawn(many):
    return many.figures()


@pytest.mark.parametrize("name", ["alpha", "null", "tradeoff", "variance", "boxes"])
@pytest.mark.quick(1)
def test_the_legend_of_many_scores_is_below_the_panel_and_inside_the_figure(many, many_drawn, name):
    figure = many_drawn[name]
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert axes.get_legend() is None
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.y1 <= axes.get_tightbbox().y0
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.y0 <= box.y0
    assert [text.get_text() for text in legend.get_texts()] == [panels.short(score) for score in many.scores]
    assert axes.bbox.height > 2.5 * figure.dpi  # the panel keeps its height: the figure grows


def test_every_one_of_many_scores_looks_different(many):
    lines = figures.balance_variance(many).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 9


def test_no_two_ratios_are_written_over_one_another(many):
    for audit, most in ((many, 9), (audits.two_scores(), 5)):
        figure = figures.accuracy_tradeoff(audit)
        figure.draw_without_rendering()
        texts = figure.axes[0].texts
        assert 1 < len(texts) <= most
        boxes = [text.get_window_extent() for text in texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    figure = figures.accuracy_tradeoff(many)
    assert {text.get_text() for text in figure.axes[0].texts} == {"8"}


def test_panels_with_equal_scores_share_a_legend_and_others_do_not(many):
    shared = figures.alpha_boxes({"first": many, "second": many})
    assert len(shared.legends) == 1
    assert not any(axes.get_legend() for axes in shared.axes)
    own = figures.alpha_boxes({"first": many, "second": audits.two_scores()})
    assert texts(own.axes[1]) == ["magnitude", "<i>random"]
    own.draw_without_rendering()
    assert own.axes[0].get_legend().get_window_extent().y1 <= own.axes[0].bbox.y0


def test_names_are_drawn_as_they_are(drawn):
    assert sorted(texts(drawn["recall"].axes[0])) == sorted(audits.NAMES)
    (legend,) = drawn["alpha"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["magnitude", "<i>random"]
    assert not any(text.get_parse_math() for text in drawn["recall"].axes[0].get_legend().get_texts())


def test_svg_is_the_same_every_time_escapes_names_and_follows_the_page(drawn):
    first, second = (inline_svg(audits.two_scores().figures()["recall"], "recall", 'a "b" <c>') for _ in range(2))
    assert first == second
    root = ET.fromstring(first)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'a "b" <c>'
    shown = [element.text for element in root.iter("text")]
    assert set(audits.NAMES) <= set(shown)
    assert "var(--s0)" in first
    assert not any(to_hex(colour) in first for colour in (*panels.SERIES, panels.INK, panels.MUTED))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("recall-") for name in ids)
    used = [element.get("href")[1:] for element in root.iter("use")]
    assert set(used) <= set(ids)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"jprune\[report\]"):
        audits.one_score().figures()


@pytest.mark.parametrize("at_chance", [0, 1, 2])
def test_a_score_whose_models_are_all_at_chance_leaves_the_others_their_colors(at_chance):
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(5), 40)
    dense, after = (np.where(rng.random((4, 200)) < rate, (labels + 1) % 5, labels) for rate in (0.1, 0.3))
    names = ["magnitude", "random", "undecayed"]
    stacks = {name: np.zeros_like(after) if place == at_chance else after for place, name in enumerate(names)}
    found = recall.audit(labels, dense, {name: {2: stack} for name, stack in stacks.items()}).figures()
    for name in ("null", "boxes"):
        made = found[name].axes[0].get_legend() or found[name].legends[0]
        assert [text.get_text() for text in made.get_texts()] == names
    points = found["null"].axes[0].collections
    assert [len(each.get_offsets()) for each in points] == [0 if place == at_chance else 4 for place in range(3)]
    assert [to_hex(each.get_facecolor()[0]) if len(each.get_facecolor()) else None for each in points] == [
        panels.color(place).lower() for place in range(3)
    ]
