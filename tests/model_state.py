"""Everything about a model that must be as it was after a refused or a read-only request, and what its layers see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return a copy of the tensors, and the modules, modes, hooks, forwards, gradients and configuration."""
    return {
        "tensors": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "modules": {name: (type(module), module.training) for name, module in model.named_modules()},
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        "forwards": [module.__dict__.get("forward") for module in model.modules()],
        "gradients": {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "config": getattr(getattr(model, "config", None), "quantization_config", None),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Compare with an earlier :func:`snapshot`, tensors to the last bit."""
    after = snapshot(model)
    for part in before.keys() - {"tensors"}:
        assert after[part] == before[part], part
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.allclose(after["tensors"][name], tensor, rtol=0, atol=0, equal_nan=True), name


@torch.no_grad()
def inputs_by_hooks(
    model: nn.Module, names: Iterable[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the rows (tokens, n) that each of these layers gets in ordinary forward passes; all must be reached."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Any:
        return lambda _, args: rows[name].append(args[0].reshape(-1, args[0].shape[-1]))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in rows]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}
