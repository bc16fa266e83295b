"""Let plain ``from_pretrained`` and ``save_pretrained`` of transformers handle models with structures.

transformers asks a *quantizer* to change the empty model before it loads the weights. Ours puts the structures
where ``config.json`` says they are::

    "quantization_config": {"quant_method": "eckart", "version": 1, "modules": {name: spec}, "history": [...],
                            "geometry": {name: what differs from the model's configuration}}

The name is transformers'; nothing is quantized, all tensors are ordinary floating-point ones of any type, and
training, ``half()`` and ``float()`` work as for any model. Importing this module registers the quantizer;
``import eckart`` arranges that this happens when it is needed (``eckart._hooks``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..structures import Structure, structure_from_spec
from ..structures.conv_chain import ConvChain
from ..structures.factored_experts import FactoredExperts
from .geometry import Geometry, geometries, set_geometry
from .replace import swap

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["METHOD", "VERSION", "AnyStructure", "EckartConfig", "EckartQuantizer", "mark", "specs"]

METHOD = "eckart"
VERSION = 1

#: What stands in ``modules``: linear maps, convolutions and banks of experts.
AnyStructure = Structure | ConvChain | FactoredExperts


class EckartConfig(QuantizationConfigMixin):
    """What ``config.json`` says about the structures of a model.

    Args:
        modules: name of each structure to its ``spec()``.
        history: what was done to the model, oldest first; any JSON values.
        version: version of this format.
        quant_method: always ``"eckart"``.
        geometry: name of each module whose shape is not the configuration's to its ``Geometry.to_json()``.

    Raises:
        ValueError: a newer Eckart wrote this, or an entry is not a spec.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        history: Sequence[Any] | None = None,
        version: int = VERSION,
        quant_method: str = METHOD,
        geometry: dict[str, dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        # The version first: a newer format may differ in everything else.
        if not isinstance(version, int) or version > VERSION:
            raise ValueError(
                f"this checkpoint has Eckart's format {version!r} and this Eckart reads up to {VERSION}: "
                "pip install --upgrade eckart"
            )
        if unknown:
            raise ValueError(f"unknown keys in the eckart part of config.json: {', '.join(sorted(unknown))}")
        for name, spec in (modules or {}).items():
            if not isinstance(spec, dict) or "type" not in spec:
                raise ValueError(f"config.json describes {name} without a structure type; the checkpoint is damaged")
        self.quant_method = quant_method  # type: ignore[assignment]  # an open set, though the annotation is an enum
        self.version = version
        self.modules = dict(modules or {})
        self.history = list(history or [])
        for name, entry in (geometry or {}).items():
            if not isinstance(entry, dict):
                raise ValueError(f"config.json describes the shape of {name} by {entry!r}; the checkpoint is damaged")
            Geometry.from_json(entry)
        self.geometry = dict(geometry or {})

    def to_dict(self) -> dict[str, Any]:
        """As JSON data; without a geometry where no module has one, as older versions wrote it."""
        found: dict[str, Any] = super().to_dict()
        return found if found.get("geometry") else {key: value for key, value in found.items() if key != "geometry"}


class EckartQuantizer(HfQuantizer):
    """Builds, describes and removes the structures of a transformers model."""

    quantization_config: EckartConfig
    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a dense checkpoint that is given an ``EckartConfig``: there is nothing to build from."""
        if not self.pre_quantized:
            raise ValueError(
                "EckartConfig describes a checkpoint that Eckart wrote; to compress a dense one use eckart.compress"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        found: dict[str, dict[str, Any]] = {}
        names = _names_in(model, self.quantization_config.modules)
        for saved_name, name in names.items():
            spec = self.quantization_config.modules[saved_name]
            old = model.get_submodule(name)
            swap(model, name, _built(spec, old))
            found[name] = spec
        self.quantization_config.modules = found
        shapes: dict[str, dict[str, Any]] = {}
        for saved_name, name in _names_in(model, self.quantization_config.geometry).items():
            shapes[name] = self.quantization_config.geometry[saved_name]
            set_geometry(model.get_submodule(name), Geometry.from_json(shapes[name]))
        self.quantization_config.geometry = shapes

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # transformers only warns about missing tensors. A structure with made-up factors is not a model.
        for name in self.quantization_config.modules:
            for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
                offloaded = tensor.device.type == "meta"
                if not offloaded and not getattr(tensor, "_is_hf_initialized", False):
                    raise ValueError(f"the checkpoint has no tensor {name}.{key}; it is damaged or incomplete")
        # Its only effect would be to forbid half() and float(), which are fine here.
        state: Any = model
        state.is_quantized = False
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *_: Any, **__: Any) -> tuple[None, dict[str, str]]:
        """Describe the model as it is now; called by ``save_pretrained`` before it writes ``config.json``."""
        self.quantization_config.modules = specs(model)
        self.quantization_config.geometry = geometries(model)
        return None, {}

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Turn all structures into dense layers in place; called by ``model.dequantize()``.

        Args:
            model: the model.
            dtype: floating-point type afterwards; default unchanged. (Other quantizers default to the type in the
                config, which may be stale here.)
        """
        from .export import make_dense

        make_dense(model)
        self.remove_quantization_config(model)
        module: nn.Module = model
        if dtype is not None:
            module.to(dtype)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Structures are saved as safetensors like any other weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Training the factors themselves, without an adapter, is fine."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Structures are plain tensor code."""
        return True


def specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the spec of every structure in the model by name; the parts of a structure are in its own spec."""
    found: dict[str, dict[str, Any]] = {}

    def search(prefix: str, module: nn.Module) -> None:
        if isinstance(module, AnyStructure):
            found[prefix] = module.spec()
            return
        for key, child in module.named_children():
            search(f"{prefix}.{key}".lstrip("."), child)

    search("", model)
    return found


def mark(model: PreTrainedModel, history: Sequence[Any] | None = None) -> None:
    """Tell a model that it holds structures, so that its own ``save_pretrained`` writes what is needed to load it.

    A model without structures is left (or becomes) an ordinary one.

    Args:
        model: a transformers model, changed in place.
        history: entries to add to the model's history; any JSON values.

    Raises:
        ValueError: another method quantized the model, or the history is not JSON.
    """
    _check_history(history)
    before = getattr(model.config, "quantization_config", None)
    if before is not None and not isinstance(before, EckartConfig):
        # A config that was read and not yet used for loading holds a plain dictionary.
        method = before.get("quant_method") if isinstance(before, dict) else before.quant_method
        if method != METHOD:
            raise ValueError(
                f"the model is quantized with {getattr(method, 'value', method)}; "
                "load it dequantized before storing structures in it"
            )
        before = EckartConfig.from_dict(before)
    modules, geometry = specs(model), geometries(model)
    if not modules and not geometry:
        if before is not None:
            EckartQuantizer(before).remove_quantization_config(model)
        return
    config = EckartConfig(modules, [*(before.history if before else []), *(history or [])], geometry=geometry)
    model.config.quantization_config = config
    state: Any = model  # the three attributes that from_pretrained sets
    state.hf_quantizer = EckartQuantizer(config, pre_quantized=True)
    state.quantization_method = METHOD
    state.is_quantized = False


def _built(spec: dict[str, Any], old: nn.Module) -> AnyStructure:
    """The structure of a spec on the meta device, in the type of the module whose place it takes."""
    empty: dict[str, Any] = {"device": "meta"}
    empty["dtype"] = next((p.dtype for p in old.parameters() if p.is_floating_point()), None)
    if spec["type"] == FactoredExperts.type_name:
        activation: Any = getattr(old, "act_fn", None)
        return FactoredExperts.from_spec(spec, activation, **empty)
    if spec["type"] == ConvChain.type_name:
        return ConvChain.from_spec(spec, **empty)
    return structure_from_spec(spec, **empty)


def _check_history(history: Sequence[Any] | None) -> None:
    try:
        json.dumps(list(history or []), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the history must hold JSON values only: {error}") from None


def _names_in(model: PreTrainedModel, saved: Iterable[str]) -> dict[str, str]:
    """Find the layers that a checkpoint names in a model that may have more or fewer heads around it.

    ``AutoModel`` on a checkpoint of a ``...ForCausalLM`` gives the inner model, whose names lack a prefix, and the
    other way round. Layers outside the inner model are left out then.
    """
    prefix = model.base_model_prefix + "."
    known = {name for name, _ in model.named_modules()}
    found: dict[str, str] = {}
    for name in saved:
        here = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in known), None)
        if here is not None:
            found[name] = here
        elif model.base_model is not model or name.startswith(prefix):
            raise ValueError(f"config.json describes the layer {name}, which {type(model).__name__} does not have")
    return found


# In place of the stand-ins of eckart._hooks, or of older classes if this module is reloaded: the functions
# refuse a name that is taken.
auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
auto.register_quantization_config(METHOD)(EckartConfig)
auto.register_quantizer(METHOD)(EckartQuantizer)
