"""EMLoC's three stages as functions: make an emulator, put a LoRA on it, correct the LoRA for the full model.

    emulator = make_emulator(model, data)                       # the model itself stays as it is
    tuned = get_peft_model(emulator, lora_config(emulator))     # then any training loop or Trainer
    correct_lora(tuned, model, out="adapter")                   # PeftModel.from_pretrained(model, "adapter")

The emulator and the full model may be directories too: the correction then reads one weight at a time, so that a model
which is never in memory can be tuned through its emulator. Paper and mathematics: `eckart.compression.emloc`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..linalg.rank import Form
from ..models.adapted import under_adapters
from ..models.adapter_files import check_base
from ..models.checkpoint import load, resolve
from ..models.files import atomic_directory, check_target
from ..models.select import LinearRef, Where, linears
from ..models.stored import LayoutError, StoredRef, stored_linears
from ..structures import Structure
from .compress import compress
from .emloc import Corrected, check_limit, correct_factors, orthonormal_factors
from .lora_state import check_plain, of_model, read, scale_of, sites_of, write

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = ["Correction", "correct_lora", "lora_config", "make_emulator"]


@dataclass(frozen=True)
class Correction:
    """What `correct_lora` wrote.

    Attributes:
        path: The directory.
        layers: Layer by name -> its corrected factors' ratios and how many directions met the limit.
        unchanged: Layers that are the same in the emulator and the full model.
    """

    path: Path
    layers: dict[str, Corrected]
    unchanged: list[str]


def make_emulator(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    ratio: float = 0.6,
    form: Form = "plain",
    where: Where | None = None,
    **settings: Any,
) -> nn.Module:
    """A compressed copy of a model to tune in its place.

    Args:
        model: the full model; not changed.
        data: calibration batches of the task that is to be tuned, the paper takes 64 samples.
        ratio: fraction of the selected weights' parameters REMOVED: 0.6, for the paper keeps 0.4.
        form: "plain" as published, or "pivoted" for a larger rank in as many numbers.
        where: which linears, default all of the repeated blocks.
        settings: further arguments of `eckart.compress`, such as ``tokenizer`` or ``progress``.

    Returns:
        The emulator. For a model too large to be copied, `eckart.compression.compress_checkpoint` with "emloc" makes
        one on disk.

    Raises:
        ValueError: as `eckart.compress`; nothing is changed.
    """
    emulator = copy.deepcopy(model)
    # A LoRA names the base that it was trained on, and that must not be the full model.
    if hasattr(getattr(emulator, "config", None), "_name_or_path"):
        named: Any = emulator
        named.name_or_path = named.config._name_or_path = ""
    compress(emulator, "emloc", ratio=ratio, data=data, where=where, form=form, **settings)
    return emulator


def lora_config(emulator: nn.Module, rank: int = 8, alpha: float | None = None, **settings: Any) -> LoraConfig:
    """PEFT's LoRA for a model with structures, to be given to `peft.get_peft_model` or `PeftModel.from_pretrained`.

    PEFT knows only torch's linear layers; this tells it that a structure is one. What is then saved is a plain LoRA.

    Args:
        emulator: the model.
        rank: r, 8 in the paper.
        alpha: c r; None for r.
        settings: further fields of `peft.LoraConfig`; ``target_modules`` is by default all structures.

    Raises:
        ValueError: the model has no structures and ``target_modules`` is not given.
    """
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    structures = {name: type(m) for name, m in emulator.named_modules() if isinstance(m, Structure)}
    if not structures and "target_modules" not in settings:
        raise ValueError("the model has no compressed layers; make_emulator(model, data) first, or name target_modules")
    alpha = rank if alpha is None else alpha
    settings = {"target_modules": list(structures), "lora_alpha": alpha} | settings
    config = LoraConfig(r=rank, **settings)
    config._register_custom_module(dict.fromkeys(set(structures.values()), Linear))
    return config


def correct_lora(
    adapter: PeftModel | str | os.PathLike[str],
    full: nn.Module | str | os.PathLike[str],
    emulator: nn.Module | str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str],
    limit: float = 3.0,
    adapter_name: str = "default",
    force: bool = False,
) -> Correction:
    """Write a LoRA that was trained on an emulator as one for the full model.

    Args:
        adapter: the tuned PEFT model, or the directory of its LoRA.
        full: the full model, or its directory.
        emulator: the emulator, or its directory; default the base of the PEFT model, or the one that the LoRA names.
        out: directory to write, whole or not at all; never that of ``adapter``.
        limit: largest correction relative to the LoRA, for each of its directions; 3. 0 for none, inf for no limit.
        adapter_name: which adapter of a PEFT model.
        force: whether ``out`` may be replaced.

    Returns:
        How large the corrections are.

    Raises:
        ValueError: the adapter is no plain LoRA, was corrected already, or does not fit the models, or the emulator is
            the full model.
        FileNotFoundError: a directory or its weights are missing.
        FileExistsError: ``out`` exists and ``force`` is not given.
    """
    check_limit(limit)
    target = check_target(out, force=force)
    if isinstance(adapter, (str, os.PathLike)):
        if target == Path(adapter).expanduser().resolve():
            raise ValueError("out is the adapter itself, which would be lost; give another directory")
        config, state = read(Path(adapter))
        emulator = config.base_model_name_or_path or None if emulator is None else emulator
        if emulator is None:
            raise ValueError(f"the adapter in {adapter} does not name its base; give emulator=")
        if isinstance(emulator, (str, os.PathLike)):
            check_base(adapter, emulator)
    else:
        config, state = of_model(adapter, adapter_name)
        emulator = adapter if emulator is None else emulator
    check_plain(config)
    sites = sites_of(state)
    weights, substitutes = (_linears(model, set(sites)) for model in (full, emulator))
    for name in sites:
        for known, title in ((weights, "full model"), (substitutes, "emulator")):
            if name not in known:
                raise ValueError(f"the LoRA sits on {name}, which the {title} does not have; give the right models")
    layers: dict[str, Corrected] = {}
    unchanged: list[str] = []
    for name, prefix in sites.items():
        a, b = state[f"{prefix}.lora_A.weight"], state[f"{prefix}.lora_B.weight"]
        if {weights[name].shape, substitutes[name].shape} != {(b.shape[0], a.shape[1])}:
            raise ValueError(f"{name}: the LoRA, the full model and the emulator have different shapes")
        right, left = orthonormal_factors(a.cpu(), b.cpu())
        lost = _images(weights[name], right) - _images(substitutes[name], right)
        if not bool(lost.any()):
            unchanged.append(name)
            continue
        found = correct_factors(right, left, lost, scale=scale_of(config, name), limit=limit)
        if not bool(torch.isfinite(found.b).all()):
            raise ValueError(f"{name}: the LoRA or a weight holds NaN or Inf; nothing was written")
        layers[name] = found
        wanted = torch.promote_types(a.dtype, torch.float32)
        missing = len(a) - len(found.a)  # more ranks than inputs: the rest of the LoRA is zero
        state[f"{prefix}.lora_A.weight"] = nn.functional.pad(found.a, (0, 0, 0, missing)).to(wanted)
        state[f"{prefix}.lora_B.weight"] = nn.functional.pad(found.b, (0, missing)).to(wanted)
    if not layers:
        raise ValueError("the emulator has the same weights as the full model, so there is nothing to correct")
    with atomic_directory(target, force=force) as directory:
        write(directory, config, state, full, limit)
    return Correction(target, layers, unchanged)


def _linears(model: Any, names: set[str]) -> dict[str, LinearRef]:
    """The linears of a model, or of a checkpoint on disk without loading it where that can be done."""

    def wanted(name: str, _: nn.Module) -> bool:
        return name in names

    try:
        if isinstance(model, nn.Module):
            return {ref.name: ref for ref in linears(under_adapters(model), wanted).linears}
        path = resolve(model)
        try:
            found = stored_linears(path, wanted)
        except (LayoutError, FileNotFoundError):
            found = linears(load(path)[0], wanted)
    except ValueError as error:
        raise ValueError(f"the LoRA does not fit the model: {error}") from error
    return {ref.name: ref for ref in found.linears}


def _images(ref: LinearRef, rows: Tensor) -> Tensor:
    """W x of each row x (r, n), bias aside, as the columns of (m, r), float64; a structure is not multiplied out."""
    if not isinstance(ref.module, Structure):
        return ref.weight.detach().double().cpu() @ rows.mT
    module = copy.deepcopy(ref.module)
    if isinstance(ref, StoredRef):
        module.load_state_dict({name: ref.reader.read(key) for name, key in ref.keys.items()}, assign=True)
    module.bias = None
    with torch.no_grad():
        module.to(device="cpu", dtype=torch.float64)
        images: Tensor = module(rows)
    return images.mT
