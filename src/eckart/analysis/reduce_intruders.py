"""Scale the intruder dimensions of a fine-tuned model down, to undo some of what it forgot.

    W_new = W + (λ - 1) sum over the intruders of s_j u_j v_jᵀ       (`eckart.analysis.intruder_dimensions`)

W_new - W0 has up to one rank more for every intruder than ΔW: as an adapter of that rank nothing is lost, while PEFT's
``reduce_intruder_dimension`` cuts it back to the rank of ΔW ("same-rank" here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..linalg import SingularBasis
from ..models.adapted import AdaptedRef, adapted_linears, adapted_modules, is_adapted, under_adapters
from ..models.lora import lora_on
from ..models.pairs import Pair, map_pairs, pair
from ..models.select import Where, linears
from ..structures import Structure
from .intruder_dimensions import IntruderDimensions, correction, leading

__all__ = ["ReducedForm", "Reduction", "reduce_intruders"]

ReducedForm = Literal["dense", "adapter", "same-rank"]

_ROUNDING = 1e-6  # singular values of a change below this share of the largest are none


@dataclass
class Reduction:
    """What `reduce_intruders` did.

    Attributes:
        model: The reduced model: of transformers for "dense", else of PEFT.
        form: As asked for.
        scale: λ.
        rows: One entry a weight looked at: "layer", "intruders", "removed" ||W_new - W||_F / ||W||_F; for adapters also
            "rank" and "error", the part of W_new - W0 that the rank leaves out, relative.
    """

    model: Any = field(repr=False)
    form: str
    scale: float
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def intruders(self) -> int:
        """How many were scaled."""
        return sum(row["intruders"] for row in self.rows)


@dataclass(frozen=True)
class _Change:
    """The correction left right of one weight, and the factors B A of W_new - W0, where they are asked for."""

    left: Tensor
    right: Tensor
    row: dict[str, Any]
    factors: tuple[Tensor, Tensor] | None = None


def reduce_intruders(
    model: nn.Module,
    base: nn.Module | None = None,
    scale: float = 0.75,
    *,
    form: ReducedForm = "dense",
    top: int = 10,
    threshold: float = 0.5,
    where: Where | None = None,
    progress: bool = True,
) -> Reduction:
    """Scale the intruder dimensions of a fine-tuned model by λ.

    All is computed and checked before the first weight changes.

    Args:
        model: The fine-tuned model, or a PEFT model. It is changed in place; a PEFT model is used up: its layers become
            those of the result.
        base: What it was made from; left out for a PEFT model, whose adapters lie on it.
        scale: λ. 1 changes nothing, 0 removes the intruders: the larger, the LESS is removed. Above 1 amplifies them.
        form: "dense": the weights of the model (adapters are merged). "adapter": a LoRA on the base with W_new - W0
            exact, of rank r plus the number of intruders. "same-rank": its best approximation of rank r.
        top: k, how many leading directions of each weight are looked at.
        threshold: ε, the cosine below which one is an intruder.
        where: Whose intruders; default all linears of the blocks.
        progress: Show a bar with the time left.

    Returns:
        The model and what was done. `eckart.models.save` writes a dense one, ``save_pretrained`` an adapter.

    Raises:
        ValueError: A bad option, no base, two models of different shapes, NaN or Inf in a weight, a structure that
            cannot take a dense change, or an adapter that has no form as a LoRA. The model is as before.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> import copy
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=64, n_layer=1, n_head=2))
        >>> tuned, weight = copy.deepcopy(base), base.transformer.h[0].attn.c_proj.weight
        >>> tuned.transformer.h[0].attn.c_proj.weight.data += torch.randn(64, 1) * torch.randn(64) / 8
        >>> reduce_intruders(tuned, base, 0.0, progress=False).intruders
        1
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"scale must be a finite number of at least 0 (1 changes nothing, 0 removes), not {scale}")
    if form not in get_args(ReducedForm):
        raise ValueError(f"form must be one of {', '.join(get_args(ReducedForm))}, not {form!r}")
    options = IntruderDimensions(top=top, threshold=threshold)
    if base is None and not is_adapted(model):
        raise ValueError("intruders are told from the directions of a base model; pass base=")
    before = under_adapters(model) if base is None else base
    if base is not None and is_adapted(base):
        raise ValueError("the base has adapters on it; give the model under them")
    pairs = pair(adapted_linears(before, where), adapted_linears(model, where))
    if form == "dense":
        _check_dense(model, {one.name for one in pairs})
    kept = pairs if form == "dense" else _with_all_that_differs(pairs, before, model)
    chosen = {one.name for one in pairs}

    def change(one: Pair) -> _Change:
        return _change(one, scale, options, looked_at=one.name in chosen, form=form)

    found = map_pairs(change, kept, "intruders", progress=progress)
    changes = {one.name: changed for one, changed in zip(kept, found, strict=True)}
    result = _dense(model, changes) if form == "dense" else _adapter(model, before, changes)
    return Reduction(result, form, scale, [changed.row for name, changed in changes.items() if name in chosen])


def _change(one: Pair, scale: float, options: IntruderDimensions, *, looked_at: bool, form: str) -> _Change:
    base, weight = one.read()
    found = leading(weight, SingularBasis(base), options.top, options.near) if looked_at else None
    if found is None:
        left, right = base.new_zeros(one.shape[0], 0).double(), base.new_zeros(0, one.shape[1]).double()
    else:
        left, right = correction(found, options.threshold, scale)
    size = float(weight.double().norm())
    row = {
        "layer": one.name,
        "intruders": left.shape[1],
        "removed": float(left.norm(dim=0).norm()) / size if size else 0.0,
    }
    if form == "dense":
        return _Change(left, right, row)
    delta = (one.second.delta() if isinstance(one.second, AdaptedRef) else weight.double() - base).double()
    exact = SingularBasis(delta + left @ right)
    values = exact.values
    rank = int((values > _ROUNDING * values[:1]).sum())
    if form == "same-rank":
        own = SingularBasis(delta).values
        rank = min(rank, int((own > _ROUNDING * own[:1]).sum()))
    root = values[:rank].sqrt()
    lost = float(values[rank:].norm() / values.norm()) if len(values) else 0.0
    factors = (exact.left(rank) * root, root[:, None] * exact.right(rank).mT) if rank else None
    return _Change(left, right, {**row, "rank": rank, "error": lost}, factors)


def _check_dense(model: nn.Module, names: set[str]) -> None:
    """Refuse structures: a dense change has no place in one."""
    changed = names | set(adapted_modules(model))
    for name, module in under_adapters(model).named_modules():
        if isinstance(module, Structure) and name in changed:
            raise ValueError(
                f"{name} is stored as {type(module).__name__}, which cannot take a dense change; export the model "
                'first, or use form="adapter"'
            )


def _with_all_that_differs(pairs: list[Pair], before: nn.Module, model: nn.Module) -> list[Pair]:
    """The pairs with every other weight that an adapter of the result has to carry too."""
    adapted = adapted_modules(model)
    names = {*adapted, *(one.name for one in pairs)}

    def wanted(name: str, _: nn.Module) -> bool:
        return name in names

    every = pair(adapted_linears(before, wanted), adapted_linears(model, wanted))
    carried = {one.name for one in every if isinstance(one.second, AdaptedRef)}
    other = next((name for name in adapted if name not in carried), None)
    if other is not None:
        raise ValueError(f'{other} is trained too and has no form as a LoRA of a linear layer; use form="dense"')
    return every


def _dense(model: Any, changes: dict[str, _Change]) -> Any:
    plain = model.merge_and_unload() if is_adapted(model) else model
    changed = {name: found for name, found in changes.items() if found.left.shape[1]}
    if changed:
        with torch.no_grad():
            for ref in linears(plain, lambda name, _: name in changed).linears:
                found = changed[ref.name]
                wide = ref.weight.to(torch.float64)
                ref.weight.copy_(wide + (found.left @ found.right).to(wide.device))
    return plain


def _adapter(model: Any, before: Any, changes: dict[str, _Change]) -> Any:
    factors = {name: found.factors for name, found in changes.items() if found.factors}
    if not factors:
        raise ValueError("there is nothing to make an adapter of: no weight differs from the base's")
    if not is_adapted(model):
        return lora_on(before, factors)
    task = next(iter(model.peft_config.values())).task_type
    return lora_on(model.unload(), factors, task)
