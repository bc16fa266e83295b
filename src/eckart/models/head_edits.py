"""Change what a head writes to the residual stream along given directions: in its weights, or on the way.

    weights:      O <- (I + (scale - 1) B B^T) O,   B (d, k) orthonormal, O (d, w) the head's columns
    activations:  o <- o + B (c' - c),              c = B^T o,  o = O z the head's output for a token

Directions are those of `eckart.models.head_maps`. Where a norm with a gain g lies between the output projection and
the stream, they live behind it: B becomes diag(1/g) B on the left and diag(g) B on the right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import Tensor, nn

from .head_maps import HeadLayer

__all__ = ["Edit", "changing_output", "rescale_written"]


class Edit:
    """A change of a weight that can be taken back, to the last bit; also as a context manager."""

    def __init__(self, view: Tensor, new: Tensor) -> None:
        self._view = view
        self._before: Tensor | None = view.clone()
        with torch.no_grad():
            view.copy_(new)

    def undo(self) -> None:
        """Put the old values back; doing so again does nothing. Several edits are taken back last one first."""
        if self._before is not None:
            with torch.no_grad():
                self._view.copy_(self._before)
            self._before = None

    def __enter__(self) -> Edit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def rescale_written(layer: HeadLayer, head: int, basis: Tensor, scale: float) -> Edit:
    """Rescale what a head writes along orthonormal directions, in the output projection.

    Args:
        layer: of :func:`~eckart.models.head_maps.attention_layers`.
        head: number of the query head.
        basis: (d, k) orthonormal columns.
        scale: 1 changes nothing, 0 removes it, -1 turns it around.

    Returns:
        The edit; call ``undo``, or use it in a ``with`` statement. A matrix shared with other modules changes there.

    Raises:
        ValueError: no such head, or the weight is not stored as a plain matrix.
    """
    columns = _columns(layer, head)
    if layer.output.kind == "structure":
        raise ValueError(
            f"{layer.name} is factored, so no head has columns of its own; export the model as dense first"
        )
    view = layer.output.weight.detach()[:, columns]
    left, right = _sides(layer, basis)
    wide = view.double()
    return Edit(view, (wide + (scale - 1) * left @ (right.T @ wide)).to(view.dtype))


@contextlib.contextmanager
def changing_output(
    layer: HeadLayer,
    head: int,
    basis: Tensor,
    change: Callable[[Tensor], Tensor],
    *,
    only: bool = False,
    position: int | None = None,
) -> Iterator[None]:
    """Change what a head writes along orthonormal directions, while a model runs.

    Args:
        layer: of :func:`~eckart.models.head_maps.attention_layers`.
        head: number of the query head.
        basis: (d, k) orthonormal columns.
        change: from the coefficients (batch, tokens, k) of the head's output, float32 or float64, to the new ones.
        only: also drop everything else that the head writes.
        position: of the one token to change, from the end if negative; default all tokens.

    Raises:
        ValueError: no such head.
    """
    columns = _columns(layer, head)
    dtype = torch.promote_types(torch.float32, layer.output.dtype)
    weight = layer.output.weight.detach()[:, columns].to(dtype)
    left, right = (side.to(dtype) for side in _sides(layer, basis))

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        z = args[0][..., columns].to(dtype)
        written = z @ weight.T
        before = written @ right
        moved = change(before) @ left.T - (written if only else before @ left.T)
        if position is not None:
            kept = torch.zeros(moved.shape[-2], 1, dtype=dtype, device=moved.device)
            kept[position] = 1
            moved = moved * kept
        return output + moved.to(output.dtype)

    handle = layer.output.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _columns(layer: HeadLayer, head: int) -> slice:
    if not 0 <= head < layer.heads:
        raise ValueError(f"{layer.name} has the heads 0 to {layer.heads - 1}, not {head}")
    width = layer.output.in_features // layer.heads
    return slice(head * width, (head + 1) * width)


def _sides(layer: HeadLayer, basis: Tensor) -> tuple[Tensor, Tensor]:
    """What B and B^T become where the output projection is, before the gain of a norm; (d, k) float64 each."""
    wide = basis.double().to(layer.output.weight.device)
    if layer.written_gain is None:
        return wide, wide
    gain = layer.written_gain.to(wide)[:, None]
    return torch.where(gain == 0, 0, wide / torch.where(gain == 0, 1, gain)), wide * gain
