"""A LoRA made of an adapter: exact where its rank allows, the best approximation where not, and PEFT loads it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

import tiny_models
from eckart import adapt
from eckart.adapters.convert import lora_factors, to_lora
from eckart.adapters.layer import EckartLayer, base_weight

IDS = torch.arange(24).reshape(2, 12) % 60


def moved(family: str = "llama", **settings) -> PeftModel:
    torch.manual_seed(0)
    model = adapt(tiny_models.FAMILIES[family]().eval(), "pissa", rank=3, progress=False, **settings).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_at_the_exact_rank_peft_gives_the_same_logits(family, tmp_path):
    model = moved(family)
    done = to_lora(model, tmp_path / "lora")
    assert (done.rank, done.exact_rank) == (6, 6)
    assert done.largest_error < 1e-6
    torch.manual_seed(0)
    lora = PeftModel.from_pretrained(tiny_models.FAMILIES[family]().eval(), tmp_path / "lora").eval()
    assert torch.allclose(logits(lora), logits(model), atol=2e-5)
    assert type(lora.peft_config["default"]).__name__ == "LoraConfig"


def test_modules_that_are_trained_whole_go_with_it(tmp_path):
    model = moved(modules_to_save=["lm_head"])
    to_lora(model, tmp_path / "lora")
    torch.manual_seed(0)
    lora = PeftModel.from_pretrained(tiny_models.FAMILIES["llama"]().eval(), tmp_path / "lora").eval()
    assert torch.allclose(logits(lora), logits(model), atol=2e-5)
    assert not torch.equal(model.lm_head.weight, model.get_base_model().lm_head.original_module.weight)


def test_below_it_the_error_is_that_of_the_best_approximation(tmp_path):
    model = moved(where="*.up_proj")
    done = to_lora(model, tmp_path / "lora", rank=2)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, EckartLayer):
            adapter, weight = layer.eckart_adapters["default"], base_weight(layer.site, layer)
            delta = adapter.delta(weight).detach().double().numpy()
            s = np.linalg.svd(delta, compute_uv=False)
            assert done.errors[name] == pytest.approx(np.sqrt((s[2:] ** 2).sum() / (s**2).sum()), rel=1e-4)
            b, a, error = lora_factors(adapter, weight, 2)
            assert np.linalg.norm(delta - (b @ a).double().numpy()) == pytest.approx(
                error * np.linalg.norm(delta), rel=1e-4
            )


def test_convolutions_and_embeddings_have_pefts_shapes(tmp_path):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 8)
            self.conv = nn.Conv2d(1, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(self.table(x)[:, None])

    reference = Net()
    x = torch.randint(0, 20, (2, 6))
    model = adapt(Net(), "pissa", rank=2, target_modules=["table", "conv"], progress=False)
    model.get_base_model().load_state_dict(reference.state_dict(), strict=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    to_lora(model, tmp_path / "lora")
    twin = Net()
    twin.load_state_dict(
        {key.replace(".base_layer", ""): value for key, value in model.get_base_model().state_dict().items()
         if "eckart" not in key}
    )  # fmt: skip
    lora = PeftModel.from_pretrained(twin, tmp_path / "lora")
    assert torch.allclose(lora(x), model(x), atol=1e-4)


def test_refusals(tmp_path):
    model = moved(where="*.q_proj")
    with pytest.raises(ValueError, match="no Eckart adapter named 'other'"):
        to_lora(model, tmp_path / "lora", adapter_name="other")
    with pytest.raises(ValueError, match="rank must be at least 1"):
        to_lora(model, tmp_path / "lora", rank=0)
    to_lora(model, tmp_path / "lora")
    with pytest.raises(FileExistsError, match="exists already"):
        to_lora(model, tmp_path / "lora")
    to_lora(model, tmp_path / "lora", force=True)
    assert not list(tmp_path.glob(".*"))
