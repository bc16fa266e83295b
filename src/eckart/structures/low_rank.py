"""W = up @ down with k(m + n - k) numbers: k rows (or columns) of W as they are, the others combined from them.

    plain:             W = up down                      up (m, k), down (k, n)            k (m + n) numbers
    pivoted, rows:     W = P^T [I; combination] kept    combination (m - k, k), kept (k, n)    k (m + n - k)
    pivoted, columns:  W = kept [I, combination] P      kept (m, k), combination (k, n - k)    k (m + n - k)

P is a permutation, stored as the index tensor ``order``. The pivoted form holds the same matrix in fewer numbers,
so a budget buys a larger rank and every rank below min(m, n) saves.

Every factor is stored transposed, so that rows of x meet it from the left: y = (x down^T) up^T with down^T (n, k) and
up^T (k, m) contiguous. Long products then run along memory, which for a single token on a CPU takes about 0.7 of the
time of the other layout, and for many tokens the same.

Reference: Zhao, Zhang, Cannistraci, "Pivoting Factorization: A Compact Meta Low-Rank Representation of Sparsity for
Efficient Inference in Large Language Models", ICML 2025, arXiv:2501.19090; code biomedical-cybernetics/
pivoting-factorization. Different here: pivots by LU and maxvol, so that entries of the combination stay within 2
(``linalg.pivot_rows``), instead of column-pivoted QR; one gather over the smaller side of W instead of two scatters
into the output; fallback to plain factors where the storage dtype makes the pivoted form worse than the truncation.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from ..linalg import Form, LinalgError, pivot_rows
from .base import Structure, empty_parameter, wide
from .warnings import EckartWarning
from .weight import WeightView

__all__ = ["LowRank", "Side"]

Side = Literal["rows", "columns"]

# The pivoted form is given up where it rounds this many times worse than plain factors. Usual is 2 to 4 times for
# sizes to 2048, growing like the square root of the size; far more means cancellation between kept rows.
ROUNDING_FACTOR = 16.0
_PROBES = 32


class LowRank(Structure):
    """A weight W = up @ down (out, in) of rank k, pivoted or as two plain factors.

    Args:
        in_features: Columns n of W.
        out_features: Rows m of W.
        rank: k, at least 1; at most min(m, n) in the pivoted form.
        bias: Whether a bias (out,) is added.
        form: "pivoted" stores k (m + n - k) numbers, "plain" k (m + n).
        side: In the pivoted form, whether rows or columns of W are kept. Default: rows if m <= n, else columns,
            so that ``forward`` gathers over the smaller side. None in the plain form.
        device: Device of the parameters.
        dtype: Dtype of the parameters; the index ``order`` is int32 whatever the dtype.

    Attributes:
        up, down: Plain factors (m, k) and (k, n), views of the parameters ``up_transposed``, ``down_transposed``.
        kept: Pivoted: the kept rows (k, n), or the kept columns (m, k); a view of ``kept_transposed``.
        combination: Pivoted: (m - k, k), or (k, n - k); a view of ``combination_transposed``.
        order: Pivoted, rows: position (m,) of each output feature in [kept outputs, other outputs].
            Columns: input features (n,), the kept ones first.

    Raises:
        ValueError: A size, form or side makes no sense.

    Example:
        >>> up, down = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0, 0.0, 1.0, 2.0]])
        >>> layer = LowRank.from_factors(up, down)
        >>> layer.num_parameters(), layer.kept.tolist(), bool((layer.dense() == up @ down).all())
        (6, [[4.0, 0.0, 4.0, 8.0]], True)
    """

    type_name: ClassVar[str] = "low_rank"
    up_transposed: Tensor
    down_transposed: Tensor
    kept_transposed: Tensor
    combination_transposed: Tensor
    order: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        form: Form = "pivoted",
        side: Side | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        m, n = out_features, in_features
        if form not in ("plain", "pivoted") or side not in (None, "rows", "columns"):
            raise ValueError(f'form is "plain" or "pivoted" and side "rows" or "columns", got {form!r} and {side!r}')
        if rank < 1 or (form == "pivoted" and rank > min(m, n)):
            limit = f" to {min(m, n)}" if form == "pivoted" else ""
            raise ValueError(f"rank of a {form} ({m}, {n}) matrix must be from 1{limit}, got {rank}")
        self.rank = rank
        self.form = form
        # The gather in `forward` runs over all features of that side: take the smaller one.
        self.side = None if form == "plain" else side or ("rows" if m <= n else "columns")
        if self.side is None:
            self.up_transposed = empty_parameter(rank, m, device=device, dtype=dtype)
            self.down_transposed = empty_parameter(n, rank, device=device, dtype=dtype)
            return
        rows = self.side == "rows"
        kept, rest = ((n, rank), (rank, m - rank)) if rows else ((rank, m), (n - rank, rank))
        self.kept_transposed = empty_parameter(*kept, device=device, dtype=dtype)
        self.combination_transposed = empty_parameter(*rest, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(m if rows else n, dtype=torch.int32, device=device))

    @classmethod
    def from_factors(
        cls,
        up: Tensor,
        down: Tensor,
        *,
        bias: Tensor | None = None,
        form: Form = "pivoted",
        side: Side | None = None,
        dtype: torch.dtype | None = None,
        truncation_error: float | None = None,
    ) -> Self:
        """Store W = up @ down; computed in float64, then rounded to ``dtype``.

        The pivoted form equals the plain product for any factors: rank-deficient ones need no special case, and
        more than min(m, n) columns are first multiplied out. Rounding to ``dtype`` is where the forms differ. Its
        error is measured for both, by 32 fixed Gaussian probes g of E|(W_stored - W) g|^2 = |W_stored - W|_F^2.
        Plain factors are stored, with an ``EckartWarning``, if the pivoted error exceeds both 16 times the plain
        one and ``truncation_error``.

        Args:
            up: Left factor (m, k). The plain form stores it as it is; split the singular values evenly before.
            down: Right factor (k, n).
            bias: Bias (m,), stored in ``dtype``.
            form: "pivoted" or "plain".
            side: "rows", "columns" or None for the cheaper one.
            dtype: Storage dtype, default that of ``up``.
            truncation_error: Frobenius norm of what the caller's truncation removed: rounding below it is
                harmless. None compares the two forms alone.

        Returns:
            The layer, on the device of ``up``.

        Raises:
            LinalgError: NaN or Inf in the factors, or values beyond the range of ``dtype``.
            ValueError: Shapes do not fit.
        """
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(f"factors must be (m, k) and (k, n), got {tuple(up.shape)} and {tuple(down.shape)}")
        if bias is not None and bias.shape != up.shape[:1]:
            raise ValueError(f"bias must be ({up.shape[0]},), got {tuple(bias.shape)}")
        dtype = dtype or up.dtype
        up, down = up.detach().to(torch.float64), down.detach().to(torch.float64)
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise LinalgError(f"factors {tuple(up.shape)} and {tuple(down.shape)} hold NaN or Inf: check the weights")
        m, n = up.shape[0], down.shape[1]
        if form == "pivoted" and up.shape[1] > min(m, n):
            eye = torch.eye(min(m, n), dtype=torch.float64, device=up.device)
            up, down = (eye, up @ down) if m <= n else (up @ down, eye)

        common: dict[str, Any] = {"bias": bias is not None, "device": up.device, "dtype": dtype}
        extra = {} if bias is None else {"bias": bias.detach()}
        layer = cls(n, m, up.shape[1], form=form, side=side, **common)
        plain = cls(n, m, up.shape[1], form="plain", **common)
        plain.load_state_dict({"up_transposed": up.mT, "down_transposed": down.mT} | extra)
        if layer.side is None:
            layer = plain
        else:
            layer.load_state_dict(_pivot(up, down, layer.side) | extra)
            problem = _rounding_problem(layer, plain, up, down, truncation_error or 0.0)
            if problem:
                warnings.warn(problem, EckartWarning, stacklevel=2)
                layer = plain
        if not all(torch.isfinite(parameter).all() for parameter in layer.parameters()):
            raise LinalgError(f"factors or bias exceed the range of {dtype}: store in bfloat16 or float32")
        return layer

    @property
    def up(self) -> Tensor:
        """Plain left factor (m, k)."""
        return self.up_transposed.mT

    @property
    def down(self) -> Tensor:
        """Plain right factor (k, n)."""
        return self.down_transposed.mT

    @property
    def kept(self) -> Tensor:
        """Kept rows (k, n), or kept columns (m, k)."""
        return self.kept_transposed.mT

    @property
    def combination(self) -> Tensor:
        """Coefficients (m - k, k) of the other rows, or (k, n - k) of the other columns."""
        return self.combination_transposed.mT

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b for x (..., in): two products over the rank and, pivoted, one gather.

        Tokens are flattened first because gathering along the last of three dimensions takes torch's slow path.
        """
        flat = x.reshape(-1, self.in_features)
        if self.side is None:
            y = _affine(flat @ self.down_transposed, self.up_transposed, self.bias)
        elif self.side == "rows":
            z = flat @ self.kept_transposed
            y = torch.cat([z, z @ self.combination_transposed], -1).index_select(-1, self.order)
            y = y if self.bias is None else y + self.bias
        else:
            flat = flat.index_select(-1, self.order)
            z = flat[:, : self.rank] + flat[:, self.rank :] @ self.combination_transposed
            y = _affine(z, self.kept_transposed, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up (m, k), down (k, n)) with W = up @ down, exact in either form, differentiable."""
        if self.side is None:
            return self.up, self.down
        eye = torch.eye(self.rank, dtype=self.dtype, device=self.device)
        if self.side == "rows":
            return torch.cat([eye, self.combination]).index_select(0, self.order), self.kept
        return self.kept, torch.cat([eye, self.combination], 1).index_select(1, self.order.argsort())

    def dense(self) -> Tensor:
        """W = up @ down (out, in); kept rows or columns come out unchanged."""
        up, down = self.factors()
        return (wide(up) @ wide(down)).to(self.dtype)

    def flops(self, tokens: int) -> int:
        """2 tokens k (m + n), less 2 tokens k^2 in the pivoted form."""
        saved = 0 if self.side is None else self.rank
        return 2 * tokens * self.rank * (self.out_features + self.in_features - saved)

    @property
    def weight(self) -> Tensor:
        """W (out, in) for code that looks at ``layer.weight``: dtype, device and shape are free, use builds W."""
        return WeightView(self)

    def max_combination(self) -> float:
        """Largest absolute coefficient of the combination; 0 where there is none."""
        if self.side is None or self.combination_transposed.numel() == 0:
            return 0.0
        return float(self.combination_transposed.detach().abs().max())

    def _options(self) -> dict[str, Any]:
        return {"rank": self.rank, "form": self.form} | ({"side": self.side} if self.side else {})


def _affine(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """x (tokens, k) times matrix (k, m), plus bias (m,) where there is one."""
    return x @ matrix if bias is None else torch.addmm(bias, x, matrix)


def _pivot(up: Tensor, down: Tensor, side: Side) -> dict[str, Tensor]:
    """The tensors of the pivoted form of up @ down, in the dtype of the factors."""
    if side == "columns":
        up, down = down.mT, up.mT  # rows of W^T
    pivots = pivot_rows(up)
    kept, combination, order = up[pivots.kept] @ down, pivots.combination, torch.cat([pivots.kept, pivots.rest])
    if side == "rows":
        return {"kept_transposed": kept.mT, "combination_transposed": combination.mT, "order": order.argsort()}
    # The same numbers not transposed, and the gather runs over the input instead of the output.
    return {"kept_transposed": kept, "combination_transposed": combination, "order": order}


def _rounding_problem(
    pivoted: LowRank, plain: LowRank, up: Tensor, down: Tensor, truncation_error: float
) -> str | None:
    """Why the pivoted form would lose accuracy that plain factors keep, or None if it does not."""
    if pivoted.dtype == torch.float64:  # the dtype of the reference itself: nothing is rounded
        return None
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(down.shape[1], _PROBES, dtype=torch.float64, generator=generator).to(up.device)
    probes /= _PROBES**0.5
    exact = up @ (down @ probes)

    def error(layer: LowRank) -> float:
        stored_up, stored_down = (factor.detach().to(torch.float64) for factor in layer.factors())
        found = float((stored_up @ (stored_down @ probes) - exact).norm())
        return found if math.isfinite(found) else math.inf  # the dtype overflowed

    pivoted_error, plain_error = error(pivoted), error(plain)
    # Factors that `dtype` holds exactly have no rounding error; one unit of rounding is what others have.
    unit = torch.finfo(pivoted.dtype).eps / 2 * float(exact.norm())
    if pivoted_error <= max(ROUNDING_FACTOR * max(plain_error, unit), truncation_error):
        return None
    return (
        f"rank-{plain.rank} ({plain.out_features}, {plain.in_features}) matrix: rounding to {pivoted.dtype} costs "
        f"{pivoted_error:.2e} (Frobenius) in the pivoted form, {plain_error:.2e} as plain factors; "
        f"stored as plain factors, {plain.num_parameters()} numbers instead of {pivoted.num_parameters()}"
    )
