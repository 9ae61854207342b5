"""A replicate does not depend on the number of replicates, the block, the devices or the form of the computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from experiments.training import replicates
from experiments.training.replicates import Placement

MESHES = {1: Mesh(np.array(jax.devices()[:1]), ("replicate",)), 8: replicates.all_devices()}


def draw(index, shared):
    """A replicate's own random numbers, and something that is shared."""
    return {"noise": jax.random.normal(replicates.key(5, index, 2), (3,)), "sum": shared + index}


def run(placement, indices):
    index = replicates.place(np.array(indices, np.int32), placement.mesh)
    shared = replicates.share(np.int32(10), placement.mesh)
    return replicates.fetch(replicates.spread(draw, placement)(index, shared), len(indices))


@pytest.mark.parametrize("form", ["vmap", "map", "unroll"])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.quick(2)
def test_a_replicate_does_not_depend_on_its_company(form, devices):
    placement = Placement(MESHES[devices], form)
    expected = {
        i: jax.random.normal(jax.random.fold_in(jax.random.fold_in(jax.random.key(5), i), 2), (3,)) for i in range(9)
    }
    for indices in (range(9), range(4, 6), [7]):
        found = run(placement, indices)
        assert found["noise"].shape == (len(indices), 3)
        assert found["sum"].tolist() == [10 + i for i in indices]
        np.testing.assert_allclose(found["noise"], [expected[i] for i in indices], rtol=1e-6)


def test_replicates_lie_on_all_devices_and_shared_arrays_on_each():
    mesh = MESHES[8]
    placed = replicates.place(np.arange(10, dtype=np.int32), mesh)
    assert placed.shape == (16,)  # padded to a multiple of the devices
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2,)}
    assert placed[9:].tolist() == [9] * 7
    out = replicates.spread(draw, Placement(mesh))(placed, replicates.share(np.int32(0), mesh))
    assert len(out["noise"].sharding.device_set) == 8


def test_a_program_has_no_communication_between_devices():
    mesh = MESHES[8]
    placement = Placement(mesh)
    placed = replicates.place(np.arange(8, dtype=np.int32), mesh)
    shared = replicates.share(np.int32(0), mesh)
    text = replicates.spread(draw, placement).program.lower(placed, (shared,)).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))


def test_a_donated_argument_is_consumed():
    placement = Placement(MESHES[8])
    placed = replicates.place(np.arange(8, dtype=np.float32), placement.mesh)
    replicates.spread(lambda x: x + 1, placement, donate=True)(placed)
    assert placed.is_deleted()


@pytest.mark.parametrize(("count", "shards"), [(30, 4), (3, 5), (7, 7), (10, 1)])
def test_shards_partition_the_replicates(count, shards):
    parts = [replicates.of_shard(count, (i, shards)) for i in range(shards)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("shard", [(4, 4), (-1, 2), (0, 0)])
def test_a_shard_that_does_not_exist_is_refused(shard):
    with pytest.raises(ValueError, match=f"shard={shard[0]}/{shard[1]} must be i/n"):
        replicates.of_shard(10, shard)


def test_chunks_stay_where_they_are_when_replicates_are_added():
    assert replicates.chunks(range(10), 4) == [range(4), range(4, 8), range(8, 10)]
    assert replicates.chunks(range(30), 4)[:2] == replicates.chunks(range(10), 4)[:2]
    assert replicates.chunks(range(5, 5), 4) == []
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        replicates.chunks(range(3), 0)


def test_bytes_count_arguments_and_intermediates():
    def f(x):
        y = jnp.concatenate([x, x])  # 2 x 400 bytes
        return jax.lax.scan(lambda c, _: (c + y.sum(), None), jnp.float32(0), None, length=5)[0]  # 2 x 4 bytes a step

    assert replicates.bytes_of(f, jax.ShapeDtypeStruct((100,), jnp.float32)) == 400 + 800 + 8
