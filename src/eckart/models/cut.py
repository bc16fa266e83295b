"""A network as two functions, f = tail ∘ head: split at a module, and run again with the same random masks.

A chain is split into its parts. Any other model is run whole, with the output of the module replaced: what goes around
the module (a skip connection) then stays as it is, and f is no composition of the two. The hidden state between two
blocks of a transformer has everything in it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .chain import chain

__all__ = ["Cut", "Pass", "RandomState", "cut_at", "recorded"]

Function = Callable[[Tensor], Tensor]


class _Reached(Exception):
    """Ends a forward pass at the cut."""


class RandomState:
    """The random state of torch now, on the CPU and on one device, to draw the same again from."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """What is drawn inside is what was drawn after this state; the state outside does not move."""
        with torch.random.fork_rng(devices=[] if self.cuda is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


class Pass(NamedTuple):
    """One evaluation of tail(head(x)): z, y, and the random states before head and tail."""

    z: Tensor
    y: Tensor
    before_head: RandomState
    before_tail: RandomState


@dataclass(frozen=True)
class Cut:
    """Two functions of one tensor each, rows (the first axis) apart.

    Attributes:
        head: x ↦ z.
        tail: z ↦ y.
        done: The pass that there has been already, if so.

    Raises:
        ValueError: One of the two is a module with batch statistics in training mode.
    """

    head: Function
    tail: Function
    done: Pass | None = None

    def __post_init__(self) -> None:
        for part in (self.head, self.tail):
            if isinstance(part, nn.Module):
                check_rows_apart(part)

    def run(self, x: Tensor) -> Pass:
        """z = head(x) and y = tail(z)."""
        if self.done is not None:
            return self.done
        before_head = RandomState(x.device)
        z = self.head(x)
        before_tail = RandomState(x.device)
        return Pass(z, self.tail(z), before_head, before_tail)


def check_rows_apart(network: nn.Module) -> None:
    """Refuse modules in which the rows of a batch see each other.

    Raises:
        ValueError: Batch normalisation in training mode, with its name.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"{name or type(module).__name__!r} normalises over the batch, and would see other statistics in each "
                "evaluation; put it in eval mode or use another norm"
            )


def cut_at(
    network: nn.Module, name: str, inputs: Tensor | Mapping[str, Any], source: str | None = None
) -> tuple[Cut, Tensor]:
    """Splits a network after one of its modules.

    Args:
        network: An `nn.Sequential`, or any model.
        name: Of the module of which the output is z, as in ``network.named_modules()``; not a normalisation.
        inputs: What the network is called with.
        source: Name of the module of which the output is x; None for ``inputs`` itself if that is a tensor, else for
            the input embeddings.

    Returns:
        The two functions and x.

    Raises:
        ValueError: No such module, or one that is not run just once, that is a normalisation, or of which the output is
            no tensor; batch normalisation in training mode.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))
        >>> cut, x = cut_at(network, "0", torch.ones(2, 4))
        >>> bool((cut.tail(cut.head(x)) == network(x)).all())
        True
    """
    place = _module(network, name)
    if any(word in type(place).__name__ for word in ("Norm", "norm")):
        raise ValueError(f"{name!r} is a normalisation, which hides the scale of what comes in; cut elsewhere")
    check_rows_apart(network)
    if isinstance(inputs, Tensor) and source is None and _is_chain(network):
        parts = chain(network)
        (end,) = [i for i, part in enumerate(parts) if part == name or part.startswith(f"{name}.")][-1:]
        modules = list(parts.values())
        return Cut(_composed(modules[: end + 1]), _composed(modules[end + 1 :])), inputs
    return _cut_by_hooks(network, place, name, inputs, source)


def _is_chain(network: nn.Module) -> bool:
    try:
        return bool(chain(network))
    except ValueError:
        return False


def _composed(modules: list[nn.Module]) -> Function:
    def run(x: Tensor) -> Tensor:
        for module in modules:
            x = module(x)
        return x

    return run


def _module(network: nn.Module, name: str) -> nn.Module:
    try:
        if name:
            return network.get_submodule(name)
    except AttributeError:
        pass
    raise ValueError(f"{type(network).__name__} has no module {name!r}; see its named_modules()")


def _source(network: nn.Module, inputs: Any, source: str | None) -> nn.Module | None:
    if source is not None:
        return _module(network, source)
    if isinstance(inputs, Tensor):
        return None
    getter: Any = getattr(network, "get_input_embeddings", None)
    found = getter() if callable(getter) else None
    if not isinstance(found, nn.Module):
        raise ValueError(f"{type(network).__name__} has no input embeddings; name the module of which the output is x")
    return found


def _cut_by_hooks(
    network: nn.Module, place: nn.Module, name: str, inputs: Tensor | Mapping[str, Any], source: str | None
) -> tuple[Cut, Tensor]:
    origin = _source(network, inputs, source)
    accepted = inspect.signature(network.forward).parameters

    def call(x: Tensor | None = None) -> Any:
        if isinstance(inputs, Tensor):
            return network(inputs if x is None else x)
        given = {key: value for key, value in inputs.items() if key != "labels"}  # no loss is asked for
        return network(**given, **({"use_cache": False} if "use_cache" in accepted else {}))

    def until(module: nn.Module, x: Tensor | None) -> Tensor:
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: Any, output: Any) -> None:
            seen.append(_first(output, name))
            raise _Reached

        with contextlib.ExitStack() as hooks:
            if x is not None and origin is not None:
                hooks.enter_context(_replaced(origin, x))
            hooks.callback(module.register_forward_hook(stop).remove)
            with contextlib.suppress(_Reached):
                call(x if origin is None else None)
        if not seen:
            raise ValueError(f"{name!r} is not run in a forward pass; cut at a module that is")
        return seen[0]

    def tail(z: Tensor) -> Tensor:
        with _replaced(place, z) as times:
            y = output_tensor(call())
        if len(times) != 1:
            raise ValueError(f"{name!r} is run {len(times)} times in a forward pass; cut at a module that is run once")
        return y

    x = inputs if origin is None and isinstance(inputs, Tensor) else until(origin or place, None)
    return Cut(lambda value: until(place, value), tail), x


@contextlib.contextmanager
def _replaced(module: nn.Module, value: Tensor) -> Iterator[list[None]]:
    """The module's output, or the first of several, is ``value``; gives a list with one entry a call."""
    times: list[None] = []

    def replace(_: nn.Module, args: Any, output: Any) -> Any:
        times.append(None)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = module.register_forward_hook(replace)
    try:
        yield times
    finally:
        handle.remove()


def _first(output: Any, name: str) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise ValueError(f"the output of {name!r} is no tensor of real numbers; cut at a module of which it is")
    return first


def output_tensor(output: Any) -> Tensor:
    """Logits, or last hidden state, or first tensor of what a model returns."""
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    return _first(tuple(output.values()) if isinstance(output, Mapping) else output, "the model")


@contextlib.contextmanager
def recorded(
    network: nn.Module, name: str, inputs: Mapping[str, Any], source: str | None = None
) -> Iterator[Callable[[Any], tuple[Cut, Tensor]]]:
    """Like `cut_at`, for a pass that is made anyway: run the model once inside, and hand over what it returned.

    Args:
        network: Any model.
        name: Of the module of which the output is z.
        inputs: What the network is called with, by name.
        source: Name of the module of which the output is x; None for the input embeddings.

    Returns:
        A function of the model's output that gives the cut, with its pass done, and x.

    Raises:
        ValueError: As `cut_at`.
    """
    place, origin = _module(network, name), _source(network, inputs, source)
    assert origin is not None
    check_rows_apart(network)
    before = RandomState(next(network.parameters()).device)
    seen: dict[nn.Module, list[Tensor]] = {origin: [], place: []}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen[module].append(_first(output, name))

    handles = [module.register_forward_hook(keep) for module in seen]

    def finish(output: Any) -> tuple[Cut, Tensor]:
        if (times := len(seen[place])) != 1 or not seen[origin]:
            raise ValueError(f"{name!r} is run {times} times in a forward pass; cut at a module that is run once")
        cut, _ = _cut_by_hooks(network, place, name, inputs, source)
        done = Pass(seen[place][0], output_tensor(output), before, before)
        return Cut(cut.head, cut.tail, done), seen[origin][0]

    try:
        yield finish
    finally:
        for handle in handles:
            handle.remove()
