"""MoDeGPT: narrower heads and MLPs by three matrix problems on pairs of weights; smaller dense layers, no factors.

    MLP      keep channels J of largest ridge leverage [C (C + l I)^-1]_ii,   W_out <- W_out C[:, J] C[J, J]^-1
    q, k     keep the pairs i, j = i + h/2 with the largest sum over heads of C_q,ii C_k,ii + C_q,jj C_k,jj
    v, o     v' = P^T v,  W_o' = W_o Q   with Q P^T the best rank-r map between them: min E ||W_o (v - Q P^T v)||^2

C (p, p) is the second moment of what enters W_out, C_q and C_k (h, h) those of a head's queries and keys before they
are rotated, h the width of a head. C.-H. Lin et al., MoDeGPT: Modular Decomposition for Large Language Model
Compression, ICLR 2025, arXiv 2408.09632; no official code. What we do differently: biases are part of the second
moments; the paper's C^1/2 for values is never formed, since the problem lives in the h coordinates of a head; with
grouped-query attention the value problem is solved for all query heads of a group at once. All heads of a layer keep
the same pairs, because a layer has one table of cosines. Heads that are normalised (Qwen3) are left alone: their norm
is over all coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..linalg import eigh, ridge_leverage_scores, solve_spd
from ..linalg.rank import Form
from ..models.calibrate import Statistics
from ..models.geometry import Geometry
from ..models.parts import AttentionPart, MLPPart
from ..models.select import LinearRef
from ..models.slices import rows_of_linear
from ..models.trials import head_coordinates
from ..structures import Dense
from .contract import Change, ModuleMethod
from .policies import Policy

__all__ = ["MoDeGPT", "best_coordinates", "second_moment", "value_maps"]


def second_moment(ref: LinearRef, statistics: Statistics) -> Tensor:
    """E y y^T (m, m) of a linear's outputs y = W x + b, from the moments of its inputs, in float64."""
    weight = ref.weight.detach().double()
    gram = statistics.require("gram") / max(statistics.count, 1)
    moment = weight @ gram @ weight.mT
    if ref.bias is not None:
        bias, mean = ref.bias.detach().double(), weight @ statistics.require("mean")
        moment = moment + torch.outer(mean, bias) + torch.outer(bias, mean) + torch.outer(bias, bias)
    return moment


def best_coordinates(queries: Tensor, keys: Tensor, count: int, *, rotary: bool) -> list[int]:
    """The coordinates that carry the attention scores, in the order of the head.

    Args:
        queries: (heads, h) second moments of each coordinate.
        keys: (kv_heads, h); query heads in a row share one.
        count: how many to keep; even if ``rotary``.
        rotary: whether coordinate i goes with i + h/2.
    """
    group = len(queries) // len(keys)
    scores = (queries * keys.repeat_interleave(group, 0)).sum(0)
    if not rotary:
        return sorted(scores.topk(count).indices.tolist())
    half = len(scores) // 2
    pairs = sorted((scores[:half] + scores[half:]).topk(count // 2).indices.tolist())
    return [*pairs, *(half + pair for pair in pairs)]


def value_maps(moment: Tensor, readers: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """P and Q (h, r) that minimise E ||W (v - Q P^T v)||^2 for E v v^T = A (h, h) and readers W (d, h).

    A = V diag(s^2) V^T,   left singular vectors U_r of  diag(s) V^T W^T,   P = V diag(1/s) U_r,   Q = V diag(s) U_r
    """
    values, vectors = eigh(moment)
    root = values.clamp(min=0).sqrt()
    whitening = vectors * root
    inner = whitening.mT @ (readers.mT @ readers) @ whitening
    leading = eigh(inner, rank).vectors
    inverse = torch.where(root > root[0] * 1e-7, 1 / root.clamp(min=1e-300), 0.0)
    return (vectors * inverse) @ leading, whitening @ leading


@dataclass(frozen=True)
class MoDeGPT(ModuleMethod):
    """Modular decomposition.

    Attributes:
        ridge: of the leverage scores, in units of the mean second moment; 1e-2 as in the reimplementation closest to
            the paper, which does not state its own.
        refit: solve for the MLP's output weights again; False keeps the remaining columns as they are.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from eckart import compress
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model, data = LlamaForCausalLM(config), [torch.arange(24).reshape(2, 12)]
        >>> result = compress(model, MoDeGPT(), ratio=0.3, data=data, progress=False)
        >>> bool(result.ratio >= 0.3), model.model.layers[0].mlp.up_proj.out_features < 32
        (True, True)

    Reference:
        C.-H. Lin et al., ICLR 2025, arXiv 2408.09632.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "mean"})
    allocation: ClassVar[Policy] = "block-influence"

    ridge: float = 1e-2
    refit: bool = True

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"ridge must be positive, not {self.ridge}")

    def refuses(self, part: AttentionPart | MLPPart) -> str | None:
        """Heads that cannot lose coordinates."""
        if isinstance(part, AttentionPart) and part.rotary is None:
            return "its heads cannot lose coordinates (they are normalised, or rotated in another way)"
        return None

    def compress(
        self, part: AttentionPart | MLPPart, statistics: Mapping[str, Statistics], parameters: int, form: Form
    ) -> Change | None:
        """The part with narrower heads, or fewer channels."""
        if isinstance(part, MLPPart):
            return self._mlp(part, statistics, parameters)
        return self._attention(part, statistics, parameters)

    def _mlp(self, part: MLPPart, statistics: Mapping[str, Statistics], parameters: int) -> Change | None:
        width = parameters // (sum(ref.in_features for ref in part.inputs) + part.output.out_features)
        if not 0 < width < part.width:
            return None
        known = statistics[part.output.name]
        gram = known.require("gram") / max(known.count, 1)
        kept = ridge_leverage_scores(gram, self.ridge).topk(width).indices.sort().values
        weight = part.output.weight.detach().double()
        fitted = weight[:, kept]
        if self.refit:
            # Towards the columns as they are where the calibration text says nothing.
            lost = weight @ gram[:, kept] - fitted @ gram[kept][:, kept]
            fitted = fitted + solve_spd(gram[kept][:, kept], lost.mT, ridge=1e-6).mT
        bias = part.output.bias
        output = Dense.from_weight(fitted, bias=None if bias is None else bias.detach(), dtype=part.output.weight.dtype)
        error = weight.clone()
        error[:, kept] -= fitted
        size = float((weight @ gram * weight).sum())
        relative = (max(float((error @ gram * error).sum()), 0.0) / size) ** 0.5 if size else 0.0
        structures = {ref.name: rows_of_linear(ref, kept) for ref in part.inputs}
        return Change({**structures, part.output.name: output}, errors={part.output.name: relative})

    def _attention(self, part: AttentionPart, statistics: Mapping[str, Statistics], parameters: int) -> Change | None:
        a_coordinate = (
            part.heads * (part.query.in_features + part.output.out_features)
            + part.kv_heads * (part.key.in_features + part.value.in_features)
        )  # fmt: skip
        width = parameters // a_coordinate
        width -= width % 2 if part.rotary else 0
        if not 0 < width < part.head_dim:
            return None
        moments = {ref.name: second_moment(ref, statistics[ref.name]) for ref in (part.query, part.key, part.value)}
        queries, keys = (moments[ref.name].diagonal().reshape(-1, part.head_dim) for ref in (part.query, part.key))
        kept = best_coordinates(queries, keys, width, rotary=bool(part.rotary))
        value, output = self._values(part, moments[part.value.name], width)
        structures = {
            part.query.name: rows_of_linear(part.query, head_coordinates(kept, part.heads, part.head_dim)),
            part.key.name: rows_of_linear(part.key, head_coordinates(kept, part.kv_heads, part.head_dim)),
            part.value.name: value,
            part.output.name: output,
        }
        return Change(structures, Geometry({"head_dim": width}, rotary=tuple(kept) if part.rotary else None))

    @staticmethod
    def _values(part: AttentionPart, moment: Tensor, width: int) -> tuple[Dense, Dense]:
        h, group = part.head_dim, part.heads // part.kv_heads
        weight, reading = part.value.weight.detach().double(), part.output.weight.detach().double()
        bias = None if part.value.bias is None else part.value.bias.detach().double()
        rows, biases, columns = [], [], []
        for head in range(part.kv_heads):
            at = slice(head * h, (head + 1) * h)
            readers = reading[:, head * group * h : (head + 1) * group * h].reshape(len(reading), group, h)
            down, up = value_maps(moment[at, at], readers.reshape(-1, h), width)
            rows.append(down.mT @ weight[at])
            columns.append((readers @ up).reshape(len(reading), group * width))
            if bias is not None:
                biases.append(down.mT @ bias[at])
        dtype, last = part.value.weight.dtype, part.output.bias
        value = Dense.from_weight(torch.cat(rows), bias=torch.cat(biases) if biases else None, dtype=dtype)
        output = Dense.from_weight(torch.cat(columns, 1), bias=None if last is None else last.detach(), dtype=dtype)
        return value, output
