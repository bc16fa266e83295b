"""Wᵀ = D S: a dense dictionary times codes with s nonzeros in each column, wherever each column wants them.

    Wᵀ (n, m) = D (n, k) S (k, m),   y = (x D) S + b,   column j of S: s values at s positions of its own

Low rank makes every output of the same k directions; here each output picks its own s of k atoms, so that s = k is low
rank again. Positions are kept as a mask of k bits an output, or as s small integers, whichever takes fewer bytes: at
the usual k = 2 s a mask costs 2 bits a value and an index 8 or 16.

``forward`` spreads the values into S (m, k) and multiplies; W itself is never built. On one core, with k = 491 and
s = 245 for 576 inputs and 1536 outputs, that takes 0.6, 2.4 and 29 ms for 1, 64 and 1024 tokens from indices (0.1, 1.3
and 24 ms for the dense matrix), and 4 ms more from a mask. Gathering and summing (``embedding_bag``) takes 1.8, 1.5 and
37 ms, torch's CSR product more than either, and their gradients are slower still. Expect a smaller model, not a faster
one.

Reference: Shopkhoev et al., "CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning", 2025,
arXiv:2509.22075.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from .base import empty_parameter
from .dictionary import DictionaryStructure, index_dtype, row_codes

__all__ = ["Positions", "SparseDictionary", "positions_bytes", "smaller_positions"]

Positions = Literal["mask", "index"]


def positions_bytes(atoms: int, sparsity: int, positions: Positions) -> int:
    """Bytes that the positions of one output take: ceil(k / 8) as a mask, s small integers as an index.

    Example:
        >>> positions_bytes(491, 245, "mask"), positions_bytes(491, 245, "index"), positions_bytes(256, 9, "index")
        (62, 490, 9)
    """
    return -(-atoms // 8) if positions == "mask" else sparsity * index_dtype(atoms).itemsize


def smaller_positions(atoms: int, sparsity: int) -> Positions:
    """The layout that takes fewer bytes; indices on a tie, which are faster."""
    mask, index = (positions_bytes(atoms, sparsity, layout) for layout in get_args(Positions))
    return "index" if index <= mask else "mask"


class SparseDictionary(DictionaryStructure):
    """A weight W (out, in) of which each output combines a few atoms of one dictionary.

    Args:
        in_features: Columns n of W.
        out_features: Rows m of W.
        atoms: Number k of atoms, columns of D.
        sparsity: Number s of atoms that an output uses, at most k.
        positions: "mask": a bit for each atom and output. "index": s integers an output. Default: the smaller one.
        bias: Whether a bias (out,) is added.
        device: Device of the parameters.
        dtype: Dtype of the parameters, not of the positions.

    Attributes:
        dictionary: D (n, k).
        values: (m, s), those of each column of S from the lowest position to the highest.
        mask: (m, ceil(k / 8)) uint8, bit i of byte b stands for atom 8 b + i. Only with a mask.
        index: (m, s), ascending, in the smallest integer type that counts k atoms. Only with indices.

    Raises:
        ValueError: A size makes no sense, unknown positions.

    Example:
        >>> dictionary = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
        >>> index, values = torch.tensor([[2], [0]]), torch.tensor([[1.0], [5.0]])
        >>> layer = SparseDictionary.from_codes(dictionary, index, values)
        >>> layer.dense().tolist(), layer(torch.tensor([1.0, 10.0])).tolist(), layer.nbytes()
        ([[1.0, 1.0], [5.0, 0.0]], [11.0, 5.0], 34)
    """

    type_name: ClassVar[str] = "sparse_dictionary"
    mask: Tensor
    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        atoms: int,
        sparsity: int,
        *,
        positions: Positions | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, atoms, sparsity, bias=bias, device=device, dtype=dtype)
        positions = positions or smaller_positions(atoms, sparsity)
        if positions not in get_args(Positions):
            raise ValueError(f'positions must be "mask" or "index", not {positions!r}')
        self.positions = positions
        self.values = empty_parameter(out_features, sparsity, device=device, dtype=dtype)
        # The first s atoms, so that a module without data is sound too.
        first = torch.arange(sparsity, device=device).expand(out_features, -1)
        self.register_buffer(positions, _pack(first, atoms) if positions == "mask" else first.to(index_dtype(atoms)))

    @classmethod
    def from_codes(
        cls,
        dictionary: Tensor,
        index: Tensor,
        values: Tensor,
        *,
        positions: Positions | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Store a dictionary and codes.

        Args:
            dictionary: D (n, k).
            index: (m, s) integers from 0 to k - 1, distinct in each row, in any order.
            values: (m, s), the entry of S at each position.
            positions: "mask" or "index"; default the smaller one.
            bias: (m,).
            dtype: Storage dtype, default that of ``dictionary``.

        Returns:
            The layer, on the device of ``dictionary``.

        Raises:
            ValueError: Shapes do not fit, an index is out of range or stands twice in a row.
            LinalgError: NaN or Inf, or values beyond the range of ``dtype``.
        """
        index, values = row_codes(dictionary, index, values, bias)
        (n, k), (m, s) = dictionary.shape, values.shape
        common: dict[str, Any] = {"device": dictionary.device, "dtype": dtype or dictionary.dtype}
        layer = cls(n, m, k, s, positions=positions, bias=bias is not None, **common)
        stored = _pack(index, k) if layer.positions == "mask" else index
        layer.store(bias=bias, dictionary=dictionary, values=values, **{layer.positions: stored})
        return layer

    def codes(self) -> Tensor:
        """Sᵀ (m, k) with its zeros; differentiable."""
        empty = self.values.new_zeros(self.out_features, self.atoms)
        if self.positions == "index":
            return empty.scatter(1, self.index.to(torch.int64), self.values)
        return empty.masked_scatter(_unpack(self.mask, self.atoms), self.values)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "positions": self.positions}


def _pack(index: Tensor, size: int) -> Tensor:
    """Bits (m, ceil(size / 8)) uint8 of the positions (m, s)."""
    bits = torch.zeros(len(index), -(-size // 8) * 8, dtype=torch.int32, device=index.device)
    weights = 1 << torch.arange(8, dtype=torch.int32, device=index.device)
    return (bits.scatter(1, index, 1).unflatten(1, (-1, 8)) * weights).sum(dim=2).to(torch.uint8)


def _unpack(mask: Tensor, size: int) -> Tensor:
    """(m, size) bool."""
    bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.flatten(1)[:, :size].to(torch.bool)
