"""Online Subspace Descent: GaLore whose basis is itself trained, one step of online PCA with every update.

    R = A Q (a, r),   W ← W - lr · scale · N(R) Qᵀ,   A = G or Gᵀ (a, b), Q (b, r)
    ℓ(Q) = ‖A - A Q Qᵀ‖² / ‖A‖² + λ ‖Qᵀ Q - I‖²,   Q ← Q - (1 / T) AdamW(∇ℓ),   after it has projected and lifted

K. Liang, B. Liu, L. Chen, Q. Liu, "Memory-Efficient LLM Training with Online Subspace Descent", 2024, arXiv:2408.12857.
Code: github.com/kyleliang919/Online-Subspace-Descent.

The learning rate of Q is that of the code, 1 / T times the share of the initial one that the schedule has left; the
paper's algorithm writes it as a multiple of the weights', for example 5.

What differs. ∇ℓ is in closed form, O(a b r), so that no second matrix of A's size is needed. The first basis is found
by two steps of orthogonal iteration instead of a full decomposition, and kept in single precision at least. The code
has no λ, and a decay of Q that is its AdamW's default: ``orthogonality=0``, ``basis_decay=0.01``. With ``rule="lion"``
the sign is taken of the lifted momentum, as in the code, so that every entry of W moves by the learning rate. The step
follows torch's AdamW: ε is added to the corrected root, decay comes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .contract import ProjectedMethod, Step
from .moments import State
from .optimizer import ProjectedOptimizer
from .projection import improved_basis, reconstruction_error
from .rules import Lion, Rule, rule
from .sharding import right_product

__all__ = ["OnlineSubspace", "OnlineSubspaceDescent", "OnlineSubspaceDescent8bit"]

BasisRule = Literal["adamw", "sgd"]

_PREFIX = "basis_"  # of the moments of the basis in the state


@dataclass(frozen=True)
class OnlineSubspace(ProjectedMethod):
    """The options of Online Subspace Descent.

    Args:
        update_interval: T, the learning rate of the basis is 1 / T; 200 in the code, 500 at 7B.
        basis_rule: How the basis follows its gradient: "adamw", or "sgd" without momentum, for which T is 4 to 10.
        basis_decay: Decoupled weight decay of the basis; that of the weights in the paper, 0.01 in the code.
        orthogonality: λ, keeps the basis orthonormal; 0 in the code. 0.1 is ours: on rotating matrices it more than
            halved the departure and took nothing from what the basis captures, which 1 did.
    """

    update_interval: int = 200
    basis_rule: BasisRule = "adamw"
    basis_decay: float = 0.0
    orthogonality: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive(update_interval=self.update_interval)
        self.check_choices(basis_rule=BasisRule)
        if not self.basis_decay >= 0 or not self.orthogonality >= 0:
            raise ValueError("basis_decay and orthogonality must not be negative")

    def allocate_basis(self, basis: Tensor) -> State:
        """The basis and its moments."""
        kept = self._basis_moments().allocate(torch.zeros_like(basis))
        return {"basis": basis, **{_PREFIX + name: value for name, value in kept.items()}}

    def project(self, a: Tensor, state: State, step: Step) -> Tensor:
        """R for the Q that is there, which the first gradient gives."""
        if step.number > 1:
            return right_product(a, state["basis"])
        assert self.rank is not None
        basis, low = improved_basis(a, None, self.rank, step.generator(a.device))
        state["basis"].copy_(basis)
        return low

    def apply_rule(self, low: Tensor, state: State, step: Step) -> Tensor:
        """N, of Lion before the sign is taken."""
        moments = self.moments()
        if isinstance(moments, Lion):
            return moments.interpolated(low, state)
        return super().apply_rule(low, state, step)

    def combine(self, a: Tensor, low: Tensor, n: Tensor, state: State, step: Step) -> Tensor:
        """Lifts by the Q that projected, then trains it."""
        lifted = self.lift(n, a, state)
        update = lifted.sign() if self.rule == "lion" else lifted.mul_(self.scale)
        if step.number > 1:
            self._train_basis(a, low, state, step)
        return update

    def _train_basis(self, a: Tensor, low: Tensor, state: State, step: Step) -> None:
        basis = state["basis"]
        slope = reconstruction_error(a, basis, low)[1] + self.orthogonality * orthogonality_gradient(basis)
        moments = {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
        n = self._basis_moments().direction(slope, moments, step.number - 1)
        lr = step.rate / self.update_interval
        basis.mul_(1 - lr * self.basis_decay).sub_(n, alpha=lr)

    def _basis_moments(self) -> Rule:
        betas = (0.9, 0.999) if self.basis_rule == "adamw" else (0.0, 0.0)
        return rule(self.basis_rule, betas, 1e-8, self.bits)


def orthogonality_gradient(basis: Tensor) -> Tensor:
    """Gradient (b, r) of ‖Qᵀ Q - I‖² at Q (b, r), which is 4 Q (Qᵀ Q - I)."""
    return 4 * (basis @ (basis.mT @ basis) - basis)


class OnlineSubspaceDescent(ProjectedOptimizer):
    """AdamW on gradients projected on a basis that is trained. Options as `OnlineSubspace` and `ProjectedOptimizer`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(8, 6))
        >>> optimizer = OnlineSubspaceDescent([weight], lr=0.1, rank=2)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['basis', 'basis_first', 'basis_second', 'first', 'second', 'step']
    """

    method: ClassVar[type[OnlineSubspace]] = OnlineSubspace
    options: ClassVar[dict[str, Any]] = {}


class OnlineSubspaceDescent8bit(OnlineSubspaceDescent):
    """`OnlineSubspaceDescent` with moments of eight bits, those of the basis too."""

    options: ClassVar[dict[str, Any]] = {"bits": 8}
