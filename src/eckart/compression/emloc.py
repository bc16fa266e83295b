"""EMLoC: fine-tune a LoRA on a compressed copy of a model, the emulator, then correct it for the model itself.

    emulator    E (m, n): the rank-k weight whose output on tokens of the task is nearest to W's, as in SVD-LLM
    training    any LoRA on the frozen emulator:   E + c B A,   A (r, n), B (m, r), c = alpha / r
    correction  A = V diag(s) Q^T,  Q (n, r) orthonormal:   A'' = Q^T,   B'' = B V diag(s) - clamp((W - E) Q / c)
                => (W + c B'' A'') x = (E + c B A) x  for x in the span of Q, where nothing is clamped

H.-C. Lin et al., EMLoC: Emulator-based Memory-efficient Fine-tuning with LoRA Correction, NeurIPS 2025, arXiv
2506.12015; code: hsi-che-lin/EMLoC. What differs: the scale c of the LoRA, rank-stabilised too, is taken into account,
where the official code assumes 1; the correction is worked out in float64 from the weights, biases aside, and saved in
float32, where it rounds to half precision before the product. This method makes the emulator; the other two stages are
`eckart.compression.lora_correction`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..linalg import svd
from ..models.calibrate import Statistics
from .contract import WeightMethod

__all__ = ["Corrected", "EMLoC", "check_limit", "correct_factors", "orthonormal_factors"]


@dataclass(frozen=True)
class Corrected:
    """A corrected LoRA of one layer.

    Attributes:
        a: A'' (r, n) with orthonormal rows.
        b: B'' (m, r).
        ratios: (r,) mean |(W - E) q / c| over mean |B'| of each direction, before the limit; inf where B' is zero.
        limit: what they were limited to.
    """

    a: torch.Tensor
    b: torch.Tensor
    ratios: torch.Tensor
    limit: float

    @property
    def clamped(self) -> int:
        """How many directions were corrected only in part."""
        return int((self.ratios > self.limit).sum())


def check_limit(limit: float) -> None:
    """Refuse a limit that is no number of at least 0; inf is one.

    Raises:
        ValueError: saying what to give.
    """
    if not limit >= 0:
        raise ValueError(f"limit must be a number of at least 0, not {limit}; 3 in the paper, inf for no limit")


def orthonormal_factors(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product B A with orthonormal rows of the right factor.

    Args:
        a: A (r, n).
        b: B (m, r).

    Returns:
        A'' (r', n) and B' (m, r'), r' = min(r, n), float64, with B' A'' = B A.
    """
    found = svd(a.double(), driver="exact")
    return found.vh, b.double() @ (found.u * found.s)


def correct_factors(
    a: torch.Tensor, b: torch.Tensor, lost: torch.Tensor, *, scale: float = 1.0, limit: float = 3.0
) -> Corrected:
    """Take off a LoRA what the full weight does and the emulator does not, on the LoRA's own inputs.

        C = lost / scale,   C_i <- C_i min(1, limit mean|B'_i| / mean|C_i|) for each direction i,   B'' = B' - C

    Args:
        a: A'' (r, n) with orthonormal rows, from `orthonormal_factors`.
        b: B' (m, r).
        lost: (W - E) A''^T (m, r).
        scale: c, what the product of the LoRA is multiplied by.
        limit: largest size of the correction of a direction relative to its B'; inf for no limit, 0 for no correction.

    Example:
        >>> weight, emulator = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.diag(torch.tensor([3.0, 2.0, 0.0]))
        >>> a, b = orthonormal_factors(torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([[1.0], [0.0], [0.0]]))
        >>> found = correct_factors(a, b, (weight - emulator).double() @ a.mT)
        >>> ((weight + found.b @ found.a) @ torch.tensor([0.0, 0.0, 1.0]).double()).tolist()
        [2.0, 0.0, 0.0]
    """
    correction = lost.double() / scale
    sizes, own = correction.abs().mean(0), b.double().abs().mean(0)
    # Nothing to correct is a ratio of 0 also where the LoRA is zero.
    ratios = torch.where(sizes > 0, sizes / own, 0.0)
    factors = torch.where(ratios > limit, limit / ratios, 1.0)
    return Corrected(a, b.double() - correction * factors, ratios, limit)


@dataclass(frozen=True)
class EMLoC(WeightMethod):
    """The emulator: rank-k weights by their outputs on calibration tokens, which are to be of the task.

    The same optimum as ``svd-llm`` in its default form; it has no options. `make_emulator` keeps the full model aside.

    Example:
        >>> weight, x = torch.randn(8, 6), torch.randn(99, 6)
        >>> factors = EMLoC().factorize(weight, Statistics(gram=x.T @ x), rank=6)
        >>> torch.allclose(factors.up @ factors.down, weight, atol=1e-4)
        True
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def weight_of_inputs(self, statistics: Statistics) -> torch.Tensor | None:
        """G (n, n)."""
        return statistics.require("gram")
