"""OneS: a mixture of experts becomes a dense model of its family, with one MLP the size of one expert in each layer.

    gather      W = E sum u_e W_e ("sum"),   sum u_e W_e ("mean"),   sum u_e U_e,K S_e,K V_e,K^T ("svd"), or the most
                important hidden channels of every expert side by side ("top"); gate, up (I, H) and down (H, I)
    distil      (1 - a) CE + a T^2 KL(softmax(z_mixture / T) || softmax(z_dense / T))

F. Xue et al., One Student Knows All Experts Know: From Sparse to Dense, 2022, arXiv 2201.10890; no code found.
Attention, norms and embeddings are the mixture's; its routers go.

Different here. u_e is the mean gate weight of expert e on the calibration tokens, made to sum to 1 (the paper has
equal weights: ``weighting="uniform"``), and what gate weights sum to is absorbed in down. The paper's SVD gathering is
a sum, which grows with E; ours is the mean of the same terms. In "top", down is scaled by u_e, so that the MLP is the
mixture with its mean gates, cut to the chosen channels; channels that are the same in several experts are taken once,
with their down columns added up. Experts can be aligned before their weights are mixed. SwiGLU has three matrices
where the paper's experts have two. The size follows from the mixture, so the ratio is only a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..linalg import svd
from ..linalg.assignment import assignment
from ..models.dense_twin import banks_to_convert, dense_twin
from ..models.distill import distill
from ..models.experts import Expert, ExpertBank, Routing, align, route
from ..models.result import LayerResult
from .contract import Job, ModelMethod

__all__ = ["OneS", "mixed", "top_channels", "truncated"]

Gather = Literal["sum", "mean", "top", "svd"]
Weighting = Literal["usage", "uniform"]


def mixed(experts: Iterable[Expert], coefficients: Tensor) -> Expert:
    """sum c_e W_e for gate, up and down, in float64; one expert at a time is held in it.

    Args:
        experts: E of them, all of one shape.
        coefficients: (E,) c.

    Example:
        >>> one = Expert(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2, 1))
        >>> mixed([one, one], torch.tensor([0.5, 2.0])).gate.tolist()
        [[2.5, 2.5]]
    """
    total: list[Tensor] = []
    for expert, c in zip(experts, coefficients.tolist(), strict=True):
        terms = [c * w.double() for w in expert]
        total = [a + b for a, b in zip(total, terms, strict=True)] if total else terms
    return Expert(*total)


def truncated(expert: Expert, rank: int) -> Expert:
    """The best approximation of rank ``rank`` of each of the three matrices (within 1 % for large ones), in float64.

    Example:
        >>> diagonal = torch.diag(torch.tensor([3.0, 1.0]))
        >>> truncated(Expert(diagonal, diagonal, diagonal), rank=1).up.tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    return Expert(*(svd(w.double(), rank).reconstruct() for w in expert))


def top_channels(experts: Sequence[Expert], usage: Tensor) -> tuple[Expert, Tensor]:
    """The most important hidden channels of all experts, side by side in the width of one.

        importance of channel i of expert e = ||(gate_i, up_i)|| ||u_e down_i||

    Expert e gets u_e I of the I places, rounded; places that it cannot fill go to the best of what is left. Channels
    with the same gate and up rows compute the same number, so they are one, whose down column is the sum of theirs.

    Args:
        experts: E of them; gate (I, H), up (I, H), down (H, I).
        usage: (E,) u, sums to 1.

    Returns:
        The gathered MLP in float64, and which channels (E, I) are in it, bool.

    Example:
        >>> small, large = (Expert(c * torch.ones(2, 1), torch.ones(2, 1), torch.ones(1, 2)) for c in (1.0, 9.0))
        >>> mlp, _ = top_channels([small, large], torch.tensor([0.5, 0.5]))
        >>> mlp.gate.tolist(), mlp.down.tolist()  # equal channels are one, with both down columns
        ([[1.0], [9.0]], [[1.0, 1.0]])
    """
    width = experts[0].gate.shape[0]
    gate, up = (torch.cat(group) for group in list(zip(*experts, strict=True))[:2])
    down = torch.cat([u * expert.down.double() for u, expert in zip(usage.tolist(), experts, strict=True)], dim=1)
    first = _first_equal(torch.cat((gate, up), dim=1))
    stands = first == torch.arange(len(first), device=first.device)
    down = torch.zeros_like(down).index_add_(1, first, down)
    squares = torch.cat([e.gate.double().square().sum(1) + e.up.double().square().sum(1) for e in experts])
    importance = torch.where(stands, squares.sqrt() * down.norm(dim=0), -1.0)
    order, value = importance.argsort(descending=True, stable=True).tolist(), importance.tolist()
    places = _shares(usage, width)
    chosen: list[int] = []
    for index in order:
        if value[index] > 0 and places[index // width]:
            places[index // width] -= 1
            chosen.append(index)
    # Copies come last, and only where there is too little else; they add nothing then.
    taken = set(chosen)
    chosen = sorted([*chosen, *[index for index in order if index not in taken][: width - len(chosen)]])
    kept = torch.isin(first, torch.tensor(chosen, device=first.device)).reshape(len(experts), width)
    return Expert(gate[chosen].double(), up[chosen].double(), down[:, chosen]), kept


def _first_equal(rows: Tensor) -> Tensor:
    """(N,) the position of the first row that is equal to each, bit by bit."""
    seen: dict[bytes, int] = {}
    bits = rows.detach().cpu().contiguous().view(torch.uint8)  # numpy does not know bfloat16
    found = [seen.setdefault(row.numpy().tobytes(), i) for i, row in enumerate(bits)]
    return torch.tensor(found, device=rows.device)


def _shares(usage: Tensor, total: int) -> list[int]:
    """Whole numbers that sum to ``total`` in these proportions, by the largest remainders."""
    exact = (usage.double() * total).cpu()
    floors = exact.floor()
    missing = total - int(floors.sum())
    floors[(exact - floors).argsort(descending=True, stable=True)[:missing]] += 1
    return [int(count) for count in floors]


@dataclass(frozen=True)
class OneS(ModelMethod):
    """Makes a dense model of a mixture of experts (Mixtral to Mistral, Qwen3-MoE to Qwen3): a new model.

    Attributes:
        gather: how the experts' weights become one MLP: "sum", "mean", "top" or "svd".
        weighting: "usage" weighs experts by their mean gate weight, "uniform" all the same.
        expert_rank: K of each expert in "svd"; None for min(I, H) / E, rounded up, so that all together fit one matrix.
        align: put the hidden units of all experts into the order of the most used one before their weights are
            mixed (needs scipy); no effect on "top", which mixes none.
        steps: of distillation from the mixture on the calibration batches, one batch each; 0 for none.
        learning_rate: of distillation.
        temperature: T.
        task_weight: 1 - a, weight of the cross entropy with the text.
        seed: of the order of the batches.

    Example:
        >>> OneS("top", steps=0).gather
        'top'
    """

    needs: ClassVar[frozenset[str]] = frozenset({"routing"})
    on_linears: ClassVar[bool] = False

    gather: Gather = "svd"
    weighting: Weighting = "usage"
    expert_rank: int | None = None
    align: bool = False
    steps: int = 200
    learning_rate: float = 1e-4
    temperature: float = 2.0
    task_weight: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_choices(gather=Gather, weighting=Weighting)
        if not isinstance(self.align, bool):
            raise ValueError(f"align must be true or false, not {self.align!r}")
        if self.expert_rank is not None and (self.expert_rank < 1 or self.gather != "svd"):
            raise ValueError(
                f'expert_rank must be at least 1 and goes with gather="svd"; not {self.expert_rank} for {self.gather!r}'
            )
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, not {self.steps}; 0 gathers without distillation")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)}")
        if not 0 <= self.task_weight <= 1:
            raise ValueError(f"task_weight must lie in [0, 1], not {self.task_weight}")

    def check(self, job: Job) -> None:
        """Refuse a model without a dense twin, and a ratio beyond what one expert in E removes."""
        for bank in banks_to_convert(job.model, job.banks):
            removed = 1 - 1 / bank.count
            if job.ratio > removed + 1e-9:
                raise ValueError(
                    f"ones leaves one MLP the size of one of the {bank.count} experts of {bank.name}, which removes "
                    f"{removed:.0%} of them; ratio={job.ratio} is out of reach"
                )
        if self.align:
            assignment(torch.ones(1, 1))  # says at once if scipy is missing

    def compress(self, job: Job) -> tuple[nn.Module, list[LayerResult]]:
        """Gather, build the dense model, and distil it."""
        banks = job.banks
        routing = route(job.model, banks, job.batches, progress=job.progress, title="experts")
        mlps, layers = {}, []
        with torch.no_grad():
            for bank in banks:
                mlps[bank.name], error = self._gathered(bank, routing[bank.name])
                place, shape = bank.name.rpartition(".")[0], bank.shape
                layers.append(LayerResult(place, shape, min(shape), "gathered", bank.expert_parameters, error))
            made = dense_twin(job.model, mlps)
        if self.steps:
            distill(
                made,
                job.model,
                job.batches,
                steps=self.steps,
                learning_rate=self.learning_rate,
                temperature=self.temperature,
                task_weight=self.task_weight,
                seed=self.seed,
                progress=job.progress,
            )
        return made, layers

    def _gathered(self, bank: ExpertBank, used: Routing) -> tuple[Expert, float]:
        """The MLP in place of a bank, and which part of the experts' weights (root mean square) is not in it."""
        total = float(used.gate.sum())
        usage = used.gate / total if self.weighting == "usage" else torch.full_like(used.gate, 1 / bank.count)
        experts = [Expert(*(w.detach() for w in bank.expert(index))) for index in range(bank.count)]
        sizes = torch.stack([expert.units().double().square().sum(dim=1) for expert in experts]).cpu()
        whole = usage @ sizes.sum(dim=1)
        if self.gather == "top":
            one, kept = top_channels(experts, usage)
            lost = usage @ (sizes * ~kept.cpu()).sum(dim=1)
        else:
            leader = experts[int(usage.argmax())]
            if self.align:
                experts = [expert if expert is leader else align(expert, leader) for expert in experts]
            terms: Iterable[Expert] = experts
            if self.gather == "svd":
                rank = self.expert_rank or math.ceil(min(leader.gate.shape) / bank.count)
                terms = (truncated(expert, rank) for expert in experts)
            one = mixed(terms, usage * bank.count if self.gather == "sum" else usage)
            away = [float((expert.units().double() - one.units()).square().sum()) for expert in experts]
            lost = usage @ torch.tensor(away, dtype=torch.float64)
        error = math.sqrt(float(lost / whole)) if float(whole) else 0.0
        # Where gate weights do not sum to one, the experts' outputs are that much smaller.
        return Expert(one.gate, one.up, total * one.down), error
