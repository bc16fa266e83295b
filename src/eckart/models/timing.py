"""How fast a model generates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .evaluate import context_length
from .groups import evaluating
from .progress import track

__all__ = ["time_per_token"]


def time_per_token(model: nn.Module, *, prompt: int = 32, tokens: int = 32, progress: bool = True) -> float:
    """Milliseconds for each generated token, greedy, batch 1: the median step of one run.

    The first token, which waits for the whole prompt, and the next few, which warm up, are left out.

    Args:
        model: a causal language model.
        prompt: tokens before the first generated one; fewer if the model's context is short.
        tokens: timed tokens; fewer if the model's context is short.
        progress: show a bar with the time left.
    """
    warm_up = 4
    room = (context_length(model) or prompt + tokens + warm_up + 1) - 1
    prompt = min(prompt, room // 2)
    steps = min(tokens + warm_up, room - prompt)
    # Ids that every vocabulary has, and not all the same: a mixture of experts would use one of them.
    ids = (torch.arange(prompt, device=next(model.parameters()).device) % 32).unsqueeze(0)
    network: Any = model
    ticks = track(range(steps + 1), "ms per token", enabled=progress)
    clock = _Clock(ticks)
    with evaluating(model), torch.no_grad(), closing(ticks):
        network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps + 1,
            min_new_tokens=steps + 1,  # an early end of the text would shorten the run
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            streamer=clock,
        )
    return 1000 * median(clock.steps()[min(warm_up, steps - 1) :])


class _Clock:
    """Stands in for a streamer of text, and notes when each token comes."""

    def __init__(self, ticks: Iterator[int]) -> None:
        self.ticks = ticks
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by transformers with the prompt and then with every token, which is on the CPU by then."""
        self.times.append(time.perf_counter())
        next(self.ticks, None)

    def end(self) -> None:
        """Called by transformers after the last token."""

    def steps(self) -> list[float]:
        """Seconds from the first generated token on, token by token."""
        return [later - earlier for earlier, later in pairwise(self.times[1:])]
