"""What will sit where, with its values: worked out in full before the first layer of a model is touched."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from ..linalg import all_finite
from ..models.calibrate import Statistics
from ..models.parallel import parallel_map
from ..models.select import linears, nearest
from ..models.topology import blocks
from .config import EckartConfig
from .contract import Adapter, AdapterMethod
from .fingerprint import fingerprint
from .layer import EckartLayer, base_weight, layer_name, repacked
from .site import Site, site_of

__all__ = ["plan"]


def plan(model: nn.Module, config: EckartConfig) -> dict[str, Adapter]:
    """The adapter of each target by module name, with its values unless they come from a file."""
    method = config.build_method()
    if not config.initialized:
        method.configure(model, config)
        method = config.build_method()  # it may have set options
    if config.target_modules is None:
        config.target_modules = _all_linears(model, config)
    _maybe_include_all_linear_layers(config, model)
    layers = _targets(model, config)
    sites: dict[str, Site] = {}
    for name, layer in layers.items():
        site = layer.site if isinstance(layer, EckartLayer) else site_of(name, layer)
        if site is None:
            raise ValueError(f"{name} ({type(layer).__name__}) has no weight that can be adapted; exclude it")
        problem = method.check(site, config.rank_of(name))
        if problem:
            raise ValueError(f"{config.method} cannot adapt {name}: it {problem}")
        sites[name] = site
    if not config.inference_mode and any(repacked(layer) for layer in layers.values()):
        warnings.warn(
            "bitsandbytes has reordered the four-bit weights for inference, since the model was run in evaluation "
            "mode; it passes no gradients through them: load the base again before training",
            stacklevel=2,
        )
    statistics: dict[str, Statistics] = config.__dict__.get("statistics") or {}
    if method.needs and not config.initialized and not sites.keys() <= statistics.keys():
        raise ValueError(
            f"{config.method} starts from data ({', '.join(sorted(method.needs))}); "
            "use eckart.adapt(model, ..., data=...)"
        )
    quantization = get_quantization_kwargs(model)
    if not config.initialized:
        sites = _shared_out(
            method, config, sites, statistics, lambda name: _readable(sites[name], layers[name], quantization)
        )
    return _initialized(method, config, sites, layers, statistics, quantization)


def _all_linears(model: nn.Module, config: EckartConfig) -> set[str]:
    """Full names of the linear maps in the blocks, of those only that ``layers_to_transform`` counts.

    PEFT looks at that only where a name is a pattern.
    """
    names = {layer_name(ref.name) for ref in linears(model, quantized=True).linears}
    wanted = config.layers_to_transform
    if wanted is None:
        return names
    chosen = {wanted} if isinstance(wanted, int) else set(wanted)
    found = blocks(model)
    lists = [[block.name for block in found if block.list_name == name] for name in {b.list_name for b in found}]
    kept = tuple(f"{name}." for members in lists for index, name in enumerate(members) if index in chosen)
    names = {name for name in names if name.startswith(kept)}
    if not names:
        raise ValueError(f"layers_to_transform={wanted} is none of the {max(map(len, lists))} blocks, counted from 0")
    return names


def _targets(model: nn.Module, config: EckartConfig) -> dict[str, nn.Module]:
    """Modules that the configuration names, by full name; not what lies inside an adapted layer.

    Raises:
        ValueError: It names none; with the nearest names.
    """
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, EckartLayer))
    modules = {name: module for name, module in model.named_modules() if name and not name.startswith(inside)}
    found = {name: module for name, module in modules.items() if check_target_module_exists(config, name)}
    if not found:
        wanted = config.target_modules
        one = wanted if isinstance(wanted, str) else next(iter(sorted(wanted or ["?"])))
        known = [name for name, module in modules.items() if site_of(name, module) is not None]
        raise ValueError(f"target_modules={wanted!r} matches no layer{nearest(one, known)}")
    return found


def _shared_out(
    method: AdapterMethod,
    config: EckartConfig,
    sites: dict[str, Site],
    statistics: dict[str, Statistics],
    weight: Callable[[str], Tensor],
) -> dict[str, Site]:
    """The sites that get a rank where the method shares ranks out itself, written into the configuration too."""
    ranks = method.ranks(sites, statistics, config.r, weight)
    if ranks is None:
        return sites
    ranks |= {name: rank for name, rank in config.rank_pattern.items() if name in ranks}  # what the user said stands
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank > 0}
    config.target_modules = set(config.rank_pattern)  # as in PEFT's own configurations
    return {name: site for name, site in sites.items() if name in config.rank_pattern}


def _initialized(
    method: AdapterMethod,
    config: EckartConfig,
    sites: dict[str, Site],
    layers: dict[str, nn.Module],
    statistics: dict[str, Statistics],
    quantization: dict[str, Any],
) -> dict[str, Adapter]:
    ranks = {name: config.rank_of(name) for name in sites}
    built = {name: method.build(site, ranks[name], config.scale_of(ranks[name])) for name, site in sites.items()}
    method.link(built)
    trained, expected = sum(a.num_trainable() for a in built.values()), method.total_trainable(sites, ranks)
    if trained != expected:
        raise RuntimeError(f"{config.method} trains {trained} numbers, not {expected}")

    def fill(name: str) -> Adapter:
        site, adapter = sites[name], built[name]
        adapter.register_buffer("fingerprint", torch.zeros(2))
        if not config.initialized:
            weight = _readable(site, layers[name], quantization)
            if not all_finite(weight):
                raise ValueError(f"{name} has NaN or Inf in its weight; repair the checkpoint first")
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + zlib.crc32(name.encode()))
            adapter.initialize(weight, statistics.get(name), generator)
            adapter.fill(fingerprint=fingerprint(weight))
        adapter.ready = True
        return adapter

    def cost(name: str) -> float:
        return float(sites[name].out_features) * sites[name].in_features * sites[name].largest_rank

    names = list(sites)
    with torch.no_grad():
        return dict(zip(names, parallel_map(_without_gradients(fill), names, cost=cost), strict=True))


def _without_gradients(function: Callable[[str], Adapter]) -> Callable[[str], Adapter]:
    """Gradient recording is a setting of each thread."""

    def run(name: str) -> Adapter:
        with torch.no_grad():
            return function(name)

    return run


def _readable(site: Site, layer: nn.Module, quantization: dict[str, Any]) -> Tensor:
    """The base weight of a layer that may not be adapted yet."""
    if isinstance(layer, EckartLayer):
        return base_weight(site, layer)
    wrapped = EckartLayer(layer, site)
    wrapped.quantization_backend = resolve_quantization_backend(layer, **quantization)
    return base_weight(site, wrapped)
