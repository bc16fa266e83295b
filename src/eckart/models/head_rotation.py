"""How queries and keys are turned by their position (RoPE), measured from what goes into and comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Rotation", "find_rotation"]

Pairing = Literal["half", "interleaved"]


@dataclass(frozen=True)
class Rotation:
    """Pairs of coordinates of a head, each turned by an angle that grows with the position.

    Attributes:
        pairing: "half" (coordinate i with i + size / 2) or "interleaved" (2 i with 2 i + 1).
        size: Coordinates that are turned; those after them stay.
        angles: (size / 2,) float64, radians for one position.
    """

    pairing: Pairing
    size: int
    angles: Tensor = field(repr=False)

    def turn(self, rows: Tensor, positions: float) -> Tensor:
        """Turn the rows of a map (..., h, d), or vectors (..., h, 1), by a number of positions.

        Example:
            >>> quarter = Rotation("half", 2, torch.tensor([torch.pi / 2]))
            >>> quarter.turn(torch.tensor([[1.0], [0.0]]), 1).flatten().abs().round().tolist()
            [0.0, 1.0]
        """
        turned = rows.clone()
        first, second = _pairs(self.pairing, self.size)
        angles = self.angles.to(rows.device) * positions
        cos, sin = angles.cos().to(rows.dtype)[:, None], angles.sin().to(rows.dtype)[:, None]
        a, b = rows[..., first, :], rows[..., second, :]
        turned[..., first, :] = cos * a - sin * b
        turned[..., second, :] = sin * a + cos * b
        return turned


def find_rotation(states: Sequence[tuple[Tensor, Tensor]], loose: float) -> Rotation | None:
    """The one rotation by position that turns each first of these pairs into its second, if there is one.

    The angle of a pair of coordinates is taken from the second token, and made more exact with every later one.

    Args:
        states: Pairs of (batch, tokens, heads, h) float64; lengths may differ, by a factor for each token and head.
        loose: How much may remain, relative.

    Returns:
        The rotation, or None.
    """
    states = [
        (a * (b.norm(dim=-1, keepdim=True) / a.norm(dim=-1, keepdim=True).clamp(min=1e-30)), b) for a, b in states
    ]
    tokens, width = states[0][0].shape[1], states[0][0].shape[3]
    if tokens < 2:
        return None
    for size in range(width - width % 2, 0, -2):
        for pairing in ("half", "interleaved"):
            first, second = _pairs(pairing, size)
            # conj(before) * after, summed over batch and heads: its phase is the angle of each token and pair
            product = sum(
                (torch.complex(a[..., first], -a[..., second]) * torch.complex(b[..., first], b[..., second])).sum(
                    dim=(0, 2)
                )
                for a, b in states
            )
            assert isinstance(product, Tensor)
            angles = product[1].angle()
            for token in range(2, tokens):
                rest = product[token] * torch.polar(torch.ones_like(angles), -angles * token)
                angles = angles + rest.angle() / token
            found = Rotation(pairing, size, angles)
            if all(_fits(found, a, b, loose) for a, b in states):
                return found
    return None


def _fits(rotation: Rotation, before: Tensor, after: Tensor, loose: float) -> bool:
    turned = [rotation.turn(before[:, token, :, :, None], token)[..., 0] for token in range(before.shape[1])]
    return bool((torch.stack(turned, dim=1) - after).norm() <= loose * after.norm())


def _pairs(pairing: Pairing, size: int) -> tuple[slice, slice]:
    if pairing == "half":
        return slice(0, size // 2), slice(size // 2, size)
    return slice(0, size, 2), slice(1, size, 2)
