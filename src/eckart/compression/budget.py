"""A budget in one of four units, and the rank it means for every selected matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..linalg.allocate import Matrix, allocate
from ..linalg.rank import Form, break_even_rank, energy_rank, num_parameters, rank_for_parameters
from ..models.topology import kinds_of
from .policies import Policy, is_spectral, rule_of

__all__ = ["Budget", "kinds_of"]

Unit = Literal["ratio", "rank", "bytes", "energy"]


@dataclass(frozen=True)
class Budget:
    """How small the selected weights are to become; exactly one unit.

    Attributes:
        unit: "ratio", "rank", "bytes" or "energy".
        value: ratio: fraction of the selected weights' parameters to remove, in (0, 1). rank: the same rank
            for all matrices. bytes: size of the whole model afterwards. energy: share of each matrix's
            squared (weighted) singular values to keep, in (0, 1).
    """

    unit: Unit
    value: float

    @classmethod
    def of(
        cls,
        *,
        ratio: float | None = None,
        rank: int | None = None,
        bytes: float | None = None,
        energy: float | None = None,
    ) -> Budget:
        """The one unit that is not None; ratio 0.2 if all are.

        Raises:
            ValueError: if more than one unit is given, or the value is out of its range.
        """
        units: dict[Unit, float | None] = {"ratio": ratio, "rank": rank, "bytes": bytes, "energy": energy}
        given = [(unit, value) for unit, value in units.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"give one budget, not {' and '.join(unit for unit, _ in given)}")
        unit, value = given[0] if given else ("ratio", 0.2)
        if not math.isfinite(value):
            raise ValueError(f"{unit} must be a finite number, not {value}")
        if unit in ("ratio", "energy") and not 0 < value < 1:
            meaning = "fraction of parameters to remove" if unit == "ratio" else "fraction of energy to keep"
            raise ValueError(f"{unit} must lie between 0 and 1 (the {meaning}), not {value}")
        if unit == "rank" and (value < 1 or value != int(value)):
            raise ValueError(f"rank must be a whole number of at least 1, not {value}")
        if unit == "bytes" and value <= 0:
            raise ValueError(f"bytes must be positive, not {value}")
        return cls(unit, value)

    def __str__(self) -> str:
        return f"{self.unit} {self.value:g}"

    def needs_spectra(self, policy: Policy) -> bool:
        """Whether ranks depend on the singular values of all matrices."""
        return self.unit == "energy" or (self.is_shared and policy != "uniform" and is_spectral(policy))

    @property
    def is_shared(self) -> bool:
        """Whether it is one amount for all matrices together, for a policy to share."""
        return self.unit in ("ratio", "bytes")

    def as_ratio(
        self, shapes: Mapping[str, tuple[int, int]], form: Form, model_bytes: int, bytes_per_parameter: float
    ) -> float:
        """The fraction of the selected parameters that it removes.

        Raises:
            ValueError: it is a rank or an energy, or bytes that cannot be reached.
        """
        if not self.is_shared:
            raise ValueError(f"a budget in {self.unit} says nothing here; give a ratio or bytes")
        return self.value if self.unit == "ratio" else self._ratio(shapes, form, model_bytes, bytes_per_parameter)

    def ranks(
        self,
        shapes: Mapping[str, tuple[int, int]],
        *,
        policy: Policy,
        form: Form,
        spectra: Mapping[str, torch.Tensor] | None = None,
        kinds: Mapping[str, str] | None = None,
        shares: Mapping[str, float] | None = None,
        limits: Mapping[str, Any] | None = None,
        model_bytes: int = 0,
        bytes_per_parameter: float = 4.0,
    ) -> dict[str, int]:
        """The rank of each matrix; min(m, n) where it stays dense because no rank below pays.

        Args:
            shapes: name -> (m, n).
            policy: how one budget is shared, see `eckart.compression.policies`.
            form: storage form, which sets what a rank costs.
            spectra: name -> singular values, where `needs_spectra`; those of `loss_spectrum` for "fisher".
            kinds: name -> type of the matrix (all query projections, say), for policies that share
                within a type.
            shares: name -> fraction of it to remove, under a policy that looks at no spectrum.
            limits: what a method allows of ranks, as keywords of `eckart.linalg.allocate`.
            model_bytes: size of the whole model now, for the unit bytes.
            bytes_per_parameter: size of one selected weight, for the unit bytes.

        Raises:
            ValueError: if the budget cannot be met, with the nearest one that can.
        """
        if self.unit == "rank":
            return {name: _or_dense(int(self.value), shape, form) for name, shape in shapes.items()}
        if self.unit == "energy":
            assert spectra is not None
            return {
                name: _or_dense(max(1, int(energy_rank(spectra[name], self.value))), shape, form)
                for name, shape in shapes.items()
            }
        ratio = self.as_ratio(shapes, form, model_bytes, bytes_per_parameter)
        if not is_spectral(policy):
            assert shares is not None
            return {name: _keeping(1 - shares[name], shape, form) for name, shape in shapes.items()}
        matrices = [
            Matrix(
                name=name,
                shape=shape,
                spectrum=None if spectra is None else spectra[name],
                group=(kinds or {}).get(name, ""),
            )
            for name, shape in shapes.items()
        ]
        try:
            return allocate(matrices, ratio, policy=rule_of(policy), form=form, **(limits or {}))
        except ValueError as error:
            if self.unit == "ratio":
                raise
            raise ValueError(f"{self.value:,.0f} bytes cannot be reached: {error}") from error

    def _ratio(
        self, shapes: Mapping[str, tuple[int, int]], form: Form, model_bytes: int, bytes_per_parameter: float
    ) -> float:
        selected = sum(m * n for m, n in shapes.values()) * bytes_per_parameter
        # The pivoted form keeps an index of 4 bytes for each feature of the smaller side.
        indexes = sum(4 * min(shape) for shape in shapes.values()) if form == "pivoted" else 0
        ratio = (model_bytes + indexes - self.value) / selected
        if self.value >= model_bytes or not 0 < ratio < 1:
            smallest, largest = model_bytes - selected, model_bytes
            raise ValueError(
                f"{self.value:,.0f} bytes cannot be reached: the model has {largest:,.0f} bytes, of which "
                f"{smallest:,.0f} are not selected; choose a value in between"
            )
        return ratio


def _or_dense(rank: int, shape: tuple[int, int], form: Form) -> int:
    m, n = shape
    return rank if rank < break_even_rank(m, n, form) and num_parameters(m, n, rank, form) < m * n else min(m, n)


def _keeping(fraction: float, shape: tuple[int, int], form: Form) -> int:
    """The largest rank that stores at most this fraction of a matrix; dense if that is all of it."""
    m, n = shape
    return _or_dense(max(1, rank_for_parameters(m, n, math.floor(fraction * m * n), form)), shape, form)
