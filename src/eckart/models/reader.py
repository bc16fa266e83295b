"""Tensors and linear maps of a safetensors checkpoint, each read when asked for, by this process or by another."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from .kinds import Kind
from .select import LinearRef

__all__ = ["CheckpointReader", "RemoteLinear", "read_tensor"]

# What safetensors calls the types that a model computes in.
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class CheckpointReader:
    """Tensors of a safetensors checkpoint by name, each read when asked for.

    Args:
        path: directory with ``model.safetensors``, or shards and their index.

    Raises:
        FileNotFoundError: if there are no safetensors files, or one that the index lists is missing.
    """

    def __init__(self, path: Path) -> None:
        index = path / "model.safetensors.index.json"
        single = path / "model.safetensors"
        if index.is_file():
            names: dict[str, str] = json.loads(index.read_text())["weight_map"]
            self.files = {key: path / name for key, name in names.items()}
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), single)
        else:
            raise FileNotFoundError(f"{path} has no safetensors files; streaming needs a safetensors checkpoint")
        for file in set(self.files.values()):
            if not file.is_file():
                raise FileNotFoundError(f"{path} lacks {file.name}, which its index lists; download it again")

    def read(self, key: str) -> torch.Tensor:
        """A copy of the tensor ``key``."""
        return read_tensor(self.files[key], key)

    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point tensor; float32 if there is none."""
        for key, path in self.files.items():
            with safe_open(path, framework="pt") as file:
                name = file.get_slice(key).get_dtype()
            if name in _FLOATS:
                return _FLOATS[name]
        return torch.float32


@dataclass(frozen=True)
class RemoteLinear:
    """A linear map of a checkpoint, in few enough words to be sent to another process, which reads the numbers itself.

    Attributes:
        name: full name of the module.
        kind: as of a `LinearRef`.
        tensors: name in the module ("weight", "bias") -> (file, name in it, dtype in the model).
    """

    name: str
    kind: Kind
    tensors: dict[str, tuple[Path, str, torch.dtype]]

    def load(self) -> LinearRef:
        """The linear map with its tensors in memory; its module has them and no forward."""
        module = nn.Module()
        module.register_parameter("bias", None)
        for name, (file, key, dtype) in self.tensors.items():
            module.register_parameter(name, nn.Parameter(read_tensor(file, key).to(dtype), requires_grad=False))
        return LinearRef(self.name, module, self.kind)


def read_tensor(path: Path, key: str) -> torch.Tensor:
    """A copy of the tensor ``key`` of a safetensors file.

    The file is opened anew each time: pages of an open file stay in this process's memory.
    """
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(key).clone()
    return tensor
