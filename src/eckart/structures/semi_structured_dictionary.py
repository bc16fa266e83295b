"""Wᵀ = D S: a dense dictionary times an N:M sparse matrix, N nonzeros in each M neighbours of a column.

    Wᵀ (n, m) = D (n, k) S (k, m),   column j of S: of rows M g ... M g + M - 1 it has N, for each g < k / M

Every output uses s = k N / M of the k atoms, N of each group of M. A position within a group takes 1, 2, 4 or 8 bits:
at 2:4 four of them fill a byte, so that half precision costs an eighth more than the values alone, and single precision
a sixteenth. Fewer choices than a `SparseDictionary` has, and about as many bits: at 2:4 a mask takes as much.

``forward`` spreads the values into S (m, k) and multiplies; W itself is never built. N:M is the pattern that sparse
tensor cores take; torch's kernels for them want S compressed in a layout of their own, which is not used here.

Reference: Chand et al., "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization",
2023, arXiv:2312.13211, for dense times semi-structured sparse; the layout is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .base import empty_parameter
from .dictionary import DictionaryStructure, row_codes

__all__ = ["SemiStructuredDictionary", "packed_bytes", "position_bits"]

_LARGEST = 256  # M beyond which a position needs more than a byte


def position_bits(m: int) -> int:
    """Bits of a position among ``m`` neighbours that fit a byte without a rest: 1, 2, 4 or 8.

    Example:
        >>> [position_bits(m) for m in (2, 4, 8, 16, 32)]
        [1, 2, 4, 4, 8]
    """
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


def packed_bytes(sparsity: int, m: int) -> int:
    """Bytes that the positions of one output take.

    Example:
        >>> packed_bytes(6, 4), packed_bytes(6, 16)
        (2, 3)
    """
    return -(-sparsity * position_bits(m) // 8)


class SemiStructuredDictionary(DictionaryStructure):
    """A weight W (out, in) of which each output combines N of every M atoms of one dictionary.

    Args:
        in_features: Columns n of W.
        out_features: Rows m of W.
        atoms: Number k of atoms, columns of D; a multiple of M.
        n_of_m: (N, M) with 1 <= N <= M <= 256.
        bias: Whether a bias (out,) is added.
        device: Device of the parameters.
        dtype: Dtype of the parameters, not of the positions.

    Attributes:
        dictionary: D (n, k).
        values: (m, s) with s = k N / M, those of each column of S from the lowest position to the highest.
        positions: (m, ceil(s b / 8)) uint8: within its group of M, the position of each value in b bits, the first in
            the lowest bits.

    Raises:
        ValueError: A size makes no sense.

    Example:
        >>> dictionary = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 2.0]])
        >>> index, values = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1.0, 1.0], [3.0, 5.0]])
        >>> layer = SemiStructuredDictionary.from_codes(dictionary, index, values, (1, 2))
        >>> layer.dense().tolist(), layer(torch.tensor([1.0, 10.0])).tolist(), layer.nbytes()
        ([[1.0, 2.0], [10.0, 3.0]], [21.0, 40.0], 50)
    """

    type_name: ClassVar[str] = "semi_structured_dictionary"
    positions: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        atoms: int,
        n_of_m: Sequence[int],
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        kept, group = n_of_m
        if not 1 <= kept <= group <= _LARGEST or atoms % group:
            raise ValueError(
                f"n_of_m must be (N, M) with 1 <= N <= M <= {_LARGEST} and M dividing the {atoms} atoms, "
                f"not ({kept}, {group})"
            )
        sparsity = atoms // group * kept
        super().__init__(in_features, out_features, atoms, sparsity, bias=bias, device=device, dtype=dtype)
        self.n_of_m = (kept, group)
        self.values = empty_parameter(out_features, sparsity, device=device, dtype=dtype)
        # The first N of each group, so that a module without data is sound too.
        first = torch.arange(sparsity, device=device) % kept
        self.register_buffer("positions", _pack(first.expand(out_features, -1), group))

    @classmethod
    def from_codes(
        cls,
        dictionary: Tensor,
        index: Tensor,
        values: Tensor,
        n_of_m: Sequence[int],
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Store a dictionary and codes.

        Args:
            dictionary: D (n, k).
            index: (m, s) integers from 0 to k - 1, N of each group of M neighbours in each row, in any order.
            values: (m, s), the entry of S at each position.
            n_of_m: (N, M).
            bias: (m,).
            dtype: Storage dtype, default that of ``dictionary``.

        Returns:
            The layer, on the device of ``dictionary``.

        Raises:
            ValueError: Shapes do not fit, an index is out of range or stands twice in a row, or a row has another
                number than N in some group.
            LinalgError: NaN or Inf, or values beyond the range of ``dtype``.
        """
        index, values = row_codes(dictionary, index, values, bias)
        (n, k), m = dictionary.shape, len(values)
        common: dict[str, Any] = {"device": dictionary.device, "dtype": dtype or dictionary.dtype}
        layer = cls(n, m, k, n_of_m, bias=bias is not None, **common)
        if values.shape[1] != layer.sparsity or not torch.equal(index // n_of_m[1], layer.groups().expand_as(index)):
            raise ValueError(f"index must name {n_of_m[0]} of each {n_of_m[1]} neighbouring atoms for every output")
        layer.store(bias=bias, dictionary=dictionary, values=values, positions=_pack(index % n_of_m[1], n_of_m[1]))
        return layer

    def groups(self) -> Tensor:
        """The group of M atoms that each value of an output belongs to, (s,) int64."""
        return torch.arange(self.sparsity, device=self.device) // self.n_of_m[0]

    def codes(self) -> Tensor:
        """Sᵀ (m, k) with its zeros; differentiable."""
        _, group = self.n_of_m
        index = self.groups() * group + _unpack(self.positions, group)[:, : self.sparsity]
        return self.values.new_zeros(self.out_features, self.atoms).scatter(1, index, self.values)

    def _options(self) -> dict[str, Any]:
        return {"atoms": self.atoms, "n_of_m": list(self.n_of_m)}


def _pack(positions: Tensor, group: int) -> Tensor:
    """Bits (m, ceil(s b / 8)) uint8 of positions (m, s) within groups."""
    bits = position_bits(group)
    padded = torch.nn.functional.pad(positions, (0, -positions.shape[1] % (8 // bits)))
    shifts = torch.arange(0, 8, bits, device=positions.device)
    return (padded.unflatten(1, (-1, 8 // bits)) << shifts).sum(dim=2).to(torch.uint8)


def _unpack(packed: Tensor, group: int) -> Tensor:
    """(m, s or a few more) int64 positions within groups."""
    bits = position_bits(group)
    shifts = torch.arange(0, 8, bits, device=packed.device)
    return ((packed.to(torch.int64)[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)
