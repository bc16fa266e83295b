"""``eckart convert``: an adapter as a plain LoRA, with the error that makes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eckart.cli._options import Json, one_of, prepare
from eckart.cli._output import console, print_json


def command(
    adapter: Annotated[Path, typer.Argument(help="Directory of an adapter that Eckart wrote.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    to: Annotated[str, typer.Option(help="What to make of it: lora.")] = "lora",
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank of the LoRA.  [default: the smallest that makes no error]")
    ] = None,
    model: Annotated[str, typer.Option(help="The base model.  [default: the one that the adapter names]")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it holds an adapter.")] = False,
    as_json: Json = False,
) -> None:
    """Turn an adapter into a plain PEFT LoRA that other tools load, and print the error made."""
    prepare("auto", "cpu")
    one_of("--to", to, ["lora"])
    from peft import PeftConfig, PeftModel

    from eckart.adapters.config import EckartConfig
    from eckart.adapters.convert import to_lora
    from eckart.models import check_target, load

    check_target(out, force=force)
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is no adapter: it has no adapter_config.json")
    config: Any = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, EckartConfig):
        raise ValueError(f"{adapter} holds an adapter of type {config.peft_type}, not one of Eckart's")
    base = model or config.base_model_name_or_path or ""
    if not base:
        raise ValueError("the adapter does not say which model it belongs to; give --model")
    loaded, _ = load(base)
    done = to_lora(PeftModel.from_pretrained(loaded, str(adapter)), out, rank, force=force)
    figures = {
        "adapter": str(adapter),
        "method": config.method,
        "out": str(out),
        "rank": done.rank,
        "rank without error": done.exact_rank,
        "parameters": done.parameters,
        "largest relative error": done.largest_error,
    }
    if as_json:
        print_json({**figures, "errors": done.errors})
        return
    for key, value in figures.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value
        console().print(f"{key:24}{shown}", markup=False)
