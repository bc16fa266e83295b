"""LoRAP against numpy: the tail of a weighted SVD, scores by loops, and budgets counted by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from eckart.compression import compress
from eckart.compression.lorap import LoRAP, channel_scores, kept_channels
from eckart.compression.svd import SVD
from eckart.models import Statistics, calibrate, export_dense, linears, load, save
from eckart.models.parts import AttentionPart, parts
from eckart.structures import Dense, EckartWarning, LowRank
from model_state import inputs_by_hooks


def quiet(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        return compress(model, *args, progress=False, **options)


def part_of(family: str, kind: str, seed: int = 0):
    """The first part of a kind of a model in float64, and E x_j^2 of its inputs."""
    model = tiny_models.FAMILIES[family]().double()
    found, _ = parts(model, linears(model).linears)
    part = next(p for p in found if isinstance(p, AttentionPart) == (kind == "attention"))
    statistics = calibrate(model, [tiny_models.inputs(model, 8, 20)], LoRAP.needs, progress=False)
    return part, statistics


def size_of(part) -> int:
    return sum(ref.in_features * ref.out_features for ref in part.linears)


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_the_error_is_the_tail_of_the_scaled_weight(family, form):
    part, statistics = part_of(family, "attention")
    size = size_of(part)
    change = LoRAP().compress(part, statistics, size // 2, form)
    assert change.geometry is None
    assert change.structures.keys() == {ref.name for ref in part.linears}
    for ref in part.linears:
        structure, root = change.structures[ref.name], statistics[ref.name].meansquare.sqrt().numpy()
        scaled = ref.weight.detach().numpy() * root
        s = np.linalg.svd(scaled, compute_uv=False)
        lost = np.linalg.norm(scaled - structure.dense().detach().numpy() * root)
        assert lost == pytest.approx(np.linalg.norm(s[structure.rank :]), rel=1e-6)
        assert change.errors[ref.name] == pytest.approx(lost / np.linalg.norm(s), rel=1e-6)
        assert structure.form == form
        assert ref.bias is None or structure.bias.equal(ref.bias)
    stored = sum(s.num_parameters() - (0 if s.bias is None else s.bias.numel()) for s in change.structures.values())
    assert 0.8 * size / 2 < stored <= size / 2


def test_equal_inputs_are_the_plain_svd():
    part, _ = part_of("llama", "attention")
    equal = {ref.name: Statistics(meansquare=torch.full((ref.in_features,), 3.0).double()) for ref in part.linears}
    change = LoRAP().compress(part, equal, size_of(part) // 2, "plain")
    for ref in part.linears:
        structure = change.structures[ref.name]
        factors = SVD().factorize(ref.weight.detach(), Statistics(), structure.rank)
        torch.testing.assert_close(structure.dense(), factors.up @ factors.down, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["plain", "pivoted"])
def test_at_a_fifth_values_and_output_are_untouched(form):
    """rho = 0.8: k_min = 0.3 h in plain form, and v and o stay as they are in both."""
    part, statistics = part_of("opt", "attention")
    size = size_of(part)
    change = LoRAP().compress(part, statistics, int(0.8 * size), form)
    assert change.structures.keys() == {part.query.name, part.key.name}
    ranks = {structure.rank for structure in change.structures.values()}
    h = part.query.in_features
    assert ranks == ({int(0.3 * h)} if form == "plain" else {int(h - h * 0.4**0.5)})  # k (2 h - k) = 0.6 h^2


def test_the_ranks_of_the_paper_in_plain_form():
    """rho = 0.4 of square matrices: 2 k_att / 4 and 6 k_att / 4 with k_att = rho h / 2; all numbers are rho 4 h^2."""
    part, statistics = part_of("opt", "attention")
    h = part.query.in_features
    change = LoRAP().compress(part, statistics, int(0.4 * 4 * h * h), "plain")
    k_att = 0.4 * h / 2
    ranks = [change.structures[ref.name].rank for ref in part.linears]
    assert ranks == [int(k_att / 2), int(k_att / 2), int(1.5 * k_att), int(1.5 * k_att)]


def test_a_channel_that_was_never_seen():
    part, statistics = part_of("llama", "attention")
    for entry in {id(e): e for e in statistics.values()}.values():
        entry.meansquare[3] = 0
    change = LoRAP().compress(part, statistics, size_of(part) // 2, "plain")
    assert all(torch.isfinite(s.dense()).all() for s in change.structures.values())


# ---------------------------------------------------------------------------------------------------------------- mlp


def test_scores_by_loops():
    part, statistics = part_of("llama", "mlp")
    moments = [statistics[ref.name].meansquare for ref in part.linears]
    weights = [ref.weight.detach() for ref in part.linears]
    found = channel_scores(list(zip(weights[:2], moments[:2], strict=True)), (weights[2], moments[2]))
    for i in range(part.width):
        rows = [sum(float(w[i, j]) ** 2 * float(a[j]) for j in range(32)) ** 0.5
                for w, a in zip(weights[:2], moments[:2], strict=True)]  # fmt: skip
        column = sum(float(w) ** 2 for w in weights[2][:, i]) ** 0.5 * float(moments[2][i]) ** 0.5
        assert float(found[i]) == pytest.approx(sum(rows) + column, rel=1e-9)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.5, 0.8])
def test_the_slice_that_goes_begins_after_the_least_important(sparsity):
    scores = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double()
    count = 1000 - (int((sparsity + 0.01) * 1000) - int(0.01 * 1000))
    kept = kept_channels(scores, count, 0.01)
    gone = sorted(set(range(1000)) - set(kept.tolist()), key=lambda i: float(scores[i]))
    assert [int(scores[i]) for i in gone] == list(range(10, 10 + 1000 - count))
    assert kept.tolist() == sorted(kept.tolist())
    assert kept_channels(scores, 5, 0.01).numel() == 5
    assert kept_channels(scores, 1000, 0.01).numel() == 1000


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_channels_are_cut_out_of_all_matrices(family):
    part, statistics = part_of(family, "mlp")
    change = LoRAP(retained=0.1).compress(part, statistics, int(0.6 * size_of(part)), "pivoted")
    moments = {ref.name: statistics[ref.name].meansquare for ref in part.linears}
    scores = channel_scores([(r.weight, moments[r.name]) for r in part.inputs],
                            (part.output.weight, moments[part.output.name]))  # fmt: skip
    kept = kept_channels(scores.detach(), int(0.6 * part.width), 0.1)
    for ref in part.inputs:
        assert change.structures[ref.name].dense().equal(ref.weight[kept])
        assert ref.bias is None or change.structures[ref.name].bias.equal(ref.bias[kept])
    output = change.structures[part.output.name]
    assert output.dense().equal(part.output.weight[:, kept])
    assert output.bias is None if part.output.bias is None else output.bias.equal(part.output.bias)


def test_channels_that_nobody_reads_cost_nothing():
    model = tiny_models.FAMILIES["llama"]().double()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight, empty in ((layer.mlp.down_proj.weight.T, 0), (layer.mlp.up_proj.weight, 0)):
                weight[::3] = empty
            layer.mlp.gate_proj.weight[::3] *= 1e-3  # so that they are the least of all
    dense = tiny_models.logits(model)
    data = [tiny_models.inputs(model, 8, 20)]
    quiet(model, LoRAP(retained=0), data=data, ratio=0.32, where="*.mlp.*")
    torch.testing.assert_close(tiny_models.logits(model), dense, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------------ a whole model


def test_a_block_sees_what_the_compressed_ones_before_it_make():
    model = tiny_models.FAMILIES["llama"]().double()
    batch = tiny_models.inputs(model, 8, 20)
    names = [ref.name for ref in linears(model, "*.1.*").linears]
    twin = tiny_models.FAMILIES["llama"]().double()
    quiet(model, "lorap", data=[batch], ratio=0.4)
    twin.model.layers[0] = model.model.layers[0]
    with torch.no_grad():
        seen = inputs_by_hooks(twin, names, [batch])
    moments = {name: Statistics(meansquare=x.square().mean(0)) for name, x in seen.items()}
    found, _ = parts(twin, linears(twin, "*.1.*").linears)
    for part in found:
        change = LoRAP().compress(part, moments, int(0.6 * size_of(part)), "pivoted")
        if isinstance(part, AttentionPart):
            for name, structure in change.structures.items():
                torch.testing.assert_close(model.get_submodule(name).dense(), structure.dense(), rtol=0, atol=1e-6)


def test_saved_and_loaded_by_plain_transformers(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    data = [tiny_models.inputs(model, 8, 20)]
    result = quiet(model, "lorap", data=data, ratio=0.4)
    assert result.bytes[1] < result.bytes[0]
    save(model, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    layer = again.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, LowRank)
    assert isinstance(layer.mlp.up_proj, Dense)
    assert sum(p.numel() for p in layer.self_attn.q_proj.parameters()) < 0.4 * 32 * 32, "no dense matrix is kept"
    with pytest.raises(ValueError, match="the dense model has 48 x 32 there; a model whose widths changed"):
        export_dense(tmp_path / "model", tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_attention_alone_can_be_made_dense_again(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    quiet(model, "lorap", data=[tiny_models.inputs(model, 8, 20)], ratio=0.4, where="*.self_attn.*")
    dense, _ = load(export_dense(model, tmp_path / "dense"))
    torch.testing.assert_close(tiny_models.logits(dense), tiny_models.logits(model), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": 0.5}, "times must be at least 1, not 0.5"),
        ({"times": float("nan")}, "times must be at least 1"),
        ({"retained": 1}, r"retained must lie in \[0, 1\), not 1"),
        ({"retained": -0.1}, r"retained must lie in \[0, 1\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LoRAP(**options)
