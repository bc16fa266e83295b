"""How one budget is shared over blocks and matrices, by name: open to every method that compresses single weights.

Policies on spectra are `eckart.linalg.allocate`'s, and one more is its threshold on spectra in units of the loss:

    fisher             min sum_l loss_l(k_l),   loss_l(k) = c_l / 2 sum_{i>k} s_li^2      see `loss_spectrum`

The others say which FRACTION of each block or matrix goes; "search" finds it by trying, see `search.py`.

    block-influence    removed_l = L ratio softmax(-influence_l / temperature)       influence: 1 - mean cos(x_l, x_l+1)
    lorap              kept of v, o : kept of q, k = 3 : 1 in rank; MLPs as the ratio says

FWSVD: Y.-C. Hsu et al., ICLR 2022, arXiv 2207.00112. MoDeGPT: C.-H. Lin et al., ICLR 2025, arXiv 2408.09632. LoRAP:
G. Li et al., ICML 2024, arXiv 2404.09695.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from ..linalg.allocate import Policy as SpectralPolicy
from ..models.select import LinearRef
from ..models.topology import Block, block_of

__all__ = [
    "Policy",
    "SharedPolicy",
    "attention_shares",
    "block_shares",
    "is_spectral",
    "known",
    "loss_spectrum",
    "needs_text",
    "rule_of",
    "shares_of",
]

SharedPolicy = Literal["block-influence", "lorap"]
Policy = Literal["uniform", "threshold", "svd-llm-v2", "welore", "fisher", "block-influence", "lorap", "search"]


def known() -> tuple[str, ...]:
    """The names of all policies."""
    return get_args(Policy)


def is_spectral(policy: str) -> bool:
    """Whether `eckart.linalg.allocate` does it, from the spectra of all matrices."""
    return policy == "fisher" or policy in get_args(SpectralPolicy)


def rule_of(policy: str) -> SpectralPolicy:
    """The rule of `eckart.linalg.allocate` behind a policy on spectra.

    Example:
        >>> rule_of("welore"), rule_of("fisher")
        ('welore', 'threshold')
    """
    return "threshold" if policy == "fisher" else cast(SpectralPolicy, policy)


def needs_text(policy: str) -> bool:
    """Whether it looks at what the model does with text, whatever the method needs."""
    return policy in ("fisher", "block-influence", "search")


def loss_spectrum(s: Tensor, measure: Tensor | None, information: float, shape: tuple[int, int]) -> Tensor:
    """Singular values in units of the loss: half their squares are what the loss is predicted to gain by dropping them.

        loss(W - E) - loss(W)  ~  1/2 sum_ij F_ij E_ij^2  ~  c/2 tr(E M E^T)  =  c/2 sum_{i>k} s_i^2
        c = sum_ij F_ij / (m tr M)            W, E, F (m, n), M (n, n), s (min(m, n),)

    F is the diagonal empirical Fisher information, which stands for the Hessian where the gradient is zero. A method
    that minimises tr(E M E^T), with the identity for M where it looks at no data, drops a tail of its s_i^2. For every
    output, c M is taken for F, with the same sum. Where M is FWSVD's own diag(f) that is its row-weighted loss, where M
    is the identity the mean of F counts, and with M = sum of x x^T the mean curvature of a layer's outputs.

    Args:
        s: (min(m, n),) singular values of the weight in the method's measure.
        measure: M (n, n), or its diagonal (n,); None for the identity.
        information: sum of F over the matrix; a factor that all matrices share does not matter.
        shape: (m, n).

    Returns:
        sqrt(c) s.

    Example:
        >>> loss_spectrum(torch.tensor([2.0, 1.0]), None, 24.0, (3, 2))  # F is 4 everywhere
        tensor([4., 2.])

    Reference:
        Y. LeCun, J. Denker and S. Solla, Optimal Brain Damage, NIPS 1989, for the diagonal prediction; Y.-C. Hsu et
        al., ICLR 2022, arXiv 2207.00112, for its row-weighted form; J. Martens and R. Grosse, ICML 2015, arXiv
        1503.05671, for the Fisher information as a product of inputs and output gradients.
    """
    m, n = shape
    trace = n if measure is None else float(measure.sum() if measure.ndim == 1 else measure.trace())
    return s * math.sqrt(information / (m * trace)) if trace > 0 else torch.zeros_like(s)


def block_shares(influence: Tensor, ratio: float, *, temperature: float = 0.1, most: float = 0.8) -> Tensor:
    """Fraction of each block to remove: the less a block changes its input, the more of it.

        removed = L ratio softmax(-influence / temperature),  no more than ``most``; what is cut off goes to the others

    Args:
        influence: (L,) 1 - mean cosine between what enters a block and what leaves it.
        ratio: mean of the fractions.
        temperature: 0.1; the paper's own is not known, reimplementations take 0.05 to 0.15.
        most: largest fraction, at least ``ratio``.

    Returns:
        (L,) float64 with mean ``ratio``.

    Example:
        >>> block_shares(torch.tensor([0.1, 0.1, 0.3]), 0.3).round(decimals=2).tolist()
        [0.42, 0.42, 0.06]
    """
    most = max(most, ratio)
    scores = -influence.double() / temperature
    removed = ratio * len(influence) * torch.softmax(scores, 0)
    full = torch.zeros_like(removed, dtype=torch.bool)
    while bool((removed > most + 1e-12).any()):
        full |= removed > most
        rest = ratio * len(influence) - most * int(full.sum())
        # A softmax over the others alone: theirs among all may have vanished.
        removed = torch.where(full, most, rest * torch.softmax(scores.masked_fill(full, -torch.inf), 0))
    return removed


def attention_shares(
    shapes: Mapping[str, tuple[int, int]], dense_like: Sequence[str], ratio: float, *, times: float = 3.0
) -> dict[str, float]:
    """Fraction of each matrix of one attention to remove: values and output keep ``times`` the rank of the others.

        kept of v, o = times * f,  kept of q, k = f   (of the rank that stores as much as the matrix), at most 1

    The paper splits the rank of square matrices; splitting the parameters is the same there, and right for
    grouped-query attention too.

    Args:
        shapes: matrix by name -> (out, in).
        dense_like: names of those that are less low-rank: values and output.
        ratio: of all of them together.
        times: 3, as published.

    Returns:
        Fraction removed by name; those of ``dense_like`` stay whole where their share would exceed them.
    """
    sizes = {name: shape[0] * shape[1] for name, shape in shapes.items()}
    more = sum(sizes[name] for name in dense_like)
    less = sum(sizes.values()) - more
    budget = (1 - ratio) * (more + less)
    fraction = budget / (times * more + less)
    kept_more = min(1.0, times * fraction)
    kept_less = min(1.0, (budget - kept_more * more) / less) if less else 0.0
    return {name: 1 - (kept_more if name in dense_like else kept_less) for name in shapes}


def shares_of(
    policy: SharedPolicy,
    members: Sequence[LinearRef],
    blocks: Sequence[Block],
    ratio: float,
    *,
    influence: Tensor | None = None,
    roles: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Fraction of each selected matrix to remove under a policy that looks at no spectrum; ``ratio`` over all.

    Args:
        policy: "block-influence" or "lorap".
        members: the selected linears.
        blocks: the blocks of the model.
        ratio: of all selected numbers together.
        influence: (blocks,), for "block-influence".
        roles: linear -> "query", "key", "value" or "output", for "lorap"; the others are of MLPs.
    """
    place = {block.name: index for index, block in enumerate(blocks)}

    def block(ref: LinearRef) -> str:
        found = block_of(ref.name, list(blocks))
        assert found is not None  # the selection has only such
        return found.name

    if policy == "block-influence":
        assert influence is not None
        removed = block_shares(influence, ratio)
        found = {ref.name: float(removed[place[block(ref)]]) for ref in members}
    else:
        assert roles is not None
        found = {ref.name: ratio for ref in members}
        for name in dict.fromkeys(block(ref) for ref in members):
            attention = {r.name: r.shape for r in members if block(r) == name and r.name in roles}
            less = [n for n in attention if roles[n] in ("value", "output")]
            if attention and 0 < len(less) < len(attention):
                found |= attention_shares(attention, less, ratio)
    return _balanced(found, {ref.name: ref.in_features * ref.out_features for ref in members}, ratio)


def _balanced(removed: Mapping[str, float], sizes: Mapping[str, int], ratio: float) -> dict[str, float]:
    """The same fractions kept, times what makes them meet the ratio where blocks are of different sizes."""
    total = sum(sizes.values())
    kept = sum((1 - removed[name]) * sizes[name] for name in sizes)
    factor = (1 - ratio) * total / kept if kept else 0.0
    return {name: max(0.0, 1 - min(1.0, factor * (1 - fraction))) for name, fraction in removed.items()}
