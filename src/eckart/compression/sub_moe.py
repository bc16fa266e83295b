"""Sub-MoE: fewer experts in each layer of a mixture, merged by what they put out and by how often they are used.

    Sim(i, j) = mean over tokens of cos(E_i(x), E_j(x));  K-means on the outputs, a cluster Q becomes one expert
    [W_1, ..., W_c] = U S [V_1, ..., V_c]^T,   V = sum f_i V_i / sum f_i,   W = U S V^T      W_i (m, n), U (m, r)
    f_i = fraction of the tokens that are sent to expert i; separately for gate, up and down

L. Li et al., Sub-MoE: Efficient Mixture-of-Expert LLMs Compression via Subspace Expert Merging, 2025, arXiv
2506.23266. U S V_i^T is W_i, so the merge of step 2 is the plain weighted average sum f_i W_i / sum f_i whatever the
SVD, and U_r U_r^T times it if the basis is cut to rank r: nothing is decomposed unless ``basis_energy`` cuts.

With ``experts="low-rank"`` a merged expert is stored as U and V, cut to the rank that ``intra`` leaves, with what its
members see in the norm: Sub-MoE with a dagger. ``experts="shared"`` keeps every expert with its V_i, and shares U. Both
hold what every expert sees at once, 8 E (H^2 + I^2) bytes a layer.

Different here. K-means works on outputs scaled to length one, so that its objective, its centroids and the paper's
cosine similarity agree, and needs nothing but the (E, E) similarities. A window of layers shares one number of
clusters, but no cluster spans two layers, as a merged expert must live in one. The router keeps all its rows and each
points to the merged expert, so that gate probabilities of merged experts add up. Hidden units can be aligned before
they are averaged. Experts that keep their own V_i are ours, from step 5 of the paper without its step 7.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..linalg import energy_rank, svd
from ..linalg.assignment import assignment
from ..linalg.kmeans import kmeans_in_groups
from ..models.experts import Expert, ExpertBank, Routing, route
from ..models.geometry import Geometry, set_geometry
from ..models.replace import swap
from ..models.result import LayerResult
from ..structures import EckartWarning
from ..structures.factored_experts import GroupFactors
from ..structures.shared_factor import FactorSide
from .contract import Job, ModelMethod
from .expert_factors import Cluster, InputGrams, bank_of, clusters_of, shared_rank

__all__ = ["SubMoE", "merge"]

Experts = Literal["merged", "low-rank", "shared"]
Basis = Literal["output", "stream"]

_SIDES: dict[Basis, tuple[FactorSide, FactorSide, FactorSide]] = {
    "output": ("left", "left", "left"),
    "stream": ("right", "right", "left"),
}

_AT_ONCE = 2**25  # numbers in the outputs of all experts of a layer, held in float64


def merge(weights: Tensor, frequency: Tensor, energy: float = 1.0) -> Tensor:
    """One matrix for several, in the output basis that they share.

        U_r U_r^T sum f_i W_i / sum f_i,      U S V^T = [W_1, ..., W_c]

    Args:
        weights: (c, m, n).
        frequency: (c,) f, not negative, not all zero.
        energy: share of the squared singular values of [W_1, ..., W_c] to keep; at 1 it is the average itself.

    Returns:
        (m, n) float64.

    Example:
        >>> merge(torch.tensor([[[1.0, 0.0]], [[0.0, 4.0]]]), torch.tensor([3.0, 1.0])).tolist()
        [[0.75, 1.0]]
    """
    wide = weights.double()
    average = torch.einsum("c,cmn->mn", frequency.to(wide) / frequency.sum().to(wide), wide)
    if energy == 1 or len(weights) == 1:
        return average
    union = svd(torch.cat(tuple(wide), dim=1), driver="exact")
    basis = union.u[:, : max(1, energy_rank(union.s, energy))]
    return basis @ (basis.mT @ average)


@dataclass(frozen=True)
class SubMoE(ModelMethod):
    """Merges experts of similar outputs; the ratio is the fraction of the experts' parameters to remove.

    Attributes:
        window: layers in a row that share one number of experts, 2 in the paper.
        basis_energy: share of the energy of a cluster's shared basis that its merged expert keeps; 1 keeps all, less is
            the paper's truncation and saves nothing, as merged experts are stored dense.
        experts: what becomes of a cluster: "merged", one dense expert; "low-rank", one expert of two factors a matrix;
            "shared", all its experts, with one factor of each matrix in common.
        intra: of "low-rank": the fraction of a merged expert's parameters that its factors save; 0.1 to 0.3 in the
            paper. With ratio = intra no experts are merged.
        group: of "shared": experts in a cluster, on average; 1 gives every expert factors of its own.
        basis: of "shared": which factor is in common. "output": the one that the paper's union has, of outputs.
            "stream": the one on the side of the model's width, of the inputs of gate and up and of the outputs of
            down; the order of hidden units does not matter to it.
        align: put the hidden units of a cluster's experts into the order of the most used one before they are
            averaged or share a factor (needs scipy); off in the paper.
        tokens: calibration tokens on which ALL experts of a layer run; routing is counted on all tokens.
        seed: of the starts of K-means.

    Example:
        >>> SubMoE(window=1).window
        1
    """

    needs: ClassVar[frozenset[str]] = frozenset({"routing"})
    on_linears: ClassVar[bool] = False

    window: int = 2
    basis_energy: float = 1.0
    experts: Experts = "merged"
    intra: float = 0.2
    group: int = 4
    basis: Basis = "output"
    align: bool = False
    tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_choices(experts=Experts, basis=Basis)
        for name in ("window", "tokens", "group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.basis_energy <= 1:
            raise ValueError(f"basis_energy must lie in (0, 1], not {self.basis_energy}; 1 keeps everything")
        if self.basis_energy < 1 and self.experts != "merged":
            raise ValueError(f"basis_energy is for merged experts; {self.experts} ones are cut by their budget")
        if not 0 < self.intra < 1:
            raise ValueError(f"intra must lie between 0 and 1 (a fraction of an expert's parameters), not {self.intra}")
        if not isinstance(self.align, bool):
            raise ValueError(f"align must be true or false, not {self.align!r}")

    def check(self, job: Job) -> None:
        """Refuse a model without banks of experts, and a ratio that leaves a layer without any."""
        banks = job.banks
        if not banks:
            raise ValueError(
                f"{type(job.model).__name__} has no bank of fused experts (gate_up_proj and down_proj without biases); "
                "sub-moe compresses mixtures of experts such as Mixtral or Qwen3-MoE"
            )
        self._counts(banks, job.ratio)
        if self.experts != "merged":
            _check_ranks(banks, self._keep(job.ratio))
        if self.align:
            assignment(torch.ones(1, 1))  # says at once if scipy is missing

    def compress(self, job: Job) -> tuple[nn.Module, list[LayerResult]]:
        """Cluster and merge, window by window, in place."""
        banks = job.banks
        counts = self._counts(banks, job.ratio)
        sums = {bank.name: torch.zeros(bank.count, bank.count, dtype=torch.float64) for bank in banks}
        grams = {bank.name: InputGrams.of(bank) for bank in banks} if self.experts != "merged" else {}

        def see(bank: ExpertBank, x: Tensor, chosen: Tensor) -> None:
            most = max(1, _AT_ONCE // (bank.count * max(bank.shape[1], bank.width)))
            for rows, ids in zip(x.split(most), chosen.split(most), strict=True):
                hidden = [bank.hidden(index, rows) for index in range(bank.count)]
                outputs = torch.stack([h @ down.mT for h, down in zip(hidden, bank.down, strict=True)]).double()
                units = nn.functional.normalize(outputs, dim=2).flatten(1)
                sums[bank.name] += (units @ units.mT).cpu()
                for index in range(bank.count if grams else 0):
                    # All tokens together count as one more, for an expert that none of them is sent to.
                    weight = (ids == index).any(dim=1) + 1 / self.tokens
                    grams[bank.name].add(index, rows, hidden[index], weight)

        routing = route(
            job.model, banks, job.batches, see=see, tokens=self.tokens, progress=job.progress, title="experts"
        )
        _warn_of_unused(routing)
        generator = torch.Generator().manual_seed(self.seed)
        layers: list[LayerResult] = []
        with torch.no_grad():
            for window, count in zip(self._windows(banks), counts, strict=True):
                shown = min(self.tokens, routing[window[0].name].tokens)
                labels_of = kmeans_in_groups([sums[bank.name] / shown for bank in window], count, generator)
                for bank, labels in zip(window, labels_of, strict=True):
                    used = routing[bank.name]
                    # An expert that no token visited still has a say, as if one token had.
                    frequency = used.frequency.clamp(min=1 / used.tokens)
                    clusters = clusters_of(bank, labels, frequency, grams.get(bank.name), align=self.align)
                    if self.experts == "merged":
                        layers.append(self._merge(bank, clusters, labels))
                    else:
                        layers.append(self._factor(job, bank, clusters, labels))
        return job.model, layers

    def _windows(self, banks: Sequence[ExpertBank]) -> list[Sequence[ExpertBank]]:
        return [banks[start : start + self.window] for start in range(0, len(banks), self.window)]

    def _counts(self, banks: Sequence[ExpertBank], ratio: float) -> list[int]:
        """How many clusters each window has: experts that it keeps, together at most the wanted share, or groups."""
        windows = self._windows(banks)
        before = [sum(bank.count for bank in window) for window in windows]
        if self.experts == "shared":
            return [max(len(window), round(b / self.group)) for window, b in zip(windows, before, strict=True)]
        own = self.intra if self.experts == "low-rank" else 0.0
        if own > ratio:
            raise ValueError(f"intra={own} alone removes more than ratio={ratio}; lower intra, or raise ratio")
        # Rounded along the way, so that the whole is right and no window is off by more than one.
        share = (1 - ratio) / (1 - own)
        ends = [math.floor(share * sum(before[: i + 1]) + 1e-9) for i in range(len(windows))]
        kept = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        for window, count in zip(windows, kept, strict=True):
            if count < len(window):
                largest = 1 - (1 - own) * len(window) / sum(bank.count for bank in window)
                raise ValueError(
                    f"ratio={ratio} leaves {count} experts for the {len(window)} layers from {window[0].name} on; "
                    f"the largest ratio is about {largest:.2f}"
                )
        return kept

    def _keep(self, ratio: float) -> float:
        """The part of its numbers that a matrix, or those of a group together, may hold as factors."""
        return 1 - (self.intra if self.experts == "low-rank" else ratio)

    def _merge(self, bank: ExpertBank, clusters: Iterable[Cluster], labels: Tensor) -> LayerResult:
        """Store one expert a cluster in place of the bank's."""
        shape, count = bank.shape, int(labels.max()) + 1
        if count == bank.count:
            return LayerResult(bank.name, shape, min(shape), "dense", shape[0] * shape[1], 0.0)
        merged, lost, whole = [], 0.0, 0.0
        for cluster in clusters:
            one = Expert(*(merge(group, cluster.frequency, self.basis_energy) for group in cluster.weights))
            lost, whole = lost + cluster.lost(one), whole + cluster.squares()
            merged.append(one)
        gate_up = torch.stack([torch.cat((one.gate, one.up)) for one in merged])
        down = torch.stack([one.down for one in merged])
        shapes = {"gate_up_proj": tuple(gate_up.shape), "down_proj": tuple(down.shape)}
        set_geometry(bank.module, Geometry({"num_experts": count}, shapes=shapes, experts=tuple(labels.tolist())))
        bank.gate_up.copy_(gate_up)
        bank.down.copy_(down)
        error = math.sqrt(lost / whole) if whole else 0.0
        return LayerResult(bank.name, shape, min(shape), "experts", count * bank.expert_parameters, error)

    def _factor(self, job: Job, bank: ExpertBank, clusters: Iterable[Cluster], labels: Tensor) -> LayerResult:
        """Put the factors of each cluster in place of the bank."""
        keep, one_each = self._keep(job.ratio), self.experts == "low-rank"
        groups: list[tuple[Sequence[int], GroupFactors]] = []
        lost = whole = 0.0
        for place, cluster in enumerate(clusters):
            found = cluster.merged(keep) if one_each else cluster.shared(_SIDES[self.basis], keep)
            groups.append(((place,) if one_each else cluster.members, found))
            dense = [factor.dense() for factor in (found.gate, found.up, found.down)]
            lost, whole = lost + cluster.lost(dense), whole + cluster.squares()
        made = bank_of(bank, groups)
        swap(job.model, bank.name, made)
        if made.count < bank.count:
            set_geometry(made, Geometry(experts=tuple(labels.tolist())))
        rank = min(rank for group in made.layout for rank in group.ranks)
        error = math.sqrt(lost / whole) if whole else 0.0
        return LayerResult(bank.name, bank.shape, rank, self.experts, made.num_parameters(), error)


def _check_ranks(banks: Sequence[ExpertBank], keep: float) -> None:
    for bank in banks:
        if not shared_rank(1, (bank.width, bank.shape[1]), "left", keep):
            raise ValueError(
                f"{bank.name}: {keep:.1%} of an expert's {bank.width} x {bank.shape[1]} matrices is less than one "
                "direction; lower ratio or intra"
            )


def _warn_of_unused(routing: dict[str, Routing]) -> None:
    unused = {name: (used.frequency == 0).nonzero()[:, 0].tolist() for name, used in routing.items()}
    for name, experts in unused.items():
        if experts:
            warnings.warn(
                f"{name}: no calibration token was sent to experts {', '.join(map(str, experts))}; "
                "each counts as if one had, give more data to know better",
                EckartWarning,
                stacklevel=3,
            )
