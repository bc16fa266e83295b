from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny_models
from eckart.compression import compress, compress_checkpoint
from eckart.models import load, save
from eckart.models.reader import CheckpointReader
from eckart.models.stream import StreamedModel

AUTO = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM", "vit": "AutoModelForImageClassification"}


def tied_llama() -> transformers.LlamaForCausalLM:
    model = tiny_models.FAMILIES["llama"]()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


BUILD = {**tiny_models.FAMILIES, "tied_llama": tied_llama}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(family) -> directory of a checkpoint in several shards, made once."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            path = tmp_path_factory.mktemp(family)
            model = BUILD[family]().to(dtype)
            if model.can_generate():
                model.generation_config.top_k = 17  # something that the model's configuration does not know
                model.generation_config.do_sample = True
            model.save_pretrained(path, max_shard_size="24KB")
            made[family, dtype] = path
        return made[family, dtype]

    return make


def data_for(family: str) -> list[dict[str, torch.Tensor]]:
    model = BUILD[family]()
    return [tiny_models.inputs(model, 3, 14), tiny_models.inputs(model, 2, 9)]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(path.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def assert_same_checkpoint(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key


def in_memory(source: Path, out: Path, *args: Any, **options: Any) -> Any:
    model, tokenizer = load(source)
    result = compress(model, *args, progress=False, **options)
    save(model, out, tokenizer)
    return result


# ---------------------------------------------------------------------------------------------------- equal output


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "svd", {}),
        ("llama", "asvd", {"allocation": "threshold"}),
        ("llama", "svd-llm", {"energy": 0.8}),
        ("llama", "svd-llm", {"update": True, "form": "plain"}),
        ("llama", "pifa", {}),
        ("llama", "pifa", {"allocation": "svd-llm-v2", "where": "*.mlp.*"}),
        ("llama", "svd", {"bytes": 80_000}),
        ("tied_llama", "pifa", {}),
        ("tied_llama", "svd", {"bytes": 70_000}),
        ("gpt2", "pifa", {}),
        ("opt", "pifa", {}),
        ("gemma3", "svd-llm", {}),
        ("phi3", "svd-llm", {}),
        ("bert", "svd-llm", {}),
        ("t5", "svd-llm", {}),
        ("t5", "pifa", {}),
    ],
)
def test_the_checkpoint_is_that_of_the_path_through_memory(family, method, options, source, tmp_path):
    path, data = source(family), data_for(family)
    assert len(list(path.glob("*.safetensors"))) > 1
    options = {"ratio": 0.3, **options} if not {"energy", "bytes"} & options.keys() else options
    expected = in_memory(path, tmp_path / "memory", method, data=data, **options)
    result = compress_checkpoint(path, tmp_path / "stream", method, data=data, progress=False, **options)
    assert_same_checkpoint(tmp_path / "stream", tmp_path / "memory")
    for name in ("config.json", "generation_config.json"):
        if (tmp_path / "memory" / name).exists():
            streamed, whole = (json.loads((tmp_path / way / name).read_text()) for way in ("stream", "memory"))
            assert streamed == whole
    assert result.model is None
    seconds_and_memory = {"seconds": 0, "peak_memory": 0}
    assert {**result.to_dict(), **seconds_and_memory} == {**expected.to_dict(), **seconds_and_memory}

    auto = getattr(transformers, AUTO.get(family, "AutoModelForCausalLM"))
    again, info = auto.from_pretrained(tmp_path / "stream", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    whole = auto.from_pretrained(tmp_path / "memory")
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(whole))
    if whole.get_output_embeddings() is not None:
        tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (again, whole)]
        assert tied[0] == tied[1]


def test_bfloat16(source, tmp_path):
    path, data = source("llama", torch.bfloat16), data_for("llama")
    in_memory(path, tmp_path / "memory", "pifa", ratio=0.3, data=data)
    compress_checkpoint(path, tmp_path / "stream", "pifa", ratio=0.3, data=data, progress=False)
    assert_same_checkpoint(tmp_path / "stream", tmp_path / "memory")
    floats = {tensor.dtype for tensor in tensors(tmp_path / "stream").values() if tensor.is_floating_point()}
    assert floats == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_the_dtype_of_the_configuration_or_else_of_the_tensors(dtype, source, tmp_path):
    """As when transformers loads it: what config.json says, whatever the tensors are."""
    dense, config = tmp_path / "dense", json.loads((source("llama") / "config.json").read_text())
    dense.mkdir()
    config["dtype"] = dtype
    (dense / "config.json").write_text(json.dumps(config))
    stored = torch.float32 if dtype else torch.float16
    save_file({key: tensor.to(stored) for key, tensor in tensors(source("llama")).items()}, dense / "model.safetensors")
    compress_checkpoint(dense, tmp_path / "stream", "svd", ratio=0.3, progress=False)
    floats = {tensor.dtype for tensor in tensors(tmp_path / "stream").values() if tensor.is_floating_point()}
    assert floats == {torch.bfloat16 if dtype else torch.float16}
    in_memory(dense, tmp_path / "memory", "svd", ratio=0.3)
    assert_same_checkpoint(tmp_path / "stream", tmp_path / "memory")


@pytest.mark.parametrize("prefix", ["with", "without"])
def test_gpt2_with_and_without_the_prefix_of_the_base_model(prefix, source, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text((source("gpt2") / "config.json").read_text())
    stored = tensors(source("gpt2"))
    if prefix == "without":
        stored = {key.removeprefix("transformer."): tensor for key, tensor in stored.items()}
    assert any(key.startswith("transformer.") for key in stored) == (prefix == "with")
    save_file(stored, dense / "model.safetensors", metadata={"format": "pt"})
    compress_checkpoint(dense, tmp_path / "stream", "pifa", ratio=0.3, data=data_for("gpt2"), progress=False)
    in_memory(dense, tmp_path / "memory", "pifa", ratio=0.3, data=data_for("gpt2"))
    assert_same_checkpoint(tmp_path / "stream", tmp_path / "memory")


def test_a_tokenizer_is_saved_beside_it_and_its_text_is_the_default(source, tmp_path):
    class Tokenizer:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [3 + ord(letter) % 100 for letter in text[:40]] * 26}

        def save_pretrained(self, path: Path) -> None:
            (path / "tokenizer.json").write_text("{}")

    # 26 times 40 tokens make two windows of 512.
    path = source("llama")
    result = compress_checkpoint(path, tmp_path / "out", "svd-llm", ratio=0.3, tokenizer=Tokenizer(), progress=False)
    assert len(result.layers) == 14
    assert (tmp_path / "out" / "tokenizer.json").exists()


# ----------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("method", ["svd", "svd-llm", "pifa"])
def test_one_block_is_in_memory_at_a_time(method, source, tmp_path, monkeypatch):
    gone: list[weakref.ref] = []
    sizes: list[int] = []

    class Watched(StreamedModel):
        @contextlib.contextmanager
        def visiting(self, index: int, *, changed: bool) -> Iterator[None]:
            gc.collect()
            assert not any(reference() for reference in gone), "weights of earlier blocks are still there"
            with super().visiting(index, changed=changed):
                here = [p for block in self.blocks for p in block.module.parameters() if p.device.type != "meta"]
                sizes.append(sum(p.numel() for p in here))
                gone.extend(weakref.ref(p.untyped_storage()) for p in here)
                del here
                yield

    monkeypatch.setattr("eckart.compression.stream.StreamedModel", Watched)
    options = {"energy": 0.6} if method == "svd-llm" else {}
    compress_checkpoint(source("llama"), tmp_path / "out", method, data=data_for("llama"), progress=False, **options)
    block = sum(p.numel() for p in BUILD["llama"]().model.layers[0].parameters())
    assert sizes == [block] * tiny_models.LAYERS * (2 if method == "svd-llm" else 1)


def test_the_head_is_read_only_to_be_written(source):
    streamed = StreamedModel(source("llama"))
    assert streamed.model.lm_head.weight.device.type == "meta"
    assert streamed.model.model.embed_tokens.weight.device.type == "cpu"
    assert all(p.device.type == "meta" for block in streamed.blocks for p in block.module.parameters())
    tied = StreamedModel(source("tied_llama"))
    assert tied.model.lm_head.weight is tied.model.model.embed_tokens.weight


def test_the_reader_reads_each_tensor_from_its_shard(source):
    path = source("llama")
    reader = CheckpointReader(path)
    for key, tensor in tensors(path).items():
        assert torch.equal(reader.read(key), tensor)
    assert reader.dtype() == torch.float32
    with safe_open(next(iter(reader.files.values())), framework="pt") as file:
        assert file.keys()
