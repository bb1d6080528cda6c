"""Where a loss or a gradient stopped being a number: the first tensor, by name.

Enters: the parameters and the batch that led to it. Leaves: one sentence. The step is gone
through again in the order of its arithmetic: parameters, forward pass, loss, gradients from
the top layer down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from neo_jax import train
from neo_jax.config import Config
from neo_jax.state import Params
from neo_jax.train import Batch, Graph, LossFunction, next_token_loss


def first_not_finite(
    params: Params,
    graph: Graph,
    config: Config,
    batch: Batch,
    loss: LossFunction = next_token_loss,
) -> str:
    """What was the first to hold a NaN or an infinity, and how many of them.

    Args:
      params: all of the model's.
      graph: its structure.
      config: the whole experiment.
      batch: that led to it.
      loss: what the task learns.
    """
    looks = (
        lambda params, _: _of_tree("parameter", params),
        lambda params, batch: _of_forward_pass(params, graph, config, batch, loss),
        lambda params, batch: _of_gradients(params, graph, config, batch, loss),
    )
    for look in looks:
        counts = jax.device_get(
            jax.jit(lambda params, batch, look=look: dict(look(params, batch)))(params, batch)
        )
        # jit sorts the keys of a dict; their numbers put them in order again.
        for (_, name), bad in sorted(counts.items()):
            if bad:
                return f"{name} is the first that is not finite ({int(bad):,} values)"
    return "parameters, activations and gradients are all finite when computed once more"


_Counts = Iterator[tuple[tuple[int, str], Array]]


def _count(x: Array) -> Array:
    return jnp.sum(~jnp.isfinite(x))


def _of_tree(kind: str, tree: Any) -> _Counts:
    number = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        parts = [(name, leaf)]
        if name.startswith("blocks."):
            parts = [(f"{name} of layer {i}", layer) for i, layer in enumerate(leaf)]
        for part, x in parts:
            yield (number, f"{kind} {part}"), _count(x)
            number += 1


def _of_forward_pass(
    params: Params, graph: Graph, config: Config, batch: Batch, loss: LossFunction
) -> _Counts:
    model = nnx.merge(graph, params)
    named: list[tuple[str, Array]] = []
    inputs = batch["inputs"]
    x = model.embedder(inputs.reshape(-1, inputs.shape[-1]), batch.get("positions"))
    named.append(("the embedding's output", x))
    layers, weights = nnx.split(model.blocks)
    for i, kind in enumerate(config.model.layer_types):
        block = nnx.merge(layers, jax.tree.map(lambda w, i=i: w[i], weights))
        attended = block.attention(block.ln_1(x), kind, batch.get("segment_ids"))
        x = x + attended
        changed = block.mlp(block.ln_2(x))
        named.append((f"the output of layer {i}'s attention ({kind})", attended))
        named.append((f"the output of layer {i}'s mlp", changed))
        x = x + changed
    named.append(("the last hidden state", model.ln_f(x)))
    named.append(("the loss", train.batch_loss(params, graph, config, batch, loss).loss))
    for number, (name, values) in enumerate(named):
        yield (number, name), _count(values)


def _of_gradients(
    params: Params, graph: Graph, config: Config, batch: Batch, loss: LossFunction
) -> _Counts:
    grads, _ = train.gradients(params, graph, config, batch, loss)
    counts = list(_of_tree("the gradient of", grads))
    # Backwards: what is nearest to the loss comes first.
    layers = config.model.num_layers
    for (number, name), bad in counts:
        layer = int(name.rsplit(" ", 1)[1]) if " of layer " in name else -1
        nearness = 0 if "ln_f" in name or "head" in name else layers - layer
        yield (nearness * len(counts) + number, name), bad
