"""Speed of the compressed demo model against the dense one, batch 1, ratio 0.5, both storage forms.

python benchmarks/serve.py
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from common import interleaved, medians, ratio, record
from language_model import demo

from eckart import compress
from eckart.models import linears

PROMPT, GENERATED, PREFILL = 32, 32, 512


def main() -> None:
    dense, _ = demo()
    models = {"dense": dense}
    for form in ("plain", "pivoted"):
        models[form] = copy.deepcopy(dense)
        # Speed does not depend on the values, so the method that needs no data will do.
        compress(models[form], "svd", ratio=0.5, form=form, progress=False)
    stacks = {name: [model.get_submodule(ref.name) for ref in linears(dense).linears] for name, model in models.items()}
    widths = sorted({layer.in_features for layer in stacks["dense"]})
    inputs = {n: torch.randn(1, n, generator=torch.Generator().manual_seed(n)) for n in widths}

    def stack(layers: list[Any]) -> Any:
        def run() -> None:
            with torch.inference_mode():
                for layer in layers:
                    layer(inputs[layer.in_features])

        return run

    def generate(model: Any, tokens: int) -> Any:
        ids = torch.arange(PROMPT).unsqueeze(0)
        options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}

        def run() -> None:
            with torch.inference_mode():
                model.generate(ids, attention_mask=torch.ones_like(ids), **options)

        return run

    def prefill(model: Any) -> Any:
        ids = (torch.arange(PREFILL) % 256).unsqueeze(0)

        def run() -> None:
            with torch.inference_mode():
                model(ids, use_cache=True, logits_to_keep=1)

        return run

    figures: dict[str, float] = {}
    jobs = (
        ("linears alone, 1 token", {name: stack(layers) for name, layers in stacks.items()}, 41, "<= 0.60"),
        (f"generate {GENERATED} tokens", {n: generate(m, GENERATED) for n, m in models.items()}, 9, "<= 0.85"),
        (f"prefill {PREFILL} tokens", {n: prefill(m) for n, m in models.items()}, 9, "<= 0.65"),
    )
    for title, contenders, repeats, bar in jobs:
        seconds = interleaved(contenders, repeats=repeats)
        figures[f"{title}: ms, dense"] = 1000 * medians(seconds)["dense"]
        for form in ("plain", "pivoted"):
            figures[f"{title}: {form} / dense ({bar})"] = ratio(seconds, form, "dense")
    record("serve", figures)


if __name__ == "__main__":
    main()
