"""Benchmarks for an accelerator: selections against sorting, and the cost of the links of a chain.

Not among the benchmarks that run by default: ``python -m benchmarks accelerator --out DIR``. PyTorch has to be
installed, as for the others, but is not timed.
"""

from functools import partial

import jax
import jax.numpy as jnp

import jprune
from benchmarks import jumpstart, networks, prune_step, steps
from benchmarks.selection import argsort_masks
from benchmarks.timing import Row, compare

REPLICATES = 30


def rows() -> list[Row]:
    """Selections of 1e6 to 1e8 scores, the prune link, the penalty, and thirty LeNets in one program."""
    links = [prune_step.update(10**8), prune_step.whole_step(), prune_step.amortised()]
    penalties = [
        jumpstart.overhead(network, jumpstart.alone(network), must=must)
        for network, must in ((steps.lenet(), 1.25), (steps.conv(), 1.2), (steps.dense(), 2.0))
    ]
    return [*selections(), *links, *penalties, replicated()]


def selections() -> list[Row]:
    """Half of the scores are kept; the masks are the same."""
    table = []
    for n in (10**6, 10**7, 10**8):
        scores, keep = jax.random.normal(jax.random.key(0), (n,)), n // 2
        ours = jax.jit(lambda x, keep=keep: jprune.global_masks({"kernel": x}, keep=keep)["kernel"])
        sort = jax.jit(lambda x, keep=keep: x >= jnp.sort(x)[x.size - keep])
        rank = jax.jit(lambda x, keep=keep: argsort_masks([x], keep)[0])
        for mask in (ours(scores), rank(scores)):  # of equal scores they may choose different ones
            least, most = jnp.where(mask, scores, jnp.inf).min(), jnp.where(mask, -jnp.inf, scores).max()
            if int(mask.sum()) != keep or least < most or (mask & ~sort(scores)).any():
                raise AssertionError("a side did not choose the largest")
        run = lambda f, x=scores: f(x).block_until_ready()
        what = f"global selection, {n:.0e} scores"
        table.append(compare(what, "jnp.sort and comparison", partial(run, ours), partial(run, sort), must=1.0))
        table.append(compare(what, "argsort and scatter", partial(run, ours), partial(run, rank), must=0.5))
    return table


def replicated() -> Row:
    """A step of a LeNet among thirty, against a step of one alone."""
    network = steps.lenet()
    form, many = networks.replicated(network, REPLICATES)
    state, step = steps.program(network)
    return compare(
        f"LeNet step, batch 128, a replicate of {REPLICATES}",
        "the same step of one alone",
        many,
        steps.repeated(step, state, *steps.batch(network)),
        must=0.25,
        per=(REPLICATES * networks.STEPS, 1),
        note=f"form {form}, {networks.STEPS} steps scanned",
    )
