"""Options that several commands have, with one wording, and what becomes of their values."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Model = Annotated[
    str, typer.Argument(help="A directory in transformers' format, a hub name, or `demo` for the embedded 135M model.")
]
Where = Annotated[
    list[str] | None,
    typer.Option(help="Only these layers: a glob such as '*.down_proj', or 're:...'. May be given several times."),
]
Dtype = Annotated[str, typer.Option(help="Floating-point type to load in: auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where to compute, for instance cpu, cuda or cuda:1.")]
Adapter = Annotated[str, typer.Option(help="Directory of a PEFT adapter to put on the model.  [default: none]")]
Field = Annotated[str, typer.Option(help="The field of a JSONL file, or column of a data set, that holds the text.")]
Length = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens a window.  [default: 512, or the model's context if that is shorter]"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def one_of(option: str, value: str, allowed: Iterable[str]) -> None:
    """Check a word.

    Raises:
        ValueError: with those that there are.

    Example:
        >>> one_of("--form", "dense", ["plain", "pivoted"])
        Traceback (most recent call last):
            ...
        ValueError: --form must be one of plain, pivoted, not 'dense'
    """
    known = list(allowed)
    if value not in known:
        raise ValueError(f"{option} must be one of {', '.join(known)}, not {value!r}")


def prepare(dtype: str, device: str) -> None:
    """Check where and in which type to compute, and keep the libraries' own bars and notes out of ours.

    Raises:
        ValueError: there is no such type or device here.
    """
    one_of("--dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    import torch

    # Where they are installed, transformers imports these, and they tell of the kernels that they lack.
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    import transformers

    # Their own deprecations, which nobody who types a command can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} is of no use here: {reason}") from error


def load_model(name: str | Path, dtype: str, device: str, *, progress: bool = True) -> tuple[Any, Any]:
    """Load a model and its tokenizer, with a sign of life on stderr; see `eckart.models.load`."""
    from eckart.models import load, resolve
    from eckart.models.progress import waiting

    source = resolve(name)  # a download or a conversion has a bar of its own
    with waiting("loading", enabled=progress):
        return load(source, dtype=dtype, device=device)


def load_with_adapter(name: str, adapter: str, dtype: str, device: str, *, progress: bool = True) -> tuple[Any, Any]:
    """Load a model and its tokenizer, with the adapter in a directory on it if one is named.

    Raises:
        FileNotFoundError: there is no such model or adapter.
        ValueError: the adapter does not belong on the model.
    """
    from eckart.cli._output import print_note
    from eckart.models import resolve
    from eckart.models.adapter_files import check_base, is_adapter, load_adapter

    if not adapter:
        return load_model(name, dtype, device, progress=progress)
    if not is_adapter(adapter):
        raise FileNotFoundError(f"no adapter in {adapter}: it has no adapter_config.json")
    note = check_base(adapter, resolve(name))
    if note:
        print_note("note", note)
    loaded, tokenizer = load_model(name, dtype, device, progress=progress)
    return load_adapter(loaded, adapter), tokenizer


def window_length(model: Any, asked: int | None) -> int:
    """Tokens a window: what was asked for, or what suits the model (or its configuration).

    Raises:
        ValueError: the model's context is shorter.
    """
    from eckart.models.evaluate import context_length

    longest = context_length(model) or asked or 512
    if asked is not None and asked > longest:
        raise ValueError(f"--length {asked} is longer than the model's context of {longest} tokens; lower it")
    return asked or min(512, longest)


def parse_bytes(text: str) -> float:
    """A size such as 200MB, 1.5GB, 300MiB or 4096.

    Raises:
        ValueError: if it is none.

    Example:
        >>> parse_bytes("1.5GB"), parse_bytes("2 MiB"), parse_bytes("4096")
        (1500000000.0, 2097152.0, 4096.0)
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, letter: 1000**power, f"{letter}IB": 1024**power}
    digits = text.strip().rstrip("BKMGTIbkmgti ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        return float(digits) * units[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no size; write 200MB, 1.5GB or a number of bytes") from None


def parse_setting(pair: str) -> tuple[str, Any]:
    """An option of a method, from name=value: a number, numbers with commas, true, false, none or a word.

    Raises:
        ValueError: if there is no name or no value.

    Example:
        >>> parse_setting("ridge=1e-4"), parse_setting("update=true"), parse_setting("whitening=eigen")
        (('ridge', 0.0001), ('update', True), ('whitening', 'eigen'))
        >>> parse_setting("blocks=0,-1"), parse_setting("blocks=-1,")
        (('blocks', (0, -1)), ('blocks', (-1,)))
    """
    name, _, text = (part.strip() for part in pair.partition("="))
    if not name or not text:
        raise ValueError(f"--set {pair!r} is not name=value")
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    value: Any = words.get(text.lower(), text)
    for kind in (int, float):
        try:
            value = tuple(map(kind, filter(None, text.split(",")))) if "," in text else kind(text)
            break
        except ValueError:
            continue
    return name.replace("-", "_"), value
