"""``eckart inspect``: one row a weight, for people and as JSON."""

from __future__ import annotations

import pytest
import torch

import tiny_checkpoints
from eckart.models import linears, load


def test_json_has_the_figures_of_every_weight(tiny, run_json):
    found = run_json("inspect", tiny)
    model, _ = load(tiny)
    refs = linears(model).linears
    assert [layer["name"] for layer in found["layers"]] == [ref.name for ref in refs]
    assert found["skipped"] == []
    for ref, layer in zip(refs, found["layers"], strict=True):
        s = torch.linalg.svdvals(ref.weight.detach().double())
        energy = s.square().cumsum(0) / s.square().sum()
        m, n = ref.shape
        assert layer["shape"] == [m, n]
        assert layer["stable_rank"] == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-5)
        assert layer["energy"]["50%"] == pytest.approx(float(energy[min(m, n) // 2 - 1]), rel=1e-5)
        assert layer["break_even_rank"] == -(-m * n // (m + n))


def test_the_table_fits_a_terminal_and_names_every_weight(tiny, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("inspect", tiny)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["layer", "shape", "stable", "effective", "10%", "25%", "50%", "break-even"]
    assert lines[1].strip() == "model.layers"
    rows = [line.split() for line in lines[2:16]]
    model, _ = load(tiny)
    assert [f"model.layers.{row[0]}" for row in rows] == [ref.name for ref in linears(model).linears]
    assert all(len(row) == 8 for row in rows)
    assert "mlp.down_proj (2)" in out  # the medians
    assert "14 weights, 18,432 parameters" in out


def test_a_few_layers_of_a_compressed_checkpoint(compressed, run_json, run):
    found = run_json("inspect", compressed, "--where", "*.down_proj")
    assert [layer["name"] for layer in found["layers"]] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    for layer in found["layers"]:  # of rank 12 at most, so the second half of full rank holds nothing
        assert layer["energy"]["50%"] == pytest.approx(1, abs=1e-6)
    _, out, _ = run("inspect", compressed, "--where", "lm_head")
    assert out.startswith("0 weights, 0 parameters")
    assert "left alone: lm_head: tied with model.embed_tokens.weight" in out


def test_layers_left_alone_are_listed(tmp_path, run, run_json):
    source = tiny_checkpoints.write(tmp_path / "dense", tiny_checkpoints.family("mixtral"), with_tokenizer=False)
    assert len(run_json("inspect", source)["skipped"]) >= 4
    _, out, _ = run("inspect", source)
    assert "left alone: model.layers.0.mlp.experts.gate_up_proj: 3-D parameter" in out


def test_two_lists_of_blocks(tmp_path, run):
    source = tiny_checkpoints.write(tmp_path / "dense", tiny_checkpoints.family("t5"), with_tokenizer=False)
    _, out, _ = run("inspect", source)
    assert [line for line in out.splitlines() if line.strip() in ("encoder.block", "decoder.block")] != []
    assert out.count("0.layer.0.SelfAttention.q ") == 2
    assert "decoder.block.layer.EncDecAttention.k (2)" in out


def test_bad_requests(tiny, tmp_path, refused):
    refused("inspect", tmp_path / "missing", message="the path does not exist")
    refused("inspect", tiny, "--where", "*.q_prj", message="where='*.q_prj' matches no layer; nearest: ")
    source = tiny_checkpoints.without_linears(tmp_path / "conv")
    refused("inspect", source, message="ResNetModel has no linear layers (nn.Linear or Conv1D) to work on")
    model = tiny_checkpoints.model()
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("inf")
    source = tiny_checkpoints.write(tmp_path / "dense", model)
    refused("inspect", source, message="model.layers.1.mlp.gate_proj: ")
