"""The figures of the report against an independent computation, and its predictions against a real compression."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import tiny_checkpoints
import tiny_models
from eckart.analysis import spectra
from eckart.compression import compress
from eckart.linalg import rank_for_ratio
from eckart.models import linears, load, model_bytes, save
from eckart.report import Source, advise, report_figures
from eckart.report.figures import positions

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def advice_for(model):
    refs = linears(model).linears
    return advise(spectra(model, progress=False), model_bytes(model), {ref.name: ref.dtype.itemsize for ref in refs})


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma2"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_bytes_and_ranks_are_those_of_a_compression(family, ratio, dtype):
    model = tiny_models.FAMILIES[family]().to(dtype)
    advice = advice_for(model)
    (step,) = [step for step in advice.steps if step.ratio == ratio]
    result = compress(model, "svd", ratio=ratio, progress=False)
    assert {layer.form for layer in result.layers} == {"pivoted"}
    assert result.bytes[1] == step.bytes
    if ratio == advice.ratio:
        assert advice.ranks == {layer.name: layer.rank for layer in result.layers}
        assert sum(advice.saved.values()) == result.bytes[0] - result.bytes[1]


def test_energy_kept_is_that_of_the_truncated_weights():
    model = tiny_checkpoints.model()
    advice = advice_for(model)
    for step in advice.steps:
        kept = whole = 0.0
        shares = {}
        for ref in linears(model).linears:
            s = torch.linalg.svdvals(ref.weight.detach().double()).square()
            part = float(s[: rank_for_ratio(*ref.shape, step.ratio)].sum())
            kept, whole, shares[ref.name] = kept + part, whole + float(s.sum()), part / float(s.sum())
        assert step.kept == pytest.approx(kept / whole, rel=1e-5)
        assert (step.worst_layer, step.worst) == (min(shares, key=shares.get), pytest.approx(min(shares.values())))
        assert step.shared >= step.kept - 1e-9


def test_the_suggested_ratio_is_the_largest_that_keeps_enough():
    model = tiny_checkpoints.model()
    assert advice_for(model).enough is False  # random weights have no low rank
    assert advice_for(model).ratio == 0.1
    with torch.no_grad():
        for ref in linears(model).linears:
            ref.weight.add_(1.0)  # one strong direction
    advice = advice_for(model)
    assert (advice.ratio, advice.enough) == (0.5, True)


def test_weights_too_small_for_any_budget_have_no_advice():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(1, 2))] * 1)})
    figures = report_figures(Source.of(model, "small"), progress=False)
    assert figures["advice"] is None
    assert figures["layers"][0]["suggested_rank"] is None


def test_figures_are_plain_json_and_name_every_weight():
    model = tiny_checkpoints.model()
    figures = report_figures(Source.of(model, "dir/tiny"), progress=False)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert [layer["name"] for layer in figures["layers"]] == [ref.name for ref in linears(model).linears]
    for ref, layer in zip(linears(model).linears, figures["layers"], strict=True):
        s = torch.linalg.svdvals(ref.weight.detach().double())
        assert figures["points"][str(len(s))] == list(range(1, len(s) + 1))
        assert layer["spectrum"]["values"] == pytest.approx(s.tolist(), rel=1e-4)
        energy = s.square().cumsum(0) / s.square().sum()
        assert layer["spectrum"]["energy"] == pytest.approx(energy.tolist(), abs=1e-6)
        place = f"{figures['blocks'][layer['block']]['name']}.{figures['kinds'][layer['kind']]['name']}"
        assert place == layer["name"]
    assert figures["advice"]["command"] == ("eckart compress dir/tiny --method pifa --ratio 0.1 --out tiny-compressed")


@pytest.mark.parametrize(
    ("family", "where", "rows", "columns"),
    [
        ("t5", None, ["encoder 0", "encoder 1", "decoder 0", "decoder 1"], "layer.0.SelfAttention.q"),
        ("gpt2", None, ["0", "1"], "attn.c_attn"),
        ("llama", "*", ["0", "1", "outside"], "lm_head"),
        ("bert", None, ["0", "1"], "attention.self.query"),
    ],
)
def test_every_family_has_its_rows_and_columns(family, where, rows, columns):
    figures = report_figures(Source.of(tiny_models.FAMILIES[family](), family, where), progress=False)
    assert [block["label"] for block in figures["blocks"]] == rows
    assert columns in [kind["name"] for kind in figures["kinds"]]
    places = [(layer["block"], layer["kind"]) for layer in figures["layers"]]
    assert len(set(places)) == len(places)
    shorts = [kind["short"] for kind in figures["kinds"]]
    assert len(set(shorts)) == len(shorts)


def test_differences_are_those_of_the_weights():
    model, other = tiny_checkpoints.model(), tiny_checkpoints.model()
    generator = torch.Generator().manual_seed(3)
    names = [ref.name for ref in linears(model).linears]
    with torch.no_grad():
        for ref in linears(other).linears[1:]:
            ref.weight.add_(torch.randn(ref.shape, generator=generator) / 50)
    figures = report_figures(Source.of(model, "a"), Source.of(other, "b"), progress=False)
    found = figures["against"]["layers"]
    assert [layer["name"] for layer in found] == names
    assert found[0]["difference"]["relative"] == found[0]["difference"]["stable_rank"] == 0
    for layer, mine, theirs in zip(found, linears(model).linears, linears(other).linears, strict=True):
        change = (theirs.weight - mine.weight).detach().double()
        s = torch.linalg.svdvals(change)
        assert layer["difference"]["relative"] == pytest.approx(
            float(change.norm() / mine.weight.detach().double().norm()), rel=1e-5
        )
        assert layer["difference"]["spectrum"]["values"] == pytest.approx(s.tolist(), rel=1e-4, abs=1e-9)


def test_models_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"q_proj is 32 x 32 in the first model and 16 x 16 in the second"):
        report_figures(
            Source.of(tiny_checkpoints.model(), "a"),
            Source.of(tiny_checkpoints.model(hidden_size=16), "b"),
            progress=False,
        )


@pytest.mark.parametrize(("size", "points"), [(1, 16), (16, 16), (17, 16), (576, 256), (16384, 256), (300, 256)])
def test_positions_are_few_increasing_and_hold_both_ends(size, points):
    found = positions(size, points)
    assert len(found) <= points
    assert (found[0], found[-1]) == (1, size)
    assert all(a < b for a, b in itertools.pairwise(found))


def test_many_weights_are_drawn_with_fewer_points(monkeypatch):
    monkeypatch.setattr("eckart.report.figures._ALL_POINTS", 14 * 20)
    figures = report_figures(Source.of(tiny_checkpoints.model(), "tiny"), progress=False)
    assert {len(layer["spectrum"]["values"]) <= 20 for layer in figures["layers"]} == {True}


def test_a_compressed_model_gets_no_advice():
    model = tiny_checkpoints.model()
    compress(model, "svd", ratio=0.3, progress=False)
    figures = report_figures(Source.of(model, "small"), progress=False)
    assert figures["advice"] is None
    assert figures["model"]["compressed"] is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_on_disk_has_the_figures_of_the_loaded_model(tmp_path, dtype, tied):
    model = tiny_checkpoints.model(tie_word_embeddings=tied).to(dtype)
    dense = save(model, tmp_path / "dense")
    compress(model, "svd", ratio=0.3, progress=False)
    small = save(model, tmp_path / "small")
    stored = report_figures(Source.stored(dense, "a"), Source.stored(small, "b"), progress=False)
    loaded = report_figures(Source.of(load(dense)[0], "a"), Source.of(load(small)[0], "b"), progress=False)
    assert stored == loaded


def test_the_model_is_as_before():
    model = tiny_models.FAMILIES["llama"]().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report_figures(Source.of(model, "a"), Source.of(tiny_models.FAMILIES["llama"](), "b"), progress=False)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
