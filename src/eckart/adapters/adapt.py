"""The verb: put an adapter on a model, ready to be trained by PEFT, transformers' Trainer or any loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ..models.calibrate import calibrate
from ..models.replay import Batch
from ..models.select import Where, linears
from .config import EckartConfig
from .layer import layer_name
from .registration import register

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["adapt"]


def adapt(
    model: nn.Module,
    method: str = "pissa",
    rank: int = 16,
    *,
    alpha: float | None = None,
    where: Where | None = None,
    data: Iterable[Batch] | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    adapter_name: str = "default",
    progress: bool = True,
    **settings: Any,
) -> PeftModel:
    """Put the adapter of a published method on a model.

    The base weights are frozen and not changed. What is trained is in float32 whatever the base's dtype. Everything is
    checked and computed before the first layer is touched.

    Args:
        model: A transformers model, or any module; a `PeftModel` gets a further adapter of name ``adapter_name``.
        method: Name in the catalog, family adapters.
        rank: r.
        alpha: The update is scaled by alpha / r; None for alpha = r.
        where: Which linear maps, as in `eckart.models.linears`; None for all of the repeated blocks. For embeddings
            and convolutions say ``target_modules=[...]`` instead.
        data: Batches for methods that start from data: dictionaries of tensors, as the model's forward takes them.
        options: Options of the method, see ``eckart methods NAME``.
        seed: Of everything that is drawn.
        adapter_name: Name of the adapter.
        progress: Show a bar with the time left.
        **settings: Further fields of `EckartConfig`, such as ``task_type`` or ``modules_to_save``.

    Returns:
        The `peft.PeftModel`; the model itself is inside, with its layers replaced.

    Raises:
        UnknownMethodError: No such method; with the nearest names.
        ValueError: The method cannot be used at a layer, an option is wrong, or data is missing.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        >>> adapted = adapt(base, "pissa", rank=2, where="*", progress=False)
        >>> adapted.get_nb_trainable_parameters()[0]
        32
    """
    from peft import PeftModel, get_peft_model

    register()
    if where is not None:
        if "target_modules" in settings:
            raise ValueError("give either where or target_modules, not both")
        settings["target_modules"] = [
            layer_name(ref.name) for ref in linears(_inner(model), where, quantized=True).linears
        ]
    config = EckartConfig(method=method, r=rank, alpha=alpha, options=options or {}, seed=seed, **settings)
    needs = config.build_method().needs
    if needs:
        if data is None:
            raise ValueError(f"{config.method} starts from data; give data=, an iterable of batches")
        found = calibrate(_inner(model), data, needs, where=where, progress=progress, quantized=True)
        # Not a field: it does not belong into a file.
        config.__dict__["statistics"] = {layer_name(name): entry for name, entry in found.items()}
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            model.set_adapter(adapter_name)
            return model
        return get_peft_model(model, config, adapter_name=adapter_name)
    finally:
        config.__dict__.pop("statistics", None)


def _inner(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    inner: nn.Module = model.get_base_model()
    return inner
