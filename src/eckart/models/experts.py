"""Mixtures of experts: banks of fused 3-D expert weights, and what a router sends to them.

    expert_e(x) = W_down_e (act(W_gate_e x) * (W_up_e x))        gate_up_proj (E, 2 I, H), down_proj (E, H, I)

Banks are found by structure and by trying them, not by a list of families. Experts that every token visits (shared
ones, as in Qwen2-MoE or DeepSeek) are modules of their own beside the bank and are no part of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..linalg.assignment import assignment
from .groups import evaluating
from .progress import track

__all__ = ["Expert", "ExpertBank", "Routing", "align", "expert_banks", "order_like", "route"]


class Expert(NamedTuple):
    """The weights of one expert: gate (I, H), up (I, H), down (H, I); hidden unit i is row i, row i and column i."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def units(self) -> Tensor:
        """(I, 3 H): all weights of each hidden unit in one row."""
        return torch.cat((self.gate, self.up, self.down.mT), dim=1)

    def permuted(self, order: Tensor) -> Expert:
        """The same function with its hidden units in another order."""
        return Expert(self.gate[order], self.up[order], self.down[:, order])


@dataclass(frozen=True)
class ExpertBank:
    """The experts of one layer.

    Attributes:
        name: full name of the module.
        module: the module that holds all of them and is called with (tokens, chosen experts, gate weights).
    """

    name: str
    module: nn.Module

    @property
    def gate_up(self) -> nn.Parameter:
        """(E, 2 I, H): rows of the gate, then of the up projection."""
        return self.module.get_parameter("gate_up_proj")

    @property
    def down(self) -> nn.Parameter:
        """(E, H, I)."""
        return self.module.get_parameter("down_proj")

    @property
    def count(self) -> int:
        """E, how many experts are stored."""
        return self.gate_up.shape[0]

    @property
    def width(self) -> int:
        """I, hidden units of an expert."""
        return self.down.shape[2]

    @property
    def expert_parameters(self) -> int:
        """Numbers in one expert, 3 I H."""
        return self.gate_up[0].numel() + self.down[0].numel()

    @property
    def shape(self) -> tuple[int, int]:
        """(3 I E, H): the shape of all its weights stacked as rows of length H."""
        return 3 * self.width * self.count, self.down.shape[1]

    def expert(self, index: int) -> Expert:
        """The weights of one stored expert, as views."""
        gate, up = self.gate_up[index].chunk(2)
        return Expert(gate, up, self.down[index])

    def hidden(self, index: int, x: Tensor) -> Tensor:
        """The hidden units of one stored expert: x (N, H) -> (N, I)."""
        gate, up, _ = self.expert(index)
        x = x.to(gate.dtype)
        activation: Any = self.module.act_fn
        hidden: Tensor = activation(nn.functional.linear(x, gate)) * nn.functional.linear(x, up)
        return hidden

    def run(self, index: int, x: Tensor) -> Tensor:
        """The output of one stored expert alone, without a gate weight: x (N, H) -> (N, H)."""
        return nn.functional.linear(self.hidden(index, x), self.down[index])


@dataclass(frozen=True)
class Routing:
    """How a router used the experts of one layer on the calibration tokens; padding does not count.

    Attributes:
        tokens: N, how many there were.
        frequency: (E,) float64, fraction of the tokens whose top-k contains the expert.
        gate: (E,) float64, mean over all tokens of the expert's gate weight, which is 0 where it is not chosen.
    """

    tokens: int
    frequency: Tensor
    gate: Tensor


def expert_banks(model: nn.Module) -> list[ExpertBank]:
    """The banks of experts of a model, in its order.

    Args:
        model: a transformers model on a real device.

    Returns:
        The banks; none for a dense model. A bank with biases, transposed weights or another gate is not found.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> model = MixtralForCausalLM(MixtralConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=1, num_local_experts=4))
        >>> [(bank.name, bank.count, bank.width) for bank in expert_banks(model)]
        [('model.layers.0.mlp.experts', 4, 12)]
    """
    candidates = (ExpertBank(name, module) for name, module in model.named_modules())
    return [bank for bank in candidates if _has_shapes(bank.module) and _computes_as_said(bank)]


def _has_shapes(module: nn.Module) -> bool:
    weights = dict(module.named_parameters())
    if weights.keys() != {"gate_up_proj", "down_proj"} or not callable(getattr(module, "act_fn", None)):
        return False
    gate_up, down = weights["gate_up_proj"], weights["down_proj"]
    if gate_up.ndim != 3 or down.ndim != 3 or gate_up.device.type == "meta":
        return False
    return gate_up.shape == (down.shape[0], 2 * down.shape[2], down.shape[1])


@torch.no_grad()
def _computes_as_said(bank: ExpertBank) -> bool:
    """Whether the module's own forward is the formula above: it might interleave gate and up, or clamp one."""
    weight, index = bank.gate_up, bank.count - 1
    x = torch.linspace(-1, 1, 3 * bank.shape[1], device=weight.device).reshape(3, -1).to(weight.dtype)
    chosen = torch.full((3, 1), index, device=weight.device)
    # Behind transformers' choice of kernels, some of which do not know every type.
    forward = inspect.unwrap(type(bank.module).forward)
    try:
        found = forward(bank.module, x, chosen, torch.ones(3, 1, dtype=weight.dtype, device=weight.device))
    except (TypeError, RuntimeError, ValueError):
        return False
    expected = bank.run(index, x)
    scale = float(expected.abs().max())
    return found.shape == expected.shape and float((found - expected).abs().max()) <= 0.05 * scale


See = Callable[[ExpertBank, Tensor, Tensor], None]


def route(
    model: nn.Module,
    banks: Sequence[ExpertBank],
    batches: Sequence[Mapping[str, Any]],
    *,
    see: See | None = None,
    tokens: int | None = None,
    progress: bool = True,
    title: str = "route",
) -> dict[str, Routing]:
    """Run a model on batches and record how its routers use the experts.

    Args:
        model: a decoder-only transformers model.
        banks: of the model.
        batches: keyword arguments of its forward: ``input_ids`` and perhaps ``attention_mask``.
        see: is called with a bank, the tokens (n, H) that enter it and the experts (n, k) chosen for them, batch after
            batch.
        tokens: how many tokens in all ``see`` gets of each bank, evenly spread over the batches; None for all.
        progress: show a bar with the time left.
        title: of the bar.

    Returns:
        Name of each bank -> how it was used.

    Raises:
        ValueError: there is no token, or a bank is called on other tokens than the batch has.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> model = MixtralForCausalLM(MixtralConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2))
        >>> (used,) = route(model, expert_banks(model), [{"input_ids": torch.tensor([[1, 2, 3]])}],
        ...                 progress=False).values()
        >>> used.tokens, round(float(used.frequency.sum()), 6), round(float(used.gate.sum()), 6)
        (3, 2.0, 1.0)
    """
    masks = [_mask_of(batch) for batch in batches]
    total = sum(int(mask.sum()) for mask in masks)
    if not total:
        raise ValueError("no calibration token counts: the batches are empty or all padding")
    wanted = min(total, total if tokens is None else tokens)
    shown = torch.zeros(total, dtype=torch.bool)
    shown[torch.arange(wanted) * total // wanted] = True
    frequency = {bank.name: torch.zeros(bank.count, dtype=torch.float64) for bank in banks}
    gate = {bank.name: torch.zeros(bank.count, dtype=torch.float64) for bank in banks}
    start = 0

    def hook_of(bank: ExpertBank) -> Callable[..., None]:
        signature = inspect.signature(inspect.unwrap(type(bank.module).forward))

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, x, chosen, weights = signature.bind(module, *args, **kwargs).arguments.values()
            if len(x) != mask.numel():
                raise ValueError(f"{bank.name} was called on {len(x)} tokens of the {mask.numel()} in its batch")
            kept = mask.reshape(-1).to(x.device)
            ids = chosen[kept].cpu()
            frequency[bank.name] += torch.bincount(ids.reshape(-1), minlength=bank.count)[: bank.count]
            gate[bank.name].index_add_(0, ids.reshape(-1), weights[kept].cpu().double().reshape(-1))
            if see is not None:
                rows = shown[start : start + int(kept.sum())].to(x.device)
                see(bank, x[kept][rows], chosen[kept][rows])

        return hook

    # The head is not needed, and its logits would be the largest tensor of all.
    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    handles = [bank.module.register_forward_pre_hook(hook_of(bank), with_kwargs=True) for bank in banks]
    try:
        with evaluating(model), torch.no_grad():
            for batch, mask in zip(track(batches, title, enabled=progress), masks, strict=True):
                inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
                body(**inputs, use_cache=False)
                start += int(mask.sum())
    finally:
        for handle in handles:
            handle.remove()
    return {bank.name: Routing(total, frequency[bank.name] / total, gate[bank.name] / total) for bank in banks}


def _mask_of(batch: Mapping[str, Any]) -> Tensor:
    """(batch, length) bool: the tokens that are not padding."""
    ids = batch.get("input_ids")
    if ids is None:
        raise ValueError(f"a mixture of experts is calibrated on input_ids, got {', '.join(batch)}")
    mask = batch.get("attention_mask")
    return torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()


def order_like(expert: Expert, to: Expert) -> Tensor:
    """(I,) the order of hidden units in which an expert is most like another: see `align`.

    Example:
        >>> one = Expert(torch.eye(3), torch.eye(3), torch.eye(3))
        >>> order_like(one.permuted(torch.tensor([2, 0, 1])), one).tolist()
        [1, 2, 0]
    """
    return assignment(to.units().double() @ expert.units().double().mT)


def align(expert: Expert, to: Expert) -> Expert:
    """The same expert with its hidden units in the order in which they are most like those of another.

        max over permutations p of  sum_i <unit_i of to, unit_p(i) of expert>,  unit = (gate row, up row, down column)

    The function of the expert does not change; what changes is which units an average of the two mixes.

    Args:
        expert: to be permuted; gate (I, H), up (I, H), down (H, I).
        to: the expert whose order is taken.

    Returns:
        The permuted expert, in copies.

    Raises:
        ImportError: scipy is missing.

    Example:
        >>> one = Expert(torch.eye(3), torch.eye(3), torch.eye(3))
        >>> other = one.permuted(torch.tensor([2, 0, 1]))
        >>> all(torch.equal(a, b) for a, b in zip(align(other, one), one))
        True
    """
    return expert.permuted(order_like(expert, to))
