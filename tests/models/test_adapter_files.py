"""A model and the adapter on it in one directory: both load again, and a failure leaves nothing."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny_models
from eckart import adapt, compress
from eckart.models import CheckpointError, linears, save_with_adapter
from eckart.models.adapter_files import check_base
from eckart.structures import EckartWarning

IDS = torch.arange(24).reshape(2, 12) % 60


def adapted(kind: str, family: str = "llama"):
    """An adapter that changes the outputs: ours on a compressed model, or PEFT's on a dense one."""
    model = tiny_models.FAMILIES[family]()
    if kind == "peft":
        names = [ref.name for ref in linears(model).linears]
        settings = {"target_modules": names, "fan_in_fan_out": family == "gpt2", "init_lora_weights": False}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return get_peft_model(model, LoraConfig(r=2, **settings)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        compress(model, kind, ratio=0.4, data=[IDS], progress=False)
    made = adapt(model, "lora", rank=2, progress=False).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("kind", ["svd", "modegpt", "peft"])
def test_both_load_again_and_the_model_alone_too(kind, family, tmp_path):
    model = adapted(kind, family)
    both = logits(model)
    with model.disable_adapter():
        alone = logits(model)
    assert not torch.allclose(both, alone, atol=1e-3)
    path = save_with_adapter(model, tmp_path / "small")
    assert torch.equal(logits(model), both), "saving changed it"
    base = AutoModelForCausalLM.from_pretrained(path).eval()
    assert torch.equal(logits(base), alone)
    assert torch.equal(logits(PeftModel.from_pretrained(base, path / "adapter").eval()), both)


def test_the_adapter_names_the_model_that_it_is_beside(tmp_path):
    path = save_with_adapter(adapted("svd"), tmp_path / "small")
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "small")
    assert check_base(path / "adapter", path) is None
    assert {file.suffix for file in (path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}


def test_a_directory_that_is_there_is_replaced_by_force_alone(tmp_path):
    model = adapted("svd")
    path = save_with_adapter(model, tmp_path / "small")
    with pytest.raises(FileExistsError, match="exists already"):
        save_with_adapter(model, path)
    save_with_adapter(model, path, force=True)
    assert [one.name for one in tmp_path.iterdir()] == ["small"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    model = adapted("svd")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    message = f"cannot write {tmp_path / 'small'}: No space left on device; nothing was left behind"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        save_with_adapter(model, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []
