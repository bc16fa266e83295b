"""Orthogonal iteration against a full decomposition."""

from __future__ import annotations

import pytest
import torch

from eckart.linalg import orthogonal_iteration, random_orthogonal


def matrix(decay: float, size: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    vectors = random_orthogonal(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (vectors * decay ** torch.arange(size)) @ vectors.mT, vectors


def test_it_converges_at_the_rate_of_the_gap():
    c, vectors = matrix(0.7)
    start = torch.randn(60, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for iterations in (5, 10, 15):
        q = orthogonal_iteration(lambda x: c @ x, start, iterations)
        assert torch.allclose(q.mT @ q, torch.eye(8, dtype=torch.float64), atol=1e-12)
        errors.append(float(torch.linalg.vector_norm(vectors[:, 2] - q @ (q.mT @ vectors[:, 2]))))
    # λ_9 / λ_3 = 0.7^6 an iteration
    assert errors[1] == pytest.approx(0.7**30 * errors[0], rel=0.3)
    assert errors[2] == pytest.approx(0.7**30 * errors[1], rel=0.3)


def test_a_good_start_stays_and_a_zero_matrix_is_no_error():
    c, vectors = matrix(0.5)
    q = orthogonal_iteration(lambda x: c @ x, vectors[:, :4])
    assert torch.allclose(q @ q.mT, vectors[:, :4] @ vectors[:, :4].mT, atol=1e-10)
    q = orthogonal_iteration(torch.zeros_like, vectors[:, :4])
    assert torch.allclose(q.mT @ q, torch.eye(4, dtype=torch.float64), atol=1e-10)


def test_bad_input():
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        orthogonal_iteration(lambda x: x, torch.ones(4, 2), 0)
