"""A forward pass of the same values whose gradients are those of a linear map: each gate counts as a constant.

    norm:       x * stopgrad(rsqrt(mean x^2 + eps)) * w        a LayerNorm's mean, which is linear, keeps its gradient
    attention:  stopgrad(softmax(q k^T)) v                     whatever was done to q and k, and to the scores
    MLP:        stopgrad(act(g)) * up    or    g * stopgrad(act(g) / g * up);    act(x) = x * stopgrad(act(x) / x)
    experts:    stopgrad(router) * expert(x)

Nothing is looked up by a model's name, and no module is exchanged: the rules are for functions of torch (a softmax, a
root, a product of two tensors that both depend on the input), which are watched while the model runs. Only modules of
transformers' activations are treated as a whole, because the formulas of some have such products inside.

What the rules do not know keeps its ordinary gradient. Whether the result is linear can be checked: of a map that is
linear in its input and in all that is added to it, products with both give the output back.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2CLS

from .additive import additive
from .groups import only_gradients_of

__all__ = ["Gating", "detached"]

#: Which of the two factors of a gated MLP counts as a constant.
Gating = Literal["gate", "up"]

_ACTIVATIONS: tuple[Any, ...] = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})


@contextlib.contextmanager
def detached(model: nn.Module, gating: Gating = "gate") -> Iterator[None]:
    """Let forward passes inside the block be linear in the input embeddings, to autograd, without changing values.

        y(E) = sum_t J_t e_t + c,    J_t = dy/de_t by autograd

    To the last bit the values of an ordinary pass, in eval mode, except in a float64 model: there transformers' norms
    round to float32, which no linear map does, and here they do not.

    Args:
        model: A transformers model; left as it was when the block ends. Gradients of what was computed may be taken
            after that, those for biases (`additive`) inside only.
        gating: Of act(gate) * up, "gate" holds act(gate) constant, "up" the rest: gate * stopgrad(act(gate) / gate *
            up). Both are exact, and they are different maps.

    Raises:
        ValueError: A product of two tensors that depend on the input, neither from an activation; the module is named.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> model = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=2,
        ...                                num_attention_heads=1)).eval()
        >>> e = model.embed_tokens(torch.tensor([[1, 2, 3]])).detach().requires_grad_()
        >>> with detached(model):
        ...     y = model(inputs_embeds=e).last_hidden_state[0, -1]
        >>> j = torch.stack([torch.autograd.grad(one, e, retain_graph=True)[0][0] for one in y])  # (d, T, d)
        >>> torch.allclose(torch.einsum("otd,td->o", j, e[0]), y, atol=1e-5)
        True
    """
    mode = _Detach(gating, {id(module): name for name, module in model.named_modules()})
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_gradients_of(model, additive(model)))
        for module in model.modules():
            if isinstance(module, _ACTIVATIONS):
                waiting: list[Tensor] = []
                stack.callback(module.register_forward_pre_hook(mode.before(waiting)).remove)
                stack.callback(module.register_forward_hook(mode.after(waiting)).remove)
        stack.enter_context(mode)
        yield


class _Attach(torch.autograd.Function):
    """The values of one tensor with the gradients of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        ctx.dtype = surrogate.dtype
        return value.clone()  # not a view, which a model could not change in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, gradient.to(ctx.dtype)


def _attach(value: Tensor, surrogate: Tensor) -> Tensor:
    result: Tensor = _Attach.apply(value, surrogate)
    return result


class _Detach(TorchFunctionMode):
    """Watches the functions of torch, and gives the gradients of a linear map to those that are none."""

    def __init__(self, gating: Gating, names: dict[int, str]) -> None:
        super().__init__()
        self.gating, self.names = gating, names
        self.gates: dict[int, Tensor] = {}  # outputs of activations; kept, so that no address is used again

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "").strip("_")
        if name not in _RULES or not torch.is_grad_enabled():  # rotary tables, say, are made without gradients
            return function(*args, **kwargs)
        if name not in _CASTS and not any(map(_depends, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        return _RULES[name](self, function, args, kwargs)

    def before(self, waiting: list[Tensor]) -> Callable[..., Any]:
        """A hook that hides from an activation that its input is recorded."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            waiting.append(args[0])
            return (args[0].detach(), *args[1:])

        return hook

    def after(self, waiting: list[Tensor]) -> Callable[..., Any]:
        """A hook that makes its output a multiple of its input."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = waiting.pop()
            return self.gate(x, output, module.forward) if _depends(x) and torch.is_grad_enabled() else output

        return hook

    def gate(self, x: Tensor, value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """act(x) as x * stopgrad(act(x) / x), elementwise; as a constant if act(0) is not 0, like a sigmoid's."""
        with torch.no_grad():
            zero = x == 0
            if bool(function(torch.zeros_like(x)).any()):
                return value
            ratio = value / torch.where(zero, 1, x)
            if bool(zero.any()):  # any finite ratio would do; this one is the mean of the slopes on both sides
                step = torch.full_like(x, torch.finfo(x.dtype).eps ** 0.5)
                ratio = torch.where(zero, (function(step) - function(-step)) / (2 * step), ratio)
        result = _attach(value, x * ratio)
        self.gates[id(result)] = result
        return result

    def where(self) -> str:
        """The innermost module of the model that is running."""
        frame = inspect.currentframe()
        while frame is not None:
            if (name := self.names.get(id(frame.f_locals.get("self")))) is not None:
                return name or "the model"
            frame = frame.f_back
        return "the model"


def _depends(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _stop(x: Any) -> Any:
    return x.detach() if _depends(x) else x


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _constant(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that gives no multiple of its input serves as a factor only."""
    return function(*map(_stop, args), **{key: _stop(value) for key, value in kwargs.items()})


def _activation(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, rest = args[0], args[1:]

    def act(at: Tensor) -> Tensor:
        result: Tensor = function(at.clone(), *rest, **kwargs)
        return result

    return mode.gate(x, act(x.detach()), act)


def _product(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args[:2]
    if not (_depends(a) and _depends(b)):
        return function(*args, **kwargs)
    if a is b:
        return _constant(mode, function, args, kwargs)  # a square, to measure a size
    gates = id(a) in mode.gates, id(b) in mode.gates
    if gates[0] == gates[1]:
        raise ValueError(
            f"{mode.where()} multiplies two tensors that depend on the input, and no activation says which one is the "
            "gate; the model has no locally linear form here"
        )
    first_stays = gates[1] == (mode.gating == "gate")
    return torch.mul(a, b.detach()) if first_stays else torch.mul(a.detach(), b)


def _quotient(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(args[0], _stop(args[1]), *args[2:], **kwargs)


def _scores(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Products of queries and keys; of weights and values, only the values depend on the input any more."""
    both = sum(map(_depends, args[-2:])) == 2
    return _constant(mode, function, args, kwargs) if both else function(*args, **kwargs)


def _attention(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = _named(args, kwargs, "query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    v, given = given["value"], {key: _stop(value) for key, value in given.items()}
    value = function(**given)
    if not _depends(v):
        return value
    # With the identity for values the weights come out, whatever mask, scale and grouping there is.
    identity = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device).expand(*v.shape[:-2], -1, -1)
    weights = function(**{**given, "value": identity})
    return _attach(value, weights @ v.repeat_interleave(weights.shape[-3] // v.shape[-3], dim=-3))


def _layer_norm(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = _named(args, kwargs, "input", "normalized_shape", "weight", "bias", "eps")
    x, axes = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
    x = x - x.mean(axes, keepdim=True)
    return _normalized(function, args, kwargs, x, x.detach().square().mean(axes, keepdim=True), given)


def _rms_norm(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = _named(args, kwargs, "input", "normalized_shape", "weight", "eps")
    x, axes = given["input"], tuple(range(-len(given["normalized_shape"]), 0))
    return _normalized(function, args, kwargs, x, x.detach().square().mean(axes, keepdim=True), given)


def _normalized(
    function: Callable[..., Any], args: Any, kwargs: Any, x: Tensor, size: Tensor, given: dict[str, Any]
) -> Tensor:
    eps = given.get("eps", 1e-5 if "bias" in given else None)
    surrogate = x * torch.rsqrt(size + (torch.finfo(x.dtype).eps if eps is None else eps))
    if given.get("weight") is not None:
        surrogate = surrogate * given["weight"]
    if given.get("bias") is not None:
        surrogate = surrogate + given["bias"]
    with torch.no_grad():
        value = function(*args, **kwargs)
    return _attach(value, surrogate)


def _grouped(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of the input by expert; linear, but the kernel has no second derivative, and none of it is in float64."""
    given = _named(args, kwargs, "input", "weight", "offs")
    x, weight, stops = given["input"], given["weight"], given["offs"].tolist()
    parts = [x[a:b] @ weight[i] for i, (a, b) in enumerate(zip([0, *stops], stops, strict=False))]
    product = torch.cat([*parts, x.new_zeros(len(x) - stops[-1], weight.shape[-1])])
    if x.dtype == torch.float64:
        return product
    with torch.no_grad():
        value = function(*args, **kwargs)
    return _attach(value, product)


def _cast(mode: _Detach, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do not round float64."""
    result = function(*args, **kwargs)
    narrowed = args[0].dtype == torch.float64 and result.is_floating_point() and result.dtype != torch.float64
    return args[0].to(result.device) if narrowed else result


_CASTS = {"to": _cast, "float": _cast}
_RULES: dict[str, Callable[..., Any]] = {
    **_CASTS,
    **dict.fromkeys(("softmax", "log_softmax", "sigmoid", "softplus", "exp", "rsqrt", "sqrt", "reciprocal"), _constant),
    **dict.fromkeys(("pow", "rpow", "square", "norm", "vector_norm", "var", "std", "rtruediv"), _constant),
    **dict.fromkeys(("silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "hardswish", "mish", "tanh"), _activation),
    **dict.fromkeys(("mul", "rmul", "imul", "multiply"), _product),
    **dict.fromkeys(("div", "truediv", "itruediv", "divide", "true_divide"), _quotient),
    **dict.fromkeys(("matmul", "rmatmul", "mm", "bmm", "einsum", "addmm", "baddbmm"), _scores),
    **dict.fromkeys(("grouped_mm", "grouped_mm_fallback"), _grouped),
    "scaled_dot_product_attention": _attention,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
}
