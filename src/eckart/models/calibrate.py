"""Statistics of what the layers of a model see on calibration data, gathered in one streaming pass.

A method names what it needs and only that is gathered, once for every distinct input: query, key and
value share one Gram matrix, gate and up another. Padding does not count. Products are made in float32
and summed in float64 (`eckart.linalg.gram`).

Blocks are visited one after the other over all batches (`eckart.models.replay`). Peak memory is the
model, the hidden states of all batches once, and the statistics that the caller keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..linalg.gram import accumulate_gram, symmetrize
from .batches import as_batches
from .fisher import fisher
from .groups import evaluating
from .progress import track
from .replay import Batch, BlockCall, Hidden, Hooks, Replay
from .select import LinearRef, Where, linears
from .topology import Block, InputTracker, block_of, blocks

__all__ = ["NEEDS", "SEQUENTIAL", "Statistics", "calibrate", "collect", "input_order", "members_of", "rows_of", "watch"]

#: What a method may ask for.
#: gram, absmean, absmax, mean, meansquare: of the inputs x in the model as it is. fisher: squared gradients.
#: compressed_gram, cross_gram: of the inputs x' that reach a layer when those before it are compressed.
NEEDS = frozenset(
    {"gram", "absmean", "absmax", "mean", "meansquare", "fisher", "compressed_gram", "cross_gram"},
)

#: Those that exist only while a model is being compressed.
SEQUENTIAL = frozenset({"compressed_gram", "cross_gram"})


@dataclass
class Statistics:
    """Sums over the calibration tokens for one input of width n. What was not asked for is None.

    Attributes:
        count: number of tokens, padding left out.
        gram: (n, n) float64, sum of x x^T.
        absmean: (n,) float64, mean of |x|.
        absmax: (n,) float64, maximum of |x|.
        mean: (n,) float64, mean of x.
        meansquare: (n,) float64, mean of x^2.
        fisher: (n,) float64, squared gradients of each sequence, summed over outputs and sequences; it
            belongs to one weight, not to an input.
        compressed_gram: (n, n) float64, sum of x' x'^T.
        cross_gram: (n, n) float64, sum of x x'^T.
    """

    count: int = 0
    gram: torch.Tensor | None = None
    absmean: torch.Tensor | None = None
    absmax: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    meansquare: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    compressed_gram: torch.Tensor | None = None
    cross_gram: torch.Tensor | None = None

    def require(self, need: str) -> torch.Tensor:
        """The statistic ``need``, or a ValueError that says it was not gathered."""
        value: torch.Tensor | None = getattr(self, need)
        if value is None:
            raise ValueError(f"calibration did not gather {need!r}; name it in the method's `needs`")
        return value

    def update(self, x: torch.Tensor, needs: frozenset[str]) -> None:
        """Add the rows of ``x`` (N, n), float32 or float64."""
        width = x.shape[-1]
        self.count += x.shape[0]
        if "gram" in needs:
            if self.gram is None:
                self.gram = torch.zeros(width, width, dtype=torch.float64, device=x.device)
            accumulate_gram(self.gram, x)
        if "absmean" in needs:
            self.absmean = _add(self.absmean, x.abs().sum(0))
        if "mean" in needs:
            self.mean = _add(self.mean, x.sum(0))
        if "meansquare" in needs:
            self.meansquare = _add(self.meansquare, x.double().square().sum(0))
        if "absmax" in needs and x.shape[0]:
            largest = x.abs().amax(0).double()
            self.absmax = largest if self.absmax is None else torch.maximum(self.absmax, largest)

    def finish(self) -> Statistics:
        """Turn sums into means and fill the lower triangle of the Gram matrix; call once."""
        if self.gram is not None:
            symmetrize(self.gram)
        for name in ("absmean", "mean", "meansquare"):
            total = getattr(self, name)
            if total is not None:
                setattr(self, name, total / max(self.count, 1))
        return self


def rows_of(x: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """The rows (tokens, n) of a layer input that count, in float32 (float64 stays)."""
    mask = call.mask_for(x)
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None:
        rows = rows[mask]
    return rows if rows.dtype == torch.float64 else rows.float()


Inputs = Callable[[LinearRef, torch.Tensor, BlockCall], bool]


def watch(members: Sequence[LinearRef], see: Inputs) -> Hooks:
    """Hooks for `Replay.run` that call ``see(linear, input, call)`` for each member."""
    return {ref.module: partial(see, ref) for ref in members}


def input_order(replay: Replay, block: int, hidden: Hidden, members: Sequence[LinearRef]) -> list[list[LinearRef]]:
    """The linears of a block, grouped by the input they share, in execution order.

    A linear that the block calls on none of the batches is in no group.
    """
    found: list[list[LinearRef]] = []
    waiting = list(members)
    # The first batch shows all of them, unless experts wait for their tokens.
    for batch, state in enumerate(hidden):
        if state is None or not waiting:
            continue
        tracker = InputTracker()
        groups: dict[int, list[LinearRef]] = {}

        def see(
            ref: LinearRef,
            x: torch.Tensor,
            _: BlockCall,
            tracker: InputTracker = tracker,
            groups: dict[int, list[LinearRef]] = groups,
        ) -> bool:
            group = groups.setdefault(tracker.key(x), [])
            if ref not in group:
                group.append(ref)
            return False

        replay.run(block, batch, state, watch(waiting, see))
        seen: set[str] = set()
        for group in groups.values():
            # A layer that is called several times belongs to its first input.
            found.append([ref for ref in group if ref.name not in seen])
            seen.update(ref.name for ref in group)
        waiting = [ref for ref in waiting if ref.name not in seen]
    return [group for group in found if group]


def collect(
    replay: Replay,
    block: int,
    hidden: Hidden,
    members: Sequence[LinearRef],
    needs: frozenset[str],
) -> tuple[dict[str, Statistics], Hidden]:
    """Statistics of the linears of one block over all batches, and the block's outputs, in one pass.

    Linears that share an input share one `Statistics` object.
    """
    found: dict[str, Statistics] = {}
    outputs: list[torch.Tensor | None] = []
    for batch, state in enumerate(hidden):
        if state is None:
            outputs.append(None)
            continue
        tracker = InputTracker()
        heads: dict[int, str] = {}

        def see(
            ref: LinearRef,
            x: torch.Tensor,
            call: BlockCall,
            tracker: InputTracker = tracker,
            heads: dict[int, str] = heads,
        ) -> bool:
            head = heads.setdefault(tracker.key(x), ref.name)
            if head == ref.name:
                found.setdefault(ref.name, Statistics()).update(rows_of(x, call), needs)
            else:
                found[ref.name] = found[head]
            return False

        outputs.append(replay.advance_one(block, batch, state, watch(members, see)))
    for entry in {id(entry): entry for entry in found.values()}.values():
        entry.finish()
    return found, outputs


def calibrate(
    model: nn.Module,
    data: Iterable[Batch],
    needs: Iterable[str] = ("gram",),
    *,
    where: Where | None = None,
    progress: bool = True,
    quantized: bool = False,
) -> dict[str, Statistics]:
    """Gather the named statistics for every selected linear of a model that fits in memory.

    Costs one forward pass through the blocks (the head is not run) and N n^2 multiply-adds for each
    distinct input of width n. Keeps all statistics at once: sum of n^2 * 8 bytes for Gram matrices.

    Args:
        model: a transformers model.
        data: batches, dictionaries of tensors as the model's forward takes them.
        needs: what to gather, see `NEEDS`; those in `SEQUENTIAL` exist only while compressing.
        where: which linears, as in `eckart.models.linears`.
        progress: show a bar with the time left.
        quantized: whether to look at linears whose weights are stored in few bits too; not for "fisher".

    Returns:
        Linear's name -> its statistics, shared by those that share an input.

    Raises:
        ValueError: a need is unknown or exists only while compressing, or there is no data.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> found = calibrate(model, [{"input_ids": torch.arange(12).reshape(2, 6)}], progress=False)
        >>> found["model.layers.0.mlp.down_proj"].gram.shape, found["model.layers.0.mlp.down_proj"].count
        (torch.Size([32, 32]), 12)
    """
    wanted = frozenset(needs)
    unknown = wanted - NEEDS
    if unknown or wanted & SEQUENTIAL:
        raise ValueError(
            f"cannot calibrate {', '.join(sorted(unknown or wanted & SEQUENTIAL))}: "
            f"choose from {', '.join(sorted(NEEDS - SEQUENTIAL))}"
        )
    selection = linears(model, where, quantized=quantized and "fisher" not in wanted)
    batches = as_batches(data)
    information: dict[str, Statistics] = {}
    if "fisher" in wanted:
        information = fisher(model, batches, selection.linears, progress=progress)
        if wanted == {"fisher"}:
            return information
    found: dict[str, Statistics] = {}
    repeated = blocks(model)
    with evaluating(model):
        replay = Replay(model, repeated, batches)
        hidden: Hidden | None = None
        for index, block in enumerate(track(repeated, "calibrate", enabled=progress)):
            members = members_of(block, selection.linears)
            statistics, hidden = collect(replay, index, replay.enter(index, hidden), members, wanted)
            found.update(statistics)
    # Information belongs to one weight, the rest to an input that several may share: copies that share tensors.
    found.update(
        {name: replace(found[name], fisher=entry.fisher) for name, entry in information.items() if name in found}
    )
    return found


def members_of(block: Block, selected: Iterable[LinearRef]) -> list[LinearRef]:
    """The selected linears inside ``block``."""
    return [ref for ref in selected if block_of(ref.name, [block]) is not None]


def _add(total: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value.double() if total is None else total + value
