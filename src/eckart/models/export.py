"""Turn structures back into ordinary dense layers, for tools that do not know Eckart."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..structures import Structure
from ..structures.factored_experts import FactoredExperts
from .checkpoint import load
from .files import atomic_directory, check_target
from .geometry import geometries
from .kinds import linear_kind
from .quantizer import AnyStructure, specs
from .replace import swap
from .select import LinearRef

__all__ = ["export_dense", "make_dense"]


def export_dense(
    model_or_path: PreTrainedModel | str | os.PathLike[str],
    path: str | os.PathLike[str],
    tokenizer: Any | None = None,
    *,
    force: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model as an ordinary dense checkpoint that loads without Eckart.

    Every structure becomes W = ``dense()`` (out, in) in the layout that the model's class has. The model itself is
    not changed; besides it, memory holds the dense weights.

    Args:
        model_or_path: a model, or what :func:`~eckart.models.load` takes.
        path: directory to write.
        tokenizer: tokenizer to save beside it; default the one of ``model_or_path`` if that is a path.
        force: replace a model that is there already.
        max_shard_size: largest weight file, in bytes or as in ``"5GB"``.

    Returns:
        The absolute path.

    Raises:
        FileExistsError: as for :func:`~eckart.models.save`.
        CheckpointError: as for :func:`~eckart.models.save`.
        ValueError: a layer has a shape or a bias for which the model's class has no place, or a geometry.
    """
    target = check_target(path, force=force)
    if isinstance(model_or_path, PreTrainedModel):
        model = model_or_path
    else:
        model, found = load(model_or_path)
        tokenizer = found if tokenizer is None else tokenizer
    dense = _dense_copy(model)
    with atomic_directory(target, force=force) as partial:
        dense.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return target


def make_dense(model: PreTrainedModel) -> None:
    """Replace every structure of ``model`` by the dense layer that its class has there, in place."""
    for name, (structure, layer) in _pairs(model, _skeleton(model)).items():
        trained = any(parameter.requires_grad for parameter in structure.parameters())
        for key, tensor in _dense_tensors(structure, layer).items():
            setattr(layer, key, nn.Parameter(tensor, requires_grad=trained))
        swap(model, name, layer)


def _dense_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with dense layers; it shares all other tensors with ``model``."""
    copied = _skeleton(model)
    pairs = _pairs(model, copied)
    inside = tuple(f"{name}." for name in pairs)
    state = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(inside)}
    for name, (structure, layer) in pairs.items():
        state |= {f"{name}.{key}": tensor for key, tensor in _dense_tensors(structure, layer).items()}
    copied.load_state_dict(state, assign=True)
    copied.tie_weights()
    if model.can_generate():
        copied.generation_config = model.generation_config
    return copied


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """Build the model's class on the meta device: it says which dense layer belongs where, and costs nothing."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(config)
    if hasattr(model, "_weight_conversions"):
        # How transformers maps its tensors to the checkpoint's; saving must map them back the same way.
        conversions: Any = model._weight_conversions
        skeleton._weight_conversions = conversions
    return skeleton


def _pairs(model: PreTrainedModel, skeleton: PreTrainedModel) -> dict[str, tuple[AnyStructure, Any]]:
    """Pair every structure with the dense layer of its class, or refuse what does not fit, before work is done."""
    changed = next(iter(geometries(model)), None)
    if changed is not None:
        raise ValueError(
            f"{changed} has another shape than its configuration says, so the model has no dense form of its class; "
            "keep it as Eckart saves it, or export the one that it was made of"
        )
    pairs: dict[str, tuple[AnyStructure, Any]] = {}
    for name in specs(model):
        structure = model.get_submodule(name)
        layer: Any = skeleton.get_submodule(name)
        assert isinstance(structure, AnyStructure)
        if not isinstance(structure, Structure):
            pairs[name] = structure, layer
            continue
        kind = linear_kind(layer)
        if kind is None:
            raise ValueError(f"{name} is a {type(layer).__name__} in the dense model, not a linear layer")
        shape, place = (structure.out_features, structure.in_features), LinearRef(name, layer, kind).shape
        if shape != place:
            raise ValueError(
                f"{name} is {shape[0]} x {shape[1]} and the dense model has {place[0]} x {place[1]} there; "
                "a model whose widths changed has no dense form of its class"
            )
        if layer.bias is None and structure.bias is not None and bool(structure.bias.any()):
            raise ValueError(f"{name} has a bias and the dense model has no place for one")
        pairs[name] = structure, layer
    return pairs


def _dense_tensors(structure: AnyStructure, layer: Any) -> dict[str, Tensor]:
    """Return the tensors of ``layer`` by name, in its layout, with what ``structure`` holds."""
    if isinstance(structure, FactoredExperts):
        return {name: tensor.detach() for name, tensor in structure.dense().items()}
    dense = structure.dense().detach()
    weight = (dense.mT if linear_kind(layer) == "conv1d" else dense).contiguous()
    if layer.bias is None:
        return {"weight": weight}
    bias = structure.bias
    return {
        "weight": weight,
        "bias": torch.zeros_like(layer.bias, device=weight.device) if bias is None else bias.detach(),
    }
