"""Time training steps of LeNet, for one replicate and for sixteen, and of ResNet-20, against PyTorch."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import steps
from benchmarks.timing import Row, Side, compare, not_run, same, seconds
from experiments.training import replicates

REPLICATES = 16
STEPS = 8  # steps of each replicate per call; a study scans the steps of an epoch


def rows() -> list[Row]:
    """Time steps of batch 128; loss and new weights equal those of torch."""
    if not steps.TORCH:
        named = ("LeNet step, batch 128", 0.85), ("ResNet-20 step, batch 128", 2.7)
        return [not_run(what, "torch eager", must=must, why="PyTorch is not installed") for what, must in named]
    lenet, resnet = steps.lenet(), steps.resnet()
    ours, theirs = steps.pair(lenet)
    form, many = replicated(lenet, REPLICATES)
    what, per = "LeNet step, batch 128", f"a replicate of {REPLICATES}"
    table = [
        compare(what, "torch eager", ours, theirs, must=0.85, goal=0.6),
        compare(
            f"{what}, {per}",
            "torch eager",
            many,
            theirs,
            must=0.85,
            goal=0.6,
            per=(REPLICATES * STEPS, 1),
            note=f"form {form}, {STEPS} steps scanned",
        ),
        *_against_compiled(lenet, what),
    ]
    ours, theirs = steps.pair(resnet)
    return [*table, compare("ResNet-20 step, batch 128", "torch eager", ours, theirs, must=2.7, goal=1.5)]


def _against_compiled(network: steps.Network, what: str) -> list[Row]:
    """Compare with ``torch.compile``, which needs a C++ compiler."""
    try:
        ours, theirs = steps.pair(network, compiled=True)
    except RuntimeError as error:  # torch._dynamo.exc.TorchDynamoException is one
        reason = f"torch.compile does not work here ({type(error).__name__})"
        return [not_run(what, "torch.compile", must=0.85, why=reason)]
    return [compare(what, "torch.compile", ours, theirs, must=0.85, goal=0.6)]


def replicated(
    network: steps.Network, count: int, forms: Sequence[str] = ("vmap", "map"), length: int = STEPS
) -> tuple[str, Side]:
    """Return several steps of many replicates in one program, each on its own batches, in the fastest form."""
    images, labels = steps.batch(network)
    order = np.stack([np.random.default_rng(i).permutation(len(labels)) for i in range(count)])
    own = (jnp.asarray(images[order]), jnp.asarray(labels[order]))
    states = [steps.program(network, seed=seed)[0] for seed in range(count)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    _, step = steps.program(network)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (replicates.AXIS,))

    def train(one):
        state, *batch = one
        return jax.lax.scan(lambda state, _: step(state, *batch), state, length=length)

    sides = {}
    for form in forms:
        spread = replicates.spread(train, replicates.Placement(mesh, form), donate=False)
        sides[form] = lambda spread=spread: jax.block_until_ready(spread((stacked, *own)))
    _, losses = sides[forms[0]]()
    alone = jax.jit(step)
    for i in (0, count - 1):
        same(f"loss of replicate {i}", losses[i, 0], alone(states[i], own[0][i], own[1][i])[1], rtol=1e-4)
    taken = {form: (side(), min(seconds(side) for _ in range(3)))[1] for form, side in sides.items()}
    fastest = min(taken, key=lambda form: taken[form])
    return fastest, sides[fastest]
