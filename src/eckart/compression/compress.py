"""The verb: compress a model in place under a budget, and check that it did what it promised."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, cast, get_args

import torch
from torch import nn

from .. import catalog
from ..linalg.rank import Form
from ..models.calibrate import Statistics
from ..models.evaluate import model_bytes, num_parameters, peak_memory
from ..models.groups import evaluating
from ..models.quantizer import mark
from ..models.result import Result
from ..models.select import Where
from ..options import make
from ..structures import EckartWarning
from .budget import Budget
from .checks import check_promises, check_untouched, describe
from .contract import LayerMethod, ModelMethod
from .policies import Policy
from .request import AnyMethod, Request, Streaming
from .runner import Walk
from .work import policy_of, prepare

__all__ = ["compress", "make_method", "name_of"]


def compress(
    model: nn.Module,
    method: str | AnyMethod = "pifa",
    *,
    ratio: float | None = None,
    rank: int | None = None,
    bytes: float | None = None,
    energy: float | None = None,
    data: Iterable[Any] | None = None,
    tokenizer: Any = None,
    statistics: Mapping[str, Statistics] | None = None,
    where: Where | None = None,
    allocation: Policy | None = None,
    evaluations: int = 16,
    form: Form = "pivoted",
    progress: bool = True,
    streaming: Streaming | None = None,
    **options: Any,
) -> Result:
    """Replace the selected weights of a model by low-rank factors, in place.

        W (m, n)  ->  up (m, k) @ down (k, n), or pivoted: k rows of it and an (m - k, k) combination

    Args:
        model: a transformers model, on any device, in any floating-point type.
        method: a catalog name (`eckart methods --family compression`), or a method with its options.
        ratio: budget: fraction of the selected weights' parameters to remove; 0.2 if no budget is given.
        rank: budget: the same rank for every matrix.
        bytes: budget: size of the whole model afterwards.
        energy: budget: share of each matrix's squared singular values, in the method's measure, to keep.
        data: calibration batches, dictionaries of tensors or tensors of token ids; the Python documentation
            through ``tokenizer`` if None. Not used by methods without needs.
        tokenizer: for the default calibration text only.
        statistics: what `eckart.calibrate` gathered on the dense model, to compress it several times with one
            calibration; not enough for methods that look at the compressed model too.
        where: which linears, as in `eckart.models.linears`; default all inside the repeated blocks.
        allocation: how one ratio is shared: "uniform", "threshold", "svd-llm-v2", "welore", "fisher",
            "block-influence", "lorap", "search"; default the method's own.
        evaluations: compressions that allocation="search" tries before the real one, 16: three ways to start, and
            most of a round over the kinds of matrix.
        form: "pivoted" (fewer numbers at the same rank, lossless) or "plain" (two factors).
        progress: show bars with the time left.
        streaming: for models that do not fit, where the weights are and who factorises (`eckart.compression.stream`).
        options: the method's own options, when it is given by name.

    Returns:
        What was done; ``result.model`` is the model. Layers left dense or alone are listed.

    Raises:
        UnknownMethodError: with the nearest names.
        ValueError: a bad option or budget, no data, no linears, NaN or Inf in a weight (named by layer), or
            a model that is compressed already. The model is unchanged.
        LinalgError: a factorisation failed, named by layer; the layers before it are compressed already, so
            load the model again. After Ctrl-C too: what is left is sound, and its history says "interrupted".

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> data = [{"input_ids": torch.arange(24).reshape(2, 12)}]
        >>> result = compress(LlamaForCausalLM(config), "svd-llm", ratio=0.3, data=data, progress=False)
        >>> bool(0.3 <= result.ratio < 0.4), len(result.layers)
        (True, 14)
    """
    start = time.perf_counter()
    chosen = make_method(method, options)
    budget = Budget.of(ratio=ratio, rank=rank, bytes=bytes, energy=energy)
    policy = policy_of(chosen, allocation)
    for value, allowed, name in ((policy, Policy, "allocation"), (form, Form, "form")):
        if value not in get_args(allowed):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, not {value!r}")
    if evaluations < 1:
        raise ValueError(f"evaluations must be at least 1, not {evaluations}")
    check_untouched(model)
    name = name_of(chosen)
    request = Request(
        name,
        chosen,
        budget,
        policy,
        evaluations,
        form,
        where,
        data,
        tokenizer,
        dict(statistics or {}),
        streaming,
        progress,
    )
    parameters, size = num_parameters(model), model_bytes(model)
    with torch.inference_mode(False):  # the parts of a model are found by gradients
        work = prepare(model, request)
    settings: dict[str, Any] = {
        # This goes into config.json, so an option that JSON does not know is put in words.
        "options": json.loads(json.dumps(asdict(chosen), default=repr)),
        "budget": {budget.unit: budget.value},
        "allocation": policy,
        "form": form,
        "where": _in_words(where),
        **work.notes,
    }
    entry = {"verb": "compress", "method": name, **settings}
    if streaming is not None:
        assert isinstance(work, Walk)  # no other scope can be streamed
        names = [ref.name for ref in work.plan.members]
        streaming.finished.begin({"method": name, **settings}, names, work.batches, work.given)
    try:
        # Factors made in inference mode could never be trained.
        with (
            warnings.catch_warnings(record=True) as caught,
            evaluating(model),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            warnings.simplefilter("always", EckartWarning)
            work.run()
    except BaseException:
        # What was replaced by then is sound, and whoever saves it must get what is needed to load it.
        _record(model, {**entry, "interrupted": True})
        raise
    own = []
    for warning in caught:
        if isinstance(chosen, LayerMethod) and issubclass(warning.category, EckartWarning):
            continue  # what single layers have to say is said below, with their names
        if issubclass(warning.category, EckartWarning):
            own.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    layers = list(work.layers.values())
    result = Result(
        verb="compress",
        method=name,
        settings=settings,
        parameters=(parameters, num_parameters(work.model)),
        selected_parameters=(work.selected, sum(layer.parameters for layer in layers)),
        bytes=(size, model_bytes(work.model)),
        layers=layers,
        error_of="output" if chosen_gathers(chosen) & {"gram", "compressed_gram"} else "weight",
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(),
        warnings=[*dict.fromkeys(own), *work.messages()],
        skipped=[describe(entry) for entry in work.skipped],
        model=work.model,
    )
    check_promises(result, biases=work.biases, whole=isinstance(chosen, ModelMethod))
    _record(work.model, {**entry, "ratio": result.ratio})
    for message in result.warnings:
        warnings.warn(message, EckartWarning, stacklevel=2)
    return result


def make_method(method: str | AnyMethod, options: dict[str, Any]) -> AnyMethod:
    """A method with its options, from its catalog name or as it is.

    Raises:
        UnknownMethodError: with the nearest names.
        ValueError: an option that the method does not have (with those it has), or a method of another family.
    """
    if not isinstance(method, str):
        if options:
            raise ValueError(f"{type(method).__name__} has its options already; put {sorted(options)} there")
        return method
    row = catalog.get(method)
    if row.family != "compression" or row.target is None:
        known = ", ".join(r.name for r in catalog.select(family="compression") if r.target)
        raise ValueError(f"{method} ({row.family}, {row.status}) cannot compress a model; methods that can: {known}")
    made: AnyMethod = make(row, options)
    return made


def name_of(method: AnyMethod) -> str:
    """What the catalog calls a method, or where its class is."""
    return catalog.name_of(type(method)) or f"{type(method).__module__}:{type(method).__name__}"


def chosen_gathers(method: AnyMethod) -> frozenset[str]:
    """The statistics that a method asks for, whatever its scope."""
    found: frozenset[str] = getattr(method, "gathers", getattr(method, "needs", frozenset()))
    return found


def _record(model: nn.Module, entry: dict[str, Any]) -> None:
    """Write into the model's configuration what its structures are and how they came about."""
    if hasattr(model, "config"):
        mark(cast(Any, model), history=[entry])


def _in_words(where: Where | None) -> Any:
    """``where`` as JSON: functions by their name, which says more than their address."""
    if where is None or isinstance(where, str):
        return where
    return getattr(where, "__qualname__", repr(where)) if callable(where) else [_in_words(item) for item in where]
