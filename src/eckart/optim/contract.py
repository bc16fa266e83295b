"""What an optimizer that projects gradients is made of, and what a method has to say to be one.

    W ← W - lr (decay W + D),   D (m, n) = method.direction(G, state, step)

A method sees one matrix at a time: its gradient G, its own tensors in a dictionary, and the number of the step. All
that it remembers is in that dictionary, from the first step on and under the same keys, so that a saved state is
complete and plain data. Loops over parameters, decay, rounding, accumulation and sharding are the optimizer's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..options import Options
from .moments import State
from .rules import Rule, Rules, rule
from .sharding import lift_product, right_product

__all__ = ["OptimizerMethod", "ProjectedMethod", "Side", "Step", "turned"]

Side = Literal["short", "long", "left", "right"]

_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, fill the interval evenly however many there are


@dataclass(frozen=True)
class Step:
    """Where one parameter is in its training.

    Attributes:
        number: Updates of this parameter, this one included; the first is 1.
        index: Place of the parameter in the optimizer.
        seed: Of the optimizer.
        rate: Learning rate now, as a fraction of the one it was given at the start.
    """

    number: int
    index: int = 0
    seed: int = 0
    rate: float = 1.0

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Source of what is drawn for this parameter in this step, the same in every process and resumed run."""
        mixed = (self.seed * 1_000_003 + self.index) * 1_000_003 + self.number
        return torch.Generator(device).manual_seed(mixed % (1 << 63))

    def due(self, interval: int, *, stagger: bool = True) -> bool:
        """Whether something that is done every ``interval`` updates is done in this one.

        It is at the first. Staggered, the later ones are spread over the interval so that parameters do not take
        their turns in the same step.
        """
        if self.number == 1:
            return True
        return (self.number - 1 + (self.phase(interval) if stagger else 0)) % interval == 0

    def phase(self, interval: int) -> int:
        """By how many updates the turns of this parameter come earlier than those of the first, below ``interval``."""
        return int(interval * ((self.index * _GOLDEN) % 1.0))


@dataclass(frozen=True)
class OptimizerMethod(Options, ABC):
    """A published optimizer with its options: what becomes of the gradient of one matrix.

    A subclass is a frozen dataclass whose further fields are the options of the paper.

    Args:
        rank: r, of the projected gradient; None leaves every matrix to the dense rule.
        rule: What is done with the projected gradient: "adamw", "adafactor", "lion" or "sgd".
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        bits: Of each stored moment, 32 or 8.
        trains_rest: Whether parameters that the method is not applied to are trained, by the dense rule.

    Raises:
        ValueError: A number makes no sense.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    rank: int | None = None
    rule: Rules = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    bits: int = 32
    trains_rest: bool = True

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        self.check_choices(rule=Rules)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, not {self.betas}")
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, not {self.eps}")
        if self.bits not in (8, 32):
            raise ValueError(f"bits must be 8 or 32, not {self.bits}")

    def moments(self) -> Rule:
        """The update rule with this method's numbers."""
        return rule(self.rule, self.betas, self.eps, self.bits)

    @abstractmethod
    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the method is applied to a parameter of this shape; the others take the dense rule."""

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Refuse a parameter that fits but cannot be treated with these options.

        Args:
            name: Of the parameter.
            shape: Of all of it.

        Raises:
            ValueError: With the name and a remedy.
        """

    @abstractmethod
    def allocate(self, like: Tensor) -> State:
        """Everything that is remembered of one matrix, as zeros.

        Args:
            like: (m, n) of the shape, device and placement of the parameter, in the dtype of the arithmetic.
        """

    @abstractmethod
    def direction(self, gradient: Tensor, state: State, step: Step, weight: Tensor) -> Tensor:
        """D (m, n), the update without learning rate and decay; brings ``state`` up to date in place.

        Args:
            gradient: (m, n) in the dtype of the arithmetic; not to be changed.
            state: As `allocate` gave it.
            step: Where the parameter is in its training.
            weight: (m, n), the parameter; not to be changed.
        """

    def decay_mask(self, weight: Tensor, state: State) -> Tensor | None:
        """Where weight decay acts: booleans (m, n) placed as ``weight``, or None for everywhere."""
        return None

    def check_positive(self, **numbers: float) -> None:
        """Refuse an option that is not above 0.

        Raises:
            ValueError: Which, and what it is.
        """
        for name, value in numbers.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")


@dataclass(frozen=True)
class ProjectedMethod(OptimizerMethod):
    """A method that keeps the moments of a projected gradient, and lifts what its rule makes of it.

        A = G or Gᵀ (a, b),   R = A Q,   D = scale · N(R) Qᵀ, turned back,   Q (b, r) with Qᵀ Q = I

    Whichever side of G (m, n) is projected, the gradient is turned so that it is the second one; R (a, r) then has its
    long axis first, and with it the moments. Of a sharded gradient the rows of R are sharded.

    A subclass says how Q follows the gradient (`project`), and if it likes what else is added (`combine`).

    Args:
        scale: Multiplies the lifted update; 0.25 in GaLore.
        side: Of the matrix to be projected: "short", "long", "left" (rows) or "right" (columns).
    """

    scale: float = 0.25
    side: Side = "short"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(scale=self.scale)
        self.check_choices(side=Side)

    def fits(self, shape: Sequence[int]) -> bool:
        """A matrix whose projected side is longer than the rank."""
        if len(shape) != 2 or self.rank is None:
            return False
        return turned(torch.empty(tuple(shape), device="meta"), self.side).shape[1] > self.rank

    def allocate(self, like: Tensor) -> State:
        """Basis and moments."""
        a = turned(like, self.side)
        assert self.rank is not None
        basis = torch.zeros(a.shape[1], self.rank, dtype=like.dtype, device=like.device)
        return {**self.allocate_basis(basis), **self.moments().allocate(torch.zeros_like(right_product(a, basis)))}

    def allocate_basis(self, basis: Tensor) -> State:
        """What is remembered of the subspace, as zeros, given a Q (b, r) of zeros."""
        return {"basis": basis}

    def direction(self, gradient: Tensor, state: State, step: Step, weight: Tensor) -> Tensor:
        """Projects, applies the rule, lifts."""
        a = turned(gradient, self.side)
        low = self.project(a, state, step)
        n = self.apply_rule(low, state, step)
        update = self.combine(a, low, n, state, step)
        return update if a is gradient else update.mT

    @abstractmethod
    def project(self, a: Tensor, state: State, step: Step) -> Tensor:
        """R (a, r), after Q has been brought up to date.

        Args:
            a: A (a, b).
            state: Of this matrix.
            step: Where the parameter is in its training.
        """

    def apply_rule(self, low: Tensor, state: State, step: Step) -> Tensor:
        """N (a, r), what the rule makes of R (a, r); brings the moments up to date."""
        return self.moments().direction(low, state, step.number)

    def lift(self, n: Tensor, a: Tensor, state: State) -> Tensor:
        """n Qᵀ (a, b), placed as ``a``, for n (a, r)."""
        return lift_product(n, state["basis"].to(n.dtype), a)

    def combine(self, a: Tensor, low: Tensor, n: Tensor, state: State, step: Step) -> Tensor:
        """The update (a, b) from what the rule made of R.

        Args:
            a: A (a, b).
            low: R (a, r).
            n: N (a, r).
            state: Of this matrix.
            step: Where the parameter is in its training.
        """
        return self.lift(n * self.scale, a, state)


def turned(gradient: Tensor, side: Side) -> Tensor:
    """G or Gᵀ, so that the side to be projected is the second axis.

    Args:
        gradient: (m, n).
        side: "short" projects the shorter axis, as GaLore; "long" the other; "left" the first; "right" the second.

    Example:
        >>> tuple(turned(torch.zeros(2, 5), "short").shape), tuple(turned(torch.zeros(2, 5), "right").shape)
        ((5, 2), (2, 5))
    """
    rows, columns = gradient.shape
    right = {"short": rows >= columns, "long": rows < columns, "left": False, "right": True}[side]
    return gradient if right else gradient.mT
