"""What is learned and what is frozen: two trees that are one model, in the step as outside."""

from typing import Any

import jax
import numpy as np
import pytest

from neo_jax import optimizer, sharding, state, train, trainable
from neo_jax.config import FinetuneConfig, MeshConfig
from tests.train_test import assert_close, ragged_batch, tiny

LAST = FinetuneConfig(trainable="last_layers", last_layers=1)
CONFIG = tiny()
TX = optimizer.build(CONFIG.optimizer, 9)


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def test_the_parts_are_the_whole_again() -> None:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = state.create_params(CONFIG.model, mesh, seed=0)
    learned, frozen = trainable.divide(params, LAST)
    jax.tree.map(np.testing.assert_array_equal, trainable.join(learned, frozen), params)
    assert set(learned) == {"blocks", "ln_f"}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(learned["blocks"])} == {1}
    assert trainable.divide(params, FinetuneConfig()) == (params, {})


@pytest.mark.parametrize("mesh_sizes", [{}, {"fsdp": 4, "tensor": 2}])
def test_learned_parts_get_the_gradients_that_they_get_in_the_whole(
    mesh_sizes: dict[str, int],
) -> None:
    mesh = sharding.make_mesh(
        MeshConfig(**mesh_sizes), jax.devices()[: 8 if mesh_sizes else 1]
    )
    graph, _ = state.model_graph(CONFIG.model)
    with jax.set_mesh(mesh):
        params = state.create_params(CONFIG.model, mesh, seed=0)
        batch = train.place_batch(ragged_batch(), mesh, CONFIG.data.batch_size)

        @jax.jit
        def both(params: Any, batch: Any) -> Any:
            whole, _ = train.gradients(params, graph, CONFIG, batch)
            learned, frozen = trainable.divide(params, LAST)
            some, _ = train.gradients(learned, graph, CONFIG, batch, frozen=frozen)
            return trainable.divide(whole, LAST)[0], some

        whole, some = both(params, batch)
    assert_close(some, whole, 1e-6)


def test_the_state_has_moments_of_the_learned_alone() -> None:
    mesh = sharding.make_mesh(MeshConfig(fsdp=8), jax.devices())
    like = state.abstract(CONFIG.model, mesh, TX, LAST)
    params = state.create_params(CONFIG.model, mesh, 0, LAST)
    begun = state.begin(params, like, TX)
    assert shapes(begun) == shapes(like)
    for ours, theirs in zip(jax.tree.leaves(begun), jax.tree.leaves(like), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    everything = state.abstract(CONFIG.model, mesh, TX)
    assert state.num_bytes(like.opt_state) < 0.6 * state.num_bytes(everything.opt_state)
