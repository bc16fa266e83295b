"""Networks that are a chain of modules: their parts in order, and what a multilayer perceptron is made of."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Activation", "Perceptron", "chain", "perceptron", "probe_activation"]

_STEP = 1e-5  # of the difference quotients at zero, in float64: errors of 1e-10
_KINK = 1e-3  # left and right slopes that differ by more are those of a kink
_SHAPING = (nn.Flatten, nn.Unflatten)


@dataclass(frozen=True)
class Activation:
    """What an elementwise function does near zero.

    Attributes:
        value: φ(0).
        gain: Mean of the slopes left and right of zero, so that φ(z) - φ(-z) ≈ 2 gain z.
        kink: Whether the two slopes differ, as those of ReLU do; there is no linear zone then.
        homogeneous: Whether φ(c z) = c φ(z) for c > 0.
    """

    value: float = 0.0
    gain: float = 1.0
    kink: bool = False
    homogeneous: bool = True


@dataclass(frozen=True)
class Perceptron:
    """Linear layers with elementwise functions between them.

    Attributes:
        names: Of the linear layers, in order.
        linears: The layers.
        activations: Between them, one fewer.
        shaping: What reshapes the inputs before the first.
    """

    names: list[str]
    linears: list[nn.Linear]
    activations: list[Activation]
    shaping: list[nn.Module]

    def rows(self, inputs: Tensor) -> Tensor:
        """Inputs as the first linear layer gets them."""
        for module in self.shaping:
            inputs = module(inputs)
        return inputs


def chain(network: nn.Module) -> dict[str, nn.Module]:
    """The modules of nested `nn.Sequential`s in the order in which they run, by name.

    Args:
        network: An `nn.Sequential`, of others too.

    Raises:
        ValueError: It is none, or one with a forward of its own.

    Example:
        >>> list(chain(nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), nn.Linear(3, 1))))
        ['0.0', '0.1', '1']
    """
    if not _is_chain(network):
        raise ValueError(f"{type(network).__name__} is no plain nn.Sequential, so its order is not known; give one")
    found: dict[str, nn.Module] = {}
    for name, child in network._modules.items():  # named_children leaves out a module that is used twice
        assert child is not None
        inside = chain(child) if _is_chain(child) else {"": child}
        found |= {f"{name}.{inner}".rstrip("."): module for inner, module in inside.items()}
    return found


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def perceptron(network: nn.Module) -> Perceptron:
    """Linear layers and activations of a chain; dropout and identities count as absent.

    Args:
        network: An `nn.Sequential` of at least two `nn.Linear`, with elementwise functions between them.

    Raises:
        ValueError: Something else is in it; the message names it.

    Example:
        >>> found = perceptron(nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)))
        >>> found.names, found.activations[0].value, round(found.activations[0].gain, 6)
        (['0', '2'], 0.5, 0.25)
    """
    names: list[str] = []
    linears: list[nn.Linear] = []
    between: list[list[tuple[str, nn.Module]]] = [[]]
    for name, module in chain(network).items():
        if isinstance(module, nn.Linear):
            if "weight" not in module._parameters or module.weight.is_meta or not module.weight.is_floating_point():
                raise ValueError(f"layer {name!r} has no plain weight of its own; initialise before it is changed")
            if any(module.weight is other.weight for other in linears):
                raise ValueError(f"layer {name!r} shares its weight with another; give each its own")
            names.append(name)
            linears.append(module)
            between.append([])
        elif not isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd):
            between[-1].append((name, module))
    if len(linears) < 2:
        raise ValueError(f"a network with a hidden layer has at least two nn.Linear, this one has {len(linears)}")
    for name, module in between[0]:
        if not isinstance(module, _SHAPING):
            raise ValueError(f"{name!r} ({type(module).__name__}) comes before the first Linear; give what follows it")
    for name, module in between[-1]:
        raise ValueError(f"{name!r} ({type(module).__name__}) comes after the last Linear; give what precedes it")
    activations = [
        probe_activation(one, linear.out_features) for one, linear in zip(between[1:-1], linears, strict=False)
    ]
    return Perceptron(names, linears, activations, [module for _, module in between[0]])


def probe_activation(modules: Sequence[tuple[str, nn.Module]], width: int) -> Activation:
    """Value and slopes at zero of modules that act on each entry alone and alike, found by calling copies of them.

    Args:
        modules: By name, one after the other; none is the identity.
        width: Of the layer.

    Raises:
        ValueError: They mix entries, keep statistics, or are flat at zero.

    Example:
        >>> probe_activation([("1", nn.ReLU())], 4)
        Activation(value=0.0, gain=0.5, kink=True, homogeneous=True)
    """
    if not modules:
        return Activation()
    name = ", ".join(f"{name!r} ({type(module).__name__})" for name, module in modules)
    if any(True for _, module in modules for _ in module.buffers()):
        raise ValueError(f"{name} keeps statistics; only elementwise functions may stand between the linear layers")
    copies = [copy.deepcopy(module).double().cpu().eval() for _, module in modules]
    grid = torch.tensor([0.0, _STEP, -_STEP, 1.0, -1.0, 1e4, -1e4], dtype=torch.float64)
    shifted = (torch.arange(len(grid))[:, None] + torch.arange(width)) % len(grid)
    try:
        with torch.no_grad():
            alike, mixed = grid[:, None].repeat(1, width), grid[shifted]
            for module in copies:
                alike, mixed = module(alike), module(mixed)
            values = alike[:, 0]
            elementwise = alike.shape == mixed.shape == shifted.shape and torch.allclose(mixed, values[shifted])
    except (RuntimeError, ValueError, IndexError):
        elementwise = False
    if not elementwise:
        raise ValueError(f"{name} is not one function of each entry; only those may stand between the linear layers")
    zero, right, left, *far = values.tolist()
    slopes = (right - zero) / _STEP, (zero - left) / _STEP
    gain = sum(slopes) / 2
    if abs(gain) < _KINK:
        raise ValueError(f"{name} is flat or even at zero, so no linear map goes through it; choose another activation")
    # Up to 1e4, so that functions that level off, such as ReLU6, do not count.
    homogeneous = zero == 0 and all(abs(far[i + 2] - 1e4 * far[i]) <= 1e-6 * abs(far[i + 2]) for i in (0, 1))
    return Activation(zero, gain, abs(slopes[0] - slopes[1]) > _KINK, homogeneous)
