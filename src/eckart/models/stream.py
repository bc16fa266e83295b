"""A checkpoint worked on block by block: read, changed, written as it goes, never in memory as a whole.

The model is built without weights. What the embeddings hold is read once; the weights of a block are in
memory only while it is visited, and leave it as one shard of the new checkpoint. Peak memory is the
embeddings, one block, and what is done with it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..linalg import all_finite
from ..structures import structure_from_spec
from .files import CheckpointError, flush_to_disk
from .memory import release_memory
from .quantizer import METHOD
from .reader import CheckpointReader, RemoteLinear
from .replace import replace
from .select import LinearRef
from .topology import block_of, blocks

__all__ = ["StreamedModel"]


class StreamedModel:
    """A model without weights over a checkpoint, and a new checkpoint that grows block by block.

    Args:
        source: directory of the dense checkpoint.

    Attributes:
        model: the transformers model; its blocks' weights are on the meta device outside `visiting`.
        blocks: its blocks.
        target: directory to write shards to; set by the caller.

    Raises:
        FileNotFoundError: if there is no safetensors checkpoint.
        ValueError: if the checkpoint is compressed or quantized already, has NaN or Inf outside the blocks, or its
            names are not the model's (transformers converts some on loading, such as fused experts), so that
            blocks cannot be read one by one.
    """

    target: Path

    def __init__(self, source: Path) -> None:
        config = _config(source)
        self.reader = CheckpointReader(source)
        self.model: Any = _skeleton(source, config, self.reader)
        self.blocks = blocks(self.model)
        self._weight_map: dict[str, str] = {}
        self._bytes = 0
        self._tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        state = self.model.state_dict()
        self._keys = self._match(state.keys())
        self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
        inside = {name: block_of(name, self.blocks) for name in self._keys}
        self._of_block: dict[str, list[str]] = {block.name: [] for block in self.blocks}
        outside: list[str] = []
        for name, block in inside.items():
            (outside if block is None else self._of_block[block.name]).append(name)
        head: nn.Module | None = self.model.get_output_embeddings()
        # Tied to the embedding it is needed all the same.
        unused = {id(p) for p in head.parameters()} if head is not None and not self._tied else set()
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        # The head is the largest matrix of many models, and no block needs it.
        self._fill(name for name in outside if id(parameters.get(name)) not in unused)
        if self._tied:
            self.model.tie_weights()
        self._outside = outside

    def _match(self, names: Iterable[str]) -> dict[str, str]:
        """Model's name -> checkpoint's name, which may carry the base model's prefix or lack it."""
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        found: dict[str, str] = {}
        for name in names:
            choices = (name, name.removeprefix(prefix), prefix + name)
            key = next((choice for choice in choices if choice in self.reader.files), None)
            if key is not None:
                found[name] = key
            elif name not in self._tied:
                raise ValueError(
                    f"the checkpoint has no tensor {name}: it is stored in another layout than the model's, "
                    "so it cannot be streamed; compress it in memory"
                )
        return found

    def _fill(self, names: Iterable[str]) -> None:
        for name in names:
            _assign(self.model, name, self._read(name))

    def _read(self, name: str) -> torch.Tensor:
        """The tensor of the checkpoint, in the model's dtype as if transformers had loaded it."""
        tensor = self.reader.read(self._keys[name])
        if not all_finite(tensor):
            raise ValueError(f"{name} has NaN or Inf in it; repair or re-download the checkpoint")
        return tensor.to(self._dtypes[name])

    @contextlib.contextmanager
    def visiting(self, index: int, *, changed: bool) -> Iterator[None]:
        """Have the weights of a block in memory; write the block as a shard at the end if ``changed``.

        Raises:
            ValueError: NaN or Inf in a weight of the block.
        """
        block = self.blocks[index]
        self._fill(self._of_block[block.name])
        before = list(block.module.modules())
        yield
        if changed:
            tensors = block.module.state_dict()
            self._write(index, {f"{block.name}.{key}": tensor for key, tensor in tensors.items()})
        # The layers that were replaced too: someone may still hold them, but not their weights.
        for module in {*before, *block.module.modules()}:
            _empty(module)
        release_memory()

    def restore(self, index: int, specs: Mapping[str, Mapping[str, Any]]) -> None:
        """Inside `visiting`: put the structures of a block that an earlier run has written in their places.

        Args:
            index: the block.
            specs: full name of each structure -> its ``spec()``.

        Raises:
            CheckpointError: the block's shard is missing or damaged.
        """
        path = self.target / self._shard(index)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is missing or damaged; start anew with force (--force)") from error
        self._count(path.name, tensors)
        for name, spec in specs.items():
            structure = structure_from_spec(spec, device="meta", dtype=self._dtypes[f"{name}.weight"])
            own = {key.removeprefix(f"{name}."): tensors[key] for key in tensors if key.startswith(f"{name}.")}
            structure.load_state_dict(own, assign=True)
            replace(self.model, name, structure)

    def remote(self, ref: LinearRef) -> RemoteLinear:
        """What another process needs to read a linear of the dense checkpoint by itself."""
        names = {key: f"{ref.name}.{key}" for key in ref.module.state_dict()}
        return RemoteLinear(
            ref.name,
            ref.kind,
            {
                key: (self.reader.files[self._keys[name]].absolute(), self._keys[name], self._dtypes[name])
                for key, name in names.items()
            },
        )

    def finish(self) -> None:
        """Write what lies outside the blocks, and the index: all weights are on disk then."""
        names = [name for name in self._outside if name not in self._tied]
        self._write(len(self.blocks), {name: self._read(name) for name in names})
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._weight_map.items()))}
        (self.target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _write(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        path = self.target / self._shard(number)
        try:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
            flush_to_disk(path)  # before a journal says that it is there
        except BaseException:
            path.unlink(missing_ok=True)  # half a shard is of no use, and the disk may be full
            raise
        self._count(path.name, tensors)

    def _shard(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{len(self.blocks) + 1:05}.safetensors"

    def _count(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self._weight_map.update(dict.fromkeys(tensors, name))
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())


def _config(source: Path) -> Any:
    """The configuration of a dense checkpoint."""
    from transformers import AutoConfig

    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"no model in {source}: it has no config.json")
    config = AutoConfig.from_pretrained(source)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        what = "compressed by Eckart" if method == METHOD else f"quantized with {getattr(method, 'value', method)}"
        raise ValueError(f"the checkpoint is {what} already; start from the dense one")
    return config


def _skeleton(source: Path, config: Any, reader: CheckpointReader) -> Any:
    """The model with parameters on the meta device and real buffers, in eval mode."""
    import transformers
    from accelerate import init_empty_weights
    from transformers import GenerationConfig
    from transformers.initialization import no_init_weights

    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(f"{source / 'config.json'} names no architecture that transformers has")
    dtype = getattr(config, "dtype", None) or reader.dtype()
    # Buffers such as rotary frequencies are computed, not stored, so they are made for real.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = kind._from_config(config, dtype=dtype)
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval()


def _empty(module: nn.Module) -> None:
    """Take the weights of a module, without its children's, out of memory; buffers that are not stored stay."""
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
    for key in module._buffers.keys() - module._non_persistent_buffers_set:
        buffer = module._buffers[key]
        module._buffers[key] = None if buffer is None else buffer.to("meta")


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, keeping which of the two it is."""
    owner_name, _, key = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if key in owner._parameters:
        owner._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[key] = tensor
