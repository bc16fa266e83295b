"""Everything that knows Hugging Face: load and save, which layers, what they share, and how to exchange one."""

from __future__ import annotations

from .adapter_files import save_with_adapter
from .batches import as_batches, read_text, text_batches
from .calibrate import Statistics, calibrate, collect, members_of
from .checkpoint import load, load_tokenizer, resolve, save
from .demo import cache_directory, demo_path
from .evaluate import Perplexity, model_bytes, num_parameters, peak_memory, perplexity
from .export import export_dense
from .files import CheckpointError, atomic_directory, check_target
from .groups import evaluating, input_groups
from .quantizer import EckartConfig, EckartQuantizer, mark, specs
from .replace import replace
from .result import LayerResult, Result
from .select import LinearRef, Selection, Skipped, Where, linears
from .timing import time_per_token
from .topology import Block, InputTracker, block_of, blocks, example_inputs, same_input

__all__ = [
    "Block",
    "CheckpointError",
    "EckartConfig",
    "EckartQuantizer",
    "InputTracker",
    "LayerResult",
    "LinearRef",
    "Perplexity",
    "Result",
    "Selection",
    "Skipped",
    "Statistics",
    "Where",
    "as_batches",
    "atomic_directory",
    "block_of",
    "blocks",
    "cache_directory",
    "calibrate",
    "check_target",
    "collect",
    "demo_path",
    "evaluating",
    "example_inputs",
    "export_dense",
    "input_groups",
    "linears",
    "load",
    "load_tokenizer",
    "mark",
    "members_of",
    "model_bytes",
    "num_parameters",
    "peak_memory",
    "perplexity",
    "read_text",
    "replace",
    "resolve",
    "same_input",
    "save",
    "save_with_adapter",
    "specs",
    "text_batches",
    "time_per_token",
]
