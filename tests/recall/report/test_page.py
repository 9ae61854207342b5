"""The page: whole, self-contained, escaped, readable without seeing, the same every time; and the words in it."""

import base64
import hashlib
import html
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import jprune
from jprune import recall
from jprune.recall.report import captions, headline
from jprune.recall.report.page import at_equal_accuracy, page
from tests.recall import audits, published


class Page(HTMLParser):
    """What a page has: its tags with their attributes, its ids, and the text of each element that matters."""

    VOID = frozenset({"meta", "link", "img", "br", "input", "path", "use"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.unclosed = [], [], {}, []
        self.feed(text)
        self.unclosed = list(self.open)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def text():
    return page(audits.two_scores(), images=audits.IMAGES, title='A "title" & <b>more</b>')


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


def test_every_element_is_closed_and_every_id_is_its_own(parsed):
    assert parsed.unclosed == []
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = [
        attributes[key]
        for _, attributes in parsed.tags
        for key in ("aria-labelledby", "data-table")
        if key in attributes
    ]
    assert set(pointed) <= set(ids)


def test_the_page_asks_no_host_for_anything(text, parsed):
    for _, attributes in parsed.tags:
        for key in ("src", "href", "action", "srcset", "data", "poster", "background"):
            value = attributes.get(key, "#")
            assert value.startswith(("#", "data:")), (key, value)
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in text
    assert not re.search(r"https?://", text)
    assert [tag for tag, _ in parsed.tags if tag in ("iframe", "object", "embed", "form", "base")] == []


def test_only_the_script_of_the_page_may_run(text, parsed):
    (policy,) = [a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert not [key for _, attributes in parsed.tags for key in attributes if key.startswith("on")]


def test_every_name_stays_text(text, parsed):
    assert len(parsed.all("script")) == 1
    assert "<script>alert" not in text
    assert parsed.all("b") == parsed.all("i") == []
    shown = set(parsed.text["td"])
    assert set(audits.NAMES) <= shown
    assert "<i>random" in shown
    assert "<b>sex</b>" in shown
    assert parsed.text["h1"] == ['A "title" & <b>more</b>']
    assert set(audits.NAMES) <= set(parsed.text["text"])


def test_every_figure_is_told_in_words_with_its_numbers(parsed):
    audit = audits.two_scores()
    told = {attributes["aria-label"] for attributes in parsed.all("svg")}
    assert told == {caption.alternative for caption in captions.captions(audit).values()}
    row = audit.summary.iloc[-1]
    assert (
        f"{row['alpha']:.2f} ({row['alpha_low']:.2f} to {row['alpha_high']:.2f}) at 10"
        in captions.captions(audit)["alpha"].alternative
    )
    assert all(attributes["role"] == "img" for attributes in parsed.all("svg"))
    assert len(parsed.all("figcaption")) == len(parsed.all("figure")) == len(told)


def test_the_classes_table_has_every_class_at_every_stack_and_sorts_by_number(parsed, text):
    audit = audits.two_scores()
    body = re.search(r'<table id="classes".*?</table>', text, re.DOTALL)[0]
    rows = re.findall(r"<tr data-stack=.*?</tr>", body, re.DOTALL)
    assert len(rows) == len(audit.classes) == 30
    cells = [re.findall(r"<td([^>]*)>(.*?)</td>", row, re.DOTALL) for row in rows]
    for (_, row), got in zip(audit.classes.iterrows(), cells, strict=True):
        assert html.unescape(got[2][1]) == row["class"]
        assert got[5][1] == f"{100 * row['recall']:.1f}"
        assert got[5][0] == f' data-value="{float(row["recall"])!r}"'
    assert body.count('aria-sort="none"') == body.count('<button type="button"') == 12


def test_the_examples_that_pruning_changed_most_are_shown_with_their_labels(parsed):
    audit = audits.two_scores()
    rows = audit.pies[(audit.pies["score"] == "<i>random") & (audit.pies["ratio"] == 10)].head(24)
    images = parsed.all("img")
    assert len(images) == len(rows) > 0
    for attributes, row in zip(images, rows.to_dict("records"), strict=True):
        names = [audits.NAMES[row[key]] for key in ("label", "dense", "pruned")]
        assert attributes["alt"] == (
            f"Test example {row['example']}, labelled {names[0]}: most dense models say {names[1]}, "
            f"most pruned models {names[2]}"
        )
        picture = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1])))
        pixels = audits.IMAGES[row["example"]]
        low, high = audits.IMAGES.min(), audits.IMAGES.max()
        np.testing.assert_array_equal(np.asarray(picture), np.round((pixels - low) / (high - low) * 255))


def test_the_same_audit_gives_the_same_bytes_and_the_date_only_where_given(text):
    again = page(audits.two_scores(), images=audits.IMAGES, title='A "title" & <b>more</b>')
    assert again == text
    assert "</main>\n<footer>Made by jprune 0" in text


@pytest.mark.usefixtures("no_figures")
def test_a_date_is_told_where_it_is_given():
    assert f"Made by jprune {jprune.__version__} on 2 &lt;May&gt;." in page(audits.one_score(), date="2 <May>")


@pytest.mark.parametrize("make", [audits.one_score, audits.one_model, audits.undefined, audits.all_wrong])
def test_pages_of_odd_audits_are_whole(make):
    parsed = Page(page(make()))
    assert parsed.unclosed == []
    told = [
        *parsed.text["td"],
        *parsed.text["dd"],
        *parsed.text["text"],
        *(svg["aria-label"] for svg in parsed.all("svg")),
    ]
    assert not [words for words in told if re.search(r"\bnan\b|\binf\b", words)]


def test_correct_counts_alone_give_a_page_without_examples_or_errors():
    counts = published.correct_counts()
    audit = recall.audit_counts(counts[1], {"magnitude": {t: counts[t] for t in published.RATIOS}}, support=[1000] * 10)
    text = page(audit)
    assert "CEV" not in text
    assert "Examples that pruning changes" not in text


@pytest.fixture
def no_figures(monkeypatch):
    """Leave the figures out, for tests that are about something else; drawing them is what takes time."""
    monkeypatch.setattr("jprune.recall.report.figures.figures", lambda audit: {})


@pytest.mark.usefixtures("no_figures")
def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("before")
    with pytest.raises(recall.InputError, match="images has 3 examples, the labels 240"):
        audits.one_score().to_html(target, images=np.zeros((3, 8, 8)))
    assert target.read_text() == "before"
    audits.one_score().to_html(target)
    assert target.read_text(encoding="utf-8") == page(audits.one_score())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OSError, match="absent"):
        audits.one_score().to_html(tmp_path / "absent" / "report.html")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((240, 8)), r"images must have shape .* got \(240, 8\)"),
        (np.zeros((240, 8, 8, 2)), "1, 3 or 4 channels"),
        (np.full((240, 8, 8), np.nan), "NaN or infinity"),
        (np.full((240, 8, 8), "a"), "must hold numbers"),
    ],
)
@pytest.mark.usefixtures("no_figures")
def test_images_of_a_wrong_kind_are_refused(images, message):
    with pytest.raises(recall.InputError, match=message):
        page(audits.one_score(), images=images)


@pytest.mark.parametrize("images", [
    np.zeros((240, 300, 10, 3), np.uint8), np.zeros((240, 5, 5, 1)), np.ones((240, 4, 4, 4), bool),
])  # fmt: skip
@pytest.mark.usefixtures("no_figures")
def test_images_in_colour_grey_or_constant_are_shown_no_larger_than_256_pixels(images):
    shown = Page(page(audits.one_score(), images=images)).all("img")
    assert shown
    assert all(int(attributes["height"]) <= 256 for attributes in shown)


def test_scores_are_compared_at_equal_accuracy_pair_by_pair():
    audit = audits.two_scores()
    table = at_equal_accuracy(audit)
    found = recall.compare_at_equal_accuracy(audit.alphas, "magnitude", "<i>random")
    assert table.loc[0, ["score", "other_score", "difference", "p"]].tolist() == [
        "magnitude", "<i>random", found.difference, found.p_value,
    ]  # fmt: skip
    assert len(at_equal_accuracy(audits.one_score())) == 0


def test_without_jinja_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jprune\[report\]"):
        page(audits.one_score())


# The words --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    counts = published.correct_counts()
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    ratios = {t: counts[t] for t in published.RATIOS}
    return recall.audit_counts(counts[1], {"magnitude": ratios}, support=[1000] * 10, class_names=names)


def test_the_headline_of_the_published_runs(golden):
    assert headline.headline(golden) == (
        "Differences between classes grew under magnitude at 50x compression (alpha 1.80). Hardest hit: class bird, "
        "from 85.5 % to 66.8 % recall under magnitude at 50x compression."
    )


def test_the_answers_of_the_published_runs(golden):
    told = {finding.topic: finding.text for finding in headline.findings(golden)}
    assert told == {
        "Accuracy at 50x compression": "From 89.3 % to 78.7 %, -10.6 points (99 % interval -11.2 to -10.0).",
        "Differences between classes": (
            "Alpha 1.80 (1.73 to 1.88) at 50x compression: they grew. Over the ratios it is below 1 at 2x and "
            "4x, above 1 at 10x, 20x and 50x."
        ),
        "More than the lost accuracy explains?": (
            "No: errors that grow in proportion in every class would bring more (alpha_null 2.25, alpha / alpha_null "
            "0.80 (0.77 to 0.83))."
        ),
        "Classes that lost most": (
            "bird: -18.7 points (85.5 % to 66.8 %); cat: -15.8 points (76.6 % to 60.8 %); deer: -14.7 points (89.2 % "
            "to 74.4 %). Shown to have lost more than their share: bird, cat and deer."
        ),
        "Is the evidence enough?": "30 models tell alpha from 1 at every ratio.",
    }


def test_one_model_is_told_that_nothing_follows():
    told = {finding.topic: finding.text for finding in headline.findings(audits.one_model())}
    assert told["Is the evidence enough?"].startswith("No: one model says nothing about other training seeds.")
    assert "cannot be told without replicates" in told["Classes that lost most"]
    assert "too few models to judge" in headline.headline(audits.one_model())


def test_several_models_of_which_one_has_an_alpha_are_not_told_to_be_one():
    dense = np.stack([audits.LABELS, audits.LABELS, audits.DENSE[0]])
    audit = recall.audit(audits.LABELS, dense, {10: audits.MAGNITUDE[10.0][:3]})
    told = {finding.topic: finding.text for finding in headline.findings(audit)}
    alpha = audit.summary["alpha"].iloc[0]
    assert told["Differences between classes"] == (
        f"Alpha {alpha:.2f} at 10x compression: no interval, too few models."
    )
    assert told["More than the lost accuracy explains?"].startswith("Too few models to say; set against errors")


def test_an_undefined_alpha_is_told_with_its_reason():
    told = {finding.topic: finding.text for finding in headline.findings(audits.undefined())}
    assert told["Differences between classes"] == "Alpha is undefined: the dense model is perfect."
    assert "More than the lost accuracy explains?" not in told
    assert told["Is the evidence enough?"] == (
        "No: at 10x fewer than two models have an alpha, so that there is no interval."
    )
    assert headline.headline(audits.undefined()).startswith(
        "Differences between classes cannot be compared, alpha being undefined, at 10x compression. Hardest hit"
    )


def test_an_alpha_below_zero_is_told_to_turn_the_classes_around():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 500)
    dense, pruned = (
        np.where(rng.random((6, 2000)) < 0.05 + 0.05 * weak, (labels + 1) % 4, labels) for weak in (labels, 3 - labels)
    )
    audit = recall.audit(labels, dense, {4: pruned})
    row = audit.summary.iloc[0]
    assert row["alpha_high"] < 0
    assert headline.headline(audit).startswith(
        f"Differences between classes turned around, the weak classes now being the strong ones, at 4x compression "
        f"(alpha {row['alpha']:.2f})."
    )
    told = {finding.topic: finding.text for finding in headline.findings(audit)}
    assert ": they turned around, the weak classes now being the strong ones." in told["Differences between classes"]


def test_models_that_pruning_left_as_they_were_are_told_so():
    audit = recall.audit(audits.LABELS, audits.DENSE, {4: audits.DENSE})
    told = {finding.topic: finding.text for finding in headline.findings(audit)}
    assert told["Classes that lost most"] == "No class has a lower recall after pruning, on average over the models."
    assert told["Is the evidence enough?"] == "6 models do not tell alpha from 1 at 4x (1.00)."


def test_an_open_question_is_told_with_the_replicates_it_would_take():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    dense, pruned = (np.where(rng.random((6, 200)) < 0.05 + 0.05 * labels, (labels + 1) % 4, labels) for _ in range(2))
    audit = recall.audit(labels, dense, {4: pruned}, rng=1, resamples=50)
    row = audit.summary.iloc[0]
    assert row["alpha_mark"] == "?"
    needed = recall.replicates_needed(row["alpha"] - 1, row["alpha_sd"], alpha=0.01)
    (told,) = [finding.text for finding in headline.findings(audit) if finding.topic == "Is the evidence enough?"]
    assert told.startswith(
        f"6 models do not tell alpha from 1 at 4x ({row['alpha']:.2f}). If those were the true values, showing it "
        f"would take about {needed} models."
    )
    assert f"between {row['alpha_examples_low']:.2f} and {row['alpha_examples_high']:.2f}" in told
    assert "are not shown to have changed" in headline.headline(audit)
