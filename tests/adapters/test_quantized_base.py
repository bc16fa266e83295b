"""Adapters on bases that torchao or bitsandbytes have quantized: read for the start, otherwise left as they are."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from peft.utils.quantization_utils import resolve_quantization_backend
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from eckart import adapt
from eckart.adapters.layer import EckartLayer, base_weight, repacked
from eckart.adapters.site import Site

IDS = torch.arange(24).reshape(2, 12) % 60
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A directory with a small float32 model."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("float")
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **SIZES)).save_pretrained(directory)
    return directory


@pytest.fixture(params=["torchao int8", "bitsandbytes int8", "bitsandbytes nf4"])
def load(request, checkpoint):
    """Loads the model in few bits, in training mode: in evaluation bitsandbytes repacks its weights."""
    if request.param == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    elif request.param == "bitsandbytes int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return lambda: AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config).train()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("method", ["pissa", "sorsa", "lora-xs", "loldu", "corda"])
def test_start_training_and_files(load, method, checkpoint, tmp_path):
    base = load()
    expected = logits(base)
    data = [{"input_ids": IDS}] if method == "corda" else None
    model = adapt(base, method, rank=4, data=data, progress=False)
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, EckartLayer)}
    assert len(layers) == 14
    assert torch.allclose(logits(model), expected, atol=1e-3)  # LoRA-XS starts near zero, not at it

    float_weights = LlamaForCausalLM.from_pretrained(checkpoint).state_dict()
    for name, layer in layers.items():
        wanted = float_weights[f"{name}.weight"]
        read = base_weight(layer.site, layer)
        assert float((read - wanted).norm() / wanted.norm()) < 0.12, name  # four bits: 9 % for normal weights

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    first = float(model(input_ids=IDS, labels=IDS).loss.detach())
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(model(input_ids=IDS, labels=IDS).loss.detach()) < first
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(load(), tmp_path).train()), trained, atol=1e-5)
    assert torch.allclose(logits(model.unload().train()), expected, atol=1e-5)


def test_merging_keeps_the_format(load):
    model = adapt(load(), "pissa", rank=4, progress=False)
    for name, parameter in model.named_parameters():
        if "eckart_adapters" in name:
            parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    layer = next(m for m in model.modules() if isinstance(m, EckartLayer))
    kind, wanted = type(layer.get_base_layer().weight), layer.merged_weight().clone()
    merged = model.merge_and_unload().model.layers[0].self_attn.q_proj
    assert type(merged.weight) is kind
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (merged.train()(x).float() - x @ wanted.mT).norm() / (x @ wanted.mT).norm()
    assert float(difference) < 0.12


def test_weights_that_bitsandbytes_has_reordered_are_read_right_and_reported(checkpoint):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    module = base.model.layers[0].self_attn.q_proj
    site = Site("layer", "linear", 64, 64)
    layer = EckartLayer(module, site)
    layer.quantization_backend = resolve_quantization_backend(module)
    before = base_weight(site, layer)
    logits(base.eval())
    if not repacked(module):
        return  # only processors with bfloat16 products do it
    assert float((base_weight(site, layer) - before).norm() / before.norm()) < 0.02  # scales in bfloat16
    with pytest.warns(UserWarning, match="load the base again before training"):
        adapt(base, "pissa", rank=4, progress=False)
