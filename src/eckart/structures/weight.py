"""``layer.weight`` of a structure, for code that only wants to look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from .base import Structure

# Answered without building W.
_FREE = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]  # a getter of the class; so for the others
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
}


class WeightView(Tensor):
    """W (out, in) of a structure, built only when something is computed with it.

    Model code looks at ``layer.weight`` for its dtype or device (T5), or hands it to an initialiser that leaves
    loaded weights alone (GPT-2). That is free here; arithmetic gets ``structure.dense()``, gradients included.
    """

    _structure: Structure
    _is_hf_initialized = True  # transformers must not fill it with random numbers

    @staticmethod
    def __new__(cls, structure: Structure) -> WeightView:  # noqa: D102
        shape = (structure.out_features, structure.in_features)
        view: WeightView = Tensor._make_wrapper_subclass(cls, shape, dtype=structure.dtype, device=structure.device)
        view._structure = structure
        return view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FREE:
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = tree_map(lambda x: x._structure.dense() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub forgets that it is a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"{func} cannot be applied to the weight of a structure; use its dense()")
