"""The contract of a structured linear map: ``y = x W^T + b`` with W (out, in) stored as something smaller."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

__all__ = ["STRUCTURES", "Structure", "empty_parameter", "structure_from_spec", "wide"]

#: Every structure by the name that its spec carries. A subclass that defines ``type_name`` enters by itself.
STRUCTURES: dict[str, type[Structure]] = {}


class Structure(nn.Module, ABC):
    """A linear map W (out, in) with an optional bias (out,), stored in a structured form.

        forward(x) = x W^T + b,   x (..., in) -> (..., out)

    A subclass sets ``type_name``, registers its tensors in ``__init__`` (uninitialised: values come from a
    constructor such as ``LowRank.from_factors`` or from ``load_state_dict``), and writes ``forward``, ``dense``,
    ``flops`` and ``_options``. Constructor arguments and spec entries have the same names.

    Args:
        in_features: Columns of W.
        out_features: Rows of W.
        bias: Whether a bias (out,) is added.
        device: Device of the parameters; ``"meta"`` allocates nothing.
        dtype: Floating dtype of the parameters, default ``torch.get_default_dtype()``.

    Raises:
        ValueError: A size is not positive.
    """

    type_name: ClassVar[str]
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("type_name")
        if name is not None and STRUCTURES.setdefault(name, cls) is not cls:
            raise TypeError(f"two structures carry the type name {name!r}: {STRUCTURES[name]} and {cls}")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be positive, got {in_features} and {out_features}")
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", empty_parameter(out_features, device=device, dtype=dtype) if bias else None)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the map: x (..., in) -> (..., out), without building W."""

    @abstractmethod
    def dense(self) -> Tensor:
        """W (out, in) in the dtype of the parameters, products accumulated in float32 or wider; differentiable."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating point operations of ``forward`` on ``tokens`` rows: 2 per multiply-add, bias not counted."""

    def num_parameters(self) -> int:
        """Stored floating point numbers, bias included; index tensors are not counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    def nbytes(self) -> int:
        """Bytes of everything stored, index tensors included."""
        stored = [*self.parameters(), *self.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def spec(self) -> dict[str, Any]:
        """What is needed to build the same module without its values, as plain JSON data."""
        shape = {"in_features": self.in_features, "out_features": self.out_features}
        return {"type": self.type_name, **shape, "bias": self.bias is not None, **self._options()}

    def _options(self) -> dict[str, Any]:
        """Constructor arguments besides sizes, bias, device and dtype, as plain JSON data."""
        return {}

    @classmethod
    def from_spec(
        cls,
        spec: Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the module of a spec: right shapes and names, values uninitialised.

        Args:
            spec: What ``spec()`` gave, possibly through JSON.
            device: Device of the parameters.
            dtype: Dtype of the parameters.

        Returns:
            The module.

        Raises:
            ValueError: The spec is of another type, or lacks or adds an entry.
        """
        arguments = {name: value for name, value in spec.items() if name != "type"}
        if spec.get("type") != cls.type_name:
            raise ValueError(f"{cls.__name__} reads specs of type {cls.type_name!r}, got {spec.get('type')!r}")
        try:
            return cls(**arguments, device=device, dtype=dtype)
        except TypeError as error:
            raise ValueError(f"spec of a {cls.type_name!r} structure has wrong entries: {error}") from error

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the parameters."""
        return next(self.parameters()).dtype

    def extra_repr(self) -> str:
        """Constructor arguments, as in the repr of ``nn.Linear``."""
        return ", ".join(f"{name}={value}" for name, value in self.spec().items() if name not in ("type", "terms"))


def structure_from_spec(
    spec: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Structure:
    """Build the structure that a spec describes, whatever its type; values uninitialised.

    Args:
        spec: What ``Structure.spec()`` gave, possibly through JSON.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Returns:
        The module.

    Raises:
        ValueError: The type is unknown or the entries do not fit it.

    Example:
        >>> spec = {"type": "dense", "in_features": 3, "out_features": 2, "bias": True}
        >>> structure_from_spec(spec, device="meta")
        Dense(in_features=3, out_features=2, bias=True)
    """
    name = spec.get("type")
    if name not in STRUCTURES:
        raise ValueError(
            f"unknown structure type {name!r}: this version knows {', '.join(sorted(STRUCTURES))}; "
            "was the checkpoint written by a newer one?"
        )
    return STRUCTURES[name].from_spec(spec, device=device, dtype=dtype)


def empty_parameter(
    *shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """An uninitialised parameter, to be filled by a constructor or by ``load_state_dict``."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider, for products that must not accumulate in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
