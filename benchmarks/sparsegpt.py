"""Time SparseGPT on one layer of 4096 x 4096, against the published algorithm in torch on the same cores.

The torch side implements algorithm 1 of arXiv 2301.00774 with lazy updates in blocks of 128: the inverse of the damped
Hessian, its upper Cholesky factor, and one column after another. Both sides start from X^T X.
"""

import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.in_torch import use_best_threads
from benchmarks.timing import Row, compare
from jprune.pruning.scores.calibration import Gram, sparsegpt

BLOCK, DAMPING = 128, 0.01


def rows(size: int = 4096) -> list[Row]:
    """Time 50% unstructured and 2:4 sparsity."""
    random = np.random.default_rng(0)
    # Correlated inputs, as in a trained network.
    mixing = np.eye(size) + random.normal(size=(size, size)) / np.sqrt(size)
    x = (random.normal(size=(2 * size, size)) @ mixing).astype(np.float32)
    kernel = random.normal(size=(size, size)).astype(np.float32)  # (inputs, outputs)
    gram = x.T @ x
    params, activations = {"kernel": jnp.asarray(kernel)}, {"kernel": Gram(jnp.asarray(gram))}
    weight, hessian = torch.from_numpy(kernel.T.copy()), torch.from_numpy(gram)
    table = []
    for name, options in (("50%", {"sparsity": 0.5}), ("2:4", {"n": 2, "m": 4})):
        ours = lambda options=options: sparsegpt(params, activations, **options).params["kernel"].block_until_ready()
        theirs = lambda options=options: published(weight, hessian, **options)
        _same_quality(name, gram, kernel, np.asarray(ours()), theirs().numpy().T)
        threads = use_best_threads(theirs, repeats=1)
        table.append(
            compare(
                f"SparseGPT, {size} x {size}, {name}",
                "the published algorithm in torch",
                ours,
                theirs,
                must=1.0,
                note=f"both from X^T X; their reconstruction errors agree to 1%; torch with {threads} thread(s)",
            )
        )
    return table


@torch.no_grad()
def published(
    weight: torch.Tensor,
    gram: torch.Tensor,
    *,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
) -> torch.Tensor:
    """Return the pruned weights (outputs, inputs) by algorithm 1."""
    w, hessian = weight.clone(), gram.clone()
    columns = w.shape[1]
    diagonal = torch.arange(columns)
    dead = hessian[diagonal, diagonal] == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    hessian[diagonal, diagonal] += DAMPING * hessian[diagonal, diagonal].mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, own = w[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.zeros_like(block)
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if sparsity is not None:
            saliency = block**2 / torch.diagonal(own)[None] ** 2
            limit = torch.sort(saliency.flatten())[0][int(saliency.numel() * sparsity)]
            pruned = saliency < limit
        for j in range(stop - start):
            if n is not None and m is not None and j % m == 0:
                group = block[:, j : j + m] ** 2 / torch.diagonal(own)[None, j : j + m] ** 2
                pruned.scatter_(1, j + torch.topk(group, m - n, dim=1, largest=False)[1], True)
            column = block[:, j]
            kept = torch.where(pruned[:, j], 0.0, column)
            error = (column - kept) / own[j, j]
            block[:, j:] -= torch.outer(error, own[j, j:])
            block[:, j] = kept
            errors[:, j] = error
        w[:, start:stop] = block
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w


def _same_quality(name: str, gram: np.ndarray, kernel: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Check that both sides have equal sparsity and reconstruction error; rounding may change the weights kept."""
    errors = [float(np.sum((w - kernel) * (gram @ (w - kernel)))) for w in (ours, theirs)]
    zeros = [int(np.count_nonzero(w == 0)) for w in (ours, theirs)]
    if zeros[0] != zeros[1] or not abs(errors[0] / errors[1] - 1) < 0.01:
        raise AssertionError(f"the sides differ: SparseGPT {name}: errors {errors}, zeros {zeros}")
