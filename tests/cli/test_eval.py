"""``eckart eval``: the figures, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

import tiny_checkpoints
from eckart.models import load, text_batches


def test_the_figures_are_those_of_the_model_and_the_text(tiny, tmp_path, run_json):
    text = tmp_path / "text.txt"
    text.write_text("for line in sys.stdin:\n    print(line)\n" * 100)
    found = run_json("eval", tiny, "--text", text, "--max-tokens", 330, "--length", 32, "--batch-size", 3)
    model, tokenizer = load(tiny)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])[: 10 * 32].reshape(10, 32)
    with torch.no_grad():
        logs = model(ids).logits.double().log_softmax(-1)[:, :-1]
    loss = -logs.gather(-1, ids[:, 1:, None]).mean().item()
    assert found["loss"] == pytest.approx(loss, rel=1e-6)  # float32 logits
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert (found["windows"], found["length"], found["tokens"]) == (10, 32, 310)
    assert found["parameters"] == model.num_parameters()
    assert found["bytes"] == sum(p.nbytes for p in model.parameters())
    assert found["text"] == str(text)
    assert found["tokens_per_second"] == pytest.approx(310 / found["seconds"])
    assert found["peak_memory"] > found["bytes"]


def test_the_default_text_is_the_held_out_part(tiny, run_json):
    model, tokenizer = load(tiny)
    found = run_json("eval", tiny, "--max-tokens", 600)
    assert (found["windows"], found["length"]) == (2, tiny_checkpoints.CONTEXT)
    (batch,) = text_batches(tokenizer, samples=2, length=tiny_checkpoints.CONTEXT, part="evaluation")
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss.item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)  # their mean is in float32
    assert found["text"] == "Python documentation, held-out part"


def test_a_compressed_checkpoint_and_the_text_for_people(compressed, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run("eval", compressed, "--max-tokens", 512)
    assert (code, err) == (0, "")
    names = [line[:12].rstrip() for line in out.splitlines()]
    assert names == ["text", "perplexity", "speed", "weights", "peak memory"]
    assert max(map(len, out.splitlines())) <= 100
    assert "510 tokens predicted, in windows of 256" in out


def test_fewer_tokens_than_a_window_shorten_the_window(tiny, run_json):
    found = run_json("eval", tiny, "--max-tokens", 40)
    assert (found["windows"], found["length"], found["tokens"]) == (1, 40, 39)


def test_a_hub_data_set_needs_the_package(tiny, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused(
        "eval", tiny, "--text", "wikitext", message="wikitext is no file; to read it as a hub data set: pip install"
    )


def test_bad_requests(tiny, mute, tmp_path, refused):
    text = tmp_path / "text.txt"
    refused("eval", tmp_path / "missing", message="the path does not exist")
    refused("eval", tiny, "--text", text, message=f"no such text file: {text}")
    text.touch()
    refused("eval", tiny, "--text", text, message=f"{text} is empty")
    text.write_text("short")
    refused("eval", tiny, "--text", text, "--length", 64, message="fewer than one sequence of 64; lower the length")
    refused("eval", mute, message=f"{mute} has no tokenizer; add its tokenizer files to the directory")
    refused("eval", tiny, "--length", 300, message="--length 300 is longer than the model's context of 256 tokens")
    refused("eval", tiny, "--length", 64, "--max-tokens", 32, message="--max-tokens 32 is less than one window of 64")
    refused("eval", tiny, "--dtype", "int4", message="--dtype must be one of auto, float32")
    refused("eval", tiny, "--max-tokens", 1, message="--max-tokens", code=2)
    bert = tiny_checkpoints.family("bert", vocab_size=tiny_checkpoints.VOCABULARY)
    source = tiny_checkpoints.write(tmp_path / "bert", bert)
    refused("eval", source, message="BertForMaskedLM is no causal language model, so it has no perplexity")


def test_damaged_weights_are_named(tmp_path, refused):
    model = tiny_checkpoints.model()
    model.model.norm.weight.data[0] = float("nan")
    source = tiny_checkpoints.write(tmp_path / "dense", model)
    refused("eval", source, message="model.norm.weight has NaN or Inf in it")


def test_a_damaged_checkpoint_is_one_line(tiny, tmp_path, refused):
    source = tiny_checkpoints.write(tmp_path / "dense")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refused("eval", source, message=f"the weights in {source} are damaged")
    weights.rename(source / "pytorch_model.bin")  # no pickle either
    refused("eval", source, message=f"the weights in {source} are damaged")
    (source / "tokenizer.json").write_text("{")
    (source / "config.json").write_text("{")
    refused("eval", source, message=f"cannot read the model in {source}: ")
    source = tiny_checkpoints.write(tmp_path / "other")
    (source / "tokenizer.json").write_text("{")
    refused("eval", source, message=f"cannot read the model in {source}: ")


def test_an_infinite_perplexity_is_null_in_json(tmp_path, run, run_json):
    model = tiny_checkpoints.model(tie_word_embeddings=False)
    model.lm_head.weight.data *= 1e6  # certain of the wrong tokens
    source = tiny_checkpoints.write(tmp_path / "dense", model)
    assert run_json("eval", source, "--max-tokens", 64)["perplexity"] is None
    assert "perplexity   inf" in run("eval", source, "--max-tokens", 64)[1]


def test_json_is_one_document(tiny, run):
    code, out, err = run("eval", tiny, "--max-tokens", 64, "--json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), dict)
