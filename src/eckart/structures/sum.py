"""A sum of structures on one input, such as a dense residual plus a low-rank branch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .base import Structure, structure_from_spec, wide
from .weight import WeightView

__all__ = ["Sum"]


class Sum(Structure):
    """W = W_1 + ... + W_t with one bias: y = x W_1^T + ... + x W_t^T + b.

    Args:
        terms: Structures of one shape, without bias: the Sum has the only one.
        bias: Whether a bias (out,) is added, uninitialised as in every structure; ``add`` moves the terms'
            biases there.
        device: Device of the bias, default that of the terms, which stay where they are.
        dtype: Dtype of the bias, default that of the terms.

    Raises:
        ValueError: No terms, unequal shapes, or a term with a bias of its own.

    Example:
        >>> from eckart.structures import Dense
        >>> one = Dense.from_weight(torch.eye(2))
        >>> Sum([one, one]).dense().tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """

    type_name: ClassVar[str] = "sum"

    def __init__(
        self,
        terms: Iterable[Structure],
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        terms = list(terms)
        shapes = {(term.out_features, term.in_features) for term in terms}
        if len(shapes) != 1:
            raise ValueError(f"a Sum needs one or more terms of one shape (out, in), got {sorted(shapes)}")
        if any(term.bias is not None for term in terms):
            raise ValueError("a term of a Sum has a bias of its own: combine biased structures by add(a, b)")
        first = terms[0]
        super().__init__(
            first.in_features, first.out_features, bias=bias, device=device or first.device, dtype=dtype or first.dtype
        )
        self.terms = nn.ModuleList(terms)

    def parts(self) -> list[Structure]:
        """The terms, typed."""
        return [term for term in self.terms if isinstance(term, Structure)]

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the terms' outputs, in order, plus the bias."""
        first, *others = self.terms
        y: Tensor = first(x)
        for term in others:
            y = y + term(x)
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        """Sum of the terms' weights (out, in), accumulated in float32 or wider."""
        total = torch.stack([wide(term.dense()) for term in self.parts()]).sum(0)
        return total.to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """W (out, in) for code that looks at ``layer.weight``: dtype, device and shape are free, use builds W."""
        return WeightView(self)

    def flops(self, tokens: int) -> int:
        """Sum over the terms; their additions are not counted."""
        return sum(term.flops(tokens) for term in self.parts())

    def _options(self) -> dict[str, Any]:
        return {"terms": [term.spec() for term in self.parts()]}

    @classmethod
    def from_spec(
        cls,
        spec: Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the terms, then the sum; see ``Structure.from_spec``."""
        if spec.get("type") != cls.type_name or "terms" not in spec:
            raise ValueError(f"Sum reads specs of type 'sum' with terms, got type {spec.get('type')!r}")
        terms = [structure_from_spec(term, device=device, dtype=dtype) for term in spec["terms"]]
        total = cls(terms, bias=bool(spec.get("bias", False)), device=device, dtype=dtype)
        if total.spec() != dict(spec):
            raise ValueError(f"spec of a 'sum' structure contradicts its terms: {total.spec()} is what they make")
        return total
