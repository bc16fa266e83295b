"""A model with adapters of PEFT on it: its weights with the adapters in them, and the model under the adapters.

    W (out, in) = W0 + Δ,   Δ the sum of what the active adapters add

Neither view changes the model: the one under the adapters is a second tree of modules over the same parameters, and a
merged weight is computed on a copy of the one layer that it is asked of, in float64 for PEFT's own adapters.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .select import LinearRef, Selection, Where, linears

__all__ = ["AdaptedRef", "adapted_linears", "adapted_modules", "inside_peft", "is_adapted", "under_adapters"]


@dataclass(frozen=True)
class AdaptedRef(LinearRef):
    """A linear map with adapters on it.

    Attributes:
        layer: PEFT's layer around `module`.
    """

    layer: Any = field(repr=False)

    @property
    def weight(self) -> Tensor:
        """W = W0 + Δ (out, in): a copy, in float32 or wider."""
        delta = self.delta()
        return LinearRef(self.name, self.module, self.kind).weight.detach().to(delta.dtype) + delta

    def delta(self) -> Tensor:
        """Δ (out, in) of the active adapters, in float32 or wider; zeros where none is active.

        Raises:
            ValueError: an adapter is merged into the base weight, or cannot be.
        """
        if self.layer.merged:
            names = ", ".join(self.layer.merged_adapters)
            raise ValueError(f"{self.name}: the adapter {names} is merged into the weight; unmerge_adapter() first")
        if self.layer.disable_adapters:
            return torch.zeros(self.shape, device=next(self.module.parameters()).device)
        if hasattr(self.layer, "total_delta"):  # ours, whose base may be a structure
            ours: Tensor = self.layer.total_delta()
            return ours
        with torch.no_grad():
            twin = copy.deepcopy(self.layer).to(torch.float64)
            stored = LinearRef(self.name, twin.get_base_layer(), self.kind)
            before = stored.weight.detach().clone()
            try:
                twin.merge()
            except (NotImplementedError, RuntimeError, TypeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{self.name}: the adapter cannot be merged into the weight ({reason})") from error
            return stored.weight.detach() - before


def is_adapted(model: nn.Module) -> bool:
    """Whether a layer of the model, or of the model that a PEFT model wraps, carries an adapter.

    Example:
        >>> is_adapted(nn.Linear(2, 2))
        False
    """
    kinds = _kinds()
    return bool(kinds) and any(isinstance(module, kinds[:2]) for module in model.modules())


def adapted_modules(model: nn.Module) -> list[str]:
    """Names, in the model under the adapters, of the layers with adapters and of the modules trained whole.

    Example:
        >>> adapted_modules(nn.Linear(2, 2))
        []
    """
    if not is_adapted(model):
        return []
    found: list[str] = []
    for name, module in inside_peft(model).named_modules():
        if isinstance(module, _kinds()[:2]) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def under_adapters(model: nn.Module) -> nn.Module:
    """The model without its adapters, as a second tree of modules over the same parameters, under their plain names.

    Args:
        model: a PEFT model, or any other, which is returned itself.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> under_adapters(model) is model
        True
    """
    return _bare(inside_peft(model), trained=False) if is_adapted(model) else model


def adapted_linears(model: nn.Module, where: Where | None = None) -> Selection:
    """Select weight matrices as `linears` does, with the weights that the model computes with.

    Args:
        model: a PEFT model, in which names are those of the model under the adapters and modules that are trained
            whole count as trained; or any other.
        where: which linear maps.

    Returns:
        The linear maps, those with adapters as `AdaptedRef`.

    Raises:
        ValueError: as for `linears`.
    """
    if not is_adapted(model):
        return linears(model, where)
    inner, tuner = inside_peft(model), _kinds()[0]
    layers: dict[str, Any] = {name: module for name, module in inner.named_modules() if isinstance(module, tuner)}
    chosen = linears(_bare(inner, trained=True), where)
    refs = [
        AdaptedRef(ref.name, ref.module, ref.kind, layers[ref.name]) if ref.name in layers else ref
        for ref in chosen.linears
    ]
    return Selection(refs, chosen.skipped)


def inside_peft(model: nn.Module) -> nn.Module:
    """The transformers model that a PEFT model wraps, adapters and all; any other model itself."""
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return inner


def _kinds() -> tuple[Any, ...]:
    """PEFT's layers with adapters, and modules trained whole; none where PEFT has not been loaded."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper, ModulesToSaveWrapper


def _bare(module: nn.Module, *, trained: bool) -> Any:
    """The module under its adapters; with ``trained``, with the trained copies of what is trained whole."""
    tuner, wrapper, whole = _kinds()
    if isinstance(module, tuner):
        return module.get_base_layer()
    if isinstance(module, wrapper):
        known: Any = module
        active = known.active_adapters[:1] if trained and not known.disable_adapters else []
        saved = isinstance(module, whole) and active and active[0] in known.modules_to_save
        return known.modules_to_save[active[0]] if saved else known.original_module
    children = {key: child and _bare(child, trained=trained) for key, child in module._modules.items()}
    if all(children[key] is child for key, child in module._modules.items()):
        return module
    twin = copy.copy(module)
    twin.__dict__["_modules"] = children
    return twin
