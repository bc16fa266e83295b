"""``eckart analyze``: every analysis gives what the library gives, in tables, as JSON, in a file; what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import tiny_checkpoints
from eckart import analyze, catalog
from eckart.cli.main import main
from eckart.models import linears, load, text_batches
from eckart.models.answers import read_examples

METHODS = [row for row in catalog.select(family="analysis") if row.target]
PROMPTS = ("The class of an object is", "A list holds\nitems of ")
TEMPLATE = "{q} => {a}"
# What the command adds to the rows of locally linear maps.
WORDS = {"word", "predicted word", "output words", "input words"}


@pytest.fixture(scope="session")
def tuned(tmp_path_factory) -> Path:
    """The tiny model with every weight changed."""
    model = tiny_checkpoints.model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for ref in linears(model).linears:
            ref.weight.add_(0.02 * torch.randn(ref.shape, generator=generator))
    return tiny_checkpoints.write(tmp_path_factory.mktemp("tuned") / "model", model)


@pytest.fixture
def request_of(tiny, tuned, sums):
    """The words of a command line that gives a method what it needs, and the same for the library."""

    def call(row: catalog.Method) -> tuple[tuple[Any, ...], dict[str, Any]]:
        words: tuple[Any, ...] = ("analyze", row.name, tuned)
        given: dict[str, Any] = {"model": load(tuned)[0]}
        if "base" in row.needs:
            words += ("--base", tiny)
            given["base"] = load(tiny)[0]
        if "labels" in row.needs:
            words += ("--data", sums, "--template", TEMPLATE)
            given["data"] = _examples(sums, "input_ids", "labels")
        elif "data" in row.needs:
            words += ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1])
            given["data"] = _prompts()
        return words, given

    return call


def _prompts() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor([tiny_checkpoints.tokenizer()(text)["input_ids"]])} for text in PROMPTS]


def _examples(path: Path, *keys: str) -> list[dict[str, torch.Tensor]]:
    examples = read_examples(path, tiny_checkpoints.tokenizer(), template=TEMPLATE, length=256)
    return [{key: torch.tensor([one[key]]) for key in keys} for one in examples]


def _plain(value: Any) -> Any:
    """What comes back from JSON, with NaN as null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def assert_same(found: dict[str, Any], wanted: Any) -> None:
    """What was printed is what the library gives, but for the time and for words."""
    for name in ("figures", "warnings", "method", "settings"):
        assert found[name] == _plain(getattr(wanted, name)), name
    assert [{key: row[key] for key in row if key not in WORDS} for row in found["rows"]] == _plain(wanted.rows)


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_method_gives_the_figures_of_the_library(row, request_of, run_json):
    words, given = request_of(row)
    found = run_json(*words)
    wanted = analyze(given.pop("model"), row.name, **given, progress=False)
    assert_same(found, wanted)
    assert found["rows"]
    assert (found["model"], found["base"]) == (str(words[2]), str(words[4]) if "base" in row.needs else None)


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_the_tables_fit_a_terminal(row, request_of, run, run_json, monkeypatch, columns):
    words, _ = request_of(row)
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    found = run_json(*words)
    sentences = {lines[0], *(f"note: {line}" for line in found["warnings"])}  # these wrap as the terminal does
    assert sentences <= set(lines)
    assert max(len(line) for line in lines if line not in sentences) <= columns
    assert lines[0].endswith(f", {row.name}")
    for name, value in found["figures"].items():
        line = next(line for line in lines if line.startswith(f"{name}  "))
        if isinstance(value, int | float):
            assert float(line.removeprefix(name).replace(",", "")) == pytest.approx(value, rel=1e-3)


def test_rows_are_printed_with_their_figures(tiny, tuned, run, run_json):
    words = ("analyze", "intruder-dimensions", tuned, "--base", tiny, "--set", "threshold=0.9", "--set", "top=4")
    _, out, _ = run(*words)
    lines = [line.split() for line in out.splitlines()]
    [titles] = [line for line in lines if line[:3] == ["layer", "rows", "columns"]]
    rows = run_json(*words)["rows"]
    assert len(rows) == 14
    assert titles[3:6] == ["intruders", "robust", "intruders"]
    for row in rows:
        [shown] = [line for line in lines if line[:1] == [row["layer"]]]
        assert [int(value) for value in shown[1:5]] == [
            row["rows"], row["columns"], row["intruders"], row["robust intruders"]
        ]  # fmt: skip
    assert sum(row["intruders"] for row in rows) > 0
    assert "1 more figures a row: --json" in out  # nine counts are no cell, four cosines are


def test_a_table_for_each_group(tiny, run):
    _, out, _ = run("analyze", "lora-limits", tiny, "--prompt", PROMPTS[0])
    lines = out.splitlines()
    for layer in range(2):
        start = lines.index(f"model.layers.{layer}.self_attn")
        assert lines[start + 1].split()[0] == "head"
        assert [line.split()[0] for line in lines[start + 2 : start + 6]] == ["0", "1", "2", "3"]
    _, out, _ = run("analyze", "talking-heads", tiny)
    assert {"query", "key", "value"} <= set(out.splitlines())


def test_directions_of_locally_linear_maps_are_in_words(tiny, run, run_json):
    words = ("analyze", "locally-linear", tiny, "--prompt", PROMPTS[0], "--set", "components=2", "--set", "top=3")
    found = run_json(*words)
    tokenizer = tiny_checkpoints.tokenizer()
    whole = analyze(load(tiny)[0], "locally-linear", data=_prompts()[:1], components=2, top=3, progress=False)
    for row, plain in zip(found["rows"], whole.rows, strict=True):
        for name in ("output", "input"):
            assert row[f"{name} words"] == [[tokenizer.decode([one]) for one in ids] for ids in plain[f"{name}s"]]
        assert row["word"] == (None if plain["id"] is None else tokenizer.decode([plain["id"]]))
        assert row["predicted word"] == tokenizer.decode([plain["predicted"]])
    _, out, _ = run(*words)
    lines = out.splitlines()
    [first] = [row for row in found["rows"] if row["token"] == "all"]
    label = f"text 0, embeddings to output: the model's next token is {first['predicted word']!r}"
    start = lines.index(label)
    values = whole.tensors["s 0: embeddings to output"].tolist()
    for index in range(2):
        shown = lines[start + 2 + index]
        assert shown.split()[:2] == [str(index + 1), f"{values[index]:.4g}"]
        assert " ".join(map(repr, first["output words"][index])) in shown
        assert " ".join(map(repr, first["input words"][index])) in shown


def test_texts_are_read_as_other_commands_read_them(tiny, tmp_path, run_json):
    text = tmp_path / "text.txt"
    text.write_text("Some text about lists, and then about dictionaries. " * 200)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"body": f"line {i} of the file, which is one of many"}) for i in range(60)))
    model, tokenizer = load(tiny)
    cut = ("--samples", 3, "--length", 40)
    for more, source, field in (((text,), text, "text"), ((rows, "--field", "body"), rows, "body")):
        found = run_json("analyze", "matrix-nuclear-norm", tiny, "--data", *more, *cut)
        batches = text_batches(tokenizer, source, samples=3, length=40, batch_size=1, field=field)
        assert [row["tokens"] for row in found["rows"]] == [40] * 3
        assert_same(found, analyze(model, "matrix-nuclear-norm", data=batches, progress=False))
    both = run_json("analyze", "matrix-nuclear-norm", tiny, "--prompt", PROMPTS[0], "--data", text, *cut)
    assert both["figures"]["texts"] == 4


def test_lines_of_jsonl_are_texts_with_a_template(tiny, sums, run_json):
    model, _ = load(tiny)
    found = run_json("analyze", "matrix-nuclear-norm", tiny, "--data", sums, "--template", TEMPLATE, "--samples", 5)
    assert_same(found, analyze(model, "matrix-nuclear-norm", data=_examples(sums, "input_ids")[:5], progress=False))


def test_a_text_without_a_template_is_an_answer_as_a_whole(tiny, run_json):
    found = run_json("analyze", "gradient-spectra", tiny, "--prompt", PROMPTS[0])
    batches = [{**one, "labels": one["input_ids"]} for one in _prompts()[:1]]
    assert_same(found, analyze(load(tiny)[0], "gradient-spectra", data=batches, progress=False))


def test_a_model_that_reads_and_writes(tmp_path, run_json):
    made = tiny_checkpoints.family("t5", vocab_size=tiny_checkpoints.VOCABULARY)
    source = tiny_checkpoints.write(tmp_path / "t5", made)
    found = run_json("analyze", "lora-limits", source, "--prompt", PROMPTS[0])
    batches = [{**one, "decoder_input_ids": one["input_ids"]} for one in _prompts()[:1]]
    assert_same(found, analyze(load(source)[0], "lora-limits", data=batches, progress=False))
    assert {row["layer"].split(".")[0] for row in found["rows"]} == {"encoder", "decoder"}


def test_an_adapter_may_stand_in_either_place(tiny, adapter, run_json):
    adapted = PeftModel.from_pretrained(load(tiny)[0], str(adapter)).eval()
    wanted = analyze(adapted, "intruder-dimensions", threshold=0.9, progress=False)
    assert wanted.figures["intruders"] > 0
    for first, second in ((adapter, tiny), (tiny, adapter)):
        found = run_json("analyze", "intruder-dimensions", first, "--base", second, "--set", "threshold=0.9")
        assert_same(found, wanted)
    found = run_json("analyze", "lora-limits", adapter, "--base", tiny, "--prompt", PROMPTS[0])
    assert_same(found, analyze(adapted, "lora-limits", data=_prompts()[:1], progress=False))
    assert "median change by adapters" in found["figures"]


def test_a_base_that_is_not_here_is_a_note(tiny, adapter, tmp_path, run):
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "somebody/else"}))
    code, out, _ = run("analyze", "intruder-dimensions", moved, "--base", tiny)
    assert code == 0
    assert "note: the adapter was made for somebody/else, which is not here" in out


def test_only_the_chosen_layers(tiny, tuned, run_json):
    found = run_json("analyze", "intruder-dimensions", tuned, "--base", tiny, "--where", "*.q_proj", "--where", "*.1.*")
    names = [row["layer"] for row in found["rows"]]
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert len(names) == 8
    assert all(".layers.1." in name for name in names[1:])


def test_the_file_holds_what_json_prints(tiny, tmp_path, run):
    path = tmp_path / "found.json"
    words = ("analyze", "talking-heads", tiny, "--set", "top=3", "--set", "order=z", "--out", path)
    code, out, err = run(*words, "--json")
    assert (code, err, path.read_text()) == (0, "", out)
    assert json.loads(out)["settings"] == {"top": 3, "order": "z", "offset": None}
    code, out, _ = run(*words, "--set", "top=1", "--force")
    assert code == 0
    assert out.endswith(f"; wrote {path}\n")
    assert len(json.loads(path.read_text())["rows"]) == 3  # one a kind


def test_a_file_is_written_whole_or_not_at_all(tiny, tmp_path, refused, monkeypatch):
    path = tmp_path / "found.json"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "replace", full)
    refused("analyze", "talking-heads", tiny, "--out", path, "--force", message="No space left on device")


def test_help_lists_the_methods_with_their_titles(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["analyze", "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for row in METHODS:
        assert f"{row.name} {' '.join(row.title.split())}" in words


def test_unknown_methods_and_options(tiny, tmp_path, refused):
    out = ("--out", tmp_path / "found.json")
    refused("analyze", "talking-head", tiny, *out, message="unknown method 'talking-head'; did you mean talking-heads")
    refused("analyze", "svd", tiny, *out, message="'svd' belongs to compression, not to analysis")
    one = ("analyze", "talking-heads", tiny, *out)
    refused(*one, "--set", "rank=3", message="has no option rank; it has: top, order, offset")
    refused(*one, "--set", "top", message="--set 'top' is not name=value")
    refused(*one, "--set", "top=many", message="--set top=many is no int; see `eckart methods talking-heads`")
    refused(*one, "--set", "top=0", message="top must be at least 1 row, not 0")
    refused(*one, "--set", "order=size", message="order must be one of score, z, contribution, not 'size'")
    refused(*one, "--where", "*.q_prj", message="matches no layer; nearest: ")
    refused(*one, "--dtype", "int4", message="--dtype must be one of")
    refused(*one, "--samples", "0", message="--samples", code=2)


@pytest.mark.parametrize("row", [row for row in METHODS if row.needs], ids=lambda row: row.name)
def test_what_a_method_needs_is_asked_for_before_the_model_is_loaded(row, tiny, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("eckart.cli._subject.load_model", _never)
    wanted = "needs a second model to compare with; give --base" if "base" in row.needs else "needs texts to look at"
    refused("analyze", row.name, tiny, "--out", tmp_path / "found.json", message=f"{row.name} {wanted}")


def _never(*_: object, **__: object) -> None:
    raise AssertionError("the model was loaded")


def test_texts_that_cannot_be_used(tiny, mute, sums, tmp_path, refused, monkeypatch):
    spectra, norm = ("analyze", "gradient-spectra"), ("analyze", "matrix-nuclear-norm", tiny)
    long = "word " * 300
    refused(*norm, "--prompt", long, message="is longer than the model's context of 256; cut it")
    refused(*norm, "--data", sums, "--field", "q", "--length", 300, message="--length 300 is longer than the model's")
    refused(*norm, "--prompt", "a", message="all texts are shorter than 2 tokens")
    refused("analyze", "matrix-nuclear-norm", mute, "--prompt", "a text", message="has no tokenizer, which texts need")
    refused(*norm, "--data", sums, message="has no field 'text', only a, q; name it with --field")
    refused(*spectra, tiny, "--data", sums, message="has no field 'question'; it has 'q', 'a'")
    refused(*spectra, tiny, "--data", sums, "--template", "{q}", message="has no ' => ' between prompt and answer")
    pictures = tiny_checkpoints.write(tmp_path / "vit", tiny_checkpoints.family("vit"))
    refused("analyze", "matrix-nuclear-norm", pictures, "--prompt", "a text", message="takes pixel_values, not text")
    monkeypatch.setattr("eckart.cli._subject.load_model", _never)
    refused(*norm, "--prompt", " ", message="a --prompt is empty")
    refused(*norm, "--data", tmp_path / "none.txt", message="no such text file")
    refused(*norm, "--prompt", "a text", "--template", TEMPLATE, message="--template is for a JSONL file")
    refused("analyze", "talking-heads", tiny, "--prompt", "a", message="talking-heads looks at the weights alone")


def test_models_that_do_not_belong_together(tiny, tuned, adapter, tmp_path, refused):
    pair = ("analyze", "intruder-dimensions")
    wide = tiny_checkpoints.write(tmp_path / "wide", tiny_checkpoints.model(hidden_size=64), with_tokenizer=False)
    refused(*pair, wide, "--base", tiny, message="in the model and (400, 32) in the base; compare a model with what")
    other = tiny_checkpoints.write(tmp_path / "gpt2", tiny_checkpoints.family("gpt2"), with_tokenizer=False)
    refused(*pair, other, "--base", tiny, message="the two models have no parameter in common")
    refused(*pair, adapter, "--base", tuned, message="was made for ")
    refused(*pair, adapter, "--base", wide, message="was made for ")
    refused(*pair, adapter, message="is an adapter; give the model that it is on with --base")
    refused(*pair, adapter, "--base", adapter, message="are both adapters; give one of them with the model")
    refused("analyze", "talking-heads", tuned, "--base", tiny, message="talking-heads looks at one model; leave out --")


def test_damaged_models(tiny, adapter, tmp_path, refused):
    heads = ("analyze", "talking-heads")
    out = ("--out", tmp_path / "found.json")
    refused(*heads, tmp_path / "missing", *out, message="the path does not exist")
    model = tiny_checkpoints.model()
    model.model.layers[1].mlp.gate_proj.weight.data[0, 0] = float("nan")
    damaged = tiny_checkpoints.write(tmp_path / "nan", model)
    refused(*heads, damaged, *out, message="model.layers.1.mlp.gate_proj.weight has NaN or Inf in it")
    refused("analyze", "intruder-dimensions", tiny, "--base", damaged, *out, message="gate_proj.weight has NaN or Inf")
    tiny_checkpoints.model().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    shard.unlink()
    refused(*heads, tmp_path / "shards", *out, message=shard.name)
    shutil.copytree(adapter, tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    refused("analyze", "intruder-dimensions", tmp_path / "half", "--base", tiny, message="no adapter_model.safetensors")
    convolutions = tiny_checkpoints.without_linears(tmp_path / "conv")
    refused("analyze", "intruder-dimensions", convolutions, "--base", convolutions, message="has no linear layers")


def test_files_that_are_not_replaced(tiny, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("eckart.cli._subject.load_model", _never)
    (tmp_path / "found.json").write_text("mine")
    heads = ("analyze", "talking-heads", tiny)
    refused(*heads, "--out", tmp_path / "found.json", message="exists already; choose another path or replace it")
    refused(*heads, "--out", tmp_path, "--force", message="is a directory; give the name of a file, such as")
    refused(*heads, "--out", tmp_path / "no" / "found.json", message="there is no directory")
