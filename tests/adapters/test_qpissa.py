"""QPiSSA: the grid, the iteration, and a model that is loaded in four bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from eckart.adapters.layer import EckartLayer, base_weight
from eckart.adapters.qpissa import NF4, nf4, qpissa, quantized_pissa

IDS = torch.arange(24).reshape(2, 12) % 60


def decaying(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator)).Q
    size = min(rows, columns)
    return (u[:, :size] / torch.arange(1, size + 1)) @ v[:size]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()


def test_nf4_takes_the_nearest_value_of_each_block():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))  # 240 = 3 * 64 + 48
    expected = weight.numpy().astype(np.float64).reshape(-1).copy()
    for start in range(0, 240, 64):
        block = expected[start : start + 64]
        scale = np.abs(block).max()
        nearest = np.abs(block[:, None] / scale - np.array(NF4)[None]).argmin(axis=1)
        expected[start : start + 64] = np.array(NF4)[nearest] * scale
    assert np.abs(nf4(weight).numpy().reshape(-1) - expected).max() < 1e-6
    assert torch.equal(nf4(nf4(weight)), nf4(weight))
    assert torch.equal(nf4(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_nf4_is_what_bitsandbytes_stores():
    from bitsandbytes import functional

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    theirs = functional.dequantize_4bit(packed, state)
    # They break ties and scale in another order: a few entries half-way between two values may differ.
    assert float((nf4(weight) - theirs).abs().gt(1e-5).float().mean()) < 1e-3


def test_the_error_is_true_and_below_that_of_plain_quantization():
    weight = decaying(96, 64)
    start = qpissa(weight, 8)
    assert start.error < start.plain_error
    assert torch.equal(nf4(start.base), start.base)
    wanted = (weight - start.base - start.left @ start.right).double().norm()
    assert abs(start.error - float(wanted)) < 1e-5
    assert qpissa(weight, 8, iterations=5).error <= qpissa(weight, 8, iterations=1).error
    with pytest.raises(ValueError, match="iterations"):
        qpissa(weight, 8, iterations=0)


def test_a_quantizer_without_error_leaves_nothing_over():
    weight = decaying(12, 10)
    start = qpissa(weight, 3, quantize=lambda w: w)
    assert start.error < 1e-6
    assert start.plain_error == 0


def test_the_model_is_closer_than_with_plain_quantization():
    reference = model()
    with torch.no_grad():
        expected = reference(input_ids=IDS).logits
        plain = model()
        for name, parameter in plain.named_parameters():
            if "proj" in name:
                parameter.copy_(nf4(parameter))
        adapted = quantized_pissa(model(), 16, progress=False).eval()
        with_adapter = (adapted(input_ids=IDS).logits - expected).norm()
        assert float(with_adapter) < 0.9 * float((plain(input_ids=IDS).logits - expected).norm())


def test_saved_and_loaded_in_four_bits_it_is_the_same_model(tmp_path):
    adapted = quantized_pissa(model(), 8, progress=False)
    bases = {
        n: base_weight(m.site, m) for n, m in adapted.base_model.model.named_modules() if isinstance(m, EckartLayer)
    }
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(input_ids=IDS).logits
    adapted.unload().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for name, module in loaded.base_model.model.named_modules():
        if isinstance(module, EckartLayer):
            # bitsandbytes rounds the scale of a block when it divides by it: Q is on the grid to rounding.
            assert torch.allclose(base_weight(module.site, module), bases[name], atol=1e-6), name
    loaded.train()  # in evaluation bitsandbytes repacks its weights in bfloat16 on some processors
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=IDS).logits, expected, atol=1e-3)


def test_a_rank_that_does_not_fit_changes_nothing():
    base = model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"self_attn\.\w+ is \(64, 64\), so its rank must be 1 to 64"):
        quantized_pissa(base, 65, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
