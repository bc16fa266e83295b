"""A model before and after: the figures that a user decides by, side by side."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eckart.cli._output import console, shortened, table

if TYPE_CHECKING:
    from eckart.compression.auto import Choice
    from eckart.compression.recover import Recovered
    from eckart.models import Result

_SHOWN = 5


@dataclass(frozen=True)
class Figures:
    """What is measured on a model.

    Attributes:
        perplexity: on held-out text.
        milliseconds_per_token: greedy generation, batch 1.
        tokens_per_second: prefill.
    """

    perplexity: float
    milliseconds_per_token: float
    tokens_per_second: float


def measure(model: Any, held_out: Any, *, progress: bool) -> Figures:
    """Perplexity and speed of a causal language model."""
    from eckart.models import perplexity, time_per_token

    quality = perplexity(model, held_out, progress=progress)
    return Figures(quality.perplexity, time_per_token(model, progress=progress), quality.tokens_per_second)


def weights_on_disk(directory: Path) -> int:
    """Bytes of a checkpoint's weight files, in whichever of the two formats it has."""
    files = list(directory.glob("*.safetensors")) or list(directory.glob("*.bin"))
    return sum(file.stat().st_size for file in files)


@dataclass(frozen=True)
class Beside:
    """An adapter that was saved beside the model that it is on.

    Attributes:
        method: its method.
        rank: its rank.
        path: its directory.
        parameters: numbers that were trained.
        bytes: of its weight file.
    """

    method: str
    rank: int
    path: str
    parameters: int
    bytes: int

    @classmethod
    def of(cls, out: Path, method: str, rank: int, adapted: Any) -> Beside:
        """The adapter of a PEFT model that was saved with its model."""
        from eckart.models.adapter_files import BESIDE

        path = out / BESIDE
        return cls(method, rank, str(path), adapted.get_nb_trainable_parameters()[0], weights_on_disk(path))


def with_everything(result: Result, adapted: Any) -> Result:
    """A result whose totals have the adapter in them."""
    from eckart.models import model_bytes, num_parameters

    parameters, size = (result.parameters[0], num_parameters(adapted)), (result.bytes[0], model_bytes(adapted))
    return replace(result, parameters=parameters, bytes=size)


@dataclass(frozen=True)
class Comparison:
    """Everything that ``eckart compress`` has to say.

    Attributes:
        model: what the user called the model.
        out: where the result is.
        result: what was done.
        on_disk: (before, after) bytes of the weight files.
        before: figures of the dense model; None if nothing was measured.
        after: figures of the compressed model.
        not_measured: why nothing was measured; empty if it was, or was not wanted.
        choice: what was tried, if the method was chosen.
        recovered: what training afterwards did, if there was any.
        beside: the adapter that was trained then, if there is one.
    """

    model: str
    out: Path
    result: Result
    on_disk: tuple[int, int]
    before: Figures | None = None
    after: Figures | None = None
    not_measured: str = ""
    choice: Choice | None = None
    recovered: Recovered | None = None
    beside: Beside | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: a list of two is (before, after); null is not measured."""

        def pair(name: str) -> tuple[float, float] | None:
            both = self.before and self.after
            return (getattr(self.before, name), getattr(self.after, name)) if both else None

        return {
            "model": self.model,
            "out": str(self.out),
            **self.result.to_dict(),
            "bytes_on_disk": self.on_disk,
            "perplexity": pair("perplexity"),
            "milliseconds_per_token": pair("milliseconds_per_token"),
            "tokens_per_second": pair("tokens_per_second"),
            "tried": self.choice.to_dict() if self.choice else None,
            "recovered": asdict(self.recovered) if self.recovered else None,
            "adapter": asdict(self.beside) if self.beside else None,
        }

    def print(self) -> None:
        """For people: the table, the worst layers, and what they should know."""
        out, result = console(), self.result
        budget = ", ".join(f"{unit} {value:g}" for unit, value in result.settings["budget"].items())
        out.print(f"{self.model}, {result.method}, {budget}\n", style="bold", markup=False, soft_wrap=True)
        if self.choice:
            out.print(_tried(self.choice))
            out.print()
        out.print(self._table())
        if "search" in result.settings:
            out.print(_searched(result.settings["search"]), markup=False, soft_wrap=True)
        if self.recovered:
            done = self.recovered
            change = f"held-out loss {done.loss_before:.3f} to {done.loss_after:.3f} nats a token"
            out.print(f"recovery: {done.steps} steps, {done.seconds:.0f} s, {change}", markup=False, soft_wrap=True)
        if self.beside:
            self._print_beside(self.beside)
        if self.not_measured:
            out.print(f"perplexity and speed not measured: {self.not_measured}", markup=False, soft_wrap=True)
        self._print_layers()
        out.print(f"\n{result.seconds:.1f} s, peak memory {_bytes(result.peak_memory)}")
        path = shlex.quote(str(self.out))
        adapter = f" --adapter {shlex.quote(self.beside.path)}" if self.beside else ""
        tried = f"eckart generate {path} 'The capital of France is'{adapter}"
        out.print(f"wrote {path}; try: {tried}", markup=False, soft_wrap=True)

    @staticmethod
    def _print_beside(beside: Beside) -> None:
        size = f"{beside.parameters:,} parameters, {_bytes(beside.bytes)}"
        lines = (
            f"adapter: {beside.method} of rank {beside.rank}, {size}, counted above, in {beside.path}",
            f"to load it: PeftModel.from_pretrained(model, {beside.path!r}), after import eckart",
        )
        for line in lines:
            console().print(line, markup=False, soft_wrap=True)

    def _table(self) -> Any:
        result = self.result
        rows: list[tuple[str, tuple[float, float], Any]] = [
            ("parameters", result.parameters, _count),
            ("  of the selected layers", result.selected_parameters, _count),
            ("bytes in memory", result.bytes, _bytes),
            ("bytes on disk", self.on_disk, _bytes),
        ]
        if self.before and self.after:
            old, new = self.before, self.after
            rows += [
                ("perplexity, held-out text", (old.perplexity, new.perplexity), "{:,.2f}".format),
                ("ms per generated token", (old.milliseconds_per_token, new.milliseconds_per_token), "{:.1f}".format),
                ("tokens per second, prompt", (old.tokens_per_second, new.tokens_per_second), "{:,.0f}".format),
            ]
        shown = table("", ">before", ">after", ">change")
        for name, (old_value, new_value), form in rows:
            shown.add_row(shortened(name), form(old_value), form(new_value), _change(old_value, new_value))
        return shown

    def _print_layers(self) -> None:
        out, result = console(), self.result
        forms = Counter(layer.form for layer in result.layers)
        out.print(f"\n{len(result.layers)} layers: " + ", ".join(f"{n} {form}" for form, n in forms.most_common()))
        for line in result.skipped[:_SHOWN]:
            out.print(f"left alone: {line}", markup=False, soft_wrap=True)
        if len(result.skipped) > _SHOWN:
            out.print(f"left alone: {len(result.skipped) - _SHOWN} more, see --json")
        worst = [layer for layer in result.worst(_SHOWN) if layer.error > 0]
        if worst:
            shown = table(">error", ">rank", ">of", ">form", "layer")
            for layer in worst:
                shown.add_row(
                    f"{layer.error:.3f}", str(layer.rank), str(min(layer.shape)), layer.form, shortened(layer.name)
                )
            out.print(f"\nlargest errors, relative to the {result.error_of}:")
            out.print(shown)


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    from eckart.models.result import format_bytes

    return format_bytes(value)


def _change(old: float, new: float) -> str:
    return f"{new / old - 1:+.1%}" if old and math.isfinite(new / old) else ""


def _searched(found: dict[str, float]) -> str:
    """What a search for shares of the budget gave."""
    uniform = f"{found['uniform']:.3f}" if "uniform" in found else "infinite"
    return f"search: {found['trials']} trials, held-out loss {uniform} uniform, {found['found']:.3f} as shared"


def _tried(choice: Choice) -> Any:
    """The table that a method was chosen from, the best first."""
    shown = table("tried", "allocation", ">perplexity", ">removed", ">seconds", "")
    for trial in choice.trials:
        value = f"{trial.perplexity:,.2f}" if math.isfinite(trial.perplexity) else "-"
        removed = f"{trial.ratio:.1%}" if trial.ratio else "-"
        reason = shortened(trial.reason)
        shown.add_row(trial.method, trial.allocation, value, removed, f"{trial.seconds:.1f}", reason)
    shown.add_row("(dense)", "", f"{choice.dense:,.2f}", "", "", "")
    return shown
