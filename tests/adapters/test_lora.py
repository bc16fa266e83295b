"""LoRA against PEFT's own, and on the layers that PEFT's does not know."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_models
from eckart import adapt, compress
from eckart.adapters.lora import LoRA
from eckart.adapters.site import Site
from eckart.models import linears
from eckart.structures import EckartWarning, LowRank
from every_kind import every_kind

IDS = torch.arange(24).reshape(2, 12) % 60


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_it_computes_what_peft_does_with_the_same_factors(family, alpha):
    model = adapt(tiny_models.FAMILIES[family](), "lora", rank=4, alpha=alpha, progress=False)
    base = tiny_models.FAMILIES[family]()
    names = [ref.name for ref in linears(base).linears]
    config = LoraConfig(r=4, lora_alpha=alpha or 4, target_modules=names, fan_in_fan_out=family == "gpt2")
    other = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            ours = model.get_base_model().get_submodule(name).eckart_adapters["default"]
            ours.left.copy_(0.1 * torch.randn(ours.left.shape, generator=generator))
            theirs = other.get_base_model().get_submodule(name)
            theirs.lora_B["default"].weight.copy_(ours.left)
            theirs.lora_A["default"].weight.copy_(ours.right)
        torch.testing.assert_close(model.eval()(IDS).logits, other.eval()(IDS).logits, rtol=1e-4, atol=1e-5)


def test_it_starts_at_nothing_with_the_distribution_of_peft():
    site = Site("layer", "linear", 40, 400)
    adapter = LoRA().build(site, 16, 1.0)
    adapter.initialize(torch.zeros(40, 400), None, torch.Generator().manual_seed(0))
    assert not adapter.left.any()
    bound, right = 1 / math.sqrt(400), adapter.right.detach()
    assert bound * 0.99 < float(right.abs().max()) <= bound
    # 6400 numbers uniform in +-bound have a deviation of bound / sqrt(3), up to one percent of it.
    assert float(right.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_on_a_compressed_layer_it_adds_its_product():
    model = tiny_models.FAMILIES["llama"]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        compress(model, "svd", ratio=0.4, progress=False)
    structure = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(structure, LowRank)
    layer = adapt(model, "lora", rank=3, alpha=6.0, progress=False).get_base_model().model.layers[0].mlp.up_proj
    adapter = layer.eckart_adapters["default"]
    adapter.left.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    weight = structure.dense().double() + 2 * adapter.left.double() @ adapter.right.double()
    torch.testing.assert_close(layer(x).double(), x.double() @ weight.mT, rtol=1e-4, atol=1e-5)


def test_convolution_and_embedding():
    for adapter in every_kind(LoRA(), 2.0):
        adapter.left.data += 0.1
