"""DSFormer's straight-through factoriser: train a weight while the model computes with its factorisation.

    forward   Ŵ = (D S)ᵀ, a step of the factoriser on the present W (m, n), from the D and the positions it had
    backward  dL/dW := dL/dŴ
    at the end W is dropped and D, S stay

A parametrization of torch, so any training loop or Trainer works: `attach` before training, `freeze` after it. One
step is one least-squares update of D, and new positions only where they fit better than the old ones, so positions do
not flap; every ``refresh`` steps the factoriser also starts anew and the better result is kept. The same factors are
used until W changes, so evaluation, gradient accumulation and the frozen layer all see one Ŵ.

Paper: see `eckart.compression.dsformer`. The gradient is biased by ||W - Ŵ||; `pull` is the term that keeps W near Ŵ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..linalg import Dictionary, SparseCodes, dense_sparse
from ..models.kinds import linear_kind
from ..models.replace import replace
from ..models.select import Where, linears
from ..structures import BlockSparseDictionary
from .dense_sparse_sizes import Sizes, sizes_for
from .dsformer import DSFormer, factorise, structure_of

__all__ = ["StraightThrough", "attach", "freeze", "pull"]


class _Identity(torch.autograd.Function):
    """Ŵ forward, as it is; its gradient goes to W unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, approximation: Tensor) -> Tensor:
        return approximation.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class StraightThrough(nn.Module):
    """A parametrization that gives a layer the dense-sparse factorisation of its weight.

    Args:
        weight: (m, n), for the first factorisation; (n, m) if ``transposed``.
        sizes: of the factors.
        sweeps: of a full factorisation.
        refresh: steps after which the factoriser starts anew; 0 for never.
        transposed: whether the layer stores Wᵀ, as transformers' Conv1D does.

    Example:
        >>> layer = nn.Linear(8, 8, bias=False)
        >>> factoriser = StraightThrough(layer.weight, Sizes(atoms=4, sparsity=2, block=4))
        >>> parametrize.register_parametrization(layer, "weight", factoriser).weight.shape
        torch.Size([8, 8])
        >>> layer(torch.ones(8)).sum().backward()
        >>> layer.parametrizations.weight.original.grad.unique().tolist()
        [1.0]
    """

    dictionary: Tensor
    values: Tensor
    index: Tensor

    def __init__(
        self, weight: Tensor, sizes: Sizes, *, sweeps: int = 10, refresh: int = 100, transposed: bool = False
    ) -> None:
        super().__init__()
        if refresh < 0:
            raise ValueError(f"refresh is a number of steps, 0 for never, not {refresh}")
        self.sizes, self.sweeps, self.refresh, self.transposed = sizes, sweeps, refresh, transposed
        self.steps = 0
        found = factorise(self._as_stored(weight.detach()), sizes, sweeps=sweeps)
        self.register_buffer("dictionary", found.atoms)
        self.register_buffer("values", found.codes.values)
        self.register_buffer("index", found.codes.indices)
        self._seen = self._mark(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Ŵ in the shape and dtype of ``weight``, with the gradient of the identity."""
        if self._mark(weight) != self._seen:
            self.step(weight)
        return _Identity.apply(weight, self._as_stored(self.approximation()).to(weight.dtype))

    @torch.no_grad()
    def step(self, weight: Tensor) -> None:
        """One step of the factoriser on a changed weight."""
        self.steps += 1
        matrix = self._as_stored(weight.detach())
        sizes = self.sizes
        found = dense_sparse(
            matrix.mT,
            sizes.atoms,
            nonzeros=sizes.sparsity,
            block=sizes.block,
            sweeps=1,
            start=self.dictionary,
            support=self.index,
        )
        if self.refresh and self.steps % self.refresh == 0:
            anew = factorise(matrix, sizes, sweeps=self.sweeps)
            found = anew if float(anew.error) < float(found.error) else found
        self.dictionary, self.values, self.index = found.atoms, found.codes.values, found.codes.indices
        self._seen = self._mark(weight)

    def found(self) -> Dictionary:
        """The present factors."""
        error = self.values.new_zeros((), dtype=torch.float64)
        return Dictionary(self.dictionary, SparseCodes(self.values, self.index, self.sizes.atoms, error))

    def approximation(self) -> Tensor:
        """Ŵ (m, n)."""
        return self.found().reconstruct().mT

    def structure(self) -> BlockSparseDictionary:
        """The present factors as a layer, without bias."""
        return structure_of(self.found())

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def _mark(self, weight: Tensor) -> tuple[int, int]:
        """Changes whenever an optimizer has changed the weight in place, or another takes its place."""
        return weight.data_ptr(), weight._version


def attach(
    model: nn.Module, ratio: float = 0.5, *, where: Where | None = None, refresh: int = 100, **options: Any
) -> list[str]:
    """Let a model compute with the factorisations of its weights, which stay what is trained.

    Args:
        model: the model, changed in place; its selected weights become parametrized.
        ratio: fraction of the selected weights' parameters that `freeze` will have removed, of each.
        where: which linears, as in `eckart.models.linears`.
        refresh: steps after which the factoriser starts anew; 0 for never.
        options: of `DSFormer`: ``overcomplete``, ``block``, ``sweeps``.

    Returns:
        Names of the layers.

    Raises:
        ValueError: a bad option or ratio, or a layer too small for it; the model is unchanged.
    """
    method = DSFormer(**options)
    if method.pattern is not None:
        raise ValueError("pattern= is for compress(): training goes through positions in blocks")
    if method.calibrated:
        raise ValueError("calibrated=True is for compress(): here training says which inputs matter")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must lie between 0 and 1 (the fraction of parameters to remove), not {ratio}")
    made: list[tuple[nn.Module, str, StraightThrough]] = []
    for ref in linears(model, where).linears:
        if ref.kind == "structure" or parametrize.is_parametrized(ref.module):
            raise ValueError(f"{ref.name} is {'a structure' if ref.kind == 'structure' else 'parametrized'} already")
        budget = math.floor((1 - ratio) * ref.in_features * ref.out_features)
        itemsize = ref.dtype.itemsize
        sizes = sizes_for(*ref.shape, budget, overcomplete=method.overcomplete, block=method.block, itemsize=itemsize)
        if sizes is None:
            raise ValueError(f"{ref.name} {ref.shape} is too small for ratio {ratio}; leave it out with where=")
        weight = ref.module.get_parameter("weight")
        flipped = ref.kind == "conv1d"
        factoriser = StraightThrough(weight, sizes, sweeps=method.sweeps, refresh=refresh, transposed=flipped)
        made.append((ref.module, ref.name, factoriser))
    for module, _, factoriser in made:
        parametrize.register_parametrization(module, "weight", factoriser)
    return [name for _, name, _ in made]


def freeze(model: nn.Module) -> list[str]:
    """Replace every layer that `attach` parametrized by its factors, in place, and drop the weights behind them.

    The model answers as it did, but for the rounding of another order of the same products.

    Returns:
        Names of the layers.

    Raises:
        ValueError: no layer is parametrized so.
    """
    found = _attached(model)
    if not found:
        raise ValueError("no layer of the model has a straight-through factoriser; attach(model) first")
    for name, (module, factoriser) in found.items():
        factoriser(module.parametrizations.weight.original)  # the last step of the optimizer is not factorised yet
        structure = factoriser.structure()
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        if module.bias is not None:
            structure.bias = nn.Parameter(module.bias.detach().clone())
        replace(model, name, structure)
    return list(found)


def pull(model: nn.Module) -> Tensor:
    """Sum over the attached layers of ||W - Ŵ||_F^2, to be added to the loss times a small number.

    Its gradient is that towards the present Ŵ, 2 (W - Ŵ).
    """
    terms = []
    for module, factoriser in _attached(model).values():
        original: Tensor = module.parametrizations.weight.original
        target = factoriser(original).detach()
        terms.append((original - target).square().sum())
    if not terms:
        raise ValueError("no layer of the model has a straight-through factoriser; attach(model) first")
    return torch.stack(terms).sum()


def _attached(model: nn.Module) -> dict[str, tuple[Any, StraightThrough]]:
    found: dict[str, tuple[Any, StraightThrough]] = {}
    for name, module in model.named_modules():
        if linear_kind(module) and parametrize.is_parametrized(module, "weight"):
            (first, *_) = module.parametrizations.weight
            if isinstance(first, StraightThrough):
                found[name] = module, first
    return found
