"""Locally linear maps: at one prompt, the next-token prediction as a sum of one matrix a token, and what it is made of.

    y (d) = sum_t J_t e_t + c,    J (d, T, d) = dy/dE with all gates held constant;    J = u diag(s) vh

E (T, d) are the input embeddings, y the last token's hidden state after the final norm, c what biases add (zero in a
model without). The map holds at this prompt only: it is no Taylor expansion. Nor is it unique: holding the gate of
an MLP constant, or its other factor, gives two exact maps with other singular vectors (``gating``); look at both.

Left singular vectors are decoded by the head, right ones by the nearest input embeddings; signs are such that the
prompt itself takes part in each direction positively. For long prompts the leading triplets come from products with J
(``matrix_free``), values and right vectors from J itself, not from its image of a random block as in the original.

The error is ||y - sum_t J_t e_t - c|| / ||y|| with c from the derivatives for the biases, so it tells whether the model
was made linear. Half precision leaves 1e-2: load the model in float32.

J. R. Golden, "Large Language Models are Locally Linear Mappings", 2025, arXiv:2505.24293; code: llms-are-llms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..linalg import stable_rank, svd, svd_operator
from ..models.detach import Gating
from ..models.jacobian import jacobians, linear_part, products
from ..models.progress import track
from ..models.recording import Recording, input_table, output_scores, recorded
from .contract import Analysis, AnalysisMethod, Subject

__all__ = ["LocallyLinear", "Part", "nearest", "triplets", "triplets_by_products", "with_strings"]

Product = Callable[[Tensor], Tensor]
Part = Literal["tokens", "to", "within", "from"]

_PROBES = 32  # random directions that the Frobenius norm of what the leading triplets leave is estimated from


def triplets(jacobian: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of a map, each turned so that its input takes part positively.

        J = u diag(s) vh,    vh x >= 0

    Args:
        jacobian: (..., k, n).
        inputs: x (..., n).
        rank: Number of triplets.

    Returns:
        u (..., k, rank), s (..., min(k, n)) all the singular values, vh (..., rank, n).

    Example:
        >>> x = torch.tensor([-1.0, 1.0])
        >>> u, s, vh = triplets(torch.diag(torch.tensor([2.0, 1.0])), x, 1)
        >>> s.tolist(), float(u[0]), float(vh @ x)
        ([2.0, 1.0], -1.0, 1.0)
    """
    found = svd(jacobian, driver="exact" if jacobian.dtype == torch.float64 else "gram")
    return _turned(found.u[..., :rank], found.s, found.vh[..., :rank, :], inputs)


def triplets_by_products(
    maps: tuple[Product, Product], source: Tensor, output: Tensor, rank: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Leading singular triplets of the Jacobian of recorded tensors, which is never formed, and its stable rank.

        ||J||_F^2 ~ sum s_i^2 + mean over probes g of ||J^T (I - u u^T) g||^2

    Args:
        maps: Products with J and with J^T, from :func:`~eckart.models.jacobian.products`.
        source: n entries.
        output: (k,).
        rank: Number of triplets.

    Returns:
        u (k, rank), s (rank,), vh (rank, n), and the estimate of the stable rank.
    """
    shape = len(output), source.numel()
    found = svd_operator(*maps, shape, rank, dtype=output.dtype, device=output.device)
    generator = torch.Generator(device=output.device).manual_seed(0)
    probes = torch.randn(shape[0], _PROBES, generator=generator, dtype=output.dtype, device=output.device)
    rest = maps[1](probes - found.u @ (found.u.mT @ probes)).double().square().sum() / _PROBES
    energy = found.s.double().square().sum() + rest
    u, s, vh = _turned(found.u, found.s, found.vh, source.detach().flatten())
    return u, s, vh, float(energy / found.s[0].double().square()) if found.s[0] > 0 else 0.0


def _turned(u: Tensor, s: Tensor, vh: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    signs = torch.where((vh @ inputs.to(vh.dtype)[..., None])[..., 0] < 0, -1.0, 1.0).to(vh.dtype)
    return u * signs[..., None, :], s, vh * signs[..., None]


def nearest(vectors: Tensor, table: Tensor, count: int) -> list[list[int]]:
    """Ids of the embeddings with the largest cosine to each vector.

    Args:
        vectors: (n, d).
        table: (vocabulary, d).
        count: Ids a vector.

    Example:
        >>> nearest(torch.tensor([[0.0, 2.0]]), torch.eye(2), 1)
        [[1]]
    """
    scores = vectors.to(table) @ nn.functional.normalize(table, dim=-1).mT
    found: list[list[int]] = scores.topk(min(count, len(table))).indices.tolist()
    return found


def with_strings(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of :class:`LocallyLinear` with the texts of their token ids beside them.

    Args:
        rows: As in ``Analysis.rows``.
        tokenizer: What decodes a list of ids.

    Returns:
        Copies with "word", "output words" and "input words".
    """

    def words(lists: list[list[int]]) -> list[list[str]]:
        return [[tokenizer.decode([one]) for one in ids] for ids in lists]

    return [
        {
            **row,
            "word": None if row["id"] is None else tokenizer.decode([row["id"]]),
            "output words": words(row["outputs"]),
            "input words": words(row["inputs"]),
        }
        for row in rows
    ]


@dataclass(frozen=True)
class LocallyLinear(AnalysisMethod):
    """The detached Jacobian of prompts: its singular values, decoded vectors, and the share of each token.

    Args:
        gating: Which factor of a gated MLP is held constant: "gate", act(g) as a whole; or "up", act(g) / g and up.
        part: Maps for the last token. "tokens": embeddings to output, as a whole and by token. Of every layer, "to":
            embeddings to what leaves it; "within": what enters it to what leaves it; "from": what enters it to output.
        components: Singular vectors that a row decodes.
        top: Tokens that each is decoded to.
        chunk: Rows of J a backward pass; memory grows by the gradients of one layer times this.
        matrix_free: Leading triplets by products with J, and an estimate of the stable rank; for long prompts.
        max_gib: Memory that Jacobians of one prompt may take, in GiB: 4 d^2 T bytes in float32, times the layers for
            "from".

    Raises:
        ValueError: An unknown gating or part, a number below 1, or no memory.

    Example:
        >>> LocallyLinear(part="from").components
        8
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})

    gating: Gating = "gate"
    part: Part = "tokens"
    components: int = 8
    top: int = 5
    chunk: int = 64
    matrix_free: bool = False
    max_gib: float = 4.0

    def __post_init__(self) -> None:
        self.check_choices(gating=Gating, part=Part)
        for name in ("components", "top", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.max_gib > 0:
            raise ValueError(f"max_gib must be positive, not {self.max_gib}")

    def analyze(self, subject: Subject) -> Analysis:
        """One row a map and, for the whole one, a token; the figures are means over the rows, the error the largest."""
        found = Analysis({})
        if not (prompts := list(_prompts(subject))):
            raise ValueError("all texts are padding; pass token ids with an attention_mask of ones")
        for text, ids in enumerate(track(prompts, "detached Jacobians", enabled=subject.progress)):
            with recorded(subject.model, ids, self.gating) as recording:
                self._check_size(recording)
                found.rows += self._rows(subject.model, recording, ids, text, found.tensors)
        wholes = [row for row in found.rows if row["token"] == "all"]
        found.figures = {"texts": len(prompts), "error": max(row["error"] for row in wholes)}
        found.figures |= {name: mean(row[name] for row in wholes) for name in ("constant", "stable rank", "largest")}
        found.figures["predicted token among the first"] = mean(row["predicted"] in row["outputs"][0] for row in wholes)
        if found.figures["error"] > 1e-3:
            found.warnings.append(
                f"the maps give the outputs back to {found.figures['error']:.1e} only; load the model in float32"
            )
        return found

    def _check_size(self, recording: Recording) -> None:
        maps = len(recording.states) - 1 if self.part == "from" else 1
        gib = maps * len(recording.output) * recording.embeddings.nbytes / 2**30
        if gib > self.max_gib and not self.matrix_free:
            raise ValueError(
                f"the Jacobians of {len(recording.embeddings)} tokens take {gib:.1f} GiB; set matrix_free, or raise "
                f"max_gib from {self.max_gib:g}"
            )

    def _rows(
        self, model: nn.Module, recording: Recording, ids: Tensor, text: int, tensors: dict[str, Tensor]
    ) -> list[dict[str, Any]]:
        """The rows of one prompt."""
        y = recording.output.detach()
        explained = linear_part(recording.output, [recording.embeddings, *recording.additive])
        if (error := _relative(y - explained, y)) > 0.1:
            raise ValueError(
                f"{type(model).__name__} has operations that are not made linear: its map misses {error:.0%} of the "
                "output; a model of norms, softmax attention and MLPs is needed"
            )
        predicted = int(output_scores(model, y[None]).argmax())
        rows = []
        for name, token, final, figures, u, vh in self._maps(recording, text, tensors):
            # A vector over all tokens is decoded at the token where it is largest.
            strongest = vh[torch.arange(len(vh)), vh.square().sum(dim=-1).argmax(dim=-1)]
            scores = output_scores(model, u.mT, final=final)
            rows.append(
                {
                    "text": text,
                    "map": name,
                    "token": "all" if token is None else token,
                    "id": None if token is None else int(ids[token]),
                    **figures,
                    "error": error,
                    "predicted": predicted,
                    "outputs": scores.topk(min(self.top, scores.shape[1])).indices.tolist(),
                    "inputs": nearest(strongest, input_table(model), self.top),
                }
            )
        return rows

    def _maps(self, recording: Recording, text: int, tensors: dict[str, Tensor]) -> Iterator[Any]:
        """(name, token, whether to the output, figures, u (d, k), vh (k, tokens, d)) of each map."""
        for target, sources in self._pairs(recording):
            y, final = target.detach(), target is recording.output
            dense: list[Tensor | None] = [None] * len(sources)
            if not self.matrix_free:
                dense = [*jacobians(target, list(sources.values()), chunk=self.chunk)]
            for (name, source), jacobian in zip(sources.items(), dense, strict=True):
                x = source.detach().reshape(-1, source.shape[-1])
                if jacobian is None:
                    maps = products(target, source, chunk=self.chunk)
                    u, s, vh, rank = triplets_by_products(maps, source, target, self.components)
                    parts = maps[0](torch.block_diag(*x).mT).mT  # a column holds the embedding of one token
                else:
                    jacobian = jacobian.reshape(len(y), *x.shape)
                    u, s, vh = triplets(jacobian.flatten(1), x.flatten(), self.components)
                    rank, parts = stable_rank(s), torch.einsum("otd,td->to", jacobian, x)
                constant = _relative(y - parts.sum(0), y)
                shares = (parts @ y / (y @ y)).tolist()
                label = f"{text}: {name}"
                tensors |= {f"s {label}": s, f"u {label}": u, f"vh {label}": vh.reshape(-1, *x.shape)}
                tensors[f"contributions {label}"] = parts

                def figures(s: Tensor, rank: float, share: float, constant: float = constant) -> dict[str, float]:
                    return {"stable rank": rank, "largest": float(s[0]), "share": share, "constant": constant}

                yield name, None, final, figures(s, rank, sum(shares)), u, vh.reshape(-1, *x.shape)
                if jacobian is not None and self.part == "tokens":
                    tensors[f"jacobian {label}"] = jacobian
                    blocks = triplets(jacobian.transpose(0, 1), x, self.components)
                    for t, (u, s, vh) in enumerate(zip(*blocks, strict=True)):
                        yield name, t, final, figures(s, stable_rank(s), shares[t]), u, vh[:, None]

    def _pairs(self, recording: Recording) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Each target (d,), with the tensors by name that it is a map of."""
        states, depth = recording.states, len(recording.states) - 1
        if self.part == "tokens":
            yield recording.output, {"embeddings to output": recording.embeddings}
        elif self.part == "from":
            yield recording.output, {f"layer {i} to output": states[i] for i in range(depth)}
        else:
            for i in range(depth):
                to = self.part == "to"
                source = {f"embeddings to layer {i}": recording.embeddings} if to else {f"layer {i}": states[i]}
                yield states[i + 1][0, -1], source


def _prompts(subject: Subject) -> Iterator[Tensor]:
    """The tokens of each text, without padding."""
    for batch in subject.batches:
        if "input_ids" not in batch:
            raise ValueError(f"prompts are token ids, and a batch has only {', '.join(batch)}; pass input_ids")
        kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) > 0
        for ids, mask in zip(batch["input_ids"], kept, strict=True):
            if bool(mask.any()):
                yield ids[mask]


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(torch.linalg.vector_norm(difference.double()) / torch.linalg.vector_norm(whole.double()))
