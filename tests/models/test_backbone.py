"""The blocks of a model without its head, and their norms."""

from __future__ import annotations

from torch import nn
from transformers import Dinov2Config, Dinov2Model

import tiny_models
from eckart.models.backbone import backbone_blocks, norms, pretrained_models


def test_models_inside_a_module():
    bert, vit = tiny_models.FAMILIES["bert"](), tiny_models.FAMILIES["vit"]()
    both = nn.ModuleDict({"text": nn.Sequential(bert), "image": vit, "head": nn.Linear(2, 2)})
    assert pretrained_models(both) == {"text.0": bert, "image": vit}
    assert pretrained_models(vit) == {"": vit}
    assert pretrained_models(nn.Linear(2, 2)) == {}
    assert [block.name for block in backbone_blocks(both)] == [
        *(f"text.0.bert.encoder.layer.{i}" for i in range(2)),
        *(f"image.vit.layers.{i}" for i in range(2)),
    ]


def test_blocks_of_a_module_that_is_no_transformers_model():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3, enable_nested_tensor=False)
    assert [block.name for block in backbone_blocks(model)] == ["layers.0", "layers.1", "layers.2"]


def test_norms_are_neither_layer_scales_nor_what_has_no_parameters():
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=8
    )
    (block,) = backbone_blocks(Dinov2Model(config))
    assert list(norms(block)) == [f"{block.name}.norm1", f"{block.name}.norm2"]
    block.module.norm1 = nn.LayerNorm(32, elementwise_affine=False)
    assert list(norms(block)) == [f"{block.name}.norm2"]
    qwen = backbone_blocks(tiny_models.FAMILIES["qwen3"]())[0]
    ends = {name.removeprefix(f"{qwen.name}.") for name in norms(qwen)}
    assert ends == {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}
