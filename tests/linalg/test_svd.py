from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, singular_values, svd
from eckart.linalg._basis import extend
from eckart.linalg.svd import _choose
from eckart.linalg.svd_randomized import _Side

DRIVERS = ["exact", "gram", "randomized", "lanczos"]
DTYPES = [torch.float32, torch.float64]


def check(result, a, rank=None, *, slack=1.0, rounding=None):
    """What is true of every truncated SVD, judged in float64 and with numpy's singular values as the truth.

    ``slack`` is the allowed error relative to the best error of the rank, ``rounding`` that relative to s_1.
    """
    truth = a.double().numpy()
    m, n = truth.shape
    k = min(m, n) if rank is None else min(rank, m, n)
    u, s, vh = (part.double().numpy() for part in result[:3])
    assert (u.shape, s.shape, vh.shape, result.error.shape) == ((m, k), (k,), (k, n), ())
    assert result.error.dtype == torch.float64
    assert result.u.dtype == result.s.dtype == result.vh.dtype
    eps = torch.finfo(result.u.dtype).eps
    rounding = rounding or 100 * eps
    best = np.linalg.svd(truth, compute_uv=False)
    scale = best[0] if best.size and best[0] > 0 else 1.0
    # Orthonormality: rounding of inner products of length max(m, n), generously 100 eps.
    for gram in (u.T @ u, vh @ vh.T):
        assert np.abs(gram - np.eye(k)).max(initial=0) < 100 * eps
    s = s / scale  # relative to s_1 from here on: the squares of 1e300 overflow even here
    assert (s >= 0).all()
    assert (np.diff(s) <= 2 * eps).all()
    left, tail = np.linalg.norm(truth / scale - (u * s) @ vh), np.linalg.norm(best[k:] / scale)
    assert left <= slack * tail + rounding
    # The reported error is the error made, whatever the driver.
    assert float(result.error) / scale == pytest.approx(left, rel=1e-3, abs=100 * eps)
    return best


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 40), (60, 25), (25, 60)], ids=str)
@pytest.mark.parametrize("driver", DRIVERS)
def test_known_spectrum(driver, shape, dtype, known):
    s = 0.7 ** np.arange(25)
    a = known(*shape, s).to(dtype)
    result = svd(a, 6, driver=driver, tol=1e-6)
    check(result, a, 6, slack=1 + 1e-5)
    # tol bounds the excess of the squared error, that is of the captured energy, by 2e-6 of the tail's 2e-4
    accuracy = 1e-8 if driver in ("randomized", "lanczos") else 50 * torch.finfo(dtype).eps
    assert np.abs(result.s.double().numpy() - s[:6]).max() < max(accuracy, 5e-6 * (dtype == torch.float32))
    assert float(result.error) == pytest.approx(np.sqrt((s[6:] ** 2).sum()), rel=1e-5)


@pytest.mark.parametrize("driver", DRIVERS)
def test_vectors_are_those_of_the_known_matrix(driver, known):
    a = known(30, 20, 2.0 ** -np.arange(20))
    u, _, vt = np.linalg.svd(a.numpy(), full_matrices=False)
    # A relative gap of 1/2 makes singular vectors as accurate as the residual, here 1e-10.
    result = svd(a, 4, driver=driver, tol=1e-10)
    for mine, true in ((result.u.numpy(), u[:, :4]), (result.vh.numpy().T, vt[:4].T)):
        assert np.abs(np.abs((mine * true).sum(axis=0)) - 1).max() < 1e-8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("driver", DRIVERS)
def test_full_decomposition_loses_nothing(driver, dtype, known):
    a = known(24, 18, np.linspace(3, 0.1, 18)).to(dtype)
    result = svd(a, driver=driver)
    best = check(result, a)
    assert float(result.error) == 0
    # 1e-7 for the Gram driver: it squares the condition number, 30 here, in float64
    assert np.abs(result.s.double().numpy() - best).max() < 50 * torch.finfo(dtype).eps * best[0]
    assert torch.allclose(result.reconstruct(), a, atol=100 * torch.finfo(dtype).eps)


def _edge_inputs():
    generator = torch.Generator().manual_seed(5)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    deficient = normal(50, 3, dtype=torch.float64) @ normal(3, 40, dtype=torch.float64)
    return {
        "zero": torch.zeros(50, 40),
        "zero double": torch.zeros(40, 50, dtype=torch.float64),
        "ones": torch.ones(50, 40),
        "rank 3": deficient,
        "rank 3 single": deficient.float(),
        "zero columns": torch.cat([normal(50, 30), torch.zeros(50, 10)], dim=1),
        "one column of many": torch.cat([normal(50, 1), torch.zeros(50, 39)], dim=1),
        "huge": normal(50, 40) * 1e30,
        "huge double": normal(50, 40, dtype=torch.float64) * 1e300,
        "tiny": normal(50, 40) * 1e-30,
        "tiny double": normal(50, 40, dtype=torch.float64) * 1e-300,
        "mixed size": torch.cat([normal(50, 20) * 1e18, normal(50, 20) * 1e-18], dim=1),
        "one row": normal(1, 8),
        "one column": normal(8, 1),
        "one entry": torch.tensor([[-3.0]]),
        "small": normal(6, 4),
        "transposed": normal(36, 60).T,
        "strided": normal(100, 120)[::2, ::3],
        "expanded": normal(1, 40).expand(50, 40),
        "bfloat16": normal(50, 40, dtype=torch.bfloat16),
        "float16": normal(50, 40, dtype=torch.float16),
        "float16 at its limit": torch.full((50, 40), 65504.0, dtype=torch.float16),
        "identity": torch.eye(48),
        "repeated values": torch.block_diag(2 * torch.eye(5), torch.eye(43)),
        "parameter": torch.nn.Parameter(normal(50, 40)),
    }


EDGE = _edge_inputs()


@pytest.mark.parametrize("rank", [None, 1, 4, 99])
@pytest.mark.parametrize("name", EDGE)
@pytest.mark.parametrize("driver", ["auto", *DRIVERS])
def test_edge_inputs(driver, name, rank):
    a = EDGE[name]
    result = svd(a, rank, driver=driver)
    check(result, a.detach(), rank, slack=1.011)  # randomized promises 1 %
    assert not result.u.requires_grad


@pytest.mark.parametrize("driver", DRIVERS)
def test_denormal_numbers(driver):
    # Down there a float32 has few bits left in the result, so only the well-scaled parts are compared.
    a = torch.tensor([[3e-41, 0.0], [0.0, 4e-41]])
    result = svd(a, driver=driver)
    assert result.s.tolist() == pytest.approx([4e-41, 3e-41], rel=1e-3)
    assert torch.allclose(result.u.abs(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (3, 0, 4), (0, 5, 4)], ids=str)
@pytest.mark.parametrize("driver", ["auto", *DRIVERS])
def test_empty(driver, shape):
    result = svd(torch.zeros(shape), 2, driver=driver)
    k = min(2, *shape[-2:])
    assert result.u.shape == (*shape[:-1], k)
    assert result.vh.shape == (*shape[:-2], k, shape[-1])
    assert result.s.shape == (*shape[:-2], k)
    assert result.error.shape == shape[:-2]
    assert result.reconstruct().shape == shape


@pytest.mark.parametrize("driver", ["auto", *DRIVERS])
def test_batch_equals_one_by_one(driver, known):
    matrices = [known(14, 10, 0.5 ** np.arange(10), seed) * scale for seed, scale in enumerate((1, 1e200, 1e-200))]
    batch = torch.stack([*matrices, torch.zeros(14, 10, dtype=torch.float64)]).reshape(2, 2, 14, 10)
    result = svd(batch, 4, driver=driver, tol=1e-8)
    assert (result.u.shape, result.s.shape, result.vh.shape) == ((2, 2, 14, 4), (2, 2, 4), (2, 2, 4, 10))
    assert result.error.shape == (2, 2)
    assert result.rank == 4
    for i, j in itertools.product(range(2), repeat=2):
        check(type(result)(*(part[i, j] for part in result)), batch[i, j], 4, slack=1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    inner=st.integers(1, 70),
    rank=st.integers(1, 70),
    exponent=st.integers(-25, 25),
    driver=st.sampled_from(["auto", *DRIVERS]),
    double=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape_rank_and_scale(m, n, inner, rank, exponent, driver, double, seed):
    generator = np.random.default_rng(seed)
    a = generator.standard_normal((m, inner)) @ generator.standard_normal((inner, n)) * 10.0**exponent
    a = torch.from_numpy(a).to(torch.float64 if double else torch.float32)
    # The documented accuracy of the Gram driver in float64 is 1e-8, far more than it needs as a rule.
    rounding = 1e-8 if driver == "gram" and double else None
    check(svd(a, rank, driver=driver), a, rank, slack=1.011, rounding=rounding)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("driver", ["auto", *DRIVERS])
def test_nan_and_inf_are_refused(driver, dtype, bad):
    a = torch.ones(3, 5, 4, dtype=dtype)
    a[1, 2, 3] = bad
    with pytest.raises(LinalgError, match=rf"a: shape \(3, 5, 4\), dtype {str(dtype)[6:]}: contains NaN or Inf"):
        svd(a, driver=driver)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.ones(3), "is not a matrix"),
        (torch.ones(3, 3, dtype=torch.int64), "not real floating point"),
        (torch.ones(3, 3, dtype=torch.complex64), "not real floating point"),
        (torch.full((50, 50), 3e38), "float64"),  # s_1 = 1.5e40 has no float32
    ],
)
def test_no_right_answer_is_an_error(a, message):
    with pytest.raises(LinalgError, match=message):
        svd(a)


def test_huge_singular_values_fit_into_float64():
    assert float(svd(torch.full((50, 50), 3e38).double()).s[0]) == pytest.approx(1.5e40, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"driver": "magic"}, "driver must be one of auto, exact"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"tol": float("nan")}, "tol must be positive"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        svd(torch.eye(3), **options)


@pytest.mark.parametrize("driver", ["auto", *DRIVERS])
def test_signs_are_fixed(driver, known):
    a = known(20, 15, 0.5 ** np.arange(15))
    u = svd(a, 5, driver=driver).u
    assert (u.gather(0, u.abs().argmax(dim=0, keepdim=True)) > 0).all()
    assert torch.allclose(svd(a, 5, driver=driver, tol=1e-8).u, svd(a, 5, driver="exact").u, atol=1e-6)


@pytest.mark.parametrize("driver", ["randomized", "lanczos"])
def test_random_drivers_repeat_themselves(driver):
    a = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    first = svd(a, 5, driver=driver)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(first, svd(a, 5, driver=driver), strict=True))
    seeded = [svd(a, 5, driver=driver, generator=torch.Generator().manual_seed(seed)).u for seed in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


def test_the_input_is_not_changed(known):
    a = known(20, 15, 0.5 ** np.arange(15)) * 1e200
    before = a.clone()
    for driver in DRIVERS:
        svd(a, 3, driver=driver)
    assert torch.equal(a, before)


SPECTRA = {
    "1 / i": 1 / np.arange(1, 301),
    "i^-0.25": np.arange(1, 301) ** -0.25,
    "slow exponential": np.exp(-np.arange(300) / 100),
    "steep": 10.0 ** -np.arange(0, 30, 0.1),
    "step": np.where(np.arange(300) < 20, 1.0, 0.1),
    "flat": np.ones(300),
    "one outlier": np.where(np.arange(300) < 1, 1e4, 1.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 20])
@pytest.mark.parametrize("name", SPECTRA)
def test_randomized_is_within_one_percent_of_the_best(name, rank, dtype, known):
    a = known(340, 300, SPECTRA[name]).to(dtype)
    for matrix in (a, a.T):
        check(svd(matrix, rank, driver="randomized"), matrix, rank, slack=1.01)


@pytest.mark.parametrize("name", ["1 / i", "slow exponential", "flat"])
def test_randomized_keeps_a_tighter_promise(name, known):
    a = known(340, 300, SPECTRA[name])
    check(svd(a, 20, driver="randomized", tol=1e-6), a, 20, slack=1 + 1e-6)


@pytest.mark.parametrize("power", [0.3, 0.8])
def test_randomized_keeps_its_promise_below_the_rounding_of_the_energy(power, known):
    # The squared tail is below 1e-7 of the squared norm: in float32 the gain of a further product cannot be seen.
    a = known(340, 300, [*np.ones(5), *(1e-4 * np.arange(6.0, 301) ** -power)]).float()
    u, s, vh, error = (part.double().numpy() for part in svd(a, 40, driver="randomized"))
    best = np.linalg.norm(np.linalg.svd(a.double().numpy(), compute_uv=False)[40:])
    assert np.linalg.norm(a.double().numpy() - (u * s) @ vh) <= 1.01 * best
    assert error == pytest.approx(best, rel=0.01)


def test_randomized_hands_over_where_the_space_is_full(known):
    # A block of 25 + 8 columns, rounded up to 48, fits once into 60 dimensions; one of 12 + 8, rounded up to 32, fits
    # three times into 100, which a tight tolerance uses up.
    a = known(80, 60, np.arange(1, 61) ** -0.5)
    check(svd(a, 25, driver="randomized"), a, 25)
    a = known(120, 100, np.arange(1, 101) ** -0.5)
    check(svd(a, 12, driver="randomized", tol=1e-12), a, 12)


def test_randomized_stops_when_the_space_holds_the_whole_matrix(monkeypatch, known):
    calls = []
    monkeypatch.setattr("eckart.linalg.svd_randomized.extend", lambda *args: calls.append(1) or extend(*args))
    svd(known(340, 300, [3, 2, 1]).float(), 5, driver="randomized")
    assert len(calls) == 2  # the second finds nothing new


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [33, 40, 47])
def test_randomized_completes_its_bases_beyond_the_rank_of_the_matrix(columns, dtype, known):
    # The second block of 32 finds only ``columns`` - 32 new directions, all others lie outside the nonzero columns.
    a = torch.zeros(130, 135, dtype=torch.float64)
    a[:, :columns] = torch.randn(130, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    check(svd(a.to(dtype), 20, driver="randomized"), a.to(dtype), 20, slack=1.01)


@pytest.mark.parametrize(("name", "products"), [("flat", 2), ("gap", 3), ("1 / i", 5)])
def test_randomized_makes_no_more_products_than_the_spectrum_needs(name, products, monkeypatch):
    s = {"gap": np.where(np.arange(300) < 20, 1.0, 0.01)}.get(name, SPECTRA.get(name))
    calls, append = [], _Side.append
    monkeypatch.setattr(_Side, "append", lambda *args: calls.append(1) or append(*args))
    svd(torch.from_numpy(s).diag().float(), 20, driver="randomized")
    assert 1 + len(calls) <= products


@pytest.mark.parametrize("name", ["1 / i", "i^-0.25", "slow exponential", "steep", "quarter circle"])
def test_randomized_keeps_its_promise_for_every_start(name):
    # A Gaussian start block knows no directions, so a diagonal matrix stands for all of this spectrum.
    gaussian = np.random.default_rng(0).standard_normal((300, 300))
    s = SPECTRA[name] if name in SPECTRA else np.linalg.svd(gaussian, compute_uv=False)
    best = np.sqrt((s[20:] ** 2).sum())
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        found = svd(torch.from_numpy(s).diag().float(), 20, driver="randomized", generator=generator)
        assert float(found.error) <= 1.01 * best


def test_the_estimate_of_the_next_gain_is_the_energy_outside_the_basis(known):
    a = known(60, 50, 1 / np.arange(1, 51))
    side, basis = _Side(a.mT), torch.linalg.qr(known(60, 12, np.ones(12), 1))[0]
    side.append(basis)
    side.rayleigh_ritz(torch.float64)
    right = torch.linalg.svd(basis.mT @ a)[2][:5].mT
    outside = a @ right - basis @ (basis.mT @ (a @ right))
    assert side.unseen(5, torch.eye(5).double()) == pytest.approx(float(outside.square().sum()), rel=1e-10)
    signs = 2 * torch.randint(0, 2, (5, 4000), generator=torch.Generator().manual_seed(0)).double() - 1
    # The mean of 4000 estimates with a standard deviation below one of their mean: within 5 %.
    assert side.unseen(5, signs / 4000**0.5) == pytest.approx(float(outside.square().sum()), rel=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("driver", ["gram", "randomized", "lanczos"])
def test_error_survives_cancellation(driver, dtype, known):
    # ||a||^2 - ||s||^2 cancels all digits here: the tail is 1e-5 (float32) or 1e-12 (float64) of the norm
    tail = 1e-5 if dtype == torch.float32 else 1e-12
    a = known(90, 80, [1.0, 0.9, 0.8, tail, tail]).to(dtype)
    result = svd(a, 3, driver=driver, tol=1e-3)
    left = a.double() - (result.u.double() * result.s.double()) @ result.vh.double()
    assert float(result.error) == pytest.approx(float(left.norm()), rel=1e-2)


def test_lanczos_meets_its_residual_bound(known):
    a = known(200, 150, 1 / np.arange(1, 151))
    u, s, vh, _ = svd(a, 8, driver="lanczos", tol=1e-9)
    assert float((a @ vh.T - u * s).norm(dim=0).max()) < 1e-9
    assert float((a.T @ u - vh.T * s).norm(dim=0).max()) < 1e-9
    assert np.abs(s.numpy() - 1 / np.arange(1, 9)).max() < 1e-12


@pytest.mark.parametrize("copies", [2, 7, 30])
@pytest.mark.parametrize("seed", range(3))
def test_lanczos_finds_every_copy_of_a_repeated_value(copies, seed, known):
    # A single start vector sees one copy only.
    s = np.concatenate([np.full(copies, 5.0), 4.0 * 0.9 ** np.arange(100 - copies)])
    a = known(120, 100, s, seed)
    assert np.abs(svd(a, 5, driver="lanczos").s.numpy() - s[:5]).max() < 1e-9


def test_lanczos_that_does_not_converge_falls_back(monkeypatch, known):
    monkeypatch.setattr("eckart.linalg.svd_lanczos._MAX_RESTARTS", 1)
    a = known(200, 150, np.arange(1, 151) ** -0.1)
    check(svd(a, 5, driver="lanczos"), a, 5, slack=1 + 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("failure", ["raises", "returns NaN"])
def test_another_algorithm_takes_over_when_lapack_fails(failure, dtype, monkeypatch, known):
    a = known(20, 15, np.linspace(2, 0.5, 15)).to(dtype)
    lapack, calls = torch.linalg.svd, []

    def broken(matrix, full_matrices=True):
        calls.append(matrix)
        if len(calls) > 1:
            return lapack(matrix, full_matrices=full_matrices)
        if failure == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        return tuple(part * float("nan") for part in lapack(matrix, full_matrices=full_matrices))

    monkeypatch.setattr(torch.linalg, "svd", broken)
    result = svd(a, driver="exact")
    truncated = svd(a, 4, driver="exact")
    monkeypatch.undo()
    check(result, a)
    check(truncated, a, 4)


def test_when_every_algorithm_fails_the_error_says_so(monkeypatch):
    def broken(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", broken)
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(LinalgError, match=r"shape \(4, 4\), dtype float32: no SVD algorithm converges"):
        svd(torch.eye(4), driver="exact")


def test_auto_rule():
    big, big64, small = torch.zeros(300, 400), torch.zeros(300, 400, dtype=torch.float64), torch.zeros(20, 400)
    assert [_choose(big, k) for k in (1, 41, 42, 299, 300)] == ["randomized"] * 2 + ["gram"] * 2 + ["exact"]
    assert [_choose(big64, k) for k in (41, 42)] == ["randomized", "exact"]
    assert _choose(small, 1) == "exact"
    assert _choose(torch.zeros(200, 200), 1) == "gram"


def test_auto_runs_what_it_chose(known):
    a = known(300, 280, 1 / np.arange(1, 281)).float()
    for k, driver in ((10, "randomized"), (200, "gram")):
        assert torch.equal(svd(a, k).u, svd(a, k, driver=driver).u)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(30, 20), (100, 80), (80, 100)], ids=str)
def test_singular_values(shape, dtype):
    a = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    a[1, :, 3:] = 0  # rank 3
    s = singular_values(a)
    truth = np.linalg.svd(a.double().numpy(), compute_uv=False)
    assert s.dtype == torch.float64
    # The documented error of the float64 Gram is 1e-8 s_1; that of LAPACK in float64 is far less.
    bound = (1e-13 if dtype == torch.float64 or min(shape) < 64 else 3e-8) * truth[:, :1]
    assert (np.abs(s.numpy() - truth) <= bound).all()


@pytest.mark.parametrize("name", EDGE)
def test_singular_values_of_edge_inputs(name):
    a = EDGE[name].detach()
    truth = np.linalg.svd(a.double().numpy(), compute_uv=False)
    assert np.abs(singular_values(a).numpy() - truth).max() <= 1e-12 * max(truth[0], 1e-300)
