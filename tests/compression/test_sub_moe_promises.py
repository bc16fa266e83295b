"""What Sub-MoE promises besides its mathematics: bytes, files, forward passes, warnings and refusals."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tiny_models
from eckart.compression import compress, contract
from eckart.compression.sub_moe import SubMoE
from eckart.models import save
from eckart.models.experts import expert_banks, route
from eckart.models.geometry import geometry_of
from eckart.structures import EckartWarning
from mixtures import FAMILIES, batches, build, copied
from model_state import assert_unchanged, snapshot

mixtures = pytest.mark.parametrize("family", FAMILIES)


def run(model: nn.Module, ratio: float, data: list[dict[str, torch.Tensor]], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, "sub-moe", ratio=ratio, data=data, progress=False, **options)


@mixtures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_fall_and_plain_from_pretrained_gives_the_same_logits(family, dtype, tmp_path):
    save(build(family, torch.float32), tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=dtype)
    size = sum(p.nbytes for p in model.parameters())
    save(model, tmp_path / "dense")
    result = run(model, 0.5, batches(model))
    removed = sum(4 * bank.expert_parameters for bank in expert_banks(model)) - sum(
        p.numel() for bank in expert_banks(model) for p in bank.module.parameters()
    )
    assert result.parameters[0] - result.parameters[1] == removed > 0
    assert size - sum(p.nbytes for p in model.parameters()) == removed * dtype.itemsize
    assert {p.dtype for p in model.parameters()} == {dtype}
    save(model, tmp_path / "small")
    on_disk = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("dense", "small")]
    assert on_disk[0] - on_disk[1] >= removed * dtype.itemsize
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    assert [bank.count for bank in expert_banks(again)] == [bank.count for bank in expert_banks(model)]
    assert again.config.quantization_config.history[0]["method"] == "sub-moe"


def test_nothing_is_rebuilt_in_the_forward_pass():
    """Each token runs through stored experts only: no tensor of the old size comes up."""
    model = build("mixtral", torch.float32)
    run(model, 0.75, batches(model))
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and not found._is_view():
                largest = max(largest, found.numel())
            return found

    with Largest(), torch.no_grad():
        model.model.layers[0].mlp(torch.randn(1, 2, 32))
    assert 0 < largest <= expert_banks(model)[0].gate_up.numel()


def test_padding_and_batching_do_not_change_the_result():
    plain = build("mixtral")
    (batch,) = batches(plain, 4, 9)
    filler = torch.full((4, 5), 7)
    padded = {
        "input_ids": torch.cat([filler, batch["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros_like(filler), batch["attention_mask"]], 1),
    }
    run(plain, 0.5, [batch])
    for given in ([padded], [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]):
        other = build("mixtral")
        run(other, 0.5, given)
        for one, two in zip(expert_banks(plain), expert_banks(other), strict=True):
            assert geometry_of(one.module) == geometry_of(two.module)
            torch.testing.assert_close(one.gate_up, two.gate_up, rtol=0, atol=1e-6)


def test_experts_without_tokens_are_reported_and_have_a_small_say():
    model = build("mixtral", num_local_experts=5)
    router = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        # Whatever the sign of w x, two of the first four are ahead of the fifth.
        router.copy_(torch.tensor([[1.0], [-1.0], [0.5], [-0.5], [0.1]]) * torch.linspace(-1, 1, 32))
    name = "model.layers.0.mlp.experts"
    seen = route(model, expert_banks(model), batches(model), progress=False)[name]
    assert float(seen.frequency[4]) == 0 < float(seen.frequency[:4].min())
    before = copied(model)[0]
    with pytest.warns(EckartWarning, match=re.escape(f"{name}: no calibration token was sent to experts 4;")):
        result = compress(model, SubMoE(window=1), ratio=0.8, data=batches(model), progress=False)
    assert any("no calibration token" in message for message in result.warnings)
    frequency = seen.frequency.clone()
    frequency[4] = 1 / 120  # as one of the 6 x 20 tokens
    expected = sum(float(f) * e.down for f, e in zip(frequency, before, strict=True)) / float(frequency.sum())
    torch.testing.assert_close(expert_banks(model)[0].down[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "family", "part"),
    [("sub-moe", {}, "mixtral", "expert_banks"), ("ones", {"steps": 0}, "mixtral", "expert_banks"),
     ("loraprune", {"steps": 2, "spared": 0.0}, "llama", "parts")],
)  # fmt: skip
def test_what_a_method_of_the_whole_model_works_on_is_looked_for_once(method, options, family, part, monkeypatch):
    calls: list[Any] = []
    find = getattr(contract, part)
    monkeypatch.setattr(contract, part, lambda *given: calls.append(given) or find(*given))
    model = tiny_models.FAMILIES[family]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        compress(model, method, ratio=0.3, data=batches(model), progress=False, **options)
    assert len(calls) == 1


def test_what_cannot_be_done_is_refused_before_anything_changes():
    for options, message in (
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"tokens": 0}, "tokens must be at least 1, not 0"),
        ({"basis_energy": 0.0}, r"basis_energy must lie in \(0, 1\], not 0.0"),
        ({"align": "yes"}, "align must be true or false, not 'yes'"),
    ):
        with pytest.raises(ValueError, match=message):
            SubMoE(**options)
    model = build("mixtral")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"ratio=0.9 leaves 0 experts for the 2 layers .* largest ratio is about 0.75"):
        run(model, 0.9, batches(model))
    with pytest.raises(ValueError, match="sub-moe takes a ratio, not rank"):
        compress(model, "sub-moe", rank=3, data=batches(model), progress=False)
    with pytest.raises(
        ValueError,
        match="sub-moe has no option ranks; it has: window, basis_energy, experts, intra, group, basis, align,",
    ):
        run(model, 0.5, batches(model), ranks=1)
    assert_unchanged(model, before)
    llama = tiny_models.FAMILIES["llama"]()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no bank of fused experts"):
        run(llama, 0.5, batches(llama))
    run(model, 0.5, batches(model))
    with pytest.raises(ValueError, match="compressed by Eckart already"):
        run(model, 0.5, batches(model))
