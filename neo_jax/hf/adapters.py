"""Low-rank adapters in the format of Hugging Face's peft, both ways.

Enters: adapters that training learned. Leaves: a directory with adapter_config.json and
adapter_model.safetensors, which `peft.PeftModel.from_pretrained` puts onto transformers'
model; and the other way round.

Source: Hugging Face peft, utils/save_and_load.py and tuners/lora/config.py.

Shapes: I and O all input and output dimensions of a kernel as one, R rank.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx, traverse_util

from neo_jax.config import ConfigError, ModelConfig
from neo_jax.hf.configs import read_json
from neo_jax.hf.names import to_host
from neo_jax.state import Params, model_graph

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Our Linear: the module that holds it, and transformers' name.
_MODULES = {
    "query": ("attention", "attn.attention.q_proj"),
    "key": ("attention", "attn.attention.k_proj"),
    "value": ("attention", "attn.attention.v_proj"),
    "out": ("attention", "attn.attention.out_proj"),
    "up": ("mlp", "mlp.c_fc"),
    "down": ("mlp", "mlp.c_proj"),
}
_CLASSIFIER = "base_model.model.score.weight"


def is_adapter(source: str | os.PathLike[str]) -> bool:
    """Whether a directory holds an adapter and not a model."""
    return (pathlib.Path(source) / CONFIG_FILE).is_file()


def write_adapter(
    learned: Params, config: ModelConfig, base: str, directory: pathlib.Path
) -> pathlib.Path:
    """Writes what training learned beside a frozen model.

    Args:
      learned: the adapters, and the classifier if the model has one.
      config: of the model with its adapters.
      base: directory or hub id of the model that they belong to.
      directory: to write.

    Raises:
      ValueError: the directory holds an adapter already, or there is nothing to write.
    """
    if is_adapter(directory):
        raise ValueError(f"{directory} holds an adapter already; give another directory.")
    if not config.lora_rank:
        raise ValueError("the model has no adapters; write it as a whole.")
    tensors: dict[str, np.ndarray] = {}
    for name in config.lora_targets:
        module, theirs = _MODULES[name]
        adapter = learned["blocks"][module][name]["adapter"]
        for part, letter in (("a", "A"), ("b", "B")):
            for layer, array in enumerate(to_host(adapter[part])):
                flat = array.reshape(
                    (-1, config.lora_rank) if part == "a" else (config.lora_rank, -1)
                )
                key = f"base_model.model.transformer.h.{layer}.{theirs}.lora_{letter}.weight"
                tensors[key] = np.ascontiguousarray(flat.T)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": [
            _MODULES[name][1].rsplit(".", 1)[1] for name in config.lora_targets
        ],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if "classifier" in learned:
        tensors[_CLASSIFIER] = np.ascontiguousarray(to_host(learned["classifier"]["kernel"]).T)
        values |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f"{WEIGHTS_FILE}.partial"
    safetensors.numpy.save_file(tensors, aside, metadata={"format": "pt"})
    aside.replace(directory / WEIGHTS_FILE)
    aside = directory / f"{CONFIG_FILE}.partial"
    aside.write_text(json.dumps(values, indent=2) + "\n")
    aside.replace(directory / CONFIG_FILE)
    return directory


def adapter_base(directory: pathlib.Path) -> str:
    """Directory or hub id of the model that an adapter belongs to.

    Raises:
      ConfigError: adapter_config.json does not name it.
    """
    base = read_json(directory / CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{directory}/{CONFIG_FILE} names no base_model_name_or_path.")
    return str(base)


def read_adapter(directory: pathlib.Path, base: ModelConfig) -> tuple[ModelConfig, Params]:
    """The model's config with adapters, and the adapters as host arrays.

    Args:
      directory: as peft or `write_adapter` wrote it.
      base: the model that it is put onto.

    Raises:
      ConfigError: it is no LoRA adapter of Linears that GPT-Neo has.
      ValueError: it belongs to a model of another shape.
    """
    values = read_json(directory / CONFIG_FILE)
    config = dataclasses.replace(base, **_settings(directory, values))
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise ConfigError(f"{directory} holds no {WEIGHTS_FILE}.")
    _, variables = model_graph(config)
    found = safetensors.numpy.load_file(path)
    learned: dict[tuple[str, ...], np.ndarray] = {}
    shapes = traverse_util.flatten_dict(nnx.to_pure_dict(variables))
    for name in config.lora_targets:
        module, theirs = _MODULES[name]
        for part, letter in (("a", "A"), ("b", "B")):
            ours = ("blocks", module, name, "adapter", part)
            shape = shapes[ours].shape[1:]
            rows = [
                _row(found, f"transformer.h.{layer}.{theirs}.lora_{letter}", shape)
                for layer in range(config.num_layers)
            ]
            learned[ours] = np.stack(rows)
    if found:
        raise ValueError(
            f"{path} holds tensors that are not of this model: {', '.join(sorted(found)[:4])}."
        )
    return config, traverse_util.unflatten_dict(learned)


def _settings(directory: pathlib.Path, values: Mapping[str, Any]) -> dict[str, Any]:
    kind = values.get("peft_type")
    odd = [
        key
        for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
        if values.get(key)
    ]
    if kind != "LORA" or odd or values.get("bias", "none") != "none":
        what = f"peft_type {kind!r}" if kind != "LORA" else ", ".join(odd) or "bias"
        raise ConfigError(f"{directory} is no plain LoRA adapter ({what}).")
    modules = values["target_modules"]
    ends = {_last(theirs): name for name, (_, theirs) in _MODULES.items()}
    wanted = [modules] if isinstance(modules, str) else list(modules)
    unknown = [name for name in wanted if _last(name) not in ends]
    if unknown:
        raise ConfigError(
            f"{directory}: target_modules {', '.join(unknown)} are no Linears of a GPT-Neo; "
            f"there are {', '.join(ends)}."
        )
    chosen = {ends[_last(name)] for name in wanted}
    return {
        "lora_rank": int(values["r"]),
        "lora_alpha": float(values["lora_alpha"]),
        "lora_dropout": float(values.get("lora_dropout", 0.0)),
        "lora_targets": tuple(name for name in _MODULES if name in chosen),
    }


def _row(found: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    key = f"base_model.model.{name}.weight"
    if key not in found:
        raise ValueError(f"the adapter lacks {key}; it belongs to another model.")
    array = found.pop(key).T
    # In one piece: [in, rank] or [rank, out].
    sizes = (math.prod(shape[:-1]), shape[-1]), (shape[0], math.prod(shape[1:]))
    if array.shape not in sizes:
        raise ValueError(
            f"{key} is {list(array.T.shape)}, and this model's is of another shape; the "
            f"adapter belongs to another model."
        )
    return array.astype(np.float32).reshape(shape)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
