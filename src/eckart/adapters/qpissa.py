"""QPiSSA: a base in four bits whose quantization error the adapter takes up.

    W ≈ Q + B A,   Q = quantize(W - B A) (out, in),   B A = the best rank-r part of W - Q, in turns

F. Meng, Z. Wang, M. Zhang, PiSSA, NeurIPS 2024, arXiv 2404.02948, section 3.3; code: GraphPKU/PiSSA. LoftQ (arXiv
2310.08659) is the same iteration begun with Q. The error need not fall in every round, so the best round is kept.

Done once, before the base is quantized: the weights that this leaves lie on the grid of the four-bit format, so a
loader that quantizes to that format (bitsandbytes' nf4 with blocks of 64, as transformers loads it) stores exactly Q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..linalg import svd
from ..models.progress import track
from ..models.select import Where, linears
from .config import EckartConfig
from .fingerprint import fingerprint
from .layer import EckartLayer
from .pissa import Solver, split_evenly

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["NF4", "QuantizedStart", "nf4", "qpissa", "quantized_pissa"]

#: The sixteen values of NF4 (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E): quantiles of a normal
#: distribution, scaled to [-1, 1], zero among them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4(weight: Tensor, block: int = 64) -> Tensor:
    """The nearest NF4 values of a weight, each block of entries scaled by its largest.

    Args:
        weight: (out, in) float32, read row by row.
        block: Entries that share a scale; the last block may be shorter. 64 as in QLoRA.

    Returns:
        (out, in), what the four-bit weight is when read back.

    Example:
        >>> nf4(torch.tensor([[1.0, -2.0, 0.1]])).tolist()
        [[0.8814196586608887, -2.0, 0.15916059911251068]]
    """
    flat = nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % block)).view(-1, block)
    scale = flat.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(NF4, dtype=torch.float32, device=weight.device)
    nearest = torch.bucketize(flat / scale.clamp(min=torch.finfo(torch.float32).tiny), (values[1:] + values[:-1]) / 2)
    return (values[nearest] * scale).reshape(-1)[: weight.numel()].view_as(weight)


class QuantizedStart(NamedTuple):
    """A quantized base and the factors that go with it.

    Attributes:
        base: Q (out, in), on the grid of the quantizer.
        left: B (out, r).
        right: A (r, in).
        error: ||W - Q - B A||_F.
        plain_error: ||W - quantize(W)||_F, without an adapter.
    """

    base: Tensor
    left: Tensor
    right: Tensor
    error: float
    plain_error: float


def qpissa(
    weight: Tensor,
    rank: int,
    *,
    iterations: int = 5,
    quantize: Callable[[Tensor], Tensor] = nf4,
    solver: Solver = "auto",
) -> QuantizedStart:
    """Split W into a quantized base and a low-rank part, by turns.

    Args:
        weight: W (out, in) float32.
        rank: r.
        iterations: Rounds; 5 in the paper's code.
        quantize: W -> the values it has after quantization.
        solver: Of the SVD, as for PiSSA.

    Raises:
        ValueError: Fewer than one round.

    Example:
        >>> weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        >>> start = qpissa(weight, 8)
        >>> start.error < start.plain_error
        True
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    plain = float(torch.linalg.vector_norm(weight - quantize(weight)))
    target, best = weight, None
    for _ in range(iterations):
        top = svd(target, rank, driver=solver)
        left, right = split_evenly(top.u, top.s, top.vh)
        base = quantize(weight - left @ right)
        error = float(torch.linalg.vector_norm(weight - base - left @ right))
        if best is None or error < best.error:
            best = QuantizedStart(base, left, right, error, plain)
        target = weight - base
    assert best is not None
    return best


def quantized_pissa(
    model: nn.Module,
    rank: int = 16,
    *,
    where: Where | None = None,
    iterations: int = 5,
    quantize: Callable[[Tensor], Tensor] = nf4,
    solver: Solver = "auto",
    progress: bool = True,
) -> PeftModel:
    """Put the linear maps of a model on the four-bit grid and add the adapter that makes up for it.

    Save both parts, then load the base in four bits and the adapter on it:
    ``peft_model.save_pretrained(adapter)``, ``peft_model.unload().save_pretrained(base)``.

    Args:
        model: In float32 or bfloat16; its weights are replaced by Q. In bfloat16 Q is rounded.
        rank: r.
        where: Which linears, as in `eckart.models.linears`; every one of the blocks by default.
        iterations: Rounds a weight.
        quantize: W (out, in) -> the values it has after quantization.
        solver: Of the SVD, as for PiSSA.
        progress: Show a bar with the time left.

    Returns:
        The `peft.PeftModel`, with an adapter of method "pissa" whose start is zero.

    Raises:
        ValueError: A rank above the smallest side of a weight, or a structured layer; nothing is changed.

    Example:
        >>> base = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        >>> quantized_pissa(base, 4, where="*", progress=False).get_nb_trainable_parameters()[0]
        512
    """
    from peft import get_peft_model

    refs = linears(model, where).linears
    structured = [ref.name for ref in refs if ref.kind == "structure"]
    if structured:
        raise ValueError(f"{structured[0]} is compressed already and cannot hold a quantized dense weight; exclude it")
    small = [ref for ref in refs if not 1 <= rank <= min(ref.shape)]
    if small:
        raise ValueError(f"{small[0].name} is {small[0].shape}, so its rank must be 1 to {min(small[0].shape)}")

    starts = []
    with torch.no_grad():
        for ref in track(refs, "quantize", enabled=progress):
            weight = ref.weight.to(torch.float32)
            starts.append(qpissa(weight, rank, iterations=iterations, quantize=quantize, solver=solver))
    config = EckartConfig(method="pissa", r=rank, target_modules=[ref.name for ref in refs], initialized=True)
    adapted = get_peft_model(model, config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, EckartLayer)}
    with torch.no_grad():
        for ref, start in zip(refs, starts, strict=True):
            layer = layers[ref.name]
            layer.set_base_weight(layer.as_stored(start.base))
            (adapter,) = layer.adapters(["default"])
            adapter.fill(left=start.left, right=start.right, fingerprint=fingerprint(start.base))
    return adapted
