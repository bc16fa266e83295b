"""Who solves the matrix problems of a compression: threads of this process, or the workers of a Ray cluster.

A task is a value, such as `eckart.compression.layer.Fit`, that is called with a linear and its statistics. The walk
over the blocks hands tasks to an engine and does not know which one it is. The results are the same.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch

from ..models.calibrate import Statistics
from ..models.memory import release_memory
from ..models.parallel import parallel_map
from ..models.reader import RemoteLinear
from ..models.select import LinearRef
from ..models.weights import decomposition_cost
from .contract import LayerMethod

__all__ = ["Engine", "EngineError", "EngineName", "Local", "Ray", "Task"]

EngineName = Literal["local", "ray"]

R = TypeVar("R")
#: A linear and its statistics (None: no calibration token came there) -> result.
Task = Callable[[LinearRef, Statistics | None], R]

# How often Ray starts a task again whose worker died; its own default.
_RETRIES = 3


class EngineError(RuntimeError):
    """The workers failed, and not the mathematics; the message says in one line what to do."""


class Engine(Protocol):
    """Solves independent problems, one for each linear."""

    def check(self, method: Any, name: str) -> None:
        """Refuse a method for which it can do nothing, before anything is started.

        Args:
            method: how to compress.
            name: what messages call the method.

        Raises:
            ValueError: naming the remedy.
        """

    def map(self, task: Task[R], members: Sequence[LinearRef], statistics: Mapping[str, Statistics]) -> Iterator[R]:
        """Results for the linears of a block, in order; what came out may change a linear before the next is asked for.

        Args:
            task: what to do; it and its results can be pickled.
            members: linears whose weights are in memory.
            statistics: of each linear by name; where there are none, the task gets None.
        """
        ...

    def imap(self, task: Task[R], blocks: Sequence[Sequence[LinearRef]]) -> Iterator[Iterator[R]]:
        """Results as of `map`, block by block, for a task that needs no statistics.

        A block is asked for when its weights are in memory; an engine that reads them itself may have begun before.
        """
        ...


class Local:
    """Threads of this process.

    Args:
        workers: how many; default torch's number of threads. With one, a linear is worked on when its result is asked
            for, with all of torch's threads and in the memory of one.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers

    def check(self, method: Any, name: str) -> None:
        """Whatever can be done at all can be done here."""

    def map(self, task: Task[R], members: Sequence[LinearRef], statistics: Mapping[str, Statistics]) -> Iterator[R]:
        """Side by side, or one after the other as they are asked for."""

        def run(ref: LinearRef) -> R:
            return task(ref, statistics.get(ref.name))

        if self._workers != 1:
            yield from parallel_map(run, members, cost=decomposition_cost, workers=self._workers)
            return
        for ref in members:
            yield run(ref)
            release_memory()

    def imap(self, task: Task[R], blocks: Sequence[Sequence[LinearRef]]) -> Iterator[Iterator[R]]:
        """Each block when it is asked for."""
        for members in blocks:
            yield self.map(task, members, _without_data(members))


class Ray:
    """Tasks of a Ray cluster: the one that runs already (``RAY_ADDRESS``), or one of all cores of this machine.

    A worker reads its weight from the checkpoint by itself, so on several machines the path must be the same on all;
    statistics go through Ray's object store. Each task has one core and one thread. A task whose worker dies is started
    again. Ray is started at the first task, and stopped at the end if it was started here.

    Args:
        remote: what a worker needs to read a linear.

    Example:
        >>> from eckart.compression.pifa import PIFA
        >>> Ray.check(PIFA(), "pifa")
        Traceback (most recent call last):
            ...
        ValueError: pifa fits each layer to what became of those before it; use --engine local (engine="local")
    """

    def __init__(self, remote: Callable[[LinearRef], RemoteLinear]) -> None:
        self._remote = remote
        self._pending: set[Any] = set()
        self._submitted: Any = None
        self._owned = False

    @staticmethod
    def check(method: Any, name: str) -> None:
        """Refuse a method that does not work weight by weight, each for itself.

        Raises:
            ValueError: naming the remedy.
            ImportError: Ray is not installed.
        """
        why = ""
        if not isinstance(method, LayerMethod):
            why = "does not work weight by weight"
        elif method.sequential:
            why = "fits each layer to what became of those before it"
        if why:
            raise ValueError(f'{name} {why}; use --engine local (engine="local")')
        _ray()

    def __enter__(self) -> Ray:
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what is not finished, and stop Ray if it was started here."""
        if self._submitted is None:
            return
        ray = _ray()
        with contextlib.suppress(ray.exceptions.RayError):
            for reference in self._pending:
                ray.cancel(reference)
        if self._owned:
            ray.shutdown()

    def map(self, task: Task[R], members: Sequence[LinearRef], statistics: Mapping[str, Statistics]) -> Iterator[R]:
        """All of a block at once."""
        return self._results(self._submit(task, members, statistics))

    def imap(self, task: Task[R], blocks: Sequence[Sequence[LinearRef]]) -> Iterator[Iterator[R]]:
        """As many blocks ahead of the one that is asked for as keep all workers busy."""
        begun: deque[list[Any]] = deque()
        for members in blocks:
            begun.append(self._submit(task, members, _without_data(members)))
            if sum(map(len, begun)) - len(begun[0]) >= self._ahead():
                yield self._results(begun.popleft())
        while begun:
            yield self._results(begun.popleft())

    def _submit(self, task: Task[R], members: Sequence[LinearRef], statistics: Mapping[str, Statistics]) -> list[Any]:
        ray = self._connected()
        stored: dict[int, Any] = {}
        references = []
        for ref in members:
            known = statistics.get(ref.name)
            if id(known) not in stored:  # linears that share an input share one Gram matrix
                stored[id(known)] = ray.put(known)
            references.append(self._submitted.remote(task, self._remote(ref), stored[id(known)]))
        self._pending.update(references)
        return references

    def _results(self, references: list[Any]) -> Iterator[Any]:
        ray = _ray()
        waiting = deque(references)
        del references  # Ray keeps a result for as long as it is referred to
        while waiting:
            reference = waiting.popleft()
            try:
                result = ray.get(reference)
            except ray.exceptions.RayTaskError as failure:
                raise failure.cause from None  # what the task raised
            except ray.exceptions.RayError as failure:
                raise EngineError(
                    f"Ray gave up a task ({_in_short(failure)}); look at its workers, or use "
                    '--engine local (engine="local")'
                ) from failure
            self._pending.discard(reference)
            del reference
            yield result

    def _ahead(self) -> int:
        return 2 * int(_ray().cluster_resources().get("CPU", 1))

    def _connected(self) -> Any:
        ray = _ray()
        if self._submitted is None:
            if not ray.is_initialized():
                try:
                    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
                except Exception as failure:  # of many kinds: no such address, another version, no memory
                    raise EngineError(
                        f"Ray cannot be reached or started ({_in_short(failure)}); check RAY_ADDRESS, or use "
                        '--engine local (engine="local")'
                    ) from failure
                self._owned = True
            self._submitted = ray.remote(num_cpus=1, max_retries=_RETRIES)(_in_a_worker)
        return ray


def _in_a_worker(task: Task[R], linear: RemoteLinear, statistics: Statistics | None) -> R:
    """One task, in a process that Ray started."""
    threads = _ray().get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(threads)))
    with torch.no_grad():
        return task(linear.load(), statistics)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("the ray engine needs Ray: pip install 'eckart[ray]'") from error
    return ray


def _in_short(failure: Exception) -> str:
    """The kind and the first sentence of what Ray says at length."""
    sentence = " ".join(str(failure).split()).partition(". ")[0].rstrip(".")
    return f"{type(failure).__name__}: {sentence}"


def _without_data(members: Sequence[LinearRef]) -> dict[str, Statistics]:
    return dict.fromkeys([ref.name for ref in members], Statistics())
