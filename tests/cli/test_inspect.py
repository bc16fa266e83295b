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


@pytest.mark.parametrize("columns", [80, 140])
def test_the_table_fits_a_terminal_and_names_every_weight(tiny, run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run("inspect", tiny, "--overlaps", "--rank", "4")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    titles = lines[0].replace("keep ", "keep").split()
    some = {"layer", "spectrum", "shape", "entropy", "alpha", "noise", "keep20%"}
    assert some | ({"stable", "effective", "KS", "condition", "10%", "25%", "50%"} if columns > 80 else set()) <= set(
        titles
    )
    assert lines[1].strip() == "model.layers"
    rows = [line.split() for line in lines[2:16]]
    model, _ = load(tiny)
    assert [f"model.layers.{row[0]}" for row in rows] == [ref.name for ref in linears(model).linears]
    assert all(len(row) == len(titles) for row in rows)
    assert all(row[1][0] in "▆▇█" for row in rows)  # random weights have flat spectra
    assert "mlp.down_proj (2)" in out  # the medians
    assert "overlap of each kind" in out
    assert "14 weights, 18,432 parameters" in out


def test_all_figures_go_into_a_pipe(tiny, run):
    _, out, _ = run("inspect", tiny)
    title = out.splitlines()[0]
    assert all(name in title for name in ("keep 10%", "keep 50%", "break-even", "condition"))
    assert "overlap of each kind" not in out


def test_json_has_everything(tiny, run_json):
    found = run_json("inspect", tiny, "--overlaps", "--rank", "4")
    first = found["layers"][0]
    assert set(first) >= {"entropy_rank", "tail_exponent", "tail_distance", "noise_edge", "above_noise", "parameters"}
    assert list(first["kept"]) == ["10%", "20%", "30%", "40%", "50%"]
    assert sorted(first["kept"].values(), reverse=True) == list(first["kept"].values())
    assert [one["kind"] for one in found["overlaps"]][:2] == [
        "model.layers.self_attn.q_proj",
        "model.layers.self_attn.k_proj",
    ]
    for one in found["overlaps"]:
        assert len(one["names"]) == 2
        assert one["pairs"]["left"][0][1] == one["adjacent"]["left"][0]
    assert "overlaps" not in run_json("inspect", tiny)


def test_a_directory_is_read_weight_by_weight_unless_it_is_converted(tiny, run_json, monkeypatch):
    streamed = run_json("inspect", tiny)
    loaded = run_json("inspect", tiny, "--dtype", "float32")
    assert streamed["layers"] == loaded["layers"]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("eckart.cli.inspect.load_model", refuse)
    assert run_json("inspect", tiny) == streamed


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
    refused("inspect", source, message="model.layers.1.mlp.gate_proj has NaN or Inf in it")
    (source / "model.safetensors").rename(source / "a.safetensors")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "b.safetensors"}}')
    refused("inspect", source, message="lacks b.safetensors, which its index lists")
    (source / "config.json").rename(source / "adapter_config.json")
    refused("inspect", source, message="is an adapter, not a model")
