"""ResNet-50 at a small size: a training step with the batch split over eight devices, and the stream of images."""

import io
import math
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from experiments.jumpstart_grid import imagenet
from experiments.jumpstart_grid.imagenet import ImageNet
from experiments.models.resnet50 import ResNet50
from experiments.storage import files

TOY = {"num_classes": 5, "channels": 2}
RNG = np.random.default_rng(0)
BATCH = RNG.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8), (np.arange(8) % 5).astype(np.int32)


@pytest.mark.parametrize("whole", [True, False])
def test_resnet50_has_the_published_number_of_parameters(whole):
    """25,557,032 with normalization; without it and shortcuts, each convolution has a bias instead."""
    model = nnx.eval_shape(lambda: ResNet50(normalized=whole, shortcut=whole, rngs=nnx.Rngs(0)))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    outputs = 64 + sum(count * (2 * w + 4 * w) for count, w in zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True))
    projections = 64 * 256 + 256 * 512 + 512 * 1024 + 1024 * 2048, 256 + 512 + 1024 + 2048
    plain = 25_557_032 - 2 * (outputs + projections[1]) - projections[0] + outputs
    assert total == (25_557_032 if whole else plain)


@pytest.mark.slow
@pytest.mark.optax_promotes
@pytest.mark.parametrize(("method", "blocks"), [("jumpstart", (1,)), ("resnet", (1, 1))])
def test_a_step_on_eight_devices_is_that_on_one(method, blocks):
    settings = ImageNet(method=method, batch=8, epochs=2, lr=0.05)
    found = {}
    for devices in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("batch",))
        compiled = imagenet.trainer(settings, 2, mesh, **TOY, blocks=blocks)
        state = compiled.init(jax.random.key(0))
        losses = []
        for _ in range(2):
            state, loss = compiled.step(state, BATCH)
            losses.append(float(loss))
        found[devices] = losses, jax.tree.map(np.asarray, state.params)
    np.testing.assert_allclose(found[1][0], found[8][0], rtol=1e-4)
    chex.assert_trees_all_close(found[1][1], found[8][1], rtol=2e-3, atol=1e-4)
    assert 0 <= int(compiled.correct(state, BATCH)) <= 8


def test_a_batch_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(ValueError, match="batch=9 must be a multiple of the 8 devices"):
        imagenet.trainer(ImageNet(batch=9), 2, Mesh(np.array(jax.devices()), ("batch",)), **TOY)


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), color).save(buffer, "PNG")
    return buffer.getvalue()


class Source:
    """Ten images whose red channel is ten times their label."""

    def __len__(self):
        return 10

    def __getitems__(self, indices):
        return [{"image": png((10 * i, 0, 0)), "label": i} for i in indices]


def test_a_batch_larger_than_a_split_is_refused_before_training():
    """Without validation images the accuracy would be undefined, after hours of training."""
    for train, validation, name in ((range(7), range(9), "7 training"), (range(9), range(7), "7 validation")):
        with pytest.raises(ValueError, match=f"batch=8 is more than the {name} images"):
            imagenet.train(ImageNet(batch=8), train, validation)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--epochs 0", "epochs=0 must be at least 1"),
        ("--batch 0", "batch=0 must be at least 1"),
        ("--size -4", "size=-4 must be at least 1"),
        ("--lr nan", "lr=nan must be finite"),
        ("--coefficient -1", "coefficient=-1.0 must be at least 0"),
        ("--seed -1", "seed=-1 must be at least 0"),
    ],
)
def test_wrong_options_are_refused_before_the_data_is_read(capsys, given, message):
    assert imagenet.main([*given.split(), "--data-dir", "missing"]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    with pytest.raises(ValueError, match="method='jumpstrat' must be one of 'jumpstart', 'plain', 'resnet'"):
        imagenet.ImageNet(method="jumpstrat")


def test_every_image_is_streamed_once_and_processes_decode_parts_of_the_same_batches():
    settings = ImageNet(batch=4, size=8)
    whole = list(imagenet.batches(Source(), settings, np.random.default_rng(3)))
    labels = np.concatenate([labels for _, labels in whole])
    assert len(labels) == len(set(labels.tolist())) == 8  # the last two are dropped
    for images, labels in whole:
        assert images.shape == (4, 8, 8, 3)
        np.testing.assert_array_equal(images[:, 0, 0, 0], 10 * labels)
    halves = [list(imagenet.batches(Source(), settings, np.random.default_rng(3), (i, 2))) for i in range(2)]
    for number, (images, labels) in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([half[number][0] for half in halves]), images)
        np.testing.assert_array_equal(np.concatenate([half[number][1] for half in halves]), labels)


def test_every_validation_image_is_evaluated_once_and_filling_images_never_count():
    """Ten images in batches of four: the last two of the third batch are filling, with the label -1."""
    settings = ImageNet(batch=4, size=8)
    whole = list(imagenet.batches(Source(), settings, None))
    assert np.concatenate([labels for _, labels in whole]).tolist() == [*range(10), -1, -1]
    np.testing.assert_array_equal(whole[2][0][:2, 0, 0, 0], [80, 90])
    halves = [list(imagenet.batches(Source(), settings, None, (i, 2))) for i in range(2)]
    assert [labels.tolist() for _, labels in halves[1]] == [[2, 3], [6, 7], [-1, -1]]


def test_the_central_crop_is_7_8_of_the_shorter_side():
    """The 14 x 14 crop of a white 16 x 32 image with a black border of one pixel is all white."""
    pixels = np.full((16, 32, 3), 255, np.uint8)
    pixels[[0, -1]], pixels[:, [0, -1]] = 0, 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert (imagenet.crop(buffer.getvalue(), 14, None) == 255).all()
    crops = [imagenet.crop(buffer.getvalue(), 14, seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(crops[0], crops[1])
    assert (crops[0] != crops[2]).any()
    assert jnp.asarray(crops[0]).shape == (14, 14, 3)


@pytest.mark.parametrize("first", [True, False])
def test_processes_join_before_training_and_the_first_one_alone_writes(monkeypatch, capsys, tmp_path, first):
    calls = []
    for name in ("start", "watch_peers", "leave", "give_up"):
        monkeypatch.setattr(imagenet.processes, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(imagenet.processes, "is_first", lambda: first)
    monkeypatch.setattr(imagenet.image_sets, "stream", lambda *_: Source())
    monkeypatch.setattr(imagenet, "train", lambda *given: calls.append(len(given[3]) > 0))
    assert imagenet.main(["--out", str(tmp_path)]) == 0
    assert calls == ["start", "watch_peers", first, "leave"]
    assert (tmp_path / "config.json").exists() == first == bool(capsys.readouterr().out)
    monkeypatch.setattr(imagenet, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        imagenet.main(["--out", str(tmp_path)])
    assert calls[-1] == "give_up"


def test_studies_in_one_folder_have_their_own_weights():
    settings = [ImageNet(method="plain"), ImageNet(), ImageNet(seed=1)]
    assert len({imagenet.weights_of(one) for one in settings}) == 3
    assert imagenet.weights_of(ImageNet(data_dir=Path("there"))) == imagenet.weights_of(ImageNet())


@pytest.mark.slow
@pytest.mark.optax_promotes
def test_a_killed_training_continues_after_its_last_epoch_with_the_same_weights(tmp_path, monkeypatch):
    small = partial(imagenet.trainer, blocks=(1,), channels=2)
    monkeypatch.setattr(imagenet, "trainer", lambda *given, num_classes: small(*given, num_classes=10))
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:2])
    settings = {"epochs": 3, "batch": 4, "size": 16, "lr": 0.05}

    class Killed(Exception):
        """The run ends in its second epoch, when it has logged it."""

    def die(_stage, _replicates, epoch, _metrics):
        if epoch == 2:
            raise Killed

    found = {}
    for name, callbacks in (("whole", []), ("parts", [die])):
        given = ImageNet(out=tmp_path / name, **settings)
        if callbacks:
            with pytest.raises(Killed):
                imagenet.train(given, Source(), Source(), callbacks)
        epochs = []
        note = lambda _stage, _replicates, epoch, _metrics, to=epochs: to.append(epoch)
        accuracies = imagenet.train(given, Source(), Source(), [note])
        assert epochs == ([2, 3] if callbacks else [1, 2, 3])
        found[name] = accuracies, files.read_weights(imagenet.weights_of(given))
    chex.assert_trees_all_equal(found["whole"], found["parts"])
    again = imagenet.train(given, Source(), Source(), [die])
    chex.assert_trees_all_equal(again, accuracies)
