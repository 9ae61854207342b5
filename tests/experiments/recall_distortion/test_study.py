"""A small run of the whole study: training, pruning, storage, resumption and report."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import time
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from PIL import Image
from rich.console import Console

import jprune
from experiments.recall_distortion import __main__ as recall_distortion
from experiments.recall_distortion import config, evidence, oneshot, placement, plan, presets, report, results, runner
from experiments.recall_distortion import study as studies
from experiments.recall_distortion.config import Running
from experiments.recall_distortion.plan import Coefficients, PruningTarget
from experiments.storage import files, store
from experiments.training import replicates

pytestmark = [
    pytest.mark.optax_promotes,
    pytest.mark.filterwarnings("ignore:fewer than five models"),
]


RUNNING = Running(chunk=30, form="vmap", loop="scan", keep_pruned=True)


def small(**changes):
    """The demo with three replicates, two scores and two ratios, for a few epochs."""
    base = dataclasses.replace(
        presets.get("demo"),
        replicates=3,
        ratios=(1, 5),
        scores=("undecayed", "random"),
        epochs=(2,),
        finetune_epochs=(1,),
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def study():
    return small()


@pytest.fixture(scope="module")
def folder(study, tmp_path_factory):
    """The results of a small study that has been run once for all tests of this module."""
    folder = tmp_path_factory.mktemp("study") / "small"
    folder.mkdir()
    (folder / "comparison.csv").write_text("of an earlier report, and removed by one without --compare")
    studies.compute(folder, study, RUNNING)
    return folder


def stage_of(folder, study, jumpstart, target):
    planned = plan.stages(study, results.known(folder, study), Coefficients(jumpstart))
    return next(stage for stage in planned if stage.target == target)


def stored(folder, study, jumpstart, target):
    stage = stage_of(folder, study, jumpstart, target)
    (found,) = store.find(plan.root(folder), stage.kind, stage.settings)
    return found


def test_every_file_is_there(folder, study):
    names = {path.name for path in folder.iterdir()}
    kinds = ("summary", "alphas", "counts", "classes", "dense", "tests", "stopped", "accuracy")
    others = {"config.json", "studies", "made", "metrics.csv", "alpha.png", "figures", "report.html", "store"}
    assert names - {"tensorboard"} == {f"{kind}.csv" for kind in kinds} | others
    drawn = {str(path.relative_to(folder)) for path in folder.rglob("*.png")}
    each = ("alpha", "null", "recall", "tradeoff", "variance", "scatter")
    assert drawn == {"alpha.png"} | {f"figures/jumpstart-{c}/{name}.png" for c in ("0", "0.1") for name in each}
    assert all((folder / path).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in drawn)
    written = json.loads((folder / "config.json").read_text())
    assert config.study_from_json(written["study"]) == study
    assert written["versions"]["jax"] == jax.__version__
    curves = pd.read_csv(folder / "metrics.csv")
    assert {path.parent.name for path in (folder / "store").glob("*/*")} >= {
        f"{'dense' if 'dense' in stage else 'pruned'}-{digest}"
        for stage, digest in zip(curves.stage, curves.digest, strict=True)
    }
    assert len(curves) == 3 * 2 * (2 + 3 * 1)  # replicates, coefficients, epochs of dense training and of 3 prunings
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "random (jumpstart 0.1)" in page


def test_digits_are_drawn_from_black_to_white(folder, study):
    drawn = re.findall(r"data:image/png;base64,([^\"']+)", (folder / "report.html").read_text())
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in drawn]
    stored = np.rint(results.images(folder, study)[..., 0] / 16 * 255)  # the gray levels of digits are 0 to 16
    assert pictures
    assert all((stored == picture).all(axis=(1, 2)).any() for picture in pictures)


def test_pruned_weights_are_zero_after_fine_tuning_and_exactly_as_many_are_kept_as_the_ratio_asks(folder, study):
    # 50,610 parameters, of which 49,200 prunable; a fifth of all is 10,122, less 1,410 that stay.
    for score in study.scores:
        found = stored(folder, study, 0.1, PruningTarget(score, 5.0))
        rows = store.read_table(found, "replicates.parquet")
        assert rows["kept_by_mask"].tolist() == [8712] * 3
        assert rows["nonzero"].tolist() == [8712] * 3
        weights = store.read_weights(found)
        kernels = [weights["0/hidden/0/kernel"], weights["0/hidden/1/kernel"]]
        assert [int(sum((kernel[r] != 0).sum() for kernel in kernels)) for r in range(3)] == [8712] * 3
        assert all((weights["0/head/kernel"][r] != 0).all() for r in range(3))
        before = store.read_weights(stored(folder, study, 0.1, None))["0/hidden/0/kernel"]
        kept = kernels[0] != 0
        assert (before[kept] != kernels[0][kept]).mean() > 0.99, "what is kept was fine-tuned"
    control = store.read_table(stored(folder, study, 0.1, PruningTarget("control", 1.0)), "replicates.parquet")
    assert control["nonzero"].tolist() == [49_200] * 3


def test_channels_are_removed_whole_and_stay_zero_in_fine_tuning(folder, tmp_path, monkeypatch):
    """A 64-300-100-10 network has 50,200 multiply-adds, and half of them are left at t = 2."""
    monkeypatch.setattr(studies, "report", lambda *_: {})
    folder = shutil.copytree(folder, tmp_path / "copy")  # other tests read the reports in the folder
    study = small(structure="channels", ratios=(1, 2), scores=("magnitude",), jumpstart=(0.0,))
    known = results.known(folder, study)
    hashed = lambda score, **changes: plan.pruned_settings(
        dataclasses.replace(study, **changes), known, Coefficients(0.0), PruningTarget(score, 2.0)
    )
    assert hashed("magnitude") == hashed("magnitude", structure="weights") | {"structure": "channels"}
    assert hashed("control") == hashed("control", structure="weights")
    studies.compute(folder, study, RUNNING)
    weights = store.read_weights(stored(folder, study, 0.0, PruningTarget("magnitude", 2.0)))
    for replicate in range(3):
        one, two, head = (weights[f"0/{name}/kernel"][replicate] for name in ("hidden/0", "hidden/1", "head"))
        first, second = one.any(0), two.any(0)
        np.testing.assert_array_equal(first, two.any(1))
        np.testing.assert_array_equal(second, head.any(1))
        assert not weights["0/hidden/0/bias"][replicate][~first].any()
        assert not weights["0/hidden/1/bias"][replicate][~second].any()
        a, b = int(first.sum()), int(second.sum())
        assert 25_100 - 400 < 64 * a + a * b + 10 * b <= 25_100  # less than the largest channel below the target


def test_biases_of_removed_channels_stay_zero_with_the_penalty_in_fine_tuning():
    """The penalty has a gradient for the bias of a unit without inputs, of which half or more are removed."""
    study = small(
        structure="channels", ratios=(4,), scores=("magnitude",), jumpstart=(0.0,), finetune_jumpstart=(1.0,),
        model="dense", model_options=("depth=2", "width=20"), replicates=1,
    )  # fmt: skip
    lab = runner.equip(study, plan.load(study), Running(chunk=1, form="vmap", loop="scan"))
    dense = runner.train_dense(lab, 0.0, range(1), lambda *_: None).weights
    target = PruningTarget("magnitude", 4.0)
    weights = runner.prune_and_finetune(lab, target, 1.0, range(1), dense=dense, on_epoch=lambda *_: None).weights
    for layer in ("hidden/0", "hidden/1"):
        removed = ~weights[f"0/{layer}/kernel"][0].any(0)
        assert removed.sum() >= 5
        assert not weights[f"0/{layer}/bias"][0][removed].any()
        assert weights[f"0/{layer}/bias"][0][~removed].all()


def test_settings_change_where_other_weights_are_now_fixed_in_fine_tuning_and_only_there(folder, study):
    known = results.known(folder, study)
    hashed = lambda penalty, **changes: plan.pruned_settings(
        dataclasses.replace(study, **changes), known, Coefficients(0.0, penalty), PruningTarget("random", 2.0)
    ).get("masks")
    channels = {"structure": "channels", "scores": ("random",)}
    assert [hashed(0.0), hashed(0.1), hashed(0.0, **channels), hashed(0.0, rounding=4, finetune_epochs=(0,))] == [
        None
    ] * 4
    assert [hashed(0.1, **channels), hashed(0.0, rounding=4)] == [2, 2]


def test_options_of_the_data_apply_to_arrays_from_python_or_are_refused(tmp_path, monkeypatch):
    """Classes 2 and 1 of three, 40 examples each: 10 of each test, and with validation 3, 27 and 27 / 9 train."""
    arrays = {"x_train": np.arange(120, dtype=np.float32)[:, None] * [1, 2], "y_train": np.arange(120) % 3}
    used = []
    monkeypatch.setattr(studies, "compute", lambda *_, dataset, **__: used.append(dataset) or {})
    studies.run("mlp", arrays, small(classes=("2", "1"), imbalance=9.0), out=tmp_path)
    assert used[0].class_names == ("2", "1")
    assert np.bincount(used[0].train.labels).tolist() == [27, 3]
    assert np.bincount(used[0].test.labels).tolist() == [10, 10]
    with pytest.raises(ValueError, match=r"image_size=\(4, 4\) does not apply to data given as arrays"):
        studies.run("mlp", arrays, small(image_size=(4, 4)), out=tmp_path)
    for name, value in (("classes", ("0", "1")), ("imbalance", 2.0), ("selection", "test"), ("image_size", (4, 4))):
        with pytest.raises(ValueError, match=f"{name}=.* does not apply to data given as a Dataset"):
            studies.run("mlp", used[0], small(**{name: value}), out=tmp_path)


def test_without_arguments_the_demo_is_run_as_by_its_command(monkeypatch):
    monkeypatch.setattr(studies, "compute", lambda *given, **rest: given)
    folder, settings, running = studies.run()
    assert (folder.as_posix(), settings, running) == ("runs/demo", presets.get("demo"), presets.running("demo"))


def test_changed_class_names_are_refused_as_reports_would_have_the_old_ones(study, tmp_path):
    dataset = plan.load(study)
    results.store_data(tmp_path, study, dataset)
    results.store_data(tmp_path, study, dataset)
    renamed = dataclasses.replace(dataset, class_names=("zero", *dataset.class_names[1:]))
    with pytest.raises(store.StoreError, match=r"has the class names 0, 1, .* but digits now has zero, 1"):
        results.store_data(tmp_path, study, renamed)


def test_a_limit_keeps_validation_and_test_the_same_if_the_test_split_selects(study):
    dataset = plan.load(dataclasses.replace(study, limit=50, selection="test"))
    assert len(dataset.test.labels) == 50
    assert dataset.validation is dataset.test
    apart = plan.load(dataclasses.replace(study, limit=50))
    assert (apart.validation.images != apart.test.images).any()


def test_the_estimated_hours_are_those_of_the_missing_stages_of_this_run(study, monkeypatch):
    """Two replicates of dense training, 2 epochs each, and one of the control, 1 epoch."""
    dataset, counted = plan.load(study), []
    lab = runner.equip(study, dataset, RUNNING)
    monkeypatch.setattr(placement, "hours", lambda step, study, epochs, examples: counted.append(epochs) or 2.0)
    dense, control, *_ = plan.stages(study, plan.known(study, dataset), Coefficients(0.0))
    shown = studies._introduction(lab, study, dataset, "", [(dense, range(1, 3)), (control, range(1))])
    assert counted == [5]
    assert "about 2.0 h for this run" in shown


def test_a_model_without_removable_channels_is_refused_by_name():
    study = small(structure="channels", scores=("magnitude",), model="dense", model_options=("depth=1", "width=1"))
    with pytest.raises(ValueError, match=r"structure='channels' cannot prune dense: .*no group of channels"):
        runner.equip(study, plan.load(study))
    with pytest.raises(ValueError, match="scores has undecayed-signed, which selects single weights"):
        small(structure="channels", scores=("undecayed-signed",))


def test_counts_sum_to_the_test_set_and_are_those_of_the_stored_weights(folder, study):
    truth = results.truth(folder, study)
    for target in (None, PruningTarget("control", 1.0), PruningTarget("undecayed", 5.0)):
        found = stored(folder, study, 0.0, target)
        counts = store.read_table(found, "counts.parquet")
        assert counts.groupby("replicate")["count"].sum().tolist() == [450] * 3
        predictions = np.stack(store.read_table(found, "predictions.parquet")["prediction"])
        table = np.zeros((3, 10, 10), int)
        table[counts["replicate"], counts["true"], counts["predicted"]] = counts["count"]
        for r in range(3):
            np.testing.assert_array_equal(
                table[r], [[((truth.labels == i) & (predictions[r] == j)).sum() for j in range(10)] for i in range(10)]
            )
        weights = store.read_weights(found)
        dataset = plan.load(study)
        x = (dataset.test.images.reshape(450, 64) - float(dataset.mean[0])) / float(dataset.std[0])
        for layer in ("hidden/0", "hidden/1"):
            x = np.maximum(x @ weights[f"0/{layer}/kernel"][1] + weights[f"0/{layer}/bias"][1], 0)
        logits = x @ weights["0/head/kernel"][1] + weights["0/head/bias"][1]
        assert (logits.argmax(1) == predictions[1]).mean() > 0.997  # to float tolerance


def test_alphas_in_the_report_are_worked_out_from_the_stored_counts(folder, study):
    alphas = pd.read_csv(folder / "alphas.csv")
    counts = pd.read_csv(folder / "counts.csv")
    assert len(alphas) == 2 * 2 * 2 * 3  # coefficients, scores, ratios, replicates
    assert set(alphas["jumpstart"]) == {0.0, 0.1}
    for _, row in alphas.iterrows():
        same = (
            counts[["jumpstart", "score", "ratio", "replicate"]] == row[["jumpstart", "score", "ratio", "replicate"]]
        ).all(axis=1)
        of = counts[same]
        assert of["support"].sum() == 450
        a1, at = of["correct_dense"].sum() / 450, of["correct"].sum() / 450
        b1 = of["correct_dense"] / of["support"] / a1 - 1
        bt = of["correct"] / of["support"] / at - 1
        assert row["alpha"] == pytest.approx((b1 * bt).sum() / (b1**2).sum(), rel=1e-9)
        assert row["alpha_null"] == pytest.approx((1 - at) / (1 - a1) * a1 / at, rel=1e-9)
        kept = 49_200 if row["ratio"] == 1 else 8712
        assert row["achieved_ratio"] == pytest.approx(50_610 / (1410 + kept))
    control = alphas[alphas["ratio"] == 1].pivot(index=["jumpstart", "replicate"], columns="score", values="alpha")
    assert (control["undecayed"] == control["random"]).all()


def test_the_table_of_dense_accuracy_is_worked_out_from_the_stored_predictions(folder, study):
    table = pd.read_csv(folder / "accuracy.csv")
    labels = results.truth(folder, study).labels
    for jumpstart, row in zip(study.jumpstart, table.itertuples(), strict=True):
        predictions = store.read_table(stored(folder, study, jumpstart, None), "predictions.parquet")["prediction"]
        accuracies = [(found == labels).mean() for found in predictions]
        assert row.audit == f"mlp on digits, jumpstart {jumpstart:g}"
        assert row.networks == 3
        expected = [np.mean(accuracies), np.std(accuracies, ddof=1), min(accuracies), max(accuracies)]
        np.testing.assert_allclose([row.mean, row.standard_deviation, row.lowest, row.highest], expected, rtol=1e-9)


def test_the_penalty_is_in_dense_training_alone(folder, study):
    dense = [store.read_weights(stored(folder, study, c, None))["0/hidden/0/kernel"] for c in (0.0, 0.1)]
    assert (dense[0] != dense[1]).any()
    assert plan.finetune_recipe(study).jumpstart == 0
    assert stage_of(folder, study, 0.1, None).settings["recipe"]["jumpstart"] == 0.1


@pytest.mark.slow
def test_the_report_comes_from_the_store_alone(folder, study, capsys, monkeypatch):
    monkeypatch.setattr(plan, "load", None)
    monkeypatch.setattr(files, "write_figure", lambda *_: None)  # those of the first report are still there
    before = (folder / "alphas.csv").read_text()
    (folder / "alphas.csv").unlink()
    assert recall_distortion.main(["report", "--out", str(folder)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"The report is {folder / 'report.html'}"
    assert "Jumpstart 0.1: 3 of 3 networks (mlp) on digits, 450 test examples; dense accuracy 0.9" in said
    assert "Does the jumpstart penalty change alpha?" in said
    assert (folder / "alphas.csv").read_text() == before
    assert recall_distortion.main(["status", "--out", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "   3 of 3  jumpstart 0.1: random, t = 5" in lines
    assert len(lines) == 2 * 4


@pytest.mark.slow
def test_studies_side_by_side_are_tested_and_tabled(folder, study, tmp_path):
    """This study at coefficient 0.1 compared with the recorded one at its first coefficient, 0: Welch's t by scipy."""
    shutil.copytree(folder / "store", tmp_path / "store")
    here = dataclasses.replace(study, jumpstart=(0.1,))
    report.write(tmp_path, here, Console(file=io.StringIO()), compare=(folder,))
    alphas = pd.read_csv(folder / "alphas.csv").groupby(["jumpstart", "score", "ratio"])["alpha"].apply(list)
    table = pd.read_csv(tmp_path / "comparison.csv")
    assert len(table) == 2 * 2  # scores, ratios
    other = f"mlp on digits, {folder.name}"
    for row in table.itertuples():
        assert (row.audit, row.other_audit, row.alternative) == ("mlp on digits", other, "greater")
        first, second = (alphas[c, row.score, row.ratio] for c in (0.1, 0.0))
        p = scipy.stats.ttest_ind(first, second, equal_var=False, alternative="greater").pvalue
        assert row.p == pytest.approx(p, rel=1e-9)
        assert row.p_bonferroni == pytest.approx(min(1, 2 * p), rel=1e-9)
    assert pd.read_csv(tmp_path / "accuracy.csv")["audit"].tolist() == ["mlp on digits, jumpstart 0.1", other]
    assert (tmp_path / "comparison.png").exists()
    with pytest.raises(ValueError, match="two studies are both called 'mlp on digits, small'"):
        report.write(tmp_path, here, Console(file=io.StringIO()), compare=(folder, folder))
    with pytest.raises(store.StoreError, match=r"nowhere, which has no config\.json; use another folder"):
        report.write(tmp_path, here, Console(file=io.StringIO()), compare=(tmp_path / "nowhere",))


def test_the_second_run_trains_nothing(folder, study, monkeypatch):
    monkeypatch.setattr(runner, "train_dense", None)
    monkeypatch.setattr(runner, "prune_and_finetune", None)
    monkeypatch.setattr(studies, "report", lambda *_: {})
    studies.compute(folder, study, RUNNING)
    assert studies.todo(folder, study, results.known(folder, study), chunk=30) == []


def test_a_stage_that_is_lost_is_made_again_with_the_same_numbers(folder, study, monkeypatch):
    monkeypatch.setattr(studies, "report", lambda *_: {})
    found = stored(folder, study, 0.0, PruningTarget("random", 5.0))
    before = {name: store.read_table(found, f"{name}.parquet") for name in ("predictions", "replicates", "counts")}
    shutil.rmtree(found.path)
    studies.compute(folder, study, RUNNING)
    for name, table in before.items():
        pd.testing.assert_frame_equal(store.read_table(found, f"{name}.parquet"), table)


def test_more_replicates_leave_those_that_are_there(folder, study):
    more = dataclasses.replace(study, replicates=4, jumpstart=(0.0,), scores=("random",))
    work = studies.todo(folder, more, results.known(folder, more), chunk=30)
    assert [mine for _, mine in work] == [range(3, 4)] * 3
    assert [stage.target for stage, _ in work] == [None, PruningTarget("control", 1.0), PruningTarget("random", 5.0)]


def test_a_stopped_replicate_is_left_out_with_its_reason(folder, study, tmp_path):
    copy = dataclasses.replace(study, jumpstart=(0.0,), scores=("random",))
    results.store_data(tmp_path, copy, plan.load(copy))
    for stage in plan.stages(copy, results.known(tmp_path, copy), Coefficients(0.0)):
        (done,) = store.find(plan.root(folder), stage.kind, stage.settings)
        summary = {name: column.to_numpy() for name, column in store.read_table(done, "replicates.parquet").items()}
        if stage.target is None:
            summary["stopped"] = np.array([-1, 7, -1], np.int32)
        predictions = np.stack(store.read_table(done, "predictions.parquet")["prediction"])
        weights = {"0/head/bias": np.zeros((3, 10), np.float32)}
        results.save(tmp_path, copy, stage, range(3), runner.StageResult(weights, summary, predictions, []))
    found = evidence.gather(tmp_path, copy, results.truth(tmp_path, copy), Coefficients(0.0))
    assert found.stopped.to_dict("records") == [
        {"stage": "jumpstart 0: dense training", "replicate": 1, "reason": "the loss was not finite at step 7"}
    ]
    assert sorted(found.alphas["replicate"].unique()) == [0, 2]
    whole = pd.read_csv(folder / "alphas.csv").set_index(["jumpstart", "score", "ratio", "replicate"])["alpha"]
    for row in found.alphas.itertuples():
        assert row.alpha == pytest.approx(whole[0.0, row.score, row.ratio, row.replicate], rel=1e-12)


def test_a_data_set_that_changed_is_refused(folder, study, monkeypatch):
    dataset = plan.load(study)
    flipped = dataset.test._replace(images=dataset.test.images[:, ::-1])
    monkeypatch.setattr(plan, "load", lambda *_: dataclasses.replace(dataset, test=flipped))
    with pytest.raises(store.StoreError, match="was made from a data set with fingerprint"):
        studies.compute(folder, study, RUNNING)


def test_the_gradient_of_a_score_is_the_mean_over_its_batches(folder, study):
    dataset = plan.load(study)
    lab = runner.equip(dataclasses.replace(study, gradient_batches=3), dataset, RUNNING)
    index = replicates.place(np.arange(2, dtype=np.int32), lab.placement.mesh)
    params, stats, _ = lab.fresh(index)
    found = lab.gradient((params, stats, index), lab.train)
    key = replicates.key(study.seed, jnp.int32(1), 2)
    order = jax.random.permutation(jax.random.fold_in(key, 0), len(dataset.train.labels))[: 3 * study.batch]
    x = ((dataset.train.images[order] - dataset.mean) / dataset.std).reshape(len(order), 64).astype(np.float64)
    y = dataset.train.labels[order]
    w = {path: np.asarray(leaf[1], np.float64) for path, leaf in zip(*jprune.trees.flatten(params)[:2], strict=True)}
    h1 = np.maximum(x @ w["hidden/0/kernel"] + w["hidden/0/bias"], 0)
    h2 = np.maximum(h1 @ w["hidden/1/kernel"] + w["hidden/1/bias"], 0)
    z = h2 @ w["head/kernel"] + w["head/bias"]
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    back = (p - np.eye(10)[y]) / len(y) @ w["head/kernel"].T * (h2 > 0)
    np.testing.assert_allclose(found["hidden"][1]["kernel"][1], h1.T @ back, rtol=1e-3, atol=1e-6)


def test_more_gradient_batches_than_there_are_examples_are_refused_before_training(folder, study):
    dataset = plan.load(study)
    with pytest.raises(
        ValueError, match=r"gradient_batches=19 of batch=64 examples are more than the 1211 of the training split"
    ):
        runner.equip(dataclasses.replace(study, gradient_batches=19), dataset)


def test_a_report_is_of_the_replicates_that_are_asked_for(folder, study):
    two = dataclasses.replace(study, replicates=2)
    found = evidence.gather(folder, two, results.truth(folder, study), Coefficients(0.0))
    assert sorted(found.alphas["replicate"].unique()) == [0, 1]


def test_the_signed_legacy_keeps_more_than_asked_where_scores_are_negative():
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    scores = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0], [-4.0, -3.0, -0.5, -0.1]])}
    pruned, _, kept = oneshot.prune(params, scores, jnp.int32(3), signed=True)
    # The third largest signed score is 2; -4 and -3 are larger in magnitude and stay too.
    assert int(kept) == 5
    np.testing.assert_array_equal(pruned["kernel"], [[1, 2, 3, 0], [5, 6, 0, 0]])
    exact, _, kept = oneshot.prune(params, {"kernel": jnp.abs(scores["kernel"])}, jnp.int32(3))
    assert int(kept) == 3
    assert int((exact["kernel"] != 0).sum()) == 3


def test_one_program_prunes_to_every_count_and_a_floor_keeps_the_largest_of_each_layer():
    params = {"a": {"kernel": jnp.array([[9.0, -8.0, 7.0, -6.0]])}, "b": {"kernel": jnp.array([[1.0, 3.0, -2.0]])}}
    scores = jax.tree.map(jnp.abs, params)
    prune = jax.jit(chex.assert_max_traces(lambda *inputs: oneshot.prune(*inputs, min_keep=1), n=1))
    for keep, first, second in (
        (2, [9, 0, 0, 0], [0, 3, 0]),
        (4, [9, -8, 7, 0], [0, 3, 0]),
        (6, [9, -8, 7, -6], [0, 3, -2]),
    ):
        pruned, masks, kept = prune(params, scores, jnp.int32(keep))
        assert int(kept) == keep == sum(int(mask.sum()) for mask in jax.tree.leaves(masks))
        np.testing.assert_array_equal(pruned["a"]["kernel"][0], first)
        np.testing.assert_array_equal(pruned["b"]["kernel"][0], second)


def test_published_counts_keep_more_weights_than_the_ratio_says(study):
    """An MLP 64-300-100-10: 50,610 parameters, 49,200 prunable, 1,010 in the head, 400 biases before it."""
    published = dataclasses.replace(study, ratios=(1, 20), counting="shrinkbench")
    dataset = plan.load(study)
    assert runner.equip(dataclasses.replace(study, ratios=(1, 20)), dataset).keep[20.0] == round(50_610 / 20 - 1_410)
    wanted = round((50_610 / 20 - 1_010) * 49_200 / 49_600)
    assert runner.equip(published, dataset).keep[20.0] == wanted
    with pytest.raises(ValueError, match=r"min_keep=600 in each of 2 layers is more than the 1120 weights of ratio 20"):
        runner.equip(dataclasses.replace(study, ratios=(1, 20), min_keep=600), dataset)


@pytest.mark.parametrize("jumpstart", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_the_demo_trains_an_epoch_in_one_program_that_lowers_for_every_platform(jumpstart):
    study = dataclasses.replace(presets.get("demo"), replicates=2)
    dataset = plan.load(study)
    lab = runner.equip(study, dataset, presets.running("demo"))
    phase = lab.dense[jumpstart]
    index = replicates.place(np.arange(2, dtype=np.int32), lab.placement.mesh)
    state = jax.eval_shape(phase.begin.program, jax.eval_shape(lab.fresh.program, index, ()), ())
    shared = (jnp.int32(0), lab.train, lab.validation)
    assert isinstance(phase.epoch, replicates.Spread), "one program an epoch"
    exported = jax.export.export(phase.epoch.program, platforms=("cpu", "cuda", "tpu"))(state, shared)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "while" in exported.mlir_module(), "the steps of the epoch are a loop of the program"


def test_a_folder_with_another_study_warns_and_keeps_its_results(folder, study, tmp_path, capsys, monkeypatch):
    """The same folder with another number of fine-tuning epochs: the error names the options that differ."""
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.setattr(studies, "report", lambda *_: {})
    monkeypatch.setattr(studies, "carry_out", lambda *_: None)
    other = dataclasses.replace(study, finetune_epochs=(2,))
    with pytest.raises(store.StoreError, match="6 stages are missing"):
        studies.compute(tmp_path / "run", other, RUNNING)
    assert "had other options (finetune_epochs: [1] -> [2])" in capsys.readouterr().err
    assert recall_distortion.main(["status", "--all", "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = sorted(line.partition(": ")[2] for line in lines if line.startswith("study"))
    assert titles == [f"{study.model} on {study.dataset}, finetune_epochs ({n},)" for n in (1, 2)]
    assert lines.count("   3 of 3  jumpstart 0: dense training") == 2, "both studies start from the same networks"
    assert [lines.count(f"   {n} of 3  jumpstart 0: random, t = 5") for n in (0, 3)] == [1, 1]


def test_a_stage_that_another_run_computes_is_left_to_it(folder, study, tmp_path, monkeypatch, capsys):
    """Another run has claimed the stage when this run first looks, and stores it in the meantime."""
    shutil.copytree(folder, tmp_path / "run")
    found = stored(tmp_path / "run", study, 0.0, PruningTarget("random", 5.0))
    shutil.move(found.path, tmp_path / "elsewhere")
    claim = found.path.with_name(f"{found.path.name}.claim")
    claim.touch()
    os.utime(claim, (time.time() + 86_400,) * 2)  # it does not expire, however long this run takes to get there

    looks = []

    def other_run(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            shutil.move(tmp_path / "elsewhere", found.path)
            claim.unlink()

    monkeypatch.setattr(studies, "time", types.SimpleNamespace(sleep=other_run))
    monkeypatch.setattr(studies, "report", lambda *_: {})
    monkeypatch.setattr(runner, "prune_and_finetune", None)
    studies.compute(tmp_path / "run", study, RUNNING)
    assert found.done
    assert capsys.readouterr().out.count("waiting for another run; next: jumpstart 0: random, t = 5") == 1


def test_no_sentence_on_alpha_where_nothing_was_pruned_or_has_an_interval():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 100)
    dense, after = (np.where(rng.random((4, 400)) < 0.05 + 0.05 * labels, (labels + 1) % 4, labels) for _ in range(2))
    assert report._alpha_sentence(jprune.recall.audit(labels, dense, {"control": {1: after}})) == ""
    assert report._alpha_sentence(jprune.recall.audit(labels, dense[0], {"magnitude": {4: after[0]}})) == ""
    one = jprune.recall.audit(labels, dense, {"magnitude": {1: dense, 4: after}})
    assert report._alpha_sentence(one) == "The 99% interval of alpha contains 1."
    two = jprune.recall.audit(labels, dense, {"magnitude": {4: after, 8: after[::-1]}})
    assert report._alpha_sentence(two) == "Each of the 2 99% intervals of alpha contains 1."
