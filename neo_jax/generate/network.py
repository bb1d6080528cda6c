"""The network as decoding runs it: one block after another, each with its own cache.

Enters: a trained `NeoLM`, whose layers are stacked in one array a weight. Leaves: a `Decoder`
of the same modules with a Block a layer, in the type that it computes in. A slice of a stacked
array would be copied at each token; a layer's own array is read where it lies.

Shapes: B batch, T position, D embed, V vocab (padded).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from neo_jax.config import ModelConfig
from neo_jax.generate import quantise
from neo_jax.generate.cache import Caches, LayerCache, Step
from neo_jax.model import NeoLM, compute_dtype, product
from neo_jax.state import Params


class Decoder(nnx.Module):
    """A `NeoLM` that continues texts: new tokens enter, the earlier ones are in the caches."""

    def __init__(self, model: NeoLM, weight_dtype: str):
        self.config: ModelConfig = model.config
        self.embedder = model.embedder
        graph, weights = nnx.split(model.blocks)
        self.blocks = nnx.List(
            nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], weights))
            for i in range(model.config.num_layers)
        )
        self.ln_f = model.ln_f
        is_int8 = weight_dtype == "int8"
        self.int8_head = quantise.quantised_head(model.head) if is_int8 else None
        self.untied_head = None if is_int8 else model.untied_head
        if is_int8:
            for block in self.blocks:
                for owner, name in (
                    *((block.attention, name) for name in ("query", "key", "value", "out")),
                    *((block.mlp, name) for name in ("up", "down")),
                ):
                    setattr(owner, name, quantise.quantised(getattr(owner, name)))

    def hidden(
        self,
        ids: Int[Array, "batch seq"],
        positions: Int[Array, "batch seq"],
        length: Int[Array, " batch"],
        caches: Caches,
    ) -> tuple[Float[Array, "batch seq embed"], Caches]:
        """Final, normalised hidden states of the new tokens, and the caches with them.

        Args:
          ids: the new tokens; anything where there is none.
          positions: their places in the text; -1 where there is none.
          length: tokens that each row's cache holds afterwards.
          caches: of the tokens before.
        """
        x_BTD = self.embedder(ids, jnp.maximum(positions, 0))
        after: list[LayerCache] = []
        for block, cache in zip(self.blocks, caches, strict=True):
            x_BTD, step = block.remembering(x_BTD, Step(cache, positions, length))
            assert isinstance(step, Step)
            after.append(step.cache)
        return self.ln_f(x_BTD), tuple(after)

    def logits(
        self, hidden: Float[Array, "batch seq embed"]
    ) -> Float[Array, "batch seq vocab"]:
        """Scores over the `vocab_size` real ids, at least float32."""
        if self.int8_head is not None:
            return self.int8_head(hidden.astype(jnp.float32))[..., : self.config.vocab_size]
        head = self.embedder.embedding if self.untied_head is None else self.untied_head
        float_type = jnp.promote_types(hidden.dtype, jnp.float32)
        # The padding rows are multiplied as well: cutting them off the head would copy it.
        logits = product(
            "BTD,VD->BTV",
            hidden,
            head[...].astype(hidden.dtype),
            preferred_element_type=float_type,
        )
        return logits[..., : self.config.vocab_size]


def prepare(
    graph: nnx.GraphDef[NeoLM], params: Params, config: ModelConfig, weight_dtype: str
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """The decoder of a model: its structure, and its parameters on their devices.

    Kernels and tables are cast to the type of the activations once, here, or with
    `weight_dtype` "int8" the kernels to int8.
    """
    kind = compute_dtype(config)

    def build(params: Params) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
        decoder = Decoder(nnx.merge(graph, params), weight_dtype)
        graph_of_decoder, state = nnx.split(decoder)
        return graph_of_decoder, state

    def cast(path: tuple[jax.tree_util.KeyEntry, ...], leaf: jax.Array) -> jax.Array:
        names = jax.tree_util.keystr(path, simple=True, separator=".")
        stays = leaf.dtype == jnp.int8 or names.endswith("scale") or ".ln_" in f".{names}"
        return leaf if stays else leaf.astype(kind)

    @jax.jit
    def weights(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(cast, nnx.to_pure_dict(build(params)[1]))

    return jax.eval_shape(build, params)[0], weights(params)


def stretch_positions(params: Params, factor: int) -> Params:
    """The same decoder for texts `factor` times as long: positions are pressed together.

    Position p takes the embedding at p / factor, on the straight line between two rows of the
    table: what Chen et al. (2023) do to rotary positions, for learned ones.
    """
    table = params["embedder"]["positions"]
    rows = table.shape[0]

    def stretch(table: jax.Array) -> jax.Array:
        at = jnp.arange(rows * factor) / factor
        low = jnp.minimum(at.astype(jnp.int32), rows - 1)
        weight = (at - low)[:, None].astype(table.dtype)
        return table[low] * (1 - weight) + table[jnp.minimum(low + 1, rows - 1)] * weight

    return {**params, "embedder": {**params["embedder"], "positions": jax.jit(stretch)(table)}}
