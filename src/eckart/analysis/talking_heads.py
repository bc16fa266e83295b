"""Talking heads: which single components of early attention heads write into what later heads read, from weights alone.

    writer    O V = sum_i s_i v_i u_i^T,   u_i read, v_i written   O (d, w), V (w, d) thin maps of a head
    reader    M = A^T B (d, d):  Q^T K for its queries, K^T Q for its keys, V^T O^T for its values
    score     CS_i = ||v_i^T M||_F / ||M||_F  in [0, 1],   CS^2 = sum_i s_i^2 CS_i^2 / sum_i s_i^2  for the whole head

With B^T = P R (QR), ||v^T A^T B|| = ||R A v||: a reader is the thin matrix R A (h, d), and the scores of all components
against all heads of a layer are one product, O(h d) for a component and head; no d x d matrix is made. For a random
direction v, E CS^2 = 1/d and Var CS^2 = 2 (sum t^4 / (sum t^2)^2 - 1/d) / (d (d + 2)), t the singular values of M; z
is how many of those deviations CS^2 lies above 1/d.

Where queries and keys are rotated by position (RoPE), M depends on how far apart the two tokens are. By default the
two sides are scored by themselves then, M = Q^T and M = K^T (heads that share keys share those scores); ``offset``
takes the product for keys so many tokens back. The paper's models have no such rotation in full.

The paper has no public code, and gives the edit but not the formulas above: all of it is a reconstruction, the score
after N. Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021. The noise floor and the ranking are
ours. Biases are outside, and so is what the MLPs between two layers do: scores see the direct path only.

J. Merullo, C. Eickhoff and E. Pavlick, "Talking Heads: Understanding Inter-layer Communication in Transformer Language
Models", NeurIPS 2024, arXiv:2406.09519; code: none (jmerullo/talking_heads is empty).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.head_maps import HeadLayer, HeadMaps, attention_layers
from ..models.progress import track
from .composition import component_scores, noise_floor, ov_components, reader, whole_score
from .contract import Analysis, AnalysisMethod, Subject

__all__ = ["TalkingHeads"]

Order = Literal["score", "z", "contribution"]
KINDS = ("query", "key", "value")


@dataclass(frozen=True)
class TalkingHeads(AnalysisMethod):
    """Composition of the components of early heads with what later heads read.

    Args:
        top: How many component pairs of each kind (query, key, value) become rows.
        order: What ranks them: the contribution to the whole head's score, s_i CS_i / ||s||; the score itself, in which
            a component that hardly writes anything counts as much as the strongest; or its z.
        offset: How many tokens back the keys are, where queries and keys are rotated by position; None scores queries
            and keys by themselves there.

    Raises:
        ValueError: top below 1, another order, or a negative offset.

    Example:
        >>> TalkingHeads(order="z")
        TalkingHeads(top=20, order='z', offset=None)
    """

    top: int = 20
    order: Order = "contribution"
    offset: int | None = None

    def __post_init__(self) -> None:
        self.check_choices(order=Order)
        if self.top < 1:
            raise ValueError(f"top must be at least 1 row, not {self.top}")
        if self.offset is not None and self.offset < 0:
            raise ValueError(f"offset must be how many tokens back the keys are, at least 0, not {self.offset}")

    def analyze(self, subject: Subject) -> Analysis:
        """One row a component pair; tensors "query", "key", "value" (layer, head, component, layer, head)."""
        layers, reasons = attention_layers(subject.model, subject.where)
        scores = _Scores(layers, self.offset)
        for index in track(range(len(layers)), "heads", enabled=subject.progress):
            scores.add(index)
        if not scores.compared:
            raise ValueError("no two of the selected attention layers are in one stream; select an earlier and a later")
        rows = [row for kind in KINDS for row in scores.rows(kind, self.top, self.order)]
        figures: dict[str, Any] = {
            "layers": len(layers),
            "heads": sum(layer.heads for layer in layers),
            "component pairs": scores.compared,
            "noise floor": layers[0].width ** -0.5,
        }
        for kind in KINDS:
            figures[f"{kind}: highest component score"] = float(scores.parts[kind].max())
            figures[f"{kind}: highest whole-head score"] = float(scores.wholes[kind].max())
        tensors = {**scores.parts, **{f"{kind} whole": scores.wholes[kind] for kind in KINDS}, "s": scores.s}
        warnings = ["the paper published no code: scores and ranking are a reconstruction"]
        if self.offset is None and any(layer.rotation for layer in layers):
            warnings.append("queries and keys are rotated by position: each was scored by itself; offset= takes both")
        if any(row["gap"] < 1e-3 for row in rows):
            warnings.append("a gap below 1e-3: components of nearly equal strength turn freely, read them together")
        warnings += [f"{name} was left out: {reason}" for name, reason in reasons.items()]
        return Analysis(figures, rows, tensors, warnings)


class _Scores:
    """Scores of all pairs of heads in different layers of one stream, filled layer by layer of the readers."""

    def __init__(self, layers: Sequence[HeadLayer], offset: int | None) -> None:
        self.layers, self.offset, self.compared = layers, offset, 0
        most = max(layer.heads for layer in layers)
        width = max(layer.output.in_features // layer.heads for layer in layers)
        count = len(layers)
        self.s = torch.zeros(count, most, width)
        self.parts = {kind: torch.zeros(count, most, width, count, most) for kind in KINDS}
        self.wholes = {kind: torch.zeros(count, most, count, most) for kind in KINDS}
        self.floors = {kind: torch.ones(count, most) for kind in KINDS}
        self._written: list[Tensor] = []  # (heads, w, d) of the layers so far

    def add(self, index: int) -> None:
        """Compare a layer, as reader, with all before it, and keep what it writes."""
        layer = self.layers[index]
        maps = layer.maps()
        share = layer.heads // layer.groups
        values = maps.value.repeat_interleave(share, dim=0)
        earlier = [i for i in range(index) if self.layers[i].stack == layer.stack]
        if earlier:
            readers = self._readers(layer, maps, values)
            self.compared += sum(self._written[i].shape[:2].numel() for i in earlier) * layer.heads * len(KINDS)
            for kind, read in readers.items():
                self.floors[kind][index, : layer.heads] = noise_floor(read, _dimensions(layer)).cpu()
                for i in earlier:
                    heads, width = self._written[i].shape[:2]
                    found = component_scores(self._written[i].flatten(0, 1), read).cpu()
                    found = found.view(-1, heads, width)
                    self.parts[kind][i, :heads, :width, index, : layer.heads] = found.movedim(0, -1).float()
                    whole = whole_score(self.s[i, :heads, :width].to(found), found)
                    self.wholes[kind][i, :heads, index, : layer.heads] = whole.T.float()
        components = ov_components(values, maps.output)
        self.s[index, : layer.heads, : components.s.shape[1]] = components.s.cpu()
        self._written.append(components.u.mT)

    def _readers(self, layer: HeadLayer, maps: HeadMaps, values: Tensor) -> dict[str, Tensor]:
        """The thin matrices (heads, h, d) of the three kinds of reading."""
        keys = maps.key.repeat_interleave(layer.heads // layer.groups, dim=0)
        found = {"value": reader(values, maps.output.mT)}
        if layer.rotation is None:
            return {"query": reader(maps.query, keys), "key": reader(keys, maps.query), **found}
        if self.offset is None:
            return {"query": reader(maps.query), "key": reader(keys), **found}
        turned = layer.rotation.turn(keys, -self.offset)  # q at t meets k at t - offset
        return {"query": reader(maps.query, turned), "key": reader(turned, maps.query), **found}

    def rows(self, kind: str, top: int, order: Order) -> list[dict[str, Any]]:
        """The highest pairs of one kind."""
        parts, floors = self.parts[kind], self.floors[kind]
        dimensions = torch.tensor([_dimensions(layer) for layer in self.layers])[:, None]
        z = (parts.square() - 1 / dimensions) / floors.clamp(min=1e-30)
        shares = self.s / self.s.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        ranked = {"score": parts, "z": z, "contribution": parts * shares[..., None, None]}[order].clone()
        ranked[parts == 0] = -torch.inf
        ranked[self.s <= 1e-6 * self.s.amax(dim=-1, keepdim=True)] = -torch.inf  # directions of nothing
        shared = kind == "key" and self.offset is None
        for index, layer in enumerate(self.layers):  # one row for heads that share the keys
            share = layer.heads // layer.groups if shared and layer.rotation else 1
            ranked[..., index, torch.arange(ranked.shape[-1]) % share != 0] = -torch.inf
        best = ranked.flatten().topk(min(top, int(ranked.isfinite().sum()))).indices
        places = [one.tolist() for one in torch.unravel_index(best, ranked.shape)]
        found = []
        for w_layer, w_head, part, r_layer, r_head in zip(*places, strict=True):
            layer = self.layers[r_layer]
            share = layer.heads // layer.groups if shared and layer.rotation else 1
            place = (w_layer, w_head, part, r_layer, r_head)
            s = self.s[w_layer, w_head]
            near = (s - s[part]).abs()[[i for i in (part - 1, part + 1) if 0 <= i < len(s)]]
            found.append(
                {
                    "pair": f"{w_layer}.{w_head} component {part} -> {r_layer}.{r_head}",
                    "kind": kind,
                    "writer_layer": w_layer,
                    "writer_head": w_head,
                    "component": part,
                    "reader_layer": r_layer,
                    "reader_heads": list(range(r_head, r_head + share)),
                    "score": float(parts[place]),
                    "z": float(z[place]),
                    "share": float(shares[w_layer, w_head, part]),
                    "gap": float(near.min() / s[part]) if len(near) and s[part] > 0 else 0.0,
                    "whole": float(self.wholes[kind][w_layer, w_head, r_layer, r_head]),
                }
            )
        return found


def _dimensions(layer: HeadLayer) -> int:
    return layer.width - layer.centred
