"""The blocks of a model without its head, and the norms inside them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .kinds import is_norm
from .topology import Block, blocks

__all__ = ["backbone_blocks", "norms", "pretrained_models"]


def pretrained_models(model: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost transformers models in ``model``, itself included, by name; its own name is empty."""
    if isinstance(model, PreTrainedModel):
        return {"": model}
    return {
        f"{key}.{name}".rstrip("."): found
        for key, child in model.named_children()
        for name, found in pretrained_models(child).items()
    }


def backbone_blocks(model: nn.Module) -> list[Block]:
    """The repeated blocks that are not part of a head, such as the decoder of a masked autoencoder.

    A head is what lies outside of ``base_model`` of a transformers model; any other model has none.

    Example:
        >>> from transformers import ViTMAEConfig, ViTMAEForPreTraining
        >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}
        >>> model = ViTMAEForPreTraining(ViTMAEConfig(**sizes, decoder_hidden_size=16, decoder_num_hidden_layers=1))
        >>> [block.name for block in blocks(model)], [block.name for block in backbone_blocks(model)]
        (['vit.layers.0', 'decoder.decoder_layers.0'], ['vit.layers.0'])
    """
    parts = {id(part) for one in pretrained_models(model).values() for part in one.base_model.modules()}
    return [block for block in blocks(model) if not parts or id(block.module) in parts]


def norms(block: Block) -> dict[str, nn.Module]:
    """The norms of a block that have parameters, by full name.

    Example:
        >>> layer = lambda: nn.TransformerEncoderLayer(8, 2, 16)
        >>> list(norms(blocks(nn.ModuleDict({"layers": nn.ModuleList([layer(), layer()])}))[0]))
        ['layers.0.norm1', 'layers.0.norm2']
    """
    return {
        f"{block.name}.{name}": module
        for name, module in block.module.named_modules()
        if is_norm(module) and any(True for _ in module.parameters()) and not list(module.children())
    }
