"""``eckart export``: a compressed model as an ordinary dense checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eckart.cli._compare import weights_on_disk
from eckart.cli._options import Json, Model, prepare
from eckart.cli._output import console, print_json


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it holds a model.")] = False,
    as_json: Json = False,
) -> None:
    """Write a compressed model for tools without Eckart: dense weights, of the dense size."""
    prepare("auto", "cpu")
    from eckart.models import export_dense
    from eckart.models.result import format_bytes

    path = export_dense(model, out, force=force)
    size = weights_on_disk(path)
    if as_json:
        print_json({"model": model, "out": str(out), "bytes_on_disk": size})
    else:
        console().print(
            f"wrote {out}: {format_bytes(size)} on disk, loads without Eckart", markup=False, soft_wrap=True
        )
