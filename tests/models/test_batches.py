from __future__ import annotations

import json
import sys
from pydoc_data.topics import topics
from types import ModuleType

import pytest
import torch

import tiny_models
from eckart.models import as_batches, calibrate, read_text, text_batches
from eckart.models.batches import check_source, python_documentation


class Letters:
    """A tokenizer with one token for every ``width`` characters."""

    def __init__(self, width: int = 1) -> None:
        self.width = width
        self.asked: list[int] = []

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        self.asked.append(len(text))
        return {"input_ids": [ord(text[i]) for i in range(0, len(text) - len(text) % self.width, self.width)]}


def ids(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist()


# ------------------------------------------------------------------------------------------------- the default text


def test_no_paragraph_of_the_default_text_is_in_both_parts():
    """Topics quote whole sections of each other, so it is not enough that no topic is in both."""
    calibration, evaluation = python_documentation("calibration"), python_documentation("evaluation")
    assert calibration == python_documentation("calibration")

    def paragraphs(text: str) -> set[str]:
        return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")} - {""}

    assert not paragraphs(calibration) & paragraphs(evaluation)
    assert paragraphs(calibration) | paragraphs(evaluation) == paragraphs("\n\n".join(topics.values()))
    # Enough for 32 windows of 512 tokens and for 8, at 4 characters a token.
    assert len(calibration) > 4 * 32 * 512
    assert len(evaluation) > 4 * 8 * 512


def test_a_source_without_a_name_is_the_documentation():
    assert read_text(None) == python_documentation("calibration")
    assert read_text(None, part="evaluation") == python_documentation("evaluation")
    one, two = (text_batches(Letters(), samples=2, length=16, part=part) for part in ("calibration", "evaluation"))
    assert ids(one) == [ord(letter) for letter in python_documentation("calibration")[:32]]
    assert ids(one) != ids(two)


# ------------------------------------------------------------------------------------------------------------ files


def test_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("zwölf Boxkämpfer", encoding="utf-8")
    assert read_text(path) == read_text(str(path)) == "zwölf Boxkämpfer"
    assert read_text(path, part="evaluation") == "zwölf Boxkämpfer"


def test_jsonl_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "other": 1}\n\n{"text": "two", "other": 2}\n')
    assert read_text(path) == "one\n\ntwo"
    assert read_text(path, field="other") == "1\n\n2"


@pytest.mark.parametrize(
    ("name", "content", "field", "error", "message"),
    [
        ("missing.txt", None, None, FileNotFoundError, r"no such text file: .*missing\.txt; give a \.txt or \.jsonl"),
        ("empty.txt", "", None, ValueError, "empty.txt is empty; give a file with text"),
        ("blank.txt", " \n\n", None, ValueError, "blank.txt holds no text"),
        ("latin.txt", b"\xff\xfe\x00", None, ValueError, "latin.txt is not UTF-8 text"),
        ("bad.jsonl", '{"text": "a"}\n{"text": ', None, ValueError, "bad.jsonl line 2 is not JSON"),
        ("a.jsonl", '{"body": "x", "id": 1}\n', None, ValueError, "line 1 has no field 'text', only body, id; name it"),
        ("a.jsonl", '{"text": "x"}\n', "body", ValueError, "line 1 has no field 'body', only text"),
        ("a.jsonl", "[1, 2]\n", None, ValueError, "line 1 has no field 'text', only list"),
    ],
)
def test_bad_files_are_named_in_one_line(name, content, field, error, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message) as caught:
        read_text(path, field=field)
    assert "\n" not in str(caught.value)


def test_a_bad_source_is_refused_before_a_model_is_loaded(tmp_path):
    check_source(None)
    check_source("wikitext:wikitext-2-v1")  # may be a data set
    (tmp_path / "empty.txt").touch()
    for source, message in (
        (tmp_path, "is a directory; give a .txt or .jsonl file"),
        (tmp_path / "empty.txt", "is empty"),
        ("./no-such", "no such text file: ./no-such"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            check_source(source)


# -------------------------------------------------------------------------------------------------------- data sets


class Rows(dict):
    column_names = property(lambda self: list(self))


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets package, and what was asked of it."""
    asked: list[tuple] = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "nothing":
            raise RuntimeError("Dataset 'nothing' doesn't exist on the Hub\nTraceback ...")
        return Rows(text=["a", "b"], title=["c", "d"])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_hub_data_sets(hub):
    assert read_text("wiki") == "a\n\nb"
    assert read_text("org/wiki:small", field="title") == "c\n\nd"
    assert read_text("wiki:small:test") == "a\n\nb"
    assert hub == [("wiki", None, "train"), ("org/wiki", "small", "train"), ("wiki", "small", "test")]


def test_bad_hub_data_sets(hub, monkeypatch):
    with pytest.raises(ValueError, match="wiki has no column 'body', only text, title; name it with --field"):
        read_text("wiki", field="body")
    with pytest.raises(
        FileNotFoundError, match="neither a file nor a data set that loads: Dataset 'nothing'"
    ) as caught:
        read_text("nothing")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"wiki is no file; .*pip install 'eckart\[data\]'"):
        read_text("wiki")


# ---------------------------------------------------------------------------------------------------------- windows


def test_windows_are_consecutive_and_batched(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(chr(65 + i) for i in range(50)))
    batches = text_batches(Letters(), path, samples=5, length=7, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 7), (2, 7), (1, 7)]
    assert ids(batches) == list(range(65, 65 + 35))
    assert all(batch["input_ids"].dtype == torch.long for batch in batches)
    # All whole windows that there are; the rest of the text is too short for one more.
    assert ids(text_batches(Letters(), path, samples=None, length=7)) == list(range(65, 65 + 49))
    assert ids(text_batches(Letters(), path, samples=99, length=7)) == list(range(65, 65 + 49))
    assert ids(text_batches(Letters(), path, samples=5, length=7, batch_size=3)) == ids(batches)


def test_only_as_much_text_is_tokenized_as_is_used(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 100_000)
    tokenizer = Letters()
    text_batches(tokenizer, path, samples=2, length=10)
    assert tokenizer.asked == [640]


def test_long_tokens_do_not_cost_windows(tmp_path):
    """Tables and code have tokens of many characters; the text has enough of them."""
    path = tmp_path / "a.txt"
    path.write_text("-" * 10_000)
    (batch,) = text_batches(Letters(100), path, samples=4, length=10)
    assert batch["input_ids"].shape == (4, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 51}, "has 50 tokens, fewer than one sequence of 51; lower the length"),
        ({"length": 0}, "length must be at least 1, not 0"),
        ({"samples": 0, "length": 5}, "samples must be at least 1, not 0"),
        ({"batch_size": 0, "length": 5}, "batch_size must be at least 1, not 0"),
    ],
)
def test_bad_windows(options, message, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 50)
    with pytest.raises(ValueError, match=message):
        text_batches(Letters(), path, **options)


def test_without_a_tokenizer():
    with pytest.raises(ValueError, match="the checkpoint has no tokenizer; pass batches of token ids"):
        text_batches(None)


# ----------------------------------------------------------------------------------------------- batches from memory


def test_what_counts_as_batches():
    one, two = torch.arange(6).reshape(2, 3), {"input_ids": torch.ones(1, 4, dtype=torch.long), "name": "a"}
    batches = as_batches(iter([one, two]))
    assert [sorted(batch) for batch in batches] == [["input_ids"], ["input_ids"]]
    assert batches[0]["input_ids"] is one
    pixels = torch.zeros(1, 3, 4, 4)
    assert as_batches([{"pixel_values": pixels}])[0]["pixel_values"] is pixels
    # Rows of one tensor are sequences.
    assert [batch["input_ids"].tolist() for batch in as_batches(one)] == [[[0, 1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no data: the iterable of batches is empty"),
        ([[1, 2]], "a batch must be a dictionary of tensors or a tensor, not list"),
        (["text"], "not str"),
        ([{"input_ids": [[1, 2]]}], 'no tensors in it; tokenize with return_tensors="pt"'),
        ([torch.zeros(2, 3)], "a tensor must hold token ids; give other inputs by name"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.long)}, "not a single one; put it in a list"),
        ([{"input_ids": torch.ones(3, dtype=torch.long)}], r"input_ids must be \(batch, length\) and not empty, got"),
        ([torch.ones(0, 3, dtype=torch.long)], r"not empty, got \(0, 3\)"),
    ],
)
def test_bad_batches(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        as_batches(data)
    assert "\n" not in str(caught.value)


def test_an_error_of_the_callers_iterable_is_the_callers():
    def broken():
        yield torch.ones(1, 2, dtype=torch.long)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        as_batches(broken())


def test_a_tensor_and_its_dictionary_calibrate_alike():
    model = tiny_models.FAMILIES["llama"]()
    batch = tiny_models.inputs(model)
    one, two = (calibrate(model, data, progress=False) for data in ([batch["input_ids"]], [batch]))
    assert all(torch.equal(one[name].gram, two[name].gram) for name in one)


def test_jsonl_of_the_json_module(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {i} é"}) for i in range(3)))
    assert read_text(path) == "line 0 é\n\nline 1 é\n\nline 2 é"
