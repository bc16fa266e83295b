"""Gradient spectra: what one example would teach, by the singular values of its gradients in every attention.

    G = dL/dW = D^T X      W (m, n) of queries, keys, values or output;  D (T, m), X (T, n) of T tokens
    nuclear norm  N = sum s_i,    effective rank  R = exp(-sum p_i ln p_i),  p_i = s_i / sum s_j
    T < min(m, n):  D^T = Q_1 R_1,  X^T = Q_2 R_2,  and s are those of the core R_1 R_2^T (T, T)

Read: better instructions give a lower N and a higher R. Both depend on the length without any learning: the mean loss
shrinks N about as 1/sqrt(T), and R is at most T. So compare at a fixed number of answer tokens (``answer_tokens``), or
take the length out of the score (``match``); different lengths are warned about. Keys and values of grouped-query
attention have fewer rows, which caps R: compare like with like.

The original forms every weight's gradient and takes a full SVD; here neither is done, weights may be frozen or
quantized, and a fused layer is split. The backward pass is in float32, because half precision fills the tail of the
spectrum with noise. Reported are means of the examples' figures, not figures of a mean gradient.

M. Li, Y. Li, Z. Li and T. Zhou, "How Instruction and Reasoning Data shape Post-Training: Data Quality through the Lens
of Layer-wise Gradients", 2025, arXiv:2504.10766; code: MingLiiii/Gradient_Unified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import effective_rank, lstsq, product_cosine, product_singular_values
from ..models.answer_tokens import Taken, keep_answer_tokens, predicted
from ..models.batches import single_examples
from ..models.gradient_factors import (
    Factors,
    attention_parts,
    gradient_factors,
    in_float32,
    neighbours,
)
from ..models.progress import track
from .contract import Analysis, AnalysisMethod, Subject

__all__ = ["GradientSpectra", "example_scores", "rank_examples"]

Score = Literal["effective-rank", "nuclear-norm", "both"]
Match = Literal["regress", "none"]
_FIGURES = ("nuclear norm", "effective rank", "frobenius")


def example_scores(
    nuclear: Tensor, effective: Tensor, lengths: Tensor, *, score: Score = "effective-rank", match: Match = "regress"
) -> Tensor:
    """One number an example, higher where the paper finds better data.

        effective-rank: mean of ln R over the projections;  nuclear-norm: mean of -ln N;
        both: mean of the two, each in units of its standard deviation over the examples

    Args:
        nuclear: N (examples, projections).
        effective: R (examples, projections).
        lengths: (examples, k) lengths in tokens, of k kinds.
        score: Which.
        match: "regress" takes out what a straight line in the logarithms of the lengths explains.

    Returns:
        (examples,) float64.

    Example:
        >>> r = torch.tensor([[2.0], [4.0], [8.0], [32.0]])  # the third has less than its length explains
        >>> example_scores(torch.ones(4, 1), r, r.clamp(max=16)).argmin().item()
        2
    """
    alive = (nuclear > 0).all(dim=0)  # a projection that a loss does not reach says nothing
    parts = {"effective-rank": effective[:, alive].log(), "nuclear-norm": -nuclear[:, alive].log()}
    scores: list[Tensor] = []
    for part in parts.values() if score == "both" else [parts[score]]:
        value = part.double().mean(dim=1).nan_to_num()
        if match == "regress":
            design = torch.cat([torch.ones(len(value), 1), lengths.log()], dim=1).double()
            value = value - design @ lstsq(design, value[:, None])[:, 0]
        scores.append(value / value.std(correction=0).clamp(min=1e-12) if score == "both" else value)
    return torch.stack(scores).mean(dim=0)


def rank_examples(found: Analysis) -> list[dict[str, Any]]:
    """The examples of an analysis by gradient spectra, best score first.

    Args:
        found: What ``eckart.analyze(model, "gradient-spectra", ...)`` returned.

    Returns:
        For each its place in the data ("example", from 0), "score", mean figures, loss and lengths.
    """
    t = found.tensors
    figures = {name: t[name].mean(dim=1) for name in _FIGURES}
    return [
        {
            "example": int(t["example"][i]),
            "score": float(t["score"][i]),
            **{name: float(values[i]) for name, values in figures.items()},
            "loss": float(t["loss"][i]),
            "answer tokens": int(t["lengths"][i, 0]),
            "tokens": int(t["lengths"][i, 1]),
        }
        for i in t["score"].sort(descending=True, stable=True).indices.tolist()
    ]


@dataclass(frozen=True)
class GradientSpectra(AnalysisMethod):
    """Spectra of the gradients of single examples.

    Args:
        answer_tokens: Answer tokens an example that the loss is about, so that lengths are equal; examples with fewer
            are left out. None takes all (the paper).
        taken: Which of them: "random" ones, drawn for each example, or the "first".
        seed: Of the draw.
        score: What examples are ranked by, see `example_scores`.
        match: Whether the length is taken out of the score.
        cosines: Work out the cosines between projections and layers, which the paper finds near zero.

    Raises:
        ValueError: A value that is none of the choices, or answer_tokens below 1.

    Example:
        >>> from eckart import catalog
        >>> catalog.get("gradient-spectra").load()(answer_tokens=32).taken
        'random'
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "labels"})

    answer_tokens: int | None = None
    taken: Taken = "random"
    seed: int = 0
    score: Score = "effective-rank"
    match: Match = "regress"
    cosines: bool = True

    def __post_init__(self) -> None:
        self.check_choices(taken=Taken, score=Score, match=Match)
        if self.answer_tokens is not None and not (isinstance(self.answer_tokens, int) and self.answer_tokens >= 1):
            raise ValueError(f"answer_tokens must be a number of at least 1, not {self.answer_tokens!r}")

    def analyze(self, subject: Subject) -> Analysis:
        """One row a projection, of means over the examples; the tensors hold the figures of each."""
        model, parts = subject.model, attention_parts(subject.model, subject.where)
        examples = list(single_examples(subject.batches))
        figures: dict[str, list[list[float]]] = {name: [] for name in _FIGURES}
        links = neighbours(parts) if self.cosines else [(None, None)] * len(parts)
        cosines: list[list[list[float | None]]] = []
        facts: list[tuple[int, float, int, int]] = []  # which example, loss, answer tokens, tokens
        with in_float32(model):
            for number, example in enumerate(track(examples, "gradients", enabled=subject.progress)):
                generator = torch.Generator().manual_seed(self.seed + number)
                kept = keep_answer_tokens(model, example, self.answer_tokens, taken=self.taken, generator=generator)
                if kept is None:
                    continue
                loss, factors = gradient_factors(model, parts, kept)
                spectra = [product_singular_values(*pair) for pair in factors]
                measures: tuple[Any, ...] = (Tensor.sum, effective_rank, Tensor.norm)
                for name, figure in zip(_FIGURES, measures, strict=True):
                    figures[name].append([float(figure(s)) for s in spectra])
                cosines.append(_cosines(links, factors))
                tokens = kept.get("attention_mask", torch.ones_like(kept.get("input_ids", kept["labels"])))
                facts.append((number, loss, int(predicted(model, kept["labels"]).sum()), int(tokens.sum())))
        if not facts:
            raise ValueError(f"no example has {self.answer_tokens or 1} answer tokens; lower answer_tokens")
        which, losses, *lengths = (torch.tensor(column) for column in zip(*facts, strict=True))
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in figures.items()}
        tensors |= {"example": which, "loss": losses, "lengths": torch.stack(lengths, dim=1)}
        nuclear, effective = (tensors[name] for name in _FIGURES[:2])
        tensors["score"] = example_scores(nuclear, effective, tensors["lengths"], score=self.score, match=self.match)
        means = {name: tensors[name].mean(dim=0).tolist() for name in _FIGURES}
        rows = [
            {
                "layer": part.name,
                "projection": part.role,
                "outputs": part.outputs,
                "inputs": part.inputs,
                **{name: means[name][i] for name in _FIGURES},
                "cosine with partner": _mean(each[i][0] for each in cosines),
                "cosine with next layer": _mean(each[i][1] for each in cosines),
            }
            for i, part in enumerate(parts)
        ]
        summary = {"examples": len(facts), "loss": float(losses.double().mean())}
        summary |= {name: fmean(values) for name, values in means.items()}
        return Analysis(summary, rows, tensors, self._warnings(tensors["lengths"], len(examples) - len(facts)))

    def _warnings(self, lengths: Tensor, short: int) -> list[str]:
        found = [f"{short} examples of fewer than {self.answer_tokens or 1} answer tokens were left out"] * (short > 0)
        (low, total_low), (high, total_high) = lengths.amin(dim=0).tolist(), lengths.amax(dim=0).tolist()
        if low < high:
            found.append(
                f"the answers differ in length, from {low} to {high} tokens, and both figures depend on it; "
                "set answer_tokens"
            )
        elif total_low < total_high:
            found.append(f"the texts differ in length, from {total_low} to {total_high} tokens, which bounds the rank")
        if total_low < total_high and self.match == "regress" and len(lengths) < 10:
            found.append(f"{len(lengths)} examples are too few to take the length out of the score")
        return found


def _cosines(links: Sequence[tuple[int | None, ...]], factors: Sequence[Factors]) -> list[list[float | None]]:
    """Of each projection with its partner and with its like in the next block."""
    return [
        [None if other is None else product_cosine(factors[i], factors[other]) for other in pair]
        for i, pair in enumerate(links)
    ]


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
