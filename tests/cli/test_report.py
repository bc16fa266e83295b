"""``eckart report``: a page and its figures, or one line and nothing."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny_checkpoints
from eckart.models import load


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny):
    """A LoRA for the tiny checkpoint, of which B is not zero."""
    model = get_peft_model(load(tiny)[0], LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    path = tmp_path_factory.mktemp("adapter") / "lora"
    model.save_pretrained(path)
    return path


def test_page_and_figures(tiny, compressed, tmp_path, run):
    page, figures = tmp_path / "report.html", tmp_path / "figures.json"
    code, out, err = run("report", tiny, "--against", compressed, "--out", page, "--json", figures, "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {page} (")
    assert "try: eckart compress" in out
    found = json.loads(figures.read_text())
    assert len(found["layers"]) == len(found["against"]["layers"]) == 14
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figures.json", "report.html"]
    again, _, _ = run("report", tiny, "--out", page, "--quiet", "--where", "*.down_proj")  # a report may be replaced
    assert again == 0
    assert '"against":null' in page.read_text()


def test_json_to_standard_output_and_the_method_without_text(mute, tmp_path, run):
    code, out, err = run("report", mute, "--out", tmp_path / "report.html", "--json", "-", "--quiet")
    assert (code, err) == (0, "")
    advice = json.loads(out)["advice"]
    assert advice["method"] == "svd"
    assert "--method svd " in advice["command"]


def test_against_an_adapter(tiny, adapter, tmp_path, run):
    code, out, err = run("report", tiny, "--against", adapter, "--out", tmp_path / "r.html", "--json", "-", "--quiet")
    assert (code, err) == (0, "")
    for layer in json.loads(out)["against"]["layers"]:
        changed = layer["name"].endswith("q_proj")
        assert (layer["difference"]["relative"] > 0) == changed
        if changed:  # B has equal columns, so the change has rank one
            assert layer["difference"]["stable_rank"] == pytest.approx(1, rel=1e-4)


def test_bad_requests(tiny, adapter, tmp_path, refused):
    page = tmp_path / "report.html"
    refused("report", tmp_path / "missing", "--out", page, message="the path does not exist")
    refused("report", tiny, "--out", tmp_path / "no" / "report.html", message="there is no directory")
    refused("report", tiny, "--out", tmp_path, message="is a directory")
    refused("report", tiny, "--out", page, "--json", page, message="--out and --json are the same file")
    refused("report", tiny, "--out", page, "--where", "*.q_prj", message="matches no layer; nearest: ")
    (tmp_path / "notes.html").write_text("mine")
    refused("report", tiny, "--out", tmp_path / "notes.html", message="exists and is no report")
    refused("report", tiny, "--out", page, "--json", tmp_path / "notes.html", message="exists and is no report")


def test_bad_models(tiny, adapter, tmp_path, refused):
    page = tmp_path / "report.html"
    model = tiny_checkpoints.model()
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("nan")
    broken = tiny_checkpoints.write(tmp_path / "broken", model, with_tokenizer=False)
    name = "model.layers.1.mlp.gate_proj"
    refused("report", broken, "--out", page, "--quiet", message=f"{name} has NaN or Inf in it")
    refused("report", tiny, "--against", broken, "--out", page, "--quiet", message=f"{name} has NaN or Inf in it")
    narrow = tiny_checkpoints.write(tmp_path / "narrow", tiny_checkpoints.model(hidden_size=16), with_tokenizer=False)
    refused(
        "report", tiny, "--against", narrow, "--out", page, "--quiet", message="is 32 x 32 in the first model and 16"
    )
    shallow = tiny_checkpoints.model(num_hidden_layers=1)
    shallow = tiny_checkpoints.write(tmp_path / "shallow", shallow, with_tokenizer=False)
    refused("report", tiny, "--against", shallow, "--out", page, "--quiet", message="in one of the models only")
    refused("report", narrow, "--against", adapter, "--out", page, "--quiet", message="does not fit")
    other = tiny_checkpoints.write(tmp_path / "other", tiny_checkpoints.family("gpt2"), with_tokenizer=False)
    refused("report", other, "--against", adapter, "--out", page, "--quiet", message="does not fit")


def test_a_checkpoint_that_cannot_be_read_weight_by_weight(tmp_path, run):
    source = tiny_checkpoints.write(tmp_path / "dense", tiny_checkpoints.family("mixtral"), with_tokenizer=False)
    code, out, err = run("report", source, "--out", tmp_path / "report.html", "--json", "-", "--quiet")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert len(figures["layers"]) == 8
    assert any("3-D parameter" in item["reason"] for item in figures["skipped"])


def test_a_missing_shard(tmp_path, refused):
    from eckart.models import save

    source = save(tiny_checkpoints.model(), tmp_path / "shards", max_shard_size=40_000)
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused("report", source, "--out", tmp_path / "report.html", "--quiet", message=shard.name)
