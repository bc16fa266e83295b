"""Wᵀ = D S: a dense dictionary times codes with few nonzeros, whose positions neighbouring outputs share.

    Wᵀ (n, m) = D (n, k) S (k, m),   block b of c outputs:  W_bᵀ = D[:, index_b] values_b,   values_b (s, c)

Low rank makes every output of the same k directions; here each block of c outputs picks its own s of the k atoms, so
s = k is low rank again. Stored are n k + s m numbers and s m / c small integers. For one token the shared positions
turn the sparse product into one gather of the k inner features and m / c dense products of s by c. For more tokens the
gather moves s m / c numbers for each, which takes several times as long as the product with all of S.

Reference: Chand et al., "DSFormer: Effective Compression of Text-Transformers by Dense-Sparse Weight Factorization",
2023, arXiv:2312.13211, for dense times semi-structured sparse; the layout is ours.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .base import empty_parameter
from .dictionary import DictionaryStructure, check_codes, index_dtype

__all__ = ["BlockSparseDictionary"]


class BlockSparseDictionary(DictionaryStructure):
    """A weight W (out, in) of which each block of outputs combines a few atoms of one dictionary.

    Args:
        in_features: Columns n of W.
        out_features: Rows m of W.
        atoms: Number k of atoms, columns of D.
        sparsity: Number s of atoms that a block uses, at most k.
        block: Number c of neighbouring outputs that share their atoms; divides m. 1 for positions of their own.
        bias: Whether a bias (out,) is added.
        device: Device of the parameters.
        dtype: Dtype of the parameters; ``index`` has the smallest integer type that holds k.

    Attributes:
        dictionary: D (n, k).
        values: (m / c, s, c).
        index: (m / c, s), the atoms of each block.

    Raises:
        ValueError: A size makes no sense.

    Example:
        >>> dictionary = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
        >>> index, values = torch.tensor([[2], [0]]), torch.tensor([[[1.0, 2.0]], [[5.0, 6.0]]])
        >>> layer = BlockSparseDictionary.from_codes(dictionary, index, values)
        >>> layer.dense().tolist(), layer(torch.tensor([1.0, 10.0])).tolist()
        ([[1.0, 1.0], [2.0, 2.0], [5.0, 0.0], [6.0, 0.0]], [11.0, 22.0, 5.0, 6.0])
    """

    type_name: ClassVar[str] = "block_sparse_dictionary"
    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        atoms: int,
        sparsity: int,
        *,
        block: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, atoms, sparsity, bias=bias, device=device, dtype=dtype)
        if block < 1 or out_features % block:
            raise ValueError(f"block must divide the {out_features} outputs, not {block}")
        self.block = block
        blocks = out_features // block
        self.values = empty_parameter(blocks, sparsity, block, device=device, dtype=dtype)
        self.register_buffer("index", torch.zeros(blocks, sparsity, dtype=index_dtype(atoms), device=device))

    @classmethod
    def from_codes(
        cls,
        dictionary: Tensor,
        index: Tensor,
        values: Tensor,
        *,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Store a dictionary and codes.

        Args:
            dictionary: D (n, k).
            index: (m / c, s) integers from 0 to k - 1.
            values: (m / c, s, c).
            bias: (m,).
            dtype: Storage dtype, default that of ``dictionary``.

        Returns:
            The layer, on the device of ``dictionary``.

        Raises:
            ValueError: Shapes do not fit, or an index is out of range.
            LinalgError: NaN or Inf, or values beyond the range of ``dtype``.
        """
        if dictionary.ndim != 2 or values.ndim != 3 or index.shape != values.shape[:2]:
            shapes = ", ".join(str(tuple(t.shape)) for t in (dictionary, index, values))
            raise ValueError(f"dictionary, index and values must be (n, k), (m / c, s) and (m / c, s, c), got {shapes}")
        (n, k), (blocks, s, c) = dictionary.shape, values.shape
        check_codes(index, k, bias, blocks * c)
        common: dict[str, Any] = {"device": dictionary.device, "dtype": dtype or dictionary.dtype}
        layer = cls(n, blocks * c, k, s, block=c, bias=bias is not None, **common)
        layer.store(bias=bias, dictionary=dictionary, values=values, index=index)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """y = x D S + b for x (..., in): for one token by what each block uses, else by S with its zeros."""
        if x.numel() != self.in_features:
            return super().forward(x)
        inner = x.reshape(-1) @ self.dictionary
        chosen = inner[self.index.to(torch.int32)]
        y = torch.bmm(self.values.mT, chosen[..., None]).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def codes(self) -> Tensor:
        """Sᵀ (m, k) with its zeros, differentiable; positions that occur twice in a block add up."""
        index = self.index.to(torch.int64)[:, None].expand(-1, self.block, -1)
        codes = self.values.new_zeros(*index.shape[:2], self.atoms).scatter_add(2, index, self.values.mT)
        return codes.reshape(self.out_features, self.atoms)

    def flops(self, tokens: int) -> int:
        """2 (n k + s m) for one token; else the product with S runs over its zeros too."""
        if tokens != 1:
            return super().flops(tokens)
        return 2 * (self.in_features * self.atoms + self.sparsity * self.out_features)

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "block": self.block}
