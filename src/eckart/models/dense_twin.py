"""The dense model of the family that a mixture of experts belongs to, with everything but its MLPs filled in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from .experts import Expert, ExpertBank, expert_banks

__all__ = ["banks_to_convert", "dense_twin"]

_COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True)
class _Conversion:
    """A dense class, and what its configuration takes over as it is; head_dim, widths and windows are worked out."""

    model: str
    config: str
    fields: tuple[str, ...]


# Class of the mixture -> the dense class with the same attention, norms and names.
_CONVERSIONS = {
    "MixtralForCausalLM": _Conversion("MistralForCausalLM", "MistralConfig", _COMMON),
    "Qwen3MoeForCausalLM": _Conversion("Qwen3ForCausalLM", "Qwen3Config", (*_COMMON, "attention_bias")),
}


def banks_to_convert(model: nn.Module, banks: list[ExpertBank] | None = None) -> list[ExpertBank]:
    """The banks of experts of a model that has a dense twin.

    Args:
        model: a mixture of experts.
        banks: those of the model, if they have been looked for already.

    Raises:
        ValueError: it is of another class, or some layers have a dense MLP of another width than the experts.
    """
    kind = type(model).__name__
    if kind not in _CONVERSIONS:
        known = ", ".join(f"{mixture} (to {made.model})" for mixture, made in _CONVERSIONS.items())
        raise ValueError(f"{kind} cannot be turned into a dense model; the classes that can: {known}")
    banks = expert_banks(model) if banks is None else banks
    if not banks:
        raise ValueError(f"{kind} has no layer with a bank of experts; it is dense already")
    config: Any = model.config
    widths = {bank.width for bank in banks}
    if len(banks) < config.num_hidden_layers:
        widths.add(config.intermediate_size)
    if len(widths) > 1:
        raise ValueError(
            f"{kind} mixes MLPs of widths {', '.join(map(str, sorted(widths)))}, and a dense model has one "
            "intermediate_size; only a model whose dense layers are as wide as an expert can be turned into one"
        )
    return banks


def dense_twin(model: Any, mlps: Mapping[str, Expert]) -> Any:
    """A dense model with a mixture's attention, norms and embeddings, and given MLPs in place of its experts.

    Args:
        model: a mixture that `banks_to_convert` accepts; left alone, nothing is shared with it.
        mlps: name of each bank -> weights of the MLP in its place; gate (I, H), up (I, H), down (H, I).

    Returns:
        The dense model, in eval mode, on the same device and in the same type.

    Raises:
        ValueError: as `banks_to_convert`.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> model = MixtralForCausalLM(MixtralConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=1, num_local_experts=4))
        >>> (bank,) = banks_to_convert(model)
        >>> twin = dense_twin(model, {bank.name: bank.expert(2)})
        >>> type(twin).__name__, torch.equal(twin.model.layers[0].mlp.down_proj.weight, bank.down[2])
        ('MistralForCausalLM', True)
    """
    banks = banks_to_convert(model)
    conversion = _CONVERSIONS[type(model).__name__]
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # its random start is thrown away
        made = getattr(transformers, conversion.model)._from_config(
            _config_of(model.config, conversion, banks[0].width),
            dtype=weight.dtype,
            attn_implementation=model.config._attn_implementation,
        )
    # A mixture's MLP is the router and the bank.
    holders = {bank.name: bank.name.rpartition(".")[0] for bank in banks}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{holder}.") for holder in holders.values())
    }
    for name, holder in holders.items():
        for part, tensor in zip(("gate_proj", "up_proj", "down_proj"), mlps[name], strict=True):
            state[f"{holder}.{part}.weight"] = tensor
    made.load_state_dict(state, strict=True)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(weight.device).eval()


def _config_of(config: Any, conversion: _Conversion, width: int) -> Any:
    taken = {name: copy.deepcopy(getattr(config, name)) for name in conversion.fields}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = config.sliding_window
    taken |= {"head_dim": head_dim, "intermediate_size": width, "sliding_window": window}
    if conversion.config == "Qwen3Config":
        # Where the mixture has a window, all its layers have it.
        taken |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    return getattr(transformers, conversion.config)(**taken)
