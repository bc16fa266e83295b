"""LoRAP: attention is low-rank, MLPs are not: factors for the one, fewer channels for the other.

    attention   W D = U diag(s) V^T,  B = U_k diag(s_k) V_k^T D^-1,   D = diag(sqrt(a)),  a_j = E x_j^2
                rank of values and output : rank of queries and keys = 3 : 1
    MLP         score_i = sum over matrices of || row i of |W| diag(sqrt(a)) ||,  columns for the last one;
                the least of all 1 % stay, the next least go

G. Li, Y. Tang and W. Zhang, LoRAP: Transformer Sub-Layers Deserve Differentiated Structured Compression for Large
Language Models, ICML 2024, arXiv 2404.09695; code: lihuang258/LoRAP. Blocks are calibrated with those before them
compressed already. What we do differently: with grouped-query attention the budget of numbers is split and not the
rank; factors are stored pivoted unless told otherwise, which buys a larger rank. Recovery is `eckart adapt`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg.rank import Form, rank_for_parameters
from ..linalg.weighted import weighted_svd
from ..models.calibrate import Statistics
from ..models.parts import AttentionPart, MLPPart
from ..models.select import LinearRef
from ..models.slices import columns_of, rows_of_linear
from ..structures import LowRank, Structure
from .contract import Change, Factors, ModuleMethod
from .layer import low_rank
from .policies import attention_shares

__all__ = ["LoRAP", "channel_scores", "kept_channels"]


def channel_scores(inputs: list[tuple[Tensor, Tensor]], output: tuple[Tensor, Tensor]) -> Tensor:
    """How much each inner channel of an MLP carries (p,), from weights (out, in) and E x_j^2 (in,) of their inputs."""
    scores = sum((weight.double().square() @ moment).sqrt() for weight, moment in inputs)
    weight, moment = output
    return scores + (weight.double().square().sum(0) * moment).sqrt()


def kept_channels(scores: Tensor, count: int, retained: float) -> Tensor:
    """Which channels stay: all but a slice of the sorted scores that begins after the least ``retained``.

    Example:
        >>> kept_channels(torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0]), 3, retained=0.2).tolist()
        [0, 1, 4]
    """
    order = scores.argsort()
    first = min(int(retained * len(scores)), count)
    return torch.cat([order[:first], order[first + len(scores) - count :]]).sort().values


@dataclass(frozen=True)
class LoRAP(ModuleMethod):
    """Low rank for attention, pruning for MLPs.

    Attributes:
        times: rank of values and output over that of queries and keys, 3.
        retained: fraction of an MLP's channels, the least important of all, that stays; 0.01.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from eckart import compress
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model, data = LlamaForCausalLM(config), [torch.arange(24).reshape(2, 12)]
        >>> result = compress(model, LoRAP(), ratio=0.3, data=data, progress=False)
        >>> {layer.name.rpartition(".")[2]: layer.form for layer in result.layers[:5]}
        {'q_proj': 'pivoted', 'k_proj': 'pivoted', 'v_proj': 'dense', 'o_proj': 'dense', 'gate_proj': 'pruned'}

    Reference:
        G. Li et al., ICML 2024, arXiv 2404.09695.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"meansquare"})
    sequential: ClassVar[bool] = True

    times: float = 3.0
    retained: float = 0.01

    def __post_init__(self) -> None:
        if not self.times >= 1:
            raise ValueError(f"times must be at least 1, not {self.times}")
        if not 0 <= self.retained < 1:
            raise ValueError(f"retained must lie in [0, 1), not {self.retained}")

    def compress(
        self, part: AttentionPart | MLPPart, statistics: Mapping[str, Statistics], parameters: int, form: Form
    ) -> Change | None:
        """Factors for attention, fewer channels for an MLP."""
        moments = {ref.name: statistics[ref.name].require("meansquare") for ref in part.linears}
        if isinstance(part, MLPPart):
            return self._mlp(part, moments, parameters)
        return self._attention(part, moments, parameters, form)

    def _mlp(self, part: MLPPart, moments: Mapping[str, Tensor], parameters: int) -> Change | None:
        width = parameters // (sum(ref.in_features for ref in part.inputs) + part.output.out_features)
        if not 0 < width < part.width:
            return None
        inputs = [(ref.weight.detach(), moments[ref.name]) for ref in part.inputs]
        scores = channel_scores(inputs, (part.output.weight.detach(), moments[part.output.name]))
        kept = kept_channels(scores, width, self.retained)
        structures = {ref.name: rows_of_linear(ref, kept) for ref in part.inputs}
        return Change({**structures, part.output.name: columns_of(part.output, kept)})

    def _attention(
        self, part: AttentionPart, moments: Mapping[str, Tensor], parameters: int, form: Form
    ) -> Change | None:
        whole = sum(ref.in_features * ref.out_features for ref in part.linears)
        if parameters >= whole:
            return None
        less = (part.value.name, part.output.name)
        removed = attention_shares(
            {ref.name: ref.shape for ref in part.linears}, less, 1 - parameters / whole, times=self.times
        )
        structures: dict[str, Structure] = {}
        errors = {}
        for ref in part.linears:
            m, n = ref.shape
            rank = rank_for_parameters(m, n, int((1 - removed[ref.name]) * m * n), form)
            if removed[ref.name] > 0 and rank < min(m, n):
                structures[ref.name], errors[ref.name] = _factors(ref, moments[ref.name], max(rank, 1), form)
        stored = sum(s.num_parameters() - _bias(s) for s in structures.values())
        stored += sum(ref.in_features * ref.out_features for ref in part.linears if ref.name not in structures)
        return Change(structures, errors=errors) if structures and stored <= parameters else None


def _factors(ref: LinearRef, moment: Tensor, rank: int, form: Form) -> tuple[LowRank, float]:
    weight = ref.weight.detach()
    # A channel that was never seen counts a little, as in the published code.
    measure = moment.clamp(min=1e-8 * float(moment.max().clamp(min=1e-300)))
    best = weighted_svd(weight, measure, rank)
    found = Factors(best.basis, best.basis.mT @ weight.to(best.basis.dtype))
    structure, factors = low_rank(ref, found, rank, form)
    whole = float((weight.double().square() @ measure).sum())
    lost = float(((weight - factors.up @ factors.down).double().square() @ measure).sum())
    return structure, (lost / whole) ** 0.5 if whole else 0.0


def _bias(structure: Structure) -> int:
    return 0 if structure.bias is None else structure.bias.numel()
