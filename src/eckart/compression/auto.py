"""Which method and which sharing of the budget suits this model: try the plausible ones, judge by held-out text.

Every candidate compresses a copy of the model on a slice of the calibration text, and its perplexity is measured on
another slice; the real compression afterwards uses all of the text. What no candidate could do is in the table too.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..linalg.errors import LinalgError
from ..linalg.rank import Form
from ..models.batches import as_batches, calibrating_and_judging
from ..models.evaluate import is_causal, perplexity
from ..models.progress import track
from ..models.select import Where
from ..structures import EckartWarning
from .compress import compress
from .policies import Policy

__all__ = ["CANDIDATES", "Choice", "Trial", "choose"]

#: (method, how the budget is shared): the plausible ones; `benchmarks/compress_lm.py` compares all.
CANDIDATES: tuple[tuple[str, Policy], ...] = (
    ("pifa", "uniform"),
    ("pifa", "threshold"),
    ("pifa", "fisher"),
    ("pifa", "block-influence"),
    ("svd-llm", "svd-llm-v2"),
    ("modegpt", "block-influence"),
    ("modegpt", "uniform"),
    ("lorap", "uniform"),
)


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        method: its name.
        allocation: how the budget was shared.
        perplexity: on the held-out slice; infinite if it could not be tried.
        ratio: fraction of the selected parameters that went.
        seconds: to compress.
        reason: why it could not be tried; empty if it could.
    """

    method: str
    allocation: Policy
    perplexity: float
    ratio: float
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """All candidates, the best first.

    Attributes:
        trials: what each gave.
        dense: perplexity of the model as it was, on the same slice.
    """

    trials: tuple[Trial, ...]
    dense: float

    @property
    def best(self) -> Trial:
        """The candidate of the lowest perplexity."""
        return self.trials[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; what could not be tried has no perplexity."""
        rows = [asdict(trial) for trial in self.trials]
        for row in rows:
            row["perplexity"] = row["perplexity"] if math.isfinite(row["perplexity"]) else None
        return {"dense perplexity": self.dense, "trials": rows}


def choose(
    model: nn.Module,
    data: Iterable[Any],
    *,
    ratio: float,
    candidates: Sequence[tuple[str, Policy]] = CANDIDATES,
    held_out: Iterable[Any] | None = None,
    sequences: int = 16,
    where: Where | None = None,
    form: Form = "pivoted",
    progress: bool = True,
) -> Choice:
    """Try the candidates on a slice of the text; the model itself is not changed.

    Memory holds one more copy of the model at a time.

    Args:
        model: a causal language model.
        data: calibration batches, as for `eckart.compress`.
        ratio: fraction of the selected parameters to remove.
        candidates: (method, allocation) to try.
        held_out: batches to judge by; default a quarter of the slice, which is not calibrated on.
        sequences: size of the slice; all of the text if it has fewer.
        where: which linears.
        form: how factors are stored.
        progress: show a bar with the time left.

    Returns:
        The candidates in order of perplexity.

    Raises:
        ValueError: the model is no causal language model, there is too little text, or no candidate can be used.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> data = [torch.arange(96).reshape(8, 12) % 32]
        >>> tried = [("svd", "uniform"), ("svd-llm", "uniform")]
        >>> choice = choose(LlamaForCausalLM(config), data, ratio=0.3, candidates=tried, progress=False)
        >>> len(choice.trials), choice.trials[0].perplexity <= choice.trials[1].perplexity
        (2, True)
    """
    if not is_causal(model):
        raise ValueError("auto judges by perplexity, which only causal language models have; name a method")
    rows, judged = calibrating_and_judging(as_batches(data), sequences)
    if held_out is not None:
        rows, judged = [*rows, *judged], as_batches(held_out)
    if not rows:
        raise ValueError("auto needs two sequences or more: to calibrate on, and to judge by")
    dense = perplexity(model, judged, progress=False).perplexity
    trials = [
        _try(model, method, allocation, rows, judged, ratio, where, form)
        for method, allocation in track(candidates, "try methods", enabled=progress)
    ]
    trials.sort(key=lambda trial: trial.perplexity)
    if not trials or trials[0].reason:
        reasons = "; ".join(f"{trial.method}: {trial.reason}" for trial in trials)
        raise ValueError(f"none of the candidates can compress this model: {reasons or 'there are none'}")
    return Choice(tuple(trials), dense)


def _try(
    model: nn.Module,
    method: str,
    allocation: Policy,
    rows: Sequence[Mapping[str, Tensor]],
    judged: Sequence[Mapping[str, Tensor]],
    ratio: float,
    where: Where | None,
    form: Form,
) -> Trial:
    tried = copy.deepcopy(model)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EckartWarning)
            result = compress(
                tried,
                method,
                ratio=ratio,
                data=[dict(row) for row in rows],
                where=where,
                allocation=allocation,
                form=form,
                progress=False,
            )
        seconds = time.perf_counter() - start
        value = perplexity(tried, judged, progress=False).perplexity
    except (ValueError, LinalgError) as error:
        return Trial(method, allocation, math.inf, 0.0, time.perf_counter() - start, str(error))
    return Trial(method, allocation, value, result.ratio, seconds)
