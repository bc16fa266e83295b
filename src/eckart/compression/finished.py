"""What a streamed compression has finished, so that another run can go on with the next block.

A finished block is its shard and an entry of the directory's journal: what became of each layer, and the structures
that the shard holds the numbers of. Hidden states are not kept: a run that goes on takes them through the finished
blocks again, dense and compressed, which gives the same to the last bit and costs a forward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.calibrate import Statistics
from ..models.journal import Journal
from ..models.replay import Batch
from ..models.result import LayerResult
from ..models.stream import StreamedModel
from ..structures import Structure

__all__ = ["Finished", "fingerprint"]


class Finished:
    """The finished blocks of a streamed compression.

    Args:
        journal: of the directory that the shards are in.
        streamed: the model.
    """

    def __init__(self, journal: Journal, streamed: StreamedModel) -> None:
        self._journal = journal
        self._streamed = streamed

    def begin(
        self,
        settings: Mapping[str, Any],
        layers: Iterable[str],
        batches: Iterable[Batch],
        given: Mapping[str, Statistics],
    ) -> None:
        """Go on with what an earlier run has finished if it was asked for the same.

        Args:
            settings: method, options, budget and so on, as JSON values.
            layers: names of the selected linears.
            batches: calibration data.
            given: statistics gathered beforehand.

        Raises:
            ValueError: it was asked for something else, which the message names.
        """
        weights = set(self._streamed.reader.files.values())
        self._journal.begin(
            {
                "model": _state_of(weights | {file.with_name("config.json") for file in weights}),
                **settings,
                "layers": list(layers),
                "calibration": fingerprint(batches, given),
                "eckart": __version__,
                "torch": torch.__version__,
            }
        )

    @property
    def blocks(self) -> int:
        """How many blocks are finished, from the first."""
        return len(self._journal.parts)

    @property
    def ranks(self) -> dict[str, int] | None:
        """The rank of each linear, if finding it took a look at the whole model."""
        return self._journal.facts.get("ranks")

    def keep_ranks(self, ranks: Mapping[str, int]) -> None:
        """Spare a later run that look."""
        self._journal.note("ranks", dict(ranks))

    def restore(self, index: int) -> tuple[list[LayerResult], list[str]]:
        """Inside `StreamedModel.visiting`: have a finished block in the model as it was written.

        Returns:
            What was done to its selected linears, and the names of those that saw no calibration token.

        Raises:
            CheckpointError: its shard is missing or damaged.
        """
        part = self._journal.parts[index]
        self._streamed.restore(index, part["structures"])
        layers = [LayerResult(**{**layer, "shape": tuple(layer["shape"])}) for layer in part["layers"]]
        return layers, part["unreached"]

    def add(self, layers: Iterable[LayerResult], unreached: list[str]) -> None:
        """The next block is finished and its shard written."""
        done = list(layers)
        modules = {layer.name: self._streamed.model.get_submodule(layer.name) for layer in done}
        structures = {name: module.spec() for name, module in modules.items() if isinstance(module, Structure)}
        self._journal.add(
            {"layers": [asdict(layer) for layer in done], "structures": structures, "unreached": unreached}
        )


def fingerprint(batches: Iterable[Batch], given: Mapping[str, Statistics]) -> str:
    """A digest of everything that calibration depends on: two are equal only if all tensors are.

    Example:
        >>> one, two = ([{"input_ids": torch.tensor([[1, 2, last]])}] for last in (3, 4))
        >>> fingerprint(one, {}) == fingerprint(one, {}), fingerprint(one, {}) == fingerprint(two, {})
        (True, False)
    """
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        digest.update(value if isinstance(value, memoryview) else repr(value).encode())

    for batch in batches:
        for key in sorted(batch):
            add(key, batch[key])
    for layer in sorted(given):
        for key, value in vars(given[layer]).items():
            add(f"{layer} {key}", value)
    return digest.hexdigest()


def _state_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of the last change (ns) of each file: weights are too large to be read for it."""
    states = {file.name: file.stat() for file in files}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in sorted(states.items())}
