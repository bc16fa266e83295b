"""A dense model and its compressed copy side by side: what each layer sees in both."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..linalg.gram import accumulate_cross_gram, accumulate_gram, symmetrize
from ..models.calibrate import Statistics, input_order, rows_of, watch
from ..models.replay import Batch, BlockCall, Hidden, Replay
from ..models.select import LinearRef
from ..models.topology import Block

__all__ = ["Pair"]


class Pair:
    """Two walks over one model: as it was, and as it is while its layers are replaced one after the other.

    Only one block is kept as it was, and its weights are shared with the model until they are replaced.

    Args:
        model: the model that is being compressed.
        blocks: its blocks.
        batches: calibration data.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> None:
        self._blocks = blocks
        self._dense, self._actual = (Replay(model, blocks, batches) for _ in range(2))
        self._wanted: Hidden | None = None
        self._arriving: Hidden | None = None
        self._index = -1
        self._original: nn.Module = nn.Identity()

    @contextlib.contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Work on block ``index``, the one after the last; when this ends, both walks have passed it."""
        self._index = index
        self._original = _same_weights(self._blocks[index].module)
        self._wanted = self._dense.enter(index, self._wanted)
        self._arriving = self._actual.enter(index, self._arriving)
        yield
        self._wanted = self._dense.advance(index, self._wanted, self._original)
        self._arriving = self._actual.advance(index, self._arriving)
        self._original = nn.Identity()

    def groups(self, members: Sequence[LinearRef]) -> list[list[LinearRef]]:
        """The linears of the block by the input they share, in execution order; none that no batch reaches."""
        assert self._arriving is not None
        return input_order(self._actual, self._index, self._arriving, members)

    def statistics(self, head: LinearRef, needs: frozenset[str]) -> Statistics:
        """Statistics of the input of ``head`` in both models. Each pass ends once the input is known."""
        assert self._wanted is not None
        assert self._arriving is not None
        relative = head.name.removeprefix(self._blocks[self._index].name + ".")
        twin = LinearRef(head.name, self._original.get_submodule(relative), head.kind)
        result = Statistics()
        for batch, (wanted, arriving) in enumerate(zip(self._wanted, self._arriving, strict=True)):
            if wanted is None or arriving is None:
                continue
            arrived, whole = self._input(self._actual, batch, arriving, head)
            if arrived is None:
                continue
            meant, _ = self._input(self._dense, batch, wanted, twin, self._original)
            if meant is None or meant.shape != arrived.shape or not whole:
                meant = arrived  # an expert's tokens: those of the two models cannot be paired
            result.update(meant, needs)
            _add(result, meant, arrived, needs)
        if result.compressed_gram is not None:
            symmetrize(result.compressed_gram)
        return result.finish()

    def _input(
        self, replay: Replay, batch: int, state: torch.Tensor, ref: LinearRef, module: nn.Module | None = None
    ) -> tuple[torch.Tensor | None, bool]:
        """The rows (tokens, n) that reach a linear, and whether they are all tokens in order."""
        found: list[tuple[torch.Tensor, bool]] = []

        def see(_: LinearRef, x: torch.Tensor, call: BlockCall) -> bool:
            found.append((rows_of(x, call), x.ndim > 2 or len(x) == state[..., 0].numel()))
            return True

        replay.run(self._index, batch, state, watch([ref], see), module)
        return found[0] if found else (None, False)


def _add(result: Statistics, meant: torch.Tensor, arrived: torch.Tensor, needs: frozenset[str]) -> None:
    def zeros() -> torch.Tensor:
        width = arrived.shape[-1]
        return torch.zeros(width, width, dtype=torch.float64, device=arrived.device)

    if result.compressed_gram is None:
        result.compressed_gram = zeros()
    accumulate_gram(result.compressed_gram, arrived)
    if "cross_gram" in needs:
        if result.cross_gram is None:
            result.cross_gram = zeros()
        accumulate_cross_gram(result.cross_gram, meant, arrived)


def _same_weights(block: nn.Module) -> nn.Module:
    """A copy of a block that shares its weights: replacing a layer in one leaves the other as it is."""
    shared = {id(tensor): tensor for tensor in itertools.chain(block.parameters(), block.buffers())}
    return copy.deepcopy(block, shared)
