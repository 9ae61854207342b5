"""The page: whole, self-contained, escaped, readable without seeing, the same every time; and the words in it."""

import base64
import dataclasses
import hashlib
import html
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
import sklearn.linear_model
import sklearn.model_selection
from PIL import Image

import jprune
from jprune import recall
from jprune.recall.inference.corrected import WITHIN_NOISE
from jprune.recall.report import captions, display, headline, verdicts, words
from jprune.recall.report.findings import findings
from jprune.recall.report.page import at_equal_accuracy, page
from jprune.recall.report.terminal import print_summary
from tests.recall import audits, published


class Page(HTMLParser):
    """The contents of a page: its tags with their attributes, its ids, and the text of the tested elements."""

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


def test_every_element_is_closed_and_ids_are_unique(parsed):
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


def test_names_from_right_to_left_do_not_reverse_the_numbers_around_them(text):
    labels = np.repeat([0, 1], 50)
    names = ["\u05e9\u05dc\u05d5\u05dd & \u05e2", "\u0642\u0637\u0629"]
    after = np.where(np.arange(100) < 20, 1, labels)
    written = page(recall.audit(labels, labels, compare={"\u05d0": after}, class_names=names, groups=labels))
    for name in (*map(html.escape, names), "\u05d0"):
        found = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", written)]
        assert found
        assert all(written[at - 1] == "\u2068" and written[at + len(name)] == "\u2069" for at in found)
    assert f"Class \u2068{html.escape(names[0])}\u2069 lost most in \u2068\u05d0\u2069" in written
    assert "\u2068" not in text


def test_every_figure_has_a_text_alternative_with_its_numbers(parsed):
    audit = audits.two_scores()
    alternatives = {attributes["aria-label"] for attributes in parsed.all("svg")}
    assert alternatives == {caption.alternative for caption in captions.captions(audit).values()}
    row = audit.summary.iloc[-1]
    assert (
        f"{row['alpha']:.2f} ({row['alpha_low']:.2f} to {row['alpha_high']:.2f}) at 10"
        in captions.captions(audit)["alpha"].alternative
    )
    assert all(attributes["role"] == "img" for attributes in parsed.all("svg"))
    assert len(parsed.all("figcaption")) == len(parsed.all("figure")) == len(alternatives)


def test_the_classes_table_has_every_class_at_every_stack_and_sorts_by_number(parsed, text):
    audit = audits.two_scores()
    body = re.search(r'<table id="classes".*?</table>', text, re.DOTALL)[0]
    rows = re.findall(r"<tr data-stack=.*?</tr>", body, re.DOTALL)
    assert len(rows) == len(audit.classes) == 30
    cells = [re.findall(r"<t[dh]([^>]*)>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
    for (_, row), got in zip(audit.classes.iterrows(), cells, strict=True):
        assert html.unescape(got[2][1]) == row["class"]
        assert got[2][0] == ' scope="row" class="text"', "a screen reader says the class with every number of its row"
        assert got[5][1] == f"{100 * row['recall']:.1f}"
        assert got[5][0] == f' data-value="{float(row["recall"])!r}"'
    assert body.count('aria-sort="none"') == body.count('<button type="button"') == 15


def test_the_examples_that_pruning_changed_most_are_shown_with_their_labels(parsed):
    audit = audits.two_scores()
    rows = audit.pies[(audit.pies["score"] == "<i>random") & (audit.pies["ratio"] == 10)].head(24)
    images = parsed.all("img")
    assert len(images) == len(rows) > 0
    for attributes, row in zip(images, rows.to_dict("records"), strict=True):
        names = [audits.NAMES[row[key]] for key in ("label", "dense", "pruned")]
        assert attributes["alt"] == (
            f"Test example {row['example']}, labeled {names[0]}: the dense models most often say {names[1]}, "
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
def test_a_given_date_is_shown():
    assert f"Made by jprune {jprune.__version__} on 2 &lt;May&gt;." in page(audits.one_score(), date="2 <May>")


@pytest.mark.parametrize("make", [audits.one_score, audits.one_model, audits.undefined, audits.all_wrong])
@pytest.mark.quick(1)
def test_pages_of_odd_audits_are_whole(make):
    parsed = Page(page(make()))
    assert parsed.unclosed == []
    texts = [
        *parsed.text["td"],
        *parsed.text["dd"],
        *parsed.text["text"],
        *(svg["aria-label"] for svg in parsed.all("svg")),
    ]
    assert not [words for words in texts if re.search(r"\bnan\b|\binf\b", words)]


def test_correct_counts_alone_give_a_page_without_examples_or_errors():
    counts = published.correct_counts()
    audit = recall.audit_counts(counts[1], {"magnitude": {t: counts[t] for t in published.RATIOS}}, support=[1000] * 10)
    text = page(audit)
    assert "CEV" not in text
    assert "Examples that pruning changes" not in text


@pytest.mark.usefixtures("no_figures")
def test_the_method_of_counts_alone_is_over_models():
    text = " ".join(page(recall.audit_counts([[9, 7], [9, 6]], {2: [[7, 5], [7, 4]]}, support=[10, 10])).split())
    assert "From counts alone the test is a paired t test over models." in text
    assert "over test examples and models" not in text


def test_counts_of_models_that_all_lost_as_much_do_not_show_a_change_of_accuracy():
    text = recall.audit_counts([[90, 70], [80, 75]], {2: [[89, 69], [79, 74]]}, support=[100, 100]).headline
    assert "Accuracy at 2x compression went from 78.8% to 77.8%, -1.0 points (not shown to differ from 0)." in text


@pytest.mark.parametrize(("high", "verdict"), [(0.6, "seed"), (0.4, "<")])
def test_two_models_narrow_differences_only_below_the_alpha_between_their_dense_models(high, verdict):
    numbers = {"alpha": 0.3, "alpha_low": -3.0, "alpha_high": 4.0, "alpha_seed": 0.5, "alpha_seed_low": np.nan}
    corrected = {"alpha_corrected": 0.3, "alpha_corrected_high": high, "alpha_corrected_mark": "<"}
    others = {"alpha_corrected_reason": "", "alpha_corrected_equal": False}
    assert verdicts.verdict_of(numbers | corrected | others) == verdict


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out the figures, which are slow to draw, in tests of other parts of the page."""
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
        (np.full((240, 8, 8), "a"), "must contain numbers"),
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
    assert table.loc[0, ["observations", "left_out"]].tolist() == [len(audit.alphas), 0]
    assert len(at_equal_accuracy(audits.one_score())) == 0


@pytest.mark.usefixtures("no_figures")
def test_alphas_without_a_logarithm_are_counted_in_the_row_and_named_in_the_text():
    audit = audits.two_scores()
    alphas = audit.alphas.copy()
    alphas.loc[alphas.index[[0, 3]], "alpha"] = [-0.2, np.nan]
    audit = dataclasses.replace(audit, alphas=alphas)
    assert at_equal_accuracy(audit).loc[0, ["observations", "left_out"]].tolist() == [len(alphas) - 2, 2]
    shown = display.tables(audit, at_equal_accuracy(audit))["equal"]
    (left_out,) = [i for i, column in enumerate(shown.columns) if column.name == "left_out"]
    assert shown.rows[0].cells[left_out].text == "2"
    assert "An alpha that is undefined, 0 or negative has no logarithm" in page(audit)
    alphas.loc[alphas["score"] == "magnitude", "alpha"] = -0.1
    (row,) = at_equal_accuracy(dataclasses.replace(audit, alphas=alphas)).to_dict("records")
    assert row["reason"] == "no alpha of magnitude is above 0"
    assert row["left_out"] == len(alphas)


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
        "Class bird lost most under magnitude at 50x compression: recall fell from 85.5% to 66.8% (1,000 test "
        "examples), significantly more than the overall loss of 10.6 points. Also shown to have lost more than all "
        "examples together: classes cat (76.6% to 60.8% of 1,000) and deer (89.2% to 74.4% of 1,000). Differences "
        "between weak and strong classes widened under magnitude at 50x compression (alpha 1.80, 1.73 to 1.88; above 1 "
        "weak classes fell further behind strong ones relative to accuracy, below 1 they came closer)."
    )


def test_the_answers_of_the_published_runs(golden):
    answers = {finding.topic: finding.text for finding in findings(golden)}
    assert answers == {
        "Accuracy at 50x compression": (
            "Accuracy went from 89.3% to 78.7%, -10.6 points; 99% interval of the change over models -11.2 to -10.0 "
            "points."
        ),
        "Differences between classes": (
            "Alpha 1.80 (1.73 to 1.88) at 50x compression; class differences widened; between two dense training runs "
            "it is 0.994 (0.986 to 1.003). It is not corrected for test-set noise: counts alone do not say which "
            "examples were lost. Over the ratios alpha is below 1 at 2x and 4x; above 1 at 10x, 20x and 50x."
        ),
        "More than the lost accuracy explains?": (
            "No: errors that grow in proportion in every class would cause more (alpha_null 2.25, alpha / alpha_null "
            "0.80 (0.77 to 0.83))."
        ),
        "Classes that lost most": (
            "Class bird: -18.7 points (85.5% to 66.8% of 1,000); class cat: -15.8 points (76.6% to 60.8% of 1,000); "
            "class deer: -14.7 points (89.2% to 74.4% of 1,000). Shown to have lost more than all examples did: "
            "classes bird, cat and deer."
        ),
        "Is there enough evidence?": (
            "30 models show at every ratio on which side of 1 alpha is; at 4x noise of the test set or another "
            "training seed may be why."
        ),
    }


def test_one_pair_of_models_gets_an_answer_about_these_two():
    audit = audits.one_model()
    answers = {finding.topic: finding.text for finding in findings(audit)}
    assert answers["Is there enough evidence?"] == (
        "Only for large losses: a typical class would have to lose 39.8 points more than all examples for that to be "
        "shown nine times in ten. Intervals and tests are over test examples of these two models; to say something "
        "about other training runs, train at least 5 pairs, preferably 30."
    )
    assert f"{100 * audit.classes['detectable'].median():.1f}" == "39.8"
    assert headline.headline(audit).endswith("This holds for these two models; other training runs may differ.")
    lost = row_of(audit.classes, audit.classes["change"].idxmin())
    assert f"{lost['lost']:.0f} lost and {lost['won']:.0f} won" in answers["Classes that lost most"]
    assert "too few" not in headline.headline(audit)


def row_of(frame, index):
    return frame.loc[index]


def digits():
    """Labels and logits of a logistic regression on digits, and of its copy with four weights in five set to 0."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    train, test, of_train, of_test = sklearn.model_selection.train_test_split(
        images / 16, labels, test_size=0.5, stratify=labels, random_state=0
    )
    model = sklearn.linear_model.LogisticRegression(max_iter=2_000).fit(train, of_train)
    dense = model.decision_function(test)
    sizes = np.abs(model.coef_)
    model.coef_ = np.where(sizes >= np.quantile(sizes, 0.8), model.coef_, 0)
    return of_test, dense, model.decision_function(test)


def test_one_dense_and_one_pruned_model_of_digits():
    labels, dense, pruned = digits()
    audit = recall.audit(labels, dense, {5: pruned})
    before, after = dense.argmax(1) == labels, pruned.argmax(1) == labels
    change = [after[labels == c].mean() - before[labels == c].mean() for c in range(10)]
    worst = int(np.argmin(change))
    ends = f"from {100 * before[labels == worst].mean():.0f}% to {100 * after[labels == worst].mean():.0f}%"
    lost = 100 * (before.mean() - after.mean())
    assert headline.headline(audit).startswith(
        f"Class {worst} lost most at 5x compression: recall fell {ends} ({(labels == worst).sum()} test examples), "
        f"significantly more than the overall loss of {lost:.1f} points."
    )
    assert headline.headline(audit).endswith("This holds for these two models; other training runs may differ.")
    rows = audit.tests[audit.tests["test"] == "mcnemar"]
    of_class = rows[rows["class"] == str(worst)].iloc[0]
    mine = labels == worst
    assert (of_class["lost"], of_class["won"]) == ((before & ~after)[mine].sum(), (~before & after)[mine].sum())
    assert len(rows) == 11
    assert not {"confidence", "ece", "kl"} - set(audit.probabilities.columns)


def test_models_that_agree_are_said_to_agree():
    labels, dense, _ = digits()
    assert headline.headline(recall.audit(labels, dense, {5: dense})) == "The two models agree on every example."
    several = headline.headline(recall.audit(audits.LABELS, audits.DENSE, compare={"int8": audits.DENSE}))
    assert several == "Dense and int8 models agree on every example."
    found = findings(recall.audit(audits.LABELS, audits.DENSE, compare={"int8": audits.DENSE}))
    assert "Is there enough evidence?" not in [finding.topic for finding in found]  # nothing could have been missed


def test_a_loss_of_a_class_is_not_compared_with_a_gain_of_0_points():
    labels = np.repeat(np.arange(4), 200)
    dense, after = labels.copy(), labels.copy()
    dense[200:260], after[:60] = 0, 1
    said = headline.headline(recall.audit(labels, dense, compare={"q": after}))
    assert said.startswith(
        "Class 0 lost most in q: recall fell from 100% to 70% (200 test examples), while the overall accuracy is "
    )


def test_a_small_change_of_a_recall_has_the_digits_that_show_it():
    changes = {(0.99941, 0.99902): "fell from 99.94% to 99.90%", (0.5, 0.5): "stayed at 50.0%"}
    for (before, after), change in changes.items():
        hit = pd.Series(
            {"recall_dense": before, "recall": after, "change": after - before, "support": 500_000}, dtype=object
        )
        assert headline._change_of_recall(hit) == f"recall {change} (500,000 test examples)"


def test_models_given_by_name_are_never_called_pruned():
    labels = np.repeat(np.arange(4), 100)
    dense = np.where(np.arange(400) % 10 < labels, (labels + 1) % 4, labels)
    wrong = np.stack([(labels + 1) % 4])
    for after in (np.where(np.arange(400) % 7 == 0, 0, dense), wrong):
        audit = recall.audit(labels, dense, compare={"int8": after})
        said = [*audit.warnings, headline.headline(audit), *(finding.text for finding in findings(audit))]
        said += [text for caption in captions.captions(audit).values() for text in caption]
        assert not [text for text in said if "prun" in text or "ratio" in text]
        assert "int8" in said[len(audit.warnings)]


def test_small_changes_are_never_minus_zero():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 5_000)
    dense = np.where(rng.random(20_000) < 0.9, labels, (labels + 1) % 4)
    changed = dense.copy()
    changed[labels == 0] = np.where(np.arange(5_000) == np.flatnonzero(dense[:5_000] == 0)[0], 1, dense[:5_000])
    audit = recall.audit(labels, dense, {2: changed})
    said = " ".join([headline.headline(audit), *(finding.text for finding in findings(audit))])
    assert not re.search(r"[-+]0\.0+ ", said)
    assert "1 example lost and 0 won" in said


def test_several_models_of_which_one_has_an_alpha_have_no_interval():
    dense = np.stack([audits.LABELS, audits.LABELS, audits.DENSE[0]])
    audit = recall.audit(audits.LABELS, dense, {10: audits.MAGNITUDE[10.0][:3]})
    answers = {finding.topic: finding.text for finding in findings(audit)}
    assert "no corrected alpha" in answers["Differences between classes"]
    assert "More than the lost accuracy explains?" not in answers


def test_an_undefined_alpha_comes_with_its_reason():
    answers = {finding.topic: finding.text for finding in findings(audits.undefined())}
    assert answers["Differences between classes"] == "Alpha is undefined: the dense model is perfect."
    assert "More than the lost accuracy explains?" not in answers
    said = headline.headline(audits.undefined())
    assert "measured by alpha at 10x compression, which is undefined (the dense model is perfect)" in said


def test_an_alpha_below_zero_reverses_the_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 500)
    dense, pruned = (
        np.where(rng.random((6, 2000)) < 0.05 + 0.05 * weak, (labels + 1) % 4, labels) for weak in (labels, 3 - labels)
    )
    audit = recall.audit(labels, dense, {4: pruned})
    row = audit.summary.iloc[0]
    assert row["alpha_corrected_high"] < 0
    alpha = f"(corrected alpha {row['alpha_corrected']:.2f}"
    assert f"Differences between weak and strong classes are reversed at 4x compression {alpha}" in audit.headline


@pytest.mark.parametrize("weak_now", [True, False])
def test_a_negative_alpha_is_explained_once_in_the_terminal_and_on_the_page(capsys, weak_now):
    """Recalls of 95, 90, 85 and 80%, then in the opposite order or the same; the mean alpha is negative or not."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 500)
    weak = 3 - labels if weak_now else labels
    dense, pruned = (
        np.where(rng.random((6, 2000)) < 0.05 + 0.05 * rank, (labels + 1) % 4, labels) for rank in (labels, weak)
    )
    audit = recall.audit(labels, dense, {4: pruned})
    assert (audit.summary["alpha"][0] < 0) == weak_now
    meaning = (
        "A negative alpha means that classes with a recall above the average before compression tend to have one below "
        "it after, and the reverse."
    )
    print_summary(audit)
    for shown in (capsys.readouterr().out, page(audit)):
        assert " ".join(shown.split()).count(meaning) == weak_now


def test_an_open_question_comes_with_what_could_have_been_shown():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 400)
    dense, pruned = (np.where(rng.random((6, 1600)) < 0.05 + 0.05 * labels, (labels + 1) % 4, labels) for _ in range(2))
    audit = recall.audit(labels, dense, {4: pruned}, rng=1, resamples=50)
    row = audit.summary.iloc[0]
    assert row["alpha_corrected_mark"] == "?"
    (said,) = [finding.text for finding in findings(audit) if finding.topic == "Is there enough evidence?"]
    assert said.startswith("For classes yes, if they lost much: a typical class that lost ")
    assert (f"6 models do not show that corrected alpha differs from 1 at 4x ({row['alpha_corrected']:.2f}).") in said
    assert f"Growth by {row['alpha_corrected_detectable']:.2f} would have been shown" in said
    assert "are not shown to have changed at 4x compression" in headline.headline(audit)
    assert "The data could have missed growth of alpha by less than" in headline.headline(audit)


def test_collapsed_models_are_counted_and_left_out_of_alpha():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 200)
    dense, pruned = (np.where(rng.random((6, 800)) < 0.05 + 0.05 * labels, (labels + 1) % 4, labels) for _ in range(2))
    gone = pruned.copy()
    gone[:2] = 3
    audit, rest = recall.audit(labels, dense, {4: gone}), recall.audit(labels, dense[2:], {4: pruned[2:]})
    row = audit.summary.iloc[0]
    assert row["collapsed"] == 2
    np.testing.assert_allclose(
        row[["alpha", "alpha_low", "alpha_corrected", "alpha_corrected_high"]].astype(float),
        rest.summary.iloc[0][["alpha", "alpha_low", "alpha_corrected", "alpha_corrected_high"]].astype(float),
    )
    assert headline.headline(audit).startswith(
        "2 of 6 models at 4x compression are at chance; accuracy and classes below include them"
    )
    assert "2 of 6 models are at chance" in " ".join(finding.text for finding in findings(audit))


def test_equal_is_said_only_within_the_margin():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 1_000)
    error = np.linspace(0.02, 0.4, 10)[labels]
    draw = rng.random((8, 10_000))
    dense = np.where(draw < error, (labels + 1) % 10, labels)
    after = np.where(np.where(rng.random(draw.shape) < 0.9, draw, rng.random(draw.shape)) < error, 0, labels)
    after = np.where((after == 0) & (labels == 0) & (draw < error), 1, after)
    assert "stayed the same within the margin" in headline.headline(recall.audit(labels, dense, {2: after}))
    assert "are not shown to have changed" in headline.headline(recall.audit(labels, dense, {2: after}, margin=0.001))


def test_a_group_that_lost_more_is_in_the_headline():
    rng = np.random.default_rng(0)
    labels, old = np.tile(np.arange(4), 300), np.arange(1_200) % 3 == 0
    pruned = np.where(rng.random((5, 1_200)) < np.where(old, 0.5, 0.02), (labels + 1) % 4, labels)
    dense = np.where(rng.random((5, 1_200)) < 0.02, (labels + 1) % 4, labels)
    audit = recall.audit(labels, dense, {2: pruned}, groups={"age": np.where(old, "old", "young")})
    assert "Of the groups, old (age) lost more than the rest:" in headline.headline(audit)
    whole = audit.groups[audit.groups["class"].isna()].set_index("group")
    assert whole.loc["old", "excess_low"] < whole.loc["old", "excess"] < whole.loc["old", "excess_high"]


def one_dense_one_compressed(sizes, before, after, models=1):
    """Models that classify the first examples of each class correctly, in the given shares."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    place = np.concatenate([np.arange(size) / size for size in sizes])

    def made(shares):
        right = place < np.asarray(shares)[labels]
        return np.stack([np.where(right, labels, (labels + 1 + m % 2) % len(sizes)) for m in range(models)])

    return recall.audit(labels, made(before), {10: made(after)})


def test_a_class_with_a_handful_of_examples_is_never_what_the_headline_begins_with():
    said = headline.headline(one_dense_one_compressed([200] * 4 + [5], [0.9] * 4 + [1.0], [0.9] * 4 + [0.0]))
    assert said.startswith("No class with 10 or more test examples is shown to have lost more than the rest")
    assert "Class 4 is shown to have lost more, but has only 5 test examples, of which it lost 5." in said
    said = headline.headline(one_dense_one_compressed([200] * 4 + [40], [0.9] * 4 + [1.0], [0.9] * 4 + [0.0]))
    assert said.startswith(
        "Class 4 lost most at 10x compression: recall fell from 100% to 0% (40 test examples), signifi"
    )


def test_a_handful_of_examples_that_lost_more_is_not_denied_of_counts_alone():
    dense = np.array([[90, 80, 5], [91, 82, 5], [92, 81, 5], [90, 83, 5], [91, 81, 5]])
    lost = np.array([[1, 2, 4], [2, 1, 5], [1, 1, 4], [2, 2, 5], [0, 1, 4]])
    said = recall.audit_counts(dense, {2: dense - lost}, support=[100, 100, 5]).headline
    assert "No class with 10 or more test examples is shown to have lost more than the rest;" in said
    assert "Class 2 is shown to have lost more, but has only 5 test examples: recall went from 100% to 12%." in said


def test_a_class_with_a_handful_of_examples_that_lost_more_is_not_denied_by_the_headline():
    before, after = [0.9] * 4 + [1.0], [0.4] + [0.9] * 3 + [0.0]
    said = one_dense_one_compressed([200] * 4 + [2], before, after).headline
    assert said.startswith(
        "Of the classes with 10 or more test examples, 0 lost most at 10x compression: recall fell from 90% to 40% "
        "(200 test examples), significantly more"
    )
    said = one_dense_one_compressed([200] * 4 + [2], [0.9] * 5, [0.4, 0.4, 0.9, 0.9, 0.0]).headline
    assert said.startswith("Of the classes with 10 or more test examples, 0 and 1 lost most, and equally, at 10x")


def test_where_nothing_was_tested_no_class_and_no_group_is_said_not_to_be_shown():
    counts = recall.audit_counts([90, 80, 70], {2: [85, 60, 69]}, support=[100] * 3)
    needs = "A test of whether a class lost more than the rest needs predictions, or models that differ."
    assert counts.headline.startswith(f"Accuracy at 2x compression went from 80.0% to 71.3%, -8.7 points. {needs}")
    one_each = recall.audit([0, 1, 2], [0, 1, 2], {2: [0, 1, 1]}, groups=["all"] * 3)
    assert "lost more than the rest needs two or more test examples of a class." in one_each.headline
    said = {finding.topic: finding.text for finding in findings(one_each)}
    assert said["Classes that lost most"].endswith("rest lost needs two or more test examples of a class.")
    assert "Groups" not in said
    for audit in (counts, one_each):
        assert "is shown" not in audit.headline


def test_evidence_at_every_ratio_is_claimed_only_if_alpha_is_measured_at_every_ratio():
    audit = audits.one_score()
    measured = {"alpha_corrected": [np.nan, 1.5, 1.5], "alpha_corrected_low": 1.2, "alpha_corrected_high": 2.0}
    marks, reasons = ["", ">", ">"], [WITHIN_NOISE, "", ""]
    rows = audit.summary.assign(**measured, alpha_corrected_mark=marks, alpha_corrected_reason=reasons)
    text = next(
        finding.text
        for finding in findings(dataclasses.replace(audit, summary=rows))
        if finding.topic == "Is there enough evidence?"
    )
    assert text.endswith("6 models show at 2x and 10x on which side of 1 corrected alpha is.")


def test_a_collapsed_model_is_what_the_headline_says():
    said = headline.headline(one_dense_one_compressed([50] * 4, [0.9, 0.8, 0.7, 0.6], [1, 0, 0, 0]))
    assert said.startswith("The model at 10x compression is at chance: accuracy went from 75.0% to 25.0%")
    assert "Class" not in said
    said = headline.headline(one_dense_one_compressed([50] * 4, [0.9, 0.8, 0.7, 0.6], [1, 0, 0, 0], models=3))
    assert said.startswith("All models at 10x compression are at chance")
    assert "could have missed" not in said


def test_counts_of_models_that_are_all_at_chance_give_the_headline_of_predictions():
    dense, one_class = [[90, 80, 70], [91, 82, 73], [92, 81, 70]], [[100, 0, 0], [100, 0, 0], [0, 0, 100]]
    audit = recall.audit_counts(dense, {2: one_class}, support=[100] * 3)
    assert audit.headline.startswith("All models at 2x compression are at chance: accuracy went from 81.0% to 33.3%")
    said = {finding.topic: finding.text for finding in findings(audit)}
    assert said["Differences between classes"] == "Every model is at chance, so alpha says nothing about classes."


def test_a_class_that_lost_while_the_others_gained_is_said_so():
    said = headline.headline(one_dense_one_compressed([200] * 4, [0.7] * 4, [0.9, 0.9, 0.9, 0.4]))
    assert (
        "Class 3 lost most at 10x compression: recall fell from 70% to 40% (200 test examples), while all examples"
        in said
    )
    assert "together gained 7.5 points" in said


def test_where_nothing_is_shown_the_headline_says_what_could_have_been_missed():
    said = headline.headline(one_dense_one_compressed([100] * 4, [0.9] * 4, [0.8] * 4))
    assert re.search(
        r"The data could have missed a class that lost up to \d+\.\d points more than all examples together\.", said
    )
    assert "This holds for these two models; other training runs may differ." in said
    for word in ("in line", "unchanged", "no change"):
        assert word not in said


def differing_models(models, *, spread, size=20, classes=4):
    """Models that lose class m % classes most, so that losses vary between models more than between classes."""
    labels = np.repeat(np.arange(classes), size)
    place = np.tile(np.arange(size) / size, classes)
    dense = np.stack([np.where(place < 0.9, labels, (labels + 1) % classes)] * models)
    dense[:, 0] = np.arange(models) % classes  # so that no two models are copies
    after = np.stack(
        [
            np.where(place < 0.8 - spread * (labels == m % classes), labels, (labels + 1 + m % 2) % classes)
            for m in range(models)
        ]
    )
    return recall.audit(labels, dense, {10: after})


@pytest.mark.usefixtures("no_figures")
def test_no_headline_names_a_loss_beyond_what_a_class_can_lose():
    audit = differing_models(2, spread=0.4, classes=2, size=40)
    assert audit.classes["detectable"].isna().all()  # before the cap: several hundred points
    said = headline.headline(audit)
    assert "more than the rest." not in said.replace("to have lost more than the rest", "")
    only = (
        "2 models and 80 test examples cannot show that a class lost more than the rest, even if it lost every example."
    )
    assert only in said
    answers = {finding.topic: finding.text for finding in findings(audit)}
    assert [topic for topic, text in answers.items() if only in text] == ["Is there enough evidence?"]
    assert only in json.loads(audit.to_json())["headline"]
    assert only in page(audit)
    table = display.tables(audit, at_equal_accuracy(audit))["classes"]
    assert "detectable" not in [column.name for column in table.columns]  # n/a in every row


def test_the_evidence_is_not_denied_for_a_class_that_is_shown():
    """A pair of models that loses 7 of 10 classes whole: no class can lose much more than the mean."""
    labels = np.repeat(np.arange(10), 60)
    audit = recall.audit(labels, labels, compare={"l1": np.where(labels < 7, 9, labels)})
    assert (audit.classes["detectable"] < audit.classes["excess"])[:7].all()
    audit = dataclasses.replace(audit, classes=audit.classes.assign(detectable=np.nan))
    said = {finding.topic: finding.text for finding in findings(audit)}
    assert "Shown to have lost more than all examples did: classes" in said["Classes that lost most"]
    assert said["Is there enough evidence?"].startswith("Only for some classes: those named above are shown, but for ")
    assert "cannot show" not in page(audit)


def test_a_headline_says_so_where_no_loss_of_most_classes_can_be_shown():
    audit = differing_models(4, spread=0.3, classes=6)
    most = audit.classes.assign(detectable=[0.1, np.nan, np.nan, np.nan, 0.3, np.nan])
    said = headline.headline(dataclasses.replace(audit, classes=most))
    assert "4 models and 120 test examples cannot show for most classes that they lost more than the rest" in said
    half = audit.classes.assign(detectable=[0.1, np.nan, 0.2, np.nan, 0.3, np.nan])
    assert verdicts.detectable_excess(half) == 0.3


def test_detectable_losses_are_at_most_what_the_class_can_lose():
    for models, spread in ((1, 0.0), (2, 0.1), (3, 0.2), (5, 0.1), (8, 0.3)):
        classes = differing_models(models, spread=spread).classes
        known = classes[classes["detectable"].notna()]
        assert (known["detectable"] <= known["recall_dense"]).all()


def test_a_detectable_change_of_alpha_by_more_than_1_is_said_as_what_cannot_be_shown():
    audit = differing_models(2, spread=0.4)
    row = dict(audit.summary.iloc[-1]) | {"alpha_corrected_detectable": 4.5}
    assert words.no_alpha_shown(row, audit) == (
        "2 models and 80 test examples are too few to judge whether class differences changed: growth would be noticed "
        "only if alpha were above 5.50"
    )


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("names", [("int8",), ("int8", "int4")])
def test_a_page_of_named_models_does_not_say_that_they_were_pruned(names):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)

    def made(rate):
        return np.where(rng.random((3, 200)) < rate, rng.integers(0, 4, (3, 200)), labels)

    audit = recall.audit(labels, made(0.1), compare={name: made(0.5) for name in names}, rng=0, resamples=20)
    text = page(audit, images=rng.random((200, 4, 4)))
    assert "<p>Examples for which most" in text
    said = text.replace("Recall Distortion in Neural Network\nPruning and the Undecayed Pruning Algorithm", "")
    said = re.sub(r"<(style|script)>.*?</(style|script)>", "", said, flags=re.DOTALL)
    assert not re.findall(r"(?i).{0,40}(?:prun(?!e )|pies\)|the score).{0,40}", said)
    assert not re.findall(r".{0,40}(?:one score|Two scores|Compare scores).{0,40}", said)


def test_the_terminal_shows_names_without_a_ratio(capsys):
    audit = recall.audit([0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0], compare={"int8": [0, 0, 1, 1, 1, 0]})
    print_summary(audit)
    (header,) = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line and "models" in line]
    assert header.split()[:2] == ["name", "models"]


def test_the_terminal_shows_the_recall_of_every_class(capsys):
    print_summary(recall.audit(["a", "a", "a", "b", "b"], ["a", "a", "a", "b", "a"], {4: ["a", "a", "b", "b", "b"]}))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["class", "examples", "recall,", "dense", "recall,", "4x", "change"] in lines
    assert ["a", "3", "100.0%", "66.7%", "-33.3", "points"] in lines
    assert ["b", "2", "50.0%", "100.0%", "+50.0", "points"] in lines


def test_no_accuracy_is_printed_as_100_unless_it_is(capsys):
    labels = np.arange(3000) % 2
    audit = recall.audit(labels, labels, {4: np.where(np.arange(3000) == 7, 1 - labels, labels)})
    print_summary(audit)
    assert ["4", "1", "99.97%"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "accuracy 99.97%, alpha" in captions.captions(audit)["tradeoff"].alternative


# What a reader without statistics must not get wrong ----------------------------------------------------


def test_a_named_class_and_an_open_alpha_are_said_to_be_two_questions():
    said = one_dense_one_compressed([200] * 4, [0.98, 0.85, 0.5, 0.7], [0.98, 0.5, 0.5, 0.7]).headline
    assert said.startswith(
        "Class 1 lost most at 10x compression: recall fell from 85% to 50% (200 test examples), signifi"
    )
    assert (
        "This compares one class with all examples; alpha shows whether weak classes in general fell further behind "
        "strong ones. Differences between weak and strong classes are not shown to "
        "have changed at 10x compression (corrected alpha"  # standard deviation in points: 17.7 before, 19.7 after
    ) in said


def test_a_class_that_gained_or_lost_less_than_the_rest_is_named():
    said = one_dense_one_compressed([100] * 5, [0.9] * 4 + [0.5], [0.9] * 4 + [0.95]).headline
    assert said.startswith(
        "Class 4 gained most at 10x compression: recall rose from 50% to 95% (100 test examples). No class is "
        "shown to have lost more than the rest; accuracy went from 82.0% to 91.0%, +9.0 points; 0 examples lost and 45 "
        "won."
    )
    said = one_dense_one_compressed([100] * 5, [0.9] * 5, [0.5] * 4 + [0.9]).headline
    assert said.startswith(
        "Class 4 lost less than the rest at 10x compression: recall stayed at 90% (100 test examples). No"
    )
    said = one_dense_one_compressed([200] * 3, [0.9, 0.8, 0.5], [0.6, 0.8, 0.8]).headline
    assert said.startswith("Class 0 lost most at 10x compression: recall fell from 90% to 60% (200 test examples)")
    assert " Class 2 gained: recall rose from 50% to 80% (200 test examples)." in said


def test_a_class_that_gained_less_than_the_rest_is_named():
    """Its p-value is tiny, and the headline said that no single class can be named."""
    said = one_dense_one_compressed([200] * 6, [0.6] * 6, [0.6] + [0.8] * 5).headline
    assert said.startswith(
        "Class 0 gained less than the rest at 10x compression: recall stayed at 60% (200 test examples). No class is "
        "shown to have lost more than the rest; accuracy went from 60.0% to 76.7%, +16.7 points; 0 examples lost and "
        "200 won."
    )
    said = one_dense_one_compressed([200] * 10, [0.6] * 10, [0.6] * 2 + [0.8] * 8).headline
    assert " Also shown to have gained less than all examples together: class 1 (60% to 60% of 200). No class" in said


def test_a_handful_of_examples_that_make_the_loss_uneven_are_named():
    said = one_dense_one_compressed([300] * 4 + [2], [0.9] * 4 + [1.0], [0.9] * 4 + [0.0]).headline
    assert "The loss is not even over the classes" in said
    assert "no single class can be named; class 4 lost 2 of 2 test examples, too few to say more." in said
    assert "a class of typical size that lost up to" in said


def test_a_lower_ratio_at_which_a_class_lost_more_is_in_the_headline():
    labels = np.repeat(np.arange(4), 100)
    dense = np.where(np.arange(400) % 10 == 0, (labels + 1) % 4, labels)
    broken = np.where(labels == 2, 0, dense)
    later = np.where(np.arange(400) % 100 == 11, (labels + 1) % 4, dense)
    said = recall.audit(labels, dense, {2: broken, 8: later}).headline
    assert said.startswith("No single class is shown to have lost more than the rest at 8x compression; accuracy")
    assert "Class 2 lost most at 2x compression: recall fell from 90% to 0% (100 test examples)" in said


def test_agreement_at_the_last_ratio_does_not_hide_a_change_at_a_lower_one():
    labels = np.repeat(np.arange(4), 100)
    dense = np.where(np.arange(400) % 10 == 0, (labels + 1) % 4, labels)
    said = recall.audit(labels, dense, {2: np.where(labels == 2, 0, dense), 8: dense}).headline
    assert said.startswith(
        "The model at 8x compression agrees with the dense model on every example. Class 2 lost most"
    )
    assert "at 2x compression: recall fell from 90% to 0% (100 test examples)" in said
    evenly = np.where(np.arange(400) % 5 == 0, (labels + 1) % 4, labels)
    said = recall.audit(labels, dense, {2: evenly, 8: dense}).headline
    assert "Accuracy at 2x compression went from 90.0% to 80.0%, -10.0 points; 40 examples lost and 0 won." in said
    said = recall.audit(labels, dense, {2: dense, 8: dense}).headline
    assert said == "Dense and pruned models agree on every example."


def test_a_model_at_chance_that_is_right_about_most_examples_comes_with_the_class_it_lost():
    labels = np.repeat([0, 1], [1900, 100])
    dense = np.where((labels == 1) & (np.arange(2000) % 5 < 2), 0, labels)
    said = recall.audit(labels, dense, {2: np.zeros(2000, int)}).headline
    assert said.startswith(
        "The model at 2x compression is at chance (mean recall over the classes 50.0%): accuracy went from 98.0% to "
        "95.0%, -3.0 points; 60 examples lost and 0 won. Class 1 lost most at 2x compression: recall fell from 60% to "
        "0% (100 test examples), significantly more than the overall loss of 3.0 points."
    )


def test_a_test_set_of_one_class_and_dense_models_at_chance_are_said():
    with pytest.warns(recall.EmptyClassWarning):
        one = recall.audit(np.zeros(50, int), np.zeros(50, int), {2: np.arange(50) // 45}, num_classes=2).headline
    assert one.startswith("Only one class has test examples; accuracy at 2x compression went from 100.0% to 90.0%")
    assert "weak" not in one
    labels, rng = np.repeat(np.arange(10), 100), np.random.default_rng(0)
    dense, after = rng.integers(0, 10, (2, 1000))
    assert "The dense model is at chance too: check" in recall.audit(labels, dense, {2: after}).headline


def test_all_classes_that_are_shown_are_named_and_ties_are_said():
    said = one_dense_one_compressed([100] * 8, [0.9] * 8, [0.9, 0.9, 0.9, 0.5, 0.9, 0.5, 0.9, 0.9]).headline
    assert said.startswith(
        "Classes 3 and 5 lost most, and equally, at 10x compression: recall fell from 90% to 50% (100 test examples) "
        "and from 90% to 50% (100 test examples), significantly more than the overall loss of 10.0 points."
    )
    said = one_dense_one_compressed([100] * 12, [0.9] * 12, [0.9] * 7 + [0.4, 0.42, 0.44, 0.46, 0.48]).headline
    assert said.startswith(
        "Class 7 lost most at 10x compression: recall fell from 90% to 40% (100 test examples), significantly more "
        "than the overall loss of 19.2 points. Also shown to have lost more than all examples together: classes 8 (90% "
        "to 42% of 100), 9 (90% to 44% of 100) and 2 more."
    )


def test_a_change_of_accuracy_that_is_not_shown_is_said_so():
    sizes, before = [100] * 4, [0.9, 0.8, 0.8, 0.7]
    said = one_dense_one_compressed(sizes, before, [0.9, 0.79, 0.79, 0.7]).headline
    assert (
        "accuracy went from 80.0% to 79.5%, -0.5 points (not shown to differ from 0); 2 examples lost and 0 won" in said
    )
    said = one_dense_one_compressed(sizes, before, [0.8, 0.7, 0.7, 0.6]).headline
    assert "accuracy went from 80.0% to 70.0%, -10.0 points; 40 examples lost and 0 won" in said


def test_counts_of_several_models_are_said_to_be_means():
    labels = np.repeat(np.arange(4), 50)
    dense = np.stack([labels] * 2)
    after = dense.copy()
    after[0, ::10], after[1, ::20] = (labels[::10] + 1) % 4, (labels[::20] + 1) % 4
    assert "; on average over the models 15 examples lost and 0 won" in recall.audit(labels, dense, {2: after}).headline


def test_several_scores_have_sentences_of_their_own_the_worst_first():
    labels = np.repeat(np.arange(4), 200)
    place = np.tile(np.arange(200) / 200, 4)

    def made(*shares):
        return np.where(place < np.asarray(shares)[labels], labels, (labels + 1) % 4)

    dense = made(0.9, 0.85, 0.7, 0.8)
    after = {
        "a": made(0.9, 0.84, 0.7, 0.8),
        "b": made(0.9, 0.4, 0.7, 0.8),
        "c": dense,
        "d": made(0.85, 0.8, 0.65, 0.75),
    }
    audit = recall.audit(labels, dense, scores={name: {20: given} for name, given in after.items()})
    first, second = audit.headline.index("under b at 20x"), audit.headline.index("under d at 20x")
    assert audit.headline.startswith("Class 1 lost most under b at 20x compression: recall fell from 85% to 40% (200 ")
    assert first < second
    assert "No single class is shown to have lost more than the rest under d at 20x compression" in audit.headline
    assert "The tables have the other scores: a and c." in audit.headline
    assert "under a" not in audit.headline
    assert headline.subject(audit) == ("b", 20)


def test_an_interval_that_touches_1_has_enough_digits():
    row = {"alpha_corrected": 1.0061, "alpha_corrected_low": 1.00213, "alpha_corrected_high": 1.0101}
    assert words.estimate(row, "alpha_corrected") == ["1.006", "1.002", "1.010"]
    row = {"alpha_corrected": 1.2, "alpha_corrected_low": 1.0, "alpha_corrected_high": 1.4}
    assert words.estimate(row, "alpha_corrected") == ["1.20", "1.00", "1.40"]
    row = {"alpha_corrected": 0.9, "alpha_corrected_low": 0.8, "alpha_corrected_high": 0.99996}
    assert words.estimate(row, "alpha_corrected") == ["0.90000", "0.80000", "0.99996"]


def test_a_control_alone_is_not_called_pruned():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 100)
    dense, after = (np.where(rng.random((5, 400)) < 0.05 + 0.05 * labels, (labels + 1) % 4, labels) for _ in range(2))
    audit = recall.audit(labels, dense, {"control": {1: after}})
    said = " ".join([audit.headline, *(f"{each.topic} {each.text}" for each in findings(audit))])
    assert "in the control (not pruned)" in said
    assert "pruned" not in said.replace("(not pruned)", "")
    same = recall.audit(labels, dense, {"control": {1: dense}}).headline
    assert same == "Dense and fine-tuned models agree on every example."


@pytest.mark.usefixtures("no_figures")
def test_a_control_under_its_own_name_is_not_called_pruned():
    rng, labels = np.random.default_rng(1), np.repeat(np.arange(4), 50)

    def made(rate):
        return np.where(rng.random((3, 200)) < rate * (1 + labels), (labels + 1) % 4, labels)

    audit = recall.audit(labels, made(0.1), {"magnitude": {4: made(0.12)}, "control": {1: made(0.1)}})
    written = page(audit)
    assert "after compression pruned by magnitude, at ratios 1, 4;" in written
    said = {finding.score: finding.text for finding in findings(audit) if finding.topic == "Is there enough evidence?"}
    assert " differs from 1 in the control (" in said["control"]
    assert " differs from 1 at 4x (" in said["magnitude"]


def test_lost_examples_at_risk_come_with_counts():
    labels = np.repeat([0, 1], 50)
    logits = np.stack([labels == 0, labels == 1], 1) * np.linspace(0.1, 5, 100)[:, None]
    after = logits.copy()
    few, some = [0, 1, 60], [0, 1, 2, 60, 61, 62]
    after[some] = after[some][:, ::-1]
    audit = recall.audit(labels, logits, {2: after})
    (text,) = [each.text for each in findings(audit) if each.topic == "Examples at risk"]
    assert "the most uncertain tenth of the examples that it got right contains 3 of the 6 lost ones (50.0%)." in text
    after = logits.copy()
    after[few] = after[few][:, ::-1]
    (text,) = [e.text for e in findings(recall.audit(labels, logits, {2: after})) if e.topic == "Examples at risk"]
    assert text.startswith("Only 3 examples were lost, too few to say how well the dense model's uncertainty predicts")


def test_the_table_of_the_terminal_fits_80_columns_and_has_a_legend(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(audits.two_scores())
    said = capsys.readouterr().out
    table = said[said.index(" score ") if " score " in said else said.index("score  ") :].splitlines()
    assert max(map(len, said.splitlines())) <= 80
    rows = [line for line in table if line.lstrip().startswith(("magnitude", "<i>random"))]
    assert len(rows) >= 5
    assert all(line.count("%") == 1 for line in rows[:5])
    for name in ("alpha", "seeds", "null"):
        assert f"  {name}: " in said


# One model, and models at chance --------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"pruned": 5}, {"compare": "int8"}])
def test_a_page_of_two_models_speaks_of_one_model_and_of_no_means(given):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 600)
    logits = rng.normal(size=(600, 12)) + 3 * (np.arange(12) == labels[:, None])
    after = logits + rng.normal(size=logits.shape)
    ((name, key),) = given.items()
    text = page(recall.audit(labels, logits, **{name: {key: after}}), images=rng.random((600, 4, 4)))
    said = text[: text.index("Method and caveats")]  # which is about any number of models
    said = re.sub(r"<style>.*?</style>|<[^>]*>", " ", said, flags=re.DOTALL)
    said = said.replace("Share of the compressed models", "")
    plural = "over (?:the )?models|dense models|(?:pruned|int8|compressed) models|1 models|1 examples|most frequent"
    plural = re.findall(rf"(.{{0,40}}(?:{plural}).{{0,40}})", said, re.IGNORECASE)
    assert not [found for found in plural if "Number of compressed models" not in found]


def chance_among(models, gone):
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(4), 200)
    dense, after, more = (np.where(rng.random((models, 800)) < 0.1 + 0.05 * labels, 3 - labels, labels) for _ in "123")
    more[:gone] = 3
    return labels, dense, {2: after, 8: more}


def test_models_at_chance_are_left_out_of_tests_of_alpha_and_of_figures():
    labels, dense, after = chance_among(6, 2)
    audit = recall.audit(labels, dense, after)
    rest = recall.audit(labels, dense[2:], {ratio: given[2:] for ratio, given in after.items()})
    mixed, alone = (each.tests[each.tests["question"] == "ratio"].iloc[0] for each in (audit, rest))
    assert mixed["p"] == pytest.approx(alone["p"])
    assert mixed["left_out"] == 2
    (whole,), (drawn,) = (each.figures()["null"].axes[0].collections for each in (rest, audit))
    np.testing.assert_allclose(drawn.get_offsets()[6:], whole.get_offsets()[4:])
    assert len(drawn.get_offsets()) == 6 + 4
    assert "Models at chance are left out" in captions.captions(audit)["scatter"].text
    points = [axes.collections[0].get_offsets() for axes in audit.figures()["scatter"].axes if axes.axison]
    assert [len(each) for each in points] == [6 * 4, 4 * 4]


def test_without_an_alpha_only_recalls_and_their_variance_are_drawn():
    audit = recall.audit(*chance_among(3, 3))
    one = recall.audit(audits.LABELS, audits.DENSE[0], {10: np.full(audits.EXAMPLES, 2)})
    assert set(one.figures()) == set(audits.undefined().figures()) == {"recall", "variance"}
    assert any(warning == "pruned at 10: the model predicts class 2 for every example" for warning in one.warnings)
    (text,) = [each.text for each in findings(one) if each.topic == "Collapsed models"]
    assert text == "The model is at chance, so there is no alpha."
    assert "others" not in " ".join(each.text for each in findings(audit) if each.topic == "Collapsed models")


def test_nothing_is_concluded_from_an_alpha_that_is_noise():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 20)
    dense, after = (np.where(rng.random((10, 2000)) < 0.15, (labels + 1) % 100, labels) for _ in range(2))
    audit = recall.audit(labels, dense, {4: after})
    assert audit.summary["alpha_high"].iloc[0] < 1
    answers = {each.topic: each.text for each in findings(audit)}
    assert "More than the lost accuracy explains?" not in answers
    assert "side of 1" not in answers["Is there enough evidence?"]


def test_no_interval_of_a_change_goes_beyond_what_is_possible():
    labels = np.repeat([0, 1, 2], [3, 40, 40])
    after = labels.copy()
    after[[0, 5]] = 2
    audit = recall.audit(labels, labels, compare={"int8": after}, groups={"age": labels})
    for table in (audit.classes, audit.groups):
        assert table["change_low"].min() == -1
        assert table["change_high"].max() <= 1


@pytest.mark.usefixtures("no_figures")
def test_several_dense_models_and_one_compressed_are_not_called_two_models():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 80)
    dense, after = (
        np.where(rng.random((models, 400)) < rate, 4 - labels, labels) for models, rate in ((5, 0.1), (1, 0.3))
    )
    audit = recall.audit(labels, dense, {4: after}, paired=False)
    said = " ".join([audit.headline, *(each.text for each in findings(audit)), *audit.warnings])
    assert "two models" not in said
    assert "on average over the models" in audit.headline
    assert audit.headline.endswith("This holds for these models; other training runs may differ.")
    assert "one compressed model only" in said
    assert "Examples right before and wrong after, mean over models." in page(audit)


def test_alpha_below_1_from_noise_alone_is_not_called_narrowed():
    """Recalls of 100 classes with 20 examples each, all equal: alpha is near 0, whatever compression does."""
    rng = np.random.default_rng(0)
    audit = recall.audit_counts(
        rng.binomial(20, 0.9, (1, 100)), {4: rng.binomial(20, 0.9, (10, 100))}, support=[20] * 100, paired=False
    )
    assert audit.summary["alpha_high"].item() < 0.5
    assert "narrowed" not in audit.headline
    assert "cannot be judged" in audit.headline


def test_models_needed_are_not_given_for_corrected_alpha():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(10), 60)
    recalls = np.linspace(0.97, 0.8, 10)[labels]
    dense, after = (np.where(rng.random((10, 600)) < recalls, labels, (labels + 1) % 10) for _ in range(2))
    audit = recall.audit(labels, dense, {4: after})
    [text] = [each.text for each in findings(audit) if each.topic == "Is there enough evidence?"]
    assert "corrected alpha differs from 1" in text
    assert "would take" not in text


def test_the_riskiest_tenth_does_not_depend_on_the_order_of_the_examples():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(10), 100)
    dense = np.tile(labels, (3, 1))
    dense[0, rng.choice(1000, 20, replace=False)] += 1
    after = dense % 10
    after[:, :50] = 9
    order = rng.permutation(1000)
    first, other = (recall.audit(labels[at], dense[:, at] % 10, {2: after[:, at]}) for at in (np.arange(1000), order))
    assert first.summary["risk_found"].item() == pytest.approx(other.summary["risk_found"].item())
    assert first.summary["risk_found"].item() < 10


def test_no_gain_is_listed_among_the_largest_losses():
    labels = np.repeat([0, 1, 2], 40)
    wrong = np.where(np.arange(120) % 4 == 0, (labels + 1) % 3, labels)
    audit = recall.audit(labels, wrong, {2: labels})
    assert captions.captions(audit)["recall"].alternative.endswith("largest losses: none.")


def test_an_example_that_half_of_the_models_lost_counts_as_lost_though_others_won_it():
    labels = np.arange(50) % 2
    wrong = np.where(np.arange(50) < 40, 1 - labels, labels)
    dense, after = np.stack([labels] * 7 + [wrong] * 3), np.stack([labels] * 2 + [wrong] * 5 + [labels] * 3)
    audit = recall.audit(labels, dense, {2: after})
    assert audit.at_risk["lost"].tolist() == pytest.approx([0.5] * len(audit.at_risk))
    assert audit.summary["risk_lost"].item() == 40
