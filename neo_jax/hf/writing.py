"""From our parameters to a directory that transformers loads as it is.

Enters: our tree of parameters, its config, a tokenizer. Leaves: config.json,
generation_config.json, safetensors (in shards with an index where they are large) and the
tokenizer's files; on request, a model on the hub.

Sources: the formats of `safetensors` and of the sharded index that `save_pretrained` writes.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from neo_jax.config import ConfigError, ModelConfig
from neo_jax.hf import names
from neo_jax.hf.configs import Head, config_to_hf
from neo_jax.hf.reading import hub_errors
from neo_jax.state import Params
from neo_jax.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def write(
    params: Params,
    config: ModelConfig,
    directory: str | os.PathLike[str],
    *,
    head: Head | None = None,
    dtype: str | None = None,
    eos_id: int | None = None,
    shard_bytes: int = 2**31,
) -> pathlib.Path:
    """Writes a directory that transformers' `from_pretrained` loads as it is.

    Files are written beside their place and renamed, config.json last. Host memory holds
    one shard at a time.

    Args:
      params: our tree; with a `head`, `{"model": …, "head": …}`.
      dtype: of the tensors, such as "bfloat16"; left out, as they are.
      eos_id: the id that begins and ends texts; left out, the vocabulary's last.
      shard_bytes: size that a file of weights may reach.

    Raises:
      ValueError: the directory holds weights already.
    """
    directory = pathlib.Path(directory)
    if any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} holds weights already; give another directory.")
    directory.mkdir(parents=True, exist_ok=True)
    table = {entry.name: entry for entry in names.name_table(config, head)}
    kinds = {
        name: jnp.dtype(dtype or names.get_leaf(params, entry.path).dtype)
        for name, entry in table.items()
    }
    sizes = {name: math.prod(e.shape) * kinds[name].itemsize for name, e in table.items()}
    shards = _shards(sizes, shard_bytes)
    for file, held in shards.items():
        tensors = {}
        for name in held:
            array = names.to_host(names.row_of(params, table[name]))
            tensors[name] = names.to_theirs(table[name], array.astype(kinds[name], copy=False))
        _write_aside(directory / file, functools.partial(_save, tensors))
    if len(shards) > 1:
        weight_map = {name: file for file, held in shards.items() for name in held}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)
    _write_configs(directory, config, head, str(next(iter(kinds.values()))), eos_id)
    return directory


def _save(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    # Old versions of transformers read no file that does not say whose format it is.
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def _shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Names of tensors by the name of their file, each file at most `limit` bytes."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
        for i, names in enumerate(groups, start=1)
    }


def _write_configs(
    directory: pathlib.Path,
    config: ModelConfig,
    head: Head | None,
    dtype: str,
    eos_id: int | None,
) -> None:
    values = {**config_to_hf(config), "torch_dtype": dtype}
    if eos_id is not None:
        values |= {"bos_token_id": eos_id, "eos_token_id": eos_id}
    if head is None:
        ends = {key: values[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(directory / "generation_config.json", {"_from_model_config": True, **ends})
    else:
        values |= {
            "architectures": [head.architecture],
            "id2label": dict(enumerate(head.labels)),
            "label2id": {name: i for i, name in enumerate(head.labels)},
            "pad_token_id": head.pad_token_id,
            "problem_type": head.problem_type,
        }
    _write_json(directory / "config.json", values)


def copy_tokenizer(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copies the files that transformers reads a tokenizer from, as many as there are."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            copy = functools.partial(shutil.copyfile, source / name)
            _write_aside(directory / name, copy)


def write_tokenizer(words: Tokenizer, directory: pathlib.Path, max_length: int) -> None:
    """Writes a tokenizer of ours so that transformers' AutoTokenizer loads it."""
    words.save(directory)
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), words.eos_token)
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    _write_json(directory / "tokenizer_config.json", {**values, **ends})


def push_to_hub(directory: pathlib.Path, repo_id: str, *, private: bool = True) -> str:
    """Uploads a written directory with the token of `hf auth login`; returns its address.

    Raises:
      ConfigError: the hub cannot be reached, or refuses; one line.
    """
    import huggingface_hub
    from huggingface_hub import constants

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=directory))
    except hub_errors() as error:
        reason = (str(error.__cause__ or error).splitlines() or [""])[0].strip(" .")
        raise ConfigError(
            f"{directory} cannot be uploaded to {constants.ENDPOINT} as {repo_id!r} "
            f"({type(error).__name__}: {reason}); log in with hf auth login, and check the "
            f"name and the network."
        ) from None


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2) + "\n"
    _write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _write_aside(path: pathlib.Path, write_to: Callable[[pathlib.Path], Any]) -> None:
    aside = path.with_name(f".{path.name}.part")
    write_to(aside)
    os.replace(aside, path)
