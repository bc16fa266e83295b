"""ExPLoRA: go on pretraining on a new domain, with one or two blocks trained whole and low-rank updates of the others.

    y = x (W + c B A)ᵀ,   B (out, r) from 0, A (r, in) Kaiming uniform: queries and values of the blocks outside U
    trained whole: the blocks in U, and the norms of the blocks outside U

S. Khanna, M. Irgau, D. B. Lobell, S. Ermon, ExPLoRA: Parameter-Efficient Extended Pre-Training to Adapt Vision
Transformers under Domain Shifts, ICML 2025, arXiv 2406.10973; code: samar-khanna/ExPLoRA.

The loss is that of the source model. What it trains beside the backbone is said by ``modules_to_save``, to which the
method adds: ["decoder"] for a `ViTMAEForPreTraining`, the embeddings where the channels of the input change. DINOv2's
heads are not released and start at random, so that their first gradients can spoil the backbone: train them alone for
a while. The mean teacher of DINOv2 is a copy of the adapted model whose trained parameters, A and B among them, are
averages of the student's, as DINO averages parameters; the product of averages is not the average of the products, and
the paper does not say which is meant. Give the whole modules a learning rate of their own, and the norms no decay.

Different here: PEFT trains copies of the whole modules, so the source stays as it was and is what remains where the
adapter is disabled. The authors split a fused layer into three; here it stays, and its rows for queries and for values
get a pair of factors each, with c B A zero in the rows for keys. Which rows those are is seen in a trial run, see
`eckart.models.attention`. In a model with several lists of blocks U is taken in each, except in its head: blocks
outside of what transformers calls the base model are left alone.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..models.attention import Rows, attention_projections
from ..models.backbone import backbone_blocks, norms, pretrained_models
from ..models.calibrate import Statistics
from ..models.topology import Block, block_of
from .contract import Adapter, AdapterMethod
from .factored import LowRankAdapter, kaiming_uniform
from .site import Site

__all__ = ["ExPLoRA"]


@dataclass(frozen=True)
class ExPLoRA(AdapterMethod):
    """Parameter-efficient extended pretraining.

    Attributes:
        blocks: U, the blocks that are trained whole: indices from 0, negative ones from the back. The paper counts
            from 1: its D-[L]-r64 is (-1,) with rank 64, its M-[1,L]-r32 is (0, -1) with rank 32. Empty for none.
        rows: Of a fused layer, the rows that are adapted: full module name -> parts, each with factors of its own and
            given as ranges [start, stop). Filled in for the model, unless ``target_modules`` says what is adapted.

    Example:
        >>> method = ExPLoRA(rows={"qkv": (((0, 4),), ((8, 12),))})
        >>> adapter = method.build(Site("qkv", "linear", 12, 4), rank=2, scale=1.0)
        >>> adapter.initialize(torch.zeros(12, 4), None, torch.Generator().manual_seed(0))
        >>> adapter.left.data += 1
        >>> adapter.num_trainable(), adapter.delta(torch.zeros(12, 4)).detach().any(dim=1).int().tolist()
        (32, [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])
    """

    whole_modules: ClassVar[bool] = True

    blocks: tuple[int, ...] = (-1,)
    rows: dict[str, tuple[Rows, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.blocks, Sequence) or not all(type(index) is int for index in self.blocks):
            raise ValueError(f"blocks must be indices of blocks, such as (-1,) for the last one, not {self.blocks!r}")

    def build(self, site: Site, rank: int, scale: float) -> Adapter:
        """A and B trained."""
        return _ExPLoRAAdapter(site, rank, scale, self.rows.get(site.name))

    def trainable(self, site: Site, rank: int) -> int:
        """r (in + out), for each part of a fused layer with its rows for out."""
        parts = self.rows.get(site.name)
        return rank * sum(site.in_features + size for size in (_sizes(parts) if parts else [site.out_features]))

    def check(self, site: Site, rank: int) -> str | None:
        """Why the method cannot be used at this site with this rank, or None."""
        last = max((stop for part in self.rows.get(site.name, ()) for _, stop in part), default=0)
        if last > site.out_features:
            return f"has {site.out_features} rows, but the option rows goes up to {last}"
        return super().check(site, rank)

    def configure(self, model: nn.Module, config: Any) -> None:
        """Choose the modules that are trained whole and, unless the user has, those that get factors.

        Raises:
            ValueError: No such blocks, none that is left for factors, blocks that cannot be trained whole, or no
                queries and values that can be told apart.
        """
        with _without_adapters(model) as earlier:
            names = [name for name, _ in model.named_modules()]
            given = [name for name in names if name.endswith(tuple(config.modules_to_save or ())) and name]
            every = backbone_blocks(model)
            chosen = self._chosen(every)
            unfrozen, others = (
                [block for block in every if (block.name in chosen) == is_chosen and not _inside(block.name, given)]
                for is_chosen in (True, False)
            )
            if not others:
                raise ValueError(f"blocks={self.blocks} of {type(model).__name__}: explora finds none left to adapt")
            _check_free(unfrozen, others, given, earlier)
            whole = [block.name for block in unfrozen] + [
                name for block in others for name in norms(block) if not _inside(name, given)
            ]
            _check_whole(model, whole)
            found = _projections(model, others) if config.target_modules is None else {}
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *whole]))
        if found:
            config.target_modules = {name for name in found if not _inside(name, given)}
            fused = {name: parts for name, parts in found.items() if parts}
            config.options = {**config.options, **({"rows": fused | self.rows} if fused else {})}

    def _chosen(self, every: list[Block]) -> set[str]:
        """Names of the blocks in U, of every list of blocks."""
        chosen = set()
        for name in dict.fromkeys(block.list_name for block in every):
            members = [block.name for block in every if block.list_name == name]
            for index in self.blocks:
                if not -len(members) <= index < len(members):
                    raise ValueError(f"blocks={self.blocks}: {name} has {len(members)} blocks, counted from 0")
                chosen.add(members[index])
        return chosen


class _ExPLoRAAdapter(LowRankAdapter):
    left: Tensor
    right: Tensor
    rows: Tensor

    def __init__(self, site: Site, rank: int, scale: float, parts: Sequence[Rows] | None) -> None:
        super().__init__(site, rank)
        self.scale, self.parts = scale, parts
        self.sizes = _sizes(parts) if parts else [site.out_features]
        self.parameter("left", sum(self.sizes), rank)  # B, of one part below that of the other
        self.parameter("right", rank * len(self.sizes), site.in_features)  # A, in the same way
        if parts:
            self.register_buffer("rows", torch.zeros(sum(self.sizes), dtype=torch.int64))

    def initialize(self, weight: Tensor, statistics: Statistics | None, generator: torch.Generator) -> None:
        self.fill(left=torch.zeros_like(self.left), right=kaiming_uniform(self.right.shape, generator))
        if self.parts:
            ranges = [torch.arange(start, stop) for part in self.parts for start, stop in part]
            self.fill(rows=torch.cat(ranges))
        self.ready = True

    def low_rank(self) -> tuple[Tensor, Tensor]:
        left = self.left * self.scale
        if self.parts:
            blocks = torch.block_diag(*left.split(self.sizes))
            left = left.new_zeros(self.site.out_features, len(self.right)).index_copy(0, self.rows, blocks)
        return left, self.right


def _sizes(parts: Sequence[Rows]) -> list[int]:
    """Rows of each part."""
    return [sum(stop - start for start, stop in part) for part in parts]


def _inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a module is one of these, or a part of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@contextlib.contextmanager
def _without_adapters(model: nn.Module) -> Iterator[list[str]]:
    """Put the originals in the place of what earlier adapters have replaced; gives the names of those."""
    replaced: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    for name, module in replaced.items():
        plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        model.set_submodule(name, plain)
    try:
        yield list(replaced)
    finally:
        for name, module in replaced.items():
            model.set_submodule(name, module)


def _check_free(unfrozen: list[Block], others: list[Block], given: list[str], earlier: list[str]) -> None:
    """Refuse blocks that other adapters, or the user's own choice, have a part in."""
    taken = [name for block in unfrozen for name in given if name.startswith(f"{block.name}.")]
    if taken:
        raise ValueError(f"modules_to_save has {taken[0]}, a part of a block that explora trains whole; leave it out")
    for block in unfrozen:
        if any(name.startswith(f"{block.name}.") for name in earlier):
            raise ValueError(f"explora cannot train {block.name} whole: it has adapters of another kind on it")
    for block in others:
        if block.name in earlier:
            raise ValueError(f"explora cannot adapt {block.name}: another adapter trains it whole; use the same blocks")


def _check_whole(model: nn.Module, whole: list[str]) -> None:
    """Refuse what cannot be trained as it is, and names that PEFT would find in two places; warn of half precision."""
    half = set()
    for name in whole:
        for key, parameter in model.get_submodule(name).named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(f"explora cannot train {name} whole: {key} is quantized; load the model as it was")
            half |= {parameter.dtype} if parameter.element_size() < 4 else set()
    twin = next((n for n, _ in model.named_modules() if n not in whole and n.endswith(tuple(whole))), None)
    if twin is not None:
        raise ValueError(f"{twin} ends like a module that explora trains whole, so PEFT would train both; rename it")
    if half:
        warnings.warn(
            f"what explora trains whole is stored as {', '.join(map(str, half))}, which loses small steps; load the "
            "model in float32 and train it under autocast",
            stacklevel=4,
        )


def _projections(model: nn.Module, others: list[Block]) -> dict[str, tuple[Rows, ...]]:
    """Layers that make queries or values in these blocks: name -> their parts, none for a layer that is one."""
    found: dict[str, tuple[Rows, ...]] = {}
    remedy = "name those to adapt with target_modules=[...]"
    for prefix, one in pretrained_models(model).items():
        try:
            projections = attention_projections(one)
        except ValueError as error:
            raise ValueError(f"explora cannot look for queries and values; {remedy}: {error}") from error
        for projection in projections:
            name = f"{prefix}.{projection.name}".lstrip(".")
            parts = tuple(rows for rows in (projection.query, projection.value) if rows)
            if not parts or block_of(name, others) is None:
                continue
            if projection.overlaps:
                raise ValueError(f"{name} uses the same rows for keys and for queries or values; {remedy}")
            found[name] = () if parts == (((0, projection.out_features),),) else parts
    for name in dict.fromkeys(block.list_name for block in others):
        if not any(key.startswith(f"{name}.") for key in found):
            raise ValueError(f"explora found no queries and values in {name}; {remedy}")
    return found
