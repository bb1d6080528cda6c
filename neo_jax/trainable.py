"""Which of a model's parameters are learned, and which are only used.

Enters: all parameters, nested by module, and the `finetune` section. Leaves: two trees, the
learned and the frozen ones, whose union they are. The optimiser and the checkpoint know the
learned ones alone; both are joined inside the compiled step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from neo_jax.config import FinetuneConfig

# Parameters as elsewhere: nested by module, arrays (or shapes) at the leaves.
Tree = dict[str, Any]

ADAPTER = "adapter"  # the module that holds a Linear's low-rank matrices
# What a task adds to a model is learned whatever else is.
_OF_TASKS = ("classifier",)


def divide(params: Tree, config: FinetuneConfig) -> tuple[Tree, Tree]:
    """The learned and the frozen parameters.

    With "last_layers" the arrays of `blocks`, which hold all layers, are cut in two: the last
    of them are learned, the final LayerNorm and what a task added as well.

    Args:
      params: all of a model's: arrays, tracers, or `jax.ShapeDtypeStruct`s with shardings.
      config: says which.
    """
    if config.trainable == "all":
        return params, {}
    learned, frozen = {}, {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        if path[0] in _OF_TASKS or ADAPTER in path:
            learned[path] = leaf
        elif config.trainable == "lora":
            frozen[path] = leaf
        elif path[0] == "ln_f":
            learned[path] = leaf
        elif path[0] == "blocks":
            count = leaf.shape[0] - config.last_layers
            learned[path], frozen[path] = _rows(leaf, count, None), _rows(leaf, 0, count)
        else:
            frozen[path] = leaf
    return traverse_util.unflatten_dict(learned), traverse_util.unflatten_dict(frozen)


def join(learned: Tree, frozen: Tree) -> Tree:
    """All parameters again: the inverse of `divide`."""
    if not frozen:
        return learned
    flat = traverse_util.flatten_dict(frozen)
    for path, leaf in traverse_util.flatten_dict(learned).items():
        flat[path] = jnp.concatenate([flat[path], leaf]) if path in flat else leaf
    return traverse_util.unflatten_dict(flat)


def _rows(leaf: Any, start: int, stop: int | None) -> Any:
    """Some of the layers of a stacked array, or of its shape."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf[start:stop]
    count = len(range(leaf.shape[0])[start:stop])
    shape = (count, *leaf.shape[1:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)
