"""What is true of every orthogonal transform, whatever it is made of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError
from eckart.linalg.transforms import (
    DCT,
    Cayley,
    Hadamard,
    HouseholderProduct,
    OrthogonalTransform,
    RandomizedHadamard,
    RandomOrthogonal,
    Wavelet,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Name -> the transform for length n. Parameters are float64, so that every one is orthogonal to float64 rounding.
TRANSFORMS = {
    "dct": lambda n: DCT(),
    "haar": lambda n: Wavelet(),
    "haar, one level": lambda n: Wavelet("haar", min(1, n - 1)),
    "db2": lambda n: Wavelet("db2"),
    "db3": lambda n: Wavelet("db3"),
    "db4": lambda n: Wavelet("db4"),
    "hadamard": lambda n: Hadamard(),
    "randomized hadamard": lambda n: RandomizedHadamard.draw(n),
    "random orthogonal": lambda n: RandomOrthogonal.draw(n, dtype=torch.float64),
    "cayley": lambda n: Cayley(normal(n, n, seed=1) / n**0.5),
    "householder": lambda n: HouseholderProduct(normal(3, n, seed=2)),
    "householder, more than n": lambda n: HouseholderProduct(normal(n + 2, n, seed=2)),
}
FIXED = ("randomized hadamard", "random orthogonal", "cayley", "householder", "householder, more than n")
LENGTHS = (1, 2, 3, 5, 7, 8, 12, 20, 97, 128)
every_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS.keys())
every_length = pytest.mark.parametrize("n", LENGTHS)

# A few dozen roundings of float64, in maps of norm one.
close = {"rtol": 0, "atol": 2e-14}


def same(a, b):
    return torch.allclose(a, b, **close)


@every_transform
@every_length
def test_matrix_is_orthogonal_and_the_adjoint_its_transpose(make, n):
    transform, x = make(n), normal(4, n)
    q = transform.matrix(n, dtype=torch.float64)
    assert q.shape == (n, n)
    assert same(q.mT @ q, torch.eye(n, dtype=torch.float64))
    assert same(transform(x), x @ q.mT)
    assert same(transform.adjoint(x), x @ q)
    assert torch.equal(transform.matrix(n), q.float())


@every_transform
@every_length
def test_adjoint_is_the_inverse_and_norms_are_kept(make, n):
    transform, x = make(n), normal(4, n)
    assert same(transform.adjoint(transform(x)), x)
    assert same(transform(transform.adjoint(x)), x)
    assert torch.allclose(transform(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-14)


@every_transform
def test_linear(make):
    transform, x, y = make(12), normal(4, 12), normal(4, 12, seed=5)
    assert same(transform(2 * x - 3 * y), 2 * transform(x) - 3 * transform(y))
    assert torch.equal(transform(torch.zeros(12)), torch.zeros(12))


@every_transform
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_dimension(make, dim):
    transform, x = make(12), normal(12, 12, 12)
    for apply in (transform.forward, transform.adjoint):
        assert same(apply(x, dim), apply(x.transpose(dim, -1)).transpose(dim, -1))


@every_transform
@pytest.mark.parametrize("n", [7, 20])
def test_batch_is_a_loop_over_vectors(make, n):
    transform, x = make(n), normal(2, 3, n)
    for apply in (transform.forward, transform.adjoint):
        loop = torch.stack([apply(vector) for vector in x.reshape(6, n)]).reshape(2, 3, n)
        assert same(apply(x), loop)
        assert apply(x[:0]).shape == (0, 3, n)


@every_transform
@pytest.mark.parametrize(
    "view",
    [lambda x: x.mT, lambda x: x[:, ::2], lambda x: x.flip(-1), lambda x: x[:1].expand(5, -1), lambda x: x[3]],
    ids=["transposed", "every other", "flipped", "expanded", "one row"],
)
def test_any_layout_and_the_input_is_not_touched(make, view):
    x = view(normal(12, 12) if view(torch.zeros(12, 12)).shape[-1] == 12 else normal(12, 24))
    before, transform = x.clone(), make(12)
    assert same(transform(x), transform(before))
    assert same(transform.adjoint(x), transform.adjoint(before))
    assert torch.equal(x, before)


@every_transform
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [5, 12, 97, 128])
def test_dtype_is_kept_and_the_error_is_its_rounding(make, n, dtype):
    transform, x = make(n), normal(4, n, dtype=dtype)
    for apply in (transform.forward, transform.adjoint):
        y, truth = apply(x), apply(x.double())
        assert y.dtype == dtype
        # Half precision is rounded once, float32 in every step.
        eps = torch.finfo(dtype).eps * (20 if dtype == torch.float32 else 0.6)
        assert (y.double() - truth).norm() <= eps * truth.norm()


@every_transform
@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_scale(make, scale):
    transform, x = make(20), normal(4, 20, dtype=torch.float32)
    assert torch.allclose(transform(x * scale) / scale, transform(x), rtol=1e-6, atol=1e-6)


@every_transform
@pytest.mark.parametrize("n", [1, 5, 8])
def test_gradients(make, n):
    transform = make(n)
    x = normal(2, n).requires_grad_()
    for apply in (transform.forward, transform.adjoint):
        assert torch.autograd.gradcheck(apply, x)
        assert torch.autograd.gradgradcheck(apply, x)
        (gradient,) = torch.autograd.grad(apply(x).square().sum() / 2, x)
        assert same(gradient, x.detach())


@every_transform
def test_function_transforms(make):
    transform, x = make(6), normal(3, 6)
    q = transform.matrix(6, dtype=torch.float64)
    assert same(torch.func.jacfwd(transform.forward)(x[0]), q)
    assert same(torch.func.jacrev(transform.adjoint)(x[0]), q.mT)
    assert same(torch.func.vmap(transform.forward)(x), transform(x))


def test_no_graph_break():
    x = normal(4, 12)
    for name in ("dct", "db2", "hadamard", "householder"):
        transform = TRANSFORMS[name](12)
        compiled = torch.compile(transform.forward, backend="eager", fullgraph=True)
        assert same(compiled(x), transform(x))


@every_transform
def test_nan_stays_in_its_vector(make):
    x = normal(3, 12)
    x[1, 4] = float("nan")
    for apply in (make(12).forward, make(12).adjoint):
        y = apply(x)
        assert y[1].isnan().any()
        assert same(y[0], apply(x[0]))
        assert same(y[2], apply(x[2]))


@every_transform
def test_a_transform_is_a_value(make):
    transform, x = make(12), normal(12)
    for copied in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(copied(x), transform(x))
    assert isinstance(transform, OrthogonalTransform)
    assert isinstance(hash(transform), int)
    with pytest.raises(AttributeError):
        transform.name = "other"


@every_transform
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(12, dtype=torch.int64), r"x: shape \(12,\), dtype int64: is not real floating point; convert"),
        (torch.ones(12, dtype=torch.bool), "not real floating point"),
        (torch.ones(12, dtype=torch.complex64), "not real floating point"),
        (torch.ones(3, 0), "has 0 entries along dim -1"),
    ],
    ids=["integer", "boolean", "complex", "empty"],
)
def test_no_right_answer_is_an_error(make, x, message):
    for apply in (make(12).forward, make(12).adjoint):
        with pytest.raises(LinalgError, match=message):
            apply(x)


@every_transform
def test_no_such_dimension(make):
    with pytest.raises(IndexError, match="out of range"):
        make(12)(torch.ones(12, 12), 2)
    with pytest.raises(IndexError):
        make(12)(torch.tensor(1.0))


@every_transform
def test_length_of_the_matrix(make, request):
    transform = make(12)
    if request.node.callspec.id in FIXED:
        assert transform.size == 12
        assert torch.equal(transform.matrix(), transform.matrix(12))
        with pytest.raises(LinalgError, match="this transform needs 12"):
            transform.matrix(11)
        with pytest.raises(LinalgError, match="has 11 entries along dim 0; this transform needs 12"):
            transform(torch.ones(11, 12), 0)
    else:
        assert transform.size is None
        with pytest.raises(ValueError, match="n must be at least 1, not None"):
            transform.matrix()
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        transform.matrix(0)


def test_settings_compare():
    assert DCT() == DCT()
    assert Wavelet("haar", 2) == Wavelet(levels=2) != Wavelet("haar", 1)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(TRANSFORMS)),
    n=st.integers(1, 160),
    batch=st.lists(st.integers(0, 3), max_size=2),
    place=st.integers(0, 2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 999),
)
def test_every_shape_is_mapped_without_loss(name, n, batch, place, dtype, seed):
    dim = min(place, len(batch))
    x = normal(*batch[:dim], n, *batch[dim:], seed=seed, dtype=dtype)
    transform = TRANSFORMS[name](n)
    y = transform(x, dim)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    # Two maps, each with an error of a few eps relative to the norm.
    tolerance = 40 * torch.finfo(dtype).eps * float(x.double().norm())
    assert (transform.adjoint(y, dim) - x).double().norm() <= tolerance
    assert abs(float(y.double().norm() - x.double().norm())) <= tolerance
