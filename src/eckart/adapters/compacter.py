"""Compacter: bottleneck adapters whose two projections are sums of Kronecker products, of which one factor is shared.

    h = x Wᵀ + b (k,),   y = h + c PHM_up(gelu(PHM_down(h))),   PHM_down: k -> d, PHM_up: d -> k
    PHM(h) = h H + bias,   H = Σ_i S_i ⊗ (L_i R_i),   S_i (n, n), L_i (in / n, ρ), R_i (ρ, out / n),   i = 1 ... n
    L, R Xavier uniform with gain √2, S from N(0, 0.01²), biases from 0

S (n, n, n) is one tensor for both projections of all layers. h is the output of a sub-layer, before it is added to the
residual stream: of self-attention and of the MLP, or of the MLP alone in Compacter++ (``plus=True``).

R. Karimi Mahabadi, J. Henderson, S. Ruder, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, NeurIPS 2021,
arXiv 2106.04647; code: rabeehk/compacter. AdapterHub has it as ``CompacterConfig`` and ``CompacterPlusPlusConfig``.

Here the adapter sits on the last linear map of a sub-layer, which is found by what reaches the residual stream; where
``target_modules`` or ``where`` are given they stand. The start is near the model and not at it, as published, but S is
drawn with 0.01, as the code draws it where it is not shared: with the 1e-4 of its configurations
(``init_range=1e-4``) the gradients of L and R are of the order of S², 1e-8, which is AdamW's ε and less than float32
resolves beside a factor of order 1. Train with a large learning rate (the paper: 3e-3) and without weight decay, which
shrinks S and L R at once. H is never formed. The paper also trains the layer norms of the model; that is
``layer_norms=True`` and not the default here, since they are part of the base and not of an adapter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.backbone import pretrained_models
from ..models.calibrate import Statistics
from ..models.kinds import is_norm
from ..models.select import linears
from ..models.sublayers import Sublayer, sublayers
from .contract import Adapter, AdapterMethod
from .layer import layer_name
from .site import Site

__all__ = ["Compacter", "phm"]

_DIVISION = 4  # n of the paper


def phm(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x H with H = Σ_i S_i ⊗ (L_i R_i) (in, out), without forming H.

        y_c = Σ_i Σ_a S_i[a, c] x_a L_i R_i,   x_a and y_c the a-th and c-th of n equal parts

    Args:
        x: (..., in).
        rule: S (n, n, n).
        left: L (n, in / n, ρ).
        right: R (n, ρ, out / n).

    Returns:
        (..., out), for ρ n (in + out + n²) products each.

    Example:
        >>> x, one = torch.tensor([1.0, 2.0]), torch.ones(1, 1, 1)
        >>> phm(x, 2 * one, torch.tensor([[[3.0], [4.0]]]), one)
        tensor([22.])
    """
    parts = x.unflatten(-1, (len(rule), -1))
    inner = torch.einsum("...aq,iqr->...air", parts, left)
    inner = torch.einsum("...air,iac->...cir", inner, rule)
    return torch.einsum("...cir,irp->...cp", inner, right).flatten(-2)


@dataclass(frozen=True)
class Compacter(AdapterMethod):
    """Compact adapter. The configuration's rank is the bottleneck d; the paper has k / 32.

    Attributes:
        plus: Compacter++: no adapter after attention.
        division: n, a divisor of k and d; None for the paper's 4, or the largest divisor below it where 4 is none.
        factor_rank: ρ, of the Kronecker factors that are not shared.
        init_range: Standard deviation of S at the start; published runs have 1e-4.
        layer_norms: Train and save the layer norms of the whole model too, as the paper does. PEFT keeps what they
            became when it unloads the adapter.

    Example:
        >>> site = Site("layer", "linear", 768, 3072)
        >>> Compacter().trainable(site, 24) - 4**3  # those of S are shared
        2376
    """

    mergeable: ClassVar[bool] = False

    plus: bool = False
    division: int | None = None
    factor_rank: int = 1
    init_range: float = 0.01
    layer_norms: bool = False

    def __post_init__(self) -> None:
        if self.division is not None and self.division < 1:
            raise ValueError(f"division must be at least 1, not {self.division}; the paper has {_DIVISION}")
        if self.factor_rank < 1:
            raise ValueError(f"factor_rank must be at least 1, not {self.factor_rank}; the paper has 1")
        if not 0 < self.init_range < math.inf:
            raise ValueError(f"init_range must be a number above 0, not {self.init_range}; published runs have 1e-4")

    @property
    def whole_modules(self) -> bool:  # type: ignore[override]  # of the options
        """The layer norms, where they are trained."""
        return self.layer_norms

    def division_at(self, site: Site, rank: int) -> int:
        """n of one site."""
        if self.division is not None:
            return self.division
        return next(n for n in range(_DIVISION, 0, -1) if site.out_features % n == rank % n == 0)

    def configure(self, model: nn.Module, config: Any) -> None:
        """Choose the sub-layers where the user did not, and the layer norms.

        Raises:
            ValueError: The sub-layers cannot be found; name them.
        """
        if config.target_modules is None:
            config.target_modules = self._outputs(model)
        if self.layer_norms:
            config.modules_to_save = [*(config.modules_to_save or []), *_norms(model)]

    def _outputs(self, model: nn.Module) -> set[str]:
        """Names of the last linear maps of the sub-layers that get an adapter."""
        try:
            inner: Mapping[str, nn.Module] = pretrained_models(model) or {"": model}
            found = [part for prefix, one in inner.items() for part in _ends(one, prefix)]
        except ValueError as error:
            raise ValueError(
                f"compacter looks for the ends of sub-layers, but {error}; or name target_modules"
            ) from error
        kinds = ("mlp",) if self.plus else ("attention", "mlp")
        for kind in kinds:
            if not any(part.kind == kind for part in found):
                problem = f"compacter finds no linear map that ends a sub-layer of kind {kind}"
                if len(kinds) == 1:
                    raise ValueError(f"{problem}; name target_modules, or leave out plus")
                warnings.warn(f"{problem}, so those get no adapter", stacklevel=2)
        return {part.output for part in found if part.kind in kinds}

    def check(self, site: Site, rank: int) -> str | None:
        """Also whether n divides k and d."""
        problem = super().check(site, rank)
        if problem is not None:
            return problem
        n = self.division_at(site, rank)
        if site.out_features % n or rank % n:
            return (
                f"has {site.out_features} outputs and rank {rank}, which division = {n} must both divide; choose "
                f"another rank, such as {max(n, round(rank / n) * n)}, or another division"
            )
        if self.factor_rank > min(site.out_features, rank) // n:
            return f"has rank {rank}, so factor_rank must be at most {min(site.out_features, rank) // n}"
        return None

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """Both projections trained, with an S of its own until `link`."""
        return _CompacterAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """2 ρ (k + d), k + d biases, and n³ of S, which is shared."""
        width = site.out_features + rank
        return (2 * self.factor_rank + 1) * width + self.division_at(site, rank) ** 3

    def total_trainable(self, sites: Mapping[str, Site], ranks: Mapping[str, int]) -> int:
        """(2 ρ + 1) (k + d) of each layer, and n³ once."""
        divisions = [self.division_at(site, ranks[name]) for name, site in sites.items()]
        shared = sum(n**3 for n in divisions) - sum(n**3 for n in set(divisions))
        return super().total_trainable(sites, ranks) - shared

    def link(self, adapters: Mapping[str, Adapter]) -> None:
        """Share S, which the first layer owns; one for each n where ``division=None`` had to give way somewhere."""
        owners: dict[int, Adapter] = {}
        for name, adapter in adapters.items():
            n = self.division_at(adapter.site, adapter.rank)
            owner = owners.setdefault(n, adapter)
            if owner is not adapter:
                adapter.share(owner, "rule")
            elif n < _DIVISION and self.division is None:
                warnings.warn(
                    f"compacter divides by {n} in place of {_DIVISION}, which does not divide the rank {adapter.rank} "
                    f"or the {adapter.site.out_features} outputs of {name}",
                    stacklevel=2,
                )


def _ends(model: nn.Module, prefix: str) -> list[Sublayer]:
    """The sub-layers of a model inside another one, under their names there."""
    names = [layer_name(ref.name) for ref in linears(model, quantized=True).linears]
    return [Sublayer(f"{prefix}.{part.output}".lstrip("."), part.kind) for part in sublayers(model, names)]


def _norms(model: nn.Module) -> list[str]:
    """Names of the normalisations with weights, whether another adapter has a copy of them or not."""
    return [
        name.removesuffix(".original_module")
        for name, module in model.named_modules()
        if is_norm(module) and ".modules_to_save." not in name
        if next(module.parameters(recurse=False), None) is not None
    ]


class _CompacterAdapter(Adapter):
    rule: Tensor
    down_left: Tensor
    down_right: Tensor
    down_bias: Tensor
    up_left: Tensor
    up_right: Tensor
    up_bias: Tensor

    def __init__(self, method: Compacter, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank)
        self.method, self.scale = method, scale
        n = method.division_at(site, rank)
        self.parameter("rule", n, n, n)  # S
        for name, inputs, outputs in (("down", site.out_features, rank), ("up", rank, site.out_features)):
            self.parameter(f"{name}_left", n, inputs // n, method.factor_rank)  # L
            self.parameter(f"{name}_right", n, method.factor_rank, outputs // n)  # R
            self.parameter(f"{name}_bias", outputs)

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        for name, part in self.named_parameters():  # its own: an S of another is filled by that one
            start = torch.zeros(part.shape)
            if name == "rule":
                start.normal_(std=self.method.init_range, generator=generator)
            elif not name.endswith("bias"):
                for matrix in start:
                    nn.init.xavier_uniform_(matrix, gain=math.sqrt(2), generator=generator)
            self.fill(**{name: start})
        self.ready = True

    def forward(self, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        h = base(x)
        return h + self.update(h.to(torch.float32)).to(h.dtype)

    def update(self, x: Tensor) -> Tensor:
        """What is added to the base output, which is what x is here."""
        z = phm(x, self.rule, self.down_left, self.down_right) + self.down_bias
        z = phm(F.gelu(z, approximate="tanh"), self.rule, self.up_left, self.up_right) + self.up_bias
        return self.scale * z

    def delta(self, weight: Tensor) -> Tensor:
        raise ValueError(
            f"{self.site.name}: an adapter with a gelu inside is no linear map, so there is no one to merge"
        )
