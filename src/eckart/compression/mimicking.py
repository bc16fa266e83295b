"""Atomic feature mimicking of any torch model: its linears and embedding tables, and decoders merged into linears.

The mathematics is in `afm_ctr`. A recommender model is compressed by naming its layers and their ranks, and trained
on afterwards: from this start it takes an epoch or two.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..linalg import LinalgError
from ..linalg.rank import Form
from ..models.calling import AnyBatch
from ..models.kinds import owners, untreatable
from ..models.output_moments import Moments, output_moments
from ..models.replace import swap
from ..models.result import LayerResult
from ..models.select import nearest
from ..structures import EckartWarning, LowRank
from ..structures.low_rank_embedding import LowRankEmbedding
from .afm_ctr import Atoms, atoms, mimic_embedding, mimic_linear, mimic_with_activation

__all__ = ["fuse", "mimic"]


def mimic(
    model: nn.Module,
    batches: Iterable[AnyBatch] | None,
    ranks: Mapping[str, int],
    *,
    activation: nn.Module | None = None,
    form: Form = "plain",
) -> list[LayerResult]:
    """Replace linears and embedding tables by low-rank ones that put out nearly the same, in place.

        linear (m, n)  ->  k (m + n) + m numbers        table (V, d)  ->  V k + d k + d numbers

    All statistics come from the model as it is, in evaluation mode, in one pass. Use training data, and fold a batch
    normalisation that follows a linear into it afterwards, not before.

    Args:
        model: any torch model, changed in place.
        batches: inputs of its forward: tensors, tuples of arguments or dictionaries of them; None for the truncated
            SVD of weights and tables, which asks for no data and counts all rows of a table alike.
        ranks: full name of an ``nn.Linear`` or ``nn.Embedding`` -> k.
        activation: put between the two linears of each layer; a different network that has to be trained, see
            `mimic_with_activation`.
        form: how factors are stored; "pivoted" takes k^2 numbers less.

    Returns:
        What became of each layer, with the relative error of its outputs on the data (NaN with ``activation``).
        A layer that its rank would not make smaller, or that no batch reaches, stays, with an `EckartWarning`.

    Raises:
        ValueError: no such layer, one that cannot be replaced, or a rank out of range. The model is unchanged.
        LinalgError: NaN or Inf in the outputs of a layer, which is named. The model is unchanged.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 16))
        >>> found = mimic(model, [torch.arange(50)], {"0": 2, "1": 4})
        >>> [(layer.form, layer.parameters) for layer in found]
        [('low_rank_embedding', 124), ('plain', 96)]

    Reference:
        Yu et al., KDD 2024, arXiv 2405.18146.
    """
    modules = {name: _checked(model, name, rank) for name, rank in ranks.items()}
    if batches is None:
        moments = {name: _of_weight(module) for name, module in modules.items()}
    else:
        moments = output_moments(model, batches, list(ranks))
    made: dict[str, nn.Module] = {}
    results, left = [], []
    for name, rank in ranks.items():
        module, known = modules[name], moments.get(name)
        m, n = module.weight.shape
        new, found = None, None
        if known is not None:
            try:
                found = atoms(known, rank)
            except LinalgError as failure:
                raise LinalgError(f"{name}: {failure}") from failure
            new = _made(module, found, activation, form)
        if new is None or found is None or _size(new) >= _size(module):
            left.append(f"{name} ({'seen by no batch' if known is None else f'rank {rank} saves nothing'})")
            results.append(LayerResult(name, (m, n), min(m, n), "dense", m * n, 0.0))
            continue
        made[name] = new.requires_grad_(module.weight.requires_grad)
        kind = "low_rank_embedding" if isinstance(module, nn.Embedding) else form
        inner = activation is not None and isinstance(module, nn.Linear)
        bias = m if isinstance(module, nn.Linear) else 0
        error = float("nan") if inner else found.error
        results.append(LayerResult(name, (m, n), rank, "activation" if inner else kind, _size(new) - bias, error))
    for name, new in made.items():
        swap(model, name, new)
    if left:
        warnings.warn(f"left as they are: {', '.join(left)}", EckartWarning, stacklevel=2)
    return results


def fuse(linear: nn.Linear, parts: Sequence[LowRankEmbedding | int]) -> nn.Linear:
    """A linear on codes instead of vectors: the decoders of the embeddings that feed it are merged into it.

        W' = W blockdiag(U_1, ..., U_t),   b' = b + W [mu_1, ..., mu_t]

    Read ``embedding.lookup(ids)`` (k wide) where the linear read ``embedding(ids)``. Where something else reads the
    vectors too (a factorisation machine, a cross network), that keeps its decoder. Compress the linear afterwards.

    Args:
        linear: y = W x + b, x the concatenation of the parts.
        parts: a `LowRankEmbedding`, or the width of what passes through as it is, in the order of x.

    Returns:
        The linear on the concatenated codes; the given one is unchanged.

    Raises:
        ValueError: the widths do not add up, or a padding vector is no decoded code.

    Example:
        >>> table = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> embedding = LowRankEmbedding.from_table(table, torch.tensor([[1.0], [0.0]]), torch.tensor([1.0, 1.0]))
        >>> linear = nn.Linear(3, 4)
        >>> merged, ids, rest = fuse(linear, [embedding, 1]), torch.tensor([0, 1]), torch.ones(2, 1)
        >>> wanted = linear(torch.cat([embedding(ids), rest], 1))
        >>> torch.allclose(merged(torch.cat([embedding.lookup(ids), rest], 1)), wanted, atol=1e-6)
        True
    """
    widths = [part if isinstance(part, int) else part.embedding_dim for part in parts]
    if sum(widths) != linear.in_features:
        raise ValueError(f"the linear reads {linear.in_features} numbers, the parts have {sum(widths)}: {widths}")
    columns, shift = [], torch.zeros(linear.out_features, dtype=torch.float64, device=linear.weight.device)
    for part, block in zip(parts, linear.weight.detach().double().split(widths, dim=1), strict=True):
        if isinstance(part, int):
            columns.append(block)
            continue
        _check_padding(part)
        columns.append(block @ part.up.detach().double())
        shift += block @ part.mean.detach().double()
    weight = torch.cat(columns, dim=1)
    fused = nn.Linear(weight.shape[1], linear.out_features, device=weight.device, dtype=linear.weight.dtype)
    with torch.no_grad():
        fused.weight.copy_(weight)
        fused.bias.copy_(shift if linear.bias is None else shift + linear.bias.double())
    return fused.requires_grad_(linear.weight.requires_grad).train(linear.training)


@torch.no_grad()
def _check_padding(embedding: LowRankEmbedding) -> None:
    """Refuse a padding vector that the decoder cannot make."""
    if embedding.padding is None or embedding.padding_idx is None:
        return
    decoded = embedding.codes[embedding.padding_idx] @ embedding.up.mT + embedding.mean
    if float((decoded - embedding.padding).norm()) > 1e-5 * float(embedding.mean.norm() + embedding.padding.norm()):
        raise ValueError(
            f"the vector of padding id {embedding.padding_idx} is no decoded code, so a linear on codes cannot see "
            "it; keep this embedding's decoder, or give the table no padding_idx"
        )


def _checked(model: nn.Module, name: str, rank: int) -> nn.Linear | nn.Embedding:
    known = [key for key, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    if name not in known:
        raise ValueError(f"the model has no nn.Linear or nn.Embedding {name!r}{nearest(name, known)}")
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | nn.Embedding)
    names_of = owners(model)
    for key, parameter in module.named_parameters():
        others = [other for other in names_of[id(parameter)] if other != f"{name}.{key}"]
        if others:
            raise ValueError(f"{name}.{key} is tied with {others[0]}; replacing it would untie them")
    reason = untreatable(module) if isinstance(module, nn.Linear) else None
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        reason = "max_norm and scale_grad_by_freq work on whole rows of the table"
    if reason:
        raise ValueError(f"{name} cannot be replaced: {reason}")
    width = module.embedding_dim if isinstance(module, nn.Embedding) else min(module.weight.shape)
    if not 1 <= rank <= width:
        raise ValueError(f"the rank of {name} must be from 1 to {width}, not {rank}")
    return module


def _of_weight(module: nn.Linear | nn.Embedding) -> Moments:
    """The moments for which mimicking is the truncated SVD of the weight, or of the table."""
    weight = module.weight.detach().double()
    if isinstance(module, nn.Embedding):
        return Moments(len(weight), weight.new_zeros(weight.shape[1]), weight.mT @ weight)
    mean = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach().double()
    return Moments(1, mean, weight @ weight.mT)


def _made(module: nn.Linear | nn.Embedding, found: Atoms, activation: nn.Module | None, form: Form) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return mimic_embedding(module, found)
    if activation is not None:
        return mimic_with_activation(module, found, copy.deepcopy(activation))
    weight: Tensor = module.weight.detach()
    up, down, bias = mimic_linear(weight, None if module.bias is None else module.bias.detach(), found)
    return LowRank.from_factors(up, down, bias=bias, form=form, dtype=weight.dtype)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
