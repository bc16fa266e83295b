"""``eckart train``: pre-train and fine-tune in full, resume, and read a recipe."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from eckart.models import load


def train(run_json, tiny, sums, out, *more):
    fixed = ("--rank", 4, "--batch-size", 2, "--length", 64, "--held-out", 4, "--learning-rate", 0.01)
    return run_json("train", tiny, "--data", sums, "--template", "{q} => {a}", "--out", out, *fixed, *more)


def test_it_learns_and_is_loaded_by_transformers(tiny, sums, tmp_path, run_json):
    found = train(run_json, tiny, sums, tmp_path / "model", "--steps", 6)
    assert found["loss after"] < found["loss before"]
    assert (found["steps"], found["method"], found["rank"]) == (6, "galore", 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before, _ = load(tiny)
    assert found["trained parameters"] == sum(p.numel() for p in model.parameters())
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    adam = train(run_json, tiny, sums, tmp_path / "adam", "--steps", 1, "--method", "adamw")
    small = train(run_json, tiny, sums, tmp_path / "small", "--steps", 1, "--bits", 8)
    assert small["optimizer bytes"] < found["optimizer bytes"] < adam["optimizer bytes"]


def test_from_scratch_only_the_configuration_counts(tiny, sums, tmp_path, run_json):
    found = train(run_json, tiny, sums, tmp_path / "model", "--steps", 1, "--from-scratch", "--seed", 7)
    model, (before, _) = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), load(tiny)
    assert model.config.hidden_size == before.config.hidden_size
    assert not torch.allclose(model.lm_head.weight, before.lm_head.weight, atol=1e-3)
    assert found["loss before"] > 0


def test_an_interrupted_run_goes_on_and_another_optimizers_does_not(tiny, sums, tmp_path, run_json, run):
    keep = ("--steps", 4, "--workspace", tmp_path / "w", "--save-every", 2)
    whole = train(run_json, tiny, sums, tmp_path / "whole", *keep)
    (tmp_path / "w" / "checkpoint-4").rename(tmp_path / "elsewhere")
    rest = train(run_json, tiny, sums, tmp_path / "rest", *keep, "--resume")
    assert rest["loss after"] == pytest.approx(whole["loss after"], rel=1e-5)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "rest"))
    assert first == second
    code, out, err = run(
        "train", tiny, "--data", sums, "--template", "{q} => {a}", "--rank", 2, "--length", 64, "--steps", 4,
        "--workspace", tmp_path / "w", "--resume", "--out", tmp_path / "two",
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert "is of galore with rank 4" in err
    assert not (tmp_path / "two").exists()


def test_a_recipe_gives_defaults_and_what_is_typed_counts_more(tiny, sums, tmp_path, run_json, run):
    recipe = tmp_path / "recipe.yaml"
    values = {
        "method": "galore", "rank": 3, "steps": 2, "batch-size": 2, "length": 64, "held-out": 4, "data": str(sums),
        "template": "{q} => {a}", "set": {"update_interval": 5, "refresh": "svd"},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(values))
    found = run_json("train", tiny, "--recipe", recipe, "--out", tmp_path / "a", "--rank", 2)
    assert (found["steps"], found["rank"]) == (2, 2)
    for text, message in (("ranks: 3", "has 'ranks', which is no option"), ("- 1", "is no list of"), (":", "recipe")):
        recipe.write_text(text)
        code, _, err = run("train", tiny, "--recipe", recipe, "--out", tmp_path / "b")
        assert code == 2
        assert message in err.replace("\n", " ") or "yaml" in err


def test_refusals(tiny, mute, sums, tmp_path, refused):
    out = tmp_path / "model"
    refused("train", tiny, "--out", out, "--method", "galroe", message="unknown method 'galroe'; did you mean galore")
    refused("train", tiny, "--out", out, "--set", "update_interval=0", message="update_interval must be positive")
    refused("train", tiny, "--out", out, "--set", "interval=5", message="galore has no option interval; it has: rank")
    refused("train", tiny, "--out", out, "--bits", 4, message="bits must be 8 or 32, not 4")
    refused("train", tiny, "--out", out, "--resume", message="--resume and --tensorboard need --workspace")
    refused("train", mute, "--out", out, message="has no tokenizer")
    refused(
        "train", tiny, "--data", sums, "--template", "{q} => {a}", "--length", 64, "--rank", 1000, "--out", out,
        message="no trainable matrix has both sides above the rank 1000",
    )  # fmt: skip
    assert not out.exists()
