"""The tables of the page: the rows shown when there are too many."""

import re
from collections import Counter

import numpy as np
import pandas as pd

from jprune import recall
from jprune.recall.report.display import tables
from jprune.recall.report.page import at_equal_accuracy
from tests.recall import audits


def test_a_table_too_long_for_the_page_keeps_what_changed_most_at_every_score_and_ratio(monkeypatch):
    monkeypatch.setattr("jprune.recall.report.display._MOST_ROWS", 10)
    monkeypatch.setattr("jprune.recall.report.display._LEAST_ROWS", 2)
    audit = audits.two_scores()
    shown = tables(audit, at_equal_accuracy(audit))
    stacks = [f"{ratio:g} {score}" for score, ratio in zip(audit.summary["score"], audit.summary["ratio"], strict=True)]
    for name in ("classes", "groups"):
        assert sorted(row.stack for row in shown[name].rows) == sorted(2 * stacks)
        assert re.fullmatch(r"10 of \d+ rows are shown; Audit.to_csv \(--csv\) writes all.", shown[name].note)
    drawn = Counter(row.stack for row in shown["pies"].rows)
    assert set(drawn) == set(stacks)
    assert max(drawn.values()) == 2
    pies = audit.pies[(audit.pies["score"] == "magnitude") & (audit.pies["ratio"] == 10)]
    wanted = pies["label"].map(dict(enumerate(audits.NAMES))).value_counts().head(2)
    got = {row.cells[2].text: row.cells[4].text for row in shown["pies"].rows if row.stack == "10 magnitude"}
    assert got == {name: str(count) for name, count in wanted.items()}
    change = audit.classes[(audit.classes["score"] == "magnitude") & (audit.classes["ratio"] == 10)]
    lost = change.sort_values("change")["class"].head(2)
    assert {row.cells[2].text for row in shown["classes"].rows if row.stack == "10 magnitude"} == set(lost)


def test_a_recall_close_to_all_is_not_shown_as_100_percent():
    labels = np.repeat([0, 1], 3_000)
    audit = recall.audit(labels, np.where(np.arange(6_000) == 0, 1, labels), {2: labels})
    table = tables(audit, pd.DataFrame())["classes"]
    place = [column.name for column in table.columns].index("recall_dense")
    assert [row.cells[place].text for row in table.rows] == ["99.97", "100.0"]


def test_an_infinite_divergence_is_sorted_as_the_largest_number():
    labels = np.repeat([0, 1], 20)
    dense, after = np.where(labels[:, None] == [0, 1], 0.75, 0.25), np.eye(2)[labels]
    after[0] = 0.9, 0.1  # one-hot rows alone are classes
    table = tables(recall.audit(labels, dense, {2: after}), pd.DataFrame())["probabilities"]
    place = [column.name for column in table.columns].index("kl")
    assert {row.cells[place] for row in table.rows} == {("inf", "Infinity")}
