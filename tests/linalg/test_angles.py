from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, principal_angles, subspace_distance
from eckart.linalg.angles import grassmann_distance, subspace_overlap


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


METRICS = ["geodesic", "chordal", "gap", "fubini-study", "procrustes"]


def orthonormal(u):
    return np.linalg.qr(u.double().numpy())[0]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_distances_are_what_they_measure(k):
    u, v = normal(8, k), normal(8, k, seed=1)
    p, q = orthonormal(u), orthonormal(v)
    difference = p @ p.T - q @ q.T
    w, s, zh = np.linalg.svd(p.T @ q)
    truth = {
        # The logarithm on the Grassmann manifold is the geodesic's velocity, and its length the distance.
        "geodesic": np.linalg.norm(np.arccos(s.clip(max=1))),
        "chordal": np.linalg.norm(difference) / math.sqrt(2),
        "gap": np.linalg.norm(difference, 2),
        "fubini-study": math.acos(min(1.0, abs(np.linalg.det(p.T @ q)))),
        "procrustes": np.linalg.norm(p @ w - q @ zh.T),
    }
    for metric, distance in truth.items():
        # The arccosine of the oracle loses half the digits where the spaces are equal (k = 8).
        assert float(grassmann_distance(u, v, metric)) == pytest.approx(distance, rel=1e-10, abs=1e-6)
    overlap = np.linalg.norm(p.T @ q) ** 2 / k
    assert float(subspace_overlap(u, v)) == pytest.approx(overlap, rel=1e-12)


@pytest.mark.parametrize("angle", [1e-12, 1e-8, 1e-3, 0.5, math.pi / 2])
def test_every_digit_of_a_small_distance(angle):
    u, v = torch.eye(6, 2).double(), torch.eye(6, 2).double()
    v[1, 1], v[2, 1] = math.cos(angle), math.sin(angle)
    truth = [angle, math.sin(angle), math.sin(angle), angle, 2 * math.sin(angle / 2)]
    for metric, distance in zip(METRICS, truth, strict=True):
        assert float(grassmann_distance(u, v, metric)) == pytest.approx(distance, rel=1e-13, abs=1e-15)
    assert float(subspace_overlap(u, v)) == pytest.approx((1 + math.cos(angle) ** 2) / 2, rel=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_they_are_metrics_on_spaces_of_any_dimension(sizes, metric, dtype, seed):
    a, b, c = (normal(6, k, seed=seed + i).to(dtype) for i, k in enumerate(sizes))
    assert float(grassmann_distance(a, a @ normal(sizes[0], sizes[0], seed=seed).to(dtype), metric)) < 1e-2
    assert float(grassmann_distance(a, a, metric)) == pytest.approx(0, abs=1e-7)
    direct = float(grassmann_distance(a, c, metric))
    assert direct == pytest.approx(float(grassmann_distance(c, a, metric)), abs=1e-12)
    assert direct <= float(grassmann_distance(a, b, metric)) + float(grassmann_distance(b, c, metric)) + 1e-12
    if sizes[0] != sizes[2]:
        assert direct >= (1 if metric in ("chordal", "gap") else math.sqrt(2)) - 1e-12


def test_a_missing_angle_is_a_right_one():
    u, v = torch.eye(4)[:, :1], torch.eye(4)[:, :3]
    truth = [math.pi / 2 * math.sqrt(2), math.sqrt(2), 1, math.pi / 2, 2]
    for metric, distance in zip(METRICS, truth, strict=True):
        assert float(grassmann_distance(u, v, metric)) == pytest.approx(distance, rel=1e-14)
    assert float(subspace_overlap(u, v)) == 1


def test_overlap_of_random_spaces():
    values = [float(subspace_overlap(normal(40, 4, seed=2 * i), normal(40, 10, seed=2 * i + 1))) for i in range(40)]
    # Mean max(k, l) / n = 0.25; the standard error of 40 values is below 0.01.
    assert np.mean(values) == pytest.approx(0.25, abs=0.03)


def test_distances_in_batches_and_of_no_columns():
    u, v = normal(4, 7, 2), normal(4, 7, 3, seed=1)
    for metric in METRICS:
        for i in range(4):
            one = grassmann_distance(u[i], v[i], metric)
            torch.testing.assert_close(grassmann_distance(u, v, metric)[i], one, rtol=0, atol=1e-14)
        assert float(grassmann_distance(torch.zeros(4, 0), torch.zeros(4, 0), metric)) == 0
    torch.testing.assert_close(subspace_overlap(u, v)[1], subspace_overlap(u[1], v[1]))
    assert float(subspace_overlap(torch.zeros(4, 0), torch.eye(4))) == 1


def test_unknown_metric():
    with pytest.raises(ValueError, match="metric must be one of geodesic, chordal, gap, fubini-study, procrustes"):
        grassmann_distance(torch.eye(2), torch.eye(2), "euclidean")
