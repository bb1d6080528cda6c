"""A state is the same numbers on any mesh, each where `abstract` says it will be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neo_jax import optimizer, sharding, state
from neo_jax.config import ConfigError, MeshConfig, ModelConfig, OptimizerConfig, preset_model

MODEL = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    vocab_size=200,
    max_seq_len=48,
)
TX = optimizer.build(OptimizerConfig(), 10)


def one_device():
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def alone() -> state.TrainState:
    return state.create(MODEL, one_device(), TX, seed=3)


def test_a_fresh_state_has_made_no_step(alone):
    assert alone.step.dtype == jnp.int32 and int(alone.step) == 0
    moments = [leaf for leaf in jax.tree.leaves(alone.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(alone.params))
    assert not any(leaf.any() for leaf in moments)
    # Every kernel and table is drawn, and no two layers alike.
    kernel = np.asarray(alone.params["blocks"]["mlp"]["up"]["kernel"])
    assert kernel.shape[0] == 2 and kernel.std() > 0
    assert not any((kernel[0] == layer).all() for layer in kernel[1:])


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}],
    ids=str,
)
def test_eight_devices_draw_the_bits_of_one_and_keep_their_own_part(sizes, alone):
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    created = state.create(MODEL, mesh, TX, seed=3)
    abstract = state.abstract(MODEL, mesh, TX)
    assert jax.tree.structure(created) == jax.tree.structure(abstract)
    jax.tree.map(np.testing.assert_array_equal, created, alone)

    def check(path, leaf, wanted):
        name = jax.tree_util.keystr(path)
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype), name
        assert leaf.sharding.mesh == wanted.sharding.mesh == mesh, name
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), name

    jax.tree_util.tree_map_with_path(check, created, abstract)
    kernel = created.params["blocks"]["mlp"]["up"]["kernel"]
    # The mesh's data axis alone copies parameters.
    parts = {str(part.index) for part in kernel.addressable_shards}
    assert len(parts) == 8 // mesh.shape["data"]


def test_moments_lie_beside_their_parameters_and_counts_are_everywhere(mesh):
    abstract = state.abstract(MODEL, mesh, TX)
    (adam,) = [s for s in abstract.opt_state if isinstance(s, optax.ScaleByAdamState)]
    for moment in (adam.mu, adam.nu):
        assert jax.tree.structure(moment) == jax.tree.structure(abstract.params)
        jax.tree.map(check_same_place, moment, abstract.params)
    assert abstract.step.sharding.is_fully_replicated
    assert adam.count.sharding.is_fully_replicated


def check_same_place(moment, param):
    assert (moment.shape, moment.sharding) == (param.shape, param.sharding)


def test_another_seed_draws_every_parameter_anew(alone):
    other = state.create(MODEL, one_device(), TX, seed=4)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(alone.params), jax.tree.leaves(other.params), strict=True
    ):
        constant = path[-1].key in ("bias", "scale")
        assert np.array_equal(a, b) == constant, path


def test_what_is_drawn_does_not_depend_on_how_it_is_computed(alone):
    how = dataclasses.replace(MODEL, scan_layers=False, remat="full", attention="reference")
    created = state.create(how, one_device(), TX, seed=3)
    jax.tree.map(np.testing.assert_array_equal, created, alone)


def test_a_mesh_that_does_not_fit_is_refused_before_any_memory():
    mesh = sharding.make_mesh(MeshConfig(tensor=8))
    for make in (state.abstract, lambda *args: state.create(*args, seed=0)):
        with pytest.raises(ConfigError, match=r"heads=20 does not divide over tensor=8; use"):
            make(preset_model("neo_2p7b"), mesh, TX)


def test_parameters_are_counted_without_the_padding():
    assert (MODEL.vocab_size, MODEL.padded_vocab_size) == (200, 256)
    by_hand = 2 * (12 * 32**2 + 10 * 32) + (200 + 48 + 2) * 32
    assert state.num_params(MODEL) == by_hand
    untied = dataclasses.replace(MODEL, tie_embeddings=False)
    assert state.num_params(untied) == by_hand + 200 * 32
    finer = dataclasses.replace(MODEL, vocab_multiple=1)
    assert state.num_params(finer) == by_hand
    _, params = state.model_graph(finer)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == by_hand


def test_bytes_are_those_of_all_devices_together_with_copies_once(alone, mesh):
    parameters = state.num_params(MODEL) + 56 * 32  # the padding takes room, too
    counts = 4 * len([x for x in jax.tree.leaves(TX.init({"x": jnp.ones(1)})) if not x.ndim])
    for tree in (alone, state.abstract(MODEL, mesh, TX)):
        assert state.num_bytes(tree.params) == 4 * parameters
        spikes = 4 * (2 * (128 + 1) + 3)
        assert state.num_bytes(tree) == 3 * 4 * parameters + counts + 4 + spikes
    half = dataclasses.replace(MODEL, param_dtype="bfloat16")
    assert state.num_bytes(state.abstract(half, mesh, TX).params) == 2 * parameters
    assert state.num_bytes({}) == 0
