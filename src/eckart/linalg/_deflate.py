"""Eigenvectors of a float32 Gram matrix with a few eigenvalues far above the others.

    M = V diag(l) Vᵀ + (I - V Vᵀ) M (I - V Vᵀ),   V (n, r) the outliers

A float32 eigensolver errs by eps * l_1 everywhere. Activations of language models have one direction thirty times
stronger than the next, so that error is thirty times larger than the rest of the spectrum deserves. Splitting the
outliers off first makes the error that of the largest eigenvalue that is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._basis import orthonormalize

__all__ = ["eigh_without_outliers"]

_OUTLIERS = 4  # directions split off at the most
_BLOCK, _STEPS = 16, 4  # of the subspace iteration that finds them
_WORTH = 4.0  # times the first value that is left; below, nothing is gained
_FROM = 128  # order from which it costs less than a fifth of the eigenproblem


def eigh_without_outliers(gram: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues of gram (n, n), descending, and its eigenvectors, in the dtype of ``gram``.

    Args:
        gram: Symmetric positive semidefinite, float32 or float64, well scaled; float64 goes to LAPACK as it is.

    Raises:
        torch.linalg.LinAlgError: LAPACK does not converge.
    """
    n = gram.shape[-1]
    if gram.dtype == torch.float64 or n < _FROM:
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0), vectors.flip(1)
    generator = torch.Generator(device=gram.device).manual_seed(0)
    block = torch.randn(n, _BLOCK, generator=generator, dtype=gram.dtype, device=gram.device)
    for _ in range(_STEPS):
        block, _ = orthonormalize(gram @ block)
    image = gram @ block
    ritz, rotation = torch.linalg.eigh((block.mT @ image).to(torch.float64))
    ritz, rotation = ritz.flip(0)[: _OUTLIERS + 1], rotation.flip(1)[:, :_OUTLIERS].to(gram.dtype)
    found = block @ rotation
    residual = torch.linalg.vector_norm(image @ rotation - found * ritz[:-1].to(gram.dtype), dim=0)
    # What couples an outlier to the rest is dropped: that turns the two by residual over gap, and costs its square.
    exact = residual <= 64 * torch.finfo(gram.dtype).eps * ritz[0].to(gram.dtype)
    r = int(exact.to(torch.int64).cumprod(0).sum())
    if r == 0 or not float(ritz[0]) > _WORTH * float(ritz[r]):
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0), vectors.flip(1)
    outliers, _ = orthonormalize(found[:, :r])
    image = gram @ outliers
    # Their own eigenvalue becomes a negative one, so that the n - r others keep the first places.
    below = max(float(ritz[r]), 1e-4 * float(ritz[0]))
    inner = outliers.mT @ image - below * torch.eye(r, dtype=gram.dtype, device=gram.device)
    rest = gram - outliers @ image.mT - (image - outliers @ inner) @ outliers.mT
    values, vectors = torch.linalg.eigh(rest)
    others = vectors.flip(1)[:, : n - r]
    # Rounding in `rest`, eps * l_1, lets them lean on the outliers: by so little that taking it off once is enough.
    others = torch.nn.functional.normalize(others - outliers @ (outliers.mT @ others), dim=0)
    return torch.cat([ritz[:r].to(gram.dtype), values.flip(0)[: n - r]]), torch.cat([outliers, others], dim=1)
