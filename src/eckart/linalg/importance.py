"""Importance of weights and of singular triplets during training, as AdaLoRA defines it. Pure functions.

    I = |w ∂L/∂w|                                            sensitivity, first-order change of the loss without w
    Ī <- β1 Ī + (1 - β1) I,   Ū <- β2 Ū + (1 - β2) |I - Ī|    smoothed, and its uncertainty (Ī is the new one)
    s = Ī Ū                                                  importance of one weight

For W = left diag(values) right, shapes (m, k), (k,), (k, n), the importance of triplet i is that of its value and the
means of those of its two vectors:

    S_i = s(values_i) + mean_j s(left_ji) + mean_j s(right_ij)

Reference: Q. Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023,
arXiv:2303.10512. Different here: exactly the budget is kept. The official threshold drops every tied triplet, and with
the values still zero at the first step all are tied, so that whole layers vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._prepare import all_finite, result_dtype
from .errors import LinalgError

__all__ = ["Importance", "most_important", "sensitivity", "triplet_importance", "update_importance"]


class Importance(NamedTuple):
    """Running importance of the entries of one tensor.

    Attributes:
        sensitivity: Ī, in the tensor's shape, float32 (float64 for a float64 tensor).
        uncertainty: Ū, alike.
    """

    sensitivity: Tensor
    uncertainty: Tensor

    @property
    def score(self) -> Tensor:
        """s = Ī Ū, in float64: a product of two gradients' sizes may underflow float32."""
        return self.sensitivity.to(torch.float64) * self.uncertainty


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w ∂L/∂w| of each entry, float32 or float64.

    Args:
        weight: Any shape, any float dtype.
        gradient: Of the loss at ``weight``; unscaled, where a gradient scaler is used.

    Raises:
        LinalgError: Shapes differ, or the product is NaN or Inf.

    Example:
        >>> import torch
        >>> sensitivity(torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])).tolist()
        [6.0, 0.5]
    """
    if weight.shape != gradient.shape:
        raise LinalgError.about(
            "gradient", gradient, f"does not fit the weight of shape {tuple(weight.shape)}", "give that weight's .grad"
        )
    dtype = result_dtype(weight, gradient)
    product = (weight.detach().to(dtype) * gradient.detach().to(dtype)).abs()
    if not all_finite(product):
        problem = "times the weight is NaN or Inf"
        raise LinalgError.about("gradient", gradient, problem, "skip this step, and unscale gradients first")
    return product


def update_importance(
    previous: Importance | None, weight: Tensor, gradient: Tensor, *, beta1: float = 0.85, beta2: float = 0.85
) -> Importance:
    """One step of the running importance; the state before the first step is None (zeros).

    Args:
        previous: What the last step returned.
        weight: Any shape, any float dtype.
        gradient: Of the loss at ``weight``.
        beta1: Smoothing of the sensitivity, in [0, 1); the paper's 0.85.
        beta2: Smoothing of the uncertainty, in [0, 1); the paper's 0.85.

    Returns:
        The new state; ``previous`` is left as it is.

    Raises:
        LinalgError: Shapes differ, NaN or Inf.
        ValueError: A beta outside [0, 1).

    Example:
        >>> import torch
        >>> state = update_importance(None, torch.tensor([2.0]), torch.tensor([1.0]), beta1=0.5, beta2=0.5)
        >>> state.sensitivity.item(), state.uncertainty.item(), state.score.item()  # I = 2
        (1.0, 0.5, 0.5)
    """
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must be in [0, 1), not {beta}; 0 forgets the past")
    new = sensitivity(weight, gradient)
    if previous is None:
        previous = Importance(torch.zeros_like(new), torch.zeros_like(new))
    smooth = torch.lerp(new, previous.sensitivity, beta1)
    return Importance(smooth, torch.lerp((new - smooth).abs(), previous.uncertainty, beta2))


def triplet_importance(values: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Importance of each singular triplet from the scores of its entries.

        S_i = values_i + mean_j left_ji + mean_j right_ij

    Args:
        values: (..., k) scores of the singular values.
        left: (..., m, k) scores of the left vectors.
        right: (..., k, n) scores of the right vectors.

    Returns:
        (..., k).

    Raises:
        LinalgError: Shapes that do not fit.

    Example:
        >>> import torch
        >>> triplet_importance(torch.tensor([1.0, 0.0]), torch.eye(2), torch.ones(2, 3)).tolist()
        [2.5, 1.5]
    """
    if left.ndim < 2 or right.ndim < 2 or values.shape != left.mT.shape[:-1] or values.shape != right.shape[:-1]:
        problem = f"do not fit left of shape {tuple(left.shape)} and right of shape {tuple(right.shape)}"
        raise LinalgError.about("values", values, problem, "give (..., k), (..., m, k) and (..., k, n)")
    return values + left.mean(dim=-2) + right.mean(dim=-1)


def most_important(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Which triplets to keep: the ``budget`` best of all matrices together.

    Args:
        scores: For each matrix the importance of its triplets, (k_i,).
        budget: How many to keep in all, at least 0; all of them if there are fewer.

    Returns:
        For each matrix a mask (k_i,), with exactly ``budget`` true entries in all. Ties go to the earlier matrix, and
        in it to the earlier triplet.

    Raises:
        ValueError: budget below 0.
        LinalgError: Scores not one-dimensional, NaN or Inf.

    Example:
        >>> import torch
        >>> [m.tolist() for m in most_important([torch.tensor([0.0, 3.0]), torch.tensor([2.0, 0.0])], budget=3)]
        [[True, True], [True, False]]
    """
    if budget < 0:
        raise ValueError(f"budget must be at least 0, not {budget}")
    for index, score in enumerate(scores):
        if score.ndim != 1 or not all_finite(score):
            raise LinalgError.about(f"scores[{index}]", score, "is not a finite vector", "give (k,) importances")
    if not scores:
        return []
    best = torch.cat(list(scores)).argsort(descending=True, stable=True)[:budget]
    kept = torch.zeros(sum(score.numel() for score in scores), dtype=torch.bool, device=best.device)
    kept[best] = True
    return list(kept.split([score.numel() for score in scores]))
