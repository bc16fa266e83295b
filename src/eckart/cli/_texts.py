"""The texts of one compression: what it is calibrated on, and what it is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eckart.cli._options import window_length

if TYPE_CHECKING:
    from eckart.models.batches import Part

# Held-out windows that perplexity is measured on, and how many at a time: their logits are the largest tensor here.
_HELD_OUT, _AT_A_TIME = 8, 4


@dataclass(frozen=True)
class Texts:
    """Where text comes from and how it is cut.

    Attributes:
        calibration: file, JSONL or hub data set; empty for the Python documentation.
        evaluation: likewise, to measure perplexity on.
        field: field of a JSONL file or column of a data set.
        samples: calibration windows.
        length: tokens a window; None for what suits the model.
        batch_size: calibration windows a batch.
    """

    calibration: str
    evaluation: str
    field: str
    samples: int
    length: int | None
    batch_size: int

    def check(self) -> None:
        """Refuse files that are missing or empty, before a model is loaded."""
        from eckart.models.batches import check_source

        for source in (self.calibration, self.evaluation):
            check_source(source or None)

    def to_calibrate(self, model: str, config: Any, tokenizer: Any) -> list[Any]:
        """Calibration batches for a model with this configuration.

        Raises:
            ValueError: there is no tokenizer, or too little text.
        """
        if tokenizer is None:
            raise ValueError(
                f"{model} has no tokenizer, which calibration text needs; add its tokenizer files to the directory, "
                "or use --method svd, which needs no text"
            )
        batches = self._cut(config, tokenizer, "calibration", self.samples, self.batch_size)
        if config.is_encoder_decoder:  # calibrated on writing the text that was read
            batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
        return batches

    def to_judge(self, config: Any, tokenizer: Any) -> list[Any]:
        """Held-out batches."""
        return self._cut(config, tokenizer, "evaluation", _HELD_OUT, _AT_A_TIME)

    def _cut(self, config: Any, tokenizer: Any, part: Part, samples: int, batch_size: int) -> list[Any]:
        from eckart.models import text_batches

        return text_batches(
            tokenizer,
            (self.calibration if part == "calibration" else self.evaluation) or None,
            samples=samples,
            length=window_length(config, self.length),
            batch_size=batch_size,
            part=part,
            field=self.field,
        )
