"""The benchmarks' own arithmetic: verdicts, tables, and that both sides of a pair do the same work."""

import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jprune

torch = pytest.importorskip("torch", reason="the benchmarks need the extra bench")

from benchmarks import __main__ as command
from benchmarks import arithmetic, audit, growth, in_torch, moons, replicates, sparsegpt, steps, timing, tracing
from experiments.data import datasets
from experiments.training.steps import Recipe


def _clock(monkeypatch, *durations):
    """Make the calls of each side take the times given by its iterator."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def side_of(series):
        series = iter(series)

        def side():
            now[0] += next(series)

        return side

    return [side_of(series) for series in durations]


def test_a_ratio_is_the_median_over_pairs_after_two_warm_up_calls(monkeypatch):
    ours, peer = _clock(monkeypatch, [9.0, 1.0, 1, 2, 3, 4, 5, 6, 7], [9.0, 1.0, 2, 2, 2, 2, 2, 2, 2])
    monkeypatch.setattr(timing, "LONG", 10.0)
    row = timing.compare("a", "b", ours, peer, must=2.0)
    assert (row.ours, row.peer, row.ratio, row.interval) == (4, 2, 2, None)
    assert row.passed


@pytest.mark.parametrize(
    ("brief", "order"),
    [(0.0, "abbaabba"), (1.0, "aabbbbaaaabbbbaa")],  # a brief side is called once untimed when its turn comes
)
def test_the_order_of_the_sides_alternates(monkeypatch, brief, order):
    monkeypatch.setattr(timing, "BRIEF", brief)
    calls = []
    timing.compare("a", "b", lambda: calls.append("a"), lambda: calls.append("b"), must=1e9, pairs=4)
    assert "".join(calls[4:]) == order


def test_a_side_over_two_seconds_is_timed_once_after_its_warm_up(monkeypatch):
    ours, peer = _clock(monkeypatch, [0.1] * 9, [30.0, 25.0, 20.0])
    row = timing.compare("a", "b", ours, peer, must=0.5)
    assert row.ratio == pytest.approx(0.1 / 20)
    assert row.interval is None


def test_times_are_per_unit_of_work():
    row = timing.judge("a", "b", [8.0 / 16], [1.0], must=0.85)
    assert row.ratio == 0.5


def test_a_close_ratio_is_judged_by_the_lower_bound_of_its_interval():
    """The 95% interval of the median of 50 is that of the order statistics 18 and 33."""
    ratios = np.linspace(1.0, 1.49, 50)
    row = timing.judge("a", "b", ratios, np.ones(50), must=1.18)
    assert row.interval == pytest.approx((ratios[17], ratios[32]))
    assert row.passed
    assert row.ratio > row.must
    assert not timing.judge("a", "b", ratios, np.ones(50), must=1.16).passed


def test_a_short_row_and_one_that_was_not_run_stay_in_the_table():
    rows = [
        timing.judge("fast", "slow", [1.0], [4.0], must=0.5, goal=0.2),
        timing.judge("slow", "fast", [4.0], [1.0], must=0.5, note="why"),
        timing.not_run("none", "other", must=0.25, why="no data"),
    ]
    table = timing.markdown(rows, {"date": "2026-01-01"}).splitlines()
    assert table[4] == "| fast | slow | 1 s | 4 s | 0.25 | 0.5 (goal 0.2) | reached |"
    assert table[5] == "| slow | fast | 4 s | 1 s | 4 | 0.5 | **short** |"
    assert table[6] == "| none | other | - | - | - | 0.25 | **not run** |"
    assert table[8:] == ["* slow, against fast: why.", "* none, against other: not run: no data."]


def test_the_json_holds_null_for_what_was_not_measured(tmp_path):
    command.write([timing.not_run("none", "other", must=0.25, why="no data")], {"date": "today"}, tmp_path)
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["ours"], row["passed"], row["note"]) == (None, False, "not run: no data")


def test_sides_that_differ_or_hold_a_nan_give_no_ratio():
    timing.same("x", 1.0, 1.0 + 1e-7, rtol=1e-6)
    for theirs in (1.1, math.nan):
        with pytest.raises(AssertionError, match="the sides differ: x"):
            timing.same("x", theirs, theirs if math.isnan(theirs) else 1.0, rtol=1e-6)


def test_an_unknown_benchmark_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "nothing"])
    with pytest.raises(SystemExit):
        command.main()
    assert "nothing: not a benchmark; use one of imports, selection" in capsys.readouterr().err


@pytest.mark.optax_promotes
@pytest.mark.parametrize(
    "network",
    [steps.dense(4, 5), pytest.param(steps.lenet()._replace(batch=3), marks=pytest.mark.slow)],
    ids=lambda network: network.name,
)
def test_a_step_and_its_torch_twin_reach_the_same_weights(network):
    """``pair`` raises unless the sides agree; each side then continues to train its own copy."""
    with jax.numpy_rank_promotion("allow"):
        ours, theirs = steps.pair(network, coefficient=0.1)
        losses = [(float(ours()[1]), theirs()) for _ in range(20)]
    assert losses[-1][0] < losses[0][0]
    assert losses[-1][1] < losses[0][1]


@pytest.mark.slow
@pytest.mark.optax_promotes
def test_a_twin_that_reads_its_weights_in_another_order_is_noticed():
    with jax.numpy_rank_promotion("allow"), pytest.raises(AssertionError, match="the sides differ: loss of LeNet"):
        steps.pair(steps.lenet()._replace(batch=3, flattened=None))


def test_weights_that_do_not_fit_the_twin_are_refused():
    twin = in_torch.Dense(2, 3, [4])
    with pytest.raises(ValueError, match="hidden/0/kernel has shape"):
        in_torch.load(twin, {"hidden/0/kernel": np.zeros((3, 4), np.float32)})
    with pytest.raises(ValueError, match=r"no parameters for .*head.weight"):
        in_torch.load(twin, {"hidden/0/kernel": np.zeros((2, 4), np.float32)})


def test_the_penalty_in_torch_is_the_librarys():
    rng = np.random.default_rng(0)
    preacts = [rng.normal(size=(5, 3, 4, 2)).astype(np.float32), rng.normal(size=(5, 7)).astype(np.float32)]
    theirs = in_torch.penalty([torch.from_numpy(np.moveaxis(z, -1, 1).copy()) for z in preacts])
    ours = steps.jumpstart_penalty([jnp.asarray(z) for z in preacts])
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.optax_promotes
def test_moons_and_replicates_do_the_same_on_both_sides():
    """Both raise unless the losses of the two sides agree."""
    with jax.numpy_rank_promotion("allow"):
        rows = moons.at(3, 4, ((1, 2),), 1)
        recipe = Recipe(epochs=(2,), learning_rates=(0.01,))
        rows += replicates.against_torch(datasets.load("digits"), recipe, 8, 1)
    assert len(rows) == 4
    assert all(row.ours > 0 and row.peer > 0 for row in rows)


def test_the_audit_and_the_plain_formulas_agree():
    many, few = (audit.made_up(classes, models=4, examples=800, ratios=(2.0, 10.0)) for classes in (20, 4))
    rows = audit.against_plain(many, few, over_models=200, over_examples=40)
    assert [row.against for row in rows] == [
        "alpha by numpy and scikit-learn, a model at a time",
        "alpha by numpy and scikit-learn, a model at a time",
        "a numpy loop over resamples",
        "numpy and scikit-learn, a resample at a time",
    ]
    assert rows[3].note == "the other side ran 20 resamples, scaled to 40"


def test_a_curve_is_written_with_its_numbers(tmp_path):
    curve = growth.Curve("c", "C", "scores", "seconds", {"a": [(1, 0.5), (10, 5.0)]}, "linear")
    growth.write(curve, tmp_path)
    assert (tmp_path / "c.csv").read_text() == "series,scores,seconds\na,1,0.5\na,10,5.0\n"
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_the_expected_line_ends_at_the_last_point_and_begins_where_the_cost_does():
    x, y = np.array([1.0, 2.0, 5.0]), np.array([3.0, 4.0, 11.0])
    np.testing.assert_allclose(growth._line("constant", x, y), [11, 11, 11])
    np.testing.assert_allclose(growth._line("linear", x, y), [2.2, 4.4, 11])
    np.testing.assert_allclose(growth._line("linear with a start", x, y), [3, 5, 11])


def test_the_sizes_of_the_selection_curve():
    assert growth._powers(10**5, 10**6) == [100_000, 300_000, 1_000_000]


def test_the_arithmetic_of_a_selection_is_what_the_program_for_eight_devices_compiles_to():
    mesh = Mesh(np.array(jax.devices()), ("shard",))
    placed = NamedSharding(mesh, PartitionSpec("shard"))
    rows = (8_000, 16_000, 24_000)
    tree = [jax.device_put(jnp.ones((n, 64)) * jnp.arange(64.0)[None], placed) for n in rows]
    compiled = jax.jit(lambda tree: jprune.global_masks(tree, sparsity=0.9)).lower(tree).compile()
    worked_out = arithmetic.selection(64 * sum(rows), leaves=3, devices=8, probes=1)
    text = compiled.as_text()
    assert not any(moved in text for moved in ("all-gather", "all-to-all", "collective-permute"))
    # One all-reduce a pass, and where ties are cut the counts at the 64 places of a line of each leaf.
    found = arithmetic.reductions(text)
    assert found.count(worked_out.moved_per_pass) >= 1
    assert max(found) <= 3 * 64 * 4
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes == worked_out.scores
    assert memory.output_size_in_bytes == pytest.approx(worked_out.masks, rel=0.01)
    assert memory.temp_size_in_bytes <= 1.01 * worked_out.extra


def test_the_arithmetic_of_a_large_tree():
    """1e11 float32 scores are 400 GB, 390.6 MB on each of 1,024 devices."""
    cost = arithmetic.selection(10**11, leaves=1_000, devices=1_024)
    assert cost.scores == 390_625_000
    assert cost.passes == (8, 2)
    assert cost.moved == 8 * 15 * 1_000 * 4
    assert cost.gathered == 4 * (10**11 - 97_656_250)


def test_the_graphs_that_are_timed_have_the_parameters_and_channels_they_are_named_for():
    """The decoder's and ViT-B/16's published counts; two layers of a small decoder, unrolled and scanned."""
    for create, count in (
        (lambda: tracing.decoder(tracing.Decoder(), scanned=False), 1_235_814_400),
        (lambda: tracing.vision_transformer(tracing.Encoder()), 86_567_656),
    ):
        assert sum(leaf.size for leaf in jax.tree.leaves(create()[1])) == count
    small = tracing.Decoder(layers=2, width=16, heads=4, groups=2, size=4, hidden=24, vocabulary=11)
    for scanned in (False, True):
        graph = jprune.trace_model(*tracing.decoder(small, scanned=scanned))
        assert not graph.unknown
        assert {16, 24} <= {group.size for group in graph.channels}
    encoder = tracing.Encoder(layers=1, width=8, heads=2, patch=4, image=8, classes=3)
    rows = tracing.rows((2,), small, small, encoder)
    assert [row.what for row in rows] == [
        "trace_model, unrolled decoder, 2 layers, 4.1e+03 parameters",
        "trace_model, scanned decoder, 2 layers, 4.1e+03 parameters",
        "trace_model, vision transformer, 1 layers, 1.4e+03 parameters",
        "trace_model, unrolled decoder, 2 layers, 4.1e+03 parameters",
    ]


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"n": 2, "m": 4}])
def test_sparsegpt_in_torch_prunes_as_ours_does(options):
    random = np.random.default_rng(0)
    x = random.normal(size=(600, 200)) @ (np.eye(200) + random.normal(size=(200, 200)) / 14)
    gram, kernel = (x.T @ x).astype(np.float32), random.normal(size=(200, 24)).astype(np.float32)
    ours = jprune.sparsegpt(
        {"kernel": jnp.asarray(kernel)}, {"kernel": jprune.scores.Gram(jnp.asarray(gram))}, **options
    )
    theirs = sparsegpt.published(torch.from_numpy(kernel.T.copy()), torch.from_numpy(gram), **options).numpy().T
    assert ((theirs != 0) == np.asarray(ours.masks["kernel"])).mean() > 0.999
    sparsegpt._same_quality("small", gram, kernel, np.asarray(ours.params["kernel"]), theirs)
