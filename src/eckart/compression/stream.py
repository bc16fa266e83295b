"""Compress a checkpoint from disk to disk, block by block: peak memory is a few blocks, not the model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, get_args

from ..models.files import check_target
from ..models.journal import check_unfinished, resumable_directory
from ..models.result import Result
from ..models.stream import StreamedModel
from .compress import compress
from .engine import Engine, EngineName, Local, Ray
from .finished import Finished
from .request import AnyMethod, Streaming

__all__ = ["compress_checkpoint"]


def compress_checkpoint(
    source: str | Path,
    out: str | Path,
    method: str | AnyMethod = "pifa",
    *,
    data: Iterable[Any] | None = None,
    tokenizer: Any = None,
    force: bool = False,
    resume: bool = False,
    engine: EngineName = "local",
    **settings: Any,
) -> Result:
    """`compress` for a checkpoint that does not fit in memory.

    What is finished when the run is killed, interrupted, or finds the disk full is kept beside ``out``, block by block.

    Args:
        source: directory of a dense safetensors checkpoint.
        out: directory to write; complete or absent, never half-written.
        method: as in `compress`; methods that need gradients cannot be streamed.
        data: calibration batches.
        tokenizer: for the default calibration text; saved beside the weights if given.
        force: replace ``out`` if it exists, and what an earlier run for it has left unless ``resume``.
        resume: go on after the last block that an earlier run for ``out`` has finished, if it has left something. It
            must have been asked for the same; the files are then those of an uninterrupted run, bit for bit.
        engine: who factorises: "local", one matrix at a time with all of torch's threads, or "ray", as many at a time
            as the Ray cluster has cores, one thread each (`eckart.compression.engine.Ray`). Forward passes and writing
            stay in this process. Not for methods that fit layers one by one to those before them.
        settings: budget, ``where``, ``allocation``, ``form``, ``progress`` and options, as in `compress`.

    Returns:
        What was done; ``result.model`` is None, and time and memory are this run's.

    Raises:
        FileExistsError: ``out``, or what an earlier run for it left, exists and neither is to be replaced or gone on
            with; or another process is writing it.
        FileNotFoundError: ``source`` has no safetensors checkpoint.
        CheckpointError: ``out`` cannot be written; the message says what is kept.
        EngineError: Ray gave up.
        ImportError: Ray is not installed.
        ValueError, LinalgError: as `compress`; or the earlier run was asked for something else, which is named.
    """
    target = check_target(out, force=force)
    check_unfinished(target, force=force, resume=resume)
    if engine not in get_args(EngineName):
        raise ValueError(f"engine must be one of {', '.join(get_args(EngineName))}, not {engine!r}")
    streamed = StreamedModel(Path(source))
    model: Any = streamed.model
    solver: AbstractContextManager[Engine] = nullcontext(Local(1))  # memory is what is short: one matrix at a time
    if engine == "ray":
        solver = Ray(streamed.remote)
    with resumable_directory(target, force=force, resume=resume) as journal, solver as chosen:
        streamed.target = journal.directory
        streaming = Streaming(streamed, chosen, Finished(journal, streamed))
        result = compress(model, method, data=data, tokenizer=tokenizer, streaming=streaming, **settings)
        streamed.finish()
        for part in (model.config, getattr(model, "generation_config", None), tokenizer):
            if part is not None:
                part.save_pretrained(journal.directory)
    result.model = None
    return result
