from __future__ import annotations

import itertools
import sys

import pytest
import torch

from eckart.linalg import LinalgError
from eckart.linalg.assignment import assignment


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_permutation_has_a_larger_score(size, dtype):
    score = torch.randn(size, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    found = assignment(score)
    assert found.dtype == torch.int64
    assert sorted(found.tolist()) == list(range(size))
    rows = range(size)
    best = max(sum(float(score[i, p[i]]) for i in rows) for p in itertools.permutations(rows))
    assert sum(float(score[i, found[i]]) for i in rows) == pytest.approx(best, abs=1e-12)


def test_a_hidden_permutation_is_found():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    shuffle = torch.randperm(40, generator=generator)
    # Row i of the first is row p[i] of the shuffled one.
    p = assignment(rows @ rows[shuffle].mT)
    torch.testing.assert_close(rows[shuffle][p], rows, rtol=0, atol=0)


def test_what_is_no_score_is_refused():
    with pytest.raises(LinalgError, match=r"needs a square matrix of scores, got \(2, 3\)"):
        assignment(torch.zeros(2, 3))
    with pytest.raises(LinalgError, match="NaN or Inf"):
        assignment(torch.tensor([[float("nan")]]))


def test_a_missing_scipy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="needs scipy: pip install scipy"):
        assignment(torch.eye(2))
