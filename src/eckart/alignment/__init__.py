"""Training under a constraint: one short file a published method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .contract import AlignmentMethod, Penalty, RegularizerMethod
from .jacobian_nuclear_norm import JacobianNuclearNorm, jacobian_nuclear_norm, jacobians

if TYPE_CHECKING:
    from .trainer import RegularizedTrainer

__all__ = [
    "AlignmentMethod",
    "JacobianNuclearNorm",
    "Penalty",
    "RegularizedTrainer",
    "RegularizerMethod",
    "jacobian_nuclear_norm",
    "jacobians",
]


def __getattr__(name: str) -> Any:
    # The Trainer takes seconds to import.
    if name == "RegularizedTrainer":
        from .trainer import RegularizedTrainer

        return RegularizedTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
