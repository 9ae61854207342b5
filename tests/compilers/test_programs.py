"""The library's programs compiled ahead of time for GPUs and TPUs; `make test-compilers` installs the compilers."""

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

if not all(importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin")):
    pytest.skip("the compilers are in .venv-compilers: make test-compilers", allow_module_level=True)

from benchmarks import steps
from benchmarks.compiled import devices, programs, reader, studies

pytestmark = [pytest.mark.compilers, pytest.mark.optax_promotes]
SIZE = 10**8


@functools.cache
def target(name):
    return {
        "one H100": devices.h100,
        "four H100": lambda: devices.h100(per_host=4),
        "one v5e": lambda: devices.v5e(count=1),
        "four v5e": devices.v5e,
    }[name]()


@functools.cache
def compiled(name, build, *options):
    case = build(target(name), *options)
    return reader.compiled(case.function, *case.arguments, donate_argnums=case.donated)


EVERYWHERE = pytest.mark.parametrize("name", ["one H100", "four H100", "one v5e", "four v5e"])


@EVERYWHERE
def test_each_pass_of_a_selection_reads_the_scores_once_and_writes_nothing_large(name):
    """The 400 MB of scores are divided among the devices; the trip count is known."""
    program = compiled(name, programs.selection)
    share = 4 * SIZE / len(target(name).devices)
    ((trips, body),) = program.entry.loops
    assert trips == 8
    assert share <= body.moved <= 1.1 * share
    assert sum(kernel.size for kernel in body.every_kernel()) <= 0.01 * share
    assert program.scratch <= 0.1 * share


@EVERYWHERE
def test_distinct_scores_cost_the_passes_and_the_mask_and_ties_two_readings_more(name):
    program = compiled(name, programs.selection)
    share = 4 * SIZE / len(target(name).devices)
    ((trips, _),) = program.entry.loops
    assert program.entry.least()[1] <= (1.01 * trips + 1.25) * share + 0.5e6
    (branches,) = program.entry.conditionals
    ties = max(branches, key=lambda branch: branch.moved)
    assert ties.moved <= 2.05 * share
    assert sum(kernel.written for kernel in ties.every_kernel()) <= 0.1 * share


@EVERYWHERE
def test_no_selection_gathers(name):
    program = compiled(name, programs.selection)
    assert program.gathers() == []
    moved = {kernel.op.removesuffix("-start") for kernel in program.collectives()}
    assert moved == ({"all-reduce"} if len(target(name).devices) > 1 else set())
    assert sum(kernel.size for kernel in program.collectives()) <= 0.01 * SIZE / len(target(name).devices)


@pytest.mark.parametrize("name", ["one v5e", "four v5e"])
def test_a_tpu_program_compiles_in_seconds(name):
    assert compiled(name, programs.selection).busy < 10


@EVERYWHERE
def test_few_kernels_are_launched_in_a_pass(name):
    ((_, body),) = compiled(name, programs.selection).entry.loops
    assert body.launches <= (12 if name == "one H100" else 40)


@pytest.mark.parametrize("name", ["one H100", "one v5e"])
def test_sixteen_bit_scores_are_read_as_they_are(name):
    """No pass reads more than the two bytes of a score, and no copy in a wider dtype is kept."""
    program = compiled(name, programs.selection, (25_000, 4_000), jnp.bfloat16)
    ((_, body),) = program.entry.loops
    assert body.moved <= 1.1 * 2 * SIZE
    assert program.scratch <= 0.1 * 2 * SIZE


@pytest.mark.parametrize("name", ["one H100", "one v5e"])
def test_absolute_values_are_not_written_out(name):
    """The magnitude is compared within each pass."""
    from jprune.pruning.selection import kth_largest, uint64

    weights = devices.on_one(target(name), [jax.ShapeDtypeStruct((25_000, 4_000), jnp.float32)])
    select = lambda w: kth_largest.largest(w, uint64.count_of(10**7), [None], magnitude=True)
    program = reader.compiled(select, weights)
    ((_, body),) = program.entry.loops
    assert body.moved <= 1.1 * 4 * SIZE
    assert program.scratch <= 0.1 * 4 * SIZE


@pytest.mark.parametrize("shape", [(SIZE,), (50, 2, 1000, 1000)], ids=["a vector", "four axes"])
def test_scores_of_other_shapes_cost_the_same(shape):
    program = compiled("one H100", programs.selection, shape)
    assert math.prod(shape) == SIZE
    ((trips, body),) = program.entry.loops
    assert trips == 8
    assert body.moved <= 1.1 * 4 * SIZE
    assert program.scratch <= 0.1 * 4 * SIZE


@pytest.mark.parametrize(
    ("shape", "spec"),
    [((SIZE,), (("x", "y"),)), ((50, 2, 1000, 1000), (None, "x", None, "y")), ((25_000, 4_000), (None, ("x", "y")))],
    ids=["a vector", "two of four axes", "the last axis"],
)
def test_scores_sharded_in_other_ways_cost_the_same(shape, spec):
    program = compiled("four H100", programs.selection, shape, jnp.float32, spec)
    ((trips, body),) = program.entry.loops
    assert trips == 8
    assert body.moved <= 1.1 * SIZE
    (branches,) = program.entry.conditionals
    assert max(branch.moved for branch in branches) <= 2.05 * SIZE
    assert program.scratch <= 0.1 * SIZE
    assert {kernel.op.removesuffix("-start") for kernel in program.collectives()} == {"all-reduce"}
    assert sum(kernel.size for kernel in program.collectives()) <= 0.01 * SIZE


@pytest.mark.parametrize("dtype", ["float32 among some", "bfloat16", "float64"])
def test_other_dtypes_and_weights_already_pruned_cost_as_many_readings_on_four_h100(dtype):
    program, bytes_each = of_dtype("four H100", (25_000, 4_000), dtype)
    share = bytes_each * SIZE // 4
    ((trips, body),) = program.entry.loops
    assert trips == (16 if dtype == "float64" else 8)
    assert body.moved <= 1.1 * share
    assert sum(kernel.size for kernel in body.every_kernel()) <= 0.01 * share
    (branches,) = program.entry.conditionals
    assert max(branch.moved for branch in branches) <= 2.05 * share
    assert program.scratch <= 0.1 * share
    assert {kernel.op.removesuffix("-start") for kernel in program.collectives()} == {"all-reduce"}


def of_dtype(name, shape, dtype):
    """The selection of scores of a dtype, perhaps "among some", and the bytes of a score and its mask."""
    dtype, restricted = dtype.partition(" ")[::2]
    with jax.enable_x64(dtype == "float64"):
        case = programs.selection(target(name), shape, jnp.dtype(dtype))
        function, (scores,) = case.function, case.arguments
        among = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bool, sharding=x.sharding), scores)
        if restricted:
            program = reader.compiled(lambda scores, among: function(scores, among=among), scores, among)
        else:
            program = reader.compiled(function, scores)
    return program, jnp.dtype(dtype).itemsize + bool(restricted)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(SIZE, "float32"), (SIZE, "float64"), (10**7, "bfloat16"), (10**7 + 77, "float32 among some")],
)
def test_ties_of_a_vector_cost_two_readings_more_on_one_v5e(size, dtype):
    """It is divided into the rows of 128 in which a TPU stores it, which copies nothing."""
    program, bytes_each = of_dtype("one v5e", (size,), dtype)
    (branches,) = program.entry.conditionals
    ties = max(branches, key=lambda branch: branch.moved)
    assert ties.least()[1] <= 2.05 * bytes_each * size


@pytest.mark.parametrize("shape", [(50, 2, 1000, 1000), (4, 1_000_000, 5, 5)])
def test_scores_on_a_mesh_with_explicit_axes_cost_the_same_on_four_v5e(shape):
    """No array of positions is written, and no axis is divided, which would copy an array in tiles."""
    case = programs.selection(target("four v5e"), shape)
    explicit = jax.tree.map(devices.explicit, case.arguments)
    program = reader.compiled(case.function, *explicit)
    assert program.entry.least()[1] <= (1.01 * 8 + 1.25) * SIZE + 0.5e6
    (branches,) = program.entry.conditionals
    ties = max(branches, key=lambda branch: branch.moved)
    assert ties.moved <= 2.15 * SIZE
    assert program.scratch <= 0.1 * SIZE


@pytest.mark.parametrize("replicates", [0, 8], ids=["one", "vmapped"])
@pytest.mark.parametrize("name", ["one H100", "one v5e"])
def test_a_step_with_nothing_due_copies_no_mask_and_launches_few_additional_kernels(name, replicates):
    """A TPU's prefetches into its fast memory are no kernels. It stores the mask of 100 x 10 transposed."""
    kernels = {}
    for link in ("keep_zeros", "prune"):
        program = compiled(name, functools.partial(programs.dense_step, replicates=replicates), link)
        kernels[link] = [kernel for kernel in program.entry.kernels if not kernel.op.endswith("-start")]
    assert len(kernels["prune"]) - len(kernels["keep_zeros"]) <= 4
    ((trips, _),) = program.entry.loops
    assert trips is None
    masks = {n * max(replicates, 1) for n in (784 * 300, 300 * 100, 100 * 10)}
    copied = [kernel for kernel in kernels["prune"] if kernel.op == "copy" and kernel.size in masks]
    assert copied == [] == program.entry.conditionals


@EVERYWHERE
def test_an_epoch_of_the_recall_study_is_one_program_without_the_host(name):
    """45,000 examples are 351 steps of 128 and 5,000 are 10 slices of 500; a step moves no copy of the examples."""
    count = 2 * len(target(name).devices)
    program = compiled(name, studies.epoch, "lenet-300-100", studies.MNIST, count)
    bodies = alone(program)
    assert program.collectives() == []
    assert bodies[351].launches <= (60 if "H100" in name else 130)
    assert max(kernel.written for kernel in bodies[351].every_kernel()) < 45_000 * 784
    # A TPU reads single examples from a copy of their array in another layout, which it makes once an epoch.
    assert program.scratch <= (50e6 if "H100" in name else 250e6)


def test_a_step_of_the_recall_study_writes_weights_momentum_and_gradients_once_and_no_mask():
    """Also the images as floats, for each hidden unit its product and two gradients, and five arrays of logits."""
    bodies = alone(compiled("one H100", studies.epoch, "lenet-300-100", studies.MNIST, 30))
    arrays = 3 * 266_610 + 128 * (784 + 3 * (300 + 100) + 5 * 10)
    assert sum(kernel.written for kernel in bodies[351].every_kernel()) <= 1.01 * 30 * 4 * arrays


def test_an_epoch_of_lenets_compiles_without_autotuning():
    """If kernels of six output channels were joined within a Triton kernel, it would have no tile sizes."""
    bodies = alone(compiled("one H100", studies.epoch, "lenet", studies.MNIST, 2))
    assert set(bodies) >= {351, 10}


@pytest.mark.parametrize(("width", "written"), [(2, 42), (16, 6.6)], ids=["patches", "convolutions"])
def test_an_epoch_of_the_image_grid_is_one_program_without_the_host(width, written):
    """Three seeds; the 5,000 images of the validation split are 5 slices of 1,000.

    For the two layers a step writes two convolutions, the ReLU between them and the gradients of all three, and no
    transposed copy. With two channels it also writes patches: 27/2 of a layer's size for the images, and 9 for the
    second layer and for the gradient of its patches each.
    """
    bodies = alone(compiled("one H100", functools.partial(studies.grid_epoch, depth=2, width=width)))
    assert set(bodies) >= {351, 5}
    assert max(kernel.written for kernel in bodies[351].every_kernel()) < 45_000 * 32 * 32 * 3
    layer = 3 * 128 * 32 * 32 * width * 4
    assert sum(kernel.written for kernel in bodies[351].every_kernel()) <= written * layer


def alone(program):
    """The bodies of a program's loops by trip count, after a check that it runs without the host."""
    loops = [loop for block in program.entry.blocks() for loop in block.loops]
    assert None not in [trips for trips, _ in loops]
    assert not any(block.conditionals for block in program.entry.blocks())
    assert not any(word in program.text for word in ("infeed", "outfeed", "callback", "send(", "recv("))
    return dict(loops)


@pytest.mark.parametrize("network", [steps.lenet(), steps.conv(), steps.dense()], ids=lambda network: network.name)
def test_the_penalty_reads_each_preactivation_a_few_times_and_keeps_no_copy(network):
    """It adds no gather, and scratch memory of at most a tenth of the step without it, or 2 MB."""
    plain, penalized = (compiled("one H100", studies.penalty_step, network, c) for c in (0.0, 1e-3))
    assert len(penalized.gathers()) == len(plain.gathers())
    assert penalized.scratch <= max(1.1 * plain.scratch, plain.scratch + 2e6)
    assert penalized.entry.least()[1] <= 1.65 * plain.entry.least()[1]


def test_a_selection_that_is_due_writes_no_array_of_absolute_values():
    step = compiled("one H100", functools.partial(programs.dense_step, replicates=0), "prune")
    ((_, body),) = step.entry.loops
    assert [kernel for kernel in body.every_kernel() if kernel.written >= 4 * 784 * 300] == []


ONE_DEVICE = """
import hashlib, jax
from benchmarks.compiled import devices, programs
assert jax.device_count() == {count}
case = programs.selection({target})
text = jax.jit(case.function).lower(*case.arguments).as_text()
print(hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.mark.parametrize("described", ["devices.h100(per_host=4)", "devices.v5e()"])
def test_the_program_for_four_does_not_depend_on_the_devices_of_the_host(described):
    hashes = set()
    for count in (1, 8):
        flags = f"--xla_gpu_autotune_level=0 --xla_force_host_platform_device_count={count}"
        done = subprocess.run(
            [sys.executable, "-c", ONE_DEVICE.format(count=count, target=described)],
            env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        hashes.add(done.stdout.split()[-1])
    assert len(hashes) == 1


DUMPED = """
import jax
from benchmarks.compiled import devices, programs
target = devices.h100()
for case in (programs.selection(target), programs.dense_step(target, "prune")):
    jax.jit(case.function, donate_argnums=case.donated).lower(*case.arguments).compile()
"""
FLAG = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"


@pytest.mark.parametrize("flag", ["", FLAG], ids=["default", "flag"])
def test_with_a_flag_a_selection_and_a_step_with_prune_are_one_cuda_graph_each(flag, tmp_path):
    """The compiler dumps what the host starts at the left margin, such as "000: kCommandBuffer [source | sink]"."""
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_module_re=global_masks|step {flag}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    subprocess.run([sys.executable, "-c", DUMPED], env=environment, check=True)
    dumped = tmp_path.glob("*.thunk_sequence_after_thunk_passes.txt")
    found = {path.name.split(".")[1]: path.read_text() for path in dumped}
    assert set(found) == {"jit_global_masks", "jit_step"}
    for text in found.values():
        started = re.findall(r"^\d+: (\w+)", text, re.MULTILINE)
        assert started == ["kCommandBuffer"] if flag else {"kCommandBuffer", "kWhile"} <= set(started)
        assert {"kWhile", "kConditional"} <= set(re.findall(r"\d+: (\w+)", text))
