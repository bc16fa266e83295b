"""One progress bar for everything that takes long: what is done, how much is left, how long it will take."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

__all__ = ["track", "waiting"]

T = TypeVar("T")


def track(items: Sequence[T], description: str, *, enabled: bool = True) -> Generator[T, None, None]:
    """Yield ``items`` and draw a bar with the time left on stderr.

    Nothing is drawn if not ``enabled``, or where stderr is no terminal.
    """
    if not enabled:
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # else it leaves an empty line in a file
    ) as bar:
        task = bar.add_task(description, total=len(items))
        for item in items:
            yield item
            bar.advance(task)


@contextlib.contextmanager
def waiting(description: str, *, enabled: bool = True) -> Iterator[None]:
    """Show on stderr that something takes a while, in place of the bars of the libraries that do it.

    Nothing is drawn if not ``enabled``, or where stderr is no terminal.
    """
    import sys

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(file=sys.stderr)  # the real one, not what it is replaced by below
    hidden = not (enabled and console.is_terminal)
    with Progress(*columns, console=console, transient=True, redirect_stderr=False, disable=hidden) as bar:
        bar.add_task(description, total=None)
        with contextlib.redirect_stderr(io.StringIO()):
            yield
