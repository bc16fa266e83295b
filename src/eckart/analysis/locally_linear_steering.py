"""Steering by a concept's locally linear map: what it makes of another prompt is added to that prompt's hidden states.

    added_k = sum over j <= k of J_{j mod T_c} e_j,    h_k <- h_k + strength ||h_k|| / (2 ||added_k||) added_k

J (d, T_c, d) is the map from the embeddings of the concept's prompt to the input of a layer at two thirds of the depth;
the pass goes on from there. Paper and code: `eckart.analysis.locally_linear`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..models.backbone import backbone_blocks
from ..models.detach import Gating
from ..models.jacobian import jacobians
from ..models.recording import recorded, rewritten

__all__ = ["steered", "steering", "steering_directions"]


def steering_directions(jacobian: Tensor, embeddings: Tensor) -> Tensor:
    """What a concept's map to a layer makes of another prompt, added up token by token.

        added_k = sum over j <= k of J_{j mod T_c} e_j

    Args:
        jacobian: (d, T_c, d), of the concept's prompt.
        embeddings: (..., T, d), of the prompt that is steered.

    Returns:
        (..., T, d).

    Example:
        >>> steering_directions(torch.eye(2)[:, None], torch.tensor([[1.0, 0.0], [2.0, 3.0]])).tolist()
        [[1.0, 0.0], [3.0, 3.0]]
    """
    turns = torch.arange(embeddings.shape[-2], device=embeddings.device) % jacobian.shape[1]
    return torch.einsum("otd,...td->...to", jacobian[:, turns], embeddings).cumsum(dim=-2)


def steered(hidden: Tensor, added: Tensor, strength: float = 1.03) -> Tensor:
    """Hidden states moved by a share of their own length: h + strength ||h|| / (2 ||added||) added, (..., d).

    Example:
        >>> steered(torch.tensor([4.0, 0.0]), torch.tensor([0.0, 7.0]), strength=1.0)
        tensor([4., 2.])
    """
    unit = nn.functional.normalize(added, dim=-1, eps=torch.finfo(added.dtype).tiny)
    return hidden + strength / 2 * torch.linalg.vector_norm(hidden, dim=-1, keepdim=True) * unit


@contextlib.contextmanager
def steering(
    model: nn.Module,
    concept: Tensor,
    layer: int | None = None,
    *,
    strength: float = 1.03,
    gating: Gating = "gate",
    chunk: int = 64,
) -> Iterator[None]:
    """Steer passes inside the block towards the concept of a prompt; the model is as before when it ends.

    Args:
        model: A causal language model.
        concept: (T_c,) token ids of the concept's prompt.
        layer: Whose input is moved, from 1 to the number of blocks less one; default two thirds of the depth.
        strength: Length of the step, in halves of the hidden state's length.
        gating: Which factor of a gated MLP is held constant, see `eckart.models.detach.detached`.
        chunk: Rows of J a backward pass.

    Raises:
        ValueError: No such layer, no causal language model, or a prompt longer than its context.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config).eval()
        >>> with steering(model, torch.tensor([3, 1, 4])):  # no cache: directions add up from the first token
        ...     ids = model.generate(torch.tensor([[7, 5]]), max_new_tokens=4, do_sample=False, use_cache=False)
    """
    depth = len(backbone_blocks(model))
    layer = max(1, round(depth * 2 / 3)) if layer is None else layer
    if not 1 <= layer < depth:
        raise ValueError(f"layer must be from 1 to {depth - 1}, not {layer}")
    with recorded(model, concept, gating) as found:
        (jacobian,) = jacobians(found.states[layer][0, -1], [found.embeddings], chunk=chunk)
    with rewritten(model, layer, lambda e, h: steered(h, steering_directions(jacobian, e), strength)):
        yield
