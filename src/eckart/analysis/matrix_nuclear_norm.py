"""Matrix nuclear norm: how spread a model's hidden states are, as a figure of how far it compresses a text.

    R (N, d): last hidden states of N tokens, centred over the tokens, each of unit length
    published:  MNN(R) / N,   MNN(R) = sum of the D largest column norms ||R_:j||,   D = min(N, d)
    exact:      ||R||_* / N = sum of the singular values / N <= sum_j ||R_:j|| / N
    entropy:    -sum lambda ln lambda / ln d,   lambda = s^2 / sum s^2

Lower is more compressed. The published figure avoids singular values: O(N d) against O(d^3) of the matrix entropy. It
bounds the exact norm for N >= d only. For N < d it is the weight of the N largest coordinates, which depends on the
basis of the hidden states, so the exact norm stands beside it, at O(N d min(N, d)). All figures fall with N at the
same geometry: compare texts cut to one length (``length``).

A text of one token is its own mean, and is left out with a warning where the original drops NaN in silence. Padding is
left out; half precision is widened first.

Y. Li, Y. Xia, Y. Chang and Y. Wu, "Large Language Model Evaluation via Matrix Nuclear-Norm", Findings of EMNLP 2025,
arXiv:2410.10672; code: MLGroupJLU/MatrixNuclearNorm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..linalg import effective_rank, nuclear_norm_l12, singular_values, spectral_entropy
from ..models.hidden import hidden_states
from ..models.progress import track
from .contract import Analysis, AnalysisMethod, Subject

__all__ = ["MatrixNuclearNorm", "figures_of_states", "normalized_states"]


def normalized_states(states: Tensor) -> Tensor:
    """Hidden states centred over the tokens and scaled to unit length.

    Args:
        states: (N, d), any float dtype.

    Returns:
        (N, d) float64. A token that equals the mean stays zero.

    Example:
        >>> normalized_states(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
        tensor([[ 1.,  0.],
                [-1.,  0.]], dtype=torch.float64)
    """
    centred = states.double() - states.double().mean(dim=0)
    return nn.functional.normalize(centred, dim=-1, eps=torch.finfo(torch.float64).tiny)


def figures_of_states(states: Tensor) -> dict[str, float]:
    """The published figure, the exact norm and the matrix entropy of one text.

    Args:
        states: (N, d) hidden states of N >= 2 tokens.

    Returns:
        "mnn" and "nuclear norm", both over N; "entropy", between 0 and 1; "effective rank".

    Raises:
        ValueError: fewer than two tokens.
        LinalgError: NaN or Inf in the states.

    Example:
        >>> found = figures_of_states(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> {name: round(value, 4) for name, value in found.items()}  # one direction: s = (sqrt 2, 0)
        {'mnn': 0.7071, 'nuclear norm': 0.7071, 'entropy': 0.0, 'effective rank': 1.0}
    """
    tokens, width = states.shape
    if tokens < 2:
        raise ValueError("one token is its own mean: a text needs at least two tokens")
    rows = normalized_states(states)
    s = singular_values(rows)
    padded = nn.functional.pad(s, (0, width - len(s)))  # the entropy is over log d, zeros included
    return {
        "mnn": float(nuclear_norm_l12(rows, truncated=True)) / tokens,
        "nuclear norm": float(s.sum()) / tokens,
        "entropy": spectral_entropy(padded, normalized=True),
        "effective rank": float(effective_rank(s)),
    }


@dataclass(frozen=True)
class MatrixNuclearNorm(AnalysisMethod):
    """Spread of the hidden states of texts.

    Args:
        layer: Which hidden states: -1, the last, after the final norm, is the paper's; 0 are the embeddings.
        length: Tokens that every text is cut to, so that figures compare; None takes texts as they are (the paper).

    Raises:
        ValueError: length below 2.

    Example:
        >>> from eckart import catalog
        >>> catalog.get("matrix-nuclear-norm").load()(length=64)
        MatrixNuclearNorm(layer=-1, length=64)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})

    layer: int = -1
    length: int | None = None

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 2:
            raise ValueError(f"length must be at least 2 tokens, not {self.length}")

    def analyze(self, subject: Subject) -> Analysis:
        """One row a text; the figures are means over the texts."""
        rows: list[dict[str, Any]] = []
        short = 0
        for number, states in enumerate(self._texts(subject)):
            if len(states) < max(2, self.length or 0):
                short += 1
                continue
            states = states[: self.length]
            rows.append({"text": number, "tokens": len(states), "width": states.shape[1], **figures_of_states(states)})
        if not rows:
            raise ValueError(f"all texts are shorter than {max(2, self.length or 0)} tokens; lower length")
        found = Analysis({name: mean(row[name] for row in rows) for name in list(rows[0])[3:]}, rows)
        found.figures = {"texts": len(rows), **found.figures}
        if short:
            found.warnings.append(f"{short} texts of fewer than {max(2, self.length or 0)} tokens were left out")
        if len({row["tokens"] for row in rows}) > 1:
            found.warnings.append("the texts differ in length, which the figures depend on; set length")
        if any(row["tokens"] < row["width"] for row in rows):
            found.warnings.append(
                "texts shorter than the width: the published figure is no bound there, read the exact norm"
            )
        return found

    @torch.no_grad()
    def _texts(self, subject: Subject) -> Iterator[Tensor]:
        """Hidden states (N, d) of each text, without padding."""
        for batch in track(subject.batches, "hidden states", enabled=subject.progress):
            states = hidden_states(subject.model, batch, self.layer)
            kept = batch.get("attention_mask", torch.ones(states.shape[:2])).to(states.device) > 0
            yield from (one[mask] for one, mask in zip(states, kept, strict=True))
