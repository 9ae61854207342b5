"""The accelerator benchmarks at sizes for a CPU, and the benchmarks without PyTorch."""

import functools
import json
import math
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import __main__ as command
from benchmarks import accelerator, imports, steps, structured, timing, tracing
from benchmarks import selection as selections
from experiments.models import networks

pytestmark = pytest.mark.optax_promotes
SMALL = accelerator.Sizes(
    scores=(1000,),
    trained=(steps.dense(3, 4),),
    transformer=tracing.Decoder(2, 16, 2, 2, 8, 16, 32),
    tokens=(2, 8),
    penalized=((steps.dense(3, 4), 2.0),),
    replicates=(2, 2),
    replicated=steps.dense(3, 4),
    halved=(lambda: structured.transformer_block(8, 4, 16, 2),),
    updated=100,
    pairs=2,
)


@pytest.fixture
def without_torch(monkeypatch):
    """``import torch`` fails, also in benchmarks that were imported before."""
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("in_torch", "moons", "replicates", "sparsegpt"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    monkeypatch.setattr(steps, "TORCH", False)


def test_rows_that_need_pytorch_say_not_run_and_the_others_are_written(without_torch, monkeypatch, tmp_path):
    monkeypatch.setattr(imports, "rows", lambda: [timing.judge("imports", "limit", [1.0], [2.0], must=1.0)])
    command.run(["imports", "sparsegpt", "replicates", "moons", "networks"], tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["what"] for row in rows] == [
        "imports",
        "sparsegpt, all rows",
        "replicates, all rows",
        "moons, all rows",
        "LeNet step, batch 128",
        "ResNet-20 step, batch 128",
    ]
    assert rows[0]["ratio"] == 0.5
    assert {row["note"] for row in rows[1:]} == {"not run: PyTorch is not installed"}


def test_each_row_is_written_before_the_next_is_measured(monkeypatch, tmp_path):
    def rows():
        yield timing.judge("first", "limit", [1.0], [2.0], must=1.0)
        raise RuntimeError("the second row fails")

    monkeypatch.setattr(imports, "rows", rows)
    with pytest.raises(RuntimeError, match="second"):
        command.run(["imports"], tmp_path)
    assert [row["what"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == ["first"]


@pytest.mark.slow
def test_the_rows_for_an_accelerator_come_in_order_and_the_worst_is_profiled(without_torch, tmp_path):
    with jax.numpy_rank_promotion("allow"):
        rows = list(accelerator.rows(SMALL, profile=tmp_path))
    assert [(row.what, row.against) for row in rows][:6] == [
        ("global selection, 1e+03 scores", "jnp.sort and comparison"),
        ("global selection, 1e+03 scores", "argsort and scatter"),
        ("global selection, 1e+03 scores", "torch.topk and scatter"),
        ("global selection, 1e+03 scores", "torch.kthvalue and comparison"),
        ("global selection, 1e+03 scores", "torch.sort and comparison"),
        ("dense 3 x 4 step, batch 85, prune with no selection due", "the same step without prune"),
    ]
    measured = [row for row in rows if not math.isnan(row.ratio)]
    assert len(measured) == len(rows) - 3
    assert min(row.ours for row in measured) > 0
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_rows_without_time_left_say_not_run():
    rows = list(accelerator.rows(SMALL, seconds=-1.0))
    assert [row.what for row in rows][:2] == [
        "global selection, 1e+03 scores",
        "dense 3 x 4 step, prune with no selection due",
    ]
    assert {row.note for row in rows} == {"not run: the -1 s were used up"}


def test_a_selection_is_compared_with_the_memory_bandwidth(monkeypatch, without_torch):
    """1,000 scores read 8 times and written once as bytes are 33,000 bytes: 33 us at 1e9 bytes a second."""
    monkeypatch.setattr(accelerator, "_bandwidth", lambda: 1e9)
    rows = accelerator.selection(1000)
    (row,) = [row for row in rows if "readings" in row.against]
    assert row.peer == pytest.approx(33e-6)
    assert row.ratio == pytest.approx(row.ours / 33e-6)


def test_a_selection_that_fails_leaves_a_row_with_the_reason(monkeypatch):
    def broken(n):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(accelerator, "selection", broken)
    rows = accelerator.rows(SMALL)
    assert next(rows).note == "not run: RuntimeError: RESOURCE_EXHAUSTED: out of memory"


def test_the_rows_of_the_readme_are_those_of_the_benchmarks(monkeypatch):
    monkeypatch.setattr(selections, "compare", lambda what, against, *sides, **_: (what, against))
    monkeypatch.setattr(selections, "_same", lambda *_: None)
    monkeypatch.setattr(np, "partition", lambda scores, _: scores)
    monkeypatch.setattr(selections.jnp, "sort", lambda x: x)
    rows = list(selections.in_memory(10**7, leaves=False))
    assert set(rows) <= set(command.IN_README)
    assert len(rows) == 2


def test_the_resnet_whose_channels_are_removed_is_that_of_the_studies():
    """It gets weights that were trained in PyTorch, whose padding is that of the studies."""
    model = structured.resnet(blocks=1, batch=4, shape=(8, 8, 1))
    net = networks.ResNet(8, (8, 8, 1), 10, rngs=nnx.Rngs(0))
    layers = {"stem": (net.stem, net.norm)}
    for i, block in enumerate(net.blocks):
        layers |= {f"block{i}/one": (block.conv1, block.norm1), f"block{i}/two": (block.conv2, block.norm2)}
    for path, (conv, norm) in layers.items():
        own = functools.reduce(lambda tree, name: tree[name], path.split("/"), model.params)
        conv.kernel[...], norm.scale[...], norm.bias[...] = own["kernel"], own["scale"], own["bias"]
    net.head.kernel[...] = model.params["head"]
    net.train()
    with jax.numpy_rank_promotion("allow"):
        logits, _ = jax.jit(lambda params, x: model.apply(params, x, state=model.state))(model.params, model.inputs)
    np.testing.assert_allclose(logits, nnx.jit(lambda net, x: net(x))(net, model.inputs), rtol=1e-4, atol=1e-4)
