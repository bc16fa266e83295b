"""Load and save whole models with the formats and the code of transformers."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .demo import DEMO, demo_path
from .files import CheckpointError, atomic_directory, check_target
from .quantizer import mark

__all__ = ["load", "load_tokenizer", "resolve", "save"]

# Any of these makes a tokenizer. transformers would otherwise invent an empty one for some model types.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
# What a hub repository is asked for: not its training state, other frameworks' weights or a second copy of the weights.
_HUB_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_HUB_WEIGHTS = (["model*.safetensors"], ["pytorch_model*.bin"])
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, Any | None]:
    """Load a model and its tokenizer.

    Args:
        name_or_path: a directory in transformers' format (dense, or written by :func:`save`), a name on the Hugging
            Face hub, or ``"demo"`` for the embedded SmolLM2-135M-Instruct (a directory of that name is ``"./demo"``).
        dtype: floating-point type of the weights; ``"auto"`` keeps the checkpoint's.
        device: where to put it; default the CPU.

    Returns:
        The model in eval mode, of the class that the checkpoint names, and its tokenizer, or None if it has none.

    Raises:
        FileNotFoundError: there is no such model.
        CheckpointError: it is there and cannot be read.

    Example:
        >>> load("./no-such-model")
        Traceback (most recent call last):
            ...
        FileNotFoundError: no model at ./no-such-model: the path does not exist
    """
    path = resolve(name_or_path)
    placement = {} if device is None else {"device_map": {"": torch.device(device)}}
    with _reading(path):
        config = AutoConfig.from_pretrained(path)
        model = _model_class(config).from_pretrained(path, dtype=dtype, **placement)
    return model.eval(), load_tokenizer(path)


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Any | None:
    """Load a model's tokenizer alone.

    Args:
        name_or_path: what :func:`load` takes.

    Returns:
        The tokenizer, or None if the checkpoint has none.

    Raises:
        FileNotFoundError: there is no such model.
        CheckpointError: the tokenizer is there and cannot be read.
    """
    path = resolve(name_or_path)
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        return None
    with _reading(path):
        return AutoTokenizer.from_pretrained(path)


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """Say in which directory a model's files are, after fetching or converting them if that has not been done.

    Args:
        name_or_path: what :func:`load` takes.

    Returns:
        The directory itself; the demo's place in Eckart's cache; or the place of a hub model in the hub's cache.

    Raises:
        FileNotFoundError: there is no such model.
        CheckpointError: the demo model is not installed, or its place cannot be written.
    """
    name = str(name_or_path)
    path = demo_path() if name == DEMO else Path(name)
    if not path.is_dir():
        if path.exists():
            raise FileNotFoundError(f"{name} is a file; give the directory with config.json and the weights")
        if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is None:
            raise FileNotFoundError(f"no model at {name}: the path does not exist")
        path = _from_hub(name)
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{name} is an adapter, not a model; give its base model, or merge the two")
        raise FileNotFoundError(f"no model in {name}: it has no config.json")
    return path


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    tokenizer: Any | None = None,
    *,
    history: Sequence[Any] | None = None,
    force: bool = False,
    max_shard_size: int | str = "5GB",
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Save a model with its structures, so that plain ``from_pretrained`` loads it after ``import eckart``.

    The directory appears whole or not at all.

    Args:
        model: a transformers model, with or without structures (without, an ordinary checkpoint is written).
        path: directory to write.
        tokenizer: tokenizer or processor to save beside it.
        history: entries to add to the model's history, see :func:`~eckart.models.mark`.
        force: replace a model that is there already.
        max_shard_size: largest weight file, in bytes or as in ``"5GB"``.
        beside: writes what else belongs into the directory, before it appears.

    Returns:
        The absolute path.

    Raises:
        FileExistsError: ``path`` exists and ``force`` is not given, or it is not a model's directory.
        CheckpointError: it cannot be written (permission, space).
        ValueError: ``model`` is not a transformers model, or not one of which the weights can be described.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"cannot save a {type(model).__name__}: it is not a transformers model (merge and unload an adapter first)"
        )
    target = check_target(path, force=force)
    mark(model, history)
    with atomic_directory(target, force=force) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if beside is not None:
            beside(partial)
    return target


def _from_hub(name: str) -> Path:
    """Fetch what a model needs from the Hugging Face hub, or find it in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        for weights in _HUB_WEIGHTS:
            path = Path(snapshot_download(name, allow_patterns=_HUB_FILES + weights))
            if any(any(path.glob(pattern)) for pattern in weights):
                break
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"the model {name!r} is gated: ask for access on its page of the Hugging Face hub, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no model {name!r}: it is not a directory, and the Hugging Face hub does not have it "
            "(if it is private: `hf auth login`)"
        ) from error
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model {name!r}: it is not a directory, and the Hugging Face hub did not give it ({_first_line(error)})"
        ) from error
    return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what reading a damaged checkpoint raises into one line that names the place."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"the weights in {path} are damaged: {_first_line(error)}") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot read the model in {path}: {_first_line(error)}") from error


def _model_class(config: PreTrainedConfig) -> Any:
    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    for auto_name in _AUTO_CLASSES:
        auto: Any = getattr(transformers, auto_name)
        if type(config) in auto._model_mapping:
            return auto
    raise CheckpointError(f"transformers {transformers.__version__} has no model for the type {config.model_type!r}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
