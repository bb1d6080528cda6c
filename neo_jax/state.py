"""The training state: what a checkpoint must hold for the next step to come out the same.

Enters: a config, a mesh, an optimiser. Leaves: a `TrainState` of arrays that lie where
sharding.py puts them. `abstract` and `create` trace the same functions, so that the state
that is restored, planned or counted is the one that is trained.
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

from neo_jax import optimizer, sharding, trainable
from neo_jax.config import FinetuneConfig, ModelConfig
from neo_jax.model import NeoLM
from neo_jax.optimizer import Spikes

Params = dict[str, Any]  # nested by module, arrays at the leaves
EVERYTHING = FinetuneConfig()  # all parameters are learned, as in pre-training


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "spikes"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    `params` are those that are learned: all, unless a run says otherwise (trainable.py).
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


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """All of a model's parameters as `jax.ShapeDtypeStruct`s, each with its sharding.

    Raises:
      ConfigError: a parameter does not divide over the mesh; names it and the fix.
    """
    shapes = jax.eval_shape(functools.partial(_initial_params, config), 0)
    _, params = model_graph(config)
    placed = nnx.to_pure_dict(sharding.param_shardings(params, mesh))
    return jax.tree.map(_put, shapes, placed)


def abstract(
    config: ModelConfig,
    mesh: Mesh,
    tx: optax.GradientTransformation,
    finetune: FinetuneConfig = EVERYTHING,
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s, each with its sharding.

    Args:
      config: the model.
      mesh: where it lies.
      tx: the optimiser.
      finetune: which of the parameters are learned; the state has no others.

    Raises:
      ConfigError: a parameter does not divide over the mesh; names it and the fix.
    """
    params, _ = trainable.divide(abstract_params(config, mesh), finetune)
    shapes = jax.eval_shape(functools.partial(_initial_state, tx), params)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=_put(shapes.step, everywhere),
        params=params,
        # Moments mirror the parameters and lie beside them; counts are copied.
        opt_state=optax.tree_utils.tree_map_params(
            tx,
            lambda shape, param: _put(shape, param.sharding),
            shapes.opt_state,
            params,
            transform_non_params=lambda shape: _put(shape, everywhere),
        ),
        spikes=jax.tree.map(lambda shape: _put(shape, everywhere), shapes.spikes),
    )


def create(
    config: ModelConfig, mesh: Mesh, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    """A fresh state of all parameters; every device draws only its own part of it.

    Raises:
      ConfigError: as `abstract`.
    """
    init = jax.jit(
        lambda seed: _initial_state(tx, _initial_params(config, seed)),
        out_shardings=_shardings(abstract(config, mesh, tx)),
    )
    return init(seed)


def create_params(
    config: ModelConfig, mesh: Mesh, seed: int, finetune: FinetuneConfig = EVERYTHING
) -> Params:
    """Fresh values of the parameters that are learned; the others take no memory.

    Args:
      config: the model.
      mesh: where they lie.
      seed: the same values as `create` draws from it.
      finetune: which are learned.
    """
    like, _ = trainable.divide(abstract_params(config, mesh), finetune)
    init = jax.jit(
        lambda seed: trainable.divide(_initial_params(config, seed), finetune)[0],
        out_shardings=_shardings(like),
    )
    return init(seed)


def begin(params: Params, like: TrainState, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step, of parameters that come from somewhere.

    Args:
      params: the learned ones; donated.
      like: what `abstract` gives.
      tx: the optimiser.
    """
    init = jax.jit(
        functools.partial(_initial_state, tx),
        out_shardings=_shardings(like),
        donate_argnums=0,
    )
    return init(params)


def _initial_params(config: ModelConfig, seed: Any) -> Params:
    model = NeoLM(config, nnx.Rngs(params=jax.random.key(seed)))
    return nnx.to_pure_dict(nnx.state(model))


def _initial_state(tx: optax.GradientTransformation, params: Params) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(params),
        spikes=optimizer.no_spikes(),
    )


def _put(shape: jax.ShapeDtypeStruct, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def num_params(config: ModelConfig) -> int:
    """Parameters of the model as published: without the rows that pad the vocabulary."""
    _, params = model_graph(config)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    tables = 1 if config.tie_embeddings else 2
    return total - tables * config.embed_dim * (config.padded_vocab_size - config.vocab_size)


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree, all devices together, copies counted once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
