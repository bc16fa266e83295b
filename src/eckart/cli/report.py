"""``eckart report``: what a model's spectra say, as one HTML page."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eckart.cli._options import Device, Dtype, Model, Quiet, Where, load_model, prepare
from eckart.cli._output import console

if TYPE_CHECKING:
    from eckart.report import Source


def command(
    model: Model,
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    against: Annotated[
        str,
        typer.Option(
            help="The same model after a change: a compressed or fine-tuned model, or an adapter's directory."
        ),
    ] = "",
    as_json: Annotated[
        str, typer.Option("--json", metavar="FILE", help="Also write the page's figures to this file, or - to print.")
    ] = "",
    where: Where = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are no report too.")] = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """Write what a model's spectra say, and what to compress first, as one HTML page."""
    prepare(dtype, device)
    from eckart.models import load_tokenizer
    from eckart.models.result import format_bytes
    from eckart.report import check_page, render, report_figures, write_pages
    from eckart.report.page import encode

    page = check_page(out, force=force)
    figures_file = check_page(as_json, force=force) if as_json not in ("", "-") else None
    if figures_file == page:
        raise ValueError("--out and --json are the same file; give two names")
    loading = _Loading(where or None, dtype, device, progress=not quiet)
    source = loading.source(model)
    readable = source.causal and load_tokenizer(model) is not None  # so that methods that need text will do
    figures = report_figures(
        source,
        loading.changed(against, model) if against else None,
        method="pifa" if readable else "svd",
        progress=not quiet,
    )
    texts = {page: render(figures)}
    if figures_file is not None:
        texts[figures_file] = encode(figures) + "\n"
    write_pages(texts)
    if as_json == "-":
        sys.stdout.write(encode(figures) + "\n")
        return
    line = f"wrote {out} ({format_bytes(page.stat().st_size)}, {len(figures['layers'])} weights)"
    console().print(line, markup=False, soft_wrap=True)
    if advice := figures["advice"]:
        kept, size = advice["kept"], format_bytes(advice["bytes"])
        said = f"{advice['ratio']:.0%} removed keeps {kept:.1%} of the energy, {size}; try: {advice['command']}"
        console().print(said, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Loading:
    """How models are loaded, where they have to be.

    Attributes:
        where: which weights.
        dtype: floating-point type to load in.
        device: where to.
        progress: show bars.
    """

    where: Any
    dtype: str
    device: str
    progress: bool

    def source(self, name: str) -> Source:
        """A model; its weights are read one by one if they can be and need not be converted or moved."""
        from eckart.models import resolve
        from eckart.models.stored import LayoutError, has_safetensors
        from eckart.report import Source

        path = resolve(name)
        if has_safetensors(path) and (self.dtype, self.device) == ("auto", "cpu"):
            try:
                return Source.stored(path, name, self.where)
            except LayoutError:
                pass  # transformers converts the tensors while it loads the model
        return Source.of(self.load(name), name, self.where)

    def load(self, name: str) -> Any:
        """The whole model."""
        return load_model(name, self.dtype, self.device, progress=self.progress)[0]

    def changed(self, name: str, base: str) -> Source:
        """The model after the change: another one, or the first one with an adapter on it."""
        from eckart.models.adapter_files import is_adapter, load_adapter
        from eckart.report import Source

        if not is_adapter(name):
            return self.source(name)
        return Source.of(load_adapter(self.load(base), name), name, self.where)
