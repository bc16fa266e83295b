"""A directory that may take several runs to write: what is finished of it outlives what ends a run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..linalg import LinalgError
from .files import becoming, flush_to_disk

__all__ = ["UNFINISHED", "Journal", "check_unfinished", "resumable_directory"]

#: The file in the directory that says what is finished.
UNFINISHED = "unfinished.json"

# A request or a model that is no good, which another try would not change.
_REFUSALS = (ValueError, LinalgError)


class Journal:
    """What is finished of a directory, in a small file in it.

    Args:
        directory: where; it exists.
        resume: go on with what an earlier run left there, if it left something.

    Attributes:
        directory: the same.
        facts: what was found out for the whole, JSON values by name.
        parts: what there is to say of each finished part, JSON values in order.
    """

    def __init__(self, directory: Path, *, resume: bool = False) -> None:
        self.directory = directory
        self.facts: dict[str, Any] = {}
        self.parts: list[Any] = []
        self._file = directory / UNFINISHED
        self._resume = resume
        self._request: dict[str, Any] = {}
        self._is_new = False

    def begin(self, request: Mapping[str, Any]) -> None:
        """Go on with an earlier run that was asked for the same; without ``resume`` remove what it left.

        Args:
            request: all that the result depends on, JSON values by a name that the user understands.

        Raises:
            ValueError: the earlier run was asked for something else, named here; nothing is changed.
        """
        self._request = json.loads(json.dumps(request))
        if not (self._resume and self._file.is_file()):
            self._is_new = True
            _empty(self.directory)
            return
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
            before, facts, parts = (state[key] for key in ("request", "facts", "parts"))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self._file} is damaged; start anew with force (--force)") from error
        different = [
            _described(key, before.get(key), self._request.get(key))
            for key in {**before, **self._request}
            if before.get(key) != self._request.get(key)
        ]
        if different:
            raise ValueError(
                f"the run that left {self.directory} differs in {', '.join(different)}; "
                "ask for the same, or start anew with force (--force)"
            )
        self.facts, self.parts = facts, parts

    def note(self, name: str, value: Any) -> None:
        """Keep a fact about the whole."""
        self.facts[name] = value
        self._write()

    def add(self, part: Any) -> None:
        """Keep what there is to say of the next part, once everything of it is on disk."""
        self.parts.append(part)
        self._write()

    def close(self) -> None:
        """Everything is finished: the directory needs no journal any more."""
        self._file.unlink(missing_ok=True)

    def outlives(self, error: BaseException) -> bool:
        """Whether the directory stays after an error: if something is finished, unless this run is new and refused."""
        return self._file.is_file() and not (self._is_new and isinstance(error, _REFUSALS))

    def _write(self) -> None:
        state = {"version": 1, "request": self._request, "facts": self.facts, "parts": self.parts}
        new = self._file.with_suffix(".new")
        try:
            new.write_text(json.dumps(state) + "\n", encoding="utf-8")
            flush_to_disk(new)
            os.replace(new, self._file)  # at any moment there is a whole one
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def check_unfinished(path: str | os.PathLike[str], *, force: bool = False, resume: bool = False) -> Path:
    """Say where a directory is kept while it is unfinished, or refuse to pass over what an earlier run left there.

    Args:
        path: the directory to write.
        force: what is there may be replaced.
        resume: it is to be gone on with.

    Raises:
        FileExistsError: an earlier run left something, and neither is given.
    """
    target = Path(path).expanduser().resolve()
    partial = target.with_name(f".{target.name}.partial")
    if (partial / UNFINISHED).is_file() and not (force or resume):
        raise FileExistsError(
            f"an earlier run for {path} left {partial}; "
            "go on with resume (--resume), or start anew with force (--force)"
        )
    return partial


@contextlib.contextmanager
def resumable_directory(
    path: str | os.PathLike[str], *, force: bool = False, resume: bool = False
) -> Iterator[Journal]:
    """As `atomic_directory`, but what the journal calls finished stays beside ``path`` for another run.

    Args:
        path: the directory to write.
        force: replace an existing one, and what an earlier run left.
        resume: go on with what an earlier run left, if it left something.

    Yields:
        The journal of a temporary directory on the same file system; `Journal.begin` comes before all else.

    Raises:
        FileExistsError: ``path`` or something unfinished is there and may not be replaced, or another process is at it.
        CheckpointError: as `atomic_directory`; the message says if something is kept.

    Example:
        >>> import tempfile
        >>> parent = Path(tempfile.mkdtemp())
        >>> try:
        ...     with resumable_directory(parent / "model") as journal:
        ...         journal.begin({"ratio": 0.2})
        ...         journal.add("the first block")
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt as stop:
        ...     print(stop.__notes__[0].split(" in ")[0])
        what is finished is kept
        >>> with resumable_directory(parent / "model", resume=True) as journal:
        ...     journal.begin({"ratio": 0.2})
        ...     journal.parts
        ['the first block']
        >>> [file.name for file in parent.rglob("*")]
        ['model']
    """
    partial = check_unfinished(path, force=force, resume=resume)
    journal = Journal(partial, resume=resume)

    def kept(error: BaseException) -> str | None:
        if not (isinstance(error, _BusyError) or journal.outlives(error)):
            return None
        silent = isinstance(error, (_BusyError, *_REFUSALS))  # its message says what to do
        return "" if silent else f"what is finished is kept in {partial}: go on with --resume"

    with becoming(path, partial, force=force, kept=kept):
        with _alone_in(partial):
            yield journal
        journal.close()


class _BusyError(FileExistsError):
    """Another process is writing the directory."""


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep other processes out of a directory; the system lets them in again when this one dies."""
    if sys.platform == "win32":  # has no such locks
        yield
        return
    import fcntl

    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _BusyError(f"another process is writing {directory}; wait for it or choose another path") from None
        yield
    finally:
        os.close(lock)


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _described(key: str, before: Any, now: Any) -> str:
    """What differs, with both values where they are short enough to be read."""
    values = [value if isinstance(value, str) else json.dumps(value) for value in (before, now)]
    return f"{key} ({values[0]}, now {values[1]})" if max(map(len, values)) <= 40 else key
