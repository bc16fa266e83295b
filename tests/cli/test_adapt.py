"""``eckart adapt`` and ``eckart convert``: train, save, load with PEFT, hand over as a LoRA."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import tiny_checkpoints
from eckart.models import load


def adapt(run_json, tiny, sums, out, *more):
    fixed = ("--rank", 3, "--batch-size", 2, "--length", 64, "--held-out", 4, "--learning-rate", 0.02)
    return run_json("adapt", tiny, "--data", sums, "--template", "{q} => {a}", "--out", out, *fixed, *more)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits


def test_it_learns_saves_and_is_loaded_by_peft(tiny, sums, tmp_path, run_json):
    found = adapt(run_json, tiny, sums, tmp_path / "adapter", "--steps", 6)
    assert found["loss after"] < found["loss before"]
    assert (found["steps"], found["method"], found["rank"]) == (6, "pissa", 3)
    assert [step for step, _ in found["history"]] == [1, 2, 3, 4, 5, 6]
    assert found["bytes on disk"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    # q, o: 32 + 32; k, v: 32 + 16; gate, up, down: 32 + 64; two blocks, rank 3.
    assert found["trainable parameters"] == 2 * 3 * (2 * 64 + 2 * 48 + 3 * 96)
    model, _ = load(tiny)
    before = logits(model)
    assert not torch.allclose(logits(PeftModel.from_pretrained(model, tmp_path / "adapter")), before, atol=1e-3)


def test_text_is_printed_without_json(tiny, tmp_path, run):
    code, out, err = run(
        "adapt", tiny, "--steps", 1, "--rank", 1, "--batch-size", 1, "--length", 32, "--held-out", 1,
        "--where", "*.q_proj", "--out", tmp_path / "a",
    )  # fmt: skip
    assert code == 0, err
    assert "trainable parameters" in out
    assert "loss after" in out
    assert "{'loss'" not in out


def test_an_interrupted_run_goes_on(tiny, sums, tmp_path, run_json):
    whole = adapt(
        run_json, tiny, sums, tmp_path / "whole", "--steps", 4, "--workspace", tmp_path / "w", "--save-every", 2
    )
    for checkpoint in (tmp_path / "w").glob("checkpoint-4"):
        checkpoint.rename(tmp_path / "elsewhere")
    more = ("--steps", 4, "--workspace", tmp_path / "w", "--save-every", 2, "--resume")
    rest = adapt(run_json, tiny, sums, tmp_path / "rest", *more)
    assert rest["loss after"] == pytest.approx(whole["loss after"], rel=1e-5)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "rest"))
    assert first == second


def test_convert_gives_a_lora_with_its_error(tiny, sums, tmp_path, run_json, run):
    adapt(run_json, tiny, sums, tmp_path / "adapter", "--steps", 3)
    exact = run_json("convert", tmp_path / "adapter", "--out", tmp_path / "lora")
    assert (exact["rank"], exact["rank without error"]) == (6, 6)
    assert exact["largest relative error"] < 1e-6
    ours = PeftModel.from_pretrained(load(tiny)[0], tmp_path / "adapter").eval()
    lora = PeftModel.from_pretrained(load(tiny)[0], tmp_path / "lora").eval()
    assert torch.allclose(logits(lora), logits(ours), atol=1e-4)
    code, out, _ = run("convert", tmp_path / "adapter", "--out", tmp_path / "small", "--rank", 1, "--model", tiny)
    assert code == 0
    assert "largest relative error" in out


def test_refusals(tiny, mute, sums, tmp_path, refused):
    out = tmp_path / "adapter"
    refused("adapt", tiny, "--out", out, "--method", "pisa", message="unknown method 'pisa'; did you mean pissa")
    refused("adapt", tiny, "--out", out, "--set", "sover=1", message="'pissa' has no option sover; it has: solver")
    refused("adapt", tiny, "--out", out, "--resume", message="--resume and --tensorboard need --workspace")
    refused("adapt", tiny, "--out", out, "--mixed-precision", "int4", message="must be no, bf16 or fp16, not 'int4'")
    refused("adapt", mute, "--out", out, message="has no tokenizer")
    refused("adapt", tmp_path / "none", "--out", out, message="none")
    refused("adapt", tiny, "--out", out, "--data", sums, message="has no field 'question'; it has 'q', 'a'")
    refused("adapt", tiny, "--out", out, "--where", "*.q_prj", "--length", 32, message="matches no layer; nearest")
    refused("convert", tmp_path, "--out", out, message="is no adapter: it has no adapter_config.json")
    refused("convert", tmp_path, "--out", out, "--to", "dora", message="--to must be one of lora, not 'dora'")


def test_an_existing_directory_is_not_replaced(tiny, sums, tmp_path, refused):
    (tmp_path / "adapter").mkdir()
    refused("adapt", tiny, "--out", tmp_path / "adapter", message="exists already")


def test_another_methods_checkpoint_is_not_resumed(tiny, sums, tmp_path, run_json, run):
    adapt(run_json, tiny, sums, tmp_path / "one", "--steps", 2, "--workspace", tmp_path / "w", "--save-every", 1)
    code, out, err = run(
        "adapt", tiny, "--data", sums, "--template", "{q} => {a}", "--rank", 2, "--length", 64, "--steps", 2,
        "--workspace", tmp_path / "w", "--resume", "--out", tmp_path / "two",
    )  # fmt: skip
    assert (code, out) == (1, "")
    assert "is of pissa with r=3, not of pissa with r=2" in err


def test_a_model_of_another_kind_is_refused(tmp_path, refused):
    source = tiny_checkpoints.without_linears(tmp_path / "convolutions")
    refused("adapt", source, "--out", tmp_path / "adapter", message="tokenizer")
