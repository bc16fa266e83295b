"""Examples to learn from: prompts are not learnt, answers are, and bad files are one clear line."""

from __future__ import annotations

import json

import pytest

from eckart.models.answers import read_examples, text_examples


class Letters:
    """One token a letter, a token 1 in front of a text that begins."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_only_the_answer_is_learnt(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "2+2", "a": "4 {q}"}, "", {"q": "x", "a": "y"})
    first, second = read_examples(path, Letters(), template="Q {q} A => {a}!", length=40)
    prompt, answer = "Q 2+2 A ", "4 {q}!"
    assert first["input_ids"] == [1, *map(ord, prompt), *map(ord, answer), 0]
    assert first["labels"] == [-100] * (len(prompt) + 1) + [*map(ord, answer), 0]
    assert second["input_ids"][-3:] == [ord("y"), ord("!"), 0]


def test_a_long_answer_is_cut(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": "a", "a": "b" * 50})
    (example,) = read_examples(path, Letters(), template="{q} => {a}", length=10)
    assert len(example["input_ids"]) == len(example["labels"]) == 10
    assert example["labels"][3:] == [ord("b")] * 7


@pytest.mark.parametrize(
    ("lines", "template", "message"),
    [
        ([{"q": "a", "a": "b"}], "{q} {a}", "has no ' => ' between prompt and answer"),
        ([{"q": "a"}], "{q} => {a}", "a.jsonl, line 1 has no field 'a'; it has 'q'"),
        (["{"], "{q} => {a}", "a.jsonl, line 1 is no JSON"),
        (["[1]"], "{q} => {a}", "line 1 is no JSON object"),
        ([""], "{q} => {a}", "has no examples in it"),
        (
            [{"q": "a" * 99, "a": "b"}],
            "{q} => {a}",
            "the prompt has 101 tokens, which leaves no room for an answer in 20",
        ),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, lines, template, message):
    with pytest.raises(ValueError, match=message) as error:
        read_examples(write(tmp_path / "a.jsonl", *lines), Letters(), template=template, length=20)
    assert "\n" not in str(error.value)


def test_text_is_cut_into_windows(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh")
    one, two = text_examples(path, Letters(), length=4)
    assert one == {"input_ids": [1, 97, 98, 99], "labels": [1, 97, 98, 99]}
    assert two["input_ids"] == [100, 101, 102, 103]
    with pytest.raises(ValueError, match="the text has 9 tokens, less than one window of 99"):
        text_examples(path, Letters(), length=99)
