"""Tiny checkpoints with a tokenizer that speaks, so that commands run end to end without a download."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import tiny_models
from eckart.models import read_text, save

VOCABULARY = 400
CONTEXT = 256
CHAT_TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }} {% endfor %}<assistant>"


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer trained on the Python documentation."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([read_text(None)[:100_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def model(**options: Any) -> PreTrainedModel:
    """Return a tiny random Llama that fits the tokenizer; the same on every call."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlamaForCausalLM(LlamaConfig(**settings | options))
    return made.eval()


def write(path: Path, made: PreTrainedModel | None = None, *, with_tokenizer: bool = True) -> Path:
    """Write a checkpoint, of the tiny Llama by default."""
    spoken = tokenizer() if with_tokenizer else None
    return save(model() if made is None else made, path, spoken)


def without_linears(path: Path) -> Path:
    """Write a checkpoint of a model that has convolutions alone."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    return save(transformers.ResNetModel(config), path)


def family(name: str, **options: Any) -> PreTrainedModel:
    """Return a tiny model of another family, with some of its options changed."""
    config = tiny_models.FAMILIES[name]().config
    for key, value in options.items():
        setattr(config, key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: PreTrainedModel = type(tiny_models.FAMILIES[name]())(config)
    return made.eval()


def write_sums(path: Path) -> Path:
    """Write a few questions with answers, and return where."""
    path.write_text("\n".join(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) for i in range(12)))
    return path
