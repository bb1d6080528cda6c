"""The step is arithmetic: slices, devices and precision leave the update what it is."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from neo_jax import config as config_lib
from neo_jax import optimizer, sharding, state, train
from neo_jax.config import Config, MeshConfig
from neo_jax.state import TrainState

BATCH, SEQ, VOCAB = 8, 24, 60


def tiny(**sections: dict[str, Any]) -> Config:
    tree = config_lib.default_config()
    tree.model.update(
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        window_size=5,
        vocab_size=VOCAB,
        vocab_multiple=64,
        max_seq_len=SEQ,
    )
    tree.data.update(batch_size=BATCH, seq_len=SEQ)
    tree.optimizer.update(learning_rate=1e-4, warmup_steps=0, eps=1e-6)
    tree.loss.block_size = 10  # does not divide SEQ
    for name, changes in sections.items():
        tree[name].update(changes)
    return config_lib.build(tree)


def ragged_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Sequences of different lengths, so that no two slices weigh the same."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (BATCH, SEQ + 1)).astype(np.int32)
    lengths = rng.integers(1, SEQ + 1, BATCH)
    weights = (np.arange(SEQ) < lengths[:, None]).astype(np.float32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}


@functools.cache
def start(config: Config, devices: int = 1) -> tuple[jax.sharding.Mesh, TrainState, Any]:
    """A mesh, a fresh state on it, and the compiled step."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    graph, _ = state.model_graph(config.model)
    with jax.set_mesh(mesh):
        fresh = state.create(config.model, mesh, tx, config.train.seed)
    step = functools.partial(train.train_step, graph=graph, config=config, tx=tx)
    return mesh, fresh, jax.jit(step)


def run_steps(
    config: Config, num_steps: int, devices: int = 1, batches: Any = ragged_batch
) -> tuple[TrainState, list[float]]:
    """A state after some steps, and their losses."""
    mesh, current, step = start(config, devices)
    losses = []
    with jax.set_mesh(mesh):
        for number in range(num_steps):
            batch = train.place_batch(batches(number), mesh, BATCH)
            current, metrics = step(current, batch)
            losses.append(float(metrics["loss"]))
    return jax.device_get(current), losses


def assert_close(ours: Any, theirs: Any, scale: float) -> None:
    """Within `scale` of the largest entry of each tensor."""

    def check(path: Any, a: np.ndarray, b: np.ndarray) -> None:
        atol = scale * max(np.abs(b).max(), 1e-30)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, ours, theirs)


def assert_equal_updates(ours: TrainState, theirs: TrainState) -> None:
    """Two updates move each weight by up to 2e-4; they agree within a twentieth of that.

    Not tighter: Adam divides a gradient by its own size, so one that is rounding error
    itself still moves its weight.
    """
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
        ours.params,
        theirs.params,
    )


@functools.cache
def gradients(config: Config, devices: int = 1) -> tuple[Any, Any]:
    """Of the first batch, from a fresh state, on a mesh of some devices."""
    graph, _ = state.model_graph(config.model)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    tx = optimizer.build(config.optimizer, 1)
    with jax.set_mesh(mesh):
        params = state.create(config.model, mesh, tx, 0).params
        batch = train.place_batch(ragged_batch(), mesh, BATCH)
        result = jax.jit(lambda p, b: train.gradients(p, graph, config, b))(params, batch)
    return jax.device_get(result)


@pytest.mark.parametrize(
    "slices", [pytest.param(n, marks=pytest.mark.slow) for n in (2, 8)] + [4]
)
def test_accumulated_slices_are_one_batch_even_when_ragged(slices: int) -> None:
    whole = gradients(tiny())
    parts = gradients(tiny(train={"accumulation_steps": slices}))
    assert_close(parts, whole, 1e-5)


def test_the_loss_is_the_mean_over_weighted_tokens() -> None:
    config = tiny()
    graph, _ = state.model_graph(config.model)
    _, losses = gradients(config)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.build(config.optimizer, 1)
    params = state.create(config.model, mesh, tx, 0).params
    batch = ragged_batch()
    logp = jax.nn.log_softmax(nnx.merge(graph, params).logits(jnp.asarray(batch["inputs"])))
    nll = -np.take_along_axis(np.asarray(logp), batch["targets"][..., None], -1)[..., 0]
    expected = (nll * batch["weights"]).sum() / batch["weights"].sum()
    assert float(losses.nll) == pytest.approx(float(expected), rel=1e-5)


def one_step(config: Config, devices: int) -> tuple[Any, Any, Any]:
    """Gradients, mean losses, and the parameters after an update."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    graph, _ = state.model_graph(config.model)

    def step(current: TrainState, batch: Any) -> tuple[Any, Any, Any]:
        grads, losses = train.gradients(current.params, graph, config, batch)
        norm = optimizer.global_norm(grads)
        updates, _ = tx.update(grads, current.opt_state, current.params, grad_norm=norm)
        return grads, losses, optax.apply_updates(current.params, updates)

    with jax.set_mesh(mesh):
        current = state.create(config.model, mesh, tx, config.train.seed)
        batch = train.place_batch(ragged_batch(), mesh, BATCH)
        return jax.device_get(jax.jit(step)(current, batch))


@functools.cache
def one_device_step() -> tuple[Any, Any, Any]:
    return one_step(tiny(), 1)


ALL_AT_ONCE = {
    "mesh": {"fsdp": 2, "tensor": 2, "context": 2},
    "train": {"accumulation_steps": 2, "gather_weights": "step"},
    "model": {"remat": "custom", "remat_save": ("query", "residual"), "attention": "splash"},
}


# Three of them stand for all in the default suite.
WAYS = [
    ALL_AT_ONCE,
    {"mesh": "hybrid"},
    {"model": {"remat": "minimal"}, "mesh": {"fsdp": 1}},
    *(
        pytest.param(sections, marks=pytest.mark.slow)
        for sections in (
            *({"mesh": name} for name in config_lib.MESH_PRESETS if name != "hybrid"),
            {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "train": {"accumulation_steps": 2}},
            {"model": {"scan_layers": False}, "mesh": {"fsdp": 1}},
            {"model": {"remat": "full"}, "mesh": {"fsdp": 1}},
            {"model": {"scan_layers": False, "remat": "minimal"}, "mesh": {"fsdp": 1}},
        )
    ),
]


@pytest.mark.parametrize("sections", WAYS, ids=str)
def test_every_way_of_computing_a_step_is_one_devices(sections: dict[str, Any]) -> None:
    """Losses, gradients and updates: for each mesh, remat policy, slices, and all at once."""
    mesh = sections["mesh"]
    if isinstance(mesh, str):
        mesh = config_lib.mesh_preset(mesh).to_dict()
        # Simulated devices do not say in how many slices they lie.
        mesh["slices"] = 2 if mesh["slices"] == -1 else 1
    config = tiny(**{**sections, "mesh": mesh})
    grads, losses, params = one_step(config, 1 if mesh == {"fsdp": 1} else 8)
    expected_grads, expected_losses, expected_params = one_device_step()
    assert_close(grads, expected_grads, 1e-5)
    assert_close(losses, expected_losses, 1e-5)
    # As absolute numbers: the rate is 1e-4.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5),
        params,
        expected_params,
    )


def test_two_runs_are_equal_to_the_digit() -> None:
    first = run_steps(tiny(), 4)[1]
    start.cache_clear()  # the second compiles for itself
    assert run_steps(tiny(), 4)[1] == first


def markov_batch(number: int) -> dict[str, np.ndarray]:
    """Fresh text of one fixed language: each token allows four next ones."""
    allowed = np.random.default_rng(0).integers(0, VOCAB, (VOCAB, 4))
    rng = np.random.default_rng([1, number])
    ids = np.zeros((BATCH, SEQ + 1), np.int32)
    ids[:, 0] = rng.integers(0, VOCAB, BATCH)
    for at in range(SEQ):
        ids[:, at + 1] = allowed[ids[:, at], rng.integers(0, 4, BATCH)]
    weights = np.ones((BATCH, SEQ), np.float32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "weights": weights}


@pytest.mark.slow
def test_bfloat16_stays_within_one_percent_of_float32_over_100_steps() -> None:
    def losses_of(dtype: str) -> np.ndarray:
        config = tiny(
            model={"compute_dtype": dtype},
            optimizer={"learning_rate": 3e-3, "eps": 1e-8, "schedule": "constant"},
        )
        return np.array(run_steps(config, 100, batches=markov_batch)[1])

    full, half = losses_of("float32"), losses_of("bfloat16")
    assert full[-1] < 0.8 * full[0], "the model must learn, or agreement means nothing"
    np.testing.assert_allclose(half, full, rtol=0.01)


def test_a_step_reports_the_rate_it_used() -> None:
    config = tiny(optimizer={"warmup_steps": 4, "learning_rate": 1e-2})
    _, fresh, step = start(config)
    after, metrics = step(fresh, jax.tree.map(jnp.asarray, ragged_batch()))
    assert float(metrics["learning_rate"]) == pytest.approx(1e-2 / 4)
    assert int(after.step) == 1
    # Adam's first direction has entries of ±1, decay adds a little.
    moved = np.abs(np.asarray(after.params["ln_f"]["scale"]) - 1).max()
    assert moved == pytest.approx(1e-2 / 4, rel=0.01)


def test_without_weights_nothing_is_divided_by_zero() -> None:
    config = tiny()
    nothing = {**ragged_batch(), "weights": np.zeros((BATCH, SEQ), np.float32)}
    after, losses = run_steps(config, 1, batches=lambda _: nothing)
    assert losses == [0.0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


# --------------------------------------------------------------------------------- spikes


def test_a_spike_leaves_parameters_moments_and_count_untouched() -> None:
    """Of a loss that is no number, and of a finite one above a window of low ones."""
    config = tiny(optimizer={"schedule": "cosine", "warmup_steps": 4})
    _, fresh, step = start(config)
    good = jax.tree.map(jnp.asarray, ragged_batch())
    bad = {**good, "weights": good["weights"].at[0, 0].set(jnp.nan)}
    before, _ = step(fresh, good)

    low = 1 + 0.01 * (-1.0) ** np.arange(optimizer.SPIKE_WINDOW)
    usual = optimizer.Recent(jnp.asarray(low, jnp.float32), jnp.asarray(low.size, jnp.int32))
    warned = dataclasses.replace(before, spikes=before.spikes._replace(loss=usual))
    for earlier, batch, finite in ((before, bad, False), (warned, good, True)):
        after, metrics = step(earlier, batch)
        assert np.isfinite(float(metrics["loss"])) == finite
        for untouched in ("params", "opt_state"):
            jax.tree.map(
                np.testing.assert_array_equal,
                getattr(after, untouched),
                getattr(earlier, untouched),
            )
        assert int(after.step) == int(earlier.step) + 1
        assert (int(metrics["skipped"]), int(metrics["non_finite"])) == (1, int(not finite))
        assert int(metrics["skipped_in_a_row"]) == 1
        # A finite value is remembered though its update is not made.
        assert int(after.spikes.loss.seen) == int(earlier.spikes.loss.seen) + finite
        # The next update takes up the schedule where it stood, and is made.
        _, metrics = step(after, good)
        rate = optimizer.schedule(config.optimizer, config.train.num_steps)(1)
        assert float(metrics["learning_rate"]) == pytest.approx(float(rate))
