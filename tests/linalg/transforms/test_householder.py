from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.transforms import HouseholderProduct, householder_product


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def explicit(vectors):
    """H_1 H_2 ... H_k as a matrix, one reflector after the other."""
    q = np.eye(vectors.shape[1])
    for v in vectors.double().numpy():
        q = q @ (np.eye(v.size) - 2 * np.outer(v, v) / (v @ v))
    return q


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 30),
    n=st.integers(1, 20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_against_explicit_reflectors(k, n, dtype, seed):
    vectors, x = normal(k, n, seed=seed, dtype=dtype), normal(4, n, seed=seed + 1, dtype=dtype)
    truth = x.double().numpy() @ explicit(vectors).T
    y = householder_product(x, vectors)
    assert y.dtype == dtype
    # k reflections in the precision of the input, or in float32 and one rounding to bfloat16.
    tolerance = 20 * k * torch.finfo(dtype).eps if dtype != torch.bfloat16 else 0.01
    assert np.linalg.norm(y.double().numpy() - truth) <= tolerance * np.linalg.norm(truth)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_lengths_do_not_matter(scale):
    vectors, x = normal(4, 9, dtype=torch.float32), normal(3, 9, seed=1, dtype=torch.float32)
    assert torch.allclose(householder_product(x, vectors * scale), householder_product(x, vectors), atol=1e-5)
    huge = vectors.double() * scale**10
    assert torch.allclose(householder_product(x, huge), householder_product(x, vectors), atol=1e-5)


def test_zero_rows_are_the_identity():
    vectors, x = normal(3, 5), normal(2, 5, seed=1)
    spaced = torch.zeros(6, 5, dtype=torch.float64)
    spaced[[0, 2, 5]] = vectors
    spaced.requires_grad_()
    y = householder_product(x, spaced)
    assert torch.allclose(y, householder_product(x, vectors), atol=1e-14)
    (gradient,) = torch.autograd.grad(y[0].sum(), spaced)
    assert gradient.isfinite().all()
    assert torch.equal(householder_product(x, torch.zeros(2, 5)), x)
    assert torch.equal(householder_product(x, torch.zeros(0, 5)), x)


def test_order_and_adjoint():
    vectors = normal(3, 4)
    q = HouseholderProduct(vectors).matrix(dtype=torch.float64)
    assert np.allclose(q.numpy(), explicit(vectors), atol=1e-14)
    assert torch.allclose(HouseholderProduct(vectors.flip(0)).matrix(dtype=torch.float64), q.mT, atol=1e-14)
    assert torch.linalg.matrix_rank(q - torch.eye(4).double()) == 3
    assert torch.linalg.det(q) == pytest.approx(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_almost_parallel_reflections_stay_orthogonal(dtype):
    vectors = (normal(1, 16) + 1e-4 * normal(300, 16, seed=1)).to(dtype)
    q = HouseholderProduct(vectors).matrix(dtype=torch.float64)
    assert torch.allclose(q.mT @ q, torch.eye(16).double(), rtol=0, atol=1e-12)
    y = householder_product(torch.eye(16, dtype=dtype), vectors)
    assert torch.allclose(y @ y.mT, torch.eye(16, dtype=dtype), rtol=0, atol=1000 * torch.finfo(dtype).eps)


def test_batch_of_products():
    vectors, x = normal(3, 2, 5), normal(3, 7, 5, seed=1)
    y = householder_product(x, vectors)
    for i in range(3):
        assert torch.allclose(y[i], householder_product(x[i], vectors[i]), atol=1e-14)
    one = householder_product(x[0, 0], vectors)
    assert torch.allclose(one, torch.stack([householder_product(x[0, 0], v) for v in vectors]), atol=1e-14)
    assert HouseholderProduct(vectors).matrix().shape == (3, 5, 5)


def test_gradients_in_both_arguments():
    x, vectors = normal(2, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(householder_product, (x, vectors))
    assert torch.autograd.gradcheck(lambda v: HouseholderProduct(v).adjoint(x.detach()), vectors)
    assert torch.autograd.gradgradcheck(householder_product, (x, vectors))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: householder_product(torch.ones(3), torch.ones(3)), r"vectors: shape \(3,\).*one vector in each row"),
        (lambda: householder_product(torch.ones(3), torch.ones(1, 3, dtype=torch.int64)), "not a real floating-point"),
        (lambda: householder_product(torch.ones(3), torch.ones(1, 4)), "has 3 entries along dim -1.*needs 4"),
    ],
)
def test_no_right_answer_is_an_error(call, message):
    with pytest.raises(LinalgError, match=message):
        call()
