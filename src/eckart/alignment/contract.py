"""Training under a constraint, and what a method has to say about it.

A regulariser sees a network as two functions (`eckart.models.cut.Cut`) and a batch, and gives a penalty that is added
to whatever loss there is. Networks, hooks and trainers are not its business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..models.cut import Cut
from ..options import Options

__all__ = ["AlignmentMethod", "Penalty", "RegularizerMethod"]


@dataclass(frozen=True)
class Penalty:
    """What is added to the loss.

    Attributes:
        value: Scalar, through which gradients flow.
        output: y of the same pass, to work out the loss from.
        parts: What the value is made of, without gradients.
    """

    value: Tensor
    output: Tensor = field(repr=False)
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class AlignmentMethod(Options, ABC):
    """What methods of this family have in common.

    Attributes:
        needs: Statistics that are gathered before training; most ask for none.
    """

    needs: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class RegularizerMethod(AlignmentMethod):
    """A published penalty on the function that a network is.

    A subclass is a frozen dataclass whose fields are the options of the paper.
    """

    @abstractmethod
    def penalty(self, cut: Cut, x: Tensor, generator: torch.Generator, mask: Tensor | None = None) -> Penalty:
        """The penalty on one batch.

        Args:
            cut: The network, f = tail ∘ head.
            x: (batch, ...) real numbers.
            generator: Source of all that is drawn; on any device.
            mask: (batch, tokens), 0 for padding, which then counts for nothing.

        Raises:
            ValueError: The batch cannot be used; the message says why.
        """
