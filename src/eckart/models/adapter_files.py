"""Adapters on disk: put one on its base model, or say in one line why it does not belong there; save both together."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from ..linalg import relative_error
from .adapted import under_adapters
from .checkpoint import save
from .files import check_target
from .stored import LayoutError, stored_linears

__all__ = ["BESIDE", "check_base", "is_adapter", "load_adapter", "save_with_adapter"]

BESIDE = "adapter"  # the directory of an adapter in that of the model that it is on

_ROUNDED = 0.01  # relative: a base that was rounded to half precision is still the same base


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds an adapter in PEFT's format.

    Example:
        >>> is_adapter("no-such-directory")
        False
    """
    return (Path(path) / "adapter_config.json").is_file()


def check_base(path: str | os.PathLike[str], base: str | os.PathLike[str]) -> str | None:
    """Compare the base that an adapter names with the one that it is to be put on.

    Args:
        path: directory of the adapter.
        base: directory of the base model.

    Returns:
        What could not be checked, for people to read, or None.

    Raises:
        ValueError: the adapter was made for another base, of which the weights are here and differ.
    """
    stated = json.loads((Path(path) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not stated or Path(stated).resolve() == Path(base).resolve():
        return None
    if not (Path(stated) / "config.json").is_file():
        return f"the adapter was made for {stated}, which is not here; that {base} is the same is taken for granted"
    try:
        theirs = {ref.name: ref for ref in stored_linears(Path(stated)).linears}
        ours = {ref.name: ref for ref in stored_linears(Path(base)).linears}
    except (LayoutError, FileNotFoundError):
        return f"the adapter was made for {stated}; whether {base} is the same could not be checked"
    names = list(ours)
    same = names == list(theirs) and all(ours[name].shape == theirs[name].shape for name in names)
    for name in [names[0], names[-1]] if same else []:
        same = same and float(relative_error(theirs[name].weight, ours[name].weight)) < _ROUNDED
    if not same:
        raise ValueError(f"the adapter in {path} was made for {stated}, which differs from {base}; give that base")
    return None


def load_adapter(model: Any, path: str | os.PathLike[str]) -> Any:
    """Put an adapter on a model.

    Args:
        model: its base, a transformers model; its layers are wrapped in place.
        path: directory of the adapter, PEFT's or ours.

    Returns:
        The PEFT model, in eval mode.

    Raises:
        FileNotFoundError: the adapter's weights are missing.
        ValueError: it does not fit the model, or tensors are missing.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    if not any((Path(path) / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise FileNotFoundError(f"{path} has an adapter_config.json and no adapter_model.safetensors; copy it again")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            made: Any = PeftModel.from_pretrained(model, str(path))
        except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            # The first of several lines only announces the others.
            raise ValueError(f"the adapter in {path} does not fit the model: {(lines[1:] or lines)[0]}") from error
    if any("missing adapter keys" in str(warning.message) for warning in said):
        raise ValueError(f"the adapter in {path} lacks tensors that its configuration asks for; it is damaged")
    return made.eval()


def save_with_adapter(
    adapted: Any, path: str | os.PathLike[str], tokenizer: Any | None = None, *, force: bool = False
) -> Path:
    """Save the model under an adapter, and in its directory ``adapter/`` the adapter, which names it as its base.

    Both are loaded by plain transformers and PEFT after ``import eckart``; the model alone is loaded without the
    adapter. The directory appears whole or not at all.

    Args:
        adapted: a PEFT model of a transformers model, with or without structures; not changed.
        path: directory to write.
        tokenizer: tokenizer or processor to save with the model.
        force: replace a model that is there already.

    Returns:
        The absolute path of the model.

    Raises:
        FileExistsError: ``path`` exists and ``force`` is not given, or it is not a model's directory.
        CheckpointError: it cannot be written (permission, space).
        ValueError: the model under the adapter cannot be saved, see `save`.
    """
    target = check_target(path, force=force)
    for name in adapted.active_adapters:
        adapted.peft_config[name].base_model_name_or_path = str(target)

    def adapter(directory: Path) -> None:
        # The base is not there yet, so PEFT could not look up whether its vocabulary has grown; it has not.
        adapted.save_pretrained(str(directory / BESIDE), save_embedding_layers=False)

    model: Any = under_adapters(adapted)
    return save(model, target, tokenizer, force=force, beside=adapter)
