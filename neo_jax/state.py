"""The training state: what a checkpoint must hold for the next step to come out the same.

Enters: a config, a mesh, an optimiser. Leaves: a `TrainState` of arrays that lie where
sharding.py puts them. `abstract` and `create` trace one function, so that the state that is
restored, planned or counted is the one that is trained.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neo_jax import optimizer, sharding
from neo_jax.config import ModelConfig
from neo_jax.model import NeoLM
from neo_jax.optimizer import Spikes

Params = dict[str, Any]  # nested by module, arrays at the leaves


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "spikes"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    `step` counts finished steps, an int32 scalar; `step - spikes.skipped` of them updated
    the parameters. `opt_state` mirrors `params`. There is no generator of random numbers to
    keep: what needs chance folds `step` into the run's seed.
    """

    step: Any
    params: Params
    opt_state: optax.OptState
    spikes: Spikes


def model_graph(config: ModelConfig) -> tuple[nnx.GraphDef[NeoLM], nnx.State]:
    """A model's structure and its abstract parameters, without any memory.

    Returns:
      The graph, with which `nnx.merge(graph, params)` is a model again, and the Params as
      shapes with the names of their dimensions.
    """
    # jax's eval_shape, not nnx's: that one would look for our dimension names on the mesh.
    return jax.eval_shape(lambda: nnx.split(NeoLM(config, nnx.Rngs(params=0))))


def abstract(config: ModelConfig, mesh: Mesh, tx: optax.GradientTransformation) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s, each with its sharding.

    Raises:
      ConfigError: a parameter does not divide over the mesh; names it and the fix.
    """
    shapes = jax.eval_shape(functools.partial(_initial, config, tx), 0)
    _, params = model_graph(config)
    placed = nnx.to_pure_dict(sharding.param_shardings(params, mesh))
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(shape: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

    return TrainState(
        step=put(shapes.step, everywhere),
        params=jax.tree.map(put, shapes.params, placed),
        # Moments mirror the parameters and lie beside them; counts are copied.
        opt_state=optax.tree_utils.tree_map_params(
            tx,
            put,
            shapes.opt_state,
            placed,
            transform_non_params=lambda shape: put(shape, everywhere),
        ),
        spikes=jax.tree.map(lambda shape: put(shape, everywhere), shapes.spikes),
    )


def create(
    config: ModelConfig, mesh: Mesh, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    """A fresh state; every device draws only its own part of it.

    Raises:
      ConfigError: as `abstract`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(config, mesh, tx))
    init = jax.jit(functools.partial(_initial, config, tx), out_shardings=shardings)
    return init(seed)


def _initial(config: ModelConfig, tx: optax.GradientTransformation, seed: Any) -> TrainState:
    model = NeoLM(config, nnx.Rngs(params=jax.random.key(seed)))
    params = nnx.to_pure_dict(nnx.state(model))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        spikes=optimizer.no_spikes(),
    )


def num_params(config: ModelConfig) -> int:
    """Parameters of the model as published: without the rows that pad the vocabulary."""
    _, params = model_graph(config)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    tables = 1 if config.tie_embeddings else 2
    return total - tables * config.embed_dim * (config.padded_vocab_size - config.vocab_size)


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree, all devices together, copies counted once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
