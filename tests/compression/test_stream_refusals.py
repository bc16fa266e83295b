from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from eckart.compression import compress_checkpoint
from eckart.compression.svd import SVD
from eckart.linalg import LinalgError
from eckart.models import CheckpointError

DATA = [tiny_models.inputs(tiny_models.FAMILIES["llama"]())]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(family) -> directory of a checkpoint in several shards, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_models.FAMILIES[family]().save_pretrained(made[family], max_shard_size="24KB")
        return made[family]

    return make


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def assert_nothing_left(parent: Path, before: set[str]) -> None:
    assert {path.name for path in parent.iterdir()} == before


def broken(source: Path, target: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint with one bad number."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            content = load_file(file)
            if name in content:
                content[name].view(-1)[0] = value
            save_file(content, target / file.name, metadata={"format": "pt"})
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def assert_refused(error: type[BaseException], message: str, source: Path, parent: Path, *args: Any, **options: Any):
    before = {path.name for path in parent.iterdir()}
    with pytest.raises(error, match=message) as caught:
        compress_checkpoint(source, parent / "out", *args, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert_nothing_left(parent, before)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"],
)
def test_nan_is_named_by_weight(name, source, tmp_path):
    path = broken(source("llama"), tmp_path / "bad", name, float("nan"))
    assert_refused(ValueError, f"{name} has NaN or Inf in it; repair or re-download", path, tmp_path, "svd")


def test_bad_requests_leave_nothing_behind(source, tmp_path):
    llama = source("llama")
    assert_refused(ValueError, "unknown method 'svdd'", llama, tmp_path, "svdd")
    assert_refused(ValueError, "ratio must lie between", llama, tmp_path, "svd", ratio=2)
    assert_refused(ValueError, "svd-llm needs calibration data", llama, tmp_path, "svd-llm")
    assert_refused(ValueError, "fwsvd needs gradients of the whole model; it cannot be streamed", llama, tmp_path,
                   "fwsvd", data=DATA)  # fmt: skip
    for policy, why in (("fisher", "needs gradients of"), ("search", "looks at"), ("block-influence", "looks at")):
        message = f"svd with allocation='{policy}' {why} the whole model.*; it cannot be streamed"
        assert_refused(ValueError, message, llama, tmp_path, "svd", data=DATA, allocation=policy)
    assert_refused(FileNotFoundError, r"no model in .*nowhere: it has no config\.json", tmp_path / "nowhere", tmp_path)
    assert_refused(ValueError, "matches no layer", llama, tmp_path, "svd", where="nothing")


def test_an_incomplete_checkpoint_is_refused(source, tmp_path):
    path = broken(source("llama"), tmp_path / "bad", "", 0)
    victim = sorted(path.glob("*.safetensors"))[1]
    victim.unlink()
    assert_refused(FileNotFoundError, f"lacks {victim.name}, which its index lists", path, tmp_path, "svd")
    for file in path.glob("*.safetensors*"):
        file.unlink()
    assert_refused(FileNotFoundError, "has no safetensors files; streaming needs", path, tmp_path, "svd")


def test_a_compressed_checkpoint_is_refused(source, tmp_path):
    compress_checkpoint(source("llama"), tmp_path / "once", "svd", progress=False)
    message = "the checkpoint is compressed by Eckart already; start from the dense one"
    assert_refused(ValueError, message, tmp_path / "once", tmp_path, "svd")
    config = json.loads((source("llama") / "config.json").read_text())
    quantized = broken(source("llama"), tmp_path / "gptq", "", 0)
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert_refused(ValueError, "the checkpoint is quantized with gptq already", quantized, tmp_path, "svd")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_neox", "vit"])
def test_weights_that_transformers_converts_on_loading_are_refused(family, source, tmp_path):
    """It stores experts one by one and fuses them, and calls some layers by older names in files."""
    message = "has no tensor .*another layout than the model's, so it cannot be streamed; compress it in memory"
    assert_refused(ValueError, message, source(family), tmp_path, "svd", ratio=0.3)


@pytest.mark.parametrize("error", [ValueError, LinalgError])
def test_a_refusal_leaves_nothing_behind_and_an_old_model_as_it_was(error, source, tmp_path):
    class Breaks(SVD):
        def factorize(self, weight: torch.Tensor, statistics: Any, rank: int) -> Any:
            if any(tmp_path.glob(".out*/*.safetensors")):  # the first block is on disk already
                raise error("stop")
            return super().factorize(weight, statistics, rank)

    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error, match="stop"):
        compress_checkpoint(source("llama"), tmp_path / "out", Breaks(), progress=False)
    assert_nothing_left(tmp_path, before)
    compress_checkpoint(source("llama"), tmp_path / "out", "svd", ratio=0.5, progress=False)
    old = tensors(tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists already"):
        compress_checkpoint(source("llama"), tmp_path / "out", "svd", progress=False)
    with pytest.raises(error, match="stop"):
        compress_checkpoint(source("llama"), tmp_path / "out", Breaks(), force=True, progress=False)
    assert_nothing_left(tmp_path, before | {"out"})
    assert all(torch.equal(tensor, old[key]) for key, tensor in tensors(tmp_path / "out").items())
    result = compress_checkpoint(source("llama"), tmp_path / "out", "svd", ratio=0.2, force=True, progress=False)
    assert 0.2 <= result.ratio < 0.25
    assert_nothing_left(tmp_path, before | {"out"})


def test_a_disk_that_refuses_is_named(source, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("eckart.models.stream.save_file", full)
    assert_refused(CheckpointError, "cannot write .*out: No space left on device", source("llama"), tmp_path, "svd")
