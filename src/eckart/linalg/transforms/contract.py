"""What an orthogonal transform is: a square matrix with QᵀQ = I, applied along one dimension without being formed.

    forward(x) = Q x,   adjoint(x) = Qᵀ x = Q⁻¹ x,   Q (n, n), x with n entries along ``dim``

A subclass says how Q acts on the last dimension of a float32 or float64 tensor. This file adds the checks, the
precision, the choice of the dimension and the dense matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from .._prepare import result_dtype
from ..errors import LinalgError

__all__ = ["OrthogonalTransform"]


class OrthogonalTransform(ABC):
    """An orthonormal linear map along one dimension of a tensor.

    Unlike the decompositions of ``linalg``, a transform is differentiable, any number of times, in its input and, where
    it has some, in its own parameters. It is a plain linear map: NaN or Inf in a vector spreads over the result of that
    vector, and no error is raised. float32 and float64 are computed in their own precision; half precision in float32
    and then rounded back, because a vector loses nothing but its own rounding by that (float16 can overflow where the
    norm of a vector exceeds 65504).

    A transform is a value: it holds its settings or its parameters, never a cache, so it may be kept for the life of an
    optimizer and used on any device. Parameters stay where they are, and are rounded to the precision of the input.
    """

    @property
    def size(self) -> int | None:
        """The one length it applies to; None if it applies to every length."""
        parameter = self._parameter()
        return None if parameter is None else parameter.shape[-1]

    def forward(self, x: Tensor, dim: int = -1) -> Tensor:
        """Q x along ``dim``.

        Args:
            x: Any shape, n >= 1 entries along ``dim``, any real float dtype.
            dim: The dimension that is transformed; the others are a batch.

        Returns:
            The same shape, dtype and device as ``x``.

        Raises:
            LinalgError: ``x`` is integer, boolean or complex, or has the wrong number of entries along ``dim``.
            IndexError: ``x`` has no such dimension.
        """
        return self._along(x, dim, self._forward)

    def adjoint(self, x: Tensor, dim: int = -1) -> Tensor:
        """Qᵀ x along ``dim``, which undoes ``forward``. Arguments, result and errors are those of ``forward``."""
        return self._along(x, dim, self._adjoint)

    __call__ = forward

    def matrix(
        self, n: int | None = None, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Q as a dense matrix (n, n), whose rows are the basis vectors: ``forward(x) = x @ Q.mT`` for dim -1.

        Made by transforming the identity in float64 and rounding once, which in float32 is more accurate than
        ``forward(torch.eye(n))``.

        Args:
            n: Length; may be left out where the transform has a ``size``.
            dtype: Of the result.
            device: Of the result, by default the CPU, or where the parameters are.

        Raises:
            LinalgError: The transform has another size.
            ValueError: ``n`` is missing or not positive.
        """
        parameter = self._parameter()
        if parameter is not None:
            n, device = self.size if n is None else n, device or parameter.device
        if n is None or n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        return self.forward(torch.eye(n, dtype=torch.float64, device=device), dim=-2).to(dtype)

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor:
        """Q x along the last dimension of x (..., m, n), which is float32 or float64 and may be any view."""

    @abstractmethod
    def _adjoint(self, x: Tensor) -> Tensor:
        """Qᵀ x, likewise."""

    def _parameter(self) -> Tensor | None:
        """The tensor (..., n) that it is made from, if any; it fixes the length and the device."""
        return None

    def _along(self, x: Tensor, dim: int, apply: Callable[[Tensor], Tensor]) -> Tensor:
        if not x.is_floating_point():
            raise LinalgError.about("x", x, "is not real floating point", "convert it with .float() first")
        n = x.size(dim)
        if n == 0 or self.size not in (None, n):
            wanted = self.size or "at least 1"
            raise LinalgError.about("x", x, f"has {n} entries along dim {dim}", f"this transform needs {wanted}")
        work = x.to(result_dtype(x))
        if x.ndim == 1:
            return apply(work[None])[..., 0, :].to(x.dtype)
        if dim >= 0:
            dim -= x.ndim  # batched parameters may add dimensions in front
        return apply(work.movedim(dim, -1)).movedim(-1, dim).to(x.dtype)
