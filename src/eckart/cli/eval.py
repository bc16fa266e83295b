"""``eckart eval``: perplexity, tokens per second and peak memory of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from eckart.cli._options import (
    Adapter,
    Device,
    Dtype,
    Field,
    Json,
    Length,
    Model,
    Quiet,
    load_with_adapter,
    prepare,
    window_length,
)
from eckart.cli._output import console, print_json


def command(
    model: Model,
    text: Annotated[
        str,
        typer.Option(help="Text file, JSONL file or hub data set.  [default: held-out Python documentation]"),
    ] = "",
    adapter: Adapter = "",
    field: Field = "text",
    max_tokens: Annotated[int, typer.Option(min=2, help="Evaluate on at most this many tokens.")] = 8192,
    length: Length = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a batch.")] = 4,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, tokens per second and peak memory; every window is predicted on its own."""
    prepare(dtype, device)
    from eckart.models import model_bytes, num_parameters, peak_memory, perplexity, text_batches
    from eckart.models.batches import check_source
    from eckart.models.evaluate import is_causal
    from eckart.models.finite import check_finite
    from eckart.models.result import format_bytes

    check_source(text or None)
    loaded, tokenizer = load_with_adapter(model, adapter, dtype, device, progress=not quiet)
    if not is_causal(loaded):
        raise ValueError(f"{type(loaded).__name__} is no causal language model, so it has no perplexity")
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; add its tokenizer files to the directory")
    check_finite(loaded)
    window = min(window_length(loaded, length), max_tokens) if length is None else window_length(loaded, length)
    if max_tokens < window:
        raise ValueError(f"--max-tokens {max_tokens} is less than one window of {window}; lower --length")
    batches = text_batches(
        tokenizer,
        text or None,
        samples=max_tokens // window,
        length=window,
        batch_size=batch_size,
        part="evaluation",
        field=field,
    )
    result = perplexity(loaded, batches, progress=not quiet)
    size, parameters, memory = model_bytes(loaded), num_parameters(loaded), peak_memory()
    source = text or "Python documentation, held-out part"
    if as_json:
        shape = {"windows": sum(len(batch["input_ids"]) for batch in batches), "length": window}
        figures = {"parameters": parameters, "bytes": size, "peak_memory": memory}
        print_json({"model": model, "text": source, **shape, **result.to_dict(), **figures})
        return
    out = console()
    for name, value in (
        ("text", f"{source}: {result.tokens:,} tokens predicted, in windows of {window}"),
        ("perplexity", f"{result.perplexity:,.2f} ({result.loss:.4f} nats a token)"),
        ("speed", f"{result.tokens_per_second:,.0f} tokens per second in batches of {batch_size}"),
        ("weights", f"{parameters:,} parameters, {format_bytes(size)}"),
        ("peak memory", format_bytes(memory)),
    ):
        out.print(f"{name:<12} {value}", markup=False, soft_wrap=True)
