"""The original's checkpoints: Mesh-TensorFlow variables in a TensorFlow bundle, read alone.

Enters: a directory (or prefix) with `model.ckpt-N.index`, `model.ckpt-N.data-…` and the
JSON config that the model was trained with. Leaves: our config and parameters, as from a
Hugging Face directory. TensorFlow is not needed: a bundle is a sorted table of small
messages that say where each variable's bytes lie. Optimiser slots are passed over.

Sources: TensorFlow, core/util/tensor_bundle and core/protobuf/tensor_bundle.proto (the
bundle), core/lib/io/table_format.txt (its index, LevelDB's table); EleutherAI/gpt-neo,
models/gpt2/gpt2.py and models/layers.py (names and shapes of variables),
models/activations.py, optimizers.py (`adam_m`, `adam_v`);
transformers 4, models/gpt_neo, load_tf_weights_in_gpt_neo (the same names in torch).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from neo_jax.config import ConfigError, ModelConfig
from neo_jax.hf import names
from neo_jax.hf.configs import read_json
from neo_jax.hf.reading import Pretrained, stream

# --------------------------------------------------------------------------------- config

# Keys that turn the network into another one; all are off in released models.
_OTHER_NETWORKS = (
    "axial_pos_emb",
    "lightweight_conv_attention",
    "macaron",
    "mlm_training",
    "mlp_glu",
    "moe_layers",
    "no_weight_tie",
    "num_mem_kv",
    "rezero",
    "rotary_emb",
    "scalenorm",
    "share_parameters",
)

# Values of `activation_fn`, the key that later versions of the original read, and ours.
_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "silu": "silu"}


def config_from_mtf(values: Mapping[str, Any]) -> ModelConfig:
    """The shape that a JSON config of EleutherAI/gpt-neo describes.

    Both the released models' and the others in that repository's `configs/` can be read,
    such as the global-only ones with 32 heads.

    Raises:
      ConfigError: a key is missing, or asks for a network that is not GPT-Neo's.
    """
    needed = ("n_layer", "n_embd", "n_head", "n_vocab", "n_ctx")
    missing = [key for key in needed if key not in values]
    if missing:
        raise ConfigError(
            f"config of the checkpoint lacks {', '.join(missing)}; give the JSON file that "
            f"the model was trained with, from EleutherAI/gpt-neo."
        )
    for key in _OTHER_NETWORKS:
        if values.get(key):
            raise ConfigError(
                f"config of the checkpoint sets {key}={values[key]!r}; "
                f"that network cannot be read, only GPT-Neo's own."
            )
    activation = values.get("activation_fn", "gelu")
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"config of the checkpoint sets activation_fn={activation!r}; only "
            f"{', '.join(_ACTIVATIONS)} can be read."
        )
    pattern: Any = values.get("attention_types") or ["global"]
    return ModelConfig(
        num_layers=values["n_layer"],
        embed_dim=values["n_embd"],
        num_heads=values["n_head"],
        vocab_size=values["n_vocab"],
        max_seq_len=values["n_ctx"],
        attention_types=pattern,
        window_size=values.get("local_attention_radius", 256),
        # Not `activation_function`, which stands in every config and is read by no version:
        # the network calls mtf.gelu, GELU's tanh form, unless `activation_fn` names another.
        activation=_ACTIVATIONS[activation],  # type: ignore[arg-type]
    )


# ------------------------------------------------------------------------------- the names


# What optimisers keep: the original's Adam, and Mesh-TensorFlow's Adafactor; and the step.
_SLOT = re.compile(r"/adam_[mv]$|_slot_(m|v|vr|vc)$|^global_step$")


def variable_name(theirs: str) -> str:
    """The Mesh-TensorFlow variable of a Hugging Face name."""
    outside = {
        "transformer.wte.weight": "gpt2/wte",
        "transformer.wpe.weight": "gpt2/wpe",
        "transformer.ln_f.weight": "gpt2/ln_f/g",
        "transformer.ln_f.bias": "gpt2/ln_f/b",
    }
    in_block = {
        "ln_1.weight": "norm_1/g",
        "ln_1.bias": "norm_1/b",
        "attn.attention.q_proj.weight": "attn/q",
        "attn.attention.k_proj.weight": "attn/k",
        "attn.attention.v_proj.weight": "attn/v",
        "attn.attention.out_proj.weight": "attn/o",
        "attn.attention.out_proj.bias": "attn/compute_output_bias/o_b",
        "ln_2.weight": "norm_2/g",
        "ln_2.bias": "norm_2/b",
        "mlp.c_fc.weight": "mlp/conv1d_main/c_fc/kernel",
        "mlp.c_fc.bias": "mlp/conv1d_main/c_fc/bias",
        "mlp.c_proj.weight": "mlp/conv1d_main/c_proj/kernel",
        "mlp.c_proj.bias": "mlp/conv1d_main/c_proj/bias",
    }
    if theirs in outside:
        return outside[theirs]
    _, _, layer, rest = theirs.split(".", 3)
    return f"gpt2/h{layer}/{in_block[rest]}"


# --------------------------------------------------------------------------------- reading


def read(
    source: str | os.PathLike[str],
    *,
    config_file: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> Pretrained:
    """Reads an original checkpoint, variable by variable, straight to its devices.

    Args:
      source: a directory, or the prefix of one checkpoint in it, such as
        `GPT3_XL/model.ckpt-362000`.
      config_file: the JSON that the model was trained with; left out, `config.json` beside
        the checkpoint.
      dtype: of the parameters; left out, as they are stored.
      mesh: over which the parameters are spread; see `hf.read`.

    Raises:
      ConfigError: no checkpoint, no config, or not GPT-Neo's network.
      ValueError: variables are missing, misshapen or cut off.
    """
    prefix = checkpoint_prefix(source)
    config = config_from_mtf(
        read_json(pathlib.Path(config_file or prefix.parent / "config.json"))
    )
    bundle = open_bundle(prefix)
    table = names.name_table(config)
    ours = {variable_name(entry.name): entry.name for entry in table}
    found = {ours[name]: variable for name, variable in bundle.items() if name in ours}
    shapes = {name: _torch_shape(name, variable, config) for name, variable in found.items()}
    others = {
        name: variable.shape
        for name, variable in bundle.items()
        if name not in ours and not _SLOT.search(name)
    }
    names.check_names({**shapes, **others}, table)
    stored = found[table[0].name].dtype
    dtype = dtype or ("float32" if stored == np.float16 else str(stored))
    config = dataclasses.replace(config, param_dtype=dtype)  # type: ignore[arg-type]

    def read_tensor(name: str) -> np.ndarray:
        array = found[name].read()
        array = array.reshape([size for size in array.shape if size != 1] or [1])
        if name == "transformer.wte.weight":
            return array[: config.vocab_size]
        return array.T if _is_kernel(name) else array

    return Pretrained(config, stream(table, read_tensor, config, None, dtype, mesh), None)


def is_checkpoint(source: str | os.PathLike[str]) -> bool:
    """Whether a directory or prefix is a TensorFlow checkpoint."""
    path = pathlib.Path(source)
    return path.with_name(f"{path.name}.index").is_file() or (
        path.is_dir() and any(path.glob("*.ckpt-*.index"))
    )


def checkpoint_prefix(source: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a checkpoint without `.index`: the newest, where there are several.

    Raises:
      ConfigError: there is none.
    """
    path = pathlib.Path(source)
    if path.with_name(f"{path.name}.index").is_file():
        return path
    found = sorted(path.glob("*.index"), key=_step_of)
    if not found:
        raise ConfigError(f"{path} holds no TensorFlow checkpoint (model.ckpt-N.index).")
    return found[-1].with_suffix("")


def _step_of(index: pathlib.Path) -> int:
    (step,) = re.findall(r"-(\d+)\.index$", index.name) or ["0"]
    return int(step)


def _is_kernel(name: str) -> bool:
    return name.endswith(("_proj.weight", "c_fc.weight"))


def _torch_shape(name: str, variable: Variable, config: ModelConfig) -> tuple[int, ...]:
    """The shape that the variable will have in torch's order, its padding cut off."""
    shape = tuple(size for size in variable.shape if size != 1) or (1,)
    if name == "transformer.wte.weight":
        return (min(shape[0], config.vocab_size), *shape[1:])
    return shape[::-1] if _is_kernel(name) else shape


# ----------------------------------------------------------------------- TensorFlow's bundle

_TABLE_MAGIC = 0xDB4775248B80FB57

# tensorflow/core/framework/types.proto
_DTYPES: Mapping[int, Any] = {
    1: np.float32,
    2: np.float64,
    3: np.int32,
    9: np.int64,
    14: ml_dtypes.bfloat16,
    19: np.float16,
}


class Variable(NamedTuple):
    """One tensor of a bundle."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def open_bundle(prefix: pathlib.Path) -> dict[str, Variable]:
    """Every variable of a checkpoint by its name; nothing but the index is read yet.

    Raises:
      ValueError: the index is no bundle's, or a variable is of a kind that models lack.
    """
    index = prefix.with_name(f"{prefix.name}.index")
    try:
        entries = dict(_table(index.read_bytes()))
        header = _message(entries.pop(b""))
    except (KeyError, IndexError, struct.error) as error:
        raise ValueError(f"{index} is not a whole index of a checkpoint: {error!r}.") from None
    num_shards = header.get(1, [1])[0]
    if header.get(2, [0])[0] != 0:
        raise ValueError(f"{index} was written on a big-endian machine and cannot be read.")
    return {
        key.decode(): _variable(prefix, key.decode(), _message(value), num_shards)
        for key, value in entries.items()
    }


def _variable(
    prefix: pathlib.Path, name: str, entry: Mapping[int, list[Any]], num_shards: int
) -> Variable:
    # BundleEntryProto: 1 dtype, 2 shape (2 dim (1 size)), 3 shard, 4 offset, 5 size.
    first = lambda field: entry.get(field, [0])[0]  # noqa: E731
    shape_message = _message(entry.get(2, [b""])[0])
    shape = tuple(_message(dim).get(1, [0])[0] for dim in shape_message.get(2, []))
    dtype = np.dtype(_DTYPES.get(first(1), np.void))
    data = prefix.with_name(f"{prefix.name}.data-{first(3):05d}-of-{num_shards:05d}")

    def read_bytes() -> np.ndarray:
        if dtype == np.void or 7 in entry:  # strings and the like; partitioned variables
            raise ValueError(f"{prefix}: variable {name} is of a kind that cannot be read.")
        if not data.is_file():
            raise ValueError(f"{data} is missing, which holds variable {name}.")
        with data.open("rb") as file:
            file.seek(first(4))
            array = np.fromfile(file, dtype, count=int(np.prod(shape)))
        if array.nbytes != first(5):
            raise ValueError(f"{data} is cut off in variable {name}.")
        return array.reshape(shape)

    return Variable(shape, dtype, read_bytes)


def _table(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of LevelDB's sorted table, whose footer points to a block of blocks."""
    footer = file[-48:]
    if struct.unpack("<Q", footer[40:])[0] != _TABLE_MAGIC:
        raise KeyError("no table")
    at = 0
    for _ in range(2):  # offset and size of the metaindex, which is empty
        _, at = _varint(footer, at)
    offset, at = _varint(footer, at)
    size, _ = _varint(footer, at)
    for _, handle in _block(file, offset, size):
        block_offset, at = _varint(handle, 0)
        block_size, _ = _varint(handle, at)
        yield from _block(file, block_offset, block_size)


def _block(file: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; each key repeats a part of the one before it."""
    if file[offset + size] != 0:
        raise KeyError("a compressed block, which TensorFlow does not write")
    block = file[offset : offset + size]
    (num_restarts,) = struct.unpack("<I", block[-4:])
    end, at, key = size - 4 * (num_restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared
        yield key, block[at : at + length]
        at += length


def _message(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protocol buffer by number: integers, or bytes to be read further."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        value: Any
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        else:  # fixed64, fixed32
            width = {1: 8, 5: 4}[kind]
            value, at = int.from_bytes(data[at : at + width], "little"), at + width
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer in groups of seven bits, low ones first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
