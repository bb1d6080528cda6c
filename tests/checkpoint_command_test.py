"""`python -m neo_jax.checkpoint`: lists, describes, verifies, and removes only what it may."""

import pathlib
import re
import shutil

import numpy as np
import pytest

from neo_jax.checkpoint import Checkpointer
from neo_jax.checkpoint.__main__ import main
from neo_jax.config import CheckpointConfig
from tests.checkpoint_faults_test import flip_one_bit
from tests.checkpoint_test import small, steps_in
from tests.train_test import tiny


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir with checkpoints of steps 10, 20 and 30; 10 is the best, 30 was not scored."""
    workdir = tmp_path_factory.mktemp("three")
    with Checkpointer(workdir, CheckpointConfig(keep=9)) as saved:
        for step, score in ((10, 1.5), (20, 2.0), (30, None)):
            saved.save(step, small(step), {"position": 8 * step}, tiny(), score=score)
    return workdir


@pytest.fixture
def workdir(three: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(three, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]):
    """Runs the command; its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return exit_.value.code, told.out, told.err

    return run


def damage(workdir: pathlib.Path, step: int) -> None:
    flip_one_bit(workdir / "checkpoints" / str(step) / "meta.json", np.random.default_rng(0))


def test_ls_lists_steps_scores_and_leftovers(ask, workdir) -> None:
    (workdir / "checkpoints" / "40.partial").mkdir()
    code, out, _ = ask("ls", workdir)
    rows = out.splitlines()
    assert code == 0 and len(rows) == 5
    assert re.fullmatch(r" +10  20\S+T\S+ +[\d.]+ MiB +1\.5000  best", rows[1])
    assert rows[2].endswith("2.0000") and rows[3].endswith("newest")
    assert "40.partial" in rows[4] and rows[4].endswith("`prune` removes it")


def test_show_tells_position_versions_config_and_arrays(ask, workdir) -> None:
    code, out, _ = ask("show", workdir)
    assert code == 0
    assert '"step": 30' in out and '"position": 240' in out and '"jax": ' in out
    assert "  model.num_layers = 2\n" in out and "model.activation" not in out
    assert out.endswith("  params.a.kernel  float32 [20, 100]\n")
    assert '"position": 80' in ask("show", workdir, "--step", 10)[1]
    # The inner folder is named as readily as the workdir.
    assert ask("show", workdir / "checkpoints")[1] == out


def test_verify_tells_which_file_and_fails(ask, workdir) -> None:
    assert ask("verify", workdir) == (0, "10: good\n20: good\n30: good\n", "")
    damage(workdir, 20)
    code, out, _ = ask("verify", workdir)
    assert code == 1
    assert out == "10: good\n20: refused: its file meta.json is damaged\n30: good\n"
    assert ask("verify", workdir, "--step", 30)[0] == 0
    assert steps_in(workdir) == [10, 20, 30]  # it only looks
    code, _, err = ask("show", workdir, "--step", 20)
    assert code == 2 and err.endswith("is refused: its file meta.json is damaged.\n")


def test_prune_keeps_what_the_settings_say(ask, workdir) -> None:
    (workdir / "checkpoints" / "40.partial").mkdir()
    (workdir / "checkpoints" / "5.refused").mkdir()
    dry = ask("prune", workdir, "--keep", 1, "--dry_run")
    assert dry == (0, "would remove 20\nwould remove 40.partial\nwould remove 5.refused\n", "")
    assert steps_in(workdir) == [10, 20, 30]
    assert ask("prune", workdir, "--keep", 1)[1] == dry[1].replace("would remove", "removing")
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left == {"10", "30"}  # the best, and the newest
    ask("prune", workdir, "--keep", 1, "--keep_best", 0)
    assert steps_in(workdir) == [30]


def test_prune_leaves_all_where_none_that_would_stay_is_good(ask, workdir) -> None:
    damage(workdir, 30)
    code, _, err = ask("prune", workdir, "--keep", 1, "--keep_best", 0)
    assert code == 2 and "none of the checkpoints that would stay (30) is good" in err
    assert steps_in(workdir) == [10, 20, 30]


def test_prune_keeps_off_a_run_that_is_writing(ask, workdir) -> None:
    with Checkpointer(workdir, CheckpointConfig()):
        (workdir / "checkpoints" / "40.partial").mkdir()
        code, _, err = ask("prune", workdir)
    assert code == 2 and "is in use by another process" in err
    assert (workdir / "checkpoints" / "40.partial").is_dir()


@pytest.mark.parametrize("verb", ["ls", "show", "verify", "prune"])
def test_a_folder_without_checkpoints_is_told(ask, tmp_path, verb) -> None:
    code, _, err = ask(verb, tmp_path / "empty")
    assert code == 2
    assert err == (
        f"neo_jax.checkpoint: {tmp_path}/empty holds no checkpoint; name a run's workdir.\n"
    )
    assert not (tmp_path / "empty").exists()


def test_a_step_that_is_not_there(ask, workdir) -> None:
    assert "--step 15: there are 10, 20, 30." in ask("show", workdir, "--step", 15)[2]
    assert ask("prune", workdir, "--keep", 0)[2].count("\n") == 1


def test_help_shows_examples_that_parse(ask, workdir) -> None:
    code, out, _ = ask("--help")
    assert code == 0
    examples = re.findall(r"python -m neo_jax\.checkpoint (.*)", out)
    for example in [e for e in examples if "runs/mine" in e and "--step" not in e]:
        assert ask(*example.replace("runs/mine", str(workdir)).split())[0] == 0
    assert len(examples) >= 4
