"""Time `prune` in an optimizer chain, with no selection due and with occasional selections."""

import itertools
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jprune
from benchmarks import steps
from benchmarks.timing import Row, Side, compare, same

NEVER = {2**30: 0.5}  # a schedule whose selection is compiled in and not due
EVERY = 100


def rows() -> Iterator[Row]:
    """Time the update alone, a whole step, and a cycle of steps with one selection."""
    yield update(10**8)
    yield whole_step()
    yield amortised()


def update(n: int) -> Row:
    """Time only the optimizer update; the state is donated, and the new weights are equal."""
    side = round(n**0.5)
    ours, plain = (_updating(side, links) for links in ([jprune.prune(jprune.magnitude(), NEVER)], []))
    apart = jax.jit(lambda a, b: jnp.abs(a - b).max())(ours()["kernel"], plain()["kernel"])
    same("the weights' largest difference", apart, 0, rtol=0, atol=1e-7)  # one product is fused, one is not
    return compare(
        f"optimizer update, {side * side:.0e} parameters, prune with no selection due",
        "the same chain without prune",
        ours,
        plain,
        must=1.10,
        note="decay and Nesterov momentum; the sides take turns updating arrays of their own in place",
    )


def _updating(side: int, links: list) -> Side:
    tx = steps.chain(*links)
    params = {"kernel": jnp.full((side, side), 0.5)}
    grads = {"kernel": jnp.linspace(-1.0, 1.0, side * side).reshape(side, side)}
    state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    def call():
        nonlocal params, state
        params, state = jax.block_until_ready(step(params, state, grads))
        return params

    return call


def whole_step(network: steps.Network | None = None, pairs: int = 300) -> Row:
    """Time a training step, by default of LeNet; the new weights are equal."""
    network = steps.lenet() if network is None else network
    prune = jprune.prune(jprune.magnitude(), NEVER, where=jprune.by_path(exclude=r"^head/"))
    sides = []
    for links in ([prune], []):
        state, step = steps.program(network, *links)
        sides.append(steps.repeated(step, state, *steps.batch(network)))
    (ours, _), (plain, _) = (side() for side in sides)
    for path, weights in steps.by_path(ours[0]).items():
        same(path, weights, steps.by_path(plain[0])[path], rtol=1e-5, atol=1e-7)
    return compare(
        f"{network.name} step, batch {network.batch}, prune with no selection due",
        "the same step without prune",
        *sides,
        must=1.02,
        pairs=pairs,
    )


def amortised(replicates: int = 8, features: tuple[int, ...] = (784, 300, 100, 10)) -> Row:
    """Time ``EVERY`` vmapped updates of many replicates with one selection; the same weights are kept."""
    rng = np.random.default_rng(0)
    shapes = {f"layer{i}": shape for i, shape in enumerate(itertools.pairwise(features))}
    draw = lambda: {
        name: {"kernel": jnp.asarray(rng.standard_normal((replicates, *shape), dtype=np.float32))}
        for name, shape in shapes.items()
    }
    params, grads = draw(), draw()
    sides = []
    for links in ([jprune.prune(jprune.magnitude(), {EVERY // 2: 0.9})], []):
        run = jax.jit(partial(_cycle, steps.chain(*links)))
        sides.append(lambda run=run: jax.block_until_ready(run(params, grads)))
    ours, plain = (side() for side in sides)
    total = sum(a * b for a, b in shapes.values())
    alive = jax.tree.map(lambda x: x != 0, ours)
    for i in range(replicates):
        kept = sum(int(mask[i].sum()) for mask in jax.tree.leaves(alive))
        if kept != total - round(0.9 * total):
            raise AssertionError(f"replicate {i} keeps {kept} of {total}")
    for mine, theirs, mask in zip(*map(jax.tree.leaves, (ours, plain, alive)), strict=True):
        same("weights kept", mine, jnp.where(mask, theirs, 0), rtol=1e-6)
    return compare(
        f"{EVERY} updates with one selection, vmapped over {replicates} replicates of {total:,} weights",
        "the same chain without prune",
        *sides,
        must=1.10,
        note="the optimizer updates alone, without the forward and backward passes that would hide them",
    )


def _cycle(tx, params, grads):
    def one(params, grads):
        def update(carry, _):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        return jax.lax.scan(update, (params, tx.init(params)), None, length=EVERY)[0][0]

    return jax.vmap(one)(params, grads)
