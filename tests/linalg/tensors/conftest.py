"""Tensors that the tests of this folder share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def gaussian():
    """gaussian(*shape, seed=0) -> float64 tensor of independent standard normal numbers."""

    def build(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))

    return build


@pytest.fixture(scope="session")
def smooth():
    """smooth(*shape, seed=0) -> float64 tensor whose unfoldings all have quickly decaying singular values."""

    def build(*shape: int, seed: int = 0) -> torch.Tensor:
        t = np.random.default_rng(seed).standard_normal(shape)
        for d, n in enumerate(shape):
            t = t * (2.0 ** -np.arange(n)).reshape(-1, *[1] * (len(shape) - d - 1))
        for d, n in enumerate(shape):  # random rotations, so that the structure is not that of the coordinates
            q = np.linalg.qr(np.random.default_rng(seed + 1 + d).standard_normal((n, n)))[0]
            t = np.moveaxis(np.tensordot(q, t, axes=(1, d)), 0, d)
        return torch.from_numpy(np.ascontiguousarray(t))

    return build


@pytest.fixture(scope="session")
def tail():
    """tail(matrix, k) -> norm of the singular values of a matrix from the k-th on, by numpy in float64."""

    def norm(matrix: torch.Tensor, k: int) -> float:
        s = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
        return math.sqrt((s[k:] ** 2).sum())

    return norm


@pytest.fixture(scope="session")
def distance():
    """distance(t, approximation) -> Frobenius norm of the difference in float64, and that it is finite."""

    def norm(t: torch.Tensor, approximation: torch.Tensor) -> float:
        assert approximation.shape == t.shape
        assert bool(approximation.isfinite().all())
        return float((t.double() - approximation.double()).norm())

    return norm
