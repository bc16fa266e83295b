from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.transforms import Cayley, cayley, inverse_cayley


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_against_numpy(n, dtype):
    p = normal(n, n, dtype=dtype)
    a = (p.double() - p.double().T).numpy() / 2
    q = cayley(p)
    assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = (np.eye(n) - a) @ np.linalg.inv(np.eye(n) + a)
    # The condition number of I + A is at most 1 + ||A|| < 10.
    assert np.allclose(q.double().numpy(), truth, rtol=0, atol=20 * torch.finfo(q.dtype).eps)
    assert np.linalg.det(q.double().numpy()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("degrees", [-179, -90, 0, 30, 120, 179.9])
def test_angle_in_the_plane(degrees):
    t = math.radians(degrees)
    rotation = torch.tensor([[math.cos(t), -math.sin(t)], [math.sin(t), math.cos(t)]], dtype=torch.float64)
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64) * math.tan(t / 2)
    assert torch.allclose(cayley(skew), rotation, rtol=0, atol=1e-12)
    assert torch.allclose(inverse_cayley(rotation), skew, rtol=1e-10)


def test_only_the_skew_part_counts():
    p, symmetric = normal(4, 4), normal(4, 4, seed=1)
    assert torch.allclose(cayley(p + symmetric + symmetric.mT), cayley(p), atol=1e-14)
    assert torch.equal(cayley(torch.zeros(3, 3)), torch.eye(3))
    assert torch.equal(cayley(torch.ones(3, 3)), torch.eye(3))
    assert torch.allclose(cayley(-p), cayley(p).mT, atol=1e-14)
    assert cayley(torch.zeros(2, 0, 0)).shape == inverse_cayley(torch.zeros(2, 0, 0)).shape == (2, 0, 0)


def test_batch_is_a_loop():
    p = normal(2, 3, 4, 4)
    assert torch.allclose(cayley(p)[1, 2], cayley(p[1, 2]), atol=1e-15)
    assert torch.allclose(inverse_cayley(cayley(p)), (p - p.mT) / 2, atol=1e-13)


def test_batched_operator_is_a_batch_of_rotations():
    p, x = normal(3, 4, 4), normal(3, 5, 4, seed=1)
    transform = Cayley(p)
    for i in range(3):
        assert torch.allclose(transform(x)[i], Cayley(p[i])(x[i]), atol=1e-14)
        assert torch.allclose(transform.adjoint(x.mT, dim=-2)[i], Cayley(p[i]).adjoint(x[i]).mT, atol=1e-14)
    assert torch.allclose(transform.matrix(dtype=torch.float64), cayley(p), atol=1e-14)


def test_gradients():
    p = normal(2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(cayley, p)
    assert torch.autograd.gradgradcheck(cayley, p)
    assert torch.autograd.gradcheck(inverse_cayley, cayley(normal(2, 3, 3)).requires_grad_())
    x = normal(5, 3, seed=1)
    assert torch.autograd.gradcheck(lambda p: Cayley(p)(x), p[0].detach().requires_grad_())


def test_trains_to_a_rotation():
    """What an adapter does: unconstrained steps, orthogonal all along."""
    target = cayley(normal(4, 4, seed=3))
    parameter = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (cayley(parameter) - target).square().sum().backward()
        optimizer.step()
    assert (cayley(parameter) - target).norm() < 1e-3


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), exponent=st.floats(-30, 2), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_orthogonal_and_inverted(n, exponent, dtype):
    p = normal(n, n, seed=n, dtype=dtype) * 10.0**exponent
    q, skew = cayley(p), (p - p.mT) / 2
    bound = 20 * torch.finfo(dtype).eps * (1 + float(skew.norm()))
    assert (q.mT @ q - torch.eye(n, dtype=dtype)).norm() <= bound
    back = inverse_cayley(q)
    assert torch.equal(back, -back.mT)
    # dA = -(I + A) dQ (I + A) / 2, so the rounding of Q grows by the square of 1 + ||A||, and that of A itself once.
    assert (back - skew).norm() <= bound * (1 + float(skew.norm())) ** 2 * n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [2, 3, 9, 30])
def test_the_largest_parameter_still_gives_one_percent(n, dtype):
    limit = 1e-2 / torch.finfo(dtype).eps / n
    p = normal(n, n, dtype=dtype)
    p = (p - p.mT) / 2
    p = p / p.abs().max()
    q = cayley(p * (0.99 * limit))
    assert (q.mT @ q - torch.eye(n, dtype=dtype)).abs().max() < 1e-2
    with pytest.raises(LinalgError, match="too large a skew part; scale it down, or pass it as float64"):
        cayley(p * (1.01 * limit))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "q",
    [
        torch.diag(torch.tensor([1.0, -1.0, -1.0])),
        torch.diag(torch.tensor([1.0, 1.0, -1.0])),
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        torch.tensor([[-1.0]]),
        torch.eye(3) - 2 * torch.full((3, 3), 1 / 3),
        torch.tensor([[math.cos(3.0), math.sin(3.0)], [math.sin(3.0), -math.cos(3.0)]]),
    ],
    ids=["half turn", "diagonal", "swap", "one", "reflection", "reflection in the plane"],
)
def test_eigenvalue_minus_one(q, dtype):
    exact, r = torch.linalg.qr(q.double())  # orthogonal to float64
    q = (exact * r.diagonal().sign()).to(dtype)
    with pytest.raises(LinalgError, match=r"q: .*has an eigenvalue -1.*change the sign of some of its columns"):
        inverse_cayley(q)


def test_one_bad_matrix_of_a_batch_is_an_error():
    good = cayley(normal(3, 3) * 1000)
    with pytest.raises(LinalgError, match="has an eigenvalue -1"):
        inverse_cayley(torch.stack([good, torch.eye(3).double() - 2 / 3]))
    assert inverse_cayley(torch.stack([good, torch.eye(3).double()])).isfinite().all()


def test_the_remedy_for_an_eigenvalue_minus_one_works():
    q = torch.eye(3) - 2 * torch.full((3, 3), 1 / 3)
    signed = q * torch.tensor([-1.0, 1.0, 1.0])
    assert torch.allclose(cayley(inverse_cayley(signed)), signed, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cayley(torch.ones(2, 3)), r"parameter: shape \(2, 3\), dtype float32: is not square"),
        (lambda: cayley(torch.ones(3)), "is not square"),
        (lambda: cayley(torch.ones(2, 2, dtype=torch.int64)), "is not real floating point"),
        (lambda: cayley(torch.tensor([[0.0, float("nan")], [0.0, 0.0]])), "has NaN, Inf or too large a skew part"),
        (lambda: cayley(torch.tensor([[0.0, float("inf")], [0.0, 0.0]])), "has NaN, Inf or too large a skew part"),
        (lambda: cayley(normal(3, 3) * 1e30), "too large"),
        (lambda: inverse_cayley(torch.ones(2, 2)), "q: .*is not orthogonal; take the q factor"),
        (lambda: inverse_cayley(torch.full((2, 2), float("nan"))), "is not orthogonal"),
        (lambda: inverse_cayley(torch.ones(1, 2)), "is not square"),
        (lambda: Cayley(torch.full((2, 2), float("nan")))(torch.ones(2)), "has NaN"),
        (lambda: Cayley(torch.ones(3, 2))(torch.ones(2)), "is not square"),
    ],
)
def test_no_right_answer_is_an_error(call, message):
    with pytest.raises(LinalgError, match=message):
        call()
