"""What an analysis looks at: models, adapters and texts, from the words of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eckart.cli._options import load_model, window_length
from eckart.cli._texts import Texts


@dataclass(frozen=True)
class Inputs:
    """The texts of a request.

    Attributes:
        prompts: each a text.
        data: file, JSONL or hub data set; empty for none.
        template: how a line of JSONL becomes a text; empty to cut the file into windows.
        field: field of a JSONL file or column of a data set.
        samples: texts of ``data``.
        length: tokens a text of ``data``; None for what suits the model.
    """

    prompts: Sequence[str]
    data: str
    template: str
    field: str
    samples: int
    length: int | None

    def check(self, name: str, needs: frozenset[str]) -> None:
        """Refuse texts that are missing, empty or of no use, before a model is loaded."""
        given = bool(self.prompts or self.data)
        if "data" in needs and not given:
            answers = ", a JSONL file with --template for questions and answers," if "labels" in needs else ""
            raise ValueError(f"{name} needs texts to look at; give --data FILE{answers} or --prompt TEXT")
        if given and "data" not in needs:
            raise ValueError(f"{name} looks at the weights alone; leave out --data and --prompt")
        if not all(text.strip() for text in self.prompts):
            raise ValueError("a --prompt is empty; give some text")
        if self.template and not self.data.endswith(".jsonl"):
            raise ValueError("--template is for a JSONL file; give one with --data FILE.jsonl")
        self._windows.check()

    def batches(self, model: str, loaded: Any, tokenizer: Any, *, answers: bool) -> list[Any]:
        """One batch a text: nothing is padded, and bars count texts.

        Args:
            model: what the user called the model.
            loaded: the model.
            tokenizer: None if it has none.
            answers: whether labels are wanted; a text without a template is an answer as a whole.

        Raises:
            ValueError: there is no tokenizer, the model does not read text, or the texts are too short or too long.
        """
        import torch

        if not (self.prompts or self.data):
            return []
        if tokenizer is None:
            raise ValueError(f"{model} has no tokenizer, which texts need; add its tokenizer files to the directory")
        if loaded.main_input_name != "input_ids":
            raise ValueError(
                f"{model} takes {loaded.main_input_name}, not text; from Python, eckart.analyze(data=) does"
            )
        found: list[Any] = []
        for text in self.prompts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            found.append({"input_ids": ids} | ({"decoder_input_ids": ids} if _reads_and_writes(loaded) else {}))
        if self.data.endswith(".jsonl") and (self.template or (answers and self.field == "text")):
            return self._with_labels(found, answers) + self._examples(loaded, tokenizer, answers)
        if self.data:
            found += self._windows.to_calibrate(model, loaded.config, tokenizer)
        return self._with_labels(found, answers)

    @property
    def _windows(self) -> Texts:
        return Texts(self.data, "", self.field, self.samples, self.length, batch_size=1)

    def _examples(self, loaded: Any, tokenizer: Any, answers: bool) -> list[Any]:
        """The first lines of a JSONL file; labels are those of the answer."""
        import torch

        from eckart.models.answers import DEFAULT_TEMPLATE, read_examples

        cut = window_length(loaded, self.length)
        examples = read_examples(self.data, tokenizer, template=self.template or DEFAULT_TEMPLATE, length=cut)
        kept = ("input_ids", "labels") if answers else ("input_ids",)
        found = [{key: torch.tensor([one[key]]) for key in kept} for one in examples[: self.samples]]
        if _reads_and_writes(loaded) and not answers:
            found = [{**one, "decoder_input_ids": one["input_ids"]} for one in found]
        return found

    @staticmethod
    def _with_labels(batches: list[Any], answers: bool) -> list[Any]:
        return [{**batch, "labels": batch["input_ids"]} for batch in batches] if answers else batches


def _reads_and_writes(model: Any) -> bool:
    """Whether it has an encoder and a decoder, which is shown writing the text that was read."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


@dataclass(frozen=True)
class Models:
    """The models of a request.

    Attributes:
        model: what is looked at, or what the adapter is on.
        base: what it is compared with; empty for none.
        adapter: directory of an adapter on the model; empty for none.
    """

    model: str
    base: str
    adapter: str

    @classmethod
    def of(cls, model: str, base: str, name: str, needs: frozenset[str]) -> Models:
        """Tell which is which, or refuse, before anything is loaded."""
        from eckart.models import resolve
        from eckart.models.adapter_files import is_adapter

        adapters = [one for one in (model, base) if one and is_adapter(one)]
        if len(adapters) == 2:
            raise ValueError(f"{model} and {base} are both adapters; give one of them with the model that it is on")
        if adapters and not base:
            raise ValueError(f"{model} is an adapter; give the model that it is on with --base")
        if "base" in needs and not base:
            raise ValueError(f"{name} needs a second model to compare with; give --base")
        if base and not adapters and "base" not in needs:
            raise ValueError(f"{name} looks at one model; leave out --base")
        foundation = base if adapters == [model] else model
        made = cls(foundation, "", adapters[0]) if adapters else cls(model, base, "")
        for one in filter(None, (made.model, made.base)):
            resolve(one)
        return made

    def load(self, dtype: str, device: str, *, progress: bool) -> tuple[Any, Any, Any, list[str]]:
        """The model, with the adapter on it if there is one; its base or None; the tokenizer; what to know of them."""
        from eckart.models import resolve
        from eckart.models.adapter_files import check_base, load_adapter

        note = check_base(self.adapter, resolve(self.model)) if self.adapter else None
        loaded, tokenizer = load_model(self.model, dtype, device, progress=progress)
        if self.adapter:
            loaded = load_adapter(loaded, self.adapter)
        other = load_model(self.base, dtype, device, progress=progress)[0] if self.base else None
        return loaded, other, tokenizer, [note] if note else []
