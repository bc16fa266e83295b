from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import tiny_models
from eckart.models import CheckpointError, load, mark, save
from eckart.structures import Dense, LowRank, Sum

AUTO = {
    "bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}


@pytest.fixture
def tokenizer():
    words = {f"w{index}": index for index in range(tiny_models.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2")


def _entry(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("form", ["plain", "pivoted"])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_plain_from_pretrained_gives_the_same_model_back(family, form, tmp_path):
    model = tiny_models.FAMILIES[family]()
    names = tiny_models.low_rank(model, form, rank=6)
    path = save(model, tmp_path / "model")
    entry = _entry(path)
    assert (entry["quant_method"], entry["version"], set(entry["modules"])) == ("eckart", 1, set(names))

    auto = getattr(transformers, AUTO.get(family, "AutoModelForCausalLM"))
    again, info = auto.from_pretrained(path, output_loading_info=True)
    assert type(again) is type(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key
    for name in names:
        assert again.get_submodule(name).spec() == model.get_submodule(name).spec()
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    assert not any(module.training for module in again.modules())


@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name != "vit"])
def test_tied_weights_are_tied_after_loading(family, tmp_path):
    model = tiny_models.FAMILIES[family]()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tiny_models.low_rank(model, rank=6)
    again, _ = load(save(model, tmp_path / "model"))
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_some_families_have_a_tied_head_and_some_do_not():
    tied = {
        name: model.get_output_embeddings().weight is model.get_input_embeddings().weight
        for name in ("llama", "gpt2", "opt", "bert")
        if (model := tiny_models.FAMILIES[name]())
    }
    assert tied == {"llama": False, "gpt2": True, "opt": True, "bert": True}


def test_every_kind_of_structure_and_the_output_head(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    attention = model.model.layers[0].self_attn
    attention.q_proj = Sum(
        [Dense.from_weight(attention.q_proj.weight), LowRank.from_factors(torch.ones(32, 1), torch.ones(1, 32))]
    )
    attention.o_proj = Dense.from_weight(attention.o_proj.weight, bias=torch.arange(32.0))
    model.lm_head = LowRank.from_factors(torch.randn(128, 4), torch.randn(4, 32))
    again, _ = load(save(model, tmp_path / "model"))
    assert [type(m) for m in (again.model.layers[0].self_attn.q_proj, again.lm_head)] == [Sum, LowRank]
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, "auto"], ids=str)
def test_dtype_and_device_map(dtype, tmp_path):
    model = tiny_models.FAMILIES["llama"]().to(torch.bfloat16)
    tiny_models.low_rank(model, rank=6)
    path = save(model, tmp_path / "model")
    wanted = torch.bfloat16 if dtype == "auto" else dtype
    for again in (
        load(path, dtype=dtype, device="cpu")[0],
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map="cpu"),
    ):
        assert {p.dtype for p in again.parameters()} == {wanted}
        assert again.model.layers[0].mlp.up_proj.order.dtype == torch.int32
        expected = {name: p.to(wanted) for name, p in model.named_parameters()}
        assert all(torch.equal(p, expected[name]) for name, p in again.named_parameters())
        assert torch.isfinite(tiny_models.logits(again)).all()


def test_loaded_models_can_be_cast_trained_and_generate(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)
    model, _ = load(save(model, tmp_path / "model"))
    batch = tiny_models.inputs(model)
    generated = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert generated.shape == (2, 16)
    structure = model.model.layers[0].mlp.up_proj
    loss = model.train()(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in structure.parameters())
    assert model.half().dtype == torch.float16
    assert model.float().dtype == torch.float32


def test_a_loaded_model_offloaded_to_disk_gives_the_same_logits(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)
    path = save(model, tmp_path / "model")
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    again = transformers.AutoModelForCausalLM.from_pretrained(
        path, device_map=places, offload_folder=tmp_path / "offload"
    )
    batch = tiny_models.inputs(model)
    torch.testing.assert_close(again(**batch).logits, tiny_models.logits(model), rtol=0, atol=0)


def test_save_pretrained_of_transformers_is_right_too(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)
    mark(model, ["svd"])
    model.save_pretrained(tmp_path / "marked")  # never saved by us
    again, _ = load(tmp_path / "marked")
    again.model.layers[0].mlp.up_proj = Dense.from_weight(model.model.layers[0].mlp.up_proj.dense().detach())
    again.save_pretrained(tmp_path / "changed")  # changed after it was loaded, and not marked again
    last, _ = load(tmp_path / "changed")
    assert _entry(tmp_path / "changed")["modules"]["model.layers.0.mlp.up_proj"]["type"] == "dense"
    assert _entry(tmp_path / "changed")["history"] == ["svd"]
    assert torch.equal(tiny_models.logits(last), tiny_models.logits(again))


def test_generation_config_tokenizer_history_and_shards(tmp_path, tokenizer):
    model = tiny_models.FAMILIES["llama"]()
    model.generation_config.max_new_tokens = 7
    tiny_models.low_rank(model, rank=6)
    path = save(
        model, tmp_path / "model", tokenizer, history=[{"verb": "compress", "ratio": 0.2}], max_shard_size="40KB"
    )
    assert len(list(path.glob("model-*.safetensors"))) > 1
    again, found = load(path)
    assert again.generation_config.max_new_tokens == 7
    assert found("w5 w9")["input_ids"] == [5, 9]
    assert torch.equal(tiny_models.logits(again), tiny_models.logits(model))
    path = save(again, path, found, history=["again"], force=True)
    assert _entry(path)["history"] == [{"verb": "compress", "ratio": 0.2}, "again"]
    assert len(list(path.glob("model*.safetensors"))) == 1
    assert load(path)[1] is not None


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_without_tokenizer_files_there_is_none(family, tmp_path):
    path = save(tiny_models.FAMILIES[family](), tmp_path / "model")
    model, tokenizer = load(path)
    assert tokenizer is None
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert torch.equal(tiny_models.logits(model), tiny_models.logits(tiny_models.FAMILIES[family]()))


def test_the_inner_model_and_the_whole_one_read_each_others_checkpoints(tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)
    model.lm_head = LowRank.from_factors(torch.randn(128, 4), torch.randn(4, 32))
    path = save(model, tmp_path / "whole")
    inner = transformers.AutoModel.from_pretrained(path)
    batch = tiny_models.inputs(model)
    expected = model.model(**batch).last_hidden_state
    assert torch.equal(inner(**batch).last_hidden_state, expected)
    inner_path = save(inner, tmp_path / "inner")
    assert all(name.startswith("layers.") for name in _entry(inner_path)["modules"])
    whole = transformers.AutoModelForCausalLM.from_pretrained(inner_path)
    assert torch.equal(whole.model(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_an_interrupted_save_leaves_nothing(error, tmp_path, monkeypatch):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)

    def save_pretrained(self, directory, **kwargs):
        (Path(directory) / "config.json").write_text("{")
        raise error

    monkeypatch.setattr(type(model), "save_pretrained", save_pretrained)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt):
        save(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


_FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
import tiny_models
from eckart.models import CheckpointError, save
model = tiny_models.FAMILIES["llama"]()
tiny_models.low_rank(model, rank=6)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save(model, {path!r})
except CheckpointError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_is_one_clear_line_and_leaves_nothing(tmp_path):
    tests = str(Path(tiny_models.__file__).parent)
    code = _FULL_DISK.format(tests=tests, path=str(tmp_path / "model"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"cannot write {tmp_path / 'model'}: ")
    assert len(run.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_path_is_refused_before_any_work(tmp_path, monkeypatch):
    model = tiny_models.FAMILIES["llama"]()
    path = save(model, tmp_path / "model")
    monkeypatch.setattr(type(model), "save_pretrained", lambda *args, **kwargs: pytest.fail("it saved"))
    with pytest.raises(FileExistsError, match="exists already"):
        save(model, path)


def test_only_transformers_models_are_saved(tmp_path):
    with pytest.raises(ValueError, match="cannot save a Linear: it is not a transformers model"):
        save(torch.nn.Linear(2, 2), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "the path does not exist"),
        (lambda path: path.mkdir(), "it has no config.json"),
        (lambda path: path.write_text(""), "is a file; give the directory"),
    ],
    ids=["missing", "empty", "file"],
)
def test_a_missing_model_is_one_clear_line(make, message, tmp_path):
    make(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load(tmp_path / "model")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("Name or service not known.\nTry again."), r"did not give it \(Name or service not known\)$"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "does not have it .*hf auth login"),
        (GatedRepoError.__new__(GatedRepoError), "is gated: .*hf auth login"),
    ],
    ids=["network", "unknown", "gated"],
)
def test_what_the_hub_refuses_is_one_clear_line(error, message, monkeypatch):
    def snapshot_download(name, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=message) as caught:
        load("some/name")
    assert len(str(caught.value).splitlines()) == 1


def _damage(path: Path, how: str) -> None:
    weights = path / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "cut off":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "tensor missing":
        state = load_file(weights)
        del state["model.layers.1.self_attn.k_proj.kept_transposed"]
        save_file(state, weights, metadata={"format": "pt"})
    else:
        config = json.loads((path / "config.json").read_text())
        entry = config["quantization_config"]
        if how == "newer":
            entry["version"] = 2
        elif how == "unknown layer":
            entry["modules"]["model.layers.7.self_attn.q_proj"] = {"type": "dense"}
        elif how == "unknown structure":
            entry["modules"]["model.layers.0.self_attn.q_proj"]["type"] = "wavelet"
        elif how == "model type":
            config["model_type"] = "nothing"
        (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no weights", "cannot read the model in .*: "),
        ("cut off", "the weights in .* are damaged: "),
        ("tensor missing", "the checkpoint has no tensor model.layers.1.self_attn.k_proj.kept_transposed"),
        ("newer", "format 2 and this Eckart reads up to 1: pip install --upgrade eckart"),
        ("unknown layer", "describes the layer model.layers.7.self_attn.q_proj, which LlamaForCausalLM does not have"),
        ("unknown structure", "unknown structure type 'wavelet'"),
        ("model type", "cannot read the model in .*: .*nothing"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(how, message, tmp_path):
    model = tiny_models.FAMILIES["llama"]()
    tiny_models.low_rank(model, rank=6)
    path = save(model, tmp_path / "model")
    _damage(path, how)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert len(str(caught.value).splitlines()) == 1
