"""Whether heads can lose coordinates is found by trying, in families that rotate in many ways or not at all."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaAttention

import tiny_models
from eckart.models import linears
from eckart.models.parts import AttentionPart, parts
from eckart.models.trials import head_coordinates
from model_state import assert_unchanged, snapshot

TEXT = tiny_models._TEXT
MORE = {
    "qwen2": tiny_models._text("qwen2", "Qwen2"),  # biases of queries, keys and values
    "smollm3": tiny_models._text("smollm3", "SmolLM3"),  # some layers without positions
    "phi": tiny_models._text("phi", "Phi", partial_rotary_factor=0.5),  # half of a head is rotated
    "stablelm": tiny_models._text("stablelm", "StableLm"),
    "glm": tiny_models._text("glm", "Glm", head_dim=8),  # interleaved, half of a head
    "cohere": tiny_models._text("cohere", "Cohere"),  # interleaved
    "nanochat": tiny_models._text("nanochat", "NanoChat"),  # a norm of heads that has no weights
    "olmo2": tiny_models._text("olmo2", "Olmo2"),  # a norm over all heads
}
EXPECTED = {
    "llama": True, "mistral": True, "gemma2": True, "qwen2": True, "smollm3": True, "opt": False,
    "qwen3": None, "phi": None, "stablelm": None, "glm": None, "cohere": None, "nanochat": None, "olmo2": None,
    "t5": None,
}  # fmt: skip


def rotations(model: nn.Module) -> set[bool | None]:
    found, _ = parts(model, linears(model).linears)
    return {part.rotary for part in found if isinstance(part, AttentionPart)}


@pytest.mark.parametrize("family", EXPECTED)
def test_families(family):
    model = (tiny_models.FAMILIES | MORE)[family]()
    before = snapshot(model)
    assert rotations(model) == {EXPECTED[family]}
    assert_unchanged(model, before)


def test_gpt_j_has_no_attention_to_narrow():
    """Its queries and keys are rotated in neighbouring pairs, by tables of its own."""
    config = transformers.GPTJConfig(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4,
                                     bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = transformers.GPTJForCausalLM(config).eval()
    assert rotations(model) <= {None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("family", "rotary"), [("Llama", True), ("Qwen3", None), ("Cohere", None)])
def test_depth_and_rounding_do_not_hide_it(family, rotary, dtype):
    """A deep model as it comes from its constructor, where attention has hardly an effect on the logits."""
    options = {**TEXT, "num_hidden_layers": 12, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(**options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()
    assert rotations(model) == {rotary}
    assert all(module.training for module in model.modules())


class ScaledByWidth(LlamaAttention):
    """Divides scores by the root of the width that heads have now, as older models do."""

    def forward(self, *args, **kwargs):
        self.scaling = self.head_dim**-0.5
        return super().forward(*args, **kwargs)


def test_a_scale_that_depends_on_the_width_of_a_head_is_found():
    model = tiny_models.FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.self_attn.__class__ = ScaledByWidth
    assert rotations(model) == {None}


def test_kernels_for_half_precision_are_no_obstacle():
    def half_only(module, query, key, value, attention_mask, **kwargs):
        if query.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError("only half precision")
        return value.repeat_interleave(2, 1).transpose(1, 2), None

    model = tiny_models.FAMILIES["llama"]().to(torch.bfloat16)
    AttentionInterface.register("half_only", half_only)
    try:
        model.config._attn_implementation_internal = "half_only"
        assert rotations(model) == {True}
        assert model.config._attn_implementation == "half_only"
    finally:
        AttentionInterface._global_mapping.pop("half_only")


def test_rows_of_the_same_coordinates_of_every_head():
    rows = head_coordinates([1, 3], heads=3, head_dim=4)
    assert torch.arange(12).reshape(3, 4)[:, [1, 3]].flatten().tolist() == rows
