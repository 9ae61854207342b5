"""Described devices to compile for: H100s in hosts of four or eight, TPU v5e chips in slices."""

import os
import pathlib
from typing import NamedTuple

# These are read when a compiler is loaded. Autotuning would run kernels; the TPU library needs the slice it belongs to.
for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}.items():
    os.environ.setdefault(_name, _value)
if "--xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding  # noqa: E402

jax.config.update("jax_platforms", "cpu")  # in case jax was imported before the lines above


class Target(NamedTuple):
    """Devices of one kind.

    Attributes:
      name: name in tables.
      devices: described devices.
      bandwidth: memory bandwidth of one of them, in bytes per second.
      gpu: whether they are GPUs.
    """

    name: str
    devices: list[jax.Device]
    bandwidth: float
    gpu: bool


def h100(hosts: int = 1, per_host: int = 1) -> Target:
    """Describe H100 SXM5 devices, with a memory bandwidth of 3.35 TB/s."""
    described = (pathlib.Path(__file__).parent / "h100.txtpb").read_text()
    found = topologies.get_topology_desc(
        platform="cuda", target_config=described, topology=f"1x{hosts}x{per_host}"
    ).devices
    return Target(f"{len(found)} H100" if len(found) > 1 else "H100", list(found), 3.35e12, True)


def v5e(topology: str = "2x2", count: int | None = None) -> Target:
    """Describe the first chips of a TPU v5e slice, such as 2x2 or 16x16, with a memory bandwidth of 819 GB/s."""
    chips = int(np.prod([int(size) for size in topology.split("x")]))
    more = {"chips_per_host_bounds": (2, 2, 1)} if chips > 8 else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{topology}", **more).devices[:count]
    return Target(f"{len(found)} v5e" if len(found) > 1 else "v5e", list(found), 8.19e11, False)


def on_one(target: Target, tree: object) -> object:
    """Describe the arrays of a tree on the first device; they may be arrays or described ones."""
    place = SingleDeviceSharding(target.devices[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def mesh(target: Target, rows: int, columns: int) -> Mesh:
    """Return a mesh of all devices, with the axes x and y."""
    return Mesh(np.array(target.devices).reshape(rows, columns), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def sharded(shape: tuple[int, ...], dtype: object, over: Mesh, *spec: object) -> jax.ShapeDtypeStruct:
    """Describe an array that is sharded over a mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(over, PartitionSpec(*spec)))


def explicit(described: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Describe a sharded array again, on a mesh with explicit axes."""
    over, spec = described.sharding.mesh, described.sharding.spec
    over = Mesh(over.devices, over.axis_names, axis_types=(AxisType.Explicit,) * len(over.axis_names))
    return jax.ShapeDtypeStruct(described.shape, described.dtype, sharding=NamedSharding(over, spec))
