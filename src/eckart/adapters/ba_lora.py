"""BA-LoRA: PiSSA with three terms of the loss against what a model has caught from noisy or biased pre-training.

    loss + λ₁ T² KL(softmax(P / T) || softmax(Z / T)) + λ₂ D(Z) + λ₃ S(Z),   the mean over rows for KL
    Z, P: logits of the batch from the model in training and from the pretrained one
    classification, (N, D):   D = Σ_{i≠j} C_ij² / D, C the covariance of the columns;   S = -Σ_{i≤k} σ_i / Σ_i σ_i
    generation, (tokens, vocabulary):   D = -mean entropy over the K likeliest tokens;   S = -Σ_{i≤k} σ_i / ||Z||_F

Y. Chang, Y. Chang, Y. Wu, BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large
Language Models, 2024, arXiv 2408.04556, version 6; code: cyp-jlu-ai/BA-LoRA, which has the terms of the earlier
versions (``form="code"``): the squared distance of logits of length 1 in place of KL for classification, KL by sample
and entropy over the whole vocabulary for generation, where S is that of the matrix (batch, tokens times vocabulary).

Different here: the reference is the model with its adapters off, one forward pass more for a batch. Since the base is
never changed, that is the pretrained model; reloading what PiSSA has left of it, as the code can, is not. Padding,
prompts and whatever else the labels leave out do not count. k is cut to one below the rank that the logits can have:
from there on the share of k values in all of them is 1 whatever is learnt. The terms are in float32 from log-softmax,
and singular values are lengths of u_iᵀ Z, so no gradient goes through an SVD. D of classes and S belong to the rows
that are seen together: accumulating gradients gives the mean of their values, not that of one large batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg import svd
from .contract import Adapter
from .coordinator import IGNORED_LABEL, Coordinator
from .pissa import PiSSA

__all__ = ["BALoRA", "consistency", "correlation", "entropy", "spectral_share"]

Form = Literal["paper", "code"]

# λ₁, λ₂, λ₃, k by form and task.
_DEFAULTS = {
    ("paper", "classification"): (0.15, 0.03, 0.03, 5),
    ("paper", "generation"): (0.025, 0.005, 0.005, 10),
    ("code", "classification"): (1e-4, 3e-4, 1e-4, 3),
    ("code", "generation"): (1e-4, 3e-4, 1e-4, 3),
}


def consistency(logits: Tensor, reference: Tensor, temperature: float = 1.0) -> Tensor:
    """T² KL(softmax(reference / T) || softmax(logits / T)), the mean over rows.

    Args:
        logits: (N, D).
        reference: (N, D).
        temperature: T.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]])
        >>> float(consistency(z, z)), round(float(consistency(z, z.flip(1))), 4)
        (0.0, 0.4621)
    """
    ours, theirs = ((z / temperature).log_softmax(dim=-1) for z in (logits, reference))
    return temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def correlation(logits: Tensor) -> Tensor:
    """Σ_{i≠j} C_ij² / D of the covariance C (D, D) of the columns; 0 for a single row, which has none.

    Args:
        logits: (N, D).

    Example:
        >>> float(correlation(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])))  # C = [[2, 2], [2, 2]]
        4.0
    """
    rows, columns = logits.shape
    centred = logits - logits.mean(dim=0)
    covariance = centred.mT @ centred / max(rows - 1, 1)
    return (covariance - covariance.diagonal().diag()).square().sum() / columns


def entropy(logits: Tensor, candidates: int | None = None) -> Tensor:
    """Entropy of softmax(logits), in nats, the mean over rows.

    Args:
        logits: (N, D).
        candidates: K, how many of the largest logits make up the distribution; None for all.

    Example:
        >>> round(float(entropy(torch.tensor([[5.0, 5.0, -9.0]]), candidates=2)), 4)  # log 2
        0.6931
    """
    if candidates is not None and candidates < logits.shape[-1]:
        logits = logits.topk(candidates, dim=-1).values
    logs = logits.log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1).mean()


def spectral_share(logits: Tensor, k: int, norm: Literal["nuclear", "frobenius"]) -> Tensor:
    """Sum of the k leading singular values over that of all, or over the Frobenius norm.

    By the smaller Gram matrix, or from random projections where k is small beside a large matrix; see
    `eckart.linalg.svd`. The gradient is that of σ_i = ||u_iᵀ Z||, which is u_i v_iᵀ.

    Args:
        logits: Z (N, D).
        k: Values that are meant to hold all.
        norm: What is divided by.

    Example:
        >>> z = torch.diag(torch.tensor([3.0, 4.0]))
        >>> round(float(spectral_share(z, 1, "nuclear")), 4), round(float(spectral_share(z, 1, "frobenius")), 4)
        (0.5714, 0.8)
    """
    everything = norm == "nuclear"
    u = svd(logits, None if everything else k, driver="gram" if everything else "auto").u.to(logits)
    values = torch.linalg.vector_norm(u.mT @ logits, dim=1)
    # What rounding has left of a value of zero points nowhere, but would have a gradient of full size.
    noise = torch.finfo(values.dtype).eps * max(logits.shape) * values.detach().amax()
    values = torch.where(values > noise, values, 0.0)
    total = values.sum() if everything else torch.linalg.vector_norm(logits)
    return values[:k].sum() / (total + 1e-10)


@dataclass(frozen=True)
class BALoRA(PiSSA):
    """Bias-alleviating low-rank adaptation: the adapter is PiSSA's.

    The terms see the logits of training forward passes: (batch, classes), or (batch, tokens, vocabulary) with
    ``labels`` and ``attention_mask`` as keyword arguments. They are added to the loss in the output; without labels,
    ``model.base_model.penalty()`` has those of the last pass. Where a head is new, the reference is what its random
    start says: consistency=0 is then the better choice.

    Attributes:
        form: The terms of the paper's version 6 ("paper") or of the released "code".
        consistency: λ₁. None for the published one: 0.15 for classification, 0.025 for generation; the code has 1e-4.
            0 saves the second forward pass.
        diversity: λ₂. None for 0.03, 0.005; the code's 3e-4.
        spectrum: λ₃. None for 0.03, 0.005; the code's 1e-4. It pulls against diversity.
        k: Singular values to hold the spectrum. None for 5, 10; the code's 3.
        temperature: T of the paper's consistency. 1 leaves it out; our choice, for the published value is not known.
        candidates: K of the paper's diversity of generation; our choice likewise.
        shift: Whether logits are for the label after them, as in a causal language model; False for an
            encoder-decoder, a masked language model or token classification. Of use for three axes only.

    Example:
        >>> from eckart.adapters.site import Site
        >>> rule = BALoRA(consistency=0)
        >>> rule.trainable(Site("layer", "linear", 8, 6), rank=2), rule.weights("classification")
        (28, (0, 0.03, 0.03, 5))
    """

    form: Form = "paper"
    consistency: float | None = None
    diversity: float | None = None
    spectrum: float | None = None
    k: int | None = None
    temperature: float = 1.0
    candidates: int = 50
    shift: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choices(form=Form)
        for name in ("consistency", "diversity", "spectrum"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a weight of at least 0, not {value}; None is the published one")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, not {self.k}; spectrum=0 leaves the term out")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a number above 0, not {self.temperature}; 1 leaves it out")
        if self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, not {self.candidates}; one token alone has no entropy")

    def weights(self, task: Literal["classification", "generation"]) -> tuple[float, float, float, int]:
        """λ₁, λ₂, λ₃ and k."""
        chosen = self.consistency, self.diversity, self.spectrum, self.k
        published = _DEFAULTS[self.form, task]
        first, second, third, k = (b if a is None else a for a, b in zip(chosen, published, strict=True))
        return first, second, third, int(k)

    def coordinate(self, adapters: Mapping[str, Adapter], seed: int) -> Coordinator | None:
        """The terms, unless all weights are 0."""
        plain = self.consistency == self.diversity == self.spectrum == 0
        return None if plain else _Terms(self, adapters, seed)


class _Terms(Coordinator):
    """Works the terms out after each training forward pass; `penalty` hands them over once."""

    counts_steps: ClassVar[bool] = False

    def __init__(self, method: BALoRA, adapters: Mapping[str, Adapter], seed: int) -> None:
        super().__init__(adapters, seed)
        self.method = method
        self.needs_reference = method.consistency != 0
        self.reference: Tensor | None = None
        self.terms: Tensor | None = None

    def observe_reference(self, output: Any) -> None:
        self.reference = _logits(output)

    def observe_output(self, output: Any, kwargs: dict[str, Any]) -> None:
        logits, reference, self.reference = _logits(output), self.reference, None
        mask = _counted(logits, kwargs, self.method.shift)
        with torch.autocast(logits.device.type, enabled=False):
            self.terms = self._sum(logits, reference, mask) if mask.any() else None

    def penalty(self) -> Tensor | None:
        terms, self.terms = self.terms, None
        return terms

    def _sum(self, logits: Tensor, reference: Tensor | None, mask: Tensor) -> Tensor:
        classes, code = logits.ndim == 2, self.method.form == "code"
        first, second, third, k = self.method.weights("classification" if classes else "generation")
        z = logits[mask].float()
        terms = [z.new_zeros(())]
        if first:
            assert reference is not None
            p = reference[mask].float()
            if not code:
                terms.append(first * consistency(z, p, self.method.temperature))
            elif classes:
                terms.append(first * F.mse_loss(F.normalize(z), F.normalize(p)))
            else:
                terms.append(first * consistency(z, p) * len(z) / len(logits))
        if second:
            diverse = correlation(z) if classes else -entropy(z, None if code else self.method.candidates)
            terms.append(second * diverse)
        if third:
            if code and not classes:
                z = torch.where(mask[..., None], logits.float(), 0.0).flatten(1)
            norm: Literal["nuclear", "frobenius"] = "nuclear" if classes or code else "frobenius"
            k = min(k, max(min(z.shape) - 1, 1)) if norm == "nuclear" else k
            terms.append(-third * spectral_share(z, k, norm))
        return torch.stack(terms).sum()


def _logits(output: Any) -> Tensor:
    """Logits of a model's output, which may be they themselves."""
    logits = output.get("logits") if isinstance(output, dict) else output
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        raise ValueError(
            "ba-lora reads logits (batch, classes) or (batch, tokens, vocabulary), and the model gives none: call it "
            "with return_dict=True and without a loss that is fused with its head"
        )
    if logits.ndim == 2 and logits.shape[1] == 1:
        raise ValueError("ba-lora compares classes, but the logits (batch, 1) have one; use pissa for a regression")
    return logits


def _counted(logits: Tensor, kwargs: Mapping[str, Any], shift: bool) -> Tensor:
    """Which rows of the logits count, (batch,) or (batch, tokens) bool."""
    mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    labels, attention = kwargs.get("labels"), kwargs.get("attention_mask")
    if mask.ndim == 1:
        return mask if labels is None or labels.shape != mask.shape else labels.ne(IGNORED_LABEL).to(mask.device)
    if labels is not None:
        if labels.shape != mask.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} differ in their tokens")
        mask &= labels.ne(IGNORED_LABEL).to(mask.device)
    if not shift:  # the attention mask may be that of an encoder, and labels say what is padding
        return mask
    if attention is not None and attention.shape == mask.shape:
        mask &= attention.ne(0).to(mask.device)
    return F.pad(mask[:, 1:], (0, 1))  # the last token predicts none
