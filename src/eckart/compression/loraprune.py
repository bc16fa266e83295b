"""LoRAPrune: heads and MLP channels go while a LoRA is trained, by scores made of the LoRA's own gradients.

    G = g_B A + B g_A  (m, n)                 the gradient of W as far as the LoRA sees it, B (m, r), A (r, n)
    I = |G * (W + c B A)|                     importance of each weight, c = alpha / r
    S <- 0.9 S + 0.1 sum of I over a head (all query heads that share its keys) or over a channel, each module's
         divided by its length, added over q, k, v, o or over gate, up, down

Every few steps the groups of lowest S are masked, along a cubic schedule; a group that is gone stays gone. At the end
the LoRA is merged and the masked rows and columns are cut out. M. Zhang et al., LoRAPrune: Pruning Meets Low-Rank
Parameter-Efficient Fine-Tuning, ACL Findings 2024, arXiv 2305.18403; code: aim-uofa/LoRAPrune. What we do differently:
whole groups of query heads go with grouped-query attention, where the published code regroups rows of keys into heads
that do not exist; the term g_B g_A, which depends on the scale of the gradient, is left out; what the head counts round
away is made up for by channels, so that the ratio is met.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..models.batches import with_labels
from ..models.parts import AttentionPart, MLPPart
from ..models.progress import track
from ..models.result import LayerResult
from ..models.topology import block_of, blocks
from .contract import Job, ModelMethod
from .groups_to_prune import Group, cut_out, groups_of
from .layer import left_dense

__all__ = ["LoRAPrune", "importance", "scheduled"]

Importance = Literal["lora", "magnitude"]


def importance(
    weight: Tensor, a: Tensor, b: Tensor, grad_a: Tensor | None, grad_b: Tensor | None, scaling: float, kind: Importance
) -> Tensor:
    """|G * (W + c B A)| (m, n) from a LoRA's factors and their gradients; |W + c B A| for "magnitude"."""
    merged = weight + scaling * b @ a
    if kind == "magnitude":
        return merged.abs()
    gradient = torch.zeros_like(merged)
    if grad_b is not None:
        gradient += grad_b @ a
    if grad_a is not None:
        gradient += b @ grad_a
    return (gradient * merged).abs()


def scheduled(step: int, steps: int, warmup: float, cooldown: float) -> float:
    """Fraction of the final pruning to be done at a step: 0 at first, 1 at the end, a cubic between.

    Example:
        >>> [round(scheduled(step, 10, 0.1, 0.1), 2) for step in (0, 1, 5, 9)]
        [0.0, 0.0, 0.88, 1.0]
    """
    start, end = warmup * steps, (1 - cooldown) * steps
    if step >= end:
        return 1.0
    done = (step - start) / (end - start)
    return 1 - (1 - done) ** 3 if done > 0 else 0.0


@dataclass(frozen=True)
class LoRAPrune(ModelMethod):
    """Structured pruning guided by a LoRA that is trained on the way.

    Attributes:
        steps: updates of the LoRA, one calibration batch each, in turn.
        learning_rate: of AdamW; 1e-4.
        rank: of the LoRA, 8.
        alpha: of the LoRA, 16.
        prune_every: steps between two prunings, 10.
        warmup: fraction of the steps before the first one, 0.1.
        cooldown: fraction of the steps after the last one, 0.1.
        momentum: of the moving average of scores, 0.9.
        spared: fraction of the blocks, from the first on, that is not pruned; 0.1. Nor is the last block.
        score: "lora" as published, or "magnitude" of the merged weight, for comparison.
        seed: of the LoRA's start.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from eckart import compress
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model, data = LlamaForCausalLM(config), [torch.arange(24).reshape(2, 12)]
        >>> result = compress(model, LoRAPrune(steps=4), ratio=0.2, data=data, progress=False)
        >>> bool(result.ratio >= 0.2), model.model.layers[0].mlp.up_proj.out_features < 32
        (True, True)

    Reference:
        M. Zhang et al., ACL Findings 2024, arXiv 2305.18403.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    steps: int = 200
    learning_rate: float = 1e-4
    rank: int = 8
    alpha: int = 16
    prune_every: int = 10
    warmup: float = 0.1
    cooldown: float = 0.1
    momentum: float = 0.9
    spared: float = 0.1
    score: Importance = "lora"
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_choices(score=Importance)
        for name in ("steps", "rank", "prune_every"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "alpha"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup", "cooldown", "momentum", "spared"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.warmup + self.cooldown >= 1:
            raise ValueError("warmup and cooldown leave no step to prune in; they must sum to less than 1")

    def check(self, job: Job) -> None:
        """There are parts to prune, enough of them, and batches with something to predict."""
        if any("input_ids" not in batch and "labels" not in batch for batch in job.batches):
            raise ValueError("loraprune trains on the batches: give each labels, or input_ids to predict")
        self._groups(job)

    def _groups(self, job: Job) -> list[Group]:
        """What can go, with how much of it has to."""
        repeated = blocks(job.model)
        names = [block.name for block in repeated]
        first, last = int(self.spared * len(repeated)), len(repeated) - 1
        prunable = []
        for part in job.parts:
            block = block_of(part.linears[0].name, repeated)
            assert block is not None  # the selection has only such
            place = names.index(block.name)
            if first <= place < last or len(repeated) == 1:
                prunable.append((place, part))
        total = sum(ref.in_features * ref.out_features for ref in job.members)
        return groups_of(prunable, math.ceil(job.ratio * total))

    def compress(self, job: Job) -> tuple[nn.Module, list[LayerResult]]:
        """Train, mask, merge, cut."""
        from peft import LoraConfig, get_peft_model

        groups = self._groups(job)
        names = [ref.name for ref in job.members]
        conv1d = any(ref.kind == "conv1d" for ref in job.members)
        trained = {name: p.requires_grad for name, p in job.model.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            config = LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=names, fan_in_fan_out=conv1d)
            tuned: Any = get_peft_model(job.model, config)
        try:
            with _masked(tuned.get_base_model(), groups):
                self._train(tuned, groups, job)
        except BaseException:
            tuned.unload()
            _ask_gradients(job.model, trained)
            raise
        tuned.merge_and_unload()
        _ask_gradients(job.model, trained)
        with torch.no_grad():
            cut = cut_out(job.model, groups)
        return job.model, [cut.get(ref.name) or left_dense(ref) for ref in job.members]

    def _train(self, tuned: Any, groups: list[Group], job: Job) -> None:
        base = tuned.get_base_model()
        device = next(base.parameters()).device
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], self.learning_rate)
        batches = itertools.cycle(job.batches)
        for step in track(range(self.steps), "prune and train", enabled=job.progress):
            batch = {key: value.to(device) for key, value in next(batches).items()}
            if "labels" not in batch:
                batch = with_labels(batch)
            loss = tuned(**batch).loss
            if not bool(loss.isfinite()):
                raise ValueError(
                    f"the loss of step {step} is not finite; lower learning_rate (now {self.learning_rate})"
                )
            loss.backward()
            with torch.no_grad():
                for group in groups:
                    group.observe(self._scores(base, group.part), self.momentum)
                fraction = scheduled(step, self.steps, self.warmup, self.cooldown)
                if step % self.prune_every == 0 or step == self.steps - 1:
                    for group in groups:
                        group.mask_lowest(fraction if step < self.steps - 1 else 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def _scores(self, base: nn.Module, part: AttentionPart | MLPPart) -> Iterator[tuple[Tensor, bool]]:
        """Importance of each linear of a part, and whether its columns are what goes."""
        for ref in part.linears:
            layer: Any = base.get_submodule(ref.name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            found = importance(
                ref.weight.detach(), a.detach(), b.detach(), a.grad, b.grad, layer.scaling["default"], self.score
            )
            yield found, ref is part.output


def _ask_gradients(model: nn.Module, asked: Mapping[str, bool]) -> None:
    """PEFT freezes what it wraps; back to how it was."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(asked[name])


@contextmanager
def _masked(base: nn.Module, groups: list[Group]) -> Iterator[None]:
    """While it lasts, what is masked gives zeros."""
    handles = []
    for group in groups:
        for name, mask in group.output_masks():
            hook = lambda _module, _args, y, mask=mask: y * mask().to(y)  # noqa: E731
            handles.append(base.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
