"""What was saved comes back: to the bit, on any mesh, with the data's position."""

import dataclasses
import functools
import json
import os
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax import checkpoint, optimizer, sharding, state, train
from neo_jax.checkpoint import Checkpointer, CheckpointError, folder
from neo_jax.checkpoint.folder import Folder
from neo_jax.config import CheckpointConfig, Config, ConfigError, MeshConfig
from neo_jax.state import TrainState
from tests.train_test import BATCH, ragged_batch, tiny

ANY = CheckpointConfig()


def fresh(config: Config, devices: int) -> tuple[Any, Any, TrainState]:
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    return mesh, tx, state.create(config.model, mesh, tx, config.train.seed)


def go_on(config: Config, mesh, tx, current, steps: range) -> tuple[TrainState, list[float]]:
    graph, _ = state.model_graph(config.model)
    step = jax.jit(functools.partial(train.train_step, graph=graph, config=config, tx=tx))
    losses = []
    with jax.set_mesh(mesh):
        for number in steps:
            batch = train.place_batch(ragged_batch(number), mesh, BATCH)
            current, metrics = step(current, batch)
            losses.append(float(metrics["loss"]))
    return current, losses


def restore(workdir: pathlib.Path, wanted: Any) -> tuple[Any, dict[str, Any]]:
    """The newest good checkpoint and what was noted beside it."""
    with Checkpointer(workdir, ANY) as saved:
        step = saved.newest_good()
        return saved.read(step, wanted), saved.meta(step)


def small(seed: int = 0, size: int = 2000) -> dict[str, Any]:
    """Parameters of nobody, which need no compilation."""
    rng = np.random.default_rng(seed)
    return {"params": {"a": {"kernel": jnp.asarray(rng.normal(size=(size // 100, 100)))}}}


def steps_in(workdir: pathlib.Path) -> list[int]:
    return Folder.of(workdir).steps()


def shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


# ------------------------------------------------------------------------------ come back


@pytest.mark.slow
def test_four_steps_are_two_a_restart_and_two(tmp_path: pathlib.Path) -> None:
    config = tiny()
    mesh, tx, current = fresh(config, 1)
    _, unbroken = go_on(config, mesh, tx, current, range(4))
    half, first = go_on(config, mesh, tx, current, range(2))
    with Checkpointer(tmp_path, ANY) as saved:
        saved.save(
            2, half, {"position": 16}, config, score=1.5, seconds={"train_seconds": 3.0}
        )
    restored, meta = restore(tmp_path, state.abstract(config.model, mesh, tx))
    assert meta["data"] == {"position": 16}
    assert meta["config"] == json.loads(json.dumps(dataclasses.asdict(config)))
    assert (meta["score"], meta["seconds"]) == (1.5, {"train_seconds": 3.0})
    assert meta["versions"]["jax"] == jax.__version__
    jax.tree.map(np.testing.assert_array_equal, restored, half)
    # The window that spikes are told by is part of it.
    assert int(restored.spikes.loss.seen) == 2 and restored.spikes.loss.values[1] > 0
    _, second = go_on(config, mesh, tx, restored, range(2, 4))
    assert first + second == unbroken


@pytest.fixture(scope="module")
def of_eight(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Config, Any]:
    """Saved on eight devices, fsdp; and the state that was saved."""
    workdir, config = tmp_path_factory.mktemp("of_eight"), tiny(mesh={"fsdp": 8})
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    wanted = state.abstract(config.model, sharding.make_mesh(config.mesh), tx)
    rng = np.random.default_rng(0)

    def some(shape: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.asarray(rng.normal(size=shape.shape) * 100).astype(shape.dtype)
        return jax.device_put(values, shape.sharding)

    # Not a fresh state, whose moments are all zero and would come back right by chance.
    current = jax.tree.map(some, wanted)
    with Checkpointer(workdir, ANY) as saved:
        saved.save(1, current, {}, config)
    return workdir, config, current


MESHES = [
    ({}, 1),
    ({"fsdp": 2}, 2),
    ({"fsdp": 4}, 4),
    ({"data": 2, "fsdp": 1, "tensor": 4}, 8),
]


@pytest.mark.parametrize(("mesh", "devices"), MESHES, ids=str)
def test_any_mesh_restores_the_same_bits(of_eight, mesh: dict[str, int], devices: int) -> None:
    workdir, config, saved = of_eight
    there = sharding.make_mesh(MeshConfig(**mesh), jax.devices()[:devices])
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    wanted = state.abstract(config.model, there, tx)
    restored, _ = restore(workdir, wanted)
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, wanted
    )


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "devices"), [({"fsdp": 8}, 8), *MESHES], ids=str)
def test_the_next_losses_are_those_of_the_saver(
    tmp_path, mesh: dict[str, int], devices: int
) -> None:
    """To the digit on the layout that saved, within 1e-5 on another."""
    saver = tiny(mesh={"fsdp": 8})
    there, tx, current = fresh(saver, 8)
    half, _ = go_on(saver, there, tx, current, range(2))
    with Checkpointer(tmp_path, ANY) as saved:
        saved.save(2, half, {}, saver)
    _, expected = go_on(saver, there, tx, half, range(2, 5))
    reader = dataclasses.replace(saver, mesh=MeshConfig(**mesh))
    there = sharding.make_mesh(reader.mesh, jax.devices()[:devices])
    restored, _ = restore(tmp_path, state.abstract(reader.model, there, tx))
    _, losses = go_on(reader, there, tx, restored, range(2, 5))
    if mesh == {"fsdp": 8}:
        assert losses == expected
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)


def test_scanned_and_unrolled_layers_are_saved_alike(of_eight) -> None:
    workdir, config, saved = of_eight
    unrolled = dataclasses.replace(config.model, scan_layers=False)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    restored, _ = restore(workdir, state.abstract(unrolled, mesh, tx))
    jax.tree.map(np.testing.assert_array_equal, restored, saved)


def test_parameters_alone_come_back_in_the_type_that_is_wanted(of_eight) -> None:
    workdir, config, saved = of_eight
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.build(config.optimizer, 1)
    half = dataclasses.replace(config.model, param_dtype="bfloat16")
    params = checkpoint.restore_params(workdir, state.abstract(half, mesh, tx).params)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(
        lambda ours, full: np.testing.assert_array_equal(ours, full.astype(jnp.bfloat16)),
        params,
        saved.params,
    )


# -------------------------------------------------------------------------- another recipe


def test_another_recipe_is_refused_with_all_names(of_eight) -> None:
    """An untied head is missing, with its moments; fewer layers have another shape."""
    workdir, config, _ = of_eight
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    untied = dataclasses.replace(config.model, tie_embeddings=False, num_layers=4)
    with pytest.raises(ConfigError) as error:
        restore(workdir, state.abstract(untied, mesh, tx))
    line = str(error.value)
    assert "checkpoints/1 is of another model or recipe: " in line
    for name in ("params", "opt_state.1.mu", "opt_state.1.nu"):
        assert f"{name}.untied_head" in line.split("it lacks ")[1].split(";")[0]
    assert "params.blocks.ln_1.bias [2, 32] instead of [4, 32]" in line
    assert "\n" not in line


def test_what_a_checkpoint_has_besides_is_told(tmp_path) -> None:
    with Checkpointer(tmp_path, ANY) as saved:
        more = {"params": {**small()["params"], "old": {"bias": jnp.ones(3)}}}
        saved.save(1, more, {}, tiny())
    wanted = TrainState(jnp.zeros(()), small()["params"], {}, optimizer.no_spikes())
    with pytest.raises(ConfigError, match=r"lacks step, .*; it has besides params\.old\.bias"):
        restore(tmp_path, shapes(wanted))


def test_parameters_that_fit_are_taken_and_the_rest_is_listed(tmp_path, capsys) -> None:
    saved = {"a": jnp.ones(3), "b": {"c": jnp.ones(4)}, "gone": jnp.ones(2)}
    with Checkpointer(tmp_path, ANY) as writer:
        writer.save(1, {"params": saved}, {}, tiny())
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    ours = {
        "a": jnp.zeros(6),
        "b": {"c": jax.device_put(jnp.zeros(4), place)},
        "new": jnp.zeros(2),
    }
    taken = checkpoint.restore_matching(tmp_path, ours)
    told = capsys.readouterr().err
    assert "1 of 3 parameters are those of" in told
    assert (
        "it lacks params.new; it has besides params.gone; it has params.a [3] instead of [6]."
        in told
    )
    np.testing.assert_array_equal(taken["b"]["c"], np.ones(4))
    assert taken["b"]["c"].sharding == place
    assert not taken["a"].any() and not taken["new"].any()
    with pytest.raises(ConfigError, match=r"has nothing that fits: it lacks params\.z"):
        checkpoint.restore_matching(tmp_path, {"z": jnp.zeros(1)})
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        checkpoint.restore_matching(tmp_path / "nowhere", ours)


# ---------------------------------------------------------------------------- when and how


def test_what_is_saved_is_what_was_there_though_the_next_steps_reuse_its_memory(
    tmp_path,
) -> None:
    values = jnp.arange(300_000, dtype=jnp.float32)
    expected = np.array(values)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpointer(tmp_path, ANY) as saved:
        saved.save(1, {"params": {"x": values}}, {}, tiny())
        for _ in range(50):
            values = add(values)
        saved.wait()
    restored, _ = restore(tmp_path, shapes({"params": {"x": values}}))
    np.testing.assert_array_equal(restored["params"]["x"], expected)


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path: pathlib.Path) -> None:
    with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as saved:
        assert saved.latest_step() is None and saved.newest_good() is None
        for step in (1, 2, 3):
            saved.save(step, small(step), {}, tiny())
        saved.save(3, small(4), {}, tiny())
        saved.wait()
        assert saved.latest_step() == 3
    assert steps_in(tmp_path) == [2, 3]
    restored, _ = restore(tmp_path, shapes(small()))
    jax.tree.map(np.testing.assert_array_equal, restored, small(3))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep": 2, "keep_best": 0}, {50, 60}),
        ({"keep": 1, "keep_best": 0, "keep_every": 20}, {20, 40, 60}),
        ({"keep": 1, "keep_best": 2}, {20, 50, 60}),
        ({"keep": 9}, {10, 20, 30, 40, 50, 60}),
    ],
    ids=str,
)
def test_the_newest_the_milestones_and_the_best_are_kept(config, kept) -> None:
    scores = {10: 3.0, 20: 1.0, 40: 2.0, 50: 1.5, 60: None}
    steps = [10, 20, 30, 40, 50, 60]
    assert folder.to_keep(steps, scores, CheckpointConfig(**config)) == kept


def test_a_save_is_due_by_number_or_by_time(tmp_path) -> None:
    now = [1000.0]
    config = CheckpointConfig(every=10, minutes=1.0)
    with Checkpointer(tmp_path, config, clock=lambda: now[0]) as saved:
        assert not saved.due(9) and saved.due(10)
        now[0] += 59
        assert not saved.due(11)
        now[0] += 1
        assert saved.due(11)
        saved.save(11, small(), {}, tiny())
        assert not saved.due(12)
    with Checkpointer(tmp_path, CheckpointConfig(every=10, minutes=0.0)) as saved:
        assert not saved.due(9)


def test_the_newest_is_told_by_its_step_whatever_the_clock_says(tmp_path) -> None:
    """As if the machine's clock had been set back by decades between two saves."""
    with Checkpointer(tmp_path, ANY) as saved:
        saved.save(1, small(1), {}, tiny())
        saved.wait()
        for path in (tmp_path / "checkpoints").rglob("*"):
            os.utime(path, (4e9, 4e9))
        saved.save(2, small(2), {}, tiny())
    restored, _ = restore(tmp_path, shapes(small()))
    jax.tree.map(np.testing.assert_array_equal, restored, small(2))


def test_one_process_at_a_time(tmp_path) -> None:
    """The second would take what the first is writing for broken off, and remove it."""
    in_use = pytest.raises(CheckpointError, match="is in use by another process")
    with Checkpointer(tmp_path, ANY), in_use:
        Checkpointer(tmp_path, ANY)
    with Checkpointer(tmp_path, ANY):
        pass


def test_writing_goes_on_beside_the_caller(tmp_path, monkeypatch) -> None:
    """`save` is back while the files are not complete yet."""
    go, finish = threading.Event(), Folder.finish

    def late(*arguments: Any) -> None:
        assert go.wait(60)
        finish(*arguments)

    monkeypatch.setattr(Folder, "finish", late)
    with Checkpointer(tmp_path, ANY) as saved:
        saved.save(1, small(), {}, tiny())
        assert saved.latest_step() is None
        go.set()
        saved.wait()
        assert saved.latest_step() == 1
