"""Options of the compiler that are seen in its programs."""

import jax
import jax.numpy as jnp
from flax import nnx

from neo_jax import sharding, state, xla_flags
from neo_jax.config import ModelConfig


def test_a_forward_pass_converts_one_layers_bfloat16_weights_at_a_time():
    config = ModelConfig(
        num_layers=8, embed_dim=128, num_heads=4, vocab_size=200, param_dtype="bfloat16"
    )
    graph, params = state.model_graph(config)
    run = jax.jit(
        lambda params, ids: nnx.merge(graph, params).logits(ids),
        compiler_options=xla_flags.forward_options(config, sharding.target()),
    )
    used = run.lower(params, jax.ShapeDtypeStruct((1, 8), jnp.int32)).compile()
    memory = used.memory_analysis()
    # All layers at once would take twice what the arguments do.
    assert memory.temp_size_in_bytes < memory.argument_size_in_bytes


def test_nothing_is_asked_where_nothing_is_converted():
    for platform, dtype in (("cpu", "float32"), ("tpu", "bfloat16")):
        target = sharding.Target(platform, "")
        assert not xla_flags.forward_options(ModelConfig(param_dtype=dtype), target)
