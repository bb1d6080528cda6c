"""What was saved comes back: to the bit, on any mesh, with the data's position."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest

from neo_jax import optimizer, sharding, state, train
from neo_jax.checkpoint import Checkpointer
from neo_jax.config import CheckpointConfig, Config, MeshConfig
from tests.train_test import BATCH, ragged_batch, tiny


def fresh(config: Config, devices: int):
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    return mesh, tx, state.create(config.model, mesh, tx, config.train.seed)


def go_on(config: Config, mesh, tx, current, steps: range):
    graph, _ = state.model_graph(config.model)
    step = jax.jit(functools.partial(train.train_step, graph=graph, config=config, tx=tx))
    losses = []
    with jax.set_mesh(mesh):
        for number in steps:
            batch = train.place_batch(ragged_batch(number), mesh, BATCH)
            current, metrics = step(current, batch)
            losses.append(float(metrics["loss"]))
    return current, losses


def test_four_steps_are_two_a_restart_and_two(tmp_path: pathlib.Path) -> None:
    config = tiny()
    mesh, tx, current = fresh(config, 1)
    _, unbroken = go_on(config, mesh, tx, current, range(4))
    half, first = go_on(config, mesh, tx, current, range(2))
    with Checkpointer(tmp_path, CheckpointConfig()) as saved:
        saved.save(2, half, {"position": 16}, config)
    with Checkpointer(tmp_path, CheckpointConfig()) as saved:
        restored, data = saved.restore(state.abstract(config.model, mesh, tx))
    assert data == {"position": 16}
    assert int(restored.step) == 2
    _, second = go_on(config, mesh, tx, restored, range(2, 4))
    assert first + second == unbroken


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [({}, 1), ({"fsdp": 4}, 4), ({"data": 2, "fsdp": 1, "tensor": 4}, 8)],
    ids=str,
)
def test_any_mesh_restores_the_same_bits(tmp_path, mesh: dict[str, int], devices: int) -> None:
    saver = tiny(mesh={"fsdp": 8})
    _, _, current = fresh(saver, 8)
    with Checkpointer(tmp_path, CheckpointConfig()) as saved:
        saved.save(1, current, {}, saver)
    reader = dataclasses.replace(saver, mesh=MeshConfig(**mesh))
    there, tx, _ = fresh(reader, devices)
    wanted = state.abstract(reader.model, there, tx)
    with Checkpointer(tmp_path, CheckpointConfig()) as saved:
        restored, _ = saved.restore(wanted)
    jax.tree.map(np.testing.assert_array_equal, restored, current)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, wanted
    )


def test_the_newest_are_kept_and_a_step_is_saved_once(tmp_path: pathlib.Path) -> None:
    config = tiny()
    _, _, current = fresh(config, 1)
    with Checkpointer(tmp_path, CheckpointConfig(keep=2)) as saved:
        assert saved.latest_step() is None
        for step in (1, 2, 3, 3):
            saved.save(step, current, {}, config)
        saved.wait()
        assert saved.latest_step() == 3
    kept = sorted(
        int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()
    )
    assert kept == [2, 3]
