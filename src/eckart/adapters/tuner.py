"""The one PEFT tuner of Eckart: it puts the adapter of any method on the layers of a model.

Everything is decided and computed before the first layer is touched: which modules, whether the method is defined
there, and the initial tensors of all of them, several matrices at a time. A failure leaves the model as it was.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

from .combine import add_weighted_adapter
from .contract import Adapter
from .coordinator import IGNORED_LABEL, Coordinator
from .fingerprint import check_fingerprints
from .layer import EckartLayer
from .plan import plan
from .reference import reference_output

__all__ = ["EckartModel"]


class EckartModel(BaseTuner):
    """A model with Eckart adapters, as `peft.get_peft_model` makes it.

    Calibration statistics, for methods that start from data, come as an attribute ``statistics`` of the configuration
    that is no field of it; `eckart.adapt` puts it there.
    """

    prefix: str = "eckart_"
    tuner_layer_cls = EckartLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check, compute and only then replace layers."""
        config: Any = self.peft_config[adapter_name]
        try:
            self.__dict__["_pending"] = plan(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            coordinator = config.build_method().coordinate(self.__dict__["_pending"], config.seed)
            if coordinator is not None:
                self.__dict__.setdefault("_coordinators", {})[adapter_name] = coordinator
            if "_hooks" not in self.__dict__:
                # On the model itself: PEFT calls it past the tuner unless a task type is given.
                self.__dict__["_hooks"] = [
                    self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                    self.model.register_forward_hook(self._add_penalty, with_kwargs=True),
                ]
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            self.__dict__.pop("_pending", None)

    def penalty(self) -> Tensor | None:
        """Sum of the penalties of the active adapters, for loops that compute their own loss."""
        sources: list[Adapter | Coordinator] = [*self._active(), *self.coordinators().values()]
        terms = [term for source in sources if (term := source.penalty()) is not None]
        return torch.stack(terms).sum() if terms else None

    def on_step(self, step: int, total: int) -> None:
        """Tell the active adapters that optimizer step ``step`` of ``total`` is done; the first step is 1.

        To be called after ``optimizer.step()`` and before ``zero_grad()``: some methods read the gradients.
        """
        with torch.no_grad():
            for adapter in self._active():
                adapter.on_step(step, total)
            for coordinator in self.coordinators().values():
                coordinator.on_step(step, total)
                coordinator.counted()

    def coordinators(self) -> dict[str, Coordinator]:
        """What the active adapters do together, by adapter name, for those that do."""
        found: dict[str, Coordinator] = self.__dict__.get("_coordinators", {})
        return {name: value for name, value in found.items() if name in self.active_adapters}

    def truncate(self, rank: int, adapter_name: str = "default") -> None:
        """Keep the leading ``rank`` components of an adapter whose method trains nested ranks.

        Raises:
            ValueError: No such adapter, a rank below 1 or above the present one, or a method without that order.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"no adapter {adapter_name!r}; there is {', '.join(self.peft_config)}")
        config: Any = self.peft_config[adapter_name]
        if not 1 <= rank <= config.r:
            raise ValueError(f"rank must be 1 to {config.r}, not {rank}")
        layers = [module for module in self.model.modules() if isinstance(module, EckartLayer)]
        for adapter in [adapter for layer in layers for adapter in layer.adapters([adapter_name])]:
            adapter.truncate(rank)
        config.alpha = float(config.r) if config.alpha is None else config.alpha  # so that alpha / r follows the rank
        config.r = rank

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> dict[str, float]:
        """A new adapter whose update is the weighted sum of others', as PEFT's LoRA has it.

        Args:
            adapters: Names.
            weights: One for each.
            adapter_name: Of the new one.
            combination_type: "cat" for the exact sum, "svd" for the best of rank ``svd_rank``.
            svd_rank: For "svd"; None for the largest rank among the adapters.

        Returns:
            Relative error of the sum at each layer.

        Raises:
            ValueError: See `eckart.adapters.combine.add_weighted_adapter`; or another combination.
        """
        if combination_type not in ("cat", "svd"):
            raise ValueError(f"combination_type must be 'cat' or 'svd', not {combination_type!r}")
        if len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters, but {len(weights)} weights")
        rank = None
        if combination_type == "svd":
            configs: list[Any] = [self.peft_config[name] for name in adapters if name in self.peft_config]
            rank = max((one.r for one in configs), default=1) if svd_rank is None else svd_rank
        return add_weighted_adapter(self, dict(zip(adapters, weights, strict=True)), adapter_name, rank=rank)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter off every layer."""
        super().delete_adapter(adapter_name)
        self.__dict__.get("_coordinators", {}).pop(adapter_name, None)

    def _before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for coordinator in self.coordinators().values():
            if module.training:
                coordinator.check_counted()
            coordinator.before_forward(kwargs, module.training)
        asking = [coordinator for coordinator in self.coordinators().values() if coordinator.needs_reference]
        if asking and module.training and torch.is_grad_enabled():
            output = reference_output(module, args, kwargs)
            for coordinator in asking:
                coordinator.observe_reference(output)
        return args, kwargs

    def _add_penalty(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Adds the penalties to the loss in the model's own output while it is trained.

        Where the loss is a sum over micro-batches that is divided by ``num_items_in_batch``, as in the Trainer, each
        micro-batch carries its share of the penalty, so accumulating gradients equals one big batch.
        """
        if not (module.training and torch.is_grad_enabled()):
            return output
        for coordinator in self.coordinators().values():
            coordinator.observe_output(output, kwargs)
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is not None:
            for coordinator in self.coordinators().values():
                coordinator.observe(loss.detach())
        penalty = self.penalty() if loss is not None else None
        if loss is not None and penalty is not None:
            items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
            share = 1.0 if items is None or labels is None else labels.ne(IGNORED_LABEL).sum() / items
            output["loss"] = loss + penalty.to(loss) * share
        return output

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for handle in self.__dict__.pop("_hooks", ()):
            handle.remove()
        return model

    def _active(self) -> list[Adapter]:
        layers = [module for module in self.model.modules() if isinstance(module, EckartLayer)]
        return [adapter for layer in layers if not layer.disable_adapters for adapter in layer.adapters()]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # the plan has filled in the targets

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        adapter = self.__dict__["_pending"][current_key]
        if isinstance(target, EckartLayer):
            target.add(adapter_name, adapter, inference_mode=peft_config.inference_mode)
            return
        layer = EckartLayer(target, adapter.site)
        layer.quantization_backend = resolve_quantization_backend(target, **get_quantization_kwargs(self.model))
        layer._active_adapter = self.active_adapters
        layer.add(adapter_name, adapter, inference_mode=peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies weight and bias onto the module that it puts back, which is where they came from.
        setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_fingerprints(model, adapter_name, remapped)
        return remapped
