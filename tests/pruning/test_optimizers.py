"""Every public optimizer of optax: pruned weights are exactly 0 after every step, in float32 and bfloat16.

A table lists each optimizer with the arguments it needs. A test fails for any name that optax exports and that is
neither in the table nor in the list of names that are not optimizers.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jprune
from tests.pruning.steps import by_rank, slope


def loss(params):
    """The loss whose gradient ``slope`` gives."""
    return sum(-jnp.sum(jnp.cos(w * 3 + 1)) / 3 for w in jax.tree.leaves(params)).astype(jnp.float32)


class Case:
    """How to make an optimizer, the further arguments of its update, and the gradient it takes.

    Updates run outside jit, where optimizers share their compiled operations. An optimizer with loops or branches of
    its own is jitted.
    """

    def __init__(self, make, extra=lambda params, grad: {}, grad=slope, jit=False):
        self.make, self.extra, self.grad, self.jit = make, extra, grad, jit


def plain(name, module=optax, jit=False, **arguments):
    return Case(lambda: getattr(module, name)(**arguments), jit=jit)


def value(params, grad):
    return {"value": loss(params)}


def linesearch(params, grad):
    return {"value": loss(params), "grad": grad, "value_fn": loss}


def per_example(params):
    return jax.tree.map(lambda g: jnp.stack([g, 2 * g]), slope(params))


RATE = {"learning_rate": 0.1}
HALF_TOO = ("adam", "adamw", "sgd", "adafactor", "lion", "rmsprop")  # in half precision the others are slow tests
# One of each kind of state and of further arguments; the others are slow tests in float32 too.
QUICK = {
    *HALF_TOO, "adagrad", "lars", "noisy_sgd", "rprop", "sm3", "polyak_sgd", "lbfgs", "prodigy", "cocob", "dpsgd",
    "galore", "muon", "schedule_free_adamw", "sophia", "mechanize", "sam", "reduce_on_plateau",
}  # fmt: skip
ADVERSARY = lambda: optax.chain(contrib.normalize(), optax.sgd(0.05))

OPTAX = {
    **{
        name: plain(name, **RATE)
        for name in [
            "adabelief",
            "adadelta",
            "adagrad",
            "adam",
            "adamax",
            "adamaxw",
            "adamw",
            "adan",
            "amsgrad",
            "fromage",
            "lamb",
            "lars",
            "lion",
            "nadam",
            "nadamw",
            "novograd",
            "optimistic_adam",
            "optimistic_gradient_descent",
            "radam",
            "rprop",
            "sgd",
            "sign_sgd",
            "signum",
            "sm3",
            "yogi",
        ]
    },
    "adafactor": plain("adafactor", **RATE, min_dim_size_to_factor=2),
    "rmsprop": plain("rmsprop", **RATE, centered=True, momentum=0.9),
    "optimistic_adam_v2": plain("optimistic_adam_v2", **RATE, alpha=0.1),
    "noisy_sgd": plain("noisy_sgd", **RATE, key=0),
    "polyak_sgd": Case(functools.partial(optax.polyak_sgd, max_learning_rate=0.1), value),
    "lbfgs": Case(optax.lbfgs, linesearch, jit=True),
}
CONTRIB = {
    **{
        name: plain(name, contrib, **RATE)
        for name in [
            "acprop",
            "ademamix",
            "adopt",
            "dadapt_adamw",
            "dog",
            "dowg",
            "madgrad",
            "prodigy",
            "simplified_ademamix",
        ]
    },
    "cocob": plain("cocob", contrib),
    "dpsgd": Case(
        functools.partial(contrib.dpsgd, **RATE, l2_norm_clip=1.0, noise_multiplier=0.1, seed=0), grad=per_example
    ),
    "galore": plain("galore", contrib, jit=True, **RATE, rank=2),
    "muon": plain("muon", contrib, jit=True, **RATE),
    "momo": Case(functools.partial(contrib.momo, **RATE), value),
    "momo_adam": Case(functools.partial(contrib.momo_adam, **RATE), value),
    "schedule_free_adamw": plain("schedule_free_adamw", contrib, **RATE),
    "schedule_free_sgd": plain("schedule_free_sgd", contrib, **RATE),
    "sophia": Case(functools.partial(contrib.sophia, **RATE), lambda params, grad: {"obj_fn": loss}, jit=True),
    # Wrappers, each with the simplest optimizer that it accepts.
    "mechanize": Case(lambda: contrib.mechanize(optax.sgd(0.1))),
    "sam": Case(lambda: contrib.sam(optax.sgd(0.1), ADVERSARY())),
    "schedule_free": Case(lambda: contrib.schedule_free(optax.sgd(0.1), 0.1)),
    "reduce_on_plateau": Case(lambda: optax.chain(optax.adam(0.1), contrib.reduce_on_plateau()), value),
}

# The oldest supported optax lacks some of them.
OPTAX, CONTRIB = ({n: c for n, c in d.items() if hasattr(m, n)} for m, d in ((optax, OPTAX), (contrib, CONTRIB)))

# Public functions that make a transformation but are building blocks of optimizers, or wrappers that
# tests/pruning/test_composition.py puts prune into.
NO_OPTIMIZER = {
    optax: {
        "adaptive_grad_clip",
        "add_decayed_weights",
        "add_noise",
        "apply_every",
        "apply_if_finite",
        "centralize",
        "chain",
        "clip",
        "clip_by_block_rms",
        "clip_by_global_norm",
        "conditionally_mask",
        "conditionally_transform",
        "ema",
        "flatten",
        "freeze",
        "identity",
        "inject_hyperparams",
        "inject_stateful_hyperparams",
        "keep_params_nonnegative",
        "lookahead",
        "masked",
        "measure_with_ema",
        "multi_transform",
        "named_chain",
        "normalize_by_update_norm",
        "partition",
        "selective_transform",
        "set_to_zero",
        "snapshot",
        "stateless",
        "stateless_with_tree_map",
        "trace",
        "with_extra_args_support",
        "zero_nans",
    },
    contrib: {
        "differentially_private_aggregate",
        "hutchinson_estimator_diag_hessian",
        "normalize",
        "schedule_free_eval_params",
        "split_real_and_imaginary",
    },
}


def makers(module):
    """Public functions annotated to return a gradient transformation, or defined in a module of optimizers."""
    for name in dir(module):
        thing = getattr(module, name)
        function = getattr(thing, "func", thing)  # nadam is a functools.partial
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        home, returned = function.__module__, str(inspect.signature(function).return_annotation)
        if "GradientTransformation" in returned or home == "optax._src.alias" or module is contrib:
            yield name


@pytest.mark.parametrize(("module", "table"), [(optax, OPTAX), (contrib, CONTRIB)], ids=["optax", "optax.contrib"])
def test_the_table_names_every_optimizer_that_optax_exports(module, table):
    exported = {name for name in makers(module) if not name.startswith("scale")}
    assert exported - NO_OPTIMIZER[module] == set(table)
    assert {name for name in NO_OPTIMIZER[module] if hasattr(module, name)} <= exported


# One transformation and one tree for all: each dtype's selection is compiled once.
LINK = jprune.prune(jprune.magnitude(), {0: jprune.Keep(18), 2: 0.75}, selection=by_rank)


def weights(dtype):
    kernel = jax.random.normal(jax.random.key(0), (4, 6), dtype)
    return {"dense": {"kernel": kernel, "bias": jnp.full(6, 0.5, dtype)}}


@pytest.mark.optax_promotes
@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings('ignore:"seed" is deprecated:DeprecationWarning')
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if name in quick else pytest.mark.slow)
        for dtype, quick in ((jnp.float32, QUICK), (jnp.bfloat16, HALF_TOO))
        for name in (*OPTAX, *CONTRIB)
    ],
)
@pytest.mark.quick(15)
def test_pruned_weights_are_exactly_zero_after_every_step(name, dtype):
    case = (OPTAX | CONTRIB)[name]
    tx = optax.chain(case.make(), LINK)
    params = weights(dtype)
    state, kept = tx.init(params), []

    def step(params, state):
        grad = case.grad(params)
        updates, state = tx.update(grad, state, params, **case.extra(params, grad))
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if case.jit else step
    for _ in range(4):
        params, state = step(params, state)
        kernel, mask = np.asarray(params["dense"]["kernel"]), np.asarray(jprune.masks_of(state)["dense"]["kernel"])
        kept.append(int(mask.sum()))
        assert (kernel[~mask] == 0).all()
        assert params["dense"]["kernel"].dtype == dtype
    assert kept == [18, 18, 6, 6]
    assert np.isfinite(np.asarray(kernel, np.float32)).all()
