"""Mean and covariance of what modules put out, in one pass over the data and without cancellation.

    n' = n + b,   mu' = mu + (b / n') (m - mu),   S' = S + S_b + (n b / n') (m - mu)(m - mu)^T

for a batch of b rows with mean m and scatter S_b about it (T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating
formulae and a pairwise algorithm for computing sample variances", 1979). All in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .calling import AnyBatch, call
from .groups import evaluating

__all__ = ["Moments", "output_moments"]


@dataclass
class Moments:
    """Sums over rows of width m.

    Attributes:
        count: rows.
        mean: (m,) float64.
        scatter: (m, m) float64, sum of (y - mean)(y - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """The moments of rows (N, m).

        Example:
            >>> Moments.of(torch.tensor([[1.0], [3.0]])).scatter.tolist()
            [[2.0]]
        """
        rows = rows.double()
        mean = rows.mean(0) if len(rows) else rows.new_zeros(rows.shape[1])
        centred = rows - mean
        return cls(len(rows), mean, centred.mT @ centred)

    def add(self, rows: Tensor) -> None:
        """Take more rows (N, m) into account."""
        new = Moments.of(rows)
        total = self.count + new.count
        if new.count == 0:
            return
        apart = new.mean - self.mean
        self.scatter += new.scatter + (self.count * new.count / total) * torch.outer(apart, apart)
        self.mean += apart * (new.count / total)
        self.count = total

    def gram(self) -> Tensor:
        """Sum of y y^T (m, m)."""
        return self.scatter + self.count * torch.outer(self.mean, self.mean)


def output_moments(model: nn.Module, batches: Iterable[AnyBatch], names: Sequence[str]) -> dict[str, Moments]:
    """Moments of the outputs of modules, in evaluation mode; look-ups of a padding id do not count.

    Args:
        model: any torch model.
        batches: inputs of its forward.
        names: full names of modules that put out (..., m), such as linears and embeddings.

    Returns:
        By name; a module that was never called is left out.

    Example:
        >>> model = nn.Sequential(nn.Identity())
        >>> output_moments(model, [torch.ones(1, 2), 3 * torch.ones(1, 2)], ["0"])["0"].mean.tolist()
        [2.0, 2.0]
    """
    found: dict[str, Moments] = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        rows = output.detach().reshape(-1, output.shape[-1])
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            rows = rows[args[0].reshape(-1) != padding]
        if name in found:
            found[name].add(rows)
        else:
            found[name] = Moments.of(rows)

    handles = [model.get_submodule(name).register_forward_hook(partial(see, name)) for name in names]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moments for name, moments in found.items() if moments.count}
