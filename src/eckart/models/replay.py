"""Run a model one block at a time over many batches, with the model's own forward.

Every family builds masks, rotary tables and cross-attention inputs in its own way and hands them to its
blocks. Instead of copying that, the model's forward is called for each (block, batch); the blocks before
the wanted one return at once, the wanted one gets the stored hidden state, and the call ends there.
The price is the embedding once a block. Peak memory is the hidden states of all batches and what one
block needs, whatever the depth.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .topology import Block

__all__ = ["Batch", "BlockCall", "Hidden", "Hooks", "Replay"]

Batch = dict[str, torch.Tensor]

#: The hidden state (batch, length, hidden) of each batch; None for a batch that does not reach the block.
Hidden = Sequence[torch.Tensor | None]


class _Stop(Exception):
    """Unwinds the model's forward once the wanted block has run."""


@dataclass
class BlockCall:
    """What a block was called with in one batch.

    Attributes:
        batch: the batch's index.
        mask: (batch, length) bool, the tokens that are not padding; None if all count.
        foreign: the tensors besides the hidden state that the block was given, such as the encoder's output.
        foreign_mask: the mask of those, where it differs.
    """

    batch: int
    mask: torch.Tensor | None
    foreign: list[torch.Tensor] = field(default_factory=list)
    foreign_mask: torch.Tensor | None = None

    def mask_for(self, x: torch.Tensor) -> torch.Tensor | None:
        """The token mask that fits the input ``x`` of a layer in this block, flattened; None if all count."""
        mask = self.foreign_mask if any(_shares(x, other) for other in self.foreign) else self.mask
        if mask is None or mask.numel() != x[..., 0].numel():
            return None
        return mask.reshape(-1)


Hooks = dict[nn.Module, Callable[[torch.Tensor, BlockCall], bool]]


class Replay:
    """Blocks of a model, run one after the other over stored hidden states.

    Args:
        model: a transformers model; left as it was found after every call.
        blocks: its blocks in execution order, from `eckart.models.blocks`.
        batches: keyword arguments of the model's forward, one dictionary a batch.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> None:
        self.model = model
        self.blocks = list(blocks)
        device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
        # Labels stay: no loss is worked out, but some decoders make their inputs of them.
        self.batches = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
        self._tails: dict[tuple[int, int], tuple[Any, ...]] = {}
        self._last: dict[tuple[str, int], Any] = {}
        accepted = inspect.signature(model.forward).parameters
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}

    def first_hidden(self, block: int = 0) -> Hidden:
        """What enters ``block``, the first one of its list."""
        return [self._call(block, i, None, None, stop_before=True) for i in range(len(self.batches))]

    def advance(self, block: int, hidden: Hidden, module: nn.Module | None = None) -> Hidden:
        """Outputs of ``block`` for all batches; of ``module``, a stand-in with its signature, if given."""
        return [
            None if state is None else self.advance_one(block, i, state, module=module)
            for i, state in enumerate(hidden)
        ]

    def advance_one(
        self,
        block: int,
        batch: int,
        hidden: torch.Tensor,
        hooks: Hooks | None = None,
        module: nn.Module | None = None,
    ) -> torch.Tensor:
        """`run` to the end of the block."""
        output = self.run(block, batch, hidden, hooks, module)
        if output is None:
            raise RuntimeError(f"the forward of {self.blocks[block].name} ended early")
        return output

    def enter(self, block: int, hidden: Hidden | None) -> Hidden:
        """Hidden states that enter ``block``: those handed on, or fresh ones where a new list of blocks begins."""
        return self.first_hidden(block) if hidden is None or self._is_first_of_list(block) else hidden

    def run(
        self,
        block: int,
        batch: int,
        hidden: torch.Tensor,
        hooks: Hooks | None = None,
        module: nn.Module | None = None,
    ) -> torch.Tensor | None:
        """Run ``block`` on one batch, and show the inputs of some of its layers.

        Args:
            block: index of the block.
            batch: index of the batch.
            hidden: what enters the block.
            hooks: layer -> function of (its input, the call); the pass ends early once one returns True.
            module: a stand-in for the block, such as its dense original; its layers are the keys of
                ``hooks`` then.

        Returns:
            What leaves the block, or None if a hook ended the pass.
        """
        call = BlockCall(batch, None)

        def watch(function: Callable[[torch.Tensor, BlockCall], bool]) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if function(args[0] if args else next(iter(kwargs.values())), call):
                    raise _Stop

            return hook

        handles = [
            layer.register_forward_pre_hook(watch(see), with_kwargs=True) for layer, see in (hooks or {}).items()
        ]
        try:
            result = self._call(block, batch, hidden, module, call=call)
        finally:
            for handle in handles:
                handle.remove()
        if result is None:
            return None
        if isinstance(result, tuple):
            self._tails[block, batch] = result[1:]
        if self._is_last_of_list(block):
            # What comes after this list of blocks needs its real output, a decoder its encoder's.
            self._last[self.blocks[block].list_name, batch] = result
        return result[0] if isinstance(result, tuple) else result

    def _is_first_of_list(self, block: int) -> bool:
        return block == 0 or self.blocks[block - 1].list_name != self.blocks[block].list_name

    def _is_last_of_list(self, block: int) -> bool:
        return block + 1 == len(self.blocks) or self._is_first_of_list(block + 1)

    def _call(
        self,
        block: int,
        batch: int,
        hidden: torch.Tensor | None,
        module: nn.Module | None,
        *,
        call: BlockCall | None = None,
        stop_before: bool = False,
    ) -> Any:
        caught: list[Any] = []
        target = self.blocks[block]

        def stored() -> torch.Tensor | None:
            # A copy: some models add to a state in place, and it will be wanted again.
            return None if hidden is None else hidden.clone()

        def run(*args: Any, **kwargs: Any) -> Any:
            if stop_before:
                caught.append(_state(args, kwargs))
                raise _Stop
            if self._is_first_of_list(block):
                args, kwargs = _with_state(stored(), args, kwargs)
            if call is not None:
                self._describe(call, block, args, kwargs)
            forward = originals[target.name] if module is None else module.forward
            caught.append(forward(*args, **kwargs))
            raise _Stop

        def skip(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                remembered = self._last.get((self.blocks[index].list_name, batch))
                if remembered is not None and self.blocks[index].list_name != target.list_name:
                    return remembered
                # The block before the wanted one hands the stored state on, so that what the model itself does
                # between two blocks is done; the others let pass what they get.
                state = stored() if index == block - 1 else _state(args, kwargs)
                tail = self._tails.get((index, batch))
                return state if tail is None else (state, *tail)

            return forward

        originals = {b.name: b.module.forward for b in self.blocks[: block + 1]}
        with contextlib.ExitStack() as stack:
            for index, earlier in enumerate(self.blocks[:block]):
                stack.enter_context(_forward_as(earlier.module, skip(index)))
            stack.enter_context(_forward_as(target.module, run))
            stack.enter_context(torch.no_grad())
            with contextlib.suppress(_Stop):
                self.model(**self.batches[batch], **self._extra)
        return caught[0] if caught else None

    def _describe(self, call: BlockCall, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = self.batches[call.batch]
        decoder = bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))
        second = decoder and self.blocks[block].list_name != self.blocks[0].list_name
        first_mask = _as_bool(batch.get("attention_mask"))
        call.mask = _as_bool(_decoder_mask(batch)) if second else first_mask
        state = _state(args, kwargs)
        others = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.ndim == 3]
        call.foreign = [t for t in others if t is not state]
        call.foreign_mask = first_mask


def _state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden state among the arguments of a block: the first one, by position or by name."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values())))


def _with_state(
    state: torch.Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (state, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs)): state}


def _decoder_mask(batch: Batch) -> torch.Tensor | None:
    """Which of a decoder's tokens count: by its mask, or where there is a label to predict."""
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    return labels != -100 if mask is None and labels is not None else mask


def _as_bool(mask: torch.Tensor | None) -> torch.Tensor | None:
    # A mask of all ones is no mask: the common case costs nothing.
    return None if mask is None or bool(mask.all()) else mask.bool()


def _shares(x: torch.Tensor, other: torch.Tensor) -> bool:
    return x is other or (x.data_ptr() == other.data_ptr() and x.shape == other.shape)


@contextlib.contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``module.forward`` be ``forward`` for a while; an instance attribute that was there comes back."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
