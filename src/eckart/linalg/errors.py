"""The one error that matrix functions raise."""

from __future__ import annotations

from torch import Tensor

__all__ = ["LinalgError"]


class LinalgError(RuntimeError):
    """A matrix computation has no right answer for this input.

    The message names the argument, its shape and dtype, what is wrong, and what to do about it.

    Example:
        >>> import torch
        >>> from eckart.linalg import LinalgError, svd
        >>> try:
        ...     svd(torch.tensor([[1.0, float("nan")]]))
        ... except LinalgError as error:
        ...     print(error)
        a: shape (1, 2), dtype float32: contains NaN or Inf; find where it comes from, or mask it
    """

    @classmethod
    def about(cls, name: str, tensor: Tensor, problem: str, remedy: str) -> LinalgError:
        """Builds the error for the argument ``name`` that holds ``tensor``."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(f"{name}: shape {tuple(tensor.shape)}, dtype {dtype}: {problem}; {remedy}")
