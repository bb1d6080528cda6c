"""Weights and configs of Hugging Face's GPT-Neo, in and out, by one table of names.

Enters: a directory (or hub id) with config.json and safetensors, or a state dict in memory.
Leaves: our `ModelConfig` and our tree of parameters, placed on their devices; and the same
way back. configs.py and names.py say what is what, reading.py and writing.py move it.
"""

from neo_jax.hf.adapters import adapter_base, is_adapter, read_adapter, write_adapter
from neo_jax.hf.configs import (
    HEADS,
    TEXT_HEAD,
    Head,
    config_from_hf,
    config_to_hf,
    eos_id,
    head_from_hf,
    read_json,
)
from neo_jax.hf.heads import head_logits, last_token
from neo_jax.hf.names import abstract_params, from_hf, name_table, to_hf, with_head
from neo_jax.hf.reading import Pretrained, read, resolve
from neo_jax.hf.writing import copy_tokenizer, push_to_hub, write, write_tokenizer

__all__ = [
    "HEADS",
    "TEXT_HEAD",
    "Head",
    "Pretrained",
    "abstract_params",
    "adapter_base",
    "config_from_hf",
    "config_to_hf",
    "copy_tokenizer",
    "eos_id",
    "from_hf",
    "head_from_hf",
    "head_logits",
    "is_adapter",
    "last_token",
    "name_table",
    "push_to_hub",
    "read",
    "read_adapter",
    "read_json",
    "resolve",
    "to_hf",
    "with_head",
    "write",
    "write_adapter",
    "write_tokenizer",
]
