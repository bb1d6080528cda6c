"""From a folder of checkpoints to arrays on any mesh.

Enters: shapes, types and shardings that are wanted, which need not be those of the saver:
another mesh, number of devices or number of processes. Leaves: the arrays, placed. What is
damaged is refused by name; what does not fit is listed.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils

from neo_jax.checkpoint.folder import CheckpointError, Folder
from neo_jax.config import ConfigError
from neo_jax.state import Params


def newest_good(folder: Folder, *, put_aside: bool) -> int | None:
    """Step of the newest checkpoint that verifies; tells which it had to pass over.

    Process 0 looks, and all others follow it.

    Args:
      folder: of a run.
      put_aside: whether those that do not verify get another name, so that the run may write
        them anew.

    Returns:
      None if there is no checkpoint at all.

    Raises:
      CheckpointError: there are some, and none of them is good.
    """
    refused: dict[int, str] = {}
    good = None
    if jax.process_index() == 0:
        for step in reversed(folder.steps()):
            problem = folder.problem(step)
            if problem is None:
                good = step
                break
            refused[step] = problem
            tell(f"checkpoint {folder.at(step)} is refused: {problem}.")
        if refused and good is not None:
            tell(f"going on from checkpoint {folder.at(good)} instead.")
            if put_aside:
                for step in refused:
                    folder.refuse(step)
    code = -1 if good is None else good
    if good is None and refused:
        code = -2
    code = int(agree(code))
    if code == -2:
        why = "; ".join(f"{step}: {problem}" for step, problem in refused.items())
        raise CheckpointError(
            f"no checkpoint in {folder.path} is good ({why or 'process 0 tells why'}); "
            f"restore one from a copy, or remove that folder to start anew."
        )
    return None if code == -1 else code


def read(folder: Folder, step: int, wanted: Any) -> Any:
    """The arrays of a checkpoint that `wanted` names, each where it is wanted.

    Args:
      folder: of a run.
      step: of a checkpoint that was verified.
      wanted: a tree of shapes, types and shardings: a whole `TrainState`, or a dict with a
        part of its fields.

    Raises:
      ConfigError: the checkpoint lacks something of it, or has it in another shape; and,
        where a whole state is wanted, if it has more.
    """
    path = folder.at(step) / "state"
    is_part = isinstance(wanted, Mapping)
    differences = _differences(names_saved(folder, step), _names(wanted), is_part)
    if differences:
        raise ConfigError(
            f"checkpoint {folder.at(step)} is of another model or recipe: "
            f"{'; '.join(differences)}."
        )
    restore = ocp.args.PyTreeRestore(
        wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=is_part,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(path, args=restore)


def restore_params(
    workdir: pathlib.Path, abstract: Params, *, step: int | None = None
) -> Params:
    """The parameters of the newest good checkpoint, without the optimiser's state.

    Args:
      workdir: of a run.
      abstract: shapes, types and shardings wanted.
      step: of another checkpoint, which is preferred if it is there and good.

    Raises:
      ConfigError: the workdir holds no checkpoint, or one of another model.
    """
    folder = Folder.of(workdir)
    if step not in folder.steps() or agree(folder.problem(step) is not None):
        step = newest_good(folder, put_aside=False)
    if step is None:
        raise ConfigError(f"{workdir} holds no checkpoint; train there first.")
    return read(folder, step, {"params": abstract})["params"]


def restore_matching(workdir: str | os.PathLike[str], fresh: Params) -> Params:
    """The parameters of the newest good checkpoint of another model, as far as they fit.

    What is missing there or has another shape stays as it is in `fresh`; that, and what there
    is besides, is told by name.

    Args:
      fresh: arrays; those taken get their types and shardings.

    Raises:
      ConfigError: the workdir holds no checkpoint, or nothing in it fits.
    """
    folder = Folder.of(pathlib.Path(workdir))
    step = newest_good(folder, put_aside=False)
    if step is None:
        raise ConfigError(f"{workdir} holds no checkpoint; name the workdir of a run.")
    saved = {
        name: shape
        for name, shape in names_saved(folder, step).items()
        if name.startswith("params.")
    }
    wanted = _names({"params": fresh})
    flat = traverse_util.flatten_dict({"params": fresh}, sep=".")
    fitting = {name: x for name, x in flat.items() if saved.get(name, ((), ""))[0] == x.shape}
    differences = _differences(saved, wanted, is_part=False)
    if not fitting:
        raise ConfigError(
            f"checkpoint {folder.at(step)} has nothing that fits: {'; '.join(differences)}."
        )
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fitting
    )
    taken = read(folder, step, traverse_util.unflatten_dict(abstract, sep="."))
    tell(
        f"{len(fitting)} of {len(flat)} parameters are those of {folder.at(step)}"
        + (
            f"; what differs is left fresh, or out: {'; '.join(differences)}."
            if differences
            else "."
        )
    )
    flat |= traverse_util.flatten_dict(taken, sep=".")
    return traverse_util.unflatten_dict(flat, sep=".")["params"]


def is_params_alone(folder: Folder, step: int) -> bool:
    """Whether a checkpoint holds parameters and nothing to train on with."""
    return {name.split(".")[0] for name in names_saved(folder, step)} == {"params"}


def agree(value: int | float) -> Any:
    """The value that process 0 has."""
    if jax.process_count() == 1:
        return value
    return multihost_utils.broadcast_one_to_all(np.asarray(value))


def tell(text: str) -> None:
    """Says something to whoever watches, once for all processes."""
    if jax.process_index() == 0:
        print(f"neo_jax: {text}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------- in detail


def _names(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each leaf by its dotted name."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            tuple(leaf.shape),
            np.dtype(leaf.dtype).name,
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def names_saved(folder: Folder, step: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each array of a checkpoint, by its dotted name."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return _names(reader.metadata(folder.at(step) / "state").item_metadata.tree)


def _differences(
    saved: Mapping[str, tuple[tuple[int, ...], str]],
    wanted: Mapping[str, tuple[tuple[int, ...], str]],
    is_part: bool,
) -> list[str]:
    """What is missing, extra, or of another shape; types are converted."""
    missing = [name for name in wanted if name not in saved]
    extra = [name for name in saved if name not in wanted and not is_part]
    other = [
        f"{name} {list(saved[name][0])} instead of {list(wanted[name][0])}"
        for name in wanted
        if name in saved and saved[name][0] != wanted[name][0]
    ]
    lists = {"it lacks": missing, "it has besides": extra, "it has": other}
    return [f"{words} {', '.join(names)}" for words, names in lists.items() if names]
