"""The thin maps of heads against what a model does to its residual stream, in every family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from eckart.models import blocks
from eckart.models.attention_states import watching_attention
from eckart.models.head_maps import attention_layers
from eckart.models.norm_gain import norm_gain

ALIKE = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "mixtral", "qwen3_moe"]
CENTRED = {"gpt2", "opt", "gpt_neox", "bert", "vit"}


def _without_biases(family):
    """Biases are outside of the maps: a model without them must be what the maps say."""
    model = tiny_models.FAMILIES[family]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def _run(model):
    """What enters every block and the calls of attention; and per output projection what it adds to the stream."""
    streams, calls, ends = [], [], {}
    names = [layer.name for layer in attention_layers(model)[0]]
    handles = [
        block.module.register_forward_pre_hook(
            lambda _, args, kwargs: streams.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in blocks(model)
    ]
    handles += [
        model.get_submodule(name).register_forward_hook(lambda _, args, y, name=name: ends.update({name: (args[0], y)}))
        for name in names
    ]
    with torch.no_grad(), watching_attention(model, calls.append):
        model(**tiny_models.inputs(model))
    for handle in handles:
        handle.remove()
    return streams, calls, ends


def _cosines(a, b):
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


@pytest.mark.parametrize("family", ALIKE)
def test_queries_keys_and_values_come_from_the_stream(family):
    """Directions, for the length of the stream is what a norm takes away; the mean too, without being asked."""
    model = _without_biases(family)
    streams, calls, _ = _run(model)
    layers, reasons = attention_layers(model)
    assert (len(layers), reasons) == (2, {})
    for layer, x, call in zip(layers, streams, calls, strict=True):
        maps = layer.maps()
        assert layer.centred is (family in CENTRED)
        for name in ("query", "key", "value"):
            state = getattr(call, name)
            made = torch.einsum("ghd,btd->bgth", getattr(maps, name), x)
            if name != "value" and layer.rotation is not None:
                turned = [layer.rotation.turn(made[:, :, t, :, None], t)[..., 0] for t in range(made.shape[2])]
                made = torch.stack(turned, dim=2)
            assert (_cosines(made, state) > 1 - 1e-5).all()
        if layer.centred:
            assert maps.query.sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("family", ALIKE)
def test_what_heads_write_adds_up_to_what_reaches_the_stream(family):
    model = _without_biases(family)
    *_, ends = _run(model)
    for layer in attention_layers(model)[0]:
        z, y = ends[layer.name]
        written = torch.einsum("hdw,bthw->btd", layer.maps().output, z.unflatten(-1, (layer.heads, -1)))
        if family in ("gemma2", "gemma3"):  # a norm of its own comes after it
            y = model.get_submodule(layer.name.rpartition(".self_attn")[0]).post_attention_layernorm(y)
        elif layer.centred:
            y = y - y.mean(dim=-1, keepdim=True)
        assert (_cosines(written, y) > 1 - 1e-5).all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt2"])
@torch.no_grad()
def test_relative_positions_are_all_that_matters(family):
    model = _without_biases(family)
    streams, calls, _ = _run(model)
    for layer, x, call in zip(attention_layers(model)[0], streams, calls, strict=True):
        maps = layer.maps(torch.float64)
        key = maps.key[layer.groups - 1]
        t, s = 9, 4
        if layer.rotation is not None:
            key = layer.rotation.turn(key, -(t - s))
        q, k = maps.query[-1] @ x[0, t].double(), key @ x[0, s].double()
        real_q, real_k = call.query[0, -1, t].double(), call.key[0, -1, s].double()
        expected = (real_q @ real_k) / (real_q.norm() * real_k.norm())
        assert float(q @ k / (q.norm() * k.norm())) == pytest.approx(float(expected), abs=1e-5)


def test_turning_only_some_coordinates():
    [layer, _], _ = attention_layers(tiny_models.FAMILIES["gpt_neox"]())
    turned = layer.rotation.turn(torch.eye(8), 3.0)
    assert torch.allclose(turned[2:, 2:], torch.eye(6), atol=1e-4)  # a quarter of eight
    assert not torch.allclose(turned[:2, :2], torch.eye(2), atol=0.1)


def test_half_precision_and_where():
    model = tiny_models.FAMILIES["qwen3"]().bfloat16()
    layers, _ = attention_layers(model, where="layers.1.*")
    assert [layer.name for layer in layers] == ["model.layers.1.self_attn.o_proj"]
    assert layers[0].maps().query.dtype == torch.float32
    exact = attention_layers(tiny_models.FAMILIES["qwen3"]())[0][1].rotation.angles
    torch.testing.assert_close(layers[0].rotation.angles, exact, rtol=0, atol=0.01)


def test_what_is_left_out_says_why():
    layers, reasons = attention_layers(tiny_models.FAMILIES["t5"]())
    assert {layer.stack for layer in layers} == {"encoder.block", "decoder.block"}
    assert set(reasons.values()) == {"it reads another stream"}
    gated = tiny_models.FAMILIES["llama"]()
    for block in gated.model.layers:
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (args[0].sigmoid(),))
    with pytest.raises(ValueError, match="something comes between attention and its output projection"):
        attention_layers(gated)
    other = tiny_models.FAMILIES["llama"]()
    for block in other.model.layers:
        block.self_attn.v_proj.register_forward_hook(lambda _, args, y: y.tanh())
    with pytest.raises(ValueError, match="attention is not given what its projections make"):
        attention_layers(other)


def test_a_model_with_adapters_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_models.FAMILIES["llama"](), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        attention_layers(model)


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_gains_of_norms(width):
    generator = torch.Generator().manual_seed(0)
    gain = torch.randn(width, generator=generator)
    layer, rms = nn.LayerNorm(width), nn.RMSNorm(width)
    for norm in (layer, rms):
        norm.weight.data.copy_(gain)
    layer.bias.data.copy_(torch.randn(width, generator=generator))
    if width > 1:
        found, centred = norm_gain(layer, width)
        torch.testing.assert_close(found, gain, rtol=1e-5, atol=1e-5)
        assert centred
    found, centred = norm_gain(rms.bfloat16(), width)
    torch.testing.assert_close(found, gain, rtol=1e-2, atol=1e-3)
    assert centred is False or width == 1
