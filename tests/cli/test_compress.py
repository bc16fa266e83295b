"""``eckart compress`` from end to end, and every way in which a request can be bad."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import eckart
import tiny_checkpoints
from eckart.cli._options import parse_bytes, parse_setting
from eckart.cli.main import main
from eckart.compression.recover import recover
from eckart.compression.svd import SVD
from eckart.models import load, text_batches

QUICK = ("--samples", "4", "--length", "32")


def _state(path: Path) -> dict[str, torch.Tensor]:
    return {
        key: tensor for file in path.glob("*.safetensors") for key, tensor in safetensors.torch.load_file(file).items()
    }


def _modules(path: Path) -> dict[str, dict]:
    return json.loads((path / "config.json").read_text())["quantization_config"]["modules"]


# --- what it does


def test_the_result_is_that_of_the_library_and_loads_with_plain_transformers(tiny, tmp_path, run):
    out = tmp_path / "small"
    assert run("compress", tiny, *QUICK, "--ratio", 0.3, "--method", "svd-llm", "--out", out)[0] == 0
    model, tokenizer = load(tiny)
    data = text_batches(tokenizer, samples=4, length=32)
    eckart.compress(model, "svd-llm", ratio=0.3, data=data, progress=False)
    ids = data[0]["input_ids"][:1]
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected.pt")
    # another process, which knows nothing but this
    script = f"""
import eckart, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(out)!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
assert torch.equal(model(expected["ids"]).logits, expected["logits"])
tokenizer = AutoTokenizer.from_pretrained({str(out)!r})
answer = model.generate(**tokenizer("import os", return_tensors="pt"), max_new_tokens=5, min_new_tokens=5)
print(answer.shape[1] - len(tokenizer("import os")["input_ids"]))
"""
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout == "5\n"


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "svd"),
        ("--method", "svd-llm", "--form", "plain"),
        ("--method", "svd-llm", "--allocation", "svd-llm-v2"),
        ("--method", "pifa"),
    ],
    ids=" ".join,
)
def test_streaming_gives_the_same_model(tiny, tmp_path, run, options):
    common = ("compress", tiny, *QUICK, "--ratio", 0.3, *options, "--no-eval")
    assert run(*common, "--out", tmp_path / "memory")[0] == 0
    assert run(*common, "--stream", "--out", tmp_path / "stream")[0] == 0
    one, two = (load(tmp_path / name) for name in ("memory", "stream"))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(one[0](ids).logits, two[0](ids).logits)
    assert _modules(tmp_path / "memory") == _modules(tmp_path / "stream")
    assert one[1]("import os") == two[1]("import os")


def test_before_and_after_are_shown(tiny, tmp_path, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run("compress", tiny, *QUICK, "--ratio", 0.3, "--out", tmp_path / "small")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines()[:-1])) <= 100  # the last one holds the path
    rows = dict(re.findall(r"^ *(\D+?)  +(.+?) *$", out, re.MULTILINE))
    before, after, change = rows["parameters"].split()
    assert (before, change) == ("31,392", f"{int(after.replace(',', '')) / 31392 - 1:+.1%}")
    assert rows["of the selected layers"].startswith("18,432")
    for name in ("bytes in memory", "bytes on disk"):
        assert rows[name].count("kB") == 2
    assert {"perplexity, held-out text", "ms per generated token", "tokens per second, prompt"} <= rows.keys()
    assert "14 layers: 14 pivoted" in out
    assert "largest errors, relative to the output:" in out
    errors = [float(line.split()[0]) for line in out.splitlines() if line.startswith("0.")]
    assert len(errors) >= 5
    assert errors[:5] == sorted(errors[:5], reverse=True)
    assert "peak memory" in out
    assert f"wrote {tmp_path / 'small'}" in out


def test_json_holds_the_figures_that_the_files_have(tiny, tmp_path, run_json):
    out = tmp_path / "small"
    found = run_json("compress", tiny, *QUICK, "--ratio", 0.3, "--out", out)
    stored = _state(out)
    numbers = sum(tensor.numel() for tensor in stored.values() if tensor.is_floating_point())
    assert found["parameters"] == [31392, numbers]
    assert found["bytes_on_disk"] == [
        sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (tiny, out)
    ]
    assert found["bytes"][1] == sum(tensor.nbytes for tensor in stored.values())
    assert found["method"] == "pifa"
    assert found["settings"]["budget"] == {"ratio": 0.3}
    assert found["ratio"] >= 0.3
    assert len(found["layers"]) == 14
    for pair in ("perplexity", "milliseconds_per_token", "tokens_per_second"):
        assert all(value > 0 for value in found[pair]), pair
    history = json.loads((out / "config.json").read_text())["quantization_config"]["history"]
    assert [entry["method"] for entry in history] == ["pifa"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_on_stderr_alone(tiny, tmp_path, monkeypatch, capsys):
    """A terminal on stderr gets bars; what is piped is JSON and nothing else."""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    args = ["compress", str(tiny), *QUICK, "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert main([*args, "--out", str(tmp_path / "a")]) == 0
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "a")
    shown = terminal.getvalue()
    for stage in ("loading", "perplexity", "ms per token", "compress", "left", "saving"):
        assert stage in shown
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", quiet := Terminal())
        assert main([*args, "--quiet", "--out", str(tmp_path / "b")]) == 0
    assert quiet.getvalue() == ""


def test_bytes_and_energy_and_options_of_the_method(tiny, tmp_path, run_json):
    def compress(name, *options):
        return run_json("compress", tiny, *QUICK, "--no-eval", "--out", tmp_path / name, *options)

    before = compress("a", "--method", "svd", "--bytes", "110kB")
    assert before["bytes"][1] <= 110_000
    assert before["perplexity"] is None
    kept = compress("b", "--method", "svd", "--energy", 0.8)
    assert kept["settings"]["budget"] == {"energy": 0.8}
    assert all(layer["error"] <= 0.2**0.5 + 1e-3 for layer in kept["layers"])
    options = compress("c", "--method", "svd-llm", "--set", "whitening=cholesky", "--set", "update=true")
    assert options["settings"]["options"] == {"whitening": "cholesky", "update": True}
    chosen = compress("d", "--method", "svd", "--ratio", 0.4, "--where", "*.up_proj", "--where", "1.mlp.down_proj")
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    assert [layer["name"] for layer in chosen["layers"]] == names
    assert set(_modules(tmp_path / "d")) == set(names)


def test_auto_tries_several_and_keeps_the_best(tiny, tmp_path, run, run_json):
    out = tmp_path / "small"
    found = run_json("compress", tiny, *QUICK, "--ratio", 0.3, "--method", "auto", "--out", out)
    tried = [trial["perplexity"] for trial in found["tried"]["trials"] if trial["perplexity"] is not None]
    assert len(tried) > 3
    assert tried == sorted(tried)
    best = found["tried"]["trials"][0]
    assert (found["method"], found["settings"]["allocation"]) == (best["method"], best["allocation"])
    code, shown, _ = run("compress", tiny, *QUICK, "--ratio", 0.3, "--method", "auto", "--out", out, "--force")
    assert code == 0
    assert "tried" in shown
    assert "(dense)" in shown


@pytest.mark.parametrize("train", ["factors", "sequential"])
def test_recovery_trains_what_was_compressed(tiny, tmp_path, run_json, train):
    options = ("compress", tiny, *QUICK, "--ratio", 0.3, "--method", "svd", "--no-eval")
    run_json(*options, "--out", tmp_path / "as-it-is")
    found = run_json(*options, "--recover", 4, "--recover-with", train, "--out", tmp_path / "small")
    assert found["recovered"]["steps"] == 4
    before, after = _state(tmp_path / "as-it-is"), _state(tmp_path / "small")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("embed_tokens" in name or "lm_head" in name for name in changed)


@pytest.mark.parametrize("train", ["factors", "lora"])
def test_recovery_from_the_original_learns_its_predictions(tiny, tmp_path, run_json, train):
    """The losses of every step are those of the same by hand, with the model as it was for a teacher."""
    options = ("--ratio", 0.3, "--method", "svd", "--no-eval", "--recover", 4, "--recover-with", train)
    found = run_json("compress", tiny, *QUICK, *options, "--recover-from", "original", "--out", tmp_path / "small")
    (model, tokenizer), (teacher, _) = load(tiny), load(tiny)
    data = text_batches(tokenizer, samples=4, length=32)
    eckart.compress(model, "svd", ratio=0.3, progress=False)
    if train == "lora":
        model = eckart.adapt(model, "lora", 16, progress=False, task_type="CAUSAL_LM")
    what = "factors" if train == "factors" else "adapter"
    done = recover(model, data, 4, train=what, teacher=teacher, progress=False)
    assert found["recovered"]["history"] == pytest.approx(done.history, rel=1e-5)
    assert found["recovered"]["loss_after"] == pytest.approx(done.loss_after, rel=1e-5)


@pytest.mark.parametrize(("method", "compressor"), [("lora", "svd"), ("pissa", "modegpt"), ("corda", "svd-llm")])
def test_recovery_by_an_adapter_saves_it_beside_the_model(tiny, tmp_path, run_json, method, compressor):
    options = ("compress", tiny, *QUICK, "--ratio", 0.3, "--method", compressor, "--recover-rate", 1e-2)
    as_it_is = run_json(*options, "--no-eval", "--out", tmp_path / "as-it-is")
    out = tmp_path / "small"
    found = run_json(*options, "--recover", 8, "--recover-with", method, "--recover-rank", 4, "--out", out)
    # The model is the one without recovery, to the last bit.
    before, after = _state(tmp_path / "as-it-is"), _state(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    history = found["recovered"]["history"]
    assert history[-1] < history[0]
    assert found["recovered"]["loss_after"] != found["recovered"]["loss_before"]
    stored = safetensors.torch.load_file(out / "adapter" / "adapter_model.safetensors")
    beside = found["adapter"]
    assert (beside["method"], beside["rank"], beside["path"]) == (method, 4, str(out / "adapter"))
    size = (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert beside["bytes"] == size > sum(tensor.nbytes for tensor in stored.values())
    assert found["bytes_on_disk"][1] == as_it_is["bytes_on_disk"][1] + size
    assert found["parameters"][1] == as_it_is["parameters"][1] + beside["parameters"]
    assert found["bytes"][1] == as_it_is["bytes"][1] + sum(tensor.nbytes for tensor in stored.values())
    assert found["selected_parameters"] == as_it_is["selected_parameters"]


def test_model_and_adapter_load_in_another_process_with_plain_transformers_and_peft(tiny, tmp_path, run):
    out = tmp_path / "small"
    options = ("--ratio", 0.3, "--method", "svd", "--recover", 6, "--recover-with", "lora", "--recover-rate", 1e-2)
    code, shown, err = run("compress", tiny, *QUICK, *options, "--out", out)
    assert (code, err) == (0, "")
    losses = r"held-out loss \d\.\d{3} to \d\.\d{3} nats a token"
    assert re.search(rf"^recovery: 6 steps, \d+ s, {losses}$", shown, re.MULTILINE)
    sizes = r"[\d,]+ parameters, [\d.]+ kB, counted above"
    assert re.search(rf"^adapter: lora of rank 16, {sizes}, in {re.escape(str(out))}/adapter$", shown, re.MULTILINE)
    (line,) = re.findall(r"to load it: (PeftModel.*), after import eckart$", shown, re.MULTILINE)
    # The same by hand: compress, adapt, train.
    model, tokenizer = load(tiny)
    data = text_batches(tokenizer, samples=4, length=32)
    eckart.compress(model, "svd", ratio=0.3, progress=False)
    adapted = eckart.adapt(model, "lora", 16, progress=False, task_type="CAUSAL_LM")
    recover(adapted, data, 6, train="adapter", learning_rate=1e-2, progress=False)
    ids = data[0]["input_ids"][:1]
    torch.save({"ids": ids, "logits": adapted.eval()(ids).logits.detach()}, tmp_path / "expected.pt")
    script = f"""
import eckart, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r})
expected = torch.load({str(tmp_path / "expected.pt")!r})
alone = model(expected["ids"]).logits
both = {line}
assert torch.equal(both(expected["ids"]).logits, expected["logits"])
assert not torch.allclose(alone, expected["logits"], atol=1e-3)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_recovery_saved_is_evaluated_and_generated_with(tiny, tmp_path, run, run_json, refused):
    out = tmp_path / "small"
    options = ("--ratio", 0.3, "--method", "svd", "--recover", 6, "--recover-with", "lora", "--recover-rate", 1e-2)
    found = run_json("compress", tiny, *QUICK, *options, "--out", out)
    window = ("--length", 32, "--max-tokens", 256, "--batch-size", 4)
    alone, both = (run_json("eval", out, *window, *more) for more in ((), ("--adapter", out / "adapter")))
    assert both["perplexity"] == pytest.approx(found["perplexity"][1], rel=1e-6)
    assert alone["perplexity"] != pytest.approx(both["perplexity"], rel=1e-3)
    assert both["parameters"] == found["parameters"][1] > alone["parameters"]
    code, text, _ = run("generate", out, "import os", "--max-tokens", 4, "--adapter", out / "adapter", "--json")
    assert code == 0
    assert json.loads(text)["tokens"] >= 1
    refused("generate", out, "x", "--adapter", tiny, message=f"no adapter in {tiny}: it has no adapter_config.json")
    refused("eval", tiny, "--adapter", out / "adapter", message="was made for")


def test_an_adapter_that_cannot_be_put_on_leaves_nothing_behind(tiny, tmp_path, refused):
    """Its rank is larger than the smallest side of a matrix, which is known once the model is there."""
    out = tmp_path / "small"
    options = ("--method", "svd", "--recover", 2, "--recover-with", "lora", "--recover-rank", 40)
    refused("compress", tiny, *QUICK, *options, "--out", out, message="lora cannot adapt model.layers.0.self_attn")
    assert not out.exists()


def test_a_method_that_changes_widths(tiny, tmp_path, run_json):
    out = tmp_path / "small"
    found = run_json("compress", tiny, *QUICK, "--ratio", 0.3, "--method", "modegpt", "--out", out)
    assert found["settings"]["allocation"] == "block-influence"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["geometry"]
    model, tokenizer = load(out)
    assert torch.isfinite(model(**tokenizer("import os", return_tensors="pt")).logits).all()


def test_own_calibration_text(tiny, tmp_path, run_json):
    text = tmp_path / "text.txt"
    text.write_text("A text of one's own. " * 200)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"body": "A text of one's own. " * 20}) for _ in range(10)))
    common = ("compress", tiny, *QUICK, "--method", "svd-llm", "--no-eval")
    run_json(*common, "--data", text, "--out", tmp_path / "a")
    run_json(*common, "--data", rows, "--field", "body", "--out", tmp_path / "b")
    run_json(*common, "--out", tmp_path / "c")
    one, two, default = (_state(tmp_path / name) for name in "abc")
    key = "model.layers.0.mlp.up_proj.kept_transposed"
    assert not torch.equal(one[key], default[key])
    assert not torch.equal(two[key], default[key])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert", "BertForMaskedLM is no causal language model"),
        ("t5", "T5ForConditionalGeneration is no causal language model"),
    ],
)
def test_a_model_without_perplexity_is_compressed_and_says_so(name, reason, tmp_path, run):
    made = tiny_checkpoints.family(name, vocab_size=tiny_checkpoints.VOCABULARY)
    source = tiny_checkpoints.write(tmp_path / "dense", made)
    code, out, err = run("compress", source, *QUICK, "--ratio", 0.3, "--method", "svd-llm", "--out", tmp_path / "small")
    assert code == 0, err
    assert f"perplexity and speed not measured: {reason}" in out
    assert load(tmp_path / "small")[0].num_parameters() < made.num_parameters()


def test_an_image_model_needs_a_method_without_text(tmp_path, run_json, refused):
    source = tiny_checkpoints.write(tmp_path / "dense", tiny_checkpoints.family("vit"), with_tokenizer=False)
    refused("compress", source, "--out", tmp_path / "small", message="use --method svd, which needs no text")
    assert run_json("compress", source, "--method", "svd", "--out", tmp_path / "small")["ratio"] >= 0.2


def test_the_window_follows_the_model(tiny, tmp_path, run_json, refused):
    """The context of the tiny model is shorter than the default window."""
    assert run_json("compress", tiny, "--samples", 1, "--out", tmp_path / "small")["perplexity"]
    too_long = ("--length", tiny_checkpoints.CONTEXT + 1)
    refused("compress", tiny, *too_long, "--out", tmp_path / "x", message="longer than the model's context of 256")


# --- what it reports


@pytest.mark.parametrize("json_too", [False, True])
def test_a_rank_that_does_not_pay_is_left_dense_and_reported_once(tiny, tmp_path, run, json_too):
    # plain factors of a 16 x 32 matrix save nothing from rank 11 on, those of a 32 x 64 matrix from rank 22 on
    args = ("--rank", 12, "--form", "plain", "--method", "svd", "--no-eval", *(["--json"] if json_too else []))
    code, out, err = run("compress", tiny, *args, "--out", tmp_path / "small")
    assert code == 0
    message = (
        "model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj, model.layers.1.self_attn.k_proj "
        "and 1 more stay dense: the chosen rank would not make them smaller"
    )
    assert err == f"eckart: warning: {message}\n"
    if json_too:
        assert json.loads(out)["warnings"] == [message]
    else:
        assert "14 layers: 10 plain, 4 dense" in out
        assert "dense: the" not in out
    assert not any(name.endswith(("k_proj", "v_proj")) for name in _modules(tmp_path / "small"))


def test_layers_left_alone_are_listed(tmp_path, run):
    made = tiny_checkpoints.family("mixtral", vocab_size=tiny_checkpoints.VOCABULARY)
    source = tiny_checkpoints.write(tmp_path / "dense", made)
    code, out, err = run("compress", source, "--method", "svd", "--no-eval", "--out", tmp_path / "small")
    assert code == 0, err
    assert "left alone: model.layers.0.mlp.experts.gate_up_proj: 3-D parameter" in out


# --- bad requests: one line, exit code 1, and nothing on disk


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "0"), "ratio must lie between 0 and 1"),
        (("--ratio", "1"), "ratio must lie between 0 and 1"),
        (("--ratio", "-0.2"), "ratio must lie between 0 and 1"),
        (("--ratio", "20"), "ratio must lie between 0 and 1"),
        (("--ratio", "nan"), "ratio must be a finite number"),
        (("--ratio", "0.999"), "use a ratio of at most"),
        (("--energy", "1.5"), "energy must lie between 0 and 1"),
        (("--rank", "0"), "rank must be a whole number of at least 1"),
        (("--bytes", "some"), "'some' is no size; write 200MB"),
        (("--bytes", "1kB"), "1,000 bytes cannot be reached"),
        (("--bytes", "1GB"), "1,000,000,000 bytes cannot be reached"),
        (("--ratio", "0.2", "--rank", "4"), "give one budget, not ratio and rank"),
        (("--method", "svdllm"), "unknown method 'svdllm'; did you mean svd-llm"),
        (
            ("--method", "cycleqd"),
            "cycleqd (merging, planned) cannot compress a model; methods that can: afm-ctr, asvd",
        ),
        (("--set", "mix=2"), "mix must lie in [0, 1], not 2"),
        (("--set", "mix=high"), "--set mix=high is no float"),
        (("--set", "mixture=1"), "pifa has no option mixture; it has: mix, ridge"),
        (("--set", "mix"), "--set 'mix' is not name=value"),
        (
            ("--allocation", "fair"),
            "--allocation must be one of uniform, threshold, svd-llm-v2, welore, fisher, block-influence, lorap, "
            "search, not 'fair'",
        ),
        (("--form", "dense"), "--form must be one of plain, pivoted, not 'dense'"),
        (("--dtype", "int8"), "--dtype must be one of auto, float32, bfloat16, float16, not 'int8'"),
        (("--device", "abacus"), "--device abacus is of no use here"),
        (("--where", "*.q_prj"), "where='*.q_prj' matches no layer; nearest: model.layers."),
        (("--stream", "--dtype", "float32"), "leave out --dtype and --device"),
        (("--stream", "--method", "fwsvd"), "it cannot be streamed"),
        (("--resume",), "--resume and --engine ray work block by block: add --stream"),
        (("--engine", "ray"), "--resume and --engine ray work block by block: add --stream"),
        (("--engine", "spark"), "--engine must be one of local, ray, not 'spark'"),
        (("--engine", "ray", "--stream"), "pifa fits each layer to what became of those before it; use --engine local"),
        (
            ("--engine", "ray", "--stream", "--method", "lorap"),
            "lorap does not work weight by weight; use --engine local",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_bad_option(tiny, tmp_path, refused, options, message):
    refused("compress", tiny, "--no-eval", *QUICK, *options, "--out", tmp_path / "small", message=message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "auto", "--rank", 3), "auto chooses method and allocation itself under a ratio"),
        (("--method", "auto", "--allocation", "welore"), "auto chooses method and allocation itself under a ratio"),
        (("--method", "auto", "--stream"), "auto and --recover need the whole model"),
        (("--recover", 2, "--stream"), "auto and --recover need the whole model"),
        (
            ("--recover", 2, "--recover-with", "luck"),
            "--recover-with must be factors, sequential or the name of an adapter: unknown method 'luck'",
        ),
        (("--recover", 2, "--recover-from", "luck"), "--recover-from must be one of text, original"),
        (("--recover", 2, "--recover-with", "svd"), "'svd' belongs to compression, not to adapters"),
        (("--recover", 2, "--recover-with", "bilora"), "bilora orders its training data; compress first"),
        (("--recover", 2, "--recover-rank", 4), "--recover-rank is that of an adapter; name one with --recover-with"),
    ],
)
def test_auto_and_recovery_with_what_they_exclude(tiny, tmp_path, refused, options, message):
    out = tmp_path / "small"
    refused("compress", tiny, *options, "--out", out, message=message)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Missing option '--out'"),
        (("--out", "x", "--ratio", "much"), "--ratio"),
        (("--out", "x", "--samples", "0"), "--samples"),
        (("--out", "x", "--ration", "0.2"), "No such option: --ration"),
    ],
)
def test_wrong_usage_is_2(tiny, refused, options, message):
    refused("compress", tiny, *options, message=message, code=2)


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_a_missing_model(tmp_path, refused, stream, monkeypatch):
    out = ("--out", tmp_path / "small", *stream)
    missing = tmp_path / "missing"
    refused("compress", missing, *out, message=f"no model at {missing}: the path does not exist")
    (tmp_path / "empty").mkdir()
    refused("compress", tmp_path / "empty", *out, message="it has no config.json")
    (tmp_path / "file").touch()
    refused("compress", tmp_path / "file", *out, message="is a file; give the directory with config.json")
    monkeypatch.setattr("huggingface_hub.snapshot_download", _no_network)
    refused("compress", "modle", *out, message="no model 'modle': it is not a directory, and the Hugging Face hub did")


def _no_network(*args: object, **kwargs: object) -> None:
    raise ConnectionError("Name or service not known\nTry again")


def test_a_model_without_linears(tmp_path, refused):
    source = tiny_checkpoints.without_linears(tmp_path / "conv")
    refused("compress", source, "--method", "svd", "--out", tmp_path / "small", message="has no linear layers")


def test_bad_text(tiny, tmp_path, refused):
    text = tmp_path / "text.txt"
    out = ("--out", tmp_path / "small")
    refused("compress", tiny, "--data", text, *out, message=f"no such text file: {text}")
    text.touch()
    for option in ("--data", "--eval-data"):
        refused("compress", tiny, option, text, *out, message=f"{text} is empty; give a file with text")
    text.write_text(" \n\n")
    refused("compress", tiny, "--data", text, *out, message=f"{text} holds no text")
    text.write_text("Too short.")
    for option in ("--data", "--eval-data"):
        message = f"{text} has 8 tokens, fewer than one sequence of 256; lower the length"
        refused("compress", tiny, option, text, *out, message=message)
    text.write_bytes(b"\xff\xfe\x00")
    refused("compress", tiny, "--data", text, *out, message=f"{text} is not UTF-8 text")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n{"tex')
    refused("compress", tiny, "--data", rows, *out, message=f"{rows} line 2 is not JSON")
    rows.write_text('{"body": "a"}\n')
    refused("compress", tiny, "--data", rows, *out, message="has no field 'text', only body; name it with --field")
    refused("compress", tiny, "--data", tmp_path, *out, message="is a directory; give a .txt or .jsonl file")


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_a_missing_tokenizer(mute, tmp_path, refused, run, stream):
    message = f"{mute} has no tokenizer, which calibration text needs; add its tokenizer files"
    refused("compress", mute, "--out", tmp_path / "small", *stream, message=message)
    code, out, _ = run("compress", mute, "--method", "svd", "--out", tmp_path / "small", *stream)
    assert code == 0
    assert "not measured: the model " in out


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_a_checkpoint_that_is_compressed_already(compressed, tmp_path, refused, stream):
    message = "the checkpoint is compressed by Eckart already"
    refused("compress", compressed, *QUICK, "--out", tmp_path / "smaller", *stream, message=message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_damaged_weights_are_named(tmp_path, refused, value, stream):
    model = tiny_checkpoints.model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    source = tiny_checkpoints.write(tmp_path / "dense", model)
    message = "model.layers.1.mlp.up_proj.weight has NaN or Inf in it; repair or re-download the checkpoint"
    refused("compress", source, *QUICK, "--out", tmp_path / "small", *stream, message=message)


def test_an_existing_directory_is_refused_before_any_work_and_replaced_by_force(
    tiny, tmp_path, refused, run, monkeypatch
):
    out = tmp_path / "small"
    tiny_checkpoints.write(out)
    with monkeypatch.context() as patch:
        patch.setattr("eckart.models.load", lambda *args, **kwargs: pytest.fail("it loaded the model"))
        patch.setattr("eckart.models.resolve", lambda *args, **kwargs: pytest.fail("it looked for the model"))
        for stream in ((), ("--stream",)):
            refused("compress", tiny, "--out", out, *stream, message=f"{out} exists already; choose another path")
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").touch()
        message = "is not a model directory (no config.json) and is not replaced"
        refused("compress", tiny, "--out", tmp_path / "home", "--force", message=message)
    assert run("compress", tiny, "--method", "svd", "--no-eval", "--out", out, "--force")[0] == 0
    assert _modules(out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tiny, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("eckart.models.resolve", lambda *args, **kwargs: pytest.fail("it looked for the model"))
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "small"
    refused("compress", tiny, "--out", out, message=f"cannot write {out}: {tmp_path / 'file'} is a file")
    monkeypatch.setattr("os.access", lambda *args: False)  # root may write everywhere
    out = tmp_path / "new" / "small"
    refused("compress", tiny, "--out", out, message=f"cannot write {out}: no permission to write in {tmp_path}")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_a_full_disk_leaves_nothing_and_damages_nothing(tiny, tmp_path, refused, monkeypatch, stream, force):
    out = tmp_path / "small"
    if force:
        tiny_checkpoints.write(out)

    def save_file(tensors, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    for module in ("transformers.modeling_utils.safe_save_file", "eckart.models.stream.save_file"):
        monkeypatch.setattr(module, save_file)
    refused(
        "compress", tiny, "--method", "svd", "--no-eval", "--out", out, *stream, *(["--force"] if force else []),
        message=f"cannot write {out}: Error while serializing: I/O error: No space left on device",
    )  # fmt: skip


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_an_interrupted_run_leaves_nothing_but_finished_blocks(tiny, tmp_path, run, monkeypatch, stream):
    done = []

    def interrupted(*args, **kwargs):
        done.append(1)
        if len(done) == 8:  # the first layer of the second block
            raise KeyboardInterrupt
        return factorize(*args, **kwargs)

    factorize = SVD.factorize
    args = ("compress", tiny, "--method", "svd", "--no-eval", *stream, "--out", tmp_path / "parent" / "small")
    with monkeypatch.context() as patch:
        patch.setattr(SVD, "factorize", interrupted)
        code, out, err = run(*args)
    if not stream:
        assert (code, out, err) == (130, "", "eckart: interrupted\n")
        assert list(tmp_path.iterdir()) == []
        return
    partial = tmp_path / "parent" / ".small.partial"
    note = f"eckart: note: what is finished is kept in {partial}: go on with --resume\n"
    assert (code, out, err) == (130, "", note + "eckart: interrupted\n")
    assert [file.name for file in partial.glob("*.safetensors")] == ["model-00001-of-00003.safetensors"]


def test_leftovers_are_refused_before_any_work_gone_on_with_or_replaced(tiny, tmp_path, run, refused, monkeypatch):
    out = tmp_path / "small"
    args = ("compress", tiny, *QUICK, "--method", "svd-llm", "--stream", "--out", out)
    assert run(*args[:-1], tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        _full_after_one_shard(patch)
        code, _, err = run(*args)
    partial = tmp_path / ".small.partial"
    kept = f"what is finished is kept in {partial}: go on with --resume"
    assert (code, err) == (1, f"eckart: error: cannot write {out}: No space left on device; {kept}\n")
    with monkeypatch.context() as patch:
        patch.setattr("eckart.models.resolve", lambda *args, **kwargs: pytest.fail("it looked for the model"))
        refused(*args, message=f"an earlier run for {out} left {partial}; go on with resume (--resume), or start anew")
    message = 'differs in budget ({"ratio": 0.2}, now {"ratio": 0.4}); ask for the same, or start anew with force'
    refused(*args, "--ratio", 0.4, "--resume", message=message)
    refused(*args, "--samples", 3, "--resume", message="differs in calibration; ask for the same")
    assert run(*args, "--resume")[0] == 0
    assert _files(out) == _files(tmp_path / "whole")
    with monkeypatch.context() as patch:
        _full_after_one_shard(patch)
        assert run(*args, "--force")[0] == 1
    assert _files(out) == _files(tmp_path / "whole"), "it is replaced when the new one is whole"
    assert run(*args, "--ratio", 0.4, "--force")[0] == 0
    assert _files(out).keys() == _files(tmp_path / "whole").keys()
    assert {path.name for path in tmp_path.iterdir()} == {"small", "whole"}


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def _full_after_one_shard(patch: pytest.MonkeyPatch) -> None:
    save_file = safetensors.torch.save_file

    def save(tensors, path, **kwargs):
        if "00001" not in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **kwargs)

    patch.setattr("eckart.models.stream.save_file", save)


_SLOW = """
import logging, sys, time
logging.disable()  # the import below comes before the command can keep other libraries quiet
from eckart.cli.main import main
from eckart.compression.svd import SVD

done = []
factorize = SVD.factorize

def slow(*args, **kwargs):
    done.append(1)
    if len(done) == 8:  # the first block is on disk
        print("there", flush=True)
        time.sleep(60)
    return factorize(*args, **kwargs)

SVD.factorize = slow
sys.exit(main({args!r}))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_from_outside_can_be_resumed(sent, tiny, tmp_path, run):
    out, partial = tmp_path / "parent" / "small", tmp_path / "parent" / ".small.partial"
    args = ["compress", str(tiny), "--method", "svd", "--stream", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW.format(args=args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    process.send_signal(sent)
    printed, errors = process.communicate(timeout=30)
    assert [path.name for path in out.parent.iterdir()] == [partial.name]
    if sent == signal.SIGINT:
        note = f"eckart: note: what is finished is kept in {partial}: go on with --resume\n"
        assert (process.returncode, printed, errors) == (130, "", note + "eckart: interrupted\n")
    else:
        assert (process.returncode, printed, errors) == (-signal.SIGKILL, "", "")
    assert run(*args, "--resume")[0] == 0
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    assert run(*args[:-1], tmp_path / "whole")[0] == 0
    assert _files(out) == _files(tmp_path / "whole")


# --- small parts


@pytest.mark.parametrize("text", ["", "MB", "1.2.3MB", "12XB", "twelve"])
def test_no_size(text):
    with pytest.raises(ValueError, match="is no size; write 200MB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("pair", "value"),
    [("a=1", 1), ("a=1e-4", 1e-4), ("a=True", True), ("a=none", None), ("a=b=c", "b=c"), ("a-b = x ", "x")],
)
def test_settings(pair, value):
    name, found = parse_setting(pair)
    assert name in ("a", "a_b")
    assert (found, type(found)) == (value, type(value))
