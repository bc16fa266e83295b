"""Where a model's repeated blocks are, which layer inputs are the same tensor, and a batch to try a model on."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import linear_kind

__all__ = ["Block", "InputTracker", "block_of", "blocks", "example_inputs", "kinds_of", "same_input"]


@dataclass(frozen=True)
class Block:
    """One of a model's repeated blocks.

    Attributes:
        name: full name, such as ``model.layers.3``.
        module: the block.
        list_name: full name of the list that it is in, such as ``model.layers``.
    """

    name: str
    module: nn.Module
    list_name: str


def kinds_of(names: Sequence[str]) -> dict[str, str]:
    """The type of each matrix: its name with the numbers of its blocks taken out.

    Example:
        >>> kinds_of(["model.layers.3.mlp.up_proj"])
        {'model.layers.3.mlp.up_proj': 'model.layers.mlp.up_proj'}
    """
    return {name: ".".join(part for part in name.split(".") if not part.isdigit()) for name in names}


def blocks(model: nn.Module) -> list[Block]:
    """Find the repeated blocks of a model, whatever its family.

    They are the children of the outermost ``nn.ModuleList``s whose children have a class in common (a class
    of their own, not just ``nn.Module``) and hold linear maps. Inside a block the search does not go on.

    Args:
        model: any module.

    Returns:
        The blocks in the order in which the model registers them, which in transformers is the order of
        execution: the encoder's before the decoder's. Empty if there are none.

    Example:
        >>> layer = lambda: nn.TransformerEncoderLayer(8, 2, 16)
        >>> [block.name for block in blocks(nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()])}))]
        ['layers.0', 'layers.1']
    """
    found: list[Block] = []

    def search(name: str, module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList) and _repeats(module):
            found.extend(Block(f"{name}.{key}".lstrip("."), child, name) for key, child in module.named_children())
            return
        for key, child in module.named_children():
            search(f"{name}.{key}".lstrip("."), child)

    search("", model)
    return found


def _repeats(layers: nn.ModuleList) -> bool:
    children = list(layers)
    if any(linear_kind(child) or isinstance(child, nn.ModuleList) for child in children):
        return False
    # Hybrid models alternate, say, attention and recurrent layers: two classes with a common base.
    ancestors = [set(type(child).__mro__) - {nn.Module, object} for child in children]
    if not ancestors or not set.intersection(*ancestors):
        return False
    return any(linear_kind(module) for child in children for module in child.modules())


def block_of(name: str, found: list[Block]) -> Block | None:
    """Return the block of ``found`` that the module called ``name`` belongs to, or None."""
    return next((block for block in found if name == block.name or name.startswith(block.name + ".")), None)


class InputTracker:
    """Number the distinct inputs that layers receive during a forward pass.

    Two inputs are the same if they are the same memory, shape and strides, and nothing was written to it in
    between. Every input seen is kept alive until :meth:`clear`, so memory cannot be reused for another one.

    Inference tensors count no writes, so each of them is distinct; run under ``torch.no_grad`` instead of
    ``torch.inference_mode``.

    Example:
        >>> tracker, x = InputTracker(), torch.ones(2, 3)
        >>> tracker.key(x), tracker.key(x.view(2, 3)), tracker.key(x.clone())
        (0, 0, 1)
        >>> _ = x.add_(1)
        >>> tracker.key(x)
        2
    """

    def __init__(self) -> None:
        self._keys: dict[tuple[Any, ...], int] = {}
        self._alive: list[Tensor] = []

    def key(self, x: Tensor) -> int:
        """Return the number of the distinct input ``x``: a new one, counting from 0, if it was not seen."""
        number = self._keys.setdefault((*_identity(x), len(self._alive) if x.is_inference() else -1), len(self._alive))
        if number == len(self._alive):
            self._alive.append(x)
        return number

    def clear(self) -> None:
        """Forget all inputs and release their memory; numbers start again at 0."""
        self._keys.clear()
        self._alive.clear()


def same_input(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors, both alive, are the same values by construction: one piece of memory.

    Example:
        >>> x = torch.ones(2, 3)
        >>> same_input(x, x.view(2, 3)), same_input(x, x[:1]), same_input(x, x.clone())
        (True, False, False)
    """
    return _identity(a) == _identity(b)


def _identity(x: Tensor) -> tuple[Any, ...]:
    # The storage object and not its address: tensors on the meta device all have address 0.
    storage = x.untyped_storage()._cdata
    version = 0 if x.is_inference() else x._version
    return storage, x.storage_offset(), x.shape, x.stride(), x.dtype, version


def example_inputs(model: nn.Module, tokens: int = 16) -> dict[str, Tensor]:
    """Make one small batch that the model's forward accepts, on its device and without random numbers.

    Args:
        model: a transformers model for text or images.
        tokens: sequence length of text; fewer if the model takes fewer.

    Returns:
        Keyword arguments of the model's forward with batch size 1.

    Raises:
        ValueError: the model wants something else; the message says what to pass.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> example_inputs(model, tokens=3)["input_ids"]
        tensor([[1, 2, 3]])
    """
    kind = getattr(model, "main_input_name", None)
    accepted = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    if kind == "input_ids" and kind in accepted:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]  # every transformers model has it
        limit = getattr(config, "max_position_embeddings", None) or tokens
        length = min(tokens, limit)
        # accelerate keeps offloaded weights on the meta device and knows where they will run.
        placement: Any = getattr(embedding, "_hf_hook", None)
        device = getattr(placement, "execution_device", None) or embedding.weight.device
        ids = (torch.arange(1, length + 1) % embedding.weight.shape[0]).to(device).unsqueeze(0)
        batch = {"input_ids": ids}
        # A mask of ones is no mask, and on the meta device a model could not look at it to find out.
        if "attention_mask" in accepted and ids.device.type != "meta":
            batch["attention_mask"] = torch.ones_like(ids)
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
            batch["decoder_input_ids"] = ids.clone()
        return batch
    vision: Any = getattr(config, "vision_config", config)
    if kind == "pixel_values" and hasattr(vision, "image_size"):
        size = vision.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        parameter = next(model.parameters())
        channels = getattr(vision, "num_channels", 3)
        ramp = torch.linspace(-1, 1, channels * height * width).reshape(1, channels, height, width)
        return {"pixel_values": ramp.to(parameter.device, parameter.dtype)}
    raise ValueError(
        f"cannot make an example batch for {type(model).__name__} (its main input is {kind!r}); "
        "pass batch={...} with the keyword arguments of its forward"
    )
