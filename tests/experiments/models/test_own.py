"""Models of your own: an NNX and a Linen class, trained against a float64 forward pass of numpy."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jprune
from experiments import recall_distortion
from experiments.data import datasets
from experiments.models import own
from experiments.models.options import read_options
from experiments.recall_distortion import plan, runner
from experiments.recall_distortion.config import Running, Study
from experiments.storage import store
from experiments.training import tasks

pytestmark = [pytest.mark.optax_promotes, pytest.mark.filterwarnings("ignore:fewer than five models")]

RNG = np.random.default_rng(0)
ARRAYS = {"x_train": RNG.normal(size=(80, 4)).astype(np.float32), "y_train": np.arange(80) % 3}
DATA = datasets.of_arrays(ARRAYS, "toy")


class Net(nnx.Module):
    """Two layers, one of them prunable, an output layer that is not called head, and dropout."""

    def __init__(self, width=6, *, rngs):
        self.one = nnx.Linear(4, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.two = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        return self.two(self.dropout(nnx.relu(self.one(x))))


class LinenNet(nn.Module):
    """The same in Linen, with batch normalization and an argument ``train``."""

    width: int = 6

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(self.width, name="one")(x))
        return nn.Dense(3, name="two")(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def test_a_partial_is_refused_because_results_are_stored_by_the_name_of_a_model(tmp_path):
    model = functools.partial(Net, width=3)
    with pytest.raises(ValueError, match="has no name, by which results are stored; give a class and model_options"):
        recall_distortion.run(model=model, data=ARRAYS, study=Study(), out=tmp_path)
    assert not list(tmp_path.iterdir())


class Faulty(nnx.Module):
    """A model with mistakes that are not wrong arguments."""

    def __init__(self, table=None, *, rngs):
        self.one = nnx.Linear(4, {None: 3}[table], rngs=rngs)

    def __call__(self, x):
        return self.nothing(x)


class Biased(nnx.Module):
    """A model that has only a bias."""

    def __init__(self, *, rngs):
        self.bias = nnx.Param(jnp.zeros(3))

    def __call__(self, x):
        return jnp.broadcast_to(self.bias[...], (len(x), 3))


class Residual(nnx.Module):
    """A model whose residual branch starts at zero."""

    def __init__(self, *, rngs):
        self.one = nnx.Linear(4, 6, rngs=rngs)
        self.up = nnx.Linear(6, 6, rngs=rngs)
        self.down = nnx.Linear(6, 6, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.one(x))
        return self.head(x + self.down(nnx.relu(self.up(x))))


class Flat(nnx.Module):
    """A model that returns one logit too many."""

    def __init__(self, *, rngs):
        self.one = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.one(x)


def leaves(tree):
    paths, arrays, _ = jprune.trees.flatten(tree)
    return dict(zip(paths, arrays, strict=True))


@pytest.mark.parametrize("cls", [Net, LinenNet])
def test_logits_are_those_of_the_layers_in_float64(cls):
    task = tasks.classification(DATA, cls)
    params, stats = task.init(jax.random.key(0))
    w = {path: np.asarray(leaf, np.float64) for path, leaf in leaves(params).items()}
    x = (ARRAYS["x_train"][:5].astype(np.float64) - DATA.mean) / DATA.std
    hidden = x @ w["one/kernel"] + w["one/bias"]
    if cls is LinenNet:
        hidden = hidden / np.sqrt(1 + 1e-5) * w["norm/scale"] + w["norm/bias"]
    expected = np.maximum(hidden, 0) @ w["two/kernel"] + w["two/bias"]
    np.testing.assert_allclose(task.logits(params, stats, ARRAYS["x_train"][:5]), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("cls", [Net, LinenNet])
def test_dropout_depends_on_the_key_of_the_step_in_training_only(cls):
    task = tasks.classification(DATA, cls)
    params, stats = task.init(jax.random.key(0))
    batch = datasets.Split(ARRAYS["x_train"][:8], ARRAYS["y_train"][:8].astype(np.int32))
    losses = {
        mode: [float(task.loss(params, tasks.Context(stats, batch, jax.random.key(k)), mode)[0]) for k in (1, 1, 2)]
        for mode in ("train", "eval")
    }
    assert losses["train"][0] == losses["train"][1] != losses["train"][2]
    assert len(set(losses["eval"])) == 1


def test_the_hash_has_options_shapes_normalization_and_the_source_of_the_class():
    study = Study(model="tests.experiments.models.test_own:Net", dataset="toy", ratios=(1, 2), scores=("magnitude",))

    def digest(study=study, dataset=DATA, model=None):
        known = plan.known(study, dataset, model)
        return store.digest(plan.dense_settings(study, known, 0.0))

    before = digest()
    known = plan.known(study, DATA)
    assert known.model["parameters"] == {"one/bias": [6], "one/kernel": [4, 6], "two/bias": [3], "two/kernel": [6, 3]}
    assert digest(dataclasses.replace(study, model_options=("width=7",))) != before
    assert digest(dataclasses.replace(study, prunable="^one/")) != before
    assert digest(dataset=dataclasses.replace(DATA, mean=DATA.mean + 1)) != before

    class Net6(nnx.Module):  # the same shapes, another activation
        def __init__(self, width=6, *, rngs):
            self.one = nnx.Linear(4, width, rngs=rngs)
            self.two = nnx.Linear(width, 3, rngs=rngs)

        def __call__(self, x):
            return self.two(jnp.tanh(self.one(x)))

    assert digest(model=Net6) != before


def test_the_hash_of_the_source_covers_helpers_and_base_classes(tmp_path, monkeypatch):
    """A helper that the class calls, and the module of its base class, change the hash; another module does not."""
    monkeypatch.syspath_prepend(tmp_path)
    base = "class Base:\n    scale = 1\n"
    model = "from base_NUMBER import Base\ndef helper(x):\n    return x\nclass Net(Base):\n    pass\n"
    versions = [(base, model), (base, model), (base, model.replace("return x", "return -x"))]
    versions.append((base.replace("1", "2"), model))
    found = []
    for number, (of_base, of_model) in enumerate(versions):
        (tmp_path / f"base_{number}.py").write_text(of_base)
        (tmp_path / f"model_{number}.py").write_text(
            of_model.replace("base_NUMBER", "base_0" if number < 3 else "base_3")
        )
        found.append(own.source_digest(own.load(f"model_{number}:Net")))
    assert found[0] == found[1]
    assert len({*found}) == 3


@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param(Net, {"width": 8}, marks=pytest.mark.slow),
        pytest.param("tests.experiments.models.test_own:LinenNet", {}, marks=pytest.mark.slow),
    ],
)
def test_a_study_from_python_prunes_the_given_kernels(tmp_path, model, options):
    """One kernel of 4 x 8 or 4 x 6 weights is pruned; the whole model has the requested ratio."""
    calls = []
    study = Study(
        replicates=2, ratios=(1, 1.25), scores=("magnitude",), epochs=(2,), finetune_epochs=(1,), batch=16, lr=(0.1,)
    )
    evidence = recall_distortion.run(
        model,
        ARRAYS,
        study,
        model_options=options,
        prunable="^one/",
        out=tmp_path,
        running=Running(chunk=2, form="vmap", loop="scan"),
        callbacks=[lambda stage, replicates, epoch, metrics: calls.append((epoch, len(metrics["train_loss"])))],
    )
    (one,) = evidence.values()
    rows = one.alphas[one.alphas["ratio"] == 1.25]
    width = options.get("width", 6)
    total = 4 * width + width + 3 * width + 3 + (2 * width if model != Net else 0)
    kept = round(total / 1.25) - (total - 4 * width)
    assert rows["kept"].tolist() == [kept, kept]
    assert calls == [(1, 2), (2, 2), (1, 2), (1, 2)]
    assert (tmp_path / "report.html").exists()


def test_a_kernel_that_starts_at_zero_is_trained_in_every_phase_unless_its_weight_is_pruned():
    """96 of 135 parameters are prunable, so 28 are kept at t = 2; a weight of a dead unit stays at its zero."""
    study = Study(
        model="m:Residual", ratios=(1, 2), scores=("random",), batch=16, epochs=(2,), finetune_epochs=(2,), lr=(0.1,)
    )
    lab = runner.equip(study, DATA, Running(chunk=1, form="vmap", loop="scan"), Residual)
    dense = runner.train_dense(lab, 0.0, range(1), lambda *_: None).weights
    assert (dense["0/down/kernel"] != 0).all()
    again = {**dense, "0/down/kernel": np.zeros_like(dense["0/down/kernel"])}
    for target in plan.targets(study):
        found = runner.prune_and_finetune(lab, target, 0.0, range(1), dense=again, on_epoch=lambda *_: None)
        nonzero = {name: int((found.weights[f"0/{name}/kernel"] != 0).sum()) for name in ("one", "up", "down")}
        assert found.summary.get("kept_by_mask", [96]) == [28 if target.ratio == 2 else 96]
        assert nonzero["down"] > 0
        assert sum(nonzero.values()) <= (28 if target.ratio == 2 else 96)


def test_stages_of_own_models_have_another_digest_than_those_of_the_version_that_did_not_train_zeros():
    study = Study(model="tests.experiments.models.test_own:Net", dataset="toy")
    assert plan.model_settings(study, DATA)["version"] == 2
    assert plan.model_settings(Study(model="mlp"), DATA) == {"model": "mlp"}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("nowhere.at.all:Net", {}, "add that folder to PYTHONPATH"),
        ("flax.nnx:NoSuchClass", {}, "must be package.module:Class"),
        ("math:pi", {}, "it must be a class or a function"),
        (":", {}, "model=':' must be package.module:Class"),
        ("json:JSONDecoder", {}, "json.decoder:JSONDecoder makes a JSONDecoder; it must make an NNX or a Linen module"),
        (Flat, {}, r"returns float32\[2, 4\] .*must return logits of shape \(2, 3\)"),
        (Net, {"depth": 3}, "its arguments are width"),
        (Net, {"width": 0}, r"model_options=\{'width': 0\}: .*; its arguments are width"),
        (Faulty, {}, r"cannot be called on .*: AttributeError: 'Faulty' .* 'nothing' \(.*test_own\.py, line \d+\)"),
        (Faulty, {"table": "x"}, r"model_options=\{'table': 'x'\}: KeyError: 'x' \(.*test_own\.py, line \d+\)"),
        ("dense", {}, "model='dense' needs the model_options depth, width"),
        ("mlp", {"width": 3}, "model='mlp' has no option 'width'"),
    ],
)
def test_a_model_that_cannot_be_used_is_an_error_that_says_why(model, options, message):
    with pytest.raises(ValueError, match=message):
        tasks.classification(DATA, model, options=options)


def test_a_model_without_kernels_is_refused_with_its_parameters():
    study = Study(model="tests.experiments.models.test_own:Biased", batch=16, scores=("magnitude",))
    with pytest.raises(
        ValueError, match=r"Biased' has no kernel to prune: none of its parameters bias is called kernel"
    ):
        runner.equip(study, DATA)


def test_a_pattern_that_matches_no_kernel_lists_the_kernels():
    study = Study(model="tests.experiments.models.test_own:Net", prunable="^three/", batch=16, scores=("magnitude",))
    with pytest.raises(ValueError, match=r"matches no kernel of .*Net; its kernels are one/kernel, two/kernel"):
        runner.equip(study, DATA)


def test_a_model_without_a_head_is_pruned_everywhere():
    study = Study(model="tests.experiments.models.test_own:Net", batch=16, scores=("magnitude",), ratios=(1, 1.2))
    assert runner.prunable_paths(runner.equip(study, DATA)) == ["one/kernel", "two/kernel"]


@pytest.mark.parametrize("option", ["depth", "=3", "a b=3"])
def test_an_option_that_is_not_name_and_value_is_refused(option):
    with pytest.raises(ValueError, match="must be NAME=VALUE"):
        read_options([option])
    with pytest.raises(ValueError, match="each name once"):
        read_options(["depth=1", "depth=2"])


@pytest.mark.parametrize("value", [np.bool_(False), np.float32(0.5), (np.int64(3), 4), np.arange(2), np.inf, nnx.relu])
def test_an_option_from_python_that_would_become_a_string_is_refused(tmp_path, value):
    """The string 'np.False_' is true."""
    with pytest.raises(ValueError, match=r"model_options: width=.* has the type \w+; give finite Python numbers"):
        recall_distortion.run(Net, "digits", model_options={"width": value}, out=tmp_path)
