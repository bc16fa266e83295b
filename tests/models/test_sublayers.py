"""The ends of sub-layers, found in every family by what reaches the residual stream."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from eckart.models import blocks
from eckart.models.sublayers import sublayers

ATTENTION, CROSS, MLP = "attention", "cross-attention", "mlp"
ENDS = {
    "llama": {"self_attn.o_proj": ATTENTION, "mlp.down_proj": MLP},
    "qwen3": {"self_attn.o_proj": ATTENTION, "mlp.down_proj": MLP},
    "mistral": {"self_attn.o_proj": ATTENTION, "mlp.down_proj": MLP},
    "gemma2": {"self_attn.o_proj": ATTENTION, "mlp.down_proj": MLP},
    "gemma3": {"self_attn.o_proj": ATTENTION, "mlp.down_proj": MLP},
    "phi3": {"self_attn.o_proj": ATTENTION, "mlp.down_proj": MLP},
    "gpt2": {"attn.c_proj": ATTENTION, "mlp.c_proj": MLP},
    "opt": {"self_attn.out_proj": ATTENTION, "fc2": MLP},
    "gpt_neox": {"attention.dense": ATTENTION, "mlp.dense_4h_to_h": MLP},  # both add to the stream at once
    "bert": {"attention.output.dense": ATTENTION, "output.dense": MLP},
    "vit": {"attention.o_proj": ATTENTION, "mlp.fc2": MLP},
    "mixtral": {"self_attn.o_proj": ATTENTION},  # the experts are one parameter
    "qwen3_moe": {"self_attn.o_proj": ATTENTION},
}


@pytest.mark.parametrize("family", ENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_ends_of_sublayers(family, frozen):
    model = tiny_models.FAMILIES[family]().requires_grad_(not frozen)
    expected = [(f"{block.name}.{name}", kind) for block in blocks(model) for name, kind in ENDS[family].items()]
    assert [(part.output, part.kind) for part in sublayers(model)] == expected
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.requires_grad is not frozen and p.grad is None for p in model.parameters())


def test_encoder_and_decoder():
    model = tiny_models.FAMILIES["t5"]()
    found = {part.output: part.kind for part in sublayers(model)}
    expected = {}
    for stack in ("encoder", "decoder"):
        for index in range(2):
            block = f"{stack}.block.{index}.layer"
            expected[f"{block}.0.SelfAttention.o"] = ATTENTION
            if stack == "decoder":
                expected[f"{block}.1.EncDecAttention.o"] = CROSS
            expected[f"{block}.{2 if stack == 'decoder' else 1}.DenseReluDense.wo"] = MLP
    assert found == expected


@torch.no_grad()
def test_what_is_added_to_the_end_is_added_to_the_stream():
    """The definition, tried out: a constant at the end of a sub-layer comes out of the block for the last one."""
    model = tiny_models.FAMILIES["llama"]()
    last = {part.kind: part.output for part in sublayers(model)}  # of the last block
    streams = []
    model.model.layers[-1].register_forward_hook(lambda _, args, output: streams.append(output))
    tiny_models.logits(model)
    handle = model.get_submodule(last[MLP]).register_forward_hook(lambda _, args, output: output + 1)
    tiny_models.logits(model)
    handle.remove()
    assert torch.allclose(streams[1], streams[0] + 1, atol=1e-5)


def test_only_the_layers_that_are_named_count():
    model = tiny_models.FAMILIES["llama"]()
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers.0" in name]
    found = sublayers(model, every)
    assert [part.output for part in found] == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert sublayers(model, ["model.layers.0.self_attn.q_proj"]) != found


def test_another_batch_can_be_given():
    model = tiny_models.FAMILIES["gpt2"]()
    assert sublayers(model, batch=tiny_models.inputs(model)) == sublayers(model)
    with pytest.raises(ValueError, match="pass batch="):
        sublayers(
            nn.ModuleDict({"layers": nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])})
        )
