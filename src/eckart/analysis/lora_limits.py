"""Computational limits of LoRA: how large queries and keys get, beside the size up to which theory has a fast gradient.

    Q = sqrt(beta) X W_Q,  K = sqrt(beta) X W_K  (L, h), adapter and rotation included,   F = softmax(Q K^T)
    Gamma_Q = max |Q_ij|,  Gamma = sqrt(Gamma_Q Gamma_K),   ratio = Gamma / (c sqrt(ln L))

For entries of o(sqrt(log L)) and widths of O(log L) the paper approximates the gradients of LoRA to 1/poly(L) in time
L^(1 + o(1)); at or above that order no algorithm with L^(2 - delta) exists, if SETH holds. Both are statements for
growing L. The constant c is a convention: a ratio is a size to compare layers, adapters and learning rates by, and no
promise that anything runs faster. What a polynomial of degree g needs is b = max |q k|: g with b^(g + 1) / (g + 1)! <=
eps e^-b makes C(h + g, g) features, which for the widths of real heads is beyond any use.

Entries depend on the basis of a head (W_Q R, W_K R^-T give the same attention), b does not: both are reported, the
first after the rotation by position. One token (an attention sink) often decides a maximum, so quantiles stand beside.
The chained gradient itself is in `eckart.analysis.chained_gradient`; derivation and causal form are ours, the paper
argues by existence. "Low rank" there is of matrices (L, L), and has nothing to do with an adapter's r.

J. Y.-C. Hu, M. Su, E.-J. Kuo, Z. Song and H. Liu, "Computational Limits of Low-Rank Adaptation (LoRA) for
Transformer-Based Models", ICLR 2025, arXiv:2406.03136; code: a supplement that we have not seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..models.adapted import inside_peft, is_adapted, under_adapters
from ..models.attention_states import AttentionCall, watching_attention
from ..models.batches import single_examples
from ..models.progress import track
from ..models.select import linears
from .chained_gradient import num_features, taylor_degree
from .contract import Analysis, AnalysisMethod, Subject

__all__ = ["LoRALimits", "head_sizes"]

_MEAN = ("q_99", "k_99", "v_99")  # over texts; of everything else the largest counts


def head_sizes(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> dict[str, Tensor]:
    """How large the entries, rows and products of queries and keys are.

    Args:
        query: Q (heads, L, h), the root of the scale included.
        key: K (heads, M, h), the same.
        value: V (heads, M, w).
        causal: leave out products of a query with later keys.

    Returns:
        (heads,) each: "gamma_q", "gamma_k", "gamma_v", the largest entries; "q_99", "k_99", "v_99", their 0.99
        quantiles; "row_q", "row_k", the longest rows; "logit", the largest |q k|.

    Example:
        >>> found = head_sizes(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, -1.0]]]), torch.zeros(1, 1, 2))
        >>> {name: float(found[name]) for name in ("gamma_q", "row_q", "logit")}
        {'gamma_q': 4.0, 'row_q': 5.0, 'logit': 1.0}
    """
    found: dict[str, Tensor] = {}
    for name, part in (("q", query), ("k", key), ("v", value)):
        sizes = part.abs().flatten(1)
        found[f"gamma_{name}"] = sizes.amax(dim=1)
        found[f"{name}_99"] = sizes.kthvalue(math.ceil(0.99 * sizes.shape[1]), dim=1).values
    found |= {"row_q": query.norm(dim=-1).amax(dim=1), "row_k": key.norm(dim=-1).amax(dim=1)}
    largest = torch.zeros_like(found["gamma_q"])
    for start in range(0, query.shape[1], 256):
        products = (query[:, start : start + 256] @ key.mT).abs()
        largest = torch.maximum(largest, (products.tril(start) if causal else products).amax(dim=(1, 2)))
    return {**found, "logit": largest}


@dataclass(frozen=True)
class LoRALimits(AnalysisMethod):
    """Sizes of queries and keys of every head, with adapters against without where the model has any.

    Args:
        c: Constant of the threshold c sqrt(ln L); 1 by convention.
        eps: Relative error of the exponential that the degree is for.

    Raises:
        ValueError: c or eps not positive, or eps of 1 or more.

    Example:
        >>> LoRALimits()
        LoRALimits(c=1.0, eps=0.001)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})

    c: float = 1.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"c must be positive, not {self.c}")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be between 0 and 1, not {self.eps}")

    def analyze(self, subject: Subject) -> Analysis:
        """One row a head."""
        adapted = is_adapted(subject.model)
        if any(getattr(module, "merged", False) for module in subject.model.modules()):
            raise ValueError("the adapters are merged into the weights; unmerge_adapter() first")
        rows = self._rows(subject, subject.model, "heads")
        lengths = {row.pop("tokens") for row in rows} | {row.pop("fewest") for row in rows}
        ratios = [row["ratio"] for row in rows]
        figures: dict[str, Any] = {
            "heads": len(rows),
            "tokens": max(lengths),
            "threshold": self.c * math.log(max(lengths)) ** 0.5,
            "median ratio": median(ratios),
            "largest ratio": max(ratios),
            "heads with a ratio below 1": sum(ratio < 1 for ratio in ratios),
            "largest logit": max(row["logit"] for row in rows),
            "median degree": median(row["degree"] for row in rows),
            "median log10 of features": median(row["log10_features"] for row in rows),
        }
        if adapted:
            before = self._rows(subject, under_adapters(subject.model), "heads without adapters")
            for row, old in zip(rows, before, strict=True):
                row |= {f"{name}_without": old[name] for name in ("ratio", "logit_ratio", "degree")}
                row["change"] = row["ratio"] / max(old["ratio"], 1e-30)
            figures["median change by adapters"] = median(row["change"] for row in rows)
            figures["largest change by adapters"] = max(row["change"] for row in rows)
            moved = sum((row["ratio"] < 1) != (row["ratio_without"] < 1) for row in rows)
            figures["heads moved over the threshold by adapters"] = moved
        warnings = ["the threshold is asymptotic and its constant a convention: no ratio is a promise of speed"]
        if len(lengths) > 1:
            warnings.append("the texts differ in length: a ratio is the largest over the texts, each with its own L")
        outliers = sum(row["gamma_k"] >= 5 * row["k_99"] for row in rows)
        if outliers:
            warnings.append(f"in {outliers} heads the largest key entry is 5 times the 0.99 quantile or more")
        return Analysis(figures, rows, {}, warnings)

    def _rows(self, subject: Subject, model: nn.Module, label: str) -> list[dict[str, Any]]:
        texts: dict[str, list[dict[str, Tensor]]] = defaultdict(list)
        widths: dict[str, int] = {}
        for name, call, keep in _calls(subject, model, label):
            root = call.scaling**0.5
            heads = call.query.shape[1] // call.key.shape[1]
            query, key, value = (part[0][:, keep].double() for part in (call.query, call.key, call.value))
            key, value = (part.repeat_interleave(heads, dim=0) for part in (key, value))
            sizes = head_sizes(query * root, key * root, value, causal=call.causal)
            length = key.shape[1]
            tau = self.c * math.log(length) ** 0.5
            sizes["ratio"] = (sizes["gamma_q"] * sizes["gamma_k"]).sqrt() / tau
            sizes["logit_ratio"] = sizes["logit"].sqrt() / tau
            sizes["tokens"] = torch.full_like(sizes["ratio"], length)
            texts[name].append(sizes)
            widths[name] = call.query.shape[-1]
        if not texts:
            raise ValueError("no attention over two tokens or more was seen; give longer texts or select other layers")
        return [
            self._row(name, head, [{key: float(one[key][head]) for key in one} for one in found], widths[name])
            for name, found in texts.items()
            for head in range(len(found[0]["ratio"]))
        ]

    def _row(self, name: str, head: int, texts: list[dict[str, float]], width: int) -> dict[str, Any]:
        row: dict[str, Any] = {"layer": name, "head": head}
        for key in texts[0]:
            row[key] = (mean if key in _MEAN else max)(one[key] for one in texts)
        degree = taylor_degree(row["logit"], self.eps)
        features = math.log10(num_features(width, degree))  # the number itself has hundreds of digits
        tokens = [int(one["tokens"]) for one in texts]
        return row | {"degree": degree, "log10_features": features, "tokens": max(tokens), "fewest": min(tokens)}


@torch.no_grad()
def _calls(subject: Subject, model: nn.Module, label: str) -> Iterator[tuple[str, AttentionCall, Tensor]]:
    """Every call of a selected layer's attention for each text by itself, with its tokens that are no padding."""
    names = _names(subject, model)
    for batch in track(subject.batches, label, enabled=subject.progress):
        for one in single_examples([{key: part for key, part in batch.items() if key != "labels"}]):
            found: list[AttentionCall] = []
            with watching_attention(model, found.append):
                model(**one)
            for call in found:
                mask = one.get("attention_mask")
                tokens = call.key.shape[2]
                keep = torch.ones(tokens, dtype=torch.bool, device=call.key.device)
                if mask is not None and mask.shape == (1, tokens):
                    keep = mask[0] > 0
                if id(call.module) in names and call.query.shape[2] == tokens and int(keep.sum()) > 1:
                    yield names[id(call.module)], call, keep


def _names(subject: Subject, model: nn.Module) -> dict[int, str]:
    """Names of the modules that hold a selected linear map, by identity; without the prefix of PEFT."""
    names = {id(module): name for name, module in inside_peft(model).named_modules()}
    if subject.where is None:
        return names
    chosen = [ref.name for ref in linears(under_adapters(model), subject.where, quantized=True).linears]
    return {key: name for key, name in names.items() if any(one.startswith(f"{name}.") for one in chosen)}
