"""GPT-Neo: from token ids [batch, seq] to hidden states and logits.

Reads like the network: `NeoLM` embeds tokens and positions, runs its blocks in a loop over
the smallest period of the attention pattern, normalises, and multiplies with the embedding.
Every weight names its dimensions where it is born; sharding.py places them.

Source: EleutherAI/gpt-neo, models/gpt2/gpt2.py (the network and its initial weights);
Hugging Face transformers, models/gpt_neo/modeling_gpt_neo.py (the same network in torch).

Shapes: B batch, T position, D embed, N heads, H head_dim, F mlp, V vocab (padded),
L label.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from neo_jax import attention, int8, lora
from neo_jax.activations import ACTIVATIONS
from neo_jax.config import REMAT_TENSORS, ModelConfig
from neo_jax.sharding import constrain, target

Ids = Int[Array, "batch seq"]
Hidden = Float[Array, "batch seq embed"]


_SUBLANES = 8  # rows of a TPU's register


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The type of activations; "auto" is bfloat16 on accelerators and float32 on the CPU.

    Asked while a program is traced: what it is compiled for decides.
    """
    if config.compute_dtype == "auto":
        return jnp.dtype("float32" if target().platform == "cpu" else "bfloat16")
    return jnp.dtype(config.compute_dtype)


def init_stddevs(config: ModelConfig) -> dict[str, float]:
    """Standard deviation of each kind of weight's initial normal distribution.

    "mtf" is the original's; its query carries the scale that the scores lack. "hf" is
    transformers' `initializer_range`, 0.02 for all, which makes a 2.7B model's queries 11
    times too large to train from.
    """
    if config.initializer == "hf":
        return dict.fromkeys(
            ("embedding", "positions", "query", "key", "value", "out", "up", "down", "head"),
            0.02,
        )
    D = config.embed_dim
    return {
        "embedding": 0.02,
        "positions": 0.01,
        "query": (D * config.head_dim) ** -0.5,
        "key": D**-0.5,
        "value": D**-0.5,
        "out": (config.num_heads * config.head_dim) ** -0.5,
        "up": 0.02,
        "down": 0.02 / config.num_layers**0.5,
        "head": 0.02,
    }


def remat_policy(config: ModelConfig) -> Callable[..., Any]:
    """Which tensors of a period the backward pass finds saved; config/model.py names them."""
    policies = jax.checkpoint_policies
    if config.remat == "full":
        return policies.nothing_saveable
    if config.remat == "minimal":
        return policies.save_only_these_names(*REMAT_TENSORS)
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=config.remat_save,
        names_which_can_be_offloaded=config.remat_offload,
        offload_src="device",
        offload_dst="pinned_host",
    )


def _param(config: ModelConfig, value: Array, names: tuple[str, ...]) -> nnx.Param:
    # Not sharded eagerly: the jitted function that creates the state places it.
    value = value.astype(config.param_dtype)
    return nnx.Param(value, out_sharding=names, eager_sharding=False)


def _normal(
    config: ModelConfig,
    rngs: nnx.Rngs,
    std: float,
    names: tuple[str, ...],
    shape: tuple[int, ...],
) -> nnx.Param:
    return _param(config, std * jax.random.normal(rngs.params(), shape), names)


class LayerNorm(nnx.Module):
    """Normalises over embed; statistics in at least float32."""

    def __init__(self, config: ModelConfig):
        self.eps = config.layer_norm_eps
        self.scale = _param(config, jnp.ones(config.embed_dim), ("embed",))
        self.bias = _param(config, jnp.zeros(config.embed_dim), ("embed",))

    def __call__(self, x: Hidden) -> Hidden:
        float_type = jnp.promote_types(x.dtype, jnp.float32)
        x_BTD = x.astype(float_type)
        centred_BTD = x_BTD - x_BTD.mean(axis=-1, keepdims=True)
        variance_BT1 = jnp.square(centred_BTD).mean(axis=-1, keepdims=True)
        normed_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + self.eps)
        return (normed_BTD * self.scale[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
    """A kernel whose dimensions have names, and a bias over the named output dimensions."""

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        name: str,
        equation: str,
        std: float,
        sizes: dict[str, int],
        bias: str | None = None,
    ):
        self.equation = equation
        kernel = _normal(config, rngs, std, tuple(sizes), tuple(sizes.values()))
        scale: nnx.Param | None = None
        if config.kernel_dtype == "int8":
            kernel, scale = _in_int8(kernel, equation)
        self.kernel, self.kernel_scale = kernel, scale
        self.bias = None if bias is None else _param(config, jnp.zeros(sizes[bias]), (bias,))
        adapted = config.lora_rank and name in config.lora_targets
        self.adapter = (
            lora.Adapter(config, rngs, name=name, equation=equation, sizes=sizes)
            if adapted
            else None
        )

    def __call__(self, x: Array, dropout_keys: lora.RowKeys | None = None) -> Array:
        y = product(self.equation, x, self.kernel[...].astype(x.dtype))
        if self.kernel_scale is not None:
            y = y * self.kernel_scale[...].astype(x.dtype)
        if self.adapter is not None:
            y = y + self.adapter(x, dropout_keys)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _in_int8(kernel: nnx.Param, equation: str) -> tuple[nnx.Param, nnx.Param]:
    """A kernel's values, and the scales of its output channels."""
    _, letters, out = equation.replace("->", ",").split(",")
    summed = [i for i, letter in enumerate(letters) if letter not in out]
    names = kernel.get_metadata()["out_sharding"]
    values, scale = int8.quantise(kernel[...], summed)
    rest = tuple(name for i, name in enumerate(names) if i not in summed)
    return (
        nnx.Param(values, out_sharding=names, eager_sharding=False),
        nnx.Param(scale, out_sharding=rest, eager_sharding=False),
    )


def product(equation: str, x: Array, kernel: Array, **options: Any) -> Array:
    """`jnp.einsum` of activations [batch, seq, …] and a kernel."""
    rows = filled_up(x) if x.shape[:2] == (1, 1) else x
    return jnp.einsum(equation, rows, kernel, **options)[:, : x.shape[1]]


def filled_up(x: Float[Array, "batch seq *any"]) -> Float[Array, "batch more *any"]:
    """With as many places as a TPU's register has rows, where there are fewer, on a TPU.

    XLA leaves the product of one row to the vector unit, which takes four times as long as
    reading the other factor does; with several it goes to the matrix unit.
    """
    missing = _SUBLANES - x.shape[1]
    if missing <= 0 or target().platform != "tpu":
        return x
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])


@runtime_checkable
class Memory(Protocol):
    """What one layer remembers of earlier tokens while text is written, one for each request.

    generate/cache.py implements it.
    """

    def attend(self, query: Array, key: Array, value: Array) -> tuple[Array, Memory]:
        """The queries' context, and the memory with these keys and values in it.

        All are [batch, seq, heads, head_dim].
        """


class Attention(nnx.Module):
    """Multi-head self-attention; only the output projection has a bias."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        std = init_stddevs(config)
        sizes = {
            "embed": config.embed_dim,
            "heads": config.num_heads,
            "head_dim": config.head_dim,
        }
        into_heads = functools.partial(
            Linear, config, rngs, equation="BTD,DNH->BTNH", sizes=sizes
        )
        self.query = into_heads(name="query", std=std["query"])
        self.key = into_heads(name="key", std=std["key"])
        self.value = into_heads(name="value", std=std["value"])
        self.out = Linear(
            config,
            rngs,
            name="out",
            # Heads are G here: einsum contracts in the order of the alphabet, and in another
            # order than the kernel's own it would copy the kernel first.
            equation="BTGH,GHD->BTD",
            std=std["out"],
            sizes={name: sizes[name] for name in ("heads", "head_dim", "embed")},
            bias="embed",
        )
        self.window_size = config.window_size
        self.path = config.attention

    def __call__(
        self,
        x: Hidden,
        attention_type: str,
        segment_ids: Ids | None = None,
        dropout_keys: lora.RowKeys | None = None,
    ) -> Hidden:
        q_BTNH, k_BTNH, v_BTNH = self._heads(x, dropout_keys)
        context_BTNH = attention.attend(
            q_BTNH,
            k_BTNH,
            v_BTNH,
            window=self.window_size if attention_type == "local" else None,
            segment_ids=segment_ids,
            path=self.path,
        )
        return checkpoint_name(self.out(context_BTNH, dropout_keys), "attention_out")

    def remembering(self, x: Hidden, memory: Memory) -> tuple[Hidden, Memory]:
        """Attends to what the memory holds, and to `x`, which it holds from then on."""
        context_BTNH, memory = memory.attend(*self._heads(x))
        return self.out(context_BTNH), memory

    def _heads(self, x: Hidden, dropout_keys: lora.RowKeys | None = None) -> tuple[Array, ...]:
        projections = ("query", self.query), ("key", self.key), ("value", self.value)
        return tuple(
            checkpoint_name(
                constrain(project(x, dropout_keys), "batch", "seq", "heads", None), name
            )
            for name, project in projections
        )


class MLP(nnx.Module):
    """Up to `mlp_dim`, an activation, and down again."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        std = init_stddevs(config)
        D, F = config.embed_dim, config.mlp_dim
        self.up = Linear(
            config,
            rngs,
            name="up",
            equation="BTD,DF->BTF",
            std=std["up"],
            sizes={"embed": D, "mlp": F},
            bias="mlp",
        )
        self.down = Linear(
            config,
            rngs,
            name="down",
            equation="BTF,FD->BTD",
            std=std["down"],
            sizes={"mlp": F, "embed": D},
            bias="embed",
        )
        self.activation = config.activation

    def __call__(self, x: Hidden, dropout_keys: lora.RowKeys | None = None) -> Hidden:
        h_BTF = constrain(self.up(x, dropout_keys), "batch", "seq", "mlp")
        h_BTF = checkpoint_name(h_BTF, "mlp_up")
        return self.down(ACTIVATIONS[self.activation](h_BTF), dropout_keys)


class Block(nnx.Module):
    """One pre-LayerNorm transformer layer, global or local by its caller's word."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config)
        self.attention = Attention(config, rngs)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: Hidden,
        attention_type: str,
        segment_ids: Ids | None = None,
        dropout_keys: lora.RowKeys | None = None,
    ) -> Hidden:
        x = constrain(x, "batch", "seq", None)
        x = x + self.attention(self.ln_1(x), attention_type, segment_ids, dropout_keys)
        return x + self.mlp(self.ln_2(x), dropout_keys)

    def remembering(self, x: Hidden, memory: Memory) -> tuple[Hidden, Memory]:
        """The same layer where earlier tokens are in its memory instead of in `x`."""
        attended, memory = self.attention.remembering(self.ln_1(x), memory)
        x = constrain(x, "batch", "seq", None) + attended
        return x + self.mlp(self.ln_2(x)), memory


class Embedder(nnx.Module):
    """Token and learned position embeddings; the former is also the output head when tied."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        std, D = init_stddevs(config), config.embed_dim
        self.embedding = _normal(
            config, rngs, std["embedding"], ("vocab", "embed"), (config.padded_vocab_size, D)
        )
        self.positions = _normal(
            config, rngs, std["positions"], ("positions", "embed"), (config.max_seq_len, D)
        )
        self.config = config

    def __call__(self, ids: Ids, positions: Ids | None) -> Hidden:
        if positions is None:
            positions = jnp.arange(ids.shape[1])[None]
        dtype = compute_dtype(self.config)
        token_BTD = self.embedding[...].astype(dtype)[ids]
        return token_BTD + self.positions[...].astype(dtype)[positions]


class Classifier(nnx.Module):
    """Scores of labels from one hidden state a text, at least float32; there is no bias."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        # As transformers' initializer_range, however the network began.
        sizes = (config.embed_dim, config.num_labels)
        self.kernel = _normal(config, rngs, 0.02, ("embed", "labels"), sizes)

    def __call__(self, x: Float[Array, "batch embed"]) -> Float[Array, "batch labels"]:
        x_BD = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.einsum("BD,DL->BL", x_BD, self.kernel[...].astype(x_BD.dtype))


class NeoLM(nnx.Module):
    """A GPT-Neo language model.

    `blocks` is one Block whose weights carry a leading `layers` dimension, whether the
    layers are scanned or unrolled, so that checkpoints do not depend on that choice.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedder = Embedder(config, rngs)
        # Not vmap's own transform_metadata, which does nothing unless NNX is in graph mode.
        one_block = nnx.transform_metadata(
            lambda key: Block(config, nnx.Rngs(params=key)), partition="layers"
        )
        create = nnx.vmap(one_block)
        self.blocks = create(jax.random.split(rngs.params(), config.num_layers))
        self.ln_f = LayerNorm(config)
        self.untied_head = (
            None
            if config.tie_embeddings
            else _normal(
                config,
                rngs,
                init_stddevs(config)["head"],
                ("vocab", "embed"),
                (config.padded_vocab_size, config.embed_dim),
            )
        )
        self.classifier = Classifier(config, rngs) if config.num_labels else None

    def hidden(
        self,
        ids: Ids,
        *,
        positions: Ids | None = None,
        segment_ids: Ids | None = None,
        dropout_keys: lora.RowKeys | None = None,
    ) -> Hidden:
        """Final, normalised hidden states.

        Args:
          ids: token ids, at most `max_seq_len` of them in a row.
          positions: row of the position table for each token; left out: 0, 1, 2, …
          segment_ids: tokens attend only within their own segment; padding may be one too.
          dropout_keys: of the adapters' dropout; left out, nothing is dropped.
        """
        if ids.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"{ids.shape[1]} tokens exceed model.max_seq_len={self.config.max_seq_len}."
            )
        x = self.embedder(ids, positions)
        return self.ln_f(self._run_blocks(x, segment_ids, dropout_keys))

    def logits(
        self, ids: Ids, *, positions: Ids | None = None, segment_ids: Ids | None = None
    ) -> Float[Array, "batch seq vocab"]:
        """Scores of the next token, at least float32, over the `vocab_size` real ids.

        Args as `hidden`.
        """
        x_BTD = self.hidden(ids, positions=positions, segment_ids=segment_ids)
        head_VD = self.head[: self.config.vocab_size].astype(x_BTD.dtype)
        float_type = jnp.promote_types(x_BTD.dtype, jnp.float32)
        return jnp.einsum("BTD,VD->BTV", x_BTD, head_VD, preferred_element_type=float_type)

    def labels(self, hidden: Float[Array, "batch embed"]) -> Float[Array, "batch labels"]:
        """Scores of the labels, at least float32; there is a head where `num_labels` > 0.

        Args:
          hidden: final hidden states, one for each text.
        """
        assert self.classifier is not None
        return self.classifier(hidden)

    @property
    def head(self) -> Float[Array, "padded_vocab embed"]:
        """The output matrix: the embedding itself where it is tied."""
        head = self.embedder.embedding if self.untied_head is None else self.untied_head
        return head[...]

    def _run_blocks(
        self, x: Hidden, segment_ids: Ids | None, dropout_keys: lora.RowKeys | None
    ) -> Hidden:
        config = self.config
        period = len(config.attention_types)
        graph, weights = nnx.split(self.blocks)

        def run_period(
            x: Hidden, of_period: tuple[nnx.State, Array | None]
        ) -> tuple[Hidden, None]:
            weights_of_period, number = of_period
            for i, attention_type in enumerate(config.attention_types):
                if i:  # before the first it is the loop's own, and kept by it
                    x = checkpoint_name(x, "residual")
                one_layer = jax.tree.map(lambda w, i=i: w[i], weights_of_period)
                keys = dropout_keys
                if keys is not None and number is not None:
                    keys = lora.layer_keys(keys, number * period + i)
                x = nnx.merge(graph, one_layer)(x, attention_type, segment_ids, keys)
            return x, None

        if config.remat != "none":
            # A scan keeps the compiler from undoing it; unrolled, it has to be told.
            run_period = jax.checkpoint(
                run_period,
                policy=remat_policy(config),
                prevent_cse=not config.scan_layers,
            )
        # [layers, …] → [periods, period, …]: the layout of checkpoints knows no period.
        weights = jax.tree.map(lambda w: w.reshape(-1, period, *w.shape[1:]), weights)
        count = config.num_layers // period
        numbers = None if dropout_keys is None else jnp.arange(count)
        if config.scan_layers:
            return jax.lax.scan(run_period, x, (weights, numbers))[0]
        for i in range(count):
            x, _ = run_period(x, jax.tree.map(lambda w, i=i: w[i], (weights, numbers)))
        return x
