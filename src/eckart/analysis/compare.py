"""What lies between two models of the same weights: base and fine-tuned, base and adapter, dense and compressed.

W0 (m, n) = U0 S0 V0ᵀ,   W = U S Vᵀ,   D = W - W0,   U_k: the k leading columns of U

size         ||D||_F / ||W0||_F
ranks of D   stable ||D||_F^2 / s_1^2, effective exp(-sum p_i log p_i) with p_i = s_i / sum s_j; energy of the
             first 1, 8 and 64 directions, sum_{i<=r} s_i^2 / ||D||_F^2
angles       principal angles between span U0_k and span U_k, and between span V0_k and span V_k
overlap      ||U0_kᵀ D||_F^2 / ||D||_F^2 and ||D V0_k||_F^2 / ||D||_F^2: the part of the change inside what the
             base model uses most, which is what forgetting comes from; k / m and k / n for a random change
intruders    of the k leading directions of W, those unlike any of W0 (`eckart.analysis.intruder_dimensions`)
"""

from __future__ import annotations

import copy
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg import SingularBasis, effective_rank, principal_angles, singular_values, stable_rank
from ..models.adapted import adapted_linears
from ..models.adapter_files import check_base, is_adapter, load_adapter
from ..models.checkpoint import load, resolve
from ..models.pairs import Pair, map_pairs, pair
from ..models.select import Selection, Skipped, Where
from ..models.stored import LayoutError, has_safetensors
from ..models.weights import MEMORY, weights_of
from .intruder_dimensions import IntruderDimensions, Leading, leading, random_cosine

__all__ = ["RANKS", "Comparison", "LayerDifference", "compare", "difference"]

#: Ranks at which the energy of the difference is reported.
RANKS = (1, 8, 64)

Model = nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class LayerDifference:
    """One weight of two models, in figures.

    Attributes:
        name: Dotted module name.
        shape: (out, in).
        change: ||D||_F / ||W0||_F; infinite if only W0 is zero.
        stable_rank: Of D; 0 where nothing changed, as for the next two.
        effective_rank: Of D.
        energy: Share of ||D||_F^2 in the first 1, 8 and 64 directions of D.
        output_angle: Largest principal angle between the k leading left singular subspaces, in radians.
        input_angle: The same on the right.
        output_overlap: Share of ||D||_F^2 inside span U0_k.
        input_overlap: Share of ||D||_F^2 inside span V0_k.
        intruders: How many of the k leading directions of W have a cosine below the threshold.
        robust_intruders: The same by the cosine that takes near-equal singular values together.
        counts: Intruders at each threshold of the sweep.
        random_cosine: What a random direction reaches; intruders mean nothing where it is not well below the threshold.
        output_angles, input_angles: (k,) all of them, ascending.
        cosines: (k,) of the leading directions of W.
        singular_values: (min(m, n),) of D, descending.
    """

    name: str
    shape: tuple[int, int]
    change: float
    stable_rank: float
    effective_rank: float
    energy: tuple[float, ...]
    output_angle: float
    input_angle: float
    output_overlap: float
    input_overlap: float
    intruders: int
    robust_intruders: int
    counts: tuple[int, ...]
    random_cosine: float
    output_angles: Tensor = field(repr=False)
    input_angles: Tensor = field(repr=False)
    cosines: Tensor = field(repr=False)
    singular_values: Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON numbers, None for what is infinite; the singular values are left out."""
        data = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "singular_values"}
        data = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in data.items()}
        data["change"] = self.change if math.isfinite(self.change) else None
        data["energy"] = {str(rank): value for rank, value in zip(RANKS, self.energy, strict=True)}
        return data


@dataclass(frozen=True)
class Comparison:
    """Two models, layer by layer.

    Attributes:
        layers: One entry a weight, in the model's order.
        skipped: What is left alone, with the reason.
        thresholds: Those that `LayerDifference.counts` is for.
        warnings: What the reader has to know.
        seconds: Wall time.
    """

    layers: list[LayerDifference]
    skipped: list[Skipped]
    thresholds: tuple[float, ...]
    warnings: list[str]
    seconds: float

    @property
    def figures(self) -> dict[str, Any]:
        """Sums over the layers, in plain numbers."""
        return {
            "weights": len(self.layers),
            "changed": sum(layer.change > 0 for layer in self.layers),
            "intruders": sum(layer.intruders for layer in self.layers),
            "robust_intruders": sum(layer.robust_intruders for layer in self.layers),
            "counts": [sum(counts) for counts in zip(*(layer.counts for layer in self.layers), strict=True)],
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        left = [asdict(one) for one in self.skipped]
        layers = [layer.to_dict() for layer in self.layers]
        plain = {"thresholds": list(self.thresholds), "warnings": self.warnings, "seconds": self.seconds}
        return {"figures": self.figures, **plain, "layers": layers, "skipped": left}


def compare(
    a: Model,
    b: Model,
    *,
    where: Where | None = None,
    options: IntruderDimensions | None = None,
    memory: float = MEMORY,
    progress: bool = True,
) -> Comparison:
    """Look at two models of the same weights side by side; neither is changed.

    Args:
        a: The first, such as the base: a model, or what `eckart.models.load` takes, which is read weight by weight
            where its layout allows that.
        b: The second, such as the fine-tuned one: the same, a PEFT model, or the directory of an adapter on ``a``
            (then the base is loaded as a whole).
        where: Which linears, as in `eckart.models.linears`.
        options: k and the thresholds; default k = 10, ε = 0.5.
        memory: Bytes that the weights at work may take with what is computed from them.
        progress: Show a bar with the time left.

    Returns:
        Figures of every weight.

    Raises:
        FileNotFoundError: No such model, or a shard is missing.
        ValueError: Models of different shapes, an adapter for another base, NaN or Inf in a weight.

    Example:
        >>> def model(scale):
        ...     layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 2, bias=False))])
        ...     layers[0][0].weight.data = torch.tensor([[scale, 0.0, 0.0], [0.0, 1.0, 0.0]])
        ...     return nn.ModuleDict({"layers": layers})
        >>> [found] = compare(model(3.0), model(4.0), options=IntruderDimensions(top=1), progress=False).layers
        >>> round(found.change, 3), round(found.stable_rank, 3), round(found.output_overlap, 3), found.intruders
        (0.316, 1.0, 1.0, 0)
    """
    start = time.perf_counter()
    options = options or IntruderDimensions()
    first, second, warnings = _selections(a, b, where)
    pairs = pair(first, second)
    layers = map_pairs(lambda one: difference(one, options), pairs, "compare", memory=memory, progress=progress)
    warnings += options.blind_spots({layer.name: layer.random_cosine for layer in layers})
    return Comparison(layers, second.skipped, options.sweep, warnings, time.perf_counter() - start)


def difference(one: Pair, options: IntruderDimensions) -> LayerDifference:
    """The figures of one pair of weights."""
    base, weight = (read.to(torch.float64) for read in one.read())
    basis, change = SingularBasis(base), weight - base
    size, moved = float(base.norm()), float(change.norm())
    found = leading(weight, basis, options.top, options.near)
    s = singular_values(change.float()).cpu()  # float32 goes through the Gram matrix, which is faster and good to 1e-8
    k = min(len(found.s), basis.rank)
    u0, v0 = basis.left(options.top), basis.right(options.top)
    angles = [_angles(u0[:, :k], found.u[:, :k]), _angles(v0[:, :k], found.vh[:k].mT)]
    energies = s.square().cumsum(0)
    return LayerDifference(
        name=one.name,
        shape=one.shape,
        change=moved / size if size else (math.inf if moved else 0.0),
        stable_rank=float(stable_rank(s)) if moved else 0.0,
        effective_rank=float(effective_rank(s)) if moved else 0.0,
        energy=tuple(float(energies[min(rank, len(s)) - 1] / energies[-1]) if moved else 0.0 for rank in RANKS),
        output_angle=float(angles[0].max()) if k else 0.0,
        input_angle=float(angles[1].max()) if k else 0.0,
        output_overlap=min(1.0, float((u0.mT @ change).norm()) ** 2 / moved**2) if moved else 0.0,
        input_overlap=min(1.0, float((change @ v0).norm()) ** 2 / moved**2) if moved else 0.0,
        **_counts(found, options),
        random_cosine=random_cosine(one.shape),
        output_angles=angles[0],
        input_angles=angles[1],
        cosines=found.cosines.cpu(),
        singular_values=s.float(),
    )


def _angles(first: Tensor, second: Tensor) -> Tensor:
    return principal_angles(first, second).cpu() if first.shape[1] else torch.zeros(0, dtype=torch.float64)


def _counts(found: Leading, options: IntruderDimensions) -> dict[str, Any]:
    return {
        "intruders": len(found.intruders(options.threshold)),
        "robust_intruders": len(found.intruders(options.threshold, robust=True)),
        "counts": tuple(len(found.intruders(threshold)) for threshold in options.sweep),
    }


def _selections(a: Model, b: Model, where: Where | None) -> tuple[Selection, Selection, list[str]]:
    """The weights of both, and what could not be checked."""
    if not isinstance(a, nn.Module) and is_adapter(a):
        raise ValueError(f"{a} is an adapter; give its base model first, and the adapter second")
    if isinstance(b, nn.Module) or not is_adapter(b):
        return _weights(a, where), _weights(b, where), []
    if isinstance(a, nn.Module):
        base, unchecked = copy.deepcopy(a), None
    else:
        unchecked = check_base(b, resolve(a))
        base = load(a)[0]
    adapted = load_adapter(base, b)
    first = _weights(a, where)
    return first, adapted_linears(adapted, where), [unchecked] if unchecked else []


def _weights(model: Model, where: Where | None) -> Selection:
    """Read one by one if they can be."""
    if isinstance(model, nn.Module):
        return weights_of(model, where)
    path = resolve(model)
    try:
        if has_safetensors(path):
            return weights_of(path, where)
    except LayoutError:
        pass  # transformers converts the tensors while it loads the model
    return weights_of(load(path)[0], where)
