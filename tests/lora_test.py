"""Adapters are peft's, alone learn, and leave nothing behind once they are merged."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from neo_jax import lora, optimizer, sharding, state, train, trainable
from neo_jax.config import ConfigError, FinetuneConfig, MeshConfig, build, preset_model
from neo_jax.state import Params
from tests.train_test import assert_close, ragged_batch, tiny

ALL = ("query", "key", "value", "out", "up", "down")
LORA = FinetuneConfig(trainable="lora")
CONFIG = tiny(
    model={"lora_rank": 4, "lora_alpha": 8.0, "lora_targets": ALL},
    finetune={"trainable": "lora"},
)


@functools.cache
def fresh_params() -> Params:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return jax.device_get(state.create_params(CONFIG.model, mesh, 0))


def some_params() -> Params:
    """Of a model whose adapters have learned something."""
    params = jax.tree.map(jnp.asarray, fresh_params())
    flat = traverse_util.flatten_dict(params)
    for number, (path, leaf) in enumerate(flat.items()):
        if path[-2:] == ("adapter", "b"):
            flat[path] = 0.3 * jax.random.normal(jax.random.key(number), leaf.shape)
    return traverse_util.unflatten_dict(flat)


def logits(params: Params, model: Any) -> jax.Array:
    graph, _ = state.model_graph(model)
    ids = jnp.asarray(ragged_batch()["inputs"])
    return jax.jit(lambda params: nnx.merge(graph, params).logits(ids))(params)


def test_fresh_adapters_change_nothing_and_merged_ones_give_the_same_logits() -> None:
    fresh = fresh_params()
    merged, plain = lora.merge(fresh, CONFIG.model)
    np.testing.assert_array_equal(logits(fresh, CONFIG.model), logits(merged, plain))
    params = some_params()
    merged, plain = lora.merge(params, CONFIG.model)
    ours, theirs = logits(params, CONFIG.model), logits(merged, plain)
    assert jnp.abs(ours - logits(fresh, CONFIG.model)).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))


def test_only_named_linears_get_adapters() -> None:
    model = dataclasses.replace(CONFIG.model, lora_targets=("value", "down"))
    _, params = state.model_graph(model)
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(params))
    assert {path[-3] for path in flat if path[-2] == "adapter"} == {"value", "down"}


@pytest.mark.parametrize("name", ["neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b"])
def test_rank_8_adapters_are_less_than_a_hundredth_of_the_model(name: str) -> None:
    _, params = state.model_graph(preset_model(name, lora_rank=8))
    learned, frozen = trainable.divide(nnx.to_pure_dict(params), LORA)
    share = state.num_bytes(learned) / state.num_bytes(frozen)
    assert 0 < share < 0.01


def gradients(config: Any, devices: int) -> tuple[Params, Any]:
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    graph, _ = state.model_graph(config.model)
    whole = some_params()
    with jax.set_mesh(mesh):
        places = jax.tree.map(
            lambda leaf: leaf.sharding, state.abstract_params(config.model, mesh)
        )
        params = jax.device_put(whole, places)
        batch = train.place_batch(ragged_batch(), mesh, config.data.batch_size)
        keys = lora.row_keys(0, jnp.asarray(3), config.data.batch_size)
        learned, frozen = trainable.divide(params, LORA)
        return jax.jit(
            lambda learned, frozen, batch: train.gradients(
                learned, graph, config, {**batch, train.DROPOUT: keys}, frozen=frozen
            )
        )(learned, frozen, batch)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_devices_and_slices_change_neither_gradients_nor_what_is_dropped(
    dropout: float,
) -> None:
    def changed(**sections: dict[str, Any]) -> Any:
        tree = dataclasses.asdict(CONFIG)
        tree["model"]["lora_dropout"] = dropout
        for name, changes in sections.items():
            tree[name] |= changes
        return build(tree)

    grads, losses = gradients(changed(), 1)
    for other in (
        changed(mesh={"fsdp": 2, "tensor": 2, "data": 2}),
        changed(train={"accumulation_steps": 4}, model={"remat": "full"}),
    ):
        ours, sums = gradients(other, 8 if other.mesh.tensor == 2 else 1)
        assert_close(ours, grads, 1e-5)
        np.testing.assert_allclose(sums.nll, losses.nll, rtol=1e-5)


def test_dropout_differs_by_row_step_layer_and_linear_and_keeps_the_mean() -> None:
    keys = lora.row_keys(0, jnp.asarray(1), 3)
    assert len({tuple(key) for key in np.asarray(keys).tolist()}) == 3
    assert not np.array_equal(keys, lora.row_keys(0, jnp.asarray(2), 3))
    assert not np.array_equal(lora.layer_keys(keys, 0), lora.layer_keys(keys, 1))
    model = dataclasses.replace(CONFIG.model, lora_dropout=0.25)
    sizes = {"embed": 32, "mlp": 128}
    adapters = [
        lora.Adapter(model, nnx.Rngs(0), name=name, equation="BTD,DF->BTF", sizes=sizes)
        for name in ("up", "other")
    ]
    x = jnp.ones((3, 500, 32))
    one, other = (adapter._dropped(x, keys) for adapter in adapters)
    assert not np.array_equal(one, other)
    assert set(np.unique(one).tolist()) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(one.mean()) - 1) < 0.01


def test_a_step_moves_the_adapters_alone() -> None:
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.build(CONFIG.optimizer, 9)
    graph, _ = state.model_graph(CONFIG.model)
    learned, frozen = trainable.divide(some_params(), LORA)
    before = jax.tree.map(np.asarray, learned)
    begun = state.begin(learned, state.abstract(CONFIG.model, mesh, tx, LORA), tx)
    step = jax.jit(functools.partial(train.train_step, graph=graph, config=CONFIG, tx=tx))
    after, metrics = step(begun, ragged_batch(), frozen)
    assert jnp.isfinite(metrics["loss"])
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
def test_int8_kernels_are_near_and_stay_int8_in_the_step() -> None:
    model = dataclasses.replace(CONFIG.model, kernel_dtype="int8")
    config = dataclasses.replace(CONFIG, model=model)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    like = state.abstract_params(model, mesh)
    params = some_params()
    exact = logits(params, CONFIG.model)
    coarse = lora.with_int8_kernels(jax.tree.map(jnp.copy, params), like)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), coarse) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    error = float(jnp.abs(logits(coarse, model) - exact).max())
    assert 0 < error < 0.05 * float(jnp.abs(exact).max())
    merged, plain = lora.merge(coarse, model)
    np.testing.assert_allclose(logits(merged, plain), logits(coarse, model), atol=1e-4)
    graph, _ = state.model_graph(model)
    learned, frozen = trainable.divide(coarse, LORA)
    grads, _ = jax.jit(lambda a, b, c: train.gradients(a, graph, config, c, frozen=b))(
        learned, frozen, ragged_batch()
    )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_adapters_merge_into_int8_kernels_in_float32_and_stay_unrounded() -> None:
    model = dataclasses.replace(CONFIG.model, kernel_dtype="int8")
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    like = state.abstract_params(model, mesh)
    coarse = lora.with_int8_kernels(some_params(), like)
    linear = coarse["blocks"]["mlp"]["up"]
    assert {leaf.dtype for leaf in linear["adapter"].values()} == {jnp.dtype("float32")}
    merged, plain = lora.merge(coarse, model)
    assert (plain.kernel_dtype, plain.lora_rank) == ("param", 0)
    values, scale, a, b = (
        np.asarray(x, np.float64)
        for x in (linear["kernel"], linear["kernel_scale"], *map(linear["adapter"].get, "ab"))
    )
    rank_times = model.lora_alpha / model.lora_rank
    expected = values * scale[:, None] + rank_times * np.einsum("lir,lro->lio", a, b)
    kernel = merged["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"lora_rank": -1}}, "model.lora_rank=-1 must not be negative"),
        ({"model": {"lora_dropout": 1.0}}, "model.lora_dropout=1.0 must be at least 0"),
        ({"model": {"lora_targets": ("qeury",)}}, "'qeury' is unknown, did you mean 'query'?"),
        ({"model": {"lora_rank": 4}}, "a rank goes with 'lora', and only with it"),
        ({"finetune": {"trainable": "lora"}}, "a rank goes with 'lora', and only with it"),
        ({"model": {"kernel_dtype": "int8"}}, "model.kernel_dtype='int8' cannot be learned"),
        (
            {"model": {"kernel_dtype": "int8"}, "finetune": {"trainable": "last_layers"}},
            "set finetune.trainable='lora', not 'last_layers'",
        ),
    ],
)
def test_contradictions_are_told_in_one_line(sections: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**sections)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
