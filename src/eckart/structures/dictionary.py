"""What structures with a dictionary share: Wᵀ = D S with a dense D (n, k) and a sparse S (k, m).

They differ in which s of the k atoms an output uses, and in how the positions are stored.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..linalg import LinalgError, all_finite
from .base import Structure, empty_parameter, wide
from .weight import WeightView

__all__ = ["DictionaryStructure", "check_codes", "index_dtype", "row_codes"]


def index_dtype(size: int) -> torch.dtype:
    """The smallest integer type that counts ``size`` things from 0.

    Example:
        >>> index_dtype(256), index_dtype(257)
        (torch.uint8, torch.int16)
    """
    return torch.uint8 if size <= 1 << 8 else torch.int16 if size <= 1 << 15 else torch.int32


class DictionaryStructure(Structure):
    """A weight W (out, in) of which each output combines s of the k atoms of one dictionary.

    A subclass adds ``values`` and the positions, and writes ``codes``; ``forward`` and ``flops`` too if it has a way
    around the zeros of S.

    Args:
        in_features: Columns n of W.
        out_features: Rows m of W.
        atoms: Number k of atoms, columns of D.
        sparsity: Number s of atoms that an output uses, at most k.
        bias: Whether a bias (out,) is added.
        device: Device of the parameters.
        dtype: Dtype of the parameters, not of the positions.

    Attributes:
        dictionary: D (n, k).

    Raises:
        ValueError: A size makes no sense.
    """

    dictionary: Tensor
    values: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        atoms: int,
        sparsity: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        if not 1 <= sparsity <= atoms:
            raise ValueError(f"sparsity must be from 1 to the {atoms} atoms, not {sparsity}")
        self.atoms, self.sparsity = atoms, sparsity
        self.dictionary = empty_parameter(in_features, atoms, device=device, dtype=dtype)

    @abstractmethod
    def codes(self) -> Tensor:
        """Sᵀ (m, k) with its zeros; differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        """y = (x D) S + b for x (..., in), by S with its zeros; W is not built."""
        inner, codes = x @ self.dictionary, self.codes().mT
        return inner @ codes if self.bias is None else inner @ codes + self.bias

    def flops(self, tokens: int) -> int:
        """2 tokens k (n + m): the product with S runs over its zeros too."""
        return 2 * tokens * self.atoms * (self.in_features + self.out_features)

    def dense(self) -> Tensor:
        """W = (D S)ᵀ (out, in)."""
        return (wide(self.codes()) @ wide(self.dictionary).mT).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """W (out, in) for code that looks at ``layer.weight``: dtype, device and shape are free, use builds W."""
        return WeightView(self)

    @torch.no_grad()
    def store(self, *, bias: Tensor | None, **tensors: Tensor) -> None:
        """Copy tensors into those of the same name, and the bias.

        Raises:
            LinalgError: NaN or Inf, or values beyond the range of the dtype.
        """
        for name, tensor in tensors.items():
            getattr(self, name).copy_(tensor)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        if not all(all_finite(parameter) for parameter in self.parameters()):
            raise LinalgError(f"dictionary, values or bias hold NaN or Inf in {self.dtype}: check them, or store wider")

    def _options(self) -> dict[str, Any]:
        return {"atoms": self.atoms, "sparsity": self.sparsity}


def check_codes(index: Tensor, atoms: int, bias: Tensor | None, outputs: int) -> None:
    """Refuse positions that no atom has, and a bias of another length.

    Raises:
        ValueError: Saying which.
    """
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < atoms:
        raise ValueError(f"index must hold numbers from 0 to {atoms - 1}, not {int(index.min())} to {int(index.max())}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be ({outputs},), got {tuple(bias.shape)}")


def row_codes(dictionary: Tensor, index: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions and values of each output in ascending order of the positions, after checking that they fit.

    Args:
        dictionary: D (n, k).
        index: (m, s) integers from 0 to k - 1, distinct in each row, in any order.
        values: (m, s), the entry of S at each position.
        bias: (m,) or None.

    Returns:
        Positions (m, s) int64 and values (m, s), on the device of ``dictionary``.

    Raises:
        ValueError: Shapes do not fit, an index is out of range or stands twice in a row.
    """
    if dictionary.ndim != 2 or values.ndim != 2 or index.shape != values.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (dictionary, index, values))
        raise ValueError(f"dictionary, index and values must be (n, k), (m, s) and (m, s), got {shapes}")
    check_codes(index, dictionary.shape[1], bias, len(values))
    ascending = index.to(device=dictionary.device, dtype=torch.int64).sort(dim=1)
    if bool((ascending.values.diff(dim=1) == 0).any()):
        raise ValueError("index names an atom twice for one output; add up the values of both")
    return ascending.values, values.to(dictionary.device).gather(1, ascending.indices)
