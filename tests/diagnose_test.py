"""The first tensor that is not finite is named, in the order of the step's arithmetic."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax import diagnose, optimizer, sharding, state
from tests.train_test import ragged_batch, tiny

CONFIG = tiny()


@pytest.fixture(scope="module")
def params() -> Any:
    """Any, without compiling what would draw them properly."""
    mesh = sharding.make_mesh(CONFIG.mesh, jax.devices()[:1])
    shapes = state.abstract(CONFIG.model, mesh, optimizer.build(CONFIG.optimizer, 1)).params
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 10, x.dtype), shapes)


def ask(params: Any, batch: Any, config: Any = CONFIG) -> str:
    graph, _ = state.model_graph(config.model)
    return diagnose.first_not_finite(params, graph, config, jax.tree.map(jnp.asarray, batch))


def changed(params: Any, name: str, change: Any) -> Any:
    """The parameters, one of them changed."""

    def put(path: Any, x: jax.Array) -> jax.Array:
        is_it = jax.tree_util.keystr(path, simple=True, separator=".") == name
        return change(x) if is_it else x

    return jax.tree_util.tree_map_with_path(put, params)


def test_a_parameter_with_its_layer(params) -> None:
    bad = changed(params, "blocks.mlp.up.kernel", lambda x: x.at[1, 2, :3].set(jnp.nan))
    assert ask(bad, ragged_batch()) == (
        "parameter blocks.mlp.up.kernel of layer 1 is the first that is not finite (3 values)"
    )


def test_an_activation_that_overflows_before_the_loss(params) -> None:
    """Finite weights, whose products are not: named where it happens, not where it ends."""
    big = changed(params, "blocks.mlp.down.kernel", lambda x: x.at[1].set(3e38))
    told = ask(big, ragged_batch())
    assert told.startswith("the output of layer 1's mlp is the first that is not finite (")


@pytest.mark.slow
def test_a_loss_whose_activations_are_finite(params) -> None:
    batch = {**ragged_batch()}
    batch["weights"] = np.full_like(batch["weights"], np.inf)
    assert ask(params, batch).startswith("the loss is the first that is not finite")


@pytest.mark.slow
def test_a_gradient_nearest_to_the_loss(params, monkeypatch) -> None:
    """The forward pass is finite; of two bad gradients the upper layer's came first."""

    def gradients(params: Any, *_: Any) -> Any:
        grads = jax.tree.map(jnp.zeros_like, params)
        bad = functools.partial(changed, change=lambda x: x.at[:, 0].set(jnp.inf))
        return bad(grads, "blocks.ln_1.bias"), None

    monkeypatch.setattr(diagnose.train, "gradients", gradients)
    told = ask(params, ragged_batch())
    assert told.startswith("the gradient of blocks.ln_1.bias of layer 1 is the first that")


@pytest.mark.slow
def test_nothing_to_find_is_said(params, monkeypatch) -> None:
    monkeypatch.setattr(
        diagnose.train, "gradients", lambda p, *_: (jax.tree.map(jnp.zeros_like, p), None)
    )
    assert ask(params, ragged_batch()).endswith("all finite when computed once more")
