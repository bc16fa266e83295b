"""Write a directory whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["CheckpointError", "atomic_directory", "becoming", "check_target", "flush_to_disk"]

_MARKS = ("config.json", "adapter_config.json")  # of a model, of an adapter


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says in one line why and what to do."""


def check_target(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Say where a directory will be written, or refuse, before any work is done for it.

    Args:
        path: the directory to write.
        force: allow an existing one to be replaced, if it is empty or holds a model (a ``config.json``) or an adapter
            (an ``adapter_config.json``).

    Returns:
        The absolute path with links resolved.

    Raises:
        FileExistsError: it exists, and ``force`` is not given or it does not look like a model.
        CheckpointError: nothing can be written there.
    """
    target = Path(path).expanduser().resolve()
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir():
        raise CheckpointError(f"cannot write {path}: {parent} is a file, not a directory; choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {path}: no permission to write in {parent}; choose another path")
    if not target.exists():
        return target
    if not force:
        raise FileExistsError(f"{path} exists already; choose another path or replace it with force (--force)")
    # A slip of the keyboard such as --out ~ must not delete a home directory.
    if not target.is_dir() or (any(target.iterdir()) and not any((target / mark).is_file() for mark in _MARKS)):
        raise FileExistsError(f"{path} is not a model directory (no config.json) and is not replaced; remove it first")
    return target


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Give a temporary directory beside ``path`` that becomes ``path`` when the block ends without an error.

    After any exception, ``KeyboardInterrupt`` included, it is removed, and an existing ``path`` is as before.

    Args:
        path: the directory to write; missing parents are made.
        force: replace an existing one, under the conditions of :func:`check_target`.

    Yields:
        An empty directory on the same file system.

    Raises:
        FileExistsError: see :func:`check_target`.
        CheckpointError: the operating system refused (no permission, no space), in the block or here.

    Example:
        >>> import tempfile
        >>> parent = Path(tempfile.mkdtemp())
        >>> with atomic_directory(parent / "model") as partial:
        ...     _ = (partial / "config.json").write_text("{}")
        >>> [file.name for file in parent.rglob("*")]
        ['model', 'config.json']
    """
    target = check_target(path, force=force)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with becoming(path, partial, force=force):
        yield partial


@contextlib.contextmanager
def becoming(
    path: str | os.PathLike[str],
    partial: Path,
    *,
    force: bool,
    kept: Callable[[BaseException], str | None] = lambda error: None,
) -> Iterator[None]:
    """Let the directory ``partial`` become ``path`` when the block ends without an error.

    Args:
        path: as in :func:`atomic_directory`.
        partial: a directory beside it, made if it is missing.
        force: as there.
        kept: called with what ended the block: the words to add if ``partial`` is to stay, or None to remove it.

    Raises:
        FileExistsError, CheckpointError: as there.
    """
    target = check_target(path, force=force)
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield
        _move_into_place(partial, target, force)
    except BaseException as error:
        left = kept(error)
        if left is None:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in missing:  # the innermost first; one that is in use meanwhile stays
                with contextlib.suppress(OSError):
                    parent.rmdir()
        if _is_operating_system(error):
            reason = _reason(error)
            raise CheckpointError(f"cannot write {path}: {reason}; {left or 'nothing was left behind'}") from error
        if left and not isinstance(error, CheckpointError):  # its message says what to do
            error.add_note(left)
        raise


def flush_to_disk(file: Path) -> None:
    """Wait until what was written to a file would outlive a loss of power."""
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def _move_into_place(partial: Path, target: Path, force: bool) -> None:
    # safetensors writes files that only the owner can read; give them the mode of any new file.
    mode = partial.stat().st_mode & 0o666
    for file in partial.rglob("*"):
        if file.is_file():
            file.chmod(mode)
    if not target.exists():
        os.rename(partial, target)
        return
    check_target(target, force=force)  # someone may have made it in the meantime
    old = partial.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(partial, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_operating_system(error: BaseException) -> bool:
    # safetensors reports a full disk as an error of its own.
    from safetensors import SafetensorError

    return isinstance(error, (OSError, SafetensorError)) and not isinstance(error, FileExistsError)


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
