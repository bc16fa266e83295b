"""Two models side by side: every figure against LAPACK, from memory and from disk, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import eckart
from eckart.analysis import IntruderDimensions, compare
from eckart.models import linears, save
from model_state import assert_unchanged, snapshot
from tiny_models import FAMILIES, low_rank

K = 4
OPTIONS = IntruderDimensions(top=K, threshold=0.7)


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _model(*weights: torch.Tensor) -> nn.Module:
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data = weight
        layers.append(nn.Sequential(layer))
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


def _tuned(family: str) -> Any:
    model = FAMILIES[family]()
    with torch.no_grad():
        for index, ref in enumerate(linears(model).linears):
            ref.weight.add_(0.05 * _draw(*ref.shape, seed=index))
    return model


def _lora(base: Any, **options: Any) -> Any:
    names = [ref.name for ref in linears(base).linears]
    conv = any(ref.kind == "conv1d" for ref in linears(base).linears)
    config = LoraConfig(r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out=conv, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(copy.deepcopy(base), config)


def _plain(comparison: Any) -> list[dict[str, Any]]:
    return [layer.to_dict() for layer in comparison.layers]


def _same(first: Any, second: Any, tolerance: float = 1e-4) -> None:
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    for one, other in zip(_plain(first), _plain(second), strict=True):
        for key in ("change", "stable_rank", "output_overlap", "input_overlap", "cosines", "output_angles"):
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_figures_equal_the_definitions(shape):
    w0, w = _draw(*shape).double(), (_draw(*shape) + 0.3 * _draw(*shape, seed=1)).double()
    [found] = compare(_model(w0), _model(w), options=OPTIONS, progress=False).layers
    u0, _, v0 = torch.linalg.svd(w0, full_matrices=False)
    u, _, v = torch.linalg.svd(w, full_matrices=False)
    d = w - w0
    sd = torch.linalg.svdvals(d)
    p = sd / sd.sum()
    energy = sd.square().cumsum(0) / sd.square().sum()
    left, right = torch.linalg.svdvals(u0[:, :K].mT @ u[:, :K]), torch.linalg.svdvals(v0[:K] @ v[:K].mT)
    cosines = (u[:, :K].mT @ u0).abs().amax(1)
    assert found.change == pytest.approx(float(d.norm() / w0.norm()), rel=1e-9)
    assert found.stable_rank == pytest.approx(float(sd.square().sum() / sd[0] ** 2), rel=1e-5)
    assert found.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-5)
    assert found.energy == pytest.approx([float(energy[0]), float(energy[7]), 1.0], rel=1e-5)
    assert torch.allclose(found.output_angles, left.clamp(max=1).acos(), atol=1e-5)
    assert torch.allclose(found.input_angles, right.clamp(max=1).acos(), atol=1e-5)
    assert found.output_angle == pytest.approx(float(left[-1].acos()), abs=1e-5)
    assert found.output_overlap == pytest.approx(float((u0[:, :K].mT @ d).square().sum() / d.square().sum()), rel=1e-6)
    assert found.input_overlap == pytest.approx(float((d @ v0[:K].mT).square().sum() / d.square().sum()), rel=1e-6)
    assert torch.allclose(found.cosines, cosines, atol=1e-6)
    assert found.intruders == int((cosines < 0.7).sum())
    assert found.singular_values.double() == pytest.approx(sd, rel=1e-4, abs=1e-6)


def test_where_a_change_lies_in_the_base_shows_in_the_overlaps():
    w0 = torch.diag(torch.arange(12.0, 0, -1))
    inside, outside, turned = w0.clone(), w0.clone(), w0.clone()
    inside[0, 0] += 5
    outside[10, 11] += 0.1
    turned[11, 0] += 100
    found = compare(_model(w0, w0, w0), _model(inside, outside, turned), options=OPTIONS, progress=False).layers
    assert [(x.output_overlap, x.input_overlap) for x in found] == [
        pytest.approx(pair, abs=1e-9) for pair in [(1, 1), (0, 0), (0, 1)]
    ]
    assert [x.stable_rank for x in found] == pytest.approx([1, 1, 1])
    assert found[2].output_angle == pytest.approx(math.atan(100 / 12), abs=1e-3)
    assert found[2].input_angle < 0.1
    assert [x.intruders for x in found] == [0, 0, 0]  # u_11 is a direction of the base, if a lowly one


def test_nothing_changed_and_nothing_there():
    w0 = _draw(12, 8)
    zero = torch.zeros(12, 8)
    same, gone, born, none = compare(
        _model(w0, w0, zero, zero), _model(w0.clone(), zero, w0, zero), options=OPTIONS, progress=False
    ).layers
    assert (same.change, same.stable_rank, same.intruders, same.output_overlap) == (0, 0, 0, 0)
    assert same.output_angle < 1e-6
    assert (gone.change, gone.intruders, len(gone.cosines)) == (1, 0, 0)
    assert (born.change, born.intruders) == (float("inf"), K)
    assert (none.change, none.stable_rank) == (0, 0)
    json.dumps([layer.to_dict() for layer in (same, gone, born, none)], allow_nan=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "t5", "mixtral", "vit"])
def test_from_disk_as_from_memory(family, tmp_path):
    base, model = FAMILIES[family](), _tuned(family)
    before = snapshot(base)
    paths = [save(one, tmp_path / name) for name, one in (("base", base), ("tuned", model))]
    found = compare(base, model, options=OPTIONS, progress=False)
    assert_unchanged(base, before)
    assert [layer.name for layer in found.layers] == [ref.name for ref in linears(base).linears]
    assert found.figures["changed"] == len(found.layers)
    _same(found, compare(*paths, options=OPTIONS, progress=False))
    _same(found, compare(base, str(paths[1]), options=OPTIONS, progress=False))
    assert found.skipped == linears(base).skipped


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "eckart"])
def test_an_adapter_on_disk_or_in_memory_is_its_merged_model(family, kind, tmp_path):
    base = FAMILIES[family]()
    path = save(base, tmp_path / "base")
    loaded, _ = eckart.load(path)
    model = _lora(loaded) if kind == "lora" else eckart.adapt(loaded, "pissa", 2, progress=False)
    with torch.no_grad():
        for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * _draw(*parameter.shape, seed=index))
    model.save_pretrained(tmp_path / "adapter")
    wanted = compare(base, copy.deepcopy(model).merge_and_unload(), options=OPTIONS, progress=False)
    assert max(layer.change for layer in wanted.layers) > 0.1
    before = snapshot(base)
    for first in (path, base):
        found = compare(first, tmp_path / "adapter", options=OPTIONS, progress=False)
        _same(found, wanted, 1e-3)
        assert not any("taken for granted" in line for line in found.warnings)
        assert all(layer.stable_rank <= 5 for layer in found.layers)
    assert_unchanged(base, before)
    _same(compare(base, model, options=OPTIONS, progress=False), wanted, 1e-3)


def test_compressed_against_dense(tmp_path):
    base, model = FAMILIES["llama"](), FAMILIES["llama"]()
    low_rank(model, rank=K)
    paths = [save(one, tmp_path / name) for name, one in (("base", base), ("small", model))]
    found = compare(base, model, options=OPTIONS, progress=False)
    for layer, ref in zip(found.layers, linears(base).linears, strict=True):
        s = torch.linalg.svdvals(ref.weight.detach().double())
        assert layer.change == pytest.approx(float(s[K:].norm() / s.norm()), rel=1e-4)
        # the truncation keeps the leading directions, and takes away nothing that lies in them
        assert layer.output_overlap < 1e-6
        assert layer.output_angle < 1e-2
        assert layer.intruders == 0
    _same(found, compare(*paths, options=OPTIONS, progress=False))
    _same(found, compare(paths[0], model, options=OPTIONS, progress=False))


def test_a_selection_of_layers():
    found = compare(FAMILIES["llama"](), _tuned("llama"), where="*.0.mlp.*", progress=False)
    assert [layer.name.rpartition(".")[2] for layer in found.layers] == ["gate_proj", "up_proj", "down_proj"]


def test_what_does_not_belong_together_is_refused(tmp_path):
    base = FAMILIES["llama"]()
    path = save(base, tmp_path / "base")
    with pytest.raises(ValueError, match="in one of the models only"):
        compare(base, FAMILIES["gpt2"](), progress=False)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj is 32 x 32 in the first model and \d+ x \d+"):
        compare(base, FAMILIES["llama"]().__class__(_other(base, hidden_size=64)), progress=False)
    with torch.no_grad():
        damaged = _tuned("llama")
        damaged.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has NaN or Inf"):
        compare(path, damaged, progress=False)
    with pytest.raises(FileNotFoundError, match="the path does not exist"):
        compare(path, tmp_path / "missing", progress=False)


def _other(base: Any, **options: Any) -> Any:
    config = copy.deepcopy(base.config)
    for key, value in options.items():
        setattr(config, key, value)
    return config


def test_an_adapter_for_another_base_is_refused(tmp_path):
    base, other = FAMILIES["llama"](), _tuned("llama")
    path, other_path = save(base, tmp_path / "base"), save(other, tmp_path / "other")
    _lora(eckart.load(other_path)[0]).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"was made for .*other, which differs from .*base; give that base"):
        compare(path, tmp_path / "adapter", progress=False)
    compare(other_path, tmp_path / "adapter", progress=False)
    with pytest.raises(ValueError, match="is an adapter; give its base model first"):
        compare(tmp_path / "adapter", path, progress=False)
    moved = path.rename(tmp_path / "moved")  # the same weights elsewhere, and the adapter's own base too
    save(FAMILIES["llama"](), tmp_path / "base")
    _lora(eckart.load(tmp_path / "base")[0]).save_pretrained(tmp_path / "second")
    assert compare(moved, tmp_path / "second", progress=False).figures["changed"]
    # a base that is not here any more cannot be checked by its weights, which is said
    wider = save(FAMILIES["llama"]().__class__(_other(base, hidden_size=64)), tmp_path / "wider")
    _lora(eckart.load(wider)[0]).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="was made for"):
        compare(moved, tmp_path / "wide", progress=False)
    wider.rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="does not fit the model: size mismatch"):
        compare(moved, tmp_path / "wide", progress=False)
    (tmp_path / "base").rename(tmp_path / "gone too")
    found = compare(moved, tmp_path / "second", progress=False)
    assert any("is not here; that" in line for line in found.warnings)
    for file in (tmp_path / "second").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        compare(moved, tmp_path / "second", progress=False)


def test_an_eckart_adapter_knows_its_base_by_itself(tmp_path):
    path = save(FAMILIES["llama"](), tmp_path / "base")
    eckart.adapt(_tuned("llama"), "pissa", 2, progress=False).save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        far = FAMILIES["llama"]()
        for ref in linears(far).linears:
            ref.weight.mul_(2)
    with pytest.raises(ValueError, match="was made for another base model"):
        compare(save(far, tmp_path / "far"), tmp_path / "adapter", progress=False)
    assert path.exists()
