"""The optimizer that runs a method: one loop over parameters for all of them.

    W ← (1 - lr decay) W - lr D,   D = method.direction(G) for a projected matrix, the dense rule's for the rest

Its state is plain tensors under keys that never change, its learning rates are the groups', and what it draws depends
on seed, parameter and step only: a run that is saved and resumed goes on bit for bit.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .contract import OptimizerMethod, Step
from .loading import check_state, copied, places
from .moments import State
from .rounding import dense, write_back
from .sharding import any_process, check_placement, from_local, local

__all__ = ["Nonfinite", "ProjectedOptimizer"]

Nonfinite = Literal["raise", "skip"]


class ProjectedOptimizer(torch.optim.Optimizer):
    """Runs the method that a subclass names on the parameters that fit it, and the dense rule on the others.

    Options of the method may be given here for all groups, or as keys of a group; `eckart.optim.low_rank_groups` makes
    the groups. Parameters of fewer or more than two axes, and matrices whose shorter side is not above the rank, take
    the dense rule; with ``trains_rest=False`` they stay as they are (set their ``requires_grad`` to False too, and no
    gradients are made for them).

    Args:
        params: Parameters, named parameters or groups of them.
        lr: Learning rate.
        weight_decay: Decoupled, as in AdamW.
        stochastic_rounding: Round bfloat16 weights at random, so that small updates are not lost. Weights that are
            stored in fewer bits, as `eckart.optim.int8_weights` does, always are.
        fused_backward: Update each parameter as soon as its gradient is there, in the backward pass, and free the
            gradient. ``step`` then has nothing left to do, and clipping by the norm of all gradients is not possible.
        accumulation: With ``fused_backward``, backward passes that make one update.
        nonfinite: What to do with NaN or Inf in a gradient: "raise", or "skip" the step. Weights and state stay.
        seed: Of everything that is drawn.
        **options: Of the method.

    Raises:
        ValueError: Bad option, or a parameter that cannot be trained; nothing has been changed.

    Attributes:
        method: Class of the method, for a subclass to set.
        options: What the subclass changes in the method's defaults.
    """

    method: ClassVar[type[OptimizerMethod]]
    options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        fused_backward: bool = False,
        accumulation: int = 1,
        nonfinite: Nonfinite = "raise",
        seed: int = 0,
        **options: Any,
    ) -> None:
        known = {field.name: field.default for field in fields(self.method)}
        if unknown := sorted(options.keys() - known.keys()):
            raise ValueError(f"{type(self).__name__} has no option {unknown[0]!r}; there is {', '.join(sorted(known))}")
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite must be 'raise' or 'skip', not {nonfinite!r}")
        if accumulation < 1 or (accumulation > 1 and not fused_backward):
            raise ValueError("accumulation must be at least 1, and is for fused_backward only")
        self._nonfinite, self._seed, self._accumulation = nonfinite, seed, accumulation
        self._fused = fused_backward
        self._hooked = WeakIdKeyDictionary()
        self._stochastic = stochastic_rounding
        self._built: dict[tuple[Any, ...], OptimizerMethod] = {}
        defaults = {**known, **self.options, **options, "lr": lr, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "optimizer": type(self).__name__})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after its options and parameters have been checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if not group["lr"] >= 0 or not group["weight_decay"] >= 0:
                raise ValueError("lr and weight_decay must not be negative")
            method = self.method_of(group)
            for name, parameter in _named(group):
                if parameter.is_complex():
                    raise ValueError(f"{name} is complex; only real parameters are supported")
                check_placement(parameter, name)
                if method.fits(parameter.shape):
                    method.check_shape(name, parameter.shape)
        except ValueError:
            self.param_groups.pop()
            raise
        group.setdefault("initial_lr", group["lr"])
        if self._fused:
            self._hook(len(self.param_groups) - 1)

    def method_of(self, group: dict[str, Any]) -> OptimizerMethod:
        """The method with a group's options."""
        values = {field.name: group[field.name] for field in fields(self.method)}
        values["betas"] = tuple(values["betas"])
        key = tuple(values.items())
        if key not in self._built:
            self._built[key] = self.method(**values)
        return self._built[key]

    def projected(self) -> list[str]:
        """Names of the parameters that the method is applied to."""
        return [name for name, parameter, group, _ in self.members() if self.method_of(group).fits(parameter.shape)]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss.

        Raises:
            RuntimeError: Sparse gradients, or NaN or Inf in one of them (see ``nonfinite``), or parameters that
                ``fused_backward`` does not know because they were put into the groups later; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._fused:
            self._check_hooks()
            return loss
        found = [entry for entry in self.members() if entry[1].grad is not None]
        if self._usable(found):
            for name, parameter, group, index in found:
                self._update(name, parameter, group, index)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: It is another optimizer's, or of parameters of other shapes; nothing is changed.
        """
        check_state(self, state_dict)
        # torch's own casts a state to the dtype of its parameter; moments of a bfloat16 weight are float32.
        state = {
            parameter: copied(state_dict["state"][key], parameter)
            for key, (_, parameter, _) in places(self, state_dict).items()
            if key in state_dict["state"]
        }
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state.update(state)

    def new_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """The state of a parameter before its first update."""
        method, dtype = self.method_of(group), torch.promote_types(parameter.dtype, torch.float32)
        like = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)  # plain, of an INT8 weight too
        if method.fits(parameter.shape):
            kept = method.allocate(like)
        else:
            kept = method.moments().allocate(like) if method.trains_rest else {}
        return {"step": torch.zeros(()), **kept}

    def _update(self, name: str, parameter: Tensor, group: dict[str, Any], index: int) -> None:
        assert parameter.grad is not None
        method = self.method_of(group)
        fits = method.fits(parameter.shape)
        state = self.state[parameter]
        if not state:
            state.update(self.new_state(parameter, group))
        state["step"] += 1
        if not fits and not method.trains_rest:
            return  # counted all the same: a distributed checkpoint has a state of all that has a gradient
        initial = group["initial_lr"]
        step = Step(int(state["step"]), index, self._seed, group["lr"] / initial if initial else 1.0)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        own = local(parameter.detach())
        plain = dense(own)
        gradient, weight = parameter.grad.to(dtype), from_local(plain, parameter)
        if fits:
            update = method.direction(gradient, state, step, weight)
        else:
            update = method.moments().direction(gradient, state, step.number)
        decay = group["lr"] * group["weight_decay"]
        mask = method.decay_mask(weight, state) if fits and decay else None
        # A copy of a large weight and the way back take as long as a projection; most weights need neither.
        in_place = plain is own and own.dtype == dtype
        value = own if in_place else plain.to(dtype, copy=True)
        if decay:
            value.mul_(1 - decay if mask is None else 1 - decay * local(mask).to(dtype))
        value.sub_(local(update), alpha=group["lr"])
        if not in_place:
            write_back(own, value, step.generator(own.device), at_random=self._stochastic)

    def _usable(self, found: Sequence[tuple[str, Tensor, dict[str, Any], int]]) -> bool:
        """Whether the gradients can be used; False for a step to be skipped."""
        for name, parameter, _, _ in found:
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient; use sparse=False in its embedding")
        gradients = [local(parameter.grad) for _, parameter, _, _ in found if parameter.grad is not None]
        # One answer is waited for, not one for each gradient.
        sums = [one.sum().isfinite().to(gradients[0].device) for one in gradients]
        finite = not sums or bool(torch.stack(sums).all())
        if not finite:  # a sum of large numbers may overflow
            finite = all(bool(one.isfinite().all()) for one in gradients)
        if not any_process(not finite, [parameter for _, parameter, _, _ in found]):
            return True
        if self._nonfinite == "skip":
            return False
        bad = [
            name
            for name, parameter, _, _ in found
            if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all())
        ]
        raise RuntimeError(
            f"NaN or Inf in the gradient of {bad[0] if bad else 'another process'}; lower the learning rate, clip the "
            "gradients, or pass nonfinite='skip'"
        )

    def members(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Any], int]]:
        """(name, parameter, group, place) of every parameter."""
        index = 0
        for group in self.param_groups:
            for name, parameter in _named(group):
                yield name, parameter, group, index
                index += 1

    def _hook(self, place: int) -> None:
        """Have the parameters of a group updated as soon as their gradients are there.

        Loading a state makes new groups, so what is kept of the group is its place.
        """
        start = sum(len(group["params"]) for group in self.param_groups[:place])
        for index, (name, parameter) in enumerate(_named(self.param_groups[place]), start):
            if parameter.requires_grad:
                passes = itertools.count(1)
                parameter.register_post_accumulate_grad_hook(
                    functools.partial(self._update_in_backward, name, place, index, passes)
                )
                self._hooked[parameter] = True

    def _check_hooks(self) -> None:
        """Refuse to go on silently where something has put other parameters into the groups, as accelerate does."""
        for name, parameter, _, _ in self.members():
            if parameter.requires_grad and parameter.grad is not None and parameter not in self._hooked:
                raise RuntimeError(
                    f"{name} is not the parameter that this optimizer was made for, so nothing updates it in the "
                    "backward pass; make the optimizer after the model is sharded, or without fused_backward"
                )

    def _update_in_backward(
        self, name: str, place: int, index: int, passes: Iterator[int], parameter: nn.Parameter
    ) -> None:
        if next(passes) % self._accumulation:
            return
        entry = (name, parameter, self.param_groups[place], index)
        with torch.no_grad():
            if self._usable([entry]):
                self._update(*entry)
        parameter.grad = None


def _named(group: dict[str, Any]) -> list[tuple[str, nn.Parameter]]:
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    return list(zip(names, group["params"], strict=True))
