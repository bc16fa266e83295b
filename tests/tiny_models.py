"""Tiny random models of many families, built from a configuration, so that no test needs a download.

``FAMILIES`` maps a name to a builder. A built model is float32, in eval mode, and the same on every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from eckart.models import linears, replace
from eckart.structures import LowRank

VOCABULARY = 128
LAYERS = 2

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _build(name: str, config_name: str, class_name: str, **options: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        config = getattr(transformers, config_name)(**options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, class_name)(config)
            # Weights of order one and biases that are not zero: a lost or swapped tensor must show.
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    torch.nn.init.normal_(parameter, std=0.15)
                else:
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.tie_weights()
        return model.float().eval()

    build.__name__ = build.__qualname__ = f"build_{name}"
    build.__doc__ = f"Return a tiny {class_name}."
    return build


def _text(name: str, prefix: str, **options: Any) -> Callable[[], PreTrainedModel]:
    return _build(name, f"{prefix}Config", f"{prefix}ForCausalLM", **(_TEXT | options))


_WINDOW = ["sliding_attention", "full_attention"]

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _text("llama", "Llama"),
    "qwen3": _text("qwen3", "Qwen3", head_dim=8),
    "mistral": _text("mistral", "Mistral", sliding_window=16),
    "gemma2": _text("gemma2", "Gemma2", head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
    "gemma3": _build(
        "gemma3",
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        **(_TEXT | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8, "layer_types": _WINDOW}),
    ),
    "phi3": _text("phi3", "Phi3"),
    "gpt2": _build(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=LAYERS,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "opt": _build(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
    "gpt_neox": _build(
        "gpt_neox",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        **{key: value for key, value in _TEXT.items() if key != "num_key_value_heads"},
    ),
    "mixtral": _text("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": _text(
        "qwen3_moe",
        "Qwen3Moe",
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=1,
    ),
    "bert": _build(
        "bert",
        "BertConfig",
        "BertForMaskedLM",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "t5": _build(
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    ),
    "vit": _build(
        "vit",
        "ViTConfig",
        "ViTForImageClassification",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_channels=3,
    ),
}


def inputs(model: PreTrainedModel, batch: int = 2, tokens: int = 12) -> dict[str, Tensor]:
    """Return the same random batch on every call, on the model's device and in its dtype."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        config = model.config
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(shape, generator=generator)
        return {"pixel_values": pixels.to(model.device, model.dtype)}
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator).to(model.device)
    result = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        result["decoder_input_ids"] = ids[:, : tokens // 2].contiguous()
    return result


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Return the model's logits on :func:`inputs`."""
    return model(**inputs(model)).logits


def low_rank(model: PreTrainedModel, form: str = "pivoted", rank: int | None = None) -> list[str]:
    """Replace every linear map of the blocks by its best rank-``rank`` one (None: full rank); return the names."""
    names = []
    for ref in linears(model).linears:
        u, s, vh = torch.linalg.svd(ref.weight.detach().double(), full_matrices=False)
        root = s[:rank].sqrt()
        structure = LowRank.from_factors(
            u[:, :rank] * root, root[:, None] * vh[:rank], bias=ref.bias, form=form, dtype=ref.dtype
        )
        replace(model, ref.name, structure)
        names.append(ref.name)
    return names


def of_weights(*weights: Tensor) -> torch.nn.Module:
    """Return a model whose repeated blocks hold these weights (out, in), one each."""
    layers = []
    for weight in weights:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        layers.append(torch.nn.Sequential(layer))
    return torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
