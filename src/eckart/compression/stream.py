"""Compress a checkpoint from disk to disk, block by block: peak memory is a few blocks, not the model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..models.files import atomic_directory, check_target
from ..models.result import Result
from ..models.stream import StreamedModel
from .compress import compress
from .request import AnyMethod

__all__ = ["compress_checkpoint"]


def compress_checkpoint(
    source: str | Path,
    out: str | Path,
    method: str | AnyMethod = "pifa",
    *,
    data: Iterable[Any] | None = None,
    tokenizer: Any = None,
    force: bool = False,
    **settings: Any,
) -> Result:
    """`compress` for a checkpoint that does not fit in memory.

    Args:
        source: directory of a dense safetensors checkpoint.
        out: directory to write; complete or absent, never half-written.
        method: as in `compress`; methods that need gradients cannot be streamed.
        data: calibration batches.
        tokenizer: for the default calibration text; saved beside the weights if given.
        force: replace ``out`` if it exists.
        settings: budget, ``where``, ``allocation``, ``form``, ``progress`` and options, as in `compress`.

    Returns:
        What was done; ``result.model`` is None.

    Raises:
        FileExistsError: ``out`` exists and not ``force``.
        FileNotFoundError: ``source`` has no safetensors checkpoint.
        CheckpointError: ``out`` cannot be written.
        ValueError, LinalgError: as `compress`.
    """
    target = check_target(out, force=force)
    streamed = StreamedModel(Path(source))
    model: Any = streamed.model
    with atomic_directory(target, force=force) as partial:
        streamed.target = partial
        result = compress(model, method, data=data, tokenizer=tokenizer, weights=streamed, **settings)
        streamed.finish()
        for part in (model.config, getattr(model, "generation_config", None), tokenizer):
            if part is not None:
                part.save_pretrained(partial)
    result.model = None
    return result
