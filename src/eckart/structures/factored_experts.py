"""A bank of experts of which groups share a factor: W_e = U V_e, or W_e = U_e V, for gate, up and down.

    expert_e(x) = W_down_e (act(W_gate_e x) * (W_up_e x)),   W_gate_e, W_up_e (I, H),   W_down_e (H, I)

A group of one has factors of its own. Tokens run through two thin products a matrix; no matrix of an expert is built.
Not a `Structure`: that maps rows by one matrix, and here each row says which experts it goes to. The interface is the
same otherwise: ``spec``, ``from_spec``, ``dense``, ``num_parameters``, ``nbytes``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .shared_factor import FactorSide, SharedFactor

__all__ = ["ExpertGroup", "FactoredExperts", "GroupFactors"]


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that share their factors.

    Attributes:
        members: their numbers in the bank.
        ranks: of gate, up and down.
        sides: which factor of gate, up and down is shared.
    """

    members: tuple[int, ...]
    ranks: tuple[int, int, int]
    sides: tuple[FactorSide, FactorSide, FactorSide] = ("left", "left", "left")


class GroupFactors(nn.Module):
    """The factors of one group: ``gate``, ``up`` and ``down``."""

    def __init__(self, gate: SharedFactor, up: SharedFactor, down: SharedFactor) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor, index: int, act_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """One expert of the group alone, x (tokens, H) -> (tokens, H)."""
        y: Tensor = self.down(act_fn(self.gate(x, index)) * self.up(x, index), index)
        return y


class FactoredExperts(nn.Module):
    """The experts of one layer, in the place of transformers' bank of fused 3-D weights.

    Args:
        hidden_features: H, width of the model.
        expert_features: I, width of an expert.
        groups: which experts share their factors; every expert from 0 to E - 1 is in one of them.
        act_fn: activation of the experts; not stored, so the model's class has to give it.
        device: device of the parameters; "meta" allocates nothing.
        dtype: dtype of the parameters.

    Attributes:
        groups: the factors of each group.
        layout: the groups as given.

    Raises:
        ValueError: an expert is missing or stands in two groups, a size is not positive, or no activation.

    Example:
        >>> group = ExpertGroup((0, 1), ranks=(2, 2, 3))
        >>> bank = FactoredExperts(8, 6, [group], nn.SiLU(), device="meta")
        >>> bank.count, bank.num_parameters(), 2 * 3 * 8 * 6
        (2, 148, 288)
    """

    type_name: ClassVar[str] = "factored_experts"

    def __init__(
        self,
        hidden_features: int,
        expert_features: int,
        groups: Sequence[ExpertGroup],
        act_fn: Callable[[Tensor], Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        members = [member for group in groups for member in group.members]
        if not members or sorted(members) != list(range(len(members))):
            raise ValueError(f"groups must hold every expert from 0 on once, got {members}")
        if not callable(act_fn):
            raise ValueError(f"experts need an activation, not {act_fn!r}")
        self.hidden_features, self.expert_features = hidden_features, expert_features
        self.layout, self.act_fn = tuple(groups), act_fn
        inner, outer = (hidden_features, expert_features), (expert_features, hidden_features)
        self.groups = nn.ModuleList(
            GroupFactors(
                *(
                    SharedFactor(len(group.members), *shape, rank, side, device=device, dtype=dtype)
                    for shape, rank, side in zip((inner, inner, outer), group.ranks, group.sides, strict=True)
                )
            )
            for group in groups
        )
        places = {m: (g, i) for g, group in enumerate(groups) for i, m in enumerate(group.members)}
        self._places = [places[member] for member in range(len(members))]

    @property
    def count(self) -> int:
        """E, how many experts are stored."""
        return len(self._places)

    def run(self, index: int, x: Tensor) -> Tensor:
        """The output of one expert alone, without a gate weight: x (tokens, H) -> (tokens, H)."""
        group, place = self._places[index]
        y: Tensor = self.groups[group](x, place, self.act_fn)
        return y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over the chosen experts of gate weight times output.

        Args:
            hidden_states: (tokens, H).
            top_k_index: (tokens, k) experts; numbers from E on stand for none, as in transformers.
            top_k_weights: (tokens, k).

        Returns:
            (tokens, H).
        """
        out = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index < self.count:
                token, slot = (top_k_index == index).nonzero(as_tuple=True)
                y = self.run(index, hidden_states[token]) * top_k_weights[token, slot, None]
                out = out.index_add(0, token, y.to(out.dtype))
        return out

    def dense(self) -> dict[str, Tensor]:
        """The weights as transformers fuses them: gate_up_proj (E, 2 I, H) and down_proj (E, H, I)."""
        gate_up: dict[int, Tensor] = {}
        down: dict[int, Tensor] = {}
        for group, factors in zip(self.layout, self.groups, strict=True):
            assert isinstance(factors, GroupFactors)
            parts = (factor.dense() for factor in (factors.gate, factors.up, factors.down))
            for member, gate, up, last in zip(group.members, *parts, strict=True):
                gate_up[member], down[member] = torch.cat((gate, up)), last
        order = range(self.count)
        return {
            "gate_up_proj": torch.stack([gate_up[index] for index in order]),
            "down_proj": torch.stack([down[index] for index in order]),
        }

    def num_parameters(self) -> int:
        """Stored numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    def spec(self) -> dict[str, Any]:
        """What is needed to build the same module without its values and its activation, as plain JSON data."""
        groups = [{name: list(value) for name, value in asdict(group).items()} for group in self.layout]
        sizes = {"hidden_features": self.hidden_features, "expert_features": self.expert_features}
        return {"type": self.type_name, **sizes, "groups": groups}

    @classmethod
    def from_spec(
        cls,
        spec: Mapping[str, Any],
        act_fn: Callable[[Tensor], Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the module of a spec, possibly through JSON; values uninitialised.

        Raises:
            ValueError: the spec is of another type, or lacks or adds an entry.
        """
        if spec.get("type") != cls.type_name:
            raise ValueError(f"{cls.__name__} reads specs of type {cls.type_name!r}, got {spec.get('type')!r}")
        given = {name: value for name, value in spec.items() if name != "type"}
        try:
            given["groups"] = [
                ExpertGroup(**{name: tuple(value) for name, value in group.items()}) for group in given["groups"]
            ]
            return cls(**given, act_fn=act_fn, device=device, dtype=dtype)
        except (KeyError, TypeError) as error:
            raise ValueError(f"spec of a {cls.type_name!r} has wrong entries: {error}") from error
