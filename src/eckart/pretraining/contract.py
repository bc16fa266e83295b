"""What a network is like before its first step, and what a method has to say about it.

An initialisation sees widths, activations and the moments of the data, and answers with weights. The verb finds the
layers, checks everything before anything is changed, and writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..models.chain import Activation
from ..options import Options
from .moments import JointMoments

__all__ = ["Affine", "Initialization", "InitializationMethod", "PretrainingMethod"]


class Affine(NamedTuple):
    """x ↦ weight x + bias: weight (out, in), bias (out,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Initialization:
    """The weights that a network starts with, and what they come to.

    Attributes:
        layers: One a linear layer, float64.
        rank: Of the linear map that the network starts near to.
        error: Mean squared error of that map on the data, summed over the outputs.
        explained: Share of the targets' variance that it accounts for.
        warnings: What the reader has to know.
    """

    layers: list[Affine] = field(repr=False)
    rank: int
    error: float
    explained: float
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PretrainingMethod(Options, ABC):
    """What methods of this family have in common.

    Attributes:
        needs: "data" for rows of inputs and targets.
    """

    needs: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class InitializationMethod(PretrainingMethod):
    """A published initialisation with its options.

    A subclass is a frozen dataclass whose fields are the options of the paper.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})

    @abstractmethod
    def initialize(
        self,
        widths: Sequence[int],
        activations: Sequence[Activation],
        moments: JointMoments,
        generator: torch.Generator,
    ) -> Initialization:
        """Weights of a network.

        Args:
            widths: Inputs, hidden layers, outputs; two numbers more than there are hidden layers.
            activations: One a hidden layer.
            moments: Of inputs and targets.
            generator: Source of all that is drawn.
        """
