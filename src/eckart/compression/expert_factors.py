"""Experts as factors: of a cluster's matrices one factor is shared, and the other is each expert's own or merged.

    left     W_i ≈ U V_i    U (m, r) leads [W_1 S_1, ..., W_c S_c],  S_i S_i^T = G_i,   V_i = U^T W_i
    right    W_i ≈ U_i V    the U_i lead [W_1 S; ...; W_c S],  S S^T = sum G_i,         V = sum U_i^T W_i
    merged   W ≈ U V        U as in left,                                               V = sum f_i V_i / sum f_i

W_i (m, n) and the Gram matrix G_i (n, n) of the inputs that expert i sees. With a shared output basis each expert may
have its own G_i and the answer is still the best one, min sum_i tr((W_i - U V_i) G_i (W_i - U V_i)^T): U^T W_i is the
best V_i whatever G_i is. With a shared input basis it is the best under the sum of them.

"merged" is Sub-MoE's intra-expert compression (see `eckart.compression.sub_moe`). Its V'_i S_i^-1 with the singular
values put back is U^T W_i, so nothing has to be inverted, and experts of different S_i fit together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linalg import LinalgError, all_finite, eigh, weighted_svd
from ..models.experts import ExpertBank, order_like
from ..structures.factored_experts import ExpertGroup, FactoredExperts, GroupFactors
from ..structures.shared_factor import FactorSide, SharedFactor

__all__ = ["Cluster", "InputGrams", "bank_of", "clusters_of", "shared_left", "shared_rank", "shared_right"]

# How much a direction counts that no token has, relative to the mean of the diagonal: rank left over then goes to the
# matrices themselves and not to rounding noise.
_UNSEEN = 1e-10


def shared_rank(count: int, shape: tuple[int, int], side: FactorSide, keep: float) -> int:
    """The largest rank at which ``count`` matrices with a shared factor hold at most this part of their numbers.

        left: r (m + c n) <= keep c m n,   right: r (n + c m) <= keep c m n

    Args:
        count: c.
        shape: (m, n).
        side: which factor is shared.
        keep: from 0 to 1.

    Returns:
        r; 0 if not even one direction fits.

    Example:
        >>> shared_rank(1, (64, 64), "left", 0.5), shared_rank(8, (64, 64), "left", 0.5)
        (16, 28)
    """
    m, n = shape if side == "left" else shape[::-1]
    return int(keep * count * m * n / (m + count * n) + 1e-9)


def shared_left(weights: Tensor, grams: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """One output basis for several matrices, each with its own Gram matrix of inputs.

    Args:
        weights: (c, m, n).
        grams: (c, n, n).
        rank: r, at most min(m, c n).

    Returns:
        U (m, r) with orthonormal columns, and V_i = U^T W_i (c, r, n), float64.

    Example:
        >>> weights = torch.tensor([[[1.0, 0.0], [0.0, 0.1]], [[2.0, 2.0], [0.0, 0.0]]])
        >>> basis, own = shared_left(weights, torch.eye(2).expand(2, 2, 2), 1)
        >>> [[round(x, 3) for x in row] for row in (basis.abs() @ own[1].abs()).tolist()]
        [[2.0, 2.0], [0.0, 0.0]]
    """
    w = weights.double()
    seen = grams.double()
    floor = _UNSEEN * seen.diagonal(dim1=1, dim2=2).mean(dim=1)
    # The output Gram matrix of all together: its eigenvectors are the left singular vectors of [W_1 S_1, ...].
    outputs = (w @ seen @ w.mT + floor[:, None, None] * (w @ w.mT)).sum(dim=0)
    basis = eigh(outputs, rank).vectors
    return basis, basis.mT @ w


def shared_right(weights: Tensor, grams: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """One input basis for several matrices, under the sum of their Gram matrices.

    Args:
        weights: (c, m, n).
        grams: (c, n, n).
        rank: r, at most min(c m, n).

    Returns:
        V (r, n) and U_i (c, m, r), float64; all U_i together have orthonormal columns.

    Example:
        >>> weights = torch.tensor([[[1.0, 1.0]], [[2.0, 2.0]]])
        >>> shared, own = shared_right(weights, torch.eye(2).expand(2, 2, 2), 1)
        >>> torch.allclose(own @ shared, weights.double())
        True
    """
    stacked = weights.double().flatten(0, 1)
    basis = weighted_svd(stacked, grams.double().sum(dim=0), rank, double=True).basis
    return basis.mT @ stacked, basis.unflatten(0, (len(weights), -1))


@dataclass(frozen=True)
class InputGrams:
    """Gram matrices of what the matrices of each expert of a bank see, float64; 8 E (H^2 + I^2) bytes.

    Attributes:
        inputs: (E, H, H), of the tokens that are sent to an expert: what gate and up see.
        hidden: (E, I, I), of its hidden units on them: what down sees.
    """

    inputs: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, bank: ExpertBank) -> InputGrams:
        """Zeros."""
        count, width, hidden = bank.count, bank.shape[1], bank.width
        return cls(*(torch.zeros(count, size, size, dtype=torch.float64) for size in (width, hidden)))

    def add(self, index: int, x: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Count tokens x (n, H) and an expert's hidden units on them (n, I), each token so often (n,)."""
        for total, rows in ((self.inputs, x), (self.hidden, hidden)):
            wide = rows.double()
            total[index] += (wide.mT @ (weight.to(wide)[:, None] * wide)).cpu()


class Cluster(NamedTuple):
    """Experts that become one or share factors, with their hidden units in one order.

    Attributes:
        members: their numbers.
        frequency: (c,) how often each is used.
        weights: gate (c, I, H), up (c, I, H) and down (c, H, I).
        grams: what each of these sees: (c, H, H), the same, and (c, I, I); none where nothing is factored.
    """

    members: tuple[int, ...]
    frequency: Tensor
    weights: tuple[Tensor, Tensor, Tensor]
    grams: tuple[Tensor, ...]

    def shared(self, sides: Sequence[FactorSide], keep: float) -> GroupFactors:
        """A factor of each matrix shared, the other each expert's own, in this part of the numbers."""
        found = []
        for weights, grams, side in zip(self.weights, self.grams, sides, strict=True):
            count, m, n = weights.shape
            rank = shared_rank(count, (m, n), side, keep)
            find = shared_left if side == "left" else shared_right
            found.append(SharedFactor.from_factors(*find(weights, grams, rank), side))
        return GroupFactors(*found)

    def merged(self, keep: float) -> GroupFactors:
        """One expert for all, as factors with this part of an expert's numbers."""
        share = self.frequency.double() / self.frequency.double().sum()
        found = []
        for weights, grams in zip(self.weights, self.grams, strict=True):
            _, m, n = weights.shape
            basis, own = shared_left(weights, grams, shared_rank(1, (m, n), "left", keep))
            mean = torch.einsum("c,crn->rn", share.to(own), own)
            found.append(SharedFactor.from_factors(basis, mean[None], "left"))
        return GroupFactors(*found)

    def squares(self) -> float:
        """Sum of the squares of all weights."""
        return sum(float(group.double().square().sum()) for group in self.weights)

    def lost(self, found: Sequence[Tensor]) -> float:
        """Sum of the squares of what is away from other weights, one matrix for all experts or one for each."""
        return sum(float((a.double() - b).square().sum()) for a, b in zip(self.weights, found, strict=True))


def clusters_of(
    bank: ExpertBank, labels: Tensor, frequency: Tensor, grams: InputGrams | None, *, align: bool = False
) -> Iterator[Cluster]:
    """The clusters of a bank, one at a time in memory.

    Args:
        bank: the experts.
        labels: (E,) cluster of each, numbered from 0.
        frequency: (E,) how often each is used.
        grams: what each sees, if the clusters are to be factored.
        align: put hidden units into the order of the most used member.
    """
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero()[:, 0].tolist()
        experts = [bank.expert(index) for index in members]
        used = frequency[members]
        seen = () if grams is None else (grams.inputs[members], grams.inputs[members], grams.hidden[members])
        if align:
            leader = experts[int(used.argmax())]
            units = torch.arange(bank.width, device=leader.gate.device)
            orders = [units if expert is leader else order_like(expert, leader) for expert in experts]
            experts = [expert.permuted(order) for expert, order in zip(experts, orders, strict=True)]
            if grams is not None:
                permuted = [g[o][:, o] for g, o in zip(grams.hidden[members], (o.cpu() for o in orders), strict=True)]
                seen = (*seen[:2], torch.stack(permuted))
        gate, up, down = (torch.stack(group) for group in zip(*experts, strict=True))
        on_device = tuple(gram.to(gate.device) for gram in seen)
        yield Cluster(tuple(members), used, (gate, up, down), on_device)


def bank_of(bank: ExpertBank, groups: Sequence[tuple[Sequence[int], GroupFactors]]) -> FactoredExperts:
    """The factors of each group of experts as what takes the place of a bank, in its type and on its device.

    Raises:
        LinalgError: they do not fit in that type.
    """
    weight = bank.gate_up
    layout = []
    for members, found in groups:
        factors = (found.gate, found.up, found.down)
        ranks, sides = tuple(f.rank for f in factors), tuple(f.side for f in factors)
        layout.append(ExpertGroup(tuple(members), (ranks[0], ranks[1], ranks[2]), (sides[0], sides[1], sides[2])))
    common: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    activation: Any = bank.module.act_fn
    made = FactoredExperts(bank.shape[1], bank.width, layout, activation, **common)
    for place, (_, found) in enumerate(groups):
        made.groups[place].load_state_dict(found.state_dict())
    if not all(all_finite(parameter) for parameter in made.parameters()):
        raise LinalgError(f"{bank.name}: the factors do not fit in {weight.dtype}; compress in float32")
    return made.requires_grad_(weight.requires_grad)
