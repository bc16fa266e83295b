"""What a model is worth and what it takes: perplexity, context, parameters, bytes, peak memory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import as_batches
from .groups import evaluating
from .progress import track

__all__ = [
    "Perplexity",
    "context_length",
    "is_causal",
    "model_bytes",
    "num_parameters",
    "peak_memory",
    "perplexity",
]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a causal language model.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        loss: that mean, in nats a token.
        tokens: number of predicted tokens.
        seconds: wall time of the forward passes.
    """

    perplexity: float
    loss: float
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens a second, prefill only."""
        return self.tokens / self.seconds if self.seconds else math.inf

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def perplexity(model: nn.Module, data: Iterable[Any], *, progress: bool = True) -> Perplexity:
    """Perplexity over batches of token ids, every window on its own.

        exp(-1/N sum_t log p(x_t | x_<t))

    The first token of a window is given and not predicted, and neither padding nor the token after it counts.
    Logits are turned into log-probabilities in float32 whatever the model's dtype. Memory holds the logits of one
    batch, (batch, length, vocabulary) in the model's dtype.

    Args:
        model: a causal language model.
        data: batches with ``input_ids`` (batch, length) and perhaps ``attention_mask``; or tensors of token ids.
        progress: show a bar with the time left.

    Returns:
        The figures. The perplexity is infinite where the model gives a token no probability at all.

    Raises:
        ValueError: the model is no causal language model, a window is longer than its context, no batch has a token
            to predict, or the logits are not numbers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> result = perplexity(LlamaForCausalLM(config), [torch.arange(12).reshape(2, 6)], progress=False)
        >>> result.tokens
        10
    """
    if not is_causal(model):
        raise ValueError(f"{type(model).__name__} is no causal language model, so it has no perplexity")
    batches = as_batches(data)
    device = next(model.parameters()).device
    total, tokens, seconds = 0.0, 0, 0.0
    # Not inference mode: a rotary table cached there could not be used in training afterwards.
    with evaluating(model), torch.no_grad():
        for number, batch in enumerate(track(batches, "perplexity", enabled=progress)):
            inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
            _check_batch(model, inputs, number)
            start = time.perf_counter()
            loss, count = _loss(model(**inputs).logits, inputs)
            seconds += time.perf_counter() - start
            if math.isnan(loss):
                raise ValueError(
                    f"the logits of batch {number} are not numbers (NaN): the weights are damaged, or overflow in "
                    f"{next(model.parameters()).dtype}; try float32"
                )
            total += loss
            tokens += count
    if not tokens:
        raise ValueError("no token to predict: windows need at least two tokens")
    mean = total / tokens
    # exp overflows near 709 nats; a model that bad has infinite perplexity.
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, mean, tokens, seconds)


def _loss(logits: Tensor, inputs: Mapping[str, Tensor]) -> tuple[float, int]:
    """Summed negative log-likelihood in nats, and the number of predicted tokens, of one batch."""
    ids = inputs["input_ids"]
    present = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    counted = present[:, 1:] & present[:, :-1]
    total, tokens = 0.0, 0
    for row, target, mask in zip(logits[:, :-1], ids[:, 1:], counted, strict=True):
        # One sequence at a time: a float32 copy of all logits would be the largest tensor here.
        losses = nn.functional.cross_entropy(row[mask].float(), target[mask], reduction="none")
        total += float(losses.double().sum())
        tokens += losses.numel()
    return total, tokens


def _check_batch(model: nn.Module, inputs: Mapping[str, Tensor], number: int) -> None:
    if "input_ids" not in inputs:
        raise ValueError(f"batch {number} has no input_ids, only {', '.join(inputs)}")
    length, longest = inputs["input_ids"].shape[-1], context_length(model)
    if longest is not None and length > longest:
        raise ValueError(f"windows of {length} tokens are longer than the model's context of {longest}; shorten them")


def is_causal(model: nn.Module) -> bool:
    """Whether the model predicts each token from those before it; anything that is no transformers model may."""
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    return not getattr(config, "is_encoder_decoder", False) and (can_generate is None or bool(can_generate()))


def context_length(model: Any) -> int | None:
    """How many tokens the configuration of a model (or the configuration given) allows at once; None if unsaid."""
    config = getattr(model, "config", model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def check_context(model: Any, tokens: int) -> None:
    """Refuse an input that is longer than the model's context.

    Raises:
        ValueError: with both lengths.
    """
    longest = context_length(model)
    if longest is not None and tokens > longest:
        raise ValueError(f"an input of {tokens} tokens is longer than the model's context of {longest}; cut it")


def num_parameters(model: nn.Module) -> int:
    """Numbers stored in the weights, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and persistent buffers, tied ones once."""
    tensors: list[Tensor] = list(model.state_dict(keep_vars=True).values())
    # Tied weights have one address. On the meta device every address is 0, but tied weights are one object.
    sizes = {id(t) if t.device.type == "meta" else t.data_ptr(): t.nbytes for t in tensors}
    return sum(sizes.values())


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; of the GPU's allocations, if one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource  # not on Windows

    # Linux's ru_maxrss starts at what the parent process held when it started this one.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    if found := [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]:
        return 1024 * found[0]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
