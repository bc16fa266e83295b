from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiny_checkpoints
import tiny_models
from eckart.analysis import spectra
from eckart.linalg import break_even_rank, marchenko_pastur_edge, noise_level, rank_for_ratio
from eckart.models import linears
from eckart.models.stored import LayoutError


def _with_spectrum(s: torch.Tensor, m: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(m * n)
    u, _ = torch.linalg.qr(torch.randn(m, len(s), dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(n, len(s), dtype=torch.float64, generator=generator))
    return ((u * s) @ v.mT).to(dtype)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_a_known_spectrum(shape):
    s = 0.8 ** torch.arange(24, dtype=torch.float64)
    [found] = spectra(tiny_models.of_weights(_with_spectrum(s, *shape)), progress=False)
    total = s.square().sum()
    p = s / s.sum()
    assert found.name == "layers.0.0"
    assert found.shape == shape
    # float32 weights: singular values carry an error of about 1e-7 of the largest
    assert found.singular_values.double() == pytest.approx(s, abs=1e-6)
    assert found.stable_rank == pytest.approx(float(total), rel=1e-5)
    assert found.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-5)
    # 10, 25 and 50 % of 24 singular values, rounded up
    assert found.energy == pytest.approx([float(s[:k].square().sum() / total) for k in (3, 6, 12)], rel=1e-5)
    assert found.largest == pytest.approx(1, rel=1e-6)
    assert found.condition == pytest.approx(float(1 / s[-1]), rel=1e-3)
    assert found.break_even_rank == break_even_rank(*shape, "plain")


def test_extremes():
    rank_one = torch.outer(torch.arange(1.0, 7.0), torch.ones(4))
    zero = torch.zeros(6, 4)
    found = spectra(
        tiny_models.of_weights(torch.eye(5), rank_one, zero, torch.ones(1, 3), torch.eye(4) * 1e30), progress=False
    )
    identity, one, nothing, row, huge = found
    assert (identity.stable_rank, identity.effective_rank, identity.condition) == pytest.approx((5, 5, 1))
    assert (one.stable_rank, one.energy[2]) == pytest.approx((1, 1))
    assert one.effective_rank == pytest.approx(1, abs=1e-4)
    assert nothing.largest == 0
    assert nothing.condition == math.inf
    assert all(math.isfinite(value) for value in (nothing.stable_rank, nothing.effective_rank, *nothing.energy))
    assert row.stable_rank == pytest.approx(1)
    assert (huge.stable_rank, huge.largest) == pytest.approx((4, 1e30))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    weight = _with_spectrum(0.9 ** torch.arange(16, dtype=torch.float64), 16, 20, dtype)
    [found] = spectra(tiny_models.of_weights(weight), progress=False)
    exact = torch.linalg.svdvals(weight.double())  # of the weight as it is stored
    assert found.singular_values.double() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_in_the_order_of_the_model(family):
    model = tiny_models.FAMILIES[family]()
    found = spectra(model, progress=False)
    refs = linears(model).linears
    assert [layer.name for layer in found] == [ref.name for ref in refs]
    for ref, layer in zip(refs, found, strict=True):
        exact = torch.linalg.svdvals(ref.weight.detach().double())
        assert layer.shape == ref.shape
        assert layer.singular_values.double() == pytest.approx(exact, rel=1e-4, abs=1e-5 * float(exact[0]))


def test_structures_are_seen_as_a_whole_and_only_what_is_selected():
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=3)
    found = spectra(model, where=["*.q_proj", "1.mlp.down_proj"], progress=False)
    assert [layer.name.rpartition(".")[2] for layer in found] == ["q_proj", "q_proj", "down_proj"]
    assert all(float(layer.singular_values[3:].max()) < 1e-5 * layer.largest for layer in found)


def test_to_dict_is_plain_and_leaves_the_singular_values_out():
    [found] = spectra(tiny_models.of_weights(torch.eye(4)), progress=False)
    assert found.to_dict() == {
        "name": "layers.0.0",
        "shape": (4, 4),
        "stable_rank": pytest.approx(4),
        "effective_rank": pytest.approx(4),
        "energy": {"10%": pytest.approx(0.25), "25%": pytest.approx(0.25), "50%": pytest.approx(0.5)},
        "break_even_rank": 2,
        "largest": pytest.approx(1),
        "condition": pytest.approx(1),
        "entropy_rank": pytest.approx(4),
        "tail_exponent": None,  # four equal values have no tail
        "tail_distance": None,
        "noise_edge": pytest.approx(marchenko_pastur_edge((4, 4), noise_level(torch.ones(4), (4, 4)))),
        "above_noise": 0,
        "kept": {"10%": 0.5, "20%": 0.5, "30%": 0.25, "40%": 0.25, "50%": 0.25},  # two directions hold 12 numbers
        "parameters": 16,
    }
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_weight_is_named(value):
    weight = torch.eye(4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=r"^layers\.1\.0 has NaN or Inf"):
        spectra(tiny_models.of_weights(torch.eye(4), weight), progress=False)


def test_a_model_without_linears_is_refused():
    with pytest.raises(ValueError, match="has no linear layers"):
        spectra(nn.Sequential(nn.Conv2d(1, 1, 1)), progress=False)


def _plain_twin(weight: torch.Tensor) -> dict[str, float]:
    """The newer figures from their definitions, by NumPy and loops."""
    s = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    m, n = weight.shape
    energy = s**2 / (s**2).sum()
    x = np.sort(s**2)
    best = (math.inf, 0.0)
    for i in range(len(x) - 1):
        tail = x[i:]
        alpha = 1 + len(tail) / np.log(tail / x[i]).sum()
        distance = np.abs(1 - (tail / x[i]) ** (1 - alpha) - np.arange(len(tail)) / len(tail)).max()
        best = min(best, (distance, alpha))
    edge = noise_level(torch.from_numpy(s), (m, n)) * (m**0.5 + n**0.5)
    return {
        "entropy_rank": math.exp(-(energy * np.log(energy)).sum()),
        "tail_exponent": best[1],
        "tail_distance": best[0],
        "noise_edge": edge,
        "above_noise": int((s > edge).sum()),
        **{f"{ratio:.0%}": energy[: rank_for_ratio(m, n, ratio)].sum() for ratio in (0.1, 0.2, 0.3, 0.4, 0.5)},
    }


@pytest.mark.parametrize("shape", [(90, 70), (70, 130)])
def test_the_newer_figures_equal_their_definitions(shape):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    weight += (
        8 * torch.outer(torch.ones(shape[0]), torch.ones(shape[1])) / sum(shape) ** 0.5
    )  # one value above the noise
    [found] = spectra(tiny_models.of_weights(weight), progress=False)
    twin = _plain_twin(weight)
    given = {name: value for name, value in vars(found).items() if name in twin} | found.kept
    assert given == pytest.approx(twin, rel=1e-5)
    assert found.above_noise >= 1
    assert found.parameters == weight.numel()


def test_small_values_beside_a_large_one_are_as_exact_as_the_rest():
    """Below 1e-8 of the largest value a Gram matrix in float64 has rounding alone."""
    weight = torch.diag(torch.logspace(0, -9, 80, dtype=torch.float64)).float()
    [found] = spectra(tiny_models.of_weights(weight), progress=False)
    assert found.singular_values.double() == pytest.approx(torch.linalg.svdvals(weight.double()), rel=1e-5)


def test_parameters_of_a_structure_are_those_stored():
    model = tiny_models.FAMILIES["llama"]()
    dense = spectra(model, where="q_proj", progress=False)
    tiny_models.low_rank(model, rank=3)
    factored = spectra(model, where="q_proj", progress=False)
    assert [layer.parameters for layer in dense] == [32 * 32] * 2
    assert all(layer.parameters < 32 * 32 for layer in factored)


def _equal(stored: list, loaded: list) -> bool:
    assert [layer.name for layer in stored] == [layer.name for layer in loaded]
    for one, other in zip(stored, loaded, strict=True):
        assert torch.equal(one.singular_values, other.singular_values)
        blank = torch.empty(0)
        assert repr(replace(one, singular_values=blank)) == repr(replace(other, singular_values=blank))
    return bool(stored)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_checkpoint_on_disk_has_the_figures_of_the_loaded_model(family, tmp_path):
    model = tiny_models.FAMILIES[family]()
    path = tiny_checkpoints.write(tmp_path / "model", model, with_tokenizer=False)
    try:
        assert _equal(spectra(path, progress=False), spectra(model, progress=False))
    except LayoutError:
        assert family not in (
            "llama",
            "qwen3",
            "gemma3",
            "phi3",
            "gpt2",
            "mixtral",
        )  # experts themselves are left alone


def test_a_compressed_checkpoint_and_a_choice_of_layers(tmp_path):
    model = tiny_checkpoints.model()
    tiny_models.low_rank(model, rank=3)
    path = tiny_checkpoints.write(tmp_path / "model", model, with_tokenizer=False)
    assert _equal(spectra(str(path), progress=False), spectra(model, progress=False))
    where = ["*.q_proj", "1.mlp.down_proj"]
    assert _equal(spectra(path, where=where, progress=False), spectra(model, where=where, progress=False))


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    dense = tiny_checkpoints.model()
    whole = tmp_path / "whole"
    dense.save_pretrained(whole, max_shard_size=30_000)
    assert len(list(whole.glob("*.safetensors"))) > 2
    assert _equal(spectra(whole, progress=False), spectra(dense, progress=False))
    shutil.copytree(whole, tmp_path / "missing")
    missing = sorted((tmp_path / "missing").glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {missing.name}, which its index lists"):
        spectra(tmp_path / "missing", progress=False)
    single = tiny_checkpoints.write(tmp_path / "nan", dense, with_tokenizer=False) / "model.safetensors"
    tensors = load_file(single)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = math.nan
    save_file(tensors, single, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj has NaN or Inf"):
        spectra(tmp_path / "nan", progress=False)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is an adapter, not a model"):
        spectra(adapter, progress=False)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        spectra(tmp_path / "no" / "such", progress=False)
    with pytest.raises(ValueError, match="memory must be a positive number"):
        spectra(dense, memory=0, progress=False)


def _write_shards(path: Path, layers: int, hidden: int, intermediate: int) -> None:
    """A random Llama in bfloat16, a shard a layer, that is never in memory as a whole."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=64, dtype="bfloat16", architectures=["LlamaForCausalLM"], **sizes)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    config.save_pretrained(path)
    shards: dict[str, str] = {}
    for shard, names in itertools.groupby(shapes, key=lambda name: ".".join(name.split(".")[:3])):
        tensors = {name: torch.randn(shapes[name], dtype=torch.bfloat16) for name in names}
        save_file(tensors, path / f"{shard}.safetensors", metadata={"format": "pt"})
        shards |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


_PEAK = """
import sys
from pathlib import Path
from eckart.analysis import spectra
found = spectra(Path(sys.argv[1]), progress=False)
status = Path("/proc/self/status").read_text()
print(len(found), [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")][0])
"""


def _peak(path) -> tuple[int, float]:
    """Weights, and gigabytes of a process that looks at them."""
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], check=True, capture_output=True, text=True)
    count, peak = done.stdout.splitlines()[-1].split()
    return int(count), int(peak) * 1024 / 1e9


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """0.25 and 1 GB of shards in bfloat16; benchmarks/spectra.py takes 3 GB."""
    peaks = []
    for layers in (4, 16):
        _write_shards(tmp_path / str(layers), layers, hidden=1536, intermediate=4096)
        count, peak = _peak(tmp_path / str(layers))
        assert count == 7 * layers
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 0.15
    assert peaks[1] < 1.2
