"""The recall-distortion study: the effect of pruning on the recall of each class.

``python -m experiments.recall_distortion`` is the command line. From Python::

    from experiments import recall_distortion
    evidence = recall_distortion.run(model=Net, data="npz:my_data.npz", study="demo")
"""


def __getattr__(name: str) -> object:
    if name == "run":
        from experiments.recall_distortion.study import run  # noqa: PLC0415 the command line starts without jax

        return run
    raise AttributeError(f"module 'experiments.recall_distortion' has no attribute {name!r}")
