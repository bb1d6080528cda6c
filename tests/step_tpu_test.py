"""What the TPU compiler makes of a whole step: what is sent, and that it is no logits."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import tpu_compiler
from neo_jax import config as config_lib
from neo_jax import optimizer, sharding, state, train, xla_flags

BATCH, SEQ, BLOCK, ROWS = 8, 512, 256, 1408


def collectives(mesh: dict[str, int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Kind, type and shape of what each collective of a small step gives."""
    tree = config_lib.default_config()
    tree.model.update(num_layers=4, embed_dim=512, num_heads=4, vocab_size=1400)
    tree.model.update(max_seq_len=SEQ, remat="minimal")
    tree.data.update(batch_size=BATCH, seq_len=SEQ)
    tree.loss.update(block_size=BLOCK, z_loss=1e-4)
    tree.mesh.update(mesh)
    config = config_lib.build(tree)
    over = tpu_compiler.mesh("v5e:2x2", config.mesh)
    tx = optimizer.build(config.optimizer, 10)
    graph, _ = state.model_graph(config.model)
    abstract = state.abstract(config.model, over, tx)
    place = sharding.batch_sharding(over, (BATCH, SEQ))
    ids = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.int32, sharding=place)
    weights = jax.ShapeDtypeStruct((BATCH, SEQ), jnp.float32, sharding=place)
    with jax.set_mesh(over):
        step = jax.jit(
            functools.partial(train.train_step, graph=graph, config=config, tx=tx),
            donate_argnums=0,
            compiler_options=xla_flags.options(sharding.target(), slices=1),
        )
        batch = {"inputs": ids, "targets": ids, "weights": weights}
        text = step.lower(abstract, batch).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return [
        (kind, dtype, tuple(int(n) for n in dims.split(",") if n))
        for results, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", results)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_step_sends_weights_layer_by_layer_and_no_logits(mesh):
    sent = collectives(mesh)
    rows = ROWS // mesh.get("tensor", 1)
    for kind, dtype, shape in sent:
        # The head and its gradient have the vocabulary's rows; logits have tokens, too.
        assert rows not in shape or len(shape) == 2, shape
        if kind == "all-gather" and len(shape) > 3:
            assert shape[0] == 1, f"{shape}: more than one layer's weights at once"
            assert dtype == "bf16", f"{shape}: weights travel in 16 bits"
    assert any(kind == "all-gather" and len(shape) > 3 for kind, _, shape in sent)
