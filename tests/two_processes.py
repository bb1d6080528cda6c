"""One of two processes of a test: saves a state over both, or compares one with what it was.

Enters: the workdir, and "save" or "compare", on the command line; the environment says which
process it is. Leaves: a checkpoint; or exit code 0 where every bit is right.
"""

import pathlib
import sys
from typing import Any

import jax
import numpy as np

from neo_jax import distributed, optimizer, sharding, state
from neo_jax.checkpoint import Checkpointer
from neo_jax.config import CheckpointConfig
from tests.train_test import tiny


def abstract(devices: list[jax.Device]) -> Any:
    config = tiny()
    mesh = sharding.make_mesh(config.mesh, devices)
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    return state.abstract(config.model, mesh, tx)


def values(shapes: Any, seed: int) -> Any:
    """Numbers that both processes, and the test, know without asking each other."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.asarray(rng.normal(size=x.shape) * 100).astype(x.dtype), shapes
    )


def place(shapes: Any, numbers: Any) -> Any:
    return jax.tree.map(
        lambda shape, x: jax.make_array_from_callback(x.shape, shape.sharding, lambda i: x[i]),
        shapes,
        numbers,
    )


def compare(tree: Any, numbers: Any) -> None:
    def look(array: jax.Array, x: np.ndarray) -> None:
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), x[shard.index])

    jax.tree.map(look, tree, numbers)


def main(workdir: pathlib.Path, what: str, seed: int) -> None:
    distributed.start()
    assert jax.process_count() == 2
    shapes = abstract(jax.devices())
    with Checkpointer(workdir, CheckpointConfig()) as saved:
        if what == "save":
            saved.save(seed, place(shapes, values(shapes, seed)), {}, tiny())
        else:
            step = saved.newest_good()
            assert step == seed
            compare(saved.read(step, shapes), values(shapes, seed))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
