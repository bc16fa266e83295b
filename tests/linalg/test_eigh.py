from __future__ import annotations

import numpy as np
import pytest
import torch

from eckart.linalg import LinalgError, eigh

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [None, 1, 5, 99])
def test_known_eigenvalues(rank, dtype, known_gram):
    values = np.linspace(4, -3, 12)
    a = known_gram(12, values).to(dtype)
    result = eigh(a, rank)
    k = 12 if rank is None else min(rank, 12)
    eps = torch.finfo(dtype).eps
    assert result.values.dtype == result.vectors.dtype == dtype
    assert np.abs(result.values.double().numpy() - values[:k]).max() < 50 * eps
    vectors = result.vectors.double()
    assert torch.allclose(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), atol=50 * eps)
    assert torch.allclose(a.double() @ vectors, vectors * result.values.double(), atol=100 * eps)
    assert (result.vectors.gather(0, result.vectors.abs().argmax(dim=0, keepdim=True)) > 0).all()


def _edge_inputs():
    normal = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    return {
        "zero": torch.zeros(5, 5),
        "identity": torch.eye(6),
        "rank 3": normal @ normal.T,
        "huge": normal @ normal.T * 1e30,
        "tiny": normal @ normal.T * 1e-30,
        "huge double": (normal @ normal.T).double() * 1e300,
        "one": torch.tensor([[-2.0]]),
        "half": (normal @ normal.T).half(),
        "bfloat16": (normal @ normal.T).bfloat16(),
        "strided": (normal @ normal.T)[::2, ::2],
        "empty": torch.zeros(0, 0),
    }


EDGE = _edge_inputs()


@pytest.mark.parametrize("name", EDGE)
def test_edge_inputs(name):
    a = EDGE[name]
    result = eigh(a)
    truth = np.linalg.eigvalsh(a.double().numpy())[::-1]
    size = np.abs(truth).max(initial=1e-300)
    assert np.abs(result.values.double().numpy() - truth).max(initial=0) < 1e-5 * size
    vectors = result.vectors.double()
    assert torch.allclose(vectors.T @ vectors, torch.eye(a.shape[0]).double(), atol=1e-5)
    back = (vectors * (result.values.double() / size)) @ vectors.T
    assert torch.allclose(back, a.double() / size, atol=1e-5)


def test_batch_equals_one_by_one(known_gram):
    batch = torch.stack([known_gram(7, np.arange(7) * scale, seed) for seed, scale in enumerate((1, 1e250, 1e-250))])
    result = eigh(batch, 3)
    for i in range(3):
        one = eigh(batch[i], 3)
        # Not bit for bit: a matrix of a batch lies elsewhere in memory, and vector code rounds by alignment.
        assert torch.allclose(result.values[i], one.values, rtol=1e-14)
        assert torch.allclose(result.vectors[i], one.vectors, rtol=0, atol=1e-13)


def test_rounding_asymmetry_is_averaged(known_gram):
    a = known_gram(6, [6, 5, 4, 3, 2, 1.0])
    noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double() * 1e-3
    assert torch.allclose(eigh(a + noise - noise.T).values, eigh(a).values, atol=1e-12)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "is not symmetric"),
        (torch.ones(2, 3), "is not square"),
        (torch.tensor([[float("nan")]]), "contains NaN or Inf"),
        (torch.ones(3, 3) * 3e38, "overflows this dtype; pass the input as float64"),
    ],
)
def test_no_right_answer_is_an_error(a, message):
    with pytest.raises(LinalgError, match=message):
        eigh(a)


def test_rank_below_one():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        eigh(torch.eye(2), 0)


def test_a_failed_eigensolver_is_tried_again(monkeypatch, known_gram):
    a, lapack, calls = known_gram(5, [5, 4, 3, 2, 1]).float(), torch.linalg.eigh, []

    def broken(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return lapack(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    assert torch.allclose(eigh(a).values, torch.tensor([5.0, 4, 3, 2, 1]), atol=1e-5)
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (matrix[0] * float("nan"), matrix))
    with pytest.raises(LinalgError, match="no eigensolver converges"):
        eigh(a)
