"""The network as StableHLO, for programs without this code.

Enters: parameters and config. Leaves: a directory with `forward.stablehlo` and
`decode.stablehlo`, what `jax.export.deserialize` takes: the whole context at once, and one
token after another; `params.safetensors`, the parameters under dotted names; `config.json`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax import export

from neo_jax import hf, state
from neo_jax.config import ConfigError, ModelConfig
from neo_jax.generate import cache
from neo_jax.generate.network import Decoder
from neo_jax.hf import names
from neo_jax.state import Params

FORWARD, DECODE, PARAMS = "forward.stablehlo", "decode.stablehlo", "params.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")


def require_exporter() -> None:
    """Raises ConfigError where a library is missing that jax.export serialises with."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError(
            "--format stablehlo needs flatbuffers; install it with pip install flatbuffers."
        )


def export_forward(config: ModelConfig, platforms: tuple[str, ...] = PLATFORMS) -> bytes:
    """The forward pass, serialised, for any batch size.

    Returns:
      What `jax.export.deserialize` takes; its `.call(params, ids)` has our tree of
      parameters, int32 ids [batch, max_seq_len] and float32 logits.
    """
    config = _without_kernels(config)
    graph, _ = state.model_graph(config)

    def forward(params: Params, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).logits(ids)

    (batch,) = export.symbolic_shape("batch")
    ids = jax.ShapeDtypeStruct((batch, config.max_seq_len), jnp.int32)
    exported = export.export(jax.jit(forward), platforms=platforms)
    return bytes(exported(hf.abstract_params(config), ids).serialize())


def export_decode_step(config: ModelConfig, platforms: tuple[str, ...] = PLATFORMS) -> bytes:
    """One token more of each text, serialised, for any batch size.

    Returns:
      What `jax.export.deserialize` takes; its `.call(params, keys, values, ids, positions)`
      has our tree of parameters; the keys and the values of earlier tokens, tuples with an
      array a layer, keys [batch, heads, head_dim, slots] and values [batch, heads, slots,
      head_dim], zeros before the first token, with max_seq_len slots in a global layer and
      window_size (if that is less) in a local one;
      int32 ids [batch]; and the int32 places of those ids in their texts [batch]. It gives
      float32 logits [batch, vocab], keys and values.
    """
    config = _without_kernels(config)
    graph, _ = state.model_graph(config)
    caches = jax.eval_shape(lambda: _caches(config))
    windows = [layer.window for layer in caches]

    def decode_step(
        params: Params,
        keys: tuple[jax.Array, ...],
        values: tuple[jax.Array, ...],
        ids: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        decoder = Decoder(nnx.merge(graph, params))
        before = tuple(
            cache.LayerCache(key, value, None, None, window)
            for key, value, window in zip(keys, values, windows, strict=True)
        )
        hidden, after = decoder.hidden(ids[:, None], positions[:, None], positions + 1, before)
        logits = decoder.logits(hidden)[:, 0]
        return logits, tuple(c.key for c in after), tuple(c.value for c in after)

    (batch,) = export.symbolic_shape("batch")

    def remembered(part: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        arrays = [getattr(layer, part) for layer in caches]
        return tuple(jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in arrays)

    each = jax.ShapeDtypeStruct((batch,), jnp.int32)
    exported = export.export(jax.jit(decode_step), platforms=platforms)
    arguments = (
        hf.abstract_params(config),
        remembered("key"),
        remembered("value"),
        each,
        each,
    )
    return bytes(exported(*arguments).serialize())


def _caches(config: ModelConfig) -> cache.Caches:
    """Of one text."""
    return cache.empty(
        config,
        batch_size=1,
        capacity=config.max_seq_len,
        chunk=1,
        dtype="auto",
        for_kernels=False,
    )


def _without_kernels(config: ModelConfig) -> ModelConfig:
    # A kernel of one platform would bar the others, so attention is plain XLA.
    return dataclasses.replace(config, attention="banded", remat="none")


def write(params: Params, config: ModelConfig, directory: pathlib.Path) -> None:
    """Writes the files named above."""
    (directory / FORWARD).write_bytes(export_forward(config))
    (directory / DECODE).write_bytes(export_decode_step(config))
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    safetensors.numpy.save_file(flat, directory / PARAMS)
    values = json.dumps(hf.config_to_hf(config), indent=2)
    (directory / "config.json").write_text(f"{values}\n")


def is_written(directory: pathlib.Path) -> bool:
    """Whether a directory is one that `write` wrote."""
    return (directory / FORWARD).is_file()


def logits(directory: pathlib.Path, ids: np.ndarray) -> np.ndarray:
    """What the files answer, read anew: float32 [batch, seq, vocab] of ids [batch, seq]."""
    config = hf.config_from_hf(hf.read_json(directory / "config.json"))
    forward = export.deserialize(bytearray((directory / FORWARD).read_bytes()))
    flat = safetensors.numpy.load_file(directory / PARAMS)
    params = hf.abstract_params(config)
    for path, array in flat.items():
        names.set_leaf(params, path, array)
    # The rest of the context is filled up; no token sees what comes after it.
    filled = np.zeros((len(ids), config.max_seq_len), np.int32)
    filled[:, : ids.shape[1]] = ids
    return np.asarray(forward.call(params, filled))[:, : ids.shape[1]]
