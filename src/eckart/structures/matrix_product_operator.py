"""W as a chain of small cores, one for each factor of its sizes.

    W[(o_1 ... o_N), (i_1 ... i_N)] = G_1[:, o_1, i_1, :] ... G_N[:, o_N, i_N, :]      G_k (r_{k-1}, o_k, i_k, r_k)

with r_0 = r_N = 1. Two sites are a sum of r_1 Kronecker products, the sites (m, 1), (1, n) ordinary low rank, one site
is W itself. Few numbers do not mean few operations: site by site, a token costs many times the dense product at bonds
of useful size. To contract the cores costs r_1 m n once for all tokens, so that for a prompt rows of W are made, an
eighth at a time, and thrown away: that is the dense product and a little. ``forward`` takes the cheaper way, and
``flops`` says what it costs.

Reference: Oseledets, "Approximation of 2^d x 2^d matrices using tensor decomposition", SIMAX 31 (2010); Novikov et al.,
"Tensorizing Neural Networks", NeurIPS 2015, arXiv:1509.06569.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..linalg import LinalgError, all_finite
from ..linalg import MatrixProductOperator as Chain
from ..linalg import matrix_product_operator as decompose
from .base import Structure, empty_parameter, wide
from .weight import WeightView

__all__ = ["MatrixProductOperator"]

# Numbers in the largest intermediate of the way site by site; tokens beyond that are worked on in turn.
_INTERMEDIATE = 1 << 24
# Parts of the rows of W that are made one after the other.
_SLABS = 8


class MatrixProductOperator(Structure):
    """A weight W (out, in) as a chain of N cores.

    Args:
        in_features: Columns n of W.
        out_features: Rows m of W.
        output_factors: (o_1, ..., o_N) with product m.
        input_factors: (i_1, ..., i_N) with product n.
        ranks: Bond dimensions (r_1, ..., r_{N-1}).
        bias: Whether a bias (out,) is added.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        cores: (r_{k-1}, o_k, i_k, r_k) for k = 1 ... N.

    Raises:
        ValueError: Factors whose product is not the size, or a wrong number of factors or ranks.

    Example:
        >>> w = torch.kron(torch.ones(2, 3), torch.eye(4))
        >>> layer = MatrixProductOperator.from_weight(w, (2, 4), (3, 4), ranks=1)
        >>> layer.num_parameters(), torch.allclose(layer.dense(), w, atol=1e-6), layer(torch.ones(12)).shape
        (22, True, torch.Size([8]))
    """

    type_name: ClassVar[str] = "matrix_product_operator"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        output_factors: Sequence[int],
        input_factors: Sequence[int],
        ranks: Sequence[int],
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.output_factors, self.input_factors = tuple(output_factors), tuple(input_factors)
        self.ranks = tuple(ranks)
        for side, size, factors in (
            ("output", out_features, self.output_factors),
            ("input", in_features, self.input_factors),
        ):
            if math.prod(factors) != size or min(factors, default=0) < 1:
                raise ValueError(f"{side}_factors must be positive and have the product {size}, got {factors}")
        sites = len(self.output_factors)
        if len(self.input_factors) != sites or len(self.ranks) != sites - 1 or min(self.ranks, default=1) < 1:
            raise ValueError(
                f"a chain needs as many input as output factors and one positive rank between neighbours, "
                f"got {self.output_factors}, {self.input_factors} and ranks {self.ranks}"
            )
        left, right = (1, *self.ranks), (*self.ranks, 1)
        shapes = zip(left, self.output_factors, self.input_factors, right, strict=True)
        self.cores = nn.ParameterList(empty_parameter(*shape, device=device, dtype=dtype) for shape in shapes)

    @classmethod
    def from_cores(
        cls, cores: Sequence[Tensor], *, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Store a chain of cores (r_{k-1}, o_k, i_k, r_k), r_0 = r_N = 1.

        Args:
            cores: As made by `eckart.linalg.matrix_product_operator`.
            bias: (m,).
            dtype: Storage dtype, default that of the first core.

        Returns:
            The layer, on the device of the cores.

        Raises:
            ValueError: Shapes do not fit.
            LinalgError: NaN or Inf, or values beyond the range of ``dtype``.
        """
        if not cores or any(core.ndim != 4 for core in cores):
            raise ValueError("cores must be (r, o, i, r'), one for each site")
        bonds = [(core.shape[0], core.shape[3]) for core in cores]
        if bonds[0][0] != 1 or bonds[-1][1] != 1 or any(a[1] != b[0] for a, b in pairwise(bonds)):
            raise ValueError(f"neighbouring cores must share a bond, and the ends have bonds of 1, got {bonds}")
        outputs, inputs = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
        m, n = math.prod(outputs), math.prod(inputs)
        if bias is not None and bias.shape != (m,):
            raise ValueError(f"bias must be ({m},), got {tuple(bias.shape)}")
        common: dict[str, Any] = {"device": cores[0].device, "dtype": dtype or cores[0].dtype}
        layer = cls(n, m, outputs, inputs, [right for _, right in bonds[:-1]], bias=bias is not None, **common)
        with torch.no_grad():
            for own, core in zip(layer.cores, cores, strict=True):
                own.copy_(core)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        if not all(all_finite(parameter) for parameter in layer.parameters()):
            raise LinalgError(f"cores or bias hold NaN or Inf in {layer.dtype}: check them, or store wider")
        return layer

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        output_factors: Sequence[int],
        input_factors: Sequence[int],
        ranks: int | Sequence[int] | None = None,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Decompose a weight (m, n) with bonds of at most ``ranks`` (None: as large as W needs), by TT-SVD.

        Args:
            weight: (m, n).
            output_factors: (o_1, ..., o_N).
            input_factors: (i_1, ..., i_N).
            ranks: Largest bond dimensions, one for each bond or one for all.
            bias: (m,).
            dtype: Storage dtype, default that of ``weight``.

        Raises:
            LinalgError: NaN or Inf in ``weight``, or factors whose product is not its size.
            ValueError: Different numbers of factors, or a rank below 1.
        """
        chain = decompose(weight, output_factors, input_factors, ranks)
        return cls.from_cores(chain.cores, bias=bias, dtype=dtype or weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """y = x W^T + b for x (..., in), site by site or through slabs of W, whichever takes fewer operations."""
        flat = x.reshape(-1, self.in_features)
        slabs, sites = self._ways(len(flat))
        y = self._by_slabs(flat) if slabs < sites else self._by_sites(flat)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _by_slabs(self, x: Tensor) -> Tensor:
        """x (tokens, n) times the rows of some of the o_1 after those of others; the later sites are one by then."""
        first, *others = self.cores
        _, out, own, bond = first.shape
        rest = first.new_ones(1, 1, 1)  # of the sites after the first, (bond, outputs, inputs)
        for core in reversed(others):
            left, o, i, right = core.shape
            grown = core.reshape(-1, right) @ rest.flatten(1)
            rest = grown.reshape(left, o, i, *rest.shape[1:]).transpose(2, 3).reshape(left, o * rest.shape[1], -1)
        outputs, inputs = rest.shape[1:]
        parts = []
        for some in first[0].split(-(-out // _SLABS)):
            slab = (some.reshape(-1, bond) @ rest.flatten(1)).reshape(len(some), own, outputs, inputs)
            parts.append(x @ slab.transpose(1, 2).reshape(-1, self.in_features).mT)
        return torch.cat(parts, dim=1)

    def _by_sites(self, x: Tensor) -> Tensor:
        """x (tokens, n) through one core after the other, from the end where that is cheaper; so many tokens a time."""
        cores, backwards = list(self.cores), self._backwards()
        if backwards:
            cores = [core.permute(3, 1, 2, 0) for core in reversed(cores)]
        matrices = [core.permute(0, 2, 1, 3).flatten(2).flatten(0, 1) for core in cores]  # (r i, o r')
        chunk = max(1, _INTERMEDIATE // self._intermediate())
        parts = [self._contract(part, cores, matrices, backwards) for part in x.split(chunk)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _contract(self, x: Tensor, cores: Sequence[Tensor], matrices: Sequence[Tensor], backwards: bool) -> Tensor:
        """Turns the inputs of one site after the other into its outputs; x (tokens, n) -> (tokens, m)."""
        tokens, sites = len(x), len(cores)
        if backwards:
            x = x.reshape(tokens, *self.input_factors).permute(0, *range(sites, 0, -1))
        state = x.reshape(tokens, self.in_features, 1, 1)  # (tokens, inputs to do, outputs done, bond)
        for core, matrix in zip(cores, matrices, strict=True):
            bond, out, own, following = core.shape
            todo, done = state.shape[1] // own, state.shape[2]
            state = state.reshape(tokens, own, todo, done, bond).permute(0, 2, 3, 4, 1)
            state = state.reshape(tokens * todo * done, bond * own) @ matrix
            state = state.reshape(tokens, todo, done * out, following)
        if backwards:
            state = state.reshape(tokens, *reversed(self.output_factors)).permute(0, *range(sites, 0, -1))
        return state.reshape(tokens, self.out_features)

    def _costs(self, backwards: bool) -> list[tuple[int, int]]:
        """For every site, multiply-adds and numbers that result, for one token."""
        outputs, inputs, ranks = self.output_factors, self.input_factors, (1, *self.ranks, 1)
        if backwards:
            outputs, inputs, ranks = outputs[::-1], inputs[::-1], ranks[::-1]
        costs, done, todo = [], 1, self.in_features
        for k, (out, own) in enumerate(zip(outputs, inputs, strict=True)):
            done, todo = done * out, todo // own
            numbers = todo * done * ranks[k + 1]
            costs.append((numbers * own * ranks[k], numbers))
        return costs

    def _ways(self, tokens: int) -> tuple[int, int]:
        """Multiply-adds by slabs, whose rows are made once for all tokens, and site by site."""
        made, outputs, inputs = 0, 1, 1
        for core in reversed(self.cores):
            outputs, inputs = outputs * core.shape[1], inputs * core.shape[2]
            made += core.shape[0] * core.shape[3] * outputs * inputs
        sites = sum(cost for cost, _ in self._costs(self._backwards()))
        return made + tokens * self.out_features * self.in_features, tokens * sites

    def _backwards(self) -> bool:
        forwards, backwards = (sum(cost for cost, _ in self._costs(way)) for way in (False, True))
        return backwards < forwards

    def _intermediate(self) -> int:
        return max(numbers for _, numbers in self._costs(self._backwards()))

    def dense(self) -> Tensor:
        """W (out, in)."""
        cores = tuple(wide(core) for core in self.cores)
        return Chain(cores, cores[0].new_zeros(())).reconstruct().to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """W (out, in) for code that looks at ``layer.weight``: dtype, device and shape are free, use builds W."""
        return WeightView(self)

    def flops(self, tokens: int) -> int:
        """Twice the multiply-adds of the cheaper way.

        site by site, from either end: tokens times the sum over sites of o_1 ... o_k i_k ... i_N r_{k-1} r_k
        by slabs: tokens m n and the sum over sites of o_k ... o_N i_k ... i_N r_{k-1} r_k
        """
        return 2 * min(self._ways(tokens))

    def _options(self) -> dict[str, Any]:
        return {
            "output_factors": list(self.output_factors),
            "input_factors": list(self.input_factors),
            "ranks": list(self.ranks),
        }
