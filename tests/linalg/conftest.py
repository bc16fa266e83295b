"""Matrices whose decomposition is known before any code of ours runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def orthogonal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


@pytest.fixture(scope="session")
def known():
    """known(m, n, s, seed=0) -> float64 tensor U diag(s) Vᵀ with random orthonormal U (m, r), V (n, r)."""

    def build(m: int, n: int, s, seed: int = 0) -> torch.Tensor:
        s = np.asarray(s, dtype=np.float64)
        u, v = orthogonal(m, s.size, 2 * seed), orthogonal(n, s.size, 2 * seed + 1)
        return torch.from_numpy((u * s) @ v.T)

    return build


@pytest.fixture(scope="session")
def known_gram():
    """known_gram(n, values, seed=0) -> symmetric float64 tensor with these eigenvalues."""

    def build(n: int, values, seed: int = 0) -> torch.Tensor:
        q = orthogonal(n, n, 100 + seed)
        gram = (q * np.asarray(values, dtype=np.float64)) @ q.T
        return torch.from_numpy((gram + gram.T) / 2)

    return build
