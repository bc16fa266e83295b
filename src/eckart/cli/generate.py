"""``eckart generate``: text from a model, compressed or not."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from eckart.cli._options import Adapter, Device, Dtype, Json, Model, load_with_adapter, prepare
from eckart.cli._output import print_json


def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to continue, or to answer with --chat; - reads standard input.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Generate at most this many tokens.")] = 64,
    adapter: Adapter = "",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above, sample at this temperature.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Generate text with a model, compressed or not."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ValueError("the prompt is empty; give some text to continue")
    prepare(dtype, device)
    import torch
    from transformers import TextStreamer

    from eckart.models.evaluate import context_length
    from eckart.models.finite import check_finite

    loaded, tokenizer = load_with_adapter(model, adapter, dtype, device)
    network: Any = loaded
    if not network.can_generate():
        raise ValueError(f"{type(network).__name__} cannot generate text; give a causal language model")
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; add its tokenizer files to the directory")
    check_finite(network)
    if chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(f"{model} has no chat template; leave out --chat")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"].to(network.device)
    given = 0 if network.config.is_encoder_decoder else ids.shape[1]  # generate repeats the prompt of a decoder alone
    longest = context_length(network)
    if longest is not None and given >= longest:
        raise ValueError(f"the prompt has {given} tokens and the model's context {longest}; shorten it")
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": min(max_tokens, (longest or sys.maxsize) - given),
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        options["temperature"] = temperature
    if not as_json:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=chat or not given, skip_special_tokens=True)
    start = time.perf_counter()
    # transformers samples from torch's global generator: a fork of it leaves the caller's as it was.
    with torch.random.fork_rng(devices=[network.device] if network.device.type == "cuda" else []):
        torch.manual_seed(seed)
        found = network.generate(ids, **options)
    seconds = time.perf_counter() - start
    new = found[0, given:]
    if as_json:
        answer = tokenizer.decode(new, skip_special_tokens=True)
        print_json({"model": model, "prompt": prompt, "text": answer, "tokens": len(new), "seconds": seconds})
    else:
        sys.stderr.write(f"[{len(new)} tokens, {1000 * seconds / max(len(new), 1):.0f} ms a token]\n")
