"""What ``eckart compress`` does once its request is checked: load, choose, compress, recover, measure, save."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from eckart.cli._compare import Beside, Comparison, measure, weights_on_disk, with_everything
from eckart.cli._options import load_model
from eckart.cli._output import print_note
from eckart.cli._texts import Texts

if TYPE_CHECKING:
    from eckart.compression.engine import EngineName
    from eckart.compression.recover import Recovered, Train
    from eckart.compression.request import AnyMethod


@dataclass(frozen=True)
class Recovery:
    """How to train a compressed model.

    Attributes:
        steps: updates.
        train: what is trained.
        rate: peak learning rate.
        from_original: whether the original model's predictions are learnt, in place of the text.
        adapter: the method of the adapter that is trained; empty for none.
        rank: of the adapter.
    """

    steps: int
    train: Train
    rate: float
    from_original: bool = False
    adapter: str = ""
    rank: int = 16

    @classmethod
    def of(cls, steps: int, what: str, rate: float, rank: int | None, *, from_original: bool = False) -> Recovery:
        """From the words of a command line.

        Raises:
            ValueError: there is no such thing to train, or an adapter that needs a training loop of its own.
        """
        if what in ("factors", "sequential"):
            if rank is not None:
                raise ValueError("--recover-rank is that of an adapter; name one with --recover-with, such as lora")
            return cls(steps, cast("Train", what), rate, from_original)
        from eckart.adapters import AdapterMethod, EckartConfig
        from eckart.catalog import UnknownMethodError

        try:
            config = EckartConfig(method=what, r=16 if rank is None else rank)
        except UnknownMethodError as error:
            raise ValueError(f"--recover-with must be factors, sequential or the name of an adapter: {error}") from None
        if type(config.build_method()).training_order is not AdapterMethod.training_order:
            raise ValueError(f"{config.method} orders its training data; compress first, then eckart adapt")
        return cls(steps, "adapter", rate, from_original, config.method, config.r)

    def run(self, model: Any, data: Any, where: Any, teacher: Any, *, progress: bool) -> tuple[Any, Recovered]:
        """Train it on the calibration text; the model, and the adapter on it if one is trained."""
        from eckart.adapters import EckartConfig, adapt
        from eckart.compression.recover import recover

        if self.adapter:
            needs = EckartConfig(method=self.adapter).build_method().needs
            given = {"data": data if needs else None, "where": where, "progress": progress}
            model = adapt(model, self.adapter, self.rank, task_type="CAUSAL_LM", **given)
        done = recover(
            model, data, self.steps, train=self.train, teacher=teacher, learning_rate=self.rate, progress=progress
        )
        return model, done


@dataclass(frozen=True)
class Job:
    """A request that has been checked.

    Attributes:
        model: what the user called the model.
        source: its directory.
        out: directory to write.
        force: whether ``out`` may be replaced.
        method: how to compress; None to try several.
        settings: everything else that `eckart.compress` takes.
        texts: what to calibrate on and to judge by.
        needs_text: whether there is anything to calibrate.
        recovery: how to train afterwards, if at all.
    """

    model: str
    source: Path
    out: Path
    force: bool
    method: AnyMethod | None
    settings: dict[str, Any]
    texts: Texts
    needs_text: bool
    recovery: Recovery | None = None

    def in_memory(self, dtype: str, device: str, *, measured: bool) -> Comparison:
        """Load, compress, save; with figures before and after if they are wanted and the model has them."""
        from eckart.compression import compress
        from eckart.compression.auto import choose
        from eckart.models import save, save_with_adapter
        from eckart.models.progress import waiting

        progress = self.settings["progress"]
        on_disk = weights_on_disk(self.source)
        model, tokenizer = load_model(self.source, dtype, device, progress=progress)
        _check(model, self.method, self.settings["where"])
        data = self.texts.to_calibrate(self.model, model.config, tokenizer) if self.needs_text else []
        reason = _why_not(model, tokenizer) if measured else ""
        held_out = self.texts.to_judge(model.config, tokenizer) if measured and not reason else []
        before = measure(model, held_out, progress=progress) if held_out else None
        choice = None
        method: str | AnyMethod = self.method or ""
        settings = dict(self.settings)
        if self.method is None:
            shared = {key: settings[key] for key in ("ratio", "where", "form", "progress")}
            choice = choose(model, data, **shared)
            method, settings["allocation"] = choice.best.method, choice.best.allocation
        recovered = None
        with _kept_for_the_end():
            result = compress(model, method, data=data, **settings)
            model = result.model
            if self.recovery:
                teacher = None
                if self.recovery.from_original:
                    teacher, _ = load_model(self.source, dtype, device, progress=progress)
                model, recovered = self.recovery.run(model, data, settings["where"], teacher, progress=progress)
        after = measure(model, held_out, progress=progress) if held_out else None
        beside = None
        with waiting("saving", enabled=progress):
            if self.recovery and self.recovery.adapter:
                save_with_adapter(model, self.out, tokenizer, force=self.force)
                beside = Beside.of(self.out, self.recovery.adapter, self.recovery.rank, model)
                result = with_everything(result, model)
            else:
                save(model, self.out, tokenizer, force=self.force)
        return Comparison(
            self.model,
            self.out,
            result,
            (on_disk, weights_on_disk(self.out) + (beside.bytes if beside else 0)),
            before,
            after,
            not_measured=reason,
            choice=choice,
            recovered=recovered,
            beside=beside,
        )

    def streamed(self, engine: EngineName, *, resume: bool) -> Comparison:
        """Compress from disk to disk."""
        from transformers import AutoConfig

        from eckart.compression import compress_checkpoint
        from eckart.models import load_tokenizer

        assert self.method is not None  # auto is not streamed
        on_disk = weights_on_disk(self.source)
        tokenizer = load_tokenizer(self.source)
        config = AutoConfig.from_pretrained(self.source)
        data = self.texts.to_calibrate(self.model, config, tokenizer) if self.needs_text else []
        with _kept_for_the_end(), _notes_printed():
            result = compress_checkpoint(
                self.source,
                self.out,
                self.method,
                data=data,
                tokenizer=tokenizer,
                force=self.force,
                resume=resume,
                engine=engine,
                **self.settings,
            )
        reason = f"the model was streamed; try: eckart eval {self.out}"
        return Comparison(self.model, self.out, result, (on_disk, weights_on_disk(self.out)), not_measured=reason)


def _check(model: Any, method: AnyMethod | None, where: Any) -> None:
    """Find out, before anything is measured for it, whether the model can be compressed at all."""
    from eckart.compression.checks import check_untouched, inside_blocks
    from eckart.models import blocks, linears
    from eckart.models.finite import check_finite

    check_untouched(model)
    if getattr(method, "on_linears", True):
        inside_blocks(linears(model, where), blocks(model))
    check_finite(model)


def _why_not(model: Any, tokenizer: Any) -> str:
    """Why perplexity cannot be measured; empty if it can."""
    from eckart.models.evaluate import is_causal

    if tokenizer is None:
        return "the model has no tokenizer"
    return "" if is_causal(model) else f"{type(model).__name__} is no causal language model"


@contextlib.contextmanager
def _kept_for_the_end() -> Iterator[None]:
    """The result carries every warning, and they are printed once, below the table."""
    from eckart.structures import EckartWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EckartWarning)
        yield


@contextlib.contextmanager
def _notes_printed() -> Iterator[None]:
    """What an interrupted run has kept, which its exception says beside its message."""
    try:
        yield
    except BaseException as error:
        for note in getattr(error, "__notes__", ()):
            print_note("note", note)
        raise
