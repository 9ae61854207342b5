"""One of two processes that save a model spread over both: `python -m ... PROCESS PORT FOLDER`."""

import json
import pathlib
import sys
import warnings

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jprune
from jprune.pruning.state import PruneState

KERNEL = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(process, port, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    warnings.simplefilter("error")
    mesh = jax.make_mesh((4,), ("shard",), axis_types=(AxisType.Auto,))

    def placed(array, spec):
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    params = {
        "one": {"kernel": placed(KERNEL, P("shard")), "bias": placed(np.ones(8, np.float32), P())},
        "two": {"kernel": placed(KERNEL.T, P(None, "shard"))},
        "key": jax.random.key(0),
    }
    masks = jax.jit(lambda p: jprune.global_masks(jprune.magnitude()(p), keep=100))(params)
    file = pathlib.Path(folder) / "pruned.safetensors"
    found = {
        "refused": [
            message(lambda: jprune.io.save_masks(file, masks)),
            message(lambda: jprune.io.save_pruned(file, params)),
            message(lambda: jprune.io.to_bcoo(params, masks)),
        ],
        "no folder": message(lambda: jprune.io.save_masks(file / "none" / "m", masks, gather=True)),
    }
    jprune.io.save_pruned(file, params, masks, gather=True)
    assert file.exists()  # in both processes
    again = jprune.io.load_pruned(file, params)["one"]["kernel"]
    assert again.sharding == params["one"]["kernel"].sharding
    sparse = jprune.io.to_bcoo(params, masks, gather=True)
    found["nse"] = [sparse["one"]["kernel"].nse, sparse["two"]["kernel"].nse]
    found["product"] = np.asarray(sparse["one"]["kernel"] @ np.ones(8, np.float32)).tolist()
    found["same"] = bool(jax.jit(lambda a, m, w: (a == w * m).all())(again, masks["one"]["kernel"], KERNEL))
    state = PruneState(np.int32(1), masks, None, np.uint32(0))
    pruned = jprune.apply_masks(params, masks)
    jprune.check_pruned(pruned, state, keep={"^one/": 50, "": 50})
    stacked = {"": jprune.KernelAxes(stacked=(1,), inputs=(0,))}
    found["too many"] = message(lambda: jprune.check_pruned(pruned, state, keep={"^one/": 1, "": 8}, axes=stacked))
    found["table"] = jprune.cost_table(params, masks)["nonzeros"].to_dict()
    print(json.dumps(found if process == 0 else {"no folder": found["no folder"]}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
