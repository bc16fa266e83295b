from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import tiny_models
from eckart import adapt
from eckart.adapters.convert import to_lora
from eckart.compression import compress
from eckart.compression.emloc import EMLoC, correct_factors, orthonormal_factors
from eckart.compression.lora_correction import correct_lora, lora_config, make_emulator
from eckart.compression.svd_llm import whitened_svd
from eckart.models import Statistics, linears, save
from eckart.structures import LowRank
from model_state import assert_unchanged, snapshot

M, N, R = 14, 10, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def case() -> dict[str, torch.Tensor]:
    """W, an emulator E of rank 4, and the two factors of a LoRA."""
    weight = normal(M, N)
    u, s, vh = np.linalg.svd(weight.numpy(), full_matrices=False)
    emulator = torch.from_numpy((u[:, :4] * s[:4]) @ vh[:4])
    return {"weight": weight, "emulator": emulator, "a": normal(R, N, seed=1), "b": 0.3 * normal(M, R, seed=2)}


def corrected(weight, emulator, a, b, scale=1.0, limit=math.inf):
    right, left = orthonormal_factors(a, b)
    return correct_factors(right, left, (weight - emulator) @ right.T, scale=scale, limit=limit)


# ------------------------------------------------------------------------------------------------ the correction


@pytest.mark.parametrize("scale", [1.0, 2.0, 16 / math.sqrt(3)])
def test_on_the_inputs_of_the_lora_the_full_model_does_what_the_emulator_did(case, scale):
    found = corrected(**case, scale=scale)
    x = case["a"].T @ normal(R, 7, seed=5)  # any inputs in the span of the rows of A
    trained = (case["emulator"] + scale * case["b"] @ case["a"]) @ x
    moved = (case["weight"] + scale * found.b @ found.a) @ x
    torch.testing.assert_close(moved, trained, rtol=0, atol=1e-12)
    without = (case["weight"] + scale * case["b"] @ case["a"]) @ x
    assert float((without - trained).norm()) > 1


def test_outside_of_them_the_full_model_is_untouched(case):
    found = corrected(**case)
    x = normal(N, 6, seed=6)
    outside = x - np.linalg.pinv(case["a"].numpy()) @ case["a"].numpy() @ x.numpy()
    torch.testing.assert_close(found.b @ found.a @ outside, torch.zeros(M, 6).double(), rtol=0, atol=1e-12)


def test_it_is_the_papers_recipe(case):
    """Steps 6 to 8 of the algorithm with numpy's SVD of A^T; signs of singular vectors drop out of the product."""
    a, b = case["a"].numpy(), case["b"].numpy()
    u, s, vh = np.linalg.svd(a.T, full_matrices=False)
    own = np.diag(s) @ vh @ b.T
    c = u.T @ (case["weight"] - case["emulator"]).numpy().T
    rho = np.abs(c).mean(1) / np.abs(own).mean(1)
    limit = float(np.sort(rho)[-2:].mean())  # between two: on one of them, rounding would decide
    assert (rho > limit).any()
    assert (rho <= limit).any()
    c[rho > limit] *= (limit / rho[rho > limit])[:, None]
    found = corrected(**case, limit=limit)
    np.testing.assert_allclose(found.b @ found.a, (own - c).T @ u.T, atol=1e-12)
    np.testing.assert_allclose(found.ratios, rho, rtol=1e-10)
    assert found.clamped == int((rho > limit).sum())


def test_the_right_factor_is_orthonormal_and_the_rank_stays(case):
    right, left = orthonormal_factors(case["a"], case["b"])
    torch.testing.assert_close(right @ right.T, torch.eye(R).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(left @ right, case["b"] @ case["a"], rtol=0, atol=1e-12)
    found = corrected(**case)
    assert torch.linalg.matrix_rank(found.b @ found.a) <= R


@pytest.mark.parametrize("limit", [0.0, 0.1, 1.0, 3.0])
def test_the_limit_holds_for_each_direction(case, limit):
    _, left = orthonormal_factors(case["a"], case["b"])
    found = corrected(**case, limit=limit)
    applied, own = (left - found.b).abs().mean(0), left.abs().mean(0)
    assert (applied <= limit * own * (1 + 1e-12)).all()
    if limit == 0:
        assert torch.equal(found.b, left)


def test_an_emulator_that_is_the_model_needs_no_correction(case):
    found = corrected(**(case | {"emulator": case["weight"]}), limit=3.0)
    torch.testing.assert_close(found.b @ found.a, case["b"] @ case["a"], rtol=0, atol=1e-12)
    assert found.ratios.tolist() == [0.0] * R


def test_a_lora_that_was_never_trained_stays_zero_unless_the_limit_is_off(case):
    untrained = case | {"b": torch.zeros(M, R).double()}
    for limit in (0.0, 3.0):
        found = corrected(**untrained, limit=limit)
        assert not found.b.any()
        assert found.clamped == R
    bare = corrected(**untrained)
    torch.testing.assert_close(bare.b, (case["emulator"] - case["weight"]) @ bare.a.T, rtol=0, atol=1e-12)
    nothing = corrected(**(untrained | {"emulator": case["weight"]}), limit=3.0)  # 0 / 0
    assert not nothing.b.any()
    assert nothing.ratios.tolist() == [0.0] * R


def test_the_emulator_is_the_truncated_whitened_svd():
    weight, x = normal(M, N), normal(60, N, seed=3)
    factors = EMLoC().factorize(weight, Statistics(gram=x.T @ x), 4)
    published = whitened_svd(weight, x.T @ x, 4, "eigen")
    torch.testing.assert_close(factors.up @ factors.down, published.up @ published.down, rtol=0, atol=1e-9)
    loss = float((x @ (weight - factors.up @ factors.down).T).norm())
    tail = np.linalg.svd((x @ weight.T).numpy(), compute_uv=False)[4:]
    assert loss == pytest.approx(np.linalg.norm(tail), rel=1e-9)


# ---------------------------------------------------------------------------------------------------- whole models


def full_and_emulator(family: str = "llama") -> tuple[nn.Module, nn.Module]:
    model = tiny_models.FAMILIES[family]()
    return model, make_emulator(model, [tiny_models.inputs(model, 6, 20)], progress=False)


def tune(model: nn.Module, steps: int = 6, **settings) -> PeftModel:
    tuned = get_peft_model(model, lora_config(model, **({"rank": 3, "alpha": 6} | settings)))
    batch = tiny_models.inputs(model, 4, 12)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        tuned(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuned.eval()


def delta(directory, name: str) -> torch.Tensor:
    state = load_file(directory / "adapter_model.safetensors")
    a, b = (state[f"base_model.model.{name}.lora_{key}.weight"].double() for key in "AB")
    return b @ a


def test_an_emulator_leaves_the_model_alone_and_is_smaller():
    model = tiny_models.FAMILIES["llama"]()
    before = snapshot(model)
    emulator = make_emulator(model, [tiny_models.inputs(model, 6, 20)], progress=False)
    assert_unchanged(model, before)
    inside = [m for m in emulator.modules() if isinstance(m, LowRank)]
    assert len(inside) == 14
    assert {layer.form for layer in inside} == {"plain"}
    kept = sum(layer.num_parameters() for layer in inside)
    dense = sum(ref.in_features * ref.out_features for ref in linears(model).linears)
    assert 0.3 < kept / dense <= 0.4


@pytest.mark.parametrize(("family", "settings", "scale"), [
    ("llama", {}, 2.0), ("llama", {"use_rslora": True}, 6 / math.sqrt(3)), ("gpt2", {}, 2.0),
])  # fmt: skip
def test_the_written_lora_is_plain_loads_on_the_full_model_and_agrees_layer_by_layer(family, settings, scale, tmp_path):
    model, emulator = full_and_emulator(family)
    substitutes = {ref.name: ref.weight.double() for ref in linears(emulator).linears}
    tuned = tune(emulator, **settings)
    tuned.save_pretrained(tmp_path / "trained")
    report = correct_lora(tuned, model, out=tmp_path / "corrected", limit=math.inf)
    assert sorted(report.layers) == sorted(substitutes)
    assert not report.unchanged
    for ref in linears(model).linears:
        before, after = (delta(tmp_path / kind, ref.name) for kind in ("trained", "corrected"))
        state = load_file(tmp_path / "trained" / "adapter_model.safetensors")
        a = state[f"base_model.model.{ref.name}.lora_A.weight"].double()
        x = a.T @ normal(3, 5)
        trained = (substitutes[ref.name] + scale * before) @ x
        torch.testing.assert_close((ref.weight.double() + scale * after) @ x, trained, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "corrected" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    dense = tiny_models.logits(model)
    on_full = PeftModel.from_pretrained(model, tmp_path / "corrected")
    logits = tiny_models.logits(on_full.base_model.model)
    assert float((logits - dense).abs().max()) > 1e-2
    torch.testing.assert_close(tiny_models.logits(on_full.merge_and_unload()), logits, rtol=0, atol=1e-3)


def test_from_directories_it_is_the_same_and_the_models_are_never_loaded(tmp_path, monkeypatch):
    model, emulator = full_and_emulator()
    for name, one in (("full", model), ("emulator", emulator)):
        save(one, tmp_path / name)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "emulator")
    torch.testing.assert_close(tiny_models.logits(reloaded), tiny_models.logits(emulator), rtol=0, atol=0)
    tuned = tune(reloaded)
    tuned.save_pretrained(tmp_path / "trained")
    in_memory = correct_lora(tuned, model, out=tmp_path / "one")
    for where in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(where, "from_pretrained", lambda *a, **k: pytest.fail("a model was loaded"))
    # The LoRA names its base, so the emulator need not be given.
    from_disk = correct_lora(tmp_path / "trained", tmp_path / "full", out=tmp_path / "two")
    assert from_disk.layers.keys() == in_memory.layers.keys()
    for name in in_memory.layers:
        torch.testing.assert_close(delta(tmp_path / "two", name), delta(tmp_path / "one", name), rtol=0, atol=1e-6)
    named = json.loads((tmp_path / "two" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "full")


def test_biases_are_no_part_of_it(tmp_path):
    """The emulator with other biases gives the same LoRA: weights are compared, not outputs."""
    model, emulator = full_and_emulator("gpt2")
    tuned = tune(emulator)
    correct_lora(tuned, model, out=tmp_path / "one")
    for module in emulator.modules():
        if isinstance(module, LowRank):
            module.bias.data.add_(5.0)
    correct_lora(tuned, model, out=tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_layers_that_were_not_compressed_are_left_as_they_are(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    data = [tiny_models.inputs(model, 6, 20)]
    emulator = make_emulator(model, data, where="*.mlp.*", progress=False)
    tuned = tune(emulator, target_modules=["up_proj", "q_proj"])
    tuned.save_pretrained(tmp_path / "trained")
    report = correct_lora(tmp_path / "trained", model, emulator, out=tmp_path / "corrected")
    assert {name.rsplit(".")[-1] for name in report.layers} == {"up_proj"}
    assert {name.rsplit(".")[-1] for name in report.unchanged} == {"q_proj"}
    trained, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trained", "corrected"))
    for key in trained:
        assert torch.equal(trained[key], written[key]) == ("q_proj" in key)


def test_more_ranks_than_inputs_are_filled_with_zeros(tmp_path):
    model, emulator = full_and_emulator()
    tuned = tune(emulator, rank=40, alpha=40, target_modules=["q_proj"])
    correct_lora(tuned, model, out=tmp_path / "corrected", limit=math.inf)
    on_full = PeftModel.from_pretrained(model, tmp_path / "corrected")
    for one, other in zip(on_full.base_model.model.model.layers, tuned.base_model.model.model.layers, strict=True):
        x = normal(5, 32).float()
        a, b = one.self_attn.q_proj(x), other.self_attn.q_proj(x)  # all inputs are the LoRA's
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_ours_is_corrected_after_conversion(tmp_path):
    model, emulator = full_and_emulator()
    save(emulator, tmp_path / "emulator")
    adapted = adapt(emulator, "pissa", rank=2, where="*.q_proj", progress=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05)
    with pytest.raises(ValueError, match="the adapter is ECKART, not LORA; make it one with `eckart convert`"):
        correct_lora(adapted, model, out=tmp_path / "corrected")
    to_lora(adapted, tmp_path / "lora")
    report = correct_lora(tmp_path / "lora", model, tmp_path / "emulator", out=tmp_path / "corrected")
    assert len(report.layers) == 2
    PeftModel.from_pretrained(model, tmp_path / "corrected")


def test_correcting_twice_is_refused_and_nothing_is_overwritten(tmp_path):
    model, emulator = full_and_emulator()
    for name, one in (("full", model), ("emulator", emulator)):
        save(one, tmp_path / name)
    tune(emulator).save_pretrained(tmp_path / "trained")
    before = (tmp_path / "trained" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="out is the adapter itself"):
        correct_lora(tmp_path / "trained", model, emulator, out=tmp_path / "trained", force=True)
    correct_lora(tmp_path / "trained", tmp_path / "full", emulator, out=tmp_path / "corrected")
    assert (tmp_path / "trained" / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(FileExistsError):
        correct_lora(tmp_path / "trained", model, emulator, out=tmp_path / "corrected")
    with pytest.raises(ValueError, match="is corrected already; give the one that was trained on the emulator"):
        correct_lora(tmp_path / "corrected", model, emulator, out=tmp_path / "again")
    # Even with the mark lost, the LoRA names the full model as its base, which the emulator is not.
    shutil.copytree(tmp_path / "corrected", tmp_path / "unmarked")
    save_file(load_file(tmp_path / "corrected" / "adapter_model.safetensors"),
              tmp_path / "unmarked" / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match=r"was made for .*full, which differs from"):
        correct_lora(tmp_path / "unmarked", tmp_path / "full", tmp_path / "emulator", out=tmp_path / "again")
    # As a PEFT model on the full model there is nothing to correct.
    on_full = PeftModel.from_pretrained(model, tmp_path / "corrected")
    with pytest.raises(ValueError, match="the same weights as the full model, so there is nothing to correct"):
        correct_lora(on_full, tmp_path / "full", out=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_lora_does_not_name_the_full_model_as_its_base(tmp_path):
    save(tiny_models.FAMILIES["llama"](), tmp_path / "full")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    emulator = make_emulator(model, [tiny_models.inputs(model, 6, 20)], progress=False)
    assert model.name_or_path == model.config._name_or_path == str(tmp_path / "full")
    save(emulator, tmp_path / "emulator")
    tune(emulator).save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match="does not name its base; give emulator="):
        correct_lora(tmp_path / "trained", tmp_path / "full", out=tmp_path / "corrected")
    report = correct_lora(tmp_path / "trained", tmp_path / "full", tmp_path / "emulator", out=tmp_path / "corrected")
    assert len(report.layers) == 14


@pytest.mark.parametrize(("settings", "message"), [
    ({"bias": "all"}, r"the LoRA has trained biases \(bias='all'\); the correction is for plain LoRA only"),
    ({"use_dora": True}, r"the LoRA has DoRA \(use_dora\)"),
    ({"lora_bias": True}, r"the LoRA has biases of its own \(lora_bias\)"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
])  # fmt: skip
def test_what_is_more_than_a_plain_lora_is_refused(settings, message, tmp_path):
    model, emulator = full_and_emulator("gpt2")
    tuned = get_peft_model(
        tiny_models.FAMILIES["gpt2"](), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, **settings)
    )
    with pytest.raises(ValueError, match=message):
        correct_lora(tuned, model, emulator, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_named(tmp_path):
    model, emulator = full_and_emulator()
    with pytest.raises(ValueError, match="no compressed layers; make_emulator"):
        lora_config(model)
    tuned = tune(emulator, steps=1)
    with pytest.raises(ValueError, match="limit must be a number of at least 0, not nan"):
        correct_lora(tuned, model, out=tmp_path / "out", limit=math.nan)
    with pytest.raises(ValueError, match="no adapter named 'other'"):
        correct_lora(tuned, model, out=tmp_path / "out", adapter_name="other")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        correct_lora(tmp_path, model, emulator, out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"does not fit the model|does not have; give the right models"):
        correct_lora(tuned, tiny_models.FAMILIES["gpt2"](), out=tmp_path / "out")
    config = tiny_models.FAMILIES["llama"]().config
    config.hidden_size = 16
    other = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="q_proj: the LoRA, the full model and the emulator have different shapes"):
        correct_lora(tuned, other, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_by_name_loads_with_the_same_logits(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    result = compress(model, "emloc", ratio=0.3, data=[tiny_models.inputs(model, 6, 20)], progress=False)
    assert result.bytes[1] < result.bytes[0]
    assert result.error_of == "output"
    save(model, tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
