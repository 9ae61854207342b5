"""Training curves as TensorBoard files, where the extra ``tensorboard`` is installed."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.storage import files


def write(folder: Path, records: Sequence[Mapping[str, Any]]) -> bool:
    """Write the mean over replicates of every metric of every epoch; an earlier run's files stay beside.

    Args:
      folder: one for each stage.
      records: a metric a key, with ``replicate`` and ``epoch``; a loss that is not finite is left out.

    Returns:
      Whether the extra is installed; nothing is written where it is not.

    Raises:
      StoreError: a file cannot be written; the message names it.
    """
    if importlib.util.find_spec("tensorboardX") is None or not records:
        return False
    import tensorboardX  # noqa: PLC0415 an extra

    finite = pd.DataFrame(records).replace([np.inf, -np.inf], np.nan)
    means = finite.drop(columns="replicate").groupby("epoch").mean()
    with files.naming(folder), tensorboardX.SummaryWriter(str(folder)) as board:
        for epoch, row in means.iterrows():
            for metric, value in row.dropna().items():
                board.add_scalar(metric, value, epoch)
    return True
