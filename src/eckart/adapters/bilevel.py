"""Learning on two levels: which data each level sees and when, and the gradient of the upper one through the lower.

    lower level: V(E) = argmin_V C_L(V, E) on data D_1      upper level: min_E C_U(V(E), E) on data D_2

T_1 steps of the lower level and T_2 of the upper one take turns, as in DARTS (H. Liu, K. Simonyan, Y. Yang, 2018, arXiv
1806.09055), from which the hypergradient is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Level", "alternating_order", "hypergradient", "level_at", "split_indices"]

Level = Literal["lower", "upper"]
Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def level_at(step: int, lower_steps: int, upper_steps: int) -> Level:
    """What learns in the step after ``step`` steps.

    Example:
        >>> [level_at(step, lower_steps=2, upper_steps=1) for step in range(4)]
        ['lower', 'lower', 'upper', 'lower']
    """
    return "lower" if step % (lower_steps + upper_steps) < lower_steps else "upper"


def split_indices(examples: int | Sequence[int], fraction: float = 0.8, seed: int = 0) -> tuple[list[int], list[int]]:
    """D_1 and D_2: two disjoint parts that together are all examples, each in ascending order.

    Args:
        examples: How many there are, or their labels, for the same share of each label in both parts.
        fraction: Share of D_1.
        seed: Of the draw.

    Raises:
        ValueError: A part would be empty.

    Example:
        >>> one, two = split_indices([0, 0, 0, 0, 1, 1, 1, 1], fraction=0.75)
        >>> len(one), len(two), sum(index < 4 for index in two)
        (6, 2, 1)
    """
    labels = [0] * examples if isinstance(examples, int) else list(examples)
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    # Sorted by label and then dealt out evenly: every label is split within one example of its share.
    by_label = sorted(drawn, key=lambda index: labels[index])
    lower = [by_label[i] for i in range(len(labels)) if round((i + 1) * fraction) > round(i * fraction)]
    upper = sorted(set(drawn) - set(lower))
    if not lower or not upper:
        raise ValueError(
            f"a share of {fraction} of {len(labels)} examples leaves one of two parts empty; give more examples, or "
            "another share"
        )
    return sorted(lower), upper


def alternating_order(
    lower: Sequence[int],
    upper: Sequence[int],
    lower_steps: int,
    upper_steps: int,
    batch_size: int,
    steps: int,
    seed: int = 0,
) -> list[int]:
    """An order of examples that, read in sequence, gives D_1 to the lower steps and D_2 to the upper ones.

    Each part is read through in random order, then again in another.

    Args:
        lower: D_1.
        upper: D_2.
        lower_steps: T_1.
        upper_steps: T_2.
        batch_size: Examples in one optimizer step.
        steps: Optimizer steps of the whole run.
        seed: Of the orders.

    Returns:
        ``steps * batch_size`` indices.

    Raises:
        ValueError: A part is empty.

    Example:
        >>> alternating_order([0, 1], [2], lower_steps=2, upper_steps=1, batch_size=1, steps=6)[2::3]
        [2, 2]
    """
    if not lower or not upper:
        raise ValueError(f"both parts need examples, not {len(lower)} and {len(upper)}; see split_indices")
    generator = torch.Generator().manual_seed(seed)

    def endless(part: Sequence[int]) -> Iterator[int]:
        while True:
            yield from (part[i] for i in torch.randperm(len(part), generator=generator).tolist())

    parts = {"lower": endless(lower), "upper": endless(upper)}
    levels = [level_at(step, lower_steps, upper_steps) for step in range(steps)]
    return [index for level in levels for index in islice(parts[level], batch_size)]


def hypergradient(
    lower: Loss, upper: Loss, inner: Sequence[Tensor], outer: Sequence[Tensor], xi: float, *, epsilon: float = 0.01
) -> list[Tensor]:
    """Gradient in E of the upper loss after one lower step, ∂/∂E C_U(V - ξ ∂C_L/∂V (V, E), E).

        ∂C_U/∂E (V', E) - ξ (∂C_L/∂E (V + h v, E) - ∂C_L/∂E (V - h v, E)) / (2 h),   V' = V - ξ ∂C_L/∂V,
        v = ∂C_U/∂V (V', E),   h = ε / ||v||

    Three gradients of the lower loss and one of the upper one. The losses are functions of V and E, such as
    `torch.func.functional_call` of a model makes them. Give it the model in evaluation mode: there no level is held
    still, and no dropout spoils the differences. In an upper step of a loop of your own put the result into the
    ``grad`` of the θ (the parameters named ``core``) and leave all others at None.

    Args:
        lower: C_L(V, E), a number.
        upper: C_U(V, E), a number.
        inner: V.
        outer: E.
        xi: ξ, the lower step; 0 for the first-order gradient. It should be the step that the optimizer really makes.
        epsilon: ε.

    Returns:
        One tensor for each of E. Nothing is changed.

    Example:
        >>> v, e = torch.tensor([1.0]), torch.tensor([2.0])
        >>> lower = lambda inner, outer: (0.5 * inner[0] ** 2 * outer[0]).sum()  # V' = v - 0.1 v e = 0.8
        >>> hypergradient(lower, lambda inner, outer: inner[0].sum(), [v], [e], xi=0.1)
        [tensor([-0.1000])]
    """
    moved = [part.detach().requires_grad_() for part in inner]
    weights = [part.detach().requires_grad_() for part in outer]

    def gradient(loss: Loss, at: Sequence[Tensor], of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(at, weights), of, materialize_grads=True)

    start = [part.detach() for part in inner]
    if xi != 0:
        step = gradient(lower, moved, moved)
        moved = [(part - xi * g).requires_grad_() for part, g in zip(start, step, strict=True)]
    found = gradient(upper, moved, [*moved, *weights])
    direction, direct = found[: len(moved)], list(found[len(moved) :])
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in direction))
    if xi == 0 or norm == 0:
        return direct
    h = epsilon / norm
    ahead, behind = (
        gradient(lower, [part + sign * g for part, g in zip(start, direction, strict=True)], weights)
        for sign in (h, -h)
    )
    return [d - xi * (a - b) / (2 * h) for d, a, b in zip(direct, ahead, behind, strict=True)]
