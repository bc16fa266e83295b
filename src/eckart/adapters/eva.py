"""EVA: LoRA that starts from the principal components of each layer's inputs, with ranks where the variance is.

    cov(x) = V diag(λ) Vᵀ (in, in),   A_0 = V_rᵀ (r, in),   B_0 = 0 (out, r),   y = x (W + c B A)ᵀ
    r_l = number of layer l's values among the R largest λ_li / sum_j λ_lj of all L layers,   R = r L,   r_l <= ρ r

Among orthonormal A the leading components give B the largest expected gradient.

F. Paischer, L. Hauzenberger, T. Schmied, B. Alkin, M. P. Deisenroth, S. Hochreiter, Parameter Efficient Fine-tuning via
Explained Variance Adaptation (One Initialization to Rule them All), NeurIPS 2025, arXiv 2410.07170; code: ml-jku/EVA.

Different here: the covariance of all calibration tokens, in one pass, where the code updates an incremental PCA batch
by batch until its directions turn by less than ``tau``; so nothing has to converge, and no batch is too small. PEFT has
the incremental form too (``init_lora_weights="eva"``); by default it looks only at tokens with a label, and knows only
the metric "ratio". Where the rank of a layer changes, α / r_l changes with it, as in the paper's code; leave ``alpha``
at None for a scale of 1 everywhere, which is what PEFT's ``adjust_scaling_factors`` keeps constant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..linalg import svd
from ..linalg.rank_budget import VarianceMetric, explained_variance_ranks
from ..models.calibrate import Statistics
from ..models.parallel import parallel_map
from .contract import AdapterMethod
from .factored import FactoredAdapter
from .site import Site

__all__ = ["EVA", "eva_ranks", "principal_components"]

Whitening = Literal["none", "variance", "code"]


def principal_components(statistics: Statistics, rank: int, *, centre: bool = True) -> tuple[Tensor, Tensor, float]:
    """The directions in which the inputs vary most.

        E[x xᵀ] - E[x] E[x]ᵀ = V diag(λ) Vᵀ

    Args:
        statistics: With gram, and mean if centred.
        rank: How many.
        centre: Whether the mean is taken off, as in the paper's code.

    Returns:
        Vᵀ (rank, in), λ (rank,) descending, float64, and the sum of all λ.
    """
    covariance = statistics.require("gram").double() / max(statistics.count, 1)
    if centre:
        mean = statistics.require("mean").to(covariance)
        covariance = covariance.addr_(mean, mean, alpha=-1)
    # Neighbouring λ are close, so a sampled SVD, good to 1 % of the error, may find quite other directions.
    top = svd(covariance, rank, driver="lanczos")
    return top.u.mT, top.s, float(covariance.trace().clamp(min=0))


def eva_ranks(
    statistics: Mapping[str, Statistics],
    rank: int,
    rho: float = 2.0,
    *,
    metric: VarianceMetric = "ratio",
    centre: bool = True,
) -> dict[str, int]:
    """Shares out ``rank`` times as many ranks as there are layers, by explained variance.

    Layers that share an input share its variances, computed once, each layer with a claim of its own.

    Args:
        statistics: Of each layer, by its name.
        rank: r, the mean over the layers.
        rho: No layer gets more than rho r; 1 gives everyone r.
        metric: As in `eckart.linalg.rank_budget.explained_variance_ranks`.
        centre: As in `principal_components`.

    Returns:
        Name -> rank, from 0 to rho r; they add up to r times the number of layers.

    Example:
        >>> flat, steep = (Statistics(2, gram=torch.diag(torch.tensor(g))) for g in ([3.0, 3.0, 3.0], [9.0, 1.0, 0.1]))
        >>> eva_ranks({"up_proj": flat, "down_proj": steep}, rank=2, rho=1.5, centre=False)
        {'up_proj': 3, 'down_proj': 1}
    """
    inputs = {id(entry.gram): entry for entry in statistics.values()}
    cap = max(rank, round(rho * rank))

    def spectrum(key: int) -> Tensor:
        _, variances, total = principal_components(inputs[key], cap, centre=centre)
        # Of the values below the cap only the sum matters.
        count = inputs[key].require("gram").shape[0] - variances.numel()
        rest = variances.new_full((count,), max(0.0, total - float(variances.sum())) / max(count, 1))
        return torch.cat([variances, rest]).sqrt().cpu()

    keys = list(inputs)
    found = parallel_map(spectrum, keys, cost=lambda key: float(inputs[key].require("gram").shape[0] ** 2))
    spectra = dict(zip(keys, found, strict=True))
    chosen = explained_variance_ranks(
        [spectra[id(entry.gram)] for entry in statistics.values()], rank * len(statistics), rho, metric=metric
    )
    return dict(zip(statistics, chosen, strict=True))


@dataclass(frozen=True)
class EVA(AdapterMethod):
    """Explained variance adaptation.

    Attributes:
        rho: A layer gets at most rho r ranks; 1 gives every layer r. The paper uses 1 and 2, PEFT 2.
        metric: By what ranks are shared out: "ratio" (the paper's), "raw", "sum" or "max", see
            `eckart.linalg.rank_budget.explained_variance_ranks`.
        centre: Principal components of x - E[x], as in the paper's code; without it of x.
        whiten: "none": rows of A have norm 1. "variance": divided by their standard deviation, so that inner features
            have variance 1. "code": as the paper's code and PEFT have it, by the root of the singular value of the N
            inputs, (N λ)^¼.

    Example:
        >>> site = Site("layer", "linear", 8, 6)
        >>> adapter = EVA().build(site, rank=2, scale=1.0)
        >>> x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
        >>> statistics = Statistics(count=50, gram=x.mT @ x, mean=x.mean(0))
        >>> adapter.initialize(torch.zeros(8, 6), statistics, torch.Generator())
        >>> a, b = adapter.right, adapter.left
        >>> bool(torch.allclose(a @ a.mT, torch.eye(2), atol=1e-6)), int(b.count_nonzero())
        (True, 0)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram", "mean"})

    rho: float = 2.0
    metric: VarianceMetric = "ratio"
    centre: bool = True
    whiten: Whitening = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.rho < float("inf"):
            raise ValueError(f"rho must be a finite number of at least 1, not {self.rho}; 1 gives every layer r")
        self.check_choices(metric=VarianceMetric)
        self.check_choices(whiten=Whitening)

    def build(self, site: Site, rank: int, scale: float) -> FactoredAdapter:
        """B and A trained."""
        return _EVAAdapter(self, site, rank, scale)

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out)."""
        return rank * (site.in_features + site.out_features)

    def ranks(
        self,
        sites: Mapping[str, Site],
        statistics: Mapping[str, Statistics],
        rank: int,
        weight: Callable[[str], Tensor],
    ) -> dict[str, int] | None:
        """As `eva_ranks`, and no more than min(out, in) in any layer."""
        if self.rho == 1:
            return None
        seen = {name: statistics[name] for name in sites}
        chosen = eva_ranks(seen, rank, self.rho, metric=self.metric, centre=self.centre)
        return {name: min(value, sites[name].largest_rank) for name, value in chosen.items()}


class _EVAAdapter(FactoredAdapter):
    def __init__(self, method: EVA, site: Site, rank: int, scale: float) -> None:
        super().__init__(site, rank, trained=("left", "right"), scale=scale)
        self.method = method

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        assert statistics is not None
        right, variances, _ = principal_components(statistics, self.rank, centre=self.method.centre)
        if self.method.whiten != "none":
            # Variances are known to the rounding of float32 products, and are zero where there are fewer tokens.
            floor = torch.finfo(torch.float32).eps * float(variances[0])
            length = variances.clamp(min=floor if floor > 0 else 1.0)
            length = length.sqrt() if self.method.whiten == "variance" else (statistics.count * length).sqrt().sqrt()
            right = right / length[:, None]
        self.set_factors(left=torch.zeros_like(self.left), right=right)
