"""A plain LoRA as tensors and a configuration: read from a directory or a model, checked, and written."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["check_plain", "of_model", "read", "scale_of", "sites_of", "write"]

_MARK = "eckart_lora_correction"  # in the metadata of the written weights
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # those that leave the base weights alone


def read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and tensors of an adapter on disk.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: it was corrected already.
    """
    from peft import PeftConfig
    from safetensors import safe_open

    if not (path / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter in {path}: adapter_config.json is missing")
    if not (path / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{path} has an adapter_config.json and no adapter_model.safetensors; save it again")
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        if _MARK in (file.metadata() or {}):
            raise ValueError(f"the LoRA in {path} is corrected already; give the one that was trained on the emulator")
        return PeftConfig.from_pretrained(str(path)), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def of_model(model: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and tensors of an adapter of a PEFT model: copies.

    Raises:
        ValueError: there is none of this name, or it is merged.
    """
    from peft import get_peft_model_state_dict

    if name not in getattr(model, "peft_config", {}):
        raise ValueError(f"the model has no adapter named {name!r}; give a PeftModel, or its directory")
    layers = [m for m in model.modules() if getattr(m, "merged_adapters", None)]
    if layers:
        raise ValueError("the adapter is merged into the weights; unmerge_adapter() first")
    state = get_peft_model_state_dict(model, adapter_name=name)
    return copy.deepcopy(model.peft_config[name]), {key: value.detach().cpu() for key, value in state.items()}


def check_plain(config: Any) -> None:
    """Refuse what is more than W + c B A, for which the correction is not derived.

    Raises:
        ValueError: naming it.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(f"the adapter is {kind}, not LORA; make it one with `eckart convert`")
    reasons = {
        "DoRA (use_dora), whose norm changes with the base": config.use_dora,
        f"trained biases (bias={config.bias!r})": config.bias != "none",
        "biases of its own (lora_bias)": config.lora_bias,
        "repeated layers (layer_replication)": config.layer_replication,
        "adapted parameters (target_parameters)": config.target_parameters,
        "pooled inputs (use_qalora)": config.use_qalora,
        f"init_lora_weights={config.init_lora_weights!r}, which changes the base": config.init_lora_weights
        not in _PLAIN_STARTS,
    }
    for reason, present in reasons.items():
        if present:
            raise ValueError(f"the LoRA has {reason}; the correction is for plain LoRA only")


def sites_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Linear layer by name -> what comes before ``.lora_A.weight``; embeddings and convolutions stay as they are."""
    prefixes = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    sites = {p.removeprefix("base_model.model."): p for p in prefixes if state[f"{p}.lora_A.weight"].ndim == 2}
    if not sites:
        raise ValueError("the adapter has no LoRA on a linear layer; nothing to correct")
    return sites


def scale_of(config: Any, name: str) -> float:
    """c of a layer, with PEFT's patterns and rank-stabilised LoRA."""

    def chosen(pattern: Mapping[str, Any], default: Any) -> Any:
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return default

    rank, alpha = chosen(config.rank_pattern, config.r), chosen(config.alpha_pattern, config.lora_alpha)
    return float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)


def write(directory: Path, config: Any, state: Mapping[str, Tensor], base: Any, limit: float) -> None:
    """Write an adapter with the mark that it is corrected.

    Args:
        directory: exists, and is empty.
        config: of the adapter; gets the name of its new base.
        state: its tensors.
        base: the full model, or its directory.
        limit: that the correction kept to.
    """
    from safetensors.torch import save_file

    named = getattr(getattr(base, "config", None), "_name_or_path", None) if isinstance(base, nn.Module) else str(base)
    config.base_model_name_or_path = named
    config.inference_mode = True
    metadata = {"format": "pt", _MARK: json.dumps({"method": "emloc", "limit": str(limit)})}
    save_file({k: v.contiguous() for k, v in state.items()}, directory / "adapter_model.safetensors", metadata=metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.save_pretrained(str(directory))
