"""Errors of the audit give the name, index and value of the wrong input."""

import inspect

import numpy as np
import pytest

from jprune import recall
from jprune.recall import InputError
from jprune.recall.inputs import arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [[0, 2], [1, 0]]}, r"labels must have shape \(examples,\), got \(2, 2\)"),
        ({"labels": []}, "labels contains no example"),
        ({"labels": [0, -1, 1]}, "labels contains -1 at example 1"),
        ({"labels": [0, 0.5, 1]}, r"labels contains 0.5 at example 1"),
        (
            {"labels": [0, 1, 10**9]},
            "labels contains 1000000000 at example 2; expected class indices, whole numbers in 0..46339",
        ),
        ({"dense": [0, 1, 2**40]}, "dense contains 1099511627776 at example 2; expected class indices"),
        ({"labels": ["a", "b", "c"]}, "labels contains class names, dense contains numbers: pass class_names"),
        ({"dense": [[0, 1], [0, 1]]}, r"dense has shape \(2, 2\); for 3 labels"),
        ({"dense": [[0, 1, 0], [0, 1]]}, "dense does not convert"),
        (
            {"dense": [0, 1, 2]},
            "dense contains 2 at model 0, example 2; the largest label in labels is 1: allowed 0..1",
        ),
        ({"dense": [[[0.1, 0.9], [np.nan, 0.1], [0.5, 0.5]]]}, "NaN among the logits of model 0, example 1, class 0"),
        ({"dense": [[0, 1], [1, 1], [0, 1]]}, "transpose it"),
        ({"dense": np.eye(3) * 2}, r"dense contains whole numbers as floats, of shape \(3, 3\) for 3 labels"),
        ({"pruned": {2.0: [[0, 1, 1], [0, 1, 0]]}}, r"pruned\[2.0\] has 2 models, dense has 1"),
        ({"pruned": {2.0: [0, 3, 1]}}, r"pruned\[2.0\] contains 3 at model 0, example 1"),
        ({"pruned": {"m": {4: [0, -3, 1]}}}, r"pruned\['m'\]\[4\] contains -3 at example 1"),
        ({"pruned": {}}, "pruned is empty"),
        ({"pruned": {"m": {}}}, r"pruned\['m'\] must be \{ratio: predictions\}"),
        ({"pruned": {0.5: [0, 1, 1]}}, "ratio 0.5"),
        ({"pruned": {float("nan"): [0, 1, 1]}}, "ratio nan"),
        ({"pruned": {True: [0, 1, 1]}}, "got True"),
        ({"pruned": {"m": [0, 1, 1]}}, r"pruned\['m'\] must be"),
        ({"pruned": {"m": {2: [0, 1, 1]}, 2: [0, 1, 1]}}, "mixes scores"),
        ({"pruned": [0, 1, 1]}, "pruned must be"),
        ({"dense": {"other": [0, 1, 1]}}, r"dense has the keys \['other'\]; the names or"),
        ({"class_names": ["a"]}, "labels contains 1 at example 1; 1 class names were given"),
        ({"class_names": ["a", "a"]}, r"class_names\[1\] repeats 'a'"),
        ({"class_names": "ab"}, "must be a list of names"),
        ({"class_names": ["a", "b\n"]}, "printable"),
        ({"class_names": ["a", "a "]}, r"class_names\[1\] repeats 'a'"),
        ({"class_names": {"a"}}, r"list of names in the order of the classes, got \{'a'\}"),
        ({"num_classes": True}, "num_classes must be a whole number, got True"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "2 class names were given, but num_classes is 3"),
        ({"num_classes": 0}, "must lie in 1..46340"),
        ({"groups": [0, 1]}, r"groups\['group'\] must have shape \(3,\)"),
        (
            {"groups": {"sex": np.array(["m", 0.5, "f"], object)}},
            r"groups\['sex'\] must contain text or whole numbers, got 0.5 at example 1",
        ),
        ({"level": 99.0}, "level must lie strictly between 0 and 1"),
        ({"threshold": 50}, "threshold must lie between 0 and 1, got 50"),
        ({"rng": -1}, "rng must be a generator, a seed of 0 or more, or None, got -1"),
        ({"pruned": {"2": [0, 1, 1]}}, "text is the name of a score, a ratio is a number"),
        ({"pruned": None}, "compressed models once: as pruned="),
        ({"scores": {2: [0, 1, 1]}}, "compressed models once: as pruned="),
    ],
)
def test_wrong_arguments_are_refused_by_name_index_and_value(change, message):
    given = {"labels": [0, 1, 1], "dense": [0, 1, 0], "pruned": {2.0: [0, 1, 1]}, **change}
    with pytest.raises(ValueError, match=message):
        recall.audit(**given)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (arguments.check_level, "0.99"),
        (arguments.check_margin, None),
        (arguments.check_margin, True),
        (arguments.check_threshold, "0.5"),
        (arguments.check_top_k, 2.5),
        (arguments.check_resamples, 1e3),
    ],
)
def test_a_setting_that_is_no_number_is_refused_without_a_type_checker(check, value):
    with pytest.raises(ValueError, match=r"must be a (whole )?number, got"):
        inspect.unwrap(check)(value)


@pytest.mark.parametrize(
    ("dense", "pruned", "options", "message"),
    [
        (
            [9, 11],
            {2: [9, 7]},
            {"support": [10, 10]},
            r"dense contains 11 at index \(0, 1\): the class has 10 examples",
        ),
        ([9, 7], {2: [9, 7, 1]}, {"support": [10, 10]}, "support must contain 3 whole numbers"),
        ([9, -7], {2: [9, 7]}, {"support": [10, 10]}, "dense contains -7"),
        ([0.9, 0.7], {2: [9, 7]}, {"support": [10, 10]}, r"dense must contain whole numbers, .*astype\(int\)"),
        ([9, 7], {2: [9, 7]}, {}, "dense must contain confusion counts"),
        (
            [[8, 2], [1, 9]],
            {2: [[8, 2], [1, 8]]},
            {},
            r"pruned\[2\] and dense are of different test sets: class 1 has 9 and 10",
        ),
        (
            [9, 7],
            {2: [9, 7]},
            {"support": [10, -1]},
            r"support contains -1 at index \(1,\): a class has 0 examples or more",
        ),
        ([0, 0], {2: [0, 0]}, {"support": [0, 0]}, "support is 0 throughout"),
        ([[8, 2], [1, 9]], {2: np.eye(3, dtype=int)}, {}, "of different test sets: 3 and 2 classes"),
        ([[[8, 2], [1, 9]], [[8, 2], [1, 8]]], {2: [[8, 2], [1, 9]]}, {}, "model 0 saw 10 examples of the class"),
        ([[0, 0], [0, 0]], {2: [[0, 0], [0, 0]]}, {}, "dense contains no example"),
        ([9, 7], {2: [9, 7]}, {"support": [10, 10], "class_names": ["a"]}, "1 class names were given"),
        ([9, 7], {2: [9, 7]}, {"support": [10, 10], "margin": 10.0}, "margin must lie between 0 and 10"),
        ([9, 7], {2: [9, 7]}, {"support": [10, 10], "level": 99}, "level must lie strictly between 0 and 1"),
    ],
)
def test_wrong_counts_are_refused(dense, pruned, options, message):
    with pytest.raises(InputError, match=message):
        recall.audit_counts(dense, pruned, **options)
