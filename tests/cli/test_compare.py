"""``eckart compare``: two models for people and as JSON, the reduced model that it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import eckart
import tiny_checkpoints
from eckart.analysis import compare
from eckart.models import linears, load
from tiny_models import logits

SETTINGS = ("--top", "4", "--threshold", "0.8")


def _changed(size: float = 0.02) -> Any:
    model = tiny_checkpoints.model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for ref in linears(model).linears:
            ref.weight.add_(size * torch.randn(ref.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def tuned(tmp_path_factory) -> Path:
    return tiny_checkpoints.write(tmp_path_factory.mktemp("tuned") / "model", _changed())


def test_json_has_the_figures_of_every_weight(tiny, tuned, run_json):
    found = run_json("compare", tiny, tuned, *SETTINGS)
    options = eckart.analysis.IntruderDimensions(top=4, threshold=0.8)
    wanted = compare(tiny, tuned, options=options, progress=False)
    assert found["layers"] == json.loads(json.dumps([layer.to_dict() for layer in wanted.layers]))
    assert found["figures"] == json.loads(json.dumps(wanted.figures))
    assert found["figures"]["changed"] == 14
    assert found["figures"]["intruders"] > 0
    assert "reduced" not in found


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal_and_names_every_weight(tiny, tuned, run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, err = run("compare", tiny, tuned, *SETTINGS)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    titles = lines[0].split()
    assert titles[:3] == ["layer", "shape", "change"]
    assert titles[-1] == "intruders"
    assert ("effective" in titles) == (width == 120)
    assert lines[1].strip() == "model.layers"
    rows = [line.split() for line in lines[2:16]]
    model, _ = load(tiny)
    assert [f"model.layers.{row[0]}" for row in rows] == [ref.name for ref in linears(model).linears]
    assert "mlp.down_proj (2)" in out
    assert "14 weights, 14 changed; " in out
    assert "by threshold: 0.1: " in out


def test_adapter_and_compressed(tiny, adapter, compressed, run_json):
    found = run_json("compare", tiny, adapter)
    assert all(layer["energy"]["8"] == pytest.approx(1) for layer in found["layers"])
    small = run_json("compare", tiny, compressed, "--where", "*.down_proj", "--top", "2")
    assert [layer["name"] for layer in small["layers"]] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert all(0 < layer["change"] < 1 for layer in small["layers"])
    assert small["figures"]["intruders"] == 0


def test_the_same_model_twice(tiny, run):
    code, out, _ = run("compare", tiny, tiny)
    assert code == 0
    assert "14 weights, 0 changed; 0 intruders" in out


def test_a_reduced_model_is_written(tiny, tuned, tmp_path, run_json, run):
    found = run_json("compare", tiny, tuned, *SETTINGS, "--reduce", "0.5", "--out", tmp_path / "new")
    assert found["reduced"]["intruders"] == found["figures"]["intruders"] > 0
    new, tokenizer = load(tmp_path / "new")
    assert tokenizer is not None
    wanted = eckart.analysis.reduce_intruders(
        load(tuned)[0], load(tiny)[0], 0.5, top=4, threshold=0.8, progress=False
    ).model
    assert torch.equal(logits(new), logits(wanted))
    left = run_json("compare", tuned, tmp_path / "new", *SETTINGS)
    changed = {layer["name"] for layer in left["layers"] if layer["change"] > 0}
    assert changed == {row["layer"] for row in found["reduced"]["layers"] if row["intruders"]}
    code, out, _ = run(
        "compare", tiny, tuned, *SETTINGS, "--reduce", "0.5", "--out", tmp_path / "new", "--force", "--quiet"
    )
    assert code == 0
    assert f"wrote {tmp_path / 'new'}: {found['reduced']['intruders']} intruders times 0.5, dense" in out


@pytest.mark.parametrize("form", ["adapter", "same-rank", "dense"])
def test_a_reduced_adapter_is_written(tiny, adapter, tmp_path, run_json, form):
    out = tmp_path / "new"
    found = run_json("compare", tiny, adapter, *SETTINGS, "--reduce", "0", "--out", out, "--form", form)
    assert found["reduced"]["intruders"] > 0
    base, _ = load(tiny)
    new = load(out)[0] if form == "dense" else PeftModel.from_pretrained(base, str(out))
    before = PeftModel.from_pretrained(load(tiny)[0], str(adapter))
    assert not torch.allclose(logits(new), logits(before), atol=1e-3)
    again = run_json("compare", tiny, out, *SETTINGS)
    assert again["figures"]["intruders"] < found["figures"]["intruders"] or form == "same-rank"
    if form == "adapter":
        assert max(row["error"] for row in found["reduced"]["layers"]) < 1e-6


def test_bad_requests(tiny, tuned, adapter, tmp_path, refused):
    new = tmp_path / "new"
    refused("compare", tiny, tmp_path / "missing", message="the path does not exist")
    refused("compare", adapter, tiny, message="is an adapter; give its base model first")
    refused("compare", tiny, tuned, "--where", "*.q_prj", message="matches no layer; nearest: ")
    refused("compare", tiny, tuned, "--threshold", "2", message="a threshold is a cosine above 0 and at most 1")
    refused("compare", tiny, tuned, "--top", "0", message="--top", code=2)
    refused("compare", tiny, tuned, "--reduce", "0.5", message="--reduce and --out go together")
    refused("compare", tiny, tuned, "--out", new, message="--reduce and --out go together")
    refused("compare", tiny, tuned, "--reduce", "-1", "--out", new, message="scale must be a finite number")
    refused("compare", tiny, tuned, "--reduce", "1", "--out", new, "--form", "lora", message="--form must be one of")
    refused("compare", tiny, tiny, "--reduce", "0", "--out", new, "--form", "adapter", message="no weight differs")
    refused("compare", tiny, tuned, "--reduce", "0", "--out", tiny, message="exists already")


def test_models_that_do_not_belong_together(tiny, tuned, adapter, tmp_path, refused):
    wide = tiny_checkpoints.write(tmp_path / "wide", tiny_checkpoints.model(hidden_size=64), with_tokenizer=False)
    refused("compare", tiny, wide, message="in the first model and 64 x 64 in the second")
    other = tiny_checkpoints.write(tmp_path / "gpt2", tiny_checkpoints.family("gpt2"), with_tokenizer=False)
    refused("compare", tiny, other, message="is in one of the models only")
    refused("compare", tuned, adapter, message="was made for ")
    refused("compare", wide, adapter, message="was made for ")
    refused("compare", tuned, adapter, "--reduce", "0", "--out", tmp_path / "new", message="was made for ")


def test_damaged_files(tiny, adapter, tmp_path, refused):
    broken = _changed()
    broken.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("nan")
    source = tiny_checkpoints.write(tmp_path / "nan", broken)
    refused("compare", tiny, source, message="model.layers.1.mlp.gate_proj has NaN or Inf in it")
    refused("compare", tiny, source, "--reduce", "0", "--out", tmp_path / "new", message="has NaN or Inf in it")
    model = _changed()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    shard.unlink()
    refused("compare", tiny, tmp_path / "shards", message=f"lacks {shard.name}, which its index lists")
    shutil.copytree(adapter, tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    refused("compare", tiny, tmp_path / "half", message="no adapter_model.safetensors")
    shutil.copytree(adapter, tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused("compare", tiny, tmp_path / "cut", message="does not fit the model")
