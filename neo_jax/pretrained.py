"""Any checkpoint as a model to ask: a workdir of ours, Hugging Face's, or the original's.

Enters: a path or the id of a model on the hub. Leaves: a `LanguageModel`. What kind of
checkpoint it is shows in its files, so that nobody has to say.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from neo_jax import checkpoint, hf, mtf, sharding, state, tokenizer
from neo_jax import config as config_lib
from neo_jax.config import ConfigError, MeshConfig, ModelConfig
from neo_jax.model import NeoLM
from neo_jax.state import Params
from neo_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its parameters, and the tokenizer that it came with, if any."""

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    graph: nnx.GraphDef[NeoLM]
    _logits: Callable[[Params, jax.Array], jax.Array]

    def logits(self, ids: np.typing.ArrayLike) -> Float[Array, "batch seq vocab"]:
        """Scores of the token after each one, float32.

        Args:
          ids: token ids, integers [batch, seq] below `config.vocab_size`, at most
            `config.max_seq_len` in a row.

        Raises:
          ValueError: another shape or type, too long a sequence, or an unknown id.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"ids must be integers [batch, seq], not {ids.dtype} {list(ids.shape)}."
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(
                f"ids reach from {ids.min()} to {ids.max()}; the vocabulary has "
                f"0 … {self.config.vocab_size - 1}."
            )
        return self._logits(self.params, jax.numpy.asarray(ids, jax.numpy.int32))


def load(
    source: str | os.PathLike[str], *, dtype: str | None = None, mesh: Mesh | None = None
) -> LanguageModel:
    """A language model from a workdir, a directory of any kind, or a hub id.

    Args:
      source: a workdir of ours, a Hugging Face directory or hub id, or an original
        checkpoint with its config.json.
      dtype: of the parameters, such as "bfloat16"; left out, as they are stored.
      mesh: over which the parameters are spread; left out, all on the default device.

    Raises:
      ConfigError: nothing is there that could be read; one line.
      ValueError: weights that do not fit their config.
    """
    model = read(source, dtype=dtype, mesh=mesh)
    if model.head is not None:
        raise ConfigError(
            f"{source} is a {model.head.architecture}, which has no language model's head; "
            f"read it with neo_jax.hf.read."
        )
    graph, _ = state.model_graph(model.config)
    run = jax.jit(lambda params, ids: nnx.merge(graph, params).logits(ids))
    return LanguageModel(model.config, model.params, find_tokenizer(source), graph, run)


def read(
    source: str | os.PathLike[str], *, dtype: str | None = None, mesh: Mesh | None = None
) -> hf.Pretrained:
    """Config and parameters of any checkpoint. Args and errors as `load`."""
    if is_workdir(source):
        return _read_workdir(pathlib.Path(source), dtype, mesh)
    if mtf.is_checkpoint(source):
        return mtf.read(source, dtype=dtype, mesh=mesh)
    return hf.read(source, dtype=dtype, mesh=mesh)


def is_workdir(source: str | os.PathLike[str]) -> bool:
    """Whether a directory is one that training or `convert` wrote."""
    return (pathlib.Path(source) / "checkpoints").is_dir()


def find_tokenizer(source: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer beside a checkpoint; None where there are no tokenizer's files."""
    path = pathlib.Path(source)
    try:
        return tokenizer.load(hf.resolve(source) if not path.exists() else path)
    except ConfigError:
        return None


def _read_workdir(
    workdir: pathlib.Path, dtype: str | None, mesh: Mesh | None
) -> hf.Pretrained:
    try:
        config = config_lib.from_json((workdir / "config.json").read_text()).model
    except OSError as error:
        raise ConfigError(f"{workdir}/config.json cannot be read: {error.strerror}.") from None
    if dtype is not None:
        config = dataclasses.replace(config, param_dtype=dtype)  # type: ignore[arg-type]
    if mesh is None:
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = hf.abstract_params(config, mesh=mesh)
    return hf.Pretrained(config, checkpoint.restore_params(workdir, abstract), None)
