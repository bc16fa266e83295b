"""robust_svd: the singular triplets of the clean matrix, whatever a tenth of the entries says."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.linalg import LinalgError, svd
from eckart.linalg._dpd import Fit, divergence, product, spread
from eckart.linalg.rsvddpd import RSVDDPD, robust_alpha, robust_rank, robust_svd


def contaminated(
    known, m=60, n=40, s=(3.0, 2.0), *, share=0.1, size=30.0, noise=0.1, seed=0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix whose entries are of size s, and the same with noise and a share of entries shifted by +-size."""
    clean = known(m, n, np.array(s) * (m * n) ** 0.5, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    error = noise * torch.randn(m, n, dtype=torch.float64, generator=generator)
    hit = torch.rand(m, n, generator=generator) < share
    sign = torch.where(torch.rand(m, n, generator=generator) < 0.5, -1.0, 1.0)
    return clean, clean + error + hit * sign * size


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def angle(u: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest principal angle between column spaces, degrees."""
    cosines = np.linalg.svd(u.double().numpy().T @ truth.numpy(), compute_uv=False)
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))


def counting(outlier: float = 100.0) -> torch.Tensor:
    """1, 2, ..., 20 down the columns of a 4 x 5 matrix, with one entry replaced: the example of the paper's code."""
    a = torch.arange(1.0, 21.0, dtype=torch.float64).view(5, 4).T.clone()
    a[1, 2] = outlier
    return a


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("restarts", [0, 3])
def test_the_example_of_the_paper(restarts, dtype):
    found = robust_svd(counting().to(dtype), 2, refine=False, restarts=restarts)
    # The published code and an independent port give 53.560 and 53.5591, 2.359.
    assert found.s.tolist() == pytest.approx([53.5591, 2.3591], abs=2e-4)
    assert found.s.dtype == dtype
    ordinary = np.linalg.svd(counting().numpy(), compute_uv=False)
    assert ordinary[:2] == pytest.approx([107.034, 36.179], abs=1e-3)
    # Refined, the triplets are those of the matrix before the outlier.
    clean = np.linalg.svd(counting(10.0).numpy(), compute_uv=False)
    refined = robust_svd(counting().to(dtype), 2, restarts=restarts)
    assert refined.s.tolist() == pytest.approx(clean[:2].tolist(), rel=1e-5)
    assert float(refined.reconstruct()[1, 2]) == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize("size", [10.0, 1e3, 1e30])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_outliers_at_random_places_do_not_move_the_subspace(known, share, size):
    clean, a = contaminated(known, 120, 80, (2.0, 1.5, 1.0), share=share, size=size)
    u = svd(clean, 3).u
    assert angle(robust_svd(a, 3).u, u) < 2
    if size > 100:
        assert angle(svd(a, 3, driver="exact").u, u) > 30


def test_as_accurate_as_knowing_where_the_outliers_are(known):
    clean, a = contaminated(known, 100, 60, (3.0, 2.0, 1.0), size=50.0)
    trusted = (a - clean).abs() < 25
    oracle = svd(torch.where(trusted, a, clean), 3, driver="exact").reconstruct()
    # Weights exp(-0.15 r²) cost about a tenth of the accuracy; the missing tenth of the data another twentieth.
    assert distance(robust_svd(a, 3).reconstruct(), clean) < 1.5 * distance(oracle, clean)


def test_refining_mends_what_one_pair_after_the_other_gets_wrong(known):
    clean, a = contaminated(known, 80, 60, (1.0, 1.0, 1.0, 1.0), size=50.0)
    paper, refined = robust_svd(a, 4, refine=False), robust_svd(a, 4)
    assert distance(refined.reconstruct(), clean) < 0.5 * distance(paper.reconstruct(), clean) < 0.1


def test_whole_columns_of_outliers_and_a_moving_object(known):
    """A static picture in 30 frames, 5 of them white, and an object that covers a tenth of the others."""
    picture = 0.5 + 0.3 * torch.sin(torch.linspace(0, 20, 200, dtype=torch.float64))
    frames = picture[:, None].repeat(1, 30)
    for t in range(30):
        frames[6 * t : 6 * t + 20, t] = 1.5
    frames[:, 3::6] = 1.0
    frames += 0.01 * torch.randn(200, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    background = robust_svd(frames, 1).reconstruct().median(dim=1).values
    error = float((background - picture).norm() / picture.norm())
    # Noise of 0.01 averaged over two dozen frames leaves 0.004 of pictures that are about 0.55.
    assert error < 0.006
    ordinary = svd(frames, 1, driver="exact").reconstruct().median(dim=1).values
    assert float((ordinary - picture).norm() / picture.norm()) > 0.03


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
@pytest.mark.parametrize(("m", "n", "rank"), [(12, 9, 2), (30, 20, 3), (20, 30, 1)])
def test_clean_matrix_of_that_rank_is_returned(known, m, n, rank, alpha):
    a = known(m, n, np.arange(rank, 0, -1.0))
    found = robust_svd(a, rank, alpha)
    assert distance(found.reconstruct(), a) < 1e-6
    assert found.s.tolist() == pytest.approx(np.arange(rank, 0, -1.0), rel=1e-6)
    assert float(found.error) < 1e-6
    assert float(found.noise) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("restarts", [0, 1, 5])
def test_of_several_exact_fits_the_one_of_most_entries_wins(dtype, restarts):
    """11 of 12 entries are those of the matrix of ones; 6 of 12 those of the one through the outlier."""
    a = torch.ones(4, 3, dtype=dtype)
    a[0, 0] = 50
    assert torch.allclose(robust_svd(a, 1, restarts=restarts).reconstruct(), torch.ones(4, 3, dtype=dtype), atol=1e-5)


def test_alpha_zero_is_the_ordinary_decomposition():
    a = counting()
    found, ordinary = robust_svd(a, 3, 0.0), svd(a, 3, driver="exact")
    for one, other in zip(found[:4], ordinary, strict=True):
        assert torch.equal(one, other)
    assert float(found.noise) == pytest.approx(float((a - found.reconstruct()).square().mean().sqrt()))


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_missing_entries_are_filled_in(known, alpha):
    a = known(40, 30, [3.0, 2.0])
    observed = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.6
    holed = a.where(observed, torch.nan)
    found = robust_svd(holed, 2, alpha, observed=observed)
    assert distance(found.reconstruct(), a) < 1e-4
    other = robust_svd(a.where(observed, 1e6), 2, alpha, observed=observed)
    assert torch.equal(found.s, other.s), "what is hidden does not matter"
    if alpha:
        holed[observed & (torch.rand(40, 30, generator=torch.Generator().manual_seed(1)) < 0.1)] += 10
        assert distance(robust_svd(holed, 2, observed=observed).reconstruct(), a) < 1e-4


def test_error_and_noise_are_those_of_the_residual(known):
    _, a = contaminated(known)
    observed = torch.rand(60, 40, generator=torch.Generator().manual_seed(0)) < 0.9
    for mask in (None, observed):
        found = robust_svd(a, 2, observed=mask)
        residual = (a - found.reconstruct())[torch.ones_like(observed) if mask is None else mask]
        assert float(found.error) == pytest.approx(float(residual.norm()), rel=1e-9)
        # 1.4826 times the median is the standard deviation of a normal law; torch takes the lower of two medians.
        assert float(found.noise) == pytest.approx(1.4826 * float(residual.abs().median()), rel=1e-9)


def test_vectors_are_orthonormal_sorted_and_signed(known):
    _, a = contaminated(known)
    for refine in (True, False):
        found = robust_svd(a, 6, refine=refine)
        eye = torch.eye(6, dtype=torch.float64)
        assert torch.allclose(found.u.T @ found.u, eye, atol=1e-12)
        assert torch.allclose(found.vh @ found.vh.T, eye, atol=1e-12)
        assert (found.s.diff() <= 0).all()
        assert (found.u.gather(0, found.u.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_a_pass_never_raises_the_divergence_at_a_fixed_scale(known):
    _, a = contaminated(known)
    x = a / spread(a)
    one = torch.ones((), dtype=torch.float64)

    def objective(model):
        return -float(torch.exp(-0.15 * (x - product(model)).square()).sum())

    values, passes = [], 6
    for count in range(1, passes + 1):
        fit = Fit(x, 1, 0.3, 1e-12, count)
        values.append(objective(fit.pair_by_pair(1, torch.Generator())))
        assert float(fit._scale(x, 1)) == float(one)
    assert (np.diff(values) <= 1e-9).all()
    assert values[-1] < values[0]


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
def test_divergence_is_the_integral_it_stands_for_at_its_least(alpha):
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(30, 20, dtype=torch.float64, generator=generator)
    residual[:3] = 40
    grid = np.linspace(-50, 50, 100001)

    def objective(s: float) -> float:
        """Integral of f^(1 + alpha) - (1 + 1 / alpha) mean f(r)^alpha for the normal density f, without (2 pi)s."""
        integral = np.trapezoid(np.exp(-(1 + alpha) * (grid / s) ** 2 / 2), grid) / np.sqrt(2 * np.pi)
        at_data = np.exp(-alpha * (residual.numpy() / s) ** 2 / 2)
        return s ** (-1 - alpha) * integral - (1 + 1 / alpha) * s**-alpha * at_data.mean()

    value, s = divergence(residual, alpha)
    best = scipy.optimize.minimize_scalar(objective, bounds=(0.5, 2), method="bounded", options={"xatol": 1e-10})
    # Twenty passes of the fixed point, from the median; a minimum is known to the root of the rounding.
    assert float(s) == pytest.approx(best.x, rel=1e-5)
    assert float(value) == pytest.approx(best.fun, rel=1e-9)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e150, -4.0])
def test_scale_equivariance(known, scale):
    _, a = contaminated(known)
    plain, scaled = robust_svd(a, 2), robust_svd(a * scale, 2)
    # The multiples differ in their last bits, the passes stop at 1e-6.
    assert torch.allclose(scaled.s / abs(scale), plain.s, rtol=1e-6)
    assert float(scaled.noise) / abs(scale) == pytest.approx(float(plain.noise), rel=1e-5)
    assert angle(scaled.u, plain.u) < 1e-3


def test_transposing_transposes(known):
    clean, a = contaminated(known)
    across, down = robust_svd(a.T, 2).reconstruct().T, robust_svd(a, 2).reconstruct()
    assert distance(across, down) < 1e-4
    assert distance(across, clean) < 0.05


def edge_cases() -> dict[str, torch.Tensor]:
    normal = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    low = torch.outer(normal[:, 0], normal[0])
    return {
        "zero": torch.zeros(5, 4),
        "constant": torch.full((6, 5), 3.0),
        "mostly zero": torch.diag(torch.ones(8)),
        "one row": normal[:1],
        "one column": normal[:, :1],
        "one entry": torch.tensor([[-2.0]]),
        "huge": low * 1e30,
        "tiny": low * 1e-30,
        "huge double": low.double() * 1e300,
        "half": low.half(),
        "bfloat16": low.bfloat16(),
        "strided": torch.outer(normal.flatten(), normal.flatten())[::3, ::5],
        "zero row": low * torch.tensor([[0.0]] + [[1.0]] * 7),
        "outlier 1e38": torch.where(torch.arange(40).view(8, 5) == 7, 1e38, low),
        "batch": torch.stack([normal, low, torch.zeros(8, 5)])[None],
    }


EDGE = edge_cases()


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("name", EDGE)
def test_edge_inputs(name, alpha):
    a = EDGE[name]
    rank = min(2, *a.shape[-2:])
    for refine in (True, False):
        found = robust_svd(a, 2, alpha, refine=refine)
        assert found.u.dtype == (torch.float64 if a.dtype == torch.float64 else torch.float32)
        assert (found.u.shape, found.vh.shape) == ((*a.shape[:-1], rank), (*a.shape[:-2], rank, a.shape[-1]))
        assert all(bool(part.isfinite().all()) for part in found)
        eye = torch.eye(rank).expand(*a.shape[:-2], rank, rank)
        assert torch.allclose((found.u.mT @ found.u).float(), eye, atol=1e-5)
        assert torch.allclose((found.vh @ found.vh.mT).float(), eye, atol=1e-5)
        assert (found.error <= a.double().flatten(-2).norm(dim=-1) * (1 + 1e-5)).all()
    if name in ("constant", "one row", "one column", "one entry", "huge", "tiny", "huge double", "strided", "zero row"):
        size = float(a.abs().max())
        # A matrix of rank one is its own best fit, within the tolerance of the passes.
        refined = robust_svd(a, rank, alpha).reconstruct()
        assert torch.allclose(refined / size, a / size, atol=1e-4)


def test_a_batch_is_a_loop(known):
    batch = torch.stack([contaminated(known, seed=seed)[1] for seed in range(3)]).view(3, 1, 60, 40)
    found = robust_svd(batch, 2)
    for index in range(3):
        alone = robust_svd(batch[index, 0], 2)
        # A batch goes on until its slowest member has settled; each has by then, to 1e-6.
        assert torch.allclose(found.s[index, 0], alone.s, rtol=1e-5)
        assert distance(found.reconstruct()[index, 0], alone.reconstruct()) < 1e-5


def test_result_repeats_and_inputs_are_untouched(known):
    _, a = contaminated(known)
    a.requires_grad_()
    observed = torch.rand(60, 40) < 0.9
    before, mask, state = a.detach().clone(), observed.clone(), torch.random.get_rng_state()
    first, second = robust_svd(a, 2, observed=observed), robust_svd(a, 2, observed=observed)
    assert torch.equal(first.u, second.u)
    assert not first.u.requires_grad
    assert torch.equal(a.detach(), before)
    assert torch.equal(observed, mask)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = robust_svd(a, 2, observed=observed, generator=torch.Generator().manual_seed(9))
    assert torch.allclose(first.s, other.s, rtol=1e-4)


def test_method_runs_the_function_with_its_options():
    a = counting()
    method = RSVDDPD(alpha=0.5, refine=False, restarts=0, tol=1e-3, max_passes=7)
    direct = robust_svd(a, 2, 0.5, refine=False, restarts=0, tol=1e-3, max_passes=7)
    assert torch.equal(method(a, 2).s, direct.s)
    assert RSVDDPD().alpha == 0.3


@pytest.mark.parametrize("alpha", [0.1, 0.5])
@pytest.mark.parametrize(
    ("s", "share", "noise"),
    [
        ((3.0, 2.0), 0.1, 0.1),
        ((3.0, 2.0), 0.0, 0.5),
        ((2.0, 1.5, 1.0), 0.1, 0.5),
        ((), 0.1, 1.0),
        ((5.0, 3.0), 0.1, 0.0),
    ],
    ids=["outliers", "clean", "noisy", "nothing there", "exact"],
)
def test_rank_is_that_of_the_clean_matrix(known, s, share, noise, alpha):
    _, a = contaminated(known, s=s, share=share, noise=noise)
    assert robust_rank(a, alpha, max_rank=len(s) + 1) == len(s)


def test_rank_for_alpha_zero_is_the_criterion_of_bai_and_ng(known):
    _, a = contaminated(known, s=(3.0, 2.0, 1.0), share=0.0, noise=1.0)
    m, n = a.shape
    s = np.linalg.svd(a.numpy(), compute_uv=False)
    left = np.array([(s[k:] ** 2).sum() / (m * n) for k in range(6)])
    criterion = np.log(left) + np.arange(6) * (m + n) / (m * n) * np.log(min(m, n))
    assert robust_rank(a, 0.0, max_rank=5) == int(criterion.argmin()) == 3


def test_rank_of_small_matrices():
    assert robust_rank(torch.zeros(3, 3)) == 0
    assert robust_rank(torch.tensor([[1.0, 2.0, 3.0]])) in (0, 1)
    assert robust_rank(torch.outer(torch.arange(1.0, 13.0), torch.arange(1.0, 11.0))) == 1


def test_alpha_is_small_without_outliers_and_positive_with_them(known):
    grid = [0.0, 0.2, 1.0]
    assert robust_alpha(contaminated(known, share=0.0)[1], 2, grid=grid) == 0.0
    for size in (2.0, 30.0):
        clean, a = contaminated(known, size=size)
        chosen = robust_alpha(a, 2, grid=grid)
        errors = {alpha: distance(robust_svd(a, 2, alpha).reconstruct(), clean) for alpha in grid}
        assert chosen > 0
        assert errors[chosen] < 1.2 * min(errors.values())


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    rank=st.integers(1, 4),
    alpha=st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    decades=st.integers(-20, 20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    holes=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_matrix_has_finite_orthonormal_triplets(m, n, rank, alpha, decades, dtype, holes, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, generator=generator, dtype=dtype).round(decimals=seed % 3) * 10.0**decades
    observed = torch.rand(m, n, generator=generator) < 0.7 if holes else None
    found = robust_svd(a, rank, alpha, observed=observed, restarts=0, max_passes=20)
    k = min(m, n, rank)
    assert all(bool(part.isfinite().all()) for part in found)
    eye = torch.eye(k, dtype=dtype)
    assert torch.allclose(found.u.T @ found.u, eye, atol=1e-5)
    assert torch.allclose(found.vh @ found.vh.T, eye, atol=1e-5)
    residual = (a - found.reconstruct()).double()
    residual = residual if observed is None else residual.where(observed, 0)
    assert float(found.error) == pytest.approx(float(residual.norm()), rel=1e-3, abs=1e-5 * float(a.double().norm()))


@settings(max_examples=8, deadline=None)  # each takes several fits
@given(m=st.integers(30, 40), n=st.integers(30, 40), rank=st.integers(0, 2), seed=st.integers(0, 10**6))
def test_rank_and_alpha_of_any_clean_low_rank_matrix(m, n, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, 3, generator=generator).double() for size in (m, n))
    left, right = torch.linalg.qr(left)[0][:, :rank], torch.linalg.qr(right)[0][:, :rank]
    a = 10 * (m * n) ** 0.5 * left @ right.T + torch.randn(m, n, generator=generator)
    assert robust_rank(a, max_rank=rank + 1) == rank
    if rank == 1:
        assert robust_alpha(a, rank, grid=[0.2, 1.0]) == 0.2, "the more accurate one where both are right"


NAN = torch.full((3, 3), float("nan"))


@pytest.mark.parametrize(
    ("a", "options", "message"),
    [
        (NAN, {}, "NaN or Inf"),
        (torch.ones(3, 3, dtype=torch.int64), {}, "is not real floating point"),
        (torch.ones(3), {}, "is not a matrix"),
        (torch.ones(0, 3), {}, "is empty"),
        (torch.ones(3, 3), {"observed": torch.ones(3, 3)}, "is no mask"),
        (torch.ones(3, 3), {"observed": torch.ones(3, dtype=torch.bool)}, r"is no mask of a \(3, 3\)"),
        (NAN, {"observed": torch.eye(3) == 0, "rank": 1}, None),
    ],
)
def test_impossible_input_is_named(a, options, message):
    rank = options.pop("rank", 1)
    if message is None:
        a = a.where(options["observed"].logical_not(), 1.0)
        assert bool(robust_svd(a, rank, **options).s.isfinite().all())
        return
    with pytest.raises(LinalgError, match=message):
        robust_svd(a, rank, **options)


@pytest.mark.parametrize("function", [robust_rank, lambda a: robust_alpha(a, 1)], ids=["rank", "alpha"])
def test_rank_and_alpha_take_one_matrix(function):
    for a, message in [(torch.ones(2, 3, 3), "is not one matrix"), (NAN, "NaN"), (torch.ones(0, 2), "not one matrix")]:
        with pytest.raises(LinalgError, match=message):
            function(a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], not 1.5"),
        ({"alpha": float("nan")}, "alpha must lie in"),
        ({"restarts": -1}, "restarts must be at least 0"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"max_passes": 0}, "max_passes must be at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        robust_svd(torch.eye(3), 1, **options)
    with pytest.raises(ValueError, match=message):
        RSVDDPD(**options)


def test_bad_ranks_and_grids():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        robust_svd(torch.eye(3), 0)
    with pytest.raises(ValueError, match="max_rank must be at least 1"):
        robust_rank(torch.eye(3), max_rank=0)
    with pytest.raises(ValueError, match="at least one alpha"):
        robust_alpha(torch.eye(3), 1, grid=[])
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], not 2"):
        robust_alpha(torch.eye(3), 1, grid=[0.1, 2.0])
