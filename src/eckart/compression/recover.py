"""Win back what compression lost, by training the small weights that it left.

    "factors"      all numbers of the structures, and the norms, at once
    "sequential"   SVD-LLM's low-rank update: of W = up down first up, with down as it is, then down with the new up
    "adapter"      the adapters of PEFT that are on the model; its own weights stay as they are

The loss is the model's own on the calibration text, or the divergence of its predictions there from a teacher's, which
is the model before it was compressed. X. Wang et al., SVD-LLM, ICLR 2025, arXiv 2403.07378, who also train a LoRA; A.
Jaiswal et al., WeLore, ICML 2025, arXiv 2407.11239, who train the factored layers only; G. Hinton, O. Vinyals, J. Dean,
Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..models.adapted import is_adapted
from ..models.batches import as_batches
from ..models.evaluate import perplexity
from ..models.groups import evaluating
from ..models.progress import track
from ..models.structured import norm_parameters, only_gradients_for, structured_parameters
from ..structures import EckartWarning, LowRank
from .recover_loss import backward, by_length, multiplies_bfloat16, sequences_of

__all__ = ["Recovered", "Train", "recover"]

Train = Literal["factors", "sequential", "adapter"]


@dataclass(frozen=True)
class Recovered:
    """What recovery did.

    Attributes:
        steps: updates made.
        loss_before: mean loss of the held-out batches, in nats a token.
        loss_after: the same afterwards.
        seconds: of training.
        trained: how many numbers were trained.
        history: training loss of every step, or divergence from the teacher, in nats a token.
    """

    steps: int
    loss_before: float
    loss_after: float
    seconds: float
    trained: int
    history: list[float]


def recover(
    model: nn.Module,
    data: Iterable[Any],
    steps: int = 100,
    *,
    train: Train = "factors",
    teacher: nn.Module | None = None,
    learning_rate: float = 2e-4,
    batch_size: int = 4,
    held_out: Iterable[Any] | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Recovered:
    """Fine-tune a compressed model's structures, or the adapter on it, on calibration text, in place.

    AdamW without decay, a tenth of the steps to warm up, then a cosine to a tenth of the rate. Forward and backward are
    in bfloat16 beside float32 weights where the device multiplies such numbers, for adapters in the types that are
    there. The state of the best held-out loss is not kept apart: what is there at the end is.

    Args:
        model: a causal language model with structures, as `eckart.compress` and `eckart.load` give it; for "adapter"
            what `eckart.adapt` made of it.
        data: batches, as for `eckart.compress`; sequences are drawn from all of them.
        steps: updates.
        train: what is trained; "sequential" halves the steps between the two factors and needs low-rank layers,
            "adapter" needs an adapter that can be trained.
        teacher: the model before it was compressed, on the same device. Its predictions are learnt then, not the text,
            for text that is unlike what the model is for; a step takes half as long again.
        learning_rate: peak, 2e-4.
        batch_size: sequences an update.
        held_out: batches to measure the loss on; default an eighth of ``data``, which is then not trained on.
        max_seconds: stop after this time, whatever ``steps`` says; the schedule is that of the time, too.
        seed: of the order of sequences.
        progress: show a bar with the time left.

    Returns:
        Losses before and after, and the time.

    Raises:
        ValueError: no structure or adapter, too little data, or a loss that is not finite; before the first step
            nothing changed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from eckart.compression import compress
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model, data = LlamaForCausalLM(config), [torch.arange(96).reshape(8, 12) % 32]
        >>> _ = compress(model, "svd", ratio=0.5, data=data, progress=False)
        >>> done = recover(model, data, 20, learning_rate=1e-2, progress=False)
        >>> done.loss_after < done.loss_before
        True
    """
    if train not in get_args(Train):
        raise ValueError(f"train must be one of {', '.join(get_args(Train))}, not {train!r}")
    if steps < 1 or batch_size < 1 or not learning_rate > 0:
        raise ValueError("steps and batch_size must be at least 1, and learning_rate positive")
    if teacher is model:
        raise ValueError("teacher is the compressed model itself; load or copy the model before compressing it")
    phases = _phases(model, train, steps)
    sequences = sequences_of(as_batches(data))
    if held_out is None:
        cut = len(sequences) - max(1, len(sequences) // 8)
        sequences, judged = sequences[:cut], by_length(sequences[cut:], batch_size)
    else:
        judged = as_batches(held_out)
    if not sequences:
        raise ValueError("recovery needs two sequences or more: one to train on, one to judge by")
    before = perplexity(model, judged, progress=False).loss
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    history: list[float] = []
    start = time.perf_counter()
    trained = 0
    try:
        for count, parameters in phases:
            only_gradients_for(model, parameters)
            trained += sum(p.numel() for p in parameters)
            limit = None if max_seconds is None else max_seconds / len(phases)
            run = _Run(count, learning_rate, batch_size, limit, progress, teacher, adapters=train == "adapter")
            history += _train(model, parameters, sequences, run, generator)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(gradients[name])
    seconds = time.perf_counter() - start
    after = perplexity(model, judged, progress=False).loss
    if after > before:
        message = (
            f"recovery made the held-out loss worse, {before:.3f} to {after:.3f}; lower learning_rate or give more data"
        )
        warnings.warn(message, EckartWarning, stacklevel=2)
    return Recovered(len(history), before, after, seconds, trained, history)


def _phases(model: nn.Module, train: Train, steps: int) -> list[tuple[int, list[nn.Parameter]]]:
    """(steps, parameters) one after the other."""
    if train == "adapter":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not is_adapted(model) or not trained:
            raise ValueError('train="adapter" needs an adapter that can be trained; put one on with eckart.adapt')
        return [(steps, trained)]
    structured = structured_parameters(model)
    if train == "factors":
        return [(steps, [*structured.values(), *norm_parameters(model).values()])]
    layers = [module for module in model.modules() if isinstance(module, LowRank)]
    if not layers:
        raise ValueError('train="sequential" is for low-rank factors, of which this model has none; use "factors"')
    if steps < 2:
        raise ValueError('train="sequential" needs two steps or more')
    # In the pivoted form the combinations are what is left of one factor, the kept rows or columns are the other.
    second_of = {"rows": "kept_transposed", "columns": "combination_transposed", None: "down_transposed"}
    first_of = {"rows": "combination_transposed", "columns": "kept_transposed", None: "up_transposed"}
    first = [layer.get_parameter(first_of[layer.side]) for layer in layers]
    second = [layer.get_parameter(second_of[layer.side]) for layer in layers]
    return [(steps - steps // 2, first), (steps // 2, second)]


@dataclass(frozen=True)
class _Run:
    steps: int
    learning_rate: float
    batch_size: int
    max_seconds: float | None
    progress: bool
    teacher: nn.Module | None
    adapters: bool


def _train(
    model: nn.Module,
    parameters: list[nn.Parameter],
    sequences: Sequence[Mapping[str, Tensor]],
    run: _Run,
    generator: torch.Generator,
) -> list[float]:
    device, steps, learning_rate = parameters[0].device, run.steps, run.learning_rate
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    told = getattr(getattr(model, "base_model", None), "on_step", None)  # adapters with a schedule count steps
    half = multiplies_bfloat16(device) and not run.adapters  # which not all of them can do with
    history: list[float] = []
    start = time.perf_counter()
    with evaluating(run.teacher or model), evaluating(model), torch.enable_grad():
        if run.adapters:
            model.train()  # their penalties and draws are for training
        for step in track(range(steps), "recover", enabled=run.progress):
            done = step / steps
            if run.max_seconds is not None:
                done = max(done, (time.perf_counter() - start) / run.max_seconds)
                if done >= 1:
                    break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _schedule(done, steps)
            chosen = torch.randint(len(sequences), (run.batch_size,), generator=generator).tolist()
            batches = by_length([sequences[i] for i in chosen], run.batch_size)
            loss = backward(model, run.teacher, batches, device, half=half)
            if not math.isfinite(loss):
                raise ValueError(f"the loss of step {step} is not finite; lower learning_rate from {learning_rate}")
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if told:
                told(step + 1, steps)  # while the gradients are there
            optimizer.zero_grad()
            history.append(loss)
    return history


def _schedule(done: float, steps: int) -> float:
    """Share of the peak rate: up over the first tenth, of the steps or of the time, whichever is further on."""
    rising = 10 * (done + 1 / steps)
    return rising if rising <= 1 else 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))
