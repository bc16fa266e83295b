"""Jacobians of recorded tensors: whole ones by batches of gradients, and products with them without forming them.

J = d output / d source,  output (k,), source (..., d);    rows J^T w by reverse mode,  J x = d <J^T w, x> / dw
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["jacobians", "linear_part", "products"]


def jacobians(output: Tensor, sources: Sequence[Tensor], *, chunk: int = 64) -> list[Tensor]:
    """Jacobians of one vector for several tensors of its graph, by k vector-Jacobian products for all of them.

    Memory: the results, and ``chunk`` times the gradients of one layer's activations.

    Args:
        output: (k,), recorded.
        sources: What it was computed from, of any shapes.
        chunk: Rows a pass.

    Returns:
        (k, *shape) for each source; zeros where the output does not depend on it.

    Raises:
        ValueError: chunk below 1.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> jacobians(x * x, [x])
        [tensor([[2., 0.],
                [0., 4.]])]
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    found = [source.new_empty((len(output), *source.shape)) for source in map(torch.Tensor.detach, sources)]
    for start in range(0, len(output), chunk):
        rows = torch.eye(len(output), dtype=output.dtype, device=output.device)[start : start + chunk]
        for whole, part in zip(found, _gradients(output, sources, rows), strict=True):
            whole[start : start + chunk] = 0 if part is None else part
    return found


def products(
    output: Tensor, source: Tensor, *, chunk: int = 64
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Products with the Jacobian J (k, n) of ``output`` (k,) for ``source`` of n entries, flattened.

    Returns:
        x (n, b) -> J x (k, b), and y (k, b) -> J^T y (n, b), for `eckart.linalg.svd_operator`. Work of a column: a
        backward pass, or two.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> times, transposed = products(x * x, x)
        >>> times(torch.ones(2, 1)).flatten().tolist()
        [2.0, 4.0]
    """
    weight = torch.zeros_like(output, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(output, source, weight, create_graph=True)

    def times(x: Tensor) -> Tensor:
        columns = [
            _gradients(gradient, [weight], part.reshape(-1, *source.shape))[0] for part in x.detach().mT.split(chunk)
        ]
        return _columns(columns, len(output), x)

    def transposed(y: Tensor) -> Tensor:
        columns = [_gradients(output, [source], part)[0] for part in y.detach().mT.split(chunk)]
        return _columns([None if part is None else part.flatten(1) for part in columns], source.numel(), y)

    return times, transposed


def linear_part(output: Tensor, sources: Sequence[Tensor]) -> Tensor:
    """What the derivatives make of the sources themselves, sum_i (d output / d source_i) source_i, (k,).

    Of a map that is linear in all of them together, this is the output.

    Example:
        >>> x, b = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
        >>> linear_part(2 * x + b, [x, b]), linear_part(x * x, [x])
        (tensor([7.]), tensor([18.]))
    """
    weight = torch.zeros_like(output, requires_grad=True)
    with torch.enable_grad():
        found = torch.autograd.grad(output, list(sources), weight, create_graph=True, allow_unused=True)
        pairs = zip(found, sources, strict=True)
        total = sum(((g * source.detach()).sum() for g, source in pairs if g is not None), weight.sum() * 0)
    (result,) = torch.autograd.grad(total, weight)
    return result


def _gradients(output: Tensor, sources: Sequence[Tensor], rows: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of every row's product with the output, (rows, *shape) each."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        output, list(sources), rows.contiguous(), retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    return found


def _columns(parts: list[Tensor | None], size: int, like: Tensor) -> Tensor:
    kept = [part for part in parts if part is not None]
    return torch.cat(kept).mT if kept else like.new_zeros(size, like.shape[1])
