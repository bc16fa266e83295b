"""The adapter tuner against PEFT's own: time to initialise, time of a training step, memory.

python benchmarks/adapters.py
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from common import interleaved, medians, ratio, record
from language_model import calibration, demo
from peft import LoraConfig, get_peft_model

from eckart import adapt
from eckart.adapters.layer import EckartLayer
from eckart.linalg import subspace_distance
from eckart.models import linears

RANK = 16


def peft(model: Any, **options: Any) -> Any:
    names = [ref.name for ref in linears(model).linears]
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, **options))


def step(model: Any, batch: Any) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def run() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def activation_bytes(model: Any, batch: Any) -> int:
    """What a forward pass keeps for the backward pass, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch, labels=batch["input_ids"]).loss  # held: what is freed may be allocated again
    del loss
    return sum(kept.values())


def main() -> None:
    model, tokenizer = demo()
    figures: dict[str, float] = {}

    start = time.perf_counter()
    mine = adapt(copy.deepcopy(model), "pissa", RANK, progress=False)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    theirs = peft(copy.deepcopy(model), init_lora_weights="pissa")
    exact = time.perf_counter() - start
    figures["pissa, rank 16 on 210 layers: seconds, eckart"] = ours
    figures["pissa, rank 16 on 210 layers: seconds, PEFT (exact)"] = exact
    figures["pissa: eckart / PEFT (<= 0.1)"] = ours / exact
    distances = []
    for name, layer in mine.named_modules():
        if isinstance(layer, EckartLayer):
            other = theirs.get_submodule(name).lora_A["default"].weight.detach()
            distances.append(float(subspace_distance(layer.eckart_adapters["default"].right.detach().mT, other.mT)))
    figures["pissa: largest projection distance of the subspaces"] = max(distances)
    figures["pissa: median projection distance of the subspaces (<= 1e-3)"] = sorted(distances)[len(distances) // 2]
    del mine, theirs

    batch = calibration(tokenizer, samples=2)[0]
    batch = {"input_ids": batch["input_ids"][:2, :256]}
    lora = peft(copy.deepcopy(model)).train()
    contenders = {"LoRA of PEFT": step(lora, batch)}
    kept = {"LoRA of PEFT": activation_bytes(lora, batch)}
    for name in ("lora", "nlora", "pissa", "sorsa", "lora-xs", "paca"):
        options = {"variant": "slora"} if name == "nlora" else {}
        adapted = adapt(copy.deepcopy(model), name, RANK, options=options, progress=False).train()
        contenders[name] = step(adapted, batch)
        kept[name] = activation_bytes(adapted, batch)
    seconds = interleaved(contenders, repeats=9)
    figures["step, 512 tokens: seconds, LoRA of PEFT"] = medians(seconds)["LoRA of PEFT"]
    for name in contenders:
        if name != "LoRA of PEFT":
            figures[f"step: {name} / LoRA of PEFT (<= 1.05 for additive methods)"] = ratio(
                seconds, name, "LoRA of PEFT"
            )
    for name, size in kept.items():
        figures[f"kept for the backward pass, 512 tokens: {name}, MB"] = size / 1e6
    figures["paca / LoRA of PEFT, kept for the backward pass (< 1)"] = kept["paca"] / kept["LoRA of PEFT"]
    record("adapters", figures)


if __name__ == "__main__":
    main()
