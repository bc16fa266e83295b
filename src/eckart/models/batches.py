"""Token batches for calibration and evaluation: from text files, a JSONL field, a hub data set or memory.

Texts are joined, tokenized once and cut into windows of equal length, so no padding is needed. The
default text needs no download: the language reference that ships with CPython, split once and for all
by topic into a part to calibrate on and a part to evaluate on.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from .replay import Batch

__all__ = [
    "as_batches",
    "calibrating_and_judging",
    "check_source",
    "python_documentation",
    "read_text",
    "single_examples",
    "text_batches",
    "with_labels",
]

Part = Literal["calibration", "evaluation"]


def python_documentation(part: Part) -> str:
    """Text of the Python language reference that ships with CPython.

    One topic in four, chosen by a checksum of its name, is kept for evaluation. Topics quote each other, so
    what the calibration part has is left out there: no paragraph is in both. The text differs a little
    between Python versions: compare figures within one version.
    """
    from pydoc_data.topics import topics  # a data module of the standard library

    held_out: dict[bool, list[str]] = {True: [], False: []}
    for name in sorted(topics):
        held_out[zlib.crc32(name.encode()) % 4 == 0].append(topics[name])
    calibration = "\n\n".join(held_out[False])
    if part == "calibration":
        return calibration
    known = set(map(_words, calibration.split("\n\n")))
    return "\n\n".join(p for p in "\n\n".join(held_out[True]).split("\n\n") if _words(p) not in known)


def _words(paragraph: str) -> str:
    """A paragraph without its indentation and line breaks, which differ where it is quoted."""
    return " ".join(paragraph.split())


def read_text(source: str | Path | None, *, part: Part = "calibration", field: str | None = None) -> str:
    """Read the text of ``source``.

    Args:
        source: a text file; a .jsonl file (with ``field``); the id of a hub data set, as ``name``,
            ``name:config`` or ``name:config:split`` (needs the ``datasets`` package); None for the
            Python documentation.
        part: which half of the default text; ignored for other sources.
        field: the JSON field, or data set column, that holds the text; default "text".

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if the file is empty or has no such field.
    """
    if source is None:
        return python_documentation(part)
    check_source(source)
    path = Path(source)
    if path.is_file():
        try:
            raw = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text; give a .txt or .jsonl file") from error
        text = _jsonl(path, raw, field or "text") if path.suffix == ".jsonl" else raw
    else:
        text = _hub(str(source), field or "text")
    if not text.strip():
        raise ValueError(f"{source} holds no text")
    return text


def check_source(source: str | Path | None) -> None:
    """Refuse a text file that is missing or empty, before a model is loaded for it.

    Raises:
        FileNotFoundError: if it looks like a file's name and there is none.
        ValueError: if it is empty.
    """
    if source is None:
        return
    path = Path(source)
    if path.is_dir():
        raise FileNotFoundError(f"{source} is a directory; give a .txt or .jsonl file")
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{source} is empty; give a file with text")
    elif path.suffix or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such text file: {source}; give a .txt or .jsonl file")


def text_batches(
    tokenizer: Any,
    source: str | Path | None = None,
    *,
    samples: int | None = 32,
    length: int = 512,
    batch_size: int = 8,
    part: Part = "calibration",
    field: str | None = None,
) -> list[Batch]:
    """Cut a text into windows of ``length`` tokens and batch them.

    The windows are the first ``samples`` ones of the text, in order; the same call gives the same batches.

    Args:
        tokenizer: a transformers tokenizer.
        source: see `read_text`.
        samples: number of windows; None for all that the text has.
        length: tokens a window.
        batch_size: windows a batch.
        part: which half of the default text.
        field: see `read_text`.

    Returns:
        Dictionaries with ``input_ids`` (batch, length).

    Raises:
        ValueError: the text is shorter than one window, there is no tokenizer, or a number is not positive.

    Example:
        >>> class Letters:
        ...     def __call__(self, text, **_):
        ...         return {"input_ids": [ord(letter) % 64 for letter in text]}
        >>> [tuple(batch["input_ids"].shape) for batch in text_batches(Letters(), samples=3, batch_size=2)]
        [(2, 512), (1, 512)]
    """
    if tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer; pass batches of token ids, or add tokenizer files")
    for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    text = read_text(source, part=part, field=field)

    def tokens(used: str) -> torch.Tensor:
        return torch.as_tensor(tokenizer(used, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)

    # Tokenizing more than is used costs minutes on a large file, and few texts have 32 characters a token.
    start = len(text) if samples is None else samples * length * 32
    ids = tokens(text[:start])
    if samples is not None and len(ids) < samples * length and start < len(text):
        ids = tokens(text)
    available = len(ids) // length
    if available == 0:
        name = "the text" if source is None else str(source)
        raise ValueError(f"{name} has {len(ids)} tokens, fewer than one sequence of {length}; lower the length")
    windows = ids[: min(samples or available, available) * length].reshape(-1, length)
    return [{"input_ids": chunk} for chunk in windows.split(batch_size)]


def as_batches(data: Iterable[Any]) -> list[Batch]:
    """Check what a caller gave as data: dictionaries of tensors, or tensors of token ids.

    Args:
        data: batches. A tensor is ``input_ids``, (batch, length) or one sequence (length,).

    Raises:
        ValueError: if there is none, or an element is something else.

    Example:
        >>> [batch["input_ids"].shape for batch in as_batches(torch.arange(6).reshape(2, 3))]
        [torch.Size([1, 3]), torch.Size([1, 3])]
    """
    if isinstance(data, Mapping):
        raise ValueError("data must be a list of batches, not a single one; put it in a list")
    batches = [_batch(element) for element in data]
    if not batches:
        raise ValueError("no data: the iterable of batches is empty")
    return batches


def single_examples(batches: Sequence[Mapping[str, torch.Tensor]], rows: int = 1) -> Iterator[Batch]:
    """The rows of batches, each as a batch of its own; or so many rows, what is left at the end of a batch too.

    Example:
        >>> [one["input_ids"].tolist() for one in single_examples([{"input_ids": torch.arange(4).reshape(2, 2)}])]
        [[[0, 1]], [[2, 3]]]
    """
    for batch in batches:
        size = next(iter(batch.values())).shape[0]
        for row in range(0, size, rows):
            yield {key: t[row : row + rows] if t.ndim and t.shape[0] == size else t for key, t in batch.items()}


def calibrating_and_judging(
    batches: Sequence[Mapping[str, torch.Tensor]], sequences: int = 16
) -> tuple[list[Batch], list[Batch]]:
    """The first rows of batches, each as a batch of its own: three quarters to calibrate trials on, the rest to judge.

    Args:
        batches: at least one row.
        sequences: how many rows; all if there are fewer.

    Returns:
        The two parts; a single row is there to judge by.

    Example:
        >>> tried, judged = calibrating_and_judging([{"input_ids": torch.arange(20).reshape(10, 2)}], sequences=8)
        >>> len(tried), len(judged)
        (6, 2)
    """
    rows = list(islice(single_examples(batches), sequences))
    cut = len(rows) - max(1, len(rows) // 4)
    return rows[:cut], rows[cut:]


def with_labels(batch: Mapping[str, torch.Tensor]) -> Batch:
    """A batch whose labels, by default its own tokens, leave padding out.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 0]])}
        >>> with_labels(batch)["labels"].tolist()
        [[5, -100]]
    """
    ids = batch["input_ids"]
    present = batch.get("attention_mask", torch.ones_like(ids)).bool()
    return {**batch, "labels": batch.get("labels", ids).masked_fill(~present, -100)}


def _batch(element: Any) -> Batch:
    if isinstance(element, torch.Tensor):
        if element.is_floating_point():
            raise ValueError('a tensor must hold token ids; give other inputs by name, as {"pixel_values": tensor}')
        element = {"input_ids": element.unsqueeze(0) if element.ndim == 1 else element}
    if not isinstance(element, Mapping):
        raise ValueError(f"a batch must be a dictionary of tensors or a tensor, not {type(element).__name__}")
    batch = {k: v for k, v in element.items() if isinstance(v, torch.Tensor)}
    if not batch:
        raise ValueError('a batch has no tensors in it; tokenize with return_tensors="pt"')
    ids = batch.get("input_ids")
    if ids is not None and (ids.ndim != 2 or not ids.numel()):
        raise ValueError(f"input_ids must be (batch, length) and not empty, got {tuple(ids.shape)}")
    return batch


def _jsonl(path: Path, raw: str, field: str) -> str:
    texts = []
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict) or field not in row:
            known = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path} line {number} has no field {field!r}, only {known}; name it with --field")
        texts.append(str(row[field]))
    return "\n\n".join(texts)


def _hub(source: str, field: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise FileNotFoundError(
            f"{source} is no file; to read it as a hub data set: pip install 'eckart[data]'"
        ) from error
    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train")
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(f"{source} is neither a file nor a data set that loads: {first}") from error
    if field not in rows.column_names:
        raise ValueError(f"{source} has no column {field!r}, only {', '.join(rows.column_names)}; name it with --field")
    return "\n\n".join(rows[field])
