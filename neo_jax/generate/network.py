"""The network as decoding runs it: one block after another, each with its own cache.

Enters: a trained `NeoLM`, whose layers are stacked in one array a weight. Leaves: a `Decoder`
of the same modules with a Block a layer, in the type that it computes in. A slice of a stacked
array would be copied at each token; a layer's own array is read where it lies.

Shapes: B batch, T position, D embed, V vocab (padded).
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from neo_jax.config import ConfigError, ModelConfig
from neo_jax.generate import quantise
from neo_jax.generate.cache import Caches, LayerCache, Step
from neo_jax.model import NeoLM, compute_dtype, product
from neo_jax.state import Params, model_graph

Path = tuple[jax.tree_util.DictKey, ...]


class Decoder(nnx.Module):
    """A `NeoLM` that continues texts: new tokens enter, the earlier ones are in the caches."""

    def __init__(self, model: NeoLM):
        self.config: ModelConfig = model.config
        self.embedder = model.embedder
        graph, weights = nnx.split(model.blocks)
        self.blocks = nnx.List(
            nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], weights))
            for i in range(model.config.num_layers)
        )
        self.ln_f = model.ln_f
        self.untied_head = model.untied_head
        self.int8_head: quantise.Int8Linear | None = None

    def to_int8(self) -> None:
        """Turns its kernels and the head into int8."""
        head = self.embedder.embedding if self.untied_head is None else self.untied_head
        self.int8_head = nnx.data(quantise.quantised_head(head[...]))
        self.untied_head = None
        for block in self.blocks:
            for owner, name in (
                *((block.attention, name) for name in ("query", "key", "value", "out")),
                *((block.mlp, name) for name in ("up", "down")),
            ):
                setattr(owner, name, quantise.quantised(getattr(owner, name)))

    def whole(self, ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        """Final, normalised hidden states of whole texts, as `NeoLM.hidden` gives them."""
        x_BTD = self.embedder(ids, None)
        for block, attention_type in zip(self.blocks, self.config.layer_types, strict=True):
            x_BTD = block(x_BTD, attention_type)
        return self.ln_f(x_BTD)

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
        for block, layer in zip(self.blocks, caches, strict=True):
            x_BTD, step = block.remembering(x_BTD, Step(layer, positions, length))
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
    graph: nnx.GraphDef[Any],
    params: Params,
    config: ModelConfig,
    weight_dtype: str,
    *,
    keep: bool = True,
) -> tuple[nnx.GraphDef[Decoder], Params]:
    """The decoder of a model: its structure, and its parameters on their devices.

    Kernels and tables are cast to the type of the activations once, here, or with
    `weight_dtype` "int8" the kernels to int8.

    Args:
      graph: the structure of a NeoLM, or of a Decoder with floating weights.
      params: its parameters.
      config: the model's.
      weight_dtype: "auto" or "int8".
      keep: False empties the tree `params` as its weights are taken out, so that no more
        than one of them is there twice.

    Raises:
      ConfigError: int8 of a model with adapters, or with int8 kernels of its own.
    """
    is_int8, dtype = weight_dtype == "int8", compute_dtype(config)
    if is_int8 and (config.lora_rank or config.kernel_dtype == "int8"):
        raise ConfigError(
            "weight_dtype='int8' takes a model of plain weights; put its adapters into them "
            "first, with neo_jax.lora.merge."
        )
    if not is_in_layers(params):
        # int8 is made from the weights as they are, not as rounded once already.
        into = None if is_int8 else dtype
        graph, params = _in_layers(graph, params, config.num_layers, into, keep=keep)
    if not is_int8:
        return graph, params

    def build(params: Params) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
        decoder = nnx.merge(graph, params)
        decoder.to_int8()
        graph_in_int8, state = nnx.split(decoder)
        return graph_in_int8, state

    @jax.jit
    def weights(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.astype(_kind(path, leaf, dtype)),
            nnx.to_pure_dict(build(params)[1]),
        )

    return jax.eval_shape(build, params)[0], weights(params)


def abstract(config: ModelConfig, weight_dtype: str) -> tuple[nnx.GraphDef[Decoder], Params]:
    """As `prepare`, of a model that is nowhere: shapes and types of its parameters."""

    def build(params: nnx.State) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
        decoder = Decoder(nnx.merge(graph, params))
        if weight_dtype == "int8":
            decoder.to_int8()
        graph_of_decoder, state = nnx.split(decoder)
        return graph_of_decoder, state

    graph, variables = model_graph(config)
    decoder_graph, state = jax.eval_shape(build, variables)
    return decoder_graph, jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.update(dtype=_kind(path, leaf, compute_dtype(config))),
        nnx.to_pure_dict(state),
    )


def is_in_layers(params: Params) -> bool:
    """Whether parameters are a decoder's, and not a model's with stacked layers."""
    return 0 in params["blocks"]


def stacked(params: Params) -> Params:
    """A model's parameters from those of its decoder with floating weights."""
    layers = [params["blocks"][i] for i in range(len(params["blocks"]))]
    return {**params, "blocks": jax.tree.map(lambda *each: jnp.stack(each), *layers)}


def _in_layers(
    graph: nnx.GraphDef[NeoLM],
    params: Params,
    num_layers: int,
    dtype: jnp.dtype | None,
    *,
    keep: bool,
) -> tuple[nnx.GraphDef[Decoder], Params]:
    def build(params: Params) -> nnx.GraphDef[Decoder]:
        return nnx.split(Decoder(nnx.merge(graph, params)))[0]

    decoder_graph = jax.eval_shape(build, params)
    layers: dict[int, Params] = {i: {} for i in range(num_layers)}
    rest: Params = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        *modules, name = (key.key for key in path)
        owner = functools.reduce(operator.getitem, modules, params)
        leaf = owner[name] if keep else owner.pop(name)
        kind = _kind(path, leaf, dtype)
        if modules[:1] == ["blocks"]:
            targets, parts, modules = list(layers.values()), _split(leaf, kind), modules[1:]
        else:
            targets, parts = [rest], [leaf.astype(kind)]
        del leaf
        for target, part in zip(targets, parts, strict=True):
            for module in modules:
                target = target.setdefault(module, {})
            target[name] = part
    return decoder_graph, {**rest, "blocks": layers}


def _kind(
    path: Path, leaf: jax.Array | jax.ShapeDtypeStruct, dtype: jnp.dtype | None
) -> jnp.dtype:
    """The type that decoding keeps a weight in: that of the sum that it goes into."""
    names = [str(key.key) for key in path]
    if dtype is None or leaf.dtype == jnp.int8:
        return leaf.dtype
    if names[-1] == "scale" or any(name.startswith("ln_") for name in names):
        return jnp.promote_types(leaf.dtype, jnp.float32)
    return dtype


@functools.partial(jax.jit, static_argnums=1)
def _split(leaf: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """One array a layer."""
    return [leaf[i].astype(dtype) for i in range(leaf.shape[0])]


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
