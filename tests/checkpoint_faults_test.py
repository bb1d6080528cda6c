"""Damage is told by name, and the newest good checkpoint is used: bytes, disks, kills."""

import contextlib
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from neo_jax.checkpoint import Checkpointer, CheckpointError, digests, folder
from neo_jax.checkpoint.folder import DELETED, PARTIAL, Folder
from neo_jax.config import CheckpointConfig
from tests.checkpoint_test import ANY, restore, shapes, small, steps_in
from tests.train_test import tiny


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir with checkpoints of steps 1 and 2; not to be changed."""
    workdir = tmp_path_factory.mktemp("two")
    with Checkpointer(workdir, ANY) as saved:
        for step in (1, 2):
            saved.save(step, small(step), {"position": step}, tiny())
    return workdir


def files_of(workdir: pathlib.Path, step: int) -> list[str]:
    path = Folder.of(workdir).at(step)
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def copy(workdir: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    shutil.copytree(workdir, to)
    return to


def flip_one_bit(path: pathlib.Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def cut(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: pathlib.Path) -> None:
    os.truncate(path, 0)


def remove(path: pathlib.Path) -> None:
    path.unlink()


def test_a_flipped_bit_in_any_file_is_told_by_its_name(two, tmp_path, capsys) -> None:
    """In every file in turn, the arrays' own among them; the checkpoint before it is used."""
    rng = np.random.default_rng(0)
    names = files_of(two, 2)
    arrays = [name for name in names if "/d/" in name]
    assert arrays and "meta.json" in names and digests.FILE_NAME in names
    for number, name in enumerate(names):
        workdir = copy(two, tmp_path / str(number))
        flip_one_bit(Folder.of(workdir).at(2) / name, rng)
        with Checkpointer(workdir, ANY) as saved:
            assert saved.newest_good() == 1, name
        told = capsys.readouterr().err
        assert f"checkpoints/2 is refused: its file {name} " in told
        assert "going on from checkpoint" in told and "checkpoints/1 instead." in told
        # It is put aside, so that its step can be saved anew.
        assert steps_in(workdir) == [1]
        assert (workdir / "checkpoints" / "2.refused").is_dir()
    restored, meta = restore(workdir, shapes(small()))
    jax.tree.map(np.testing.assert_array_equal, restored, small(1))
    assert meta["data"] == {"position": 1}


@pytest.mark.parametrize("damage", [cut, empty, remove])
def test_an_incomplete_file_is_told_by_its_name(two, tmp_path, damage) -> None:
    for number, name in enumerate(files_of(two, 2)):
        workdir = copy(two, tmp_path / str(number))
        path = Folder.of(workdir).at(2) / name
        if damage is not remove and not path.stat().st_size:
            continue
        damage(path)
        problem = Folder.of(workdir).problem(2)
        assert problem is not None and name in problem
        with Checkpointer(workdir, ANY) as saved:
            assert saved.newest_good() == 1


def test_a_checkpoint_that_was_never_finished_is_not_seen(two, tmp_path) -> None:
    workdir = copy(two, tmp_path / "run")
    path = Folder.of(workdir)
    os.rename(path.at(2), path.partial(2))
    assert path.steps() == [1]
    with Checkpointer(workdir, ANY) as saved:
        assert saved.newest_good() == 1
        assert not path.partial(2).exists()


def test_without_a_good_checkpoint_the_run_does_not_start_anew(two, tmp_path) -> None:
    workdir = copy(two, tmp_path / "run")
    for step in (1, 2):
        cut(Folder.of(workdir).at(step) / "meta.json")
    with Checkpointer(workdir, ANY) as saved, pytest.raises(CheckpointError) as error:
        saved.newest_good()
    line = str(error.value)
    assert "1: its file meta.json has" in line and "2: its file meta.json has" in line
    assert "\n" not in line
    assert steps_in(workdir) == [1, 2]  # nothing was put aside


# ---------------------------------------------------------------------------------- kills


class Killed(BaseException):
    """Stands for a machine that goes away."""


def test_a_kill_between_any_two_calls_leaves_the_newest_good(two, tmp_path, monkeypatch):
    """While a checkpoint becomes visible and an older one is removed."""
    calls = [
        *((os, name) for name in ("rename", "fsync")),
        *((digests, name) for name in ("write_through", "sync_folder")),
        (shutil, "rmtree"),
        (os, "unlink"),
    ]
    for last in range(10_000):
        workdir = copy(two, tmp_path / str(last))
        there, left = Folder.of(workdir), [last]
        shutil.copytree(there.at(2), there.partial(3))
        (there.partial(3) / digests.FILE_NAME).unlink()
        with monkeypatch.context() as patch:
            for module, name in calls:
                patch.setattr(module, name, dying(getattr(module, name), left))
            with contextlib.suppress(Killed):
                there.finish(3, {"data": {}})
                there.delete(there.superfluous(CheckpointConfig(keep=2)))
        assert [there.problem(step) for step in there.steps()] == [None] * len(there.steps())
        assert there.steps() in ([1, 2], [1, 2, 3], [2, 3])
        with Checkpointer(workdir, ANY) as saved:
            assert saved.newest_good() == there.steps()[-1]
        assert not there.leftovers(PARTIAL, DELETED)
        if left[0] > 0:
            break
    assert last > 10 and there.steps() == [2, 3]


def dying(function: Any, left: list[int]) -> Any:
    def call(*arguments: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return function(*arguments, **more)

    return call


def test_a_failed_save_is_told_at_the_next_step_and_the_next_save(two, tmp_path, monkeypatch):
    workdir = copy(two, tmp_path / "run")

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(folder.digests, "write_through", fail)
    for ask in ("check", "wait"):
        with Checkpointer(workdir, ANY) as saved:
            saved.save(3, small(3), {}, tiny())
            assert saved._thread is not None
            saved._thread.join()
            with pytest.raises(CheckpointError) as error:
                getattr(saved, ask)()
            line = str(error.value)
            assert "the checkpoint of step 3 could not be written to" in line
            assert "Input/output error; the checkpoint of step 2 is as it was" in line
    monkeypatch.undo()
    assert not Folder.of(workdir).leftovers(PARTIAL)
    with Checkpointer(workdir, ANY) as saved:
        assert saved.newest_good() == 2


# ---------------------------------------------------------------------------------- disks


def save_now(saved: Checkpointer, step: int, tree: Any) -> None:
    saved.save(step, tree, {}, tiny())
    saved.wait()


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of its own, of 4 MiB in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(disk) -> None:
    # Random bits, which no compression makes small.
    large = small(2, size=800_000)
    with Checkpointer(disk, ANY) as saved:
        saved.save(1, small(1), {}, tiny())
        saved.save(2, large, {}, tiny())
        with pytest.raises(CheckpointError) as error:
            save_now(saved, 3, large)
    line = str(error.value)
    assert "could not be written to" in line and "\n" not in line
    assert "No space left on device; the checkpoint of step " in line
    assert "is as it was, and the run resumes from it." in line
    left = steps_in(disk)
    assert left[0] == 1 and not Folder.of(disk).leftovers(PARTIAL)
    for step in left:
        assert Folder.of(disk).problem(step) is None
    # With room again the run goes on.
    with Checkpointer(disk, ANY) as saved:
        assert saved.newest_good() == left[-1]
        saved.save(4, small(4), {}, tiny())
    assert steps_in(disk)[-1] == 4


def test_a_disk_that_became_read_only(disk) -> None:
    with Checkpointer(disk, ANY) as saved:
        saved.save(1, small(1), {}, tiny())
        saved.wait()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(CheckpointError, match="Read-only file system; the checkpoint of"):
            save_now(saved, 2, small(2))
    restored, _ = restore(disk, shapes(small()))
    jax.tree.map(np.testing.assert_array_equal, restored, small(1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_lost_its_permission(tmp_path) -> None:
    with Checkpointer(tmp_path, ANY) as saved:
        saved.save(1, small(1), {}, tiny())
        saved.wait()
        (tmp_path / "checkpoints").chmod(0o500)
        try:
            with pytest.raises(CheckpointError, match="Permission denied; the checkpoint of"):
                save_now(saved, 2, small(2))
        finally:
            (tmp_path / "checkpoints").chmod(0o700)
    assert steps_in(tmp_path) == [1]


# -------------------------------------------------------------------------------- pickles


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (pathlib.Path.touch, (self.path,))


def test_no_file_of_a_checkpoint_is_ever_unpickled(two, tmp_path) -> None:
    """Each is replaced by a pickle that would run code, with digests that fit, by a forger."""
    traces = tmp_path / "traces"
    traces.mkdir()
    bomb = pickle.dumps(Bomb(traces / "proof"))
    pickle.loads(bomb)
    (traces / "proof").unlink()  # it would work
    for number, name in enumerate(files_of(two, 2)):
        if name == digests.FILE_NAME:
            continue
        workdir = copy(two, tmp_path / str(number))
        path = Folder.of(workdir).at(2)
        (path / name).write_bytes(pickle.dumps(Bomb(traces / str(number))))
        digests.write(path)
        with Checkpointer(workdir, ANY) as saved, contextlib.suppress(Exception):
            step = saved.newest_good()
            assert step == 2
            saved.meta(step)
            saved.read(step, shapes(small()))
    assert not list(traces.iterdir())


def test_reading_a_checkpoint_looks_up_no_pickled_name(two) -> None:
    """The interpreter itself reports every name that an unpickler asks for."""
    code = (
        "import sys, pathlib\n"
        "from tests.checkpoint_test import restore, shapes, small\n"
        "wanted, asked = shapes(small()), []\n"
        "look = lambda event, args: event == 'pickle.find_class' and asked.append(args)\n"
        "sys.addaudithook(look)\n"
        f"restore(pathlib.Path({str(two)!r}), wanted)\n"
        "assert not asked, asked\n"
        "import pickle\n"
        "pickle.loads(pickle.dumps(pathlib.Path))\n"
        "assert asked\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
