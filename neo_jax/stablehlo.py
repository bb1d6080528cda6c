"""The network as StableHLO, for programs without this code.

Enters: parameters and config. Leaves: a directory with `forward.stablehlo`, what
`jax.export.deserialize` takes; `params.safetensors`, the parameters under dotted names; and
`config.json`.

Shapes: B batch, T position, V vocab.
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
from neo_jax.hf import names
from neo_jax.state import Params

FORWARD, PARAMS = "forward.stablehlo", "params.safetensors"
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
    # A kernel of one platform would bar the others, so attention is plain XLA.
    config = dataclasses.replace(config, attention="banded", remat="none")
    graph, _ = state.model_graph(config)

    def forward(params: Params, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).logits(ids)

    (batch,) = export.symbolic_shape("batch")
    ids = jax.ShapeDtypeStruct((batch, config.max_seq_len), jnp.int32)
    exported = export.export(jax.jit(forward), platforms=platforms)
    return bytes(exported(hf.abstract_params(config), ids).serialize())


def write(params: Params, config: ModelConfig, directory: pathlib.Path) -> None:
    """Writes the files named above."""
    (directory / FORWARD).write_bytes(export_forward(config))
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
