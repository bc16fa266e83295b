"""Singular values of every weight of a model, in figures; of a checkpoint on disk with a cap on memory.

Each weight goes through the eigenvalues of its smaller Gram matrix in float64, several weights side by side, and where
that matrix cannot vouch for the smallest values to 1e-4, through LAPACK. `eckart.analysis.layer_spectrum` has the
figures.
"""

from __future__ import annotations

import os

from torch import nn

from ..linalg import LinalgError, singular_values
from ..models.finite import check_weight
from ..models.select import LinearRef, Where
from ..models.weights import MEMORY, map_weights, weights_of
from .layer_spectrum import FRACTIONS, RATIOS, LayerSpectrum, figures_of_values

__all__ = ["FRACTIONS", "RATIOS", "LayerSpectrum", "spectra", "spectra_of"]

_RTOL = 1e-4


def spectra(
    model: nn.Module | str | os.PathLike[str],
    *,
    where: Where | None = None,
    memory: float = MEMORY,
    progress: bool = True,
) -> list[LayerSpectrum]:
    """Spectrum figures of every selected weight.

    Args:
        model: a transformers model (a structure's product is looked at as a whole, adapters of PEFT are in their
            weights); or the directory of a safetensors checkpoint, which is read weight by weight, a name on the hub,
            or "demo".
        where: which linears, as in `eckart.models.linears`.
        memory: bytes that the weights at work may take with what is computed from them; default 640 MB. One weight
            is always worked on: 4096 x 11008 in bfloat16 takes 0.9 GB.
        progress: show a bar with the time left.

    Returns:
        One entry a weight, in the model's order; singular values to 1e-4 of themselves (float32) for dense weights.

    Raises:
        FileNotFoundError: no such model, or a shard is missing.
        LayoutError: the checkpoint's tensors are not those of the model one by one; load it and give the model.
        ValueError: the model has no linears, or a weight has NaN or Inf, named by layer.

    Example:
        >>> import torch
        >>> block = torch.nn.Linear(4, 4, bias=False)
        >>> _ = torch.nn.init.eye_(block.weight)
        >>> model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Sequential(block)])})
        >>> [found] = spectra(model, progress=False)
        >>> round(found.stable_rank, 6), round(found.effective_rank, 6), found.break_even_rank
        (4.0, 4.0, 2)
    """
    return spectra_of(weights_of(model, where).linears, memory=memory, progress=progress)


def spectra_of(refs: list[LinearRef], *, memory: float = MEMORY, progress: bool = True) -> list[LayerSpectrum]:
    """`spectra` of weights that were selected already."""
    return map_weights(_figures, refs, "spectra", memory=memory, progress=progress)


def _figures(ref: LinearRef) -> LayerSpectrum:
    weight = ref.weight.detach()
    try:
        # Below its rank a factored weight has rounding alone, which is not worth a decomposition to full accuracy.
        s = singular_values(weight, rtol=None if ref.kind == "structure" else _RTOL)
    except LinalgError as error:
        check_weight(ref.name, weight)
        raise LinalgError(f"{ref.name}: {error}") from error
    bias = 0 if ref.bias is None else ref.bias.numel()
    stored = sum(parameter.numel() for parameter in ref.module.parameters()) - bias
    return figures_of_values(ref.name, ref.shape, s, stored)
