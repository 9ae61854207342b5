"""Measure selections, transformations and the penalty on an accelerator in under four minutes.

``python -m benchmarks accelerator --out DIR`` measures in the order below and writes each row as it is measured. When
the time is used up, the remaining rows say "not run". The row that misses its target by most is run again under the
profiler, into DIR/profile. This benchmark does not run by default.
"""

import importlib
import pathlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jprune
from benchmarks import jumpstart, networks, prune_step, steps, structured, tracing
from benchmarks.selection import argsort_masks
from benchmarks.timing import Row, Side, compare, judge, not_run

SECONDS = 220.0  # for the rows, without startup and the profile
READINGS = 8  # reads of the scores in a selection, and one byte of mask
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12, "v5 lite": 8.19e11}  # bytes a second, by device kind
# The target ratio to jnp.sort, by the number of scores.
AGAINST_SORT = {10**6: 0.7, 10**7: 0.5, 10**8: 0.3, 10**9: 0.3}


class Sizes(NamedTuple):
    """Sizes of the measurements; use smaller ones for a trial.

    Attributes:
      scores: numbers of scores of the selections.
      trained: networks of the steps with and without ``prune``.
      transformer: sizes of a transformer of about 1e8 parameters.
      tokens: shape of its batch of tokens, (examples, length).
      penalized: networks with the target ratio to the step without the penalty.
      replicates: numbers of replicates of the vmapped updates and of the step.
      replicated: network of that step.
      halved: models whose channels are removed.
      updated: number of weights of the update alone.
      pairs: number of pairs of a step with and without ``prune``.
    """

    scores: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9)
    trained: tuple[steps.Network, ...] = (steps.lenet(), steps.resnet())
    transformer: tracing.Decoder = tracing.Decoder(12, 768, 12, 12, 64, 2048, 32_768)
    tokens: tuple[int, int] = (8, 512)
    penalized: tuple[tuple[steps.Network, float], ...] = (
        (steps.lenet(), 1.25),
        (steps.conv(), 1.2),
        (steps.dense(), 2),
    )
    replicates: tuple[int, int] = (8, 30)
    replicated: steps.Network = steps.lenet()
    halved: tuple[Callable[[], structured.Model], ...] = (structured.resnet, structured.transformer_block)
    updated: int = 10**8
    pairs: int = 300


class Measurement(NamedTuple):
    """Rows that are measured together.

    Attributes:
      what: their name in the table if they are not run.
      run: function that measures them.
    """

    what: str
    run: Callable[[], list[Row]]


def rows(sizes: Sizes | None = None, seconds: float = SECONDS, profile: pathlib.Path | None = None) -> Iterator[Row]:
    """Yield each row as it is measured; rows for which no time is left, or that fail, are "not run".

    Args:
      sizes: sizes of the measurements.
      seconds: no measurement begins after this time.
      profile: folder for the profile of the row that misses its target by most, or None for no profile.
    """
    start, measured = time.perf_counter(), []
    for each in measurements(sizes or Sizes()):
        if time.perf_counter() - start > seconds:
            yield not_run(each.what, "-", must=1.0, why=f"the {seconds:.0f} s were used up")
            continue
        try:
            found = each.run()
        except (RuntimeError, MemoryError, ImportError) as error:  # out of memory, or a program that does not compile
            found = [not_run(each.what, "-", must=1.0, why=f"{type(error).__name__}: {str(error).splitlines()[0]}")]
        measured += [(row.ratio / row.must, each) for row in found if row.ratio == row.ratio]
        yield from found
    if profile is not None and measured:
        _, worst = max(measured, key=lambda pair: pair[0])
        with jax.profiler.trace(str(profile)):
            worst.run()
        print(f"profile of {worst.what}: {profile}", flush=True)


def measurements(sizes: Sizes) -> Iterator[Measurement]:
    """Yield the measurements in order of importance."""
    for n in sizes.scores:
        yield Measurement(f"global selection, {n:.0e} scores", partial(selection, n))
    for network in sizes.trained:
        what = f"{network.name} step, prune with no selection due"
        yield Measurement(what, lambda network=network: [prune_step.whole_step(network, sizes.pairs)])
    what = "transformer step, prune with no selection due"
    yield Measurement(what, lambda: [transformer_step(sizes.transformer, sizes.tokens, sizes.pairs)])
    updates, replicas = sizes.replicates
    yield Measurement(f"100 updates of {updates} replicates", lambda: [prune_step.amortised(updates)])
    what = f"{sizes.replicated.name} step of {replicas} replicates"
    yield Measurement(what, lambda: [replicated(sizes.replicated, replicas)])
    for network, must in sizes.penalized:
        what = f"{network.name} step with the penalty"
        yield Measurement(what, lambda network=network, must=must: [_penalized(network, must)])
    for create in sizes.halved:
        yield Measurement("half the multiply-adds", lambda create=create: structured.of_model(create()))
    yield Measurement("optimizer update", lambda: [prune_step.update(sizes.updated)])


def selection(n: int) -> list[Row]:
    """Keep half of the scores: against sorting, against the memory bandwidth, and against PyTorch if installed."""
    scores, keep = jax.random.normal(jax.random.key(0), (n,)), n // 2
    ours = jax.jit(lambda x: jprune.global_masks({"kernel": x}, keep=keep)["kernel"])
    sort = jax.jit(lambda x: x >= jnp.sort(x)[x.size - keep])
    rank = jax.jit(lambda x: argsort_masks([x], keep)[0])
    _check(ours(scores), scores, keep)
    run = lambda f: jax.block_until_ready(f(scores))
    what = f"global selection, {n:.0e} scores"
    mine = partial(run, ours)
    must = AGAINST_SORT.get(n, 1.0)
    table = [compare(what, "jnp.sort and comparison", mine, partial(run, sort), must=must)]
    if n <= 10**8:
        _check(rank(scores), scores, keep)
        table.append(compare(what, "argsort and scatter", mine, partial(run, rank), must=0.5))
    if (bandwidth := _bandwidth()) is not None:
        floor = n * (READINGS * 4 + 1) / bandwidth
        against = f"{READINGS} readings and the mask at {bandwidth / 1e12:.2f} TB/s"
        table.append(judge(what, against, [table[0].ours], [floor], must=3.0))
    return [*table, *_against_torch(what, mine, n, keep)]


def _check(mask: jax.Array, scores: jax.Array, keep: int) -> None:
    least, most = jnp.where(mask, scores, jnp.inf).min(), jnp.where(mask, -jnp.inf, scores).max()
    if int(mask.sum()) != keep or least < most:
        raise AssertionError("a side did not choose the largest")


def _against_torch(what: str, mine: Side, n: int, keep: int) -> list[Row]:
    """Compare with three ways to find a threshold in PyTorch, on the GPU if both PyTorch and jax have one."""
    names = ("torch.topk and scatter", "torch.kthvalue and comparison", "torch.sort and comparison")
    if not steps.TORCH:
        return [not_run(what, name, must=1.0, why="PyTorch is not installed") for name in names]
    torch = importlib.import_module("torch")
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return [not_run(what, name, must=1.0, why="this PyTorch has no GPU") for name in names]
    scores = torch.randn(n, device="cuda" if on_gpu else "cpu")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    forms = (
        lambda: torch.zeros_like(scores, dtype=torch.bool).scatter_(0, scores.topk(keep, sorted=False).indices, True),
        lambda: scores >= scores.kthvalue(n - keep + 1).values,
        lambda: scores >= scores.sort().values[n - keep],
    )
    table = []
    for name, form in zip(names, forms, strict=True):
        try:
            table.append(compare(what, name, mine, lambda form=form: (form(), wait()), must=1.0))
        except RuntimeError as error:  # out of memory
            table.append(not_run(what, name, must=1.0, why=str(error).splitlines()[0]))
    return table


def _bandwidth() -> float | None:
    """Return the memory bandwidth of this device in bytes per second, or None if it is unknown."""
    kind = jax.devices()[0].device_kind
    return next((speed for name, speed in BANDWIDTH.items() if name in kind), None)


def transformer_step(sizes: tracing.Decoder, tokens: tuple[int, int], pairs: int) -> Row:
    """Time a step of Adam on a decoder, with ``prune`` and without."""
    apply, shapes, _ = tracing.decoder(sizes, scanned=True)
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda key, leaf: jax.random.normal(key, leaf.shape) / leaf.shape[-2 if len(leaf.shape) > 1 else -1] ** 0.5
    made = [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    batch = jax.random.randint(jax.random.key(1), tokens, 0, sizes.vocabulary)
    everything = lambda path, leaf: leaf.ndim > 1

    def side(*links: optax.GradientTransformation) -> Side:
        tx = optax.chain(optax.adam(1e-4), *links)

        def loss(params: Any) -> jax.Array:
            logits = apply(params, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()

        @partial(jax.jit, donate_argnums=0)
        def step(carry: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.unflatten(treedef, [jnp.copy(leaf) for leaf in made])
        carry = (params, tx.init(params))

        def call() -> object:
            nonlocal carry
            carry = jax.block_until_ready(step(carry))
            return carry

        return call

    count = sum(leaf.size for leaf in leaves)
    return compare(
        f"transformer step, {count:.1e} parameters, prune with no selection due",
        "the same step without prune",
        side(jprune.prune(jprune.magnitude(), prune_step.NEVER, where=everything)),
        side(),
        must=1.02,
        pairs=min(pairs, 50),
    )


def _penalized(network: steps.Network, must: float) -> Row:
    return jumpstart.overhead(network, jumpstart.alone(network), must=must)


def replicated(network: steps.Network, count: int) -> Row:
    """Time a step of one of many networks, against a step of a single network."""
    form, many = networks.replicated(network, count)
    state, step = steps.program(network)
    return compare(
        f"{network.name} step, batch {network.batch}, a replicate of {count}",
        "the same step of one alone",
        many,
        steps.repeated(step, state, *steps.batch(network)),
        must=0.25,
        per=(count * networks.STEPS, 1),
        note=f"form {form}, {networks.STEPS} steps scanned",
    )
