"""The verb: look at a model with one of the published analyses, and leave it as it was."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from torch import nn

from .. import catalog
from ..models.adapted import is_adapted, under_adapters
from ..models.batches import as_batches
from ..models.evaluate import check_context
from ..models.finite import check_finite
from ..models.groups import evaluating
from ..models.select import Where
from ..options import chosen_method
from .contract import Analysis, AnalysisMethod, Subject

__all__ = ["analyze"]

_WHAT = {
    "base": "a second model to compare with; pass base=",
    "data": "batches of inputs; pass data=",
    "labels": 'batches with "labels", -100 where a token is not part of the answer',
}


def analyze(
    model: nn.Module,
    method: str | AnalysisMethod,
    *,
    base: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    where: Where | None = None,
    progress: bool = True,
    **options: Any,
) -> Analysis:
    """Figures of a model by a published analysis.

    Args:
        model: a transformers model, on any device.
        method: a catalog name (`eckart methods --family analysis`), or a method with its options.
        base: the model that it is compared with, for methods that need two; what a PEFT model's adapters are on, if
            left out.
        data: batches of inputs for methods that need them: dictionaries of tensors, or tensors of token ids.
        where: which linears, as in `eckart.models.linears`.
        progress: show bars with the time left.
        options: the method's own options, when it is given by name.

    Returns:
        Figures, one row a layer, head or text, and tensors to go on with. The models are as they were.

    Raises:
        UnknownMethodError: with the nearest names.
        ValueError: a bad option, something that the method needs is missing, two models of different shapes, inputs
            longer than the context, or NaN or Inf in a weight (named by layer).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> found = analyze(LlamaForCausalLM(config), "matrix-nuclear-norm", data=[torch.arange(24)], progress=False)
        >>> found.rows[0]["tokens"]
        24
    """
    chosen: AnalysisMethod = chosen_method(method, options, "analysis")
    name = catalog.name_of(type(chosen)) or type(chosen).__name__
    if base is None and "base" in chosen.needs and is_adapted(model):
        base = under_adapters(model)
    batches = as_batches(data) if data is not None else []
    given = {"base": base is not None, "data": bool(batches), "labels": all("labels" in one for one in batches)}
    for need in ("base", "data", "labels"):
        if need in chosen.needs and not given[need]:
            raise ValueError(f"{name} needs {_WHAT[need]}")
    for one in (model, base):
        if one is not None:
            check_finite(one)
    if base is not None:
        _check_same_shapes(under_adapters(model), under_adapters(base))
    device = next(model.parameters()).device
    for batch in batches:
        if "input_ids" in batch:
            check_context(model, batch["input_ids"].shape[1])
    placed = [{key: tensor.to(device) for key, tensor in batch.items()} for batch in batches]
    subject = Subject(model, base, placed, where, progress)
    start = time.perf_counter()
    with evaluating(model), evaluating(base if base is not None else nn.Identity()):
        found = chosen.analyze(subject)
    found.method, found.settings, found.seconds = name, asdict(chosen), time.perf_counter() - start
    return found


def _check_same_shapes(model: nn.Module, base: nn.Module) -> None:
    """Refuse two models of which a parameter that both have differs in shape, or which share none."""
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    common = {name: tuple(p.shape) for name, p in model.named_parameters() if name in shapes}
    if not common:
        raise ValueError("the two models have no parameter in common; compare a model with what it was made from")
    for name, shape in common.items():
        if shape != shapes[name]:
            raise ValueError(
                f"{name} has the shape {shape} in the model and {shapes[name]} in the base; "
                "compare a model with what it was made from"
            )
