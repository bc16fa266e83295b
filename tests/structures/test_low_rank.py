"""LowRank: the pivoted form is the same matrix in k (m + n - k) numbers, and rounds well or is not used."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eckart.linalg import LinalgError
from eckart.structures import EckartWarning, LowRank
from eckart.structures.low_rank import ROUNDING_FACTOR


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def balanced(m: int, n: int, s: Tensor) -> tuple[Tensor, Tensor]:
    """Factors U S^1/2, S^1/2 V^T of a matrix of known singular values."""
    u = torch.linalg.qr(random(m, len(s), seed=1))[0]
    v = torch.linalg.qr(random(n, len(s), seed=2))[0]
    return u * s.sqrt(), s.sqrt()[:, None] * v.T


def cancelling() -> tuple[Tensor, Tensor]:
    """A matrix whose pivoted form rounds badly: kept rows share one large direction, which the rest cancel.

    W = [I; C] K, with rows k_j = v + small and rows of C that sum to zero. The rest rows C K are small, but each
    is a combination of k large rows, so their rounding does not cancel. Plain factors that hold v in one row, as
    [I; C] T and T^-1 K do, round it once. T is upper triangular, so LU still takes the rows of I as pivots.
    """
    k, p, n = 8, 8192, 16
    signs = torch.tensor([0.99, -0.99] * (k // 2), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    combination = torch.stack([signs[torch.randperm(k, generator=generator)] for _ in range(p)])
    mixing = torch.eye(k, dtype=torch.float64)
    mixing[:, -1] = 1
    rows = random(1, n) + 1e-3 * random(k, n, seed=1)
    up = torch.cat([torch.eye(k, dtype=torch.float64), combination]) @ mixing
    return up, torch.linalg.solve(mixing, rows)


SHAPES = [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1), (1, 1), (40, 33)]


@pytest.mark.parametrize("side", [None, "rows", "columns"])
@pytest.mark.parametrize(("m", "n"), SHAPES, ids=str)
def test_pivoted_form_is_the_plain_product_at_every_rank(m: int, n: int, side: str | None) -> None:
    for rank in range(1, min(m, n) + 1):
        up, down, bias = random(m, rank), random(rank, n, seed=1), random(m, seed=2)
        layer = LowRank.from_factors(up, down, bias=bias, side=side)
        x = random(3, n, seed=3)
        # Coefficients within 2 and products of up to 40 terms: rounding of a few 1e-15 times the norms.
        tolerance = 1e-14 * float(up.norm() * down.norm())
        torch.testing.assert_close(layer.dense(), up @ down, rtol=0, atol=tolerance)
        torch.testing.assert_close(layer(x), x @ (up @ down).T + bias, rtol=0, atol=tolerance * 20)
        stored_up, stored_down = layer.factors()
        torch.testing.assert_close(stored_up @ stored_down, up @ down, rtol=0, atol=tolerance)
        assert (layer.form, layer.side) == ("pivoted", side or ("rows" if m <= n else "columns"))
        assert layer.num_parameters() == rank * (m + n - rank) + m
        assert layer.nbytes() == 8 * layer.num_parameters() + 4 * len(layer.order)
        assert layer.max_combination() <= 2
        assert layer.order.dtype == torch.int32
        assert layer.order.sort().values.tolist() == list(range(m if layer.side == "rows" else n))


@pytest.mark.parametrize(("m", "n"), SHAPES, ids=str)
def test_kept_tensors_are_rows_or_columns_of_the_matrix(m: int, n: int) -> None:
    up, down = random(m, 1), random(1, n, seed=1)
    rows = LowRank.from_factors(up, down, side="rows")
    columns = LowRank.from_factors(up, down, side="columns")
    weight = up @ down
    assert (rows.kept.detach() == weight).all(1).any()
    assert (columns.kept.detach() == weight).all(0).any()
    # What is kept comes out of dense() with no further rounding, in any dtype.
    half = LowRank.from_factors(up, down, side="rows", dtype=torch.bfloat16)
    assert (half.dense() == half.kept).all(1).any()


def test_plain_form_stores_the_factors_as_they_are() -> None:
    up, down = random(6, 3), random(3, 5, seed=1)
    layer = LowRank.from_factors(up, down, form="plain")
    assert torch.equal(layer.up, up)
    assert torch.equal(layer.down, down)
    assert layer.num_parameters() == 3 * (6 + 5)
    assert (layer.side, layer.max_combination()) == (None, 0.0)
    assert layer.spec() == {
        "type": "low_rank",
        "in_features": 5,
        "out_features": 6,
        "bias": False,
        "rank": 3,
        "form": "plain",
    }


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7)])
def test_rank_deficient_factors_need_no_special_case(m: int, n: int) -> None:
    up, down = random(m, 4), random(4, n, seed=1)
    repeated = up[:, [0, 0, 1, 0]], down[[2, 2, 2, 1]]
    zero = torch.zeros_like(up), torch.zeros_like(down)
    for a, b in (repeated, zero, (up, zero[1]), (zero[0], down)):
        layer = LowRank.from_factors(a, b)
        assert (layer.form, layer.rank) == ("pivoted", 4)
        assert layer.max_combination() <= 2
        torch.testing.assert_close(layer.dense(), a @ b, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("m", "n"), [(3, 5), (5, 3)])
def test_more_columns_than_full_rank_are_multiplied_out(m: int, n: int) -> None:
    up, down = random(m, 9), random(9, n, seed=1)
    layer = LowRank.from_factors(up, down)
    assert (layer.rank, layer.num_parameters()) == (3, m * n)
    torch.testing.assert_close(layer.dense(), up @ down, rtol=0, atol=1e-13)


@pytest.mark.parametrize("decades", [0, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("m", "n"), [(96, 64), (64, 96)])
def test_badly_conditioned_factors_round_like_good_ones(m: int, n: int, dtype: torch.dtype, decades: int) -> None:
    s = torch.logspace(0, -decades, 32, dtype=torch.float64)
    up, down = balanced(m, n, s)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EckartWarning)
        layer = LowRank.from_factors(up, down, dtype=dtype)
    assert layer.max_combination() <= 2
    error = (layer.double().dense() - up @ down).norm() / (up @ down).norm()
    # Rounding of the kept rows and of the combination, each amplified by at most a few.
    assert error <= 3 * torch.finfo(dtype).eps + 1e-14


def test_plain_factors_are_stored_where_the_pivoted_form_rounds_badly() -> None:
    up, down = cancelling()
    exact = up @ down
    assert LowRank.from_factors(up, down, side="rows").form == "pivoted"  # in float64 nothing is lost
    with pytest.warns(EckartWarning, match="stored as plain factors, 65728 numbers instead of 65664") as caught:
        layer = LowRank.from_factors(up, down, side="rows", dtype=torch.bfloat16)
    assert layer.form == "plain"
    plain_error = float((layer.double().dense().detach() - exact).norm())
    with warnings.catch_warnings():
        warnings.simplefilter("error", EckartWarning)
        kept = LowRank.from_factors(up, down, side="rows", dtype=torch.bfloat16, truncation_error=float(exact.norm()))
    assert kept.form == "pivoted"
    pivoted_error = float((kept.double().dense().detach() - exact).norm())
    assert pivoted_error > ROUNDING_FACTOR * plain_error
    # The probes measure both errors well enough to compare them.
    stated = re.search(r"costs (\S+) \(Frobenius\) in the pivoted form, (\S+) as plain", str(caught[0].message))
    assert stated is not None
    assert float(stated[1]) == pytest.approx(pivoted_error, rel=0.3)
    assert float(stated[2]) == pytest.approx(plain_error, rel=0.5)


def test_truncation_error_must_exceed_the_rounding_to_excuse_it() -> None:
    up, down = cancelling()
    with pytest.warns(EckartWarning):
        layer = LowRank.from_factors(up, down, side="rows", dtype=torch.bfloat16, truncation_error=1e-3)
    assert layer.form == "plain"


def test_underflow_of_the_pivoted_form_alone_falls_back() -> None:
    up, down = 1e-5 * random(6, 2), 1e-5 * random(2, 8)
    with pytest.warns(EckartWarning, match="float16"):
        layer = LowRank.from_factors(up, down, dtype=torch.float16)
    assert layer.form == "plain"


def test_values_beyond_the_dtype_are_refused() -> None:
    up, down = 1e6 * random(6, 2), 1e-3 * random(2, 8)
    with pytest.raises(LinalgError, match=r"range of torch.float16.*bfloat16"):
        LowRank.from_factors(up, down, form="plain", dtype=torch.float16)
    assert LowRank.from_factors(up, down, dtype=torch.float16).form == "pivoted"  # the product itself fits
    with pytest.raises(LinalgError, match=r"range of torch.float16"):
        LowRank.from_factors(random(6, 2), random(2, 8), bias=torch.full((6,), 1e6), dtype=torch.float16)


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused(form: str, value: float) -> None:
    up = random(6, 2)
    up[3, 1] = value
    with pytest.raises(LinalgError, match="NaN or Inf"):
        LowRank.from_factors(up, random(2, 8), form=form)


def test_dtype_defaults_to_that_of_up_and_inputs_are_untouched() -> None:
    up, down = random(6, 2).float().requires_grad_(), random(2, 8).float()
    before = up.detach().clone()
    layer = LowRank.from_factors(up, down)
    assert layer.dtype == torch.float32
    assert torch.equal(up, before)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in layer.parameters())
    plain = LowRank.from_factors(up, down, form="plain")
    plain.up_transposed.data.zero_()
    assert torch.equal(up, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "from 1 to 4, got 0"),
        ({"rank": 5}, "from 1 to 4, got 5"),
        ({"rank": 0, "form": "plain"}, "from 1, got 0"),
        ({"rank": 2, "form": "folded"}, "'folded'"),
        ({"rank": 2, "side": "top"}, "'top'"),
    ],
)
def test_impossible_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRank(4, 6, **arguments)


def test_factors_that_do_not_fit_are_named() -> None:
    for up, down in ((random(6, 2), random(3, 8)), (random(6), random(2, 8))):
        with pytest.raises(ValueError, match="factors must be"):
            LowRank.from_factors(up, down)
    with pytest.raises(ValueError, match=r"bias must be \(6,\), got \(8,\)"):
        LowRank.from_factors(random(6, 2), random(2, 8), bias=random(8))
    with pytest.raises(ValueError, match="folded"):
        LowRank.from_factors(random(6, 2), random(2, 8), form="folded")


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("options", [{"form": "plain"}, {"side": "rows"}, {"side": "columns"}], ids=str)
def test_forward_never_builds_the_dense_matrix(options: dict[str, str]) -> None:
    m, n, rank, tokens = 64, 48, 8, 3
    layer = LowRank.from_factors(random(m, rank), random(rank, n, seed=1), bias=random(m), **options)
    x = random(tokens, n).requires_grad_()
    with Sizes() as seen:
        layer(x).sum().backward()
    assert seen.largest <= rank * max(m, n) < m * n / 4  # a factor or its gradient
    assert (layer.kept_transposed if "side" in options else layer.up_transposed).grad is not None
