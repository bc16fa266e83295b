"""Examples to fine-tune on: a prompt and an answer, or plain text, as token ids with labels.

Only the tokens of the answer are learnt: those of the prompt have the label -100, which transformers leaves out of
the loss.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .batches import read_text

__all__ = ["DEFAULT_TEMPLATE", "Example", "read_examples", "text_examples"]

Example = dict[str, list[int]]

#: Field names in braces; what follows the last " => " is the answer.
DEFAULT_TEMPLATE = "Question: {question}\nAnswer: => {answer}"
_ARROW = " => "


def read_examples(path: str | Path, tokenizer: Any, *, template: str = DEFAULT_TEMPLATE, length: int) -> list[Example]:
    """Examples of a JSONL file, one a line.

    Args:
        path: File of JSON objects.
        tokenizer: Of the model.
        template: Prompt and answer, apart by " => ", with field names in braces.
        length: Tokens an example at the most; a longer answer is cut, a longer prompt is an error.

    Returns:
        ``input_ids`` and ``labels`` of each; the answer ends with the end-of-text token.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The template has no " => ", a line is no JSON object or lacks a field, there are no lines, or a
            prompt leaves no room for an answer.

    Example:
        >>> import tempfile
        >>> class Letters:
        ...     eos_token_id = 0
        ...     def __call__(self, text, add_special_tokens=True):
        ...         return {"input_ids": [ord(letter) for letter in text]}
        >>> path = Path(tempfile.mkdtemp()) / "data.jsonl"
        >>> _ = path.write_text('{"q": "ab", "a": "c"}')
        >>> read_examples(path, Letters(), template="{q} => {a}", length=9)
        [{'input_ids': [97, 98, 32, 99, 0], 'labels': [-100, -100, -100, 99, 0]}]
    """
    if _ARROW not in template:
        raise ValueError(f"the template {template!r} has no {_ARROW!r} between prompt and answer")
    prompt, _, answer = template.rpartition(_ARROW)
    names = re.findall(r"\{(\w+)\}", template)
    examples: list[Example] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = _fields(line, f"{path}, line {number}", names)
        first = tokenizer(_fill(prompt, fields) + " ")["input_ids"]
        second = [*tokenizer(_fill(answer, fields), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(first) >= length:
            raise ValueError(
                f"{path}, line {number}: the prompt has {len(first)} tokens, which leaves no room for an answer in "
                f"{length}; raise the length"
            )
        examples.append({"input_ids": (first + second)[:length], "labels": ([-100] * len(first) + second)[:length]})
    if not examples:
        raise ValueError(f"{path} has no examples in it")
    return examples


def text_examples(source: str | Path | None, tokenizer: Any, *, field: str | None = None, length: int) -> list[Example]:
    """Windows of ``length`` tokens of a text, every token learnt; see `eckart.models.batches.read_text`.

    Raises:
        ValueError: The text is shorter than one window.
    """
    ids: Sequence[int] = tokenizer(read_text(source, field=field))["input_ids"]
    windows = [list(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]
    if not windows:
        raise ValueError(f"the text has {len(ids)} tokens, less than one window of {length}; give more, or lower it")
    return [{"input_ids": window, "labels": list(window)} for window in windows]


def _fields(line: str, where: str, names: Sequence[str]) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is no JSON object")
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"{where} has no field {missing[0]!r}; it has {', '.join(map(repr, fields))}")
    return fields


def _fill(template: str, fields: dict[str, Any]) -> str:
    """The template with its fields; braces in their values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: str(fields[match[1]]), template)
