from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from eckart.linalg import LinalgError, principal_angles, subspace_distance


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(u):
    q = np.linalg.qr(u.double().numpy())[0]
    return q @ q.T


@pytest.mark.parametrize(("k", "columns"), [(1, 1), (3, 3), (2, 5), (5, 2), (8, 8), (1, 8)])
def test_angles_and_distance_against_independent_computations(k, columns):
    u, v = normal(8, k), normal(8, columns, seed=1)
    angles = principal_angles(u, v)
    assert angles.dtype == torch.float64
    assert np.allclose(angles.numpy(), scipy.linalg.subspace_angles(u.numpy(), v.numpy())[::-1], atol=1e-12)
    distance = np.linalg.norm(projector(u) - projector(v)) / math.sqrt(2)
    assert float(subspace_distance(u, v)) == pytest.approx(distance, abs=1e-12)
    assert float(subspace_distance(v, u)) == pytest.approx(distance, abs=1e-12)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-5, 0.3, math.pi / 4, 1.2, math.pi / 2 - 1e-9, math.pi / 2])
def test_every_digit_of_known_angles(angle):
    # Three planes of rotation by angle, angle / 2 and 0, seen through a random basis of each space.
    u, v = torch.zeros(9, 3).double(), torch.zeros(9, 3).double()
    truth = [0.0, angle / 2, angle]
    for i, theta in enumerate(truth):
        u[i, i], v[i, i], v[i + 3, i] = 1, math.cos(theta), math.sin(theta)
    rotation, mix = torch.linalg.qr(normal(9, 9))[0], normal(3, 3, seed=2)
    angles = principal_angles(rotation @ u @ mix, rotation @ v @ normal(3, 3, seed=3))
    assert np.allclose(angles.numpy(), truth, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_dtype(dtype, scale):
    u, v = (normal(8, 3) * scale).to(dtype), normal(8, 3, seed=1).to(dtype)
    truth = scipy.linalg.subspace_angles(u.double().numpy() / scale, v.double().numpy())[::-1]
    assert np.allclose(principal_angles(u, v).numpy(), truth, atol=1e-12)


def test_columns_of_different_length_are_independent():
    u = torch.tensor([[1.0, 0.0], [0.0, 1e-25], [0.0, 0.0]])
    assert float(subspace_distance(u, torch.eye(3)[:, :2])) == pytest.approx(0, abs=1e-15)


def test_batch():
    u, v = normal(4, 7, 2), normal(4, 7, 3, seed=1)
    for i in range(4):
        assert torch.allclose(principal_angles(u, v)[i], principal_angles(u[i], v[i]), atol=1e-14)
        assert torch.allclose(subspace_distance(u, v)[i], subspace_distance(u[i], v[i]), atol=1e-14)


def test_distance_is_a_metric():
    spaces = [normal(6, k, seed=seed) for seed, k in enumerate((1, 2, 2, 4, 6))]
    for a in spaces:
        assert float(subspace_distance(a, a)) == pytest.approx(0, abs=1e-7)
        for b in spaces:
            for c in spaces:
                assert subspace_distance(a, c) <= subspace_distance(a, b) + subspace_distance(b, c) + 1e-12


@pytest.mark.parametrize(
    ("u", "v", "message"),
    [
        (torch.ones(4, 2), torch.eye(4), "u: .*has dependent columns"),
        (torch.eye(4), torch.zeros(4, 1), "v: .*has dependent columns"),
        (torch.eye(2), torch.ones(2, 3), "v: .*has dependent columns"),
        (torch.eye(4), torch.eye(3), "does not live in the same space"),
        (torch.eye(4), torch.full((4, 1), float("nan")), "v: .*contains NaN"),
    ],
)
def test_no_right_answer_is_an_error(u, v, message):
    with pytest.raises(LinalgError, match=message):
        principal_angles(u, v)


def test_no_columns_no_angles():
    assert principal_angles(torch.zeros(4, 0), torch.eye(4)).shape == (0,)
    assert float(subspace_distance(torch.zeros(4, 0), torch.eye(4))) == pytest.approx(math.sqrt(2))
