"""Transformations refuse impossible arguments, by name and value, when they are made or initialized."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest

import jprune
from jprune import schedules
from jprune.pruning import proximal

PARAMS = {"a": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}}
SGD = optax.sgd(0.1)
ONE_SHOT = {1000: 0.5}


def call(function, *arguments, **options):
    """Call a function without the type checker of the tests and initialize the transformation that it returns."""
    made = inspect.unwrap(function)(*arguments, **options)
    return made.init(PARAMS)


def prune(score=None, schedule=None, **options):
    score = jprune.magnitude() if score is None else score
    return call(jprune.prune, score, ONE_SHOT if schedule is None else schedule, **options)


@pytest.mark.filterwarnings("ignore:keep_zeros has no zero")
@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: prune(schedule={3: 50}), TypeError, r"write jprune\.Keep\(50\); for 50% write 0\.5$"),
        (lambda: prune(schedule={3: 50.0}), ValueError, r"schedule\[3\]=50\.0 must be .*; for 50% write 0\.5$"),
        (lambda: jprune.global_masks(PARAMS, sparsity=90), TypeError, r"write keep=90; for 90% write 0\.9$"),
        (lambda: jprune.cubic(90, begin=0, end=2, every=1), TypeError, r"sparsity is 90; .*; for 90% write 0\.9$"),
        (lambda: jprune.geometric(20.0, every=1, times=2), ValueError, r"rate is 20\.0; .*; for 20% write 0\.2$"),
        (lambda: prune(regrow=0.3), TypeError, r"regrow=0\.3 is a float; it must be jprune\.Regrow"),
        (lambda: prune(key=0), TypeError, r"key is 0; it must be one PRNG key"),
        (lambda: prune(key=jax.random.split(jax.random.key(0))), TypeError, r"key is key<fry>\[2\]; it must be one"),
        (lambda: prune(where=lambda path: True), TypeError, r"too many positional arguments; it must be a predicate"),
        (lambda: prune(selection=PARAMS), TypeError, "selection is a dict; it must be a function from scores to masks"),
        (lambda: prune(selection=lambda scores: scores), TypeError, "unexpected keyword argument 'sparsity'; it must"),
        (lambda: prune(selection=jprune.structured), TypeError, "unexpected keyword argument 'sparsity'; it must"),
        (lambda: prune(selection=lambda scores, sparsity, among: scores, min_keep=1), TypeError, "'min_keep'; it must"),
        (lambda: jprune.Regrow(jprune.random, 0.3), TypeError, "it must be a score"),
        (lambda: schedules.cosine_fraction(3, 10), ValueError, "fraction=3 must be a number from 0"),
        (lambda: call(jprune.rigl, SGD, 90, end=9), TypeError, r"sparsity=90 is an integer.*; for 90% write 0\.9"),
        (lambda: call(jprune.rigl, SGD, 0.9, end=9, every=0), ValueError, "every is 0; it must be at least 1"),
        (lambda: call(jprune.rigl, SGD, 0.9, end=9, fraction=30), ValueError, "fraction=30 must be a number from 0"),
        (lambda: call(jprune.sparse_evolution, SGD, 0.9, key=None, end=9), TypeError, "key is None; sparse_evolution"),
        (lambda: call(jprune.sr_ste, SGD, 0, 4), ValueError, "n is 0; it must be from 1 to 4"),
        (lambda: call(jprune.sr_ste, SGD, 0.5, 4), TypeError, r"n is 0\.5; it must be an integer"),
        (lambda: call(jprune.sr_ste, SGD, every=1.5), TypeError, r"every is 1\.5; it must be an integer"),
        (
            lambda: call(jprune.sr_ste, SGD, decay="x"),
            TypeError,
            "decay='x' is not a number; pass a number of 0 or more",
        ),
        (lambda: inspect.unwrap(jprune.nm_masks)(PARAMS, 0.5, 4), TypeError, r"n is 0\.5; it must be an integer"),
        (
            lambda: call(jprune.reset_moments, SGD, SGD),
            ValueError,
            r"there is no prune or keep_zeros .*; end the chain",
        ),
        (
            lambda: call(jprune.reset_moments, jprune.keep_zeros(), SGD),
            ValueError,
            r"state\[0\] is not the last of its chain",
        ),
        (lambda: call(proximal.soft_threshold, True), TypeError, "threshold=True must be one number"),
        (lambda: call(proximal.soft_threshold, jnp.ones(3)), TypeError, "threshold=.* must be one number"),
        (lambda: call(proximal.soft_threshold, jnp.array(-1.0)), ValueError, "threshold=.* must be one number"),
        (lambda: call(proximal.hard_threshold, float("inf")), ValueError, "threshold=inf must be one number"),
        (lambda: call(proximal.hard_threshold, lambda step: -1.0), ValueError, r"threshold\(step=0\)=-1\.0 must be"),
        (lambda: call(proximal.group_soft_threshold, 0.1, groups=[]), ValueError, "groups is empty"),
        (lambda: call(proximal.group_soft_threshold, 0.1, groups=["a"]), TypeError, "groups has 'a'; it must be graph"),
        (lambda: call(proximal.group_soft_threshold, 0.1, groups=[[("z", 0)]]), ValueError, "where=groups selects no"),
        (lambda: call(proximal.group_soft_threshold, 0.1, by_size="x"), TypeError, "by_size='x' must be a bool"),
        (
            lambda: call(proximal.group_soft_threshold, 0.1, groups=[[("a/kernel", 1)]], where=jprune.kernels),
            TypeError,
            "groups and where are both given",
        ),
    ],
)
def test_it_is_refused_before_the_first_update(made, error, message):
    with pytest.raises(error, match=message):
        made()


def test_the_link_uses_the_where_of_its_score_unless_it_has_one():
    params = {"a": {"kernel": jnp.array([[1.0, 2.0]])}, "head": {"kernel": jnp.array([[3.0, 4.0]])}}
    score = jprune.magnitude(where=jprune.by_path(exclude="^head/"))
    masks = jprune.masks_of(jprune.prune(score, {0: 0.5}).init(params))
    assert masks["head"]["kernel"] is None
    assert masks["a"]["kernel"].shape == (1, 2)
    masks = jprune.masks_of(jprune.prune(score, {0: 0.5}, where=jprune.kernels).init(params))
    assert masks["head"]["kernel"].shape == (1, 2)
