"""Training states on disk: written aside, then visible at once; restored on any mesh.

Enters: a `TrainState`, the data's position, the config. Leaves: `checkpoints/STEP/` with the
items `state` (arrays, one file format for any number of devices), `data` and `config` (JSON).
Orbax writes in the background while training goes on.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from neo_jax.config import CheckpointConfig, Config, ConfigError
from neo_jax.state import Params, TrainState


class Checkpointer:
    """The checkpoints of one workdir. A context manager: leaving it ends the writing."""

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig) -> None:
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, cleanup_tmp_directories=True
            ),
            item_names=("state", "data", "config"),
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """Updates made at the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: dict[str, Any], config: Config) -> None:
        """Starts to write a checkpoint; a step that is there already is left as it is.

        Args:
          step: updates made so far.
          state: may be donated to the next step once this returns.
          data: the pipeline's position, as JSON.
          config: what the run was told.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data),
                config=ocp.args.JsonSave(dataclasses.asdict(config)),
            ),
        )

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint.

        Args:
          abstract: shapes, types and shardings wanted, which need not be those of the saver.

        Returns:
          The state, placed, and the data's position.
        """
        step = self._manager.latest_step()
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["data"]

    def wait(self) -> None:
        """Returns once everything saved so far is on disk."""
        self._manager.wait_until_finished()


def restore_params(workdir: pathlib.Path, abstract: Params) -> Params:
    """The parameters of the newest checkpoint, without the optimiser's state.

    Args:
      abstract: shapes, types and shardings wanted.

    Raises:
      ConfigError: the workdir holds no checkpoint.
    """
    wanted = {"params": abstract}
    how = ocp.checkpoint_utils.construct_restore_args(wanted)
    folder = (workdir / "checkpoints").resolve()
    with ocp.CheckpointManager(folder, item_names=("state", "data", "config")) as manager:
        step = manager.latest_step()
        if step is None:
            raise ConfigError(f"{workdir} holds no checkpoint; train there first.")
        restored = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
            ),
        )
    return restored["state"]["params"]


def save_params(workdir: pathlib.Path, params: Params, config: Config) -> None:
    """Writes parameters alone, as step 0 of a workdir, for `restore_params` to read."""
    with ocp.CheckpointManager((workdir / "checkpoints").resolve()) as manager:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave({"params": params}),
            config=ocp.args.JsonSave(dataclasses.asdict(config)),
        )
        manager.save(0, args=items)
        manager.wait_until_finished()
