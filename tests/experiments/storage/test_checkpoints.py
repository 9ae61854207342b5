"""Checkpoints within a stage: complete or absent, the latest one is kept, and the state comes back bit for bit."""

from concurrent.futures import ThreadPoolExecutor

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.storage import checkpoints, store
from experiments.storage.checkpoints import Checkpoints
from experiments.storage.files import StoreError

SETTINGS = {"seed": 3}


def of(root, minutes=0.0, **options):
    return Checkpoints(store.stage(root, "dense", SETTINGS, range(2)), SETTINGS, minutes, **options)


def folders(root):
    return sorted(path.parent.name.split("-")[0] for path in root.glob("*/00000-00002"))


def state():
    return {
        "weights": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "key": jax.random.split(jax.random.key(7), 2),
        "loss": jnp.array([jnp.inf, -0.0]),
        "none": None,
    }


def test_a_state_comes_back_bit_for_bit_with_its_random_keys(tmp_path):
    of(tmp_path).save(4, checkpoints.pack(state()))
    done, found = checkpoints.restored(of(tmp_path), jax.tree.map(lambda x: x[::-1], state()))
    assert done == 4
    assert found["weights"].dtype == jnp.bfloat16
    bits = lambda tree: jax.tree.map(lambda x: np.asarray(x).tobytes(), checkpoints.plain(tree))
    assert bits(found) == bits(state())
    chex.assert_trees_all_equal(jax.random.bits(found["key"][0]), jax.random.bits(state()["key"][0]))


def test_host_arrays_come_back_as_numpy_with_their_dtype(tmp_path):
    """405 of 450 is .9 in float64; in float32 it is .89999998, which would count as not trained."""
    of(tmp_path).save(1, checkpoints.pack((jnp.ones(2), np.array([[405 / 450]]))))
    _, (weights, accuracies) = checkpoints.restored(of(tmp_path), (jnp.zeros(2), np.zeros((0, 1))))
    assert isinstance(weights, jax.Array)
    assert (type(accuracies), accuracies.dtype, accuracies.tolist()) == (np.ndarray, np.float64, [[0.9]])


def test_only_the_latest_is_kept_and_it_is_cleared_when_the_stage_is_stored(tmp_path):
    kept = of(tmp_path)
    assert (kept.done, of(tmp_path).done) == (0, 0)
    for done in (9, 10):
        kept.save(done, {"x": np.full(2, done)})
        assert folders(tmp_path) == [f"dense_after_{done}"]
    assert of(tmp_path).done == 10
    assert of(tmp_path).load()["x"].tolist() == [10, 10]
    kept.clear()
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_a_result_of_its_stage_and_belongs_to_its_settings_and_replicates(tmp_path):
    of(tmp_path).save(1, {"x": np.zeros(2)})
    assert store.missing(tmp_path, "dense", SETTINGS, range(2)) == [range(2)]
    others = [({"seed": 4}, range(2)), (SETTINGS, range(2, 4)), (SETTINGS, range(1))]
    for settings, replicates in others:
        assert Checkpoints(store.stage(tmp_path, "dense", settings, replicates), settings, 0).done == 0


def test_runs_that_write_and_delete_checkpoints_of_one_epoch_do_not_stop_each_other(tmp_path, monkeypatch):
    """One that deletes its own removes the folder around it if it is empty, in which another creates its next."""
    monkeypatch.setattr(checkpoints.files, "write_weights", lambda path, arrays: path.mkdir())

    def save(number):
        kept = Checkpoints(store.stage(tmp_path, "dense", SETTINGS, range(number, number + 1)), SETTINGS, 0)
        for done in range(1, 101):
            kept.save(done, {})
        kept.clear()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(save, range(6)))
    assert list(tmp_path.iterdir()) == []


def test_of_two_the_larger_number_of_epochs_is_read(tmp_path):
    """A run that is killed between storing one and deleting the other leaves both; 9 and 10 sort by value."""
    of(tmp_path).save(9, {"x": np.array([9])})
    (tmp_path / f"dense_after_9-{store.digest(SETTINGS)}").rename(tmp_path / "aside")
    of(tmp_path).save(10, {"x": np.array([10])})
    (tmp_path / "aside").rename(tmp_path / f"dense_after_9-{store.digest(SETTINGS)}")
    assert of(tmp_path).load()["x"].tolist() == [10]
    of(tmp_path).clear()
    assert folders(tmp_path) == []


def test_one_is_due_after_the_minutes_and_only_one_process_writes(tmp_path):
    assert of(tmp_path, 0).due()
    assert not of(tmp_path, 1000).due()
    of(tmp_path, writes=False).save(1, {"x": np.zeros(2)})
    assert folders(tmp_path) == []
    assert (
        of(tmp_path, agree=lambda value: 5 if isinstance(value, int) and not isinstance(value, bool) else value).done
        == 5
    )


def test_an_altered_file_and_another_structure_are_refused(tmp_path):
    of(tmp_path).save(3, checkpoints.pack(state()))
    with pytest.raises(StoreError, match=r"has 3 arrays and the state of this version 2; delete the folder"):
        checkpoints.restored(of(tmp_path), {"weights": jnp.zeros(2), "key": jnp.zeros(2)})
    stacked = jax.tree.map(lambda x: x[None], state())  # as on an accelerator, where all networks are one array
    with pytest.raises(
        StoreError, match=r"array 0 of the checkpoint has the shape \(2, 2\) .* run \(1, 2, 2\).*delete"
    ):
        checkpoints.restored(of(tmp_path), stacked)
    (folder,) = tmp_path.glob("dense_after_3-*/00000-00002/weights")
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(b"x" + file.read_bytes()[1:])
    with pytest.raises(StoreError, match="is corrupt: its checksum differs"):
        of(tmp_path).load()
