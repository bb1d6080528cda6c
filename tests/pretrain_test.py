"""Spikes, notices, full disks and damage happen to a run; its losses are the same for it."""

import json
import os
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from neo_jax import main, pretrain
from neo_jax import run as run_lib
from neo_jax.checkpoint import Checkpointer
from neo_jax.checkpoint.folder import Folder
from neo_jax.data.pipeline import Pipeline
from neo_jax.metrics import Writer
from tests.checkpoint_faults_test import disk as disk
from tests.checkpoint_faults_test import flip_one_bit
from tests.stopping import stopped_after

BATCH, STEPS = 4, 12
CLOCK = ("tokens_per_second", "step_seconds", "elapsed_seconds", "mfu_palm", "mfu_exact")

EXPERIMENT = """\
from neo_jax import config as config_lib
from neo_jax.experiments import base

def get_config():
    config = base.get_config()
    config.model = config_lib.preset("tiny")
    config.model.update(num_layers=2, embed_dim=16, num_heads=2, window_size=8)
    config.model.update(vocab_size=300, max_seq_len=16, scan_layers=True)
    config.data.update(source={texts!r}, tokenizer="bpe:300", seq_len=16, batch_size=4)
    config.data.update(holdout_every=4, holdout_offset=1)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=2)
    config.train.update(num_steps=12, log_every=1, rollback_after=3)
    config.eval.update(every=6)
    config.checkpoint.update(every=4, minutes=0.0)
    return config
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "texts").mkdir()
    for number in range(8):
        lines = [f"Line {i} of text {number} says {i * number}." for i in range(40)]
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines))
    path = folder / "mine.py"
    path.write_text(EXPERIMENT.format(texts=str(folder / "texts")))
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def _one_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the eight; and a compilation cache of this file's own."""
    make_mesh = run_lib.sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_lib.sharding,
            "make_mesh",
            lambda config, devices=None: make_mesh(config, devices or jax.devices()[:1]),
        )
        changes = {
            "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }
        before = {key: jax.config.values[key] for key in changes}
        configure(changes)
        yield
        configure(before)


def configure(values: dict[str, Any]) -> None:
    for key, value in values.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


def run(experiment: str, workdir: pathlib.Path, *arguments: str) -> int:
    """The command's exit code."""
    try:
        main.main(["--config", experiment, "--workdir", str(workdir), *arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def lines(workdir: pathlib.Path, *, evaluated: bool = True) -> list[dict[str, Any]]:
    """Of metrics.jsonl by step, without what a clock says."""
    read = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    kept = [{key: v for key, v in line.items() if key not in CLOCK} for line in read]
    kept = [line for line in kept if evaluated or line["split"] == "train"]
    return sorted(kept, key=lambda line: (line["step"], line["split"]))


def summary(workdir: pathlib.Path) -> dict[str, Any]:
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def finished(experiment: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run that nothing disturbed; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert run(experiment, workdir) == 0
    return workdir


# --------------------------------------------------------------------------------- spikes


def poison(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Makes NaN of the losses of the training batches `first` … `last`, counted from 1."""
    give = Pipeline.__next__

    def give_poison(self: Pipeline) -> Any:
        batch = give(self)
        if self._batches.endless and first <= self.position // BATCH <= last:
            batch = {**batch, "weights": batch["weights"] * np.float32(np.nan)}
        return batch

    monkeypatch.setattr(Pipeline, "__next__", give_poison)


def test_a_nan_leaves_its_update_out_and_the_run_goes_on(
    experiment, tmp_path, monkeypatch, capsys
) -> None:
    poison(monkeypatch, 3, 4)
    assert run(experiment, tmp_path / "run") == 0
    told = capsys.readouterr().err
    assert "step 3: update left out, loss nan, gradient norm nan" in told
    of = {line["step"]: line for line in lines(tmp_path / "run", evaluated=False)}
    assert [of[step]["skipped"] for step in (2, 3, 4, 5, STEPS)] == [0, 1, 2, 2, 2]
    assert [of[step]["non_finite"] for step in (2, 3, 4, 5)] == [0, 1, 2, 2]
    assert of[3]["loss"] is None and of[5]["loss"] < of[1]["loss"]
    assert (summary(tmp_path / "run")["skipped"], of[STEPS]["rollbacks"]) == (2, 0)


def test_too_many_in_a_row_send_the_run_back_and_past_the_data(
    experiment, tmp_path, monkeypatch, capsys
) -> None:
    """Batches 6 … 8 are bad, the checkpoint is of step 4: 5 … 8 are left out from then on."""
    poison(monkeypatch, 6, 8)
    assert run(experiment, tmp_path / "run") == 0
    told = capsys.readouterr().err
    assert "3 updates in a row were left out, the last at step 8; back to step 4." in told
    assert "The batches of steps 5 … 8, sequences 16 … 31, are left out from now on." in told
    (jump,) = summary(tmp_path / "run")["jumps"]
    assert jump == {"from": 16, "to": 32, "reason": "rolled back from step 8 to 4"}
    logged = lines(tmp_path / "run", evaluated=False)
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    assert [line["rollbacks"] for line in logged] == [0] * 4 + [1] * 8
    assert all(line["loss"] is not None for line in logged)


@pytest.mark.slow
def test_a_run_that_was_rolled_back_and_broken_off_ends_with_the_same_losses(
    experiment, tmp_path, monkeypatch
) -> None:
    poison(monkeypatch, 6, 8)
    assert run(experiment, tmp_path / "alone") == 0
    # The first between the jump and the checkpoint after it.
    for number, (at, visit) in enumerate(((5, 2), (9, 1))):
        workdir = tmp_path / str(number)
        with stopped_after(at, visit):
            run(experiment, workdir)
        assert run(experiment, workdir) == 0
        assert lines(workdir) == lines(tmp_path / "alone")


@pytest.mark.slow
def test_spikes_wherever_it_is_taken_up_end_the_run(
    experiment, tmp_path, monkeypatch, capsys
) -> None:
    poison(monkeypatch, 6, 10_000)
    assert run(experiment, tmp_path / "run") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("neo_jax: 3 updates in a row were left out, the last at step 7, ")
    assert "so it was with other data 3 times from step 4; lower optimizer.learning" in told


def test_without_skipping_the_first_nan_ends_the_run_with_a_diagnosis(
    experiment, tmp_path, monkeypatch, capsys
) -> None:
    asked = []

    def diagnose(params: Any, graph: Any, config: Any, batch: Any, loss: Any) -> str:
        asked.append((jax.device_get(params), jax.device_get(batch)))
        return "the loss is the first"

    poison(monkeypatch, 6, 6)
    monkeypatch.setattr(run_lib.diagnose, "first_not_finite", diagnose)
    assert run(experiment, tmp_path / "run", "--config.optimizer.skip_spikes=False") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == (
        "neo_jax: loss or gradients of step 6 are not finite: the loss is the first; "
        "the update was not made."
    )
    ((params, batch),) = asked
    assert np.isnan(batch["weights"]).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


# -------------------------------------------------------------------------------- notices


def notice_at_step(patch: pytest.MonkeyPatch, at: int) -> None:
    advance = Writer.advance

    def notify(writer: Writer, step: int) -> None:
        advance(writer, step)
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    patch.setattr(Writer, "advance", notify)


def notice_in_evaluation(patch: pytest.MonkeyPatch, number: int) -> None:
    """In the midst of the evaluation of that number, counted from 1."""
    evaluate, calls = pretrain.perplexity.evaluate, []

    def notify(text: Any, sum_losses: Any, **more: Any) -> Any:
        calls.append(number)

        def first_notified(batch: Any) -> Any:
            if len(calls) == number:
                calls.append(number)
                os.kill(os.getpid(), signal.SIGTERM)
            return sum_losses(batch)

        return evaluate(text, first_notified, **more)

    patch.setattr(pretrain.perplexity, "evaluate", notify)


@pytest.mark.parametrize(
    ("notify", "at", "words", "saved"),
    [
        # The notice comes while the next step is under way already.
        (notice_at_step, 2, "all up to step 3 is saved", 3),
        (notice_in_evaluation, 1, "all up to step 6 is saved", 6),
        (notice_in_evaluation, 2, "nothing was under way", STEPS),
    ],
    ids=["step", "evaluation", "last evaluation"],
)
def test_a_notice_saves_and_ends_with_75_and_the_run_goes_on(
    finished, experiment, tmp_path, monkeypatch, capsys, notify, at, words, saved
) -> None:
    with monkeypatch.context() as patch:
        notify(patch, at)
        assert run(experiment, tmp_path / "run") == 75
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"neo_jax: told to stop; {words}; the same command resumes."
    assert Folder.of(tmp_path / "run").steps()[-1] == saved
    assert run(experiment, tmp_path / "run") == 0
    assert lines(tmp_path / "run") == lines(finished)


# -------------------------------------------------------------------------- damage, clocks


def test_damage_is_told_and_the_run_goes_on_from_before_whatever_the_clock_says(
    finished, experiment, tmp_path, monkeypatch, capsys
) -> None:
    """A flipped bit in the newest checkpoint, of a machine whose clock was decades ahead."""
    began, workdir = time.monotonic(), tmp_path / "run"
    with stopped_after(9):
        run(experiment, workdir)
    newest = Folder.of(workdir).at(8)
    name = sorted(str(p.relative_to(newest)) for p in newest.rglob("d/*"))[0]
    flip_one_bit(newest / name, np.random.default_rng(0))
    for path in workdir.rglob("*"):
        os.utime(path, (4e9, 4e9))
    capsys.readouterr()
    assert run(experiment, workdir) == 0
    told = capsys.readouterr().err
    assert f"checkpoints/8 is refused: its file {name} is damaged." in told
    assert "resuming after step 4" in told
    assert lines(workdir) == lines(finished)
    # Steps 5 … 9 were made twice; their time counts as lost, by clocks that nobody sets.
    assert 0 < summary(workdir)["restart_seconds"] <= time.monotonic() - began


def test_where_the_time_went_is_in_the_summary_and_in_tensorboard(finished) -> None:
    told = summary(finished)
    uses = ("compile", "data", "train", "save", "eval", "restart")
    assert all(told[f"{use}_seconds"] >= 0 for use in uses)
    assert 0 < told["goodput"] <= 1
    drawn = b"".join(path.read_bytes() for path in (finished / "tensorboard").iterdir())
    for use in uses:
        assert f"goodput/{use}_seconds".encode() in drawn


def test_what_a_start_without_a_checkpoint_took_is_known(tmp_path) -> None:
    assert run_lib._elapsed_seconds(tmp_path) == 0
    said = [{"step": 1, "elapsed_seconds": 7.0}, {"step": 2, "elapsed_seconds": 9.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in said))
    assert run_lib._elapsed_seconds(tmp_path) == 9.5


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_in_one_line(
    finished, experiment, disk, monkeypatch, capsys
) -> None:
    """And with room again the same command goes on to the same losses."""
    workdir, filler = disk / "run", disk / "filler"
    save = Checkpointer.save

    def fill(saved: Checkpointer, step: int, *args: Any, **kwargs: Any) -> None:
        if step == 8:
            saved.wait()  # the checkpoint before is to be whole
            free = os.statvfs(disk)
            filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 16384)))
        save(saved, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", fill)
        assert run(experiment, workdir, "--config.train.tensorboard=False") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("neo_jax: ") and "No space left on device" in told
    filler.unlink()
    assert Folder.of(workdir).steps() == [4]
    assert run(experiment, workdir, "--config.train.tensorboard=False") == 0
    assert lines(workdir) == lines(finished)


# ------------------------------------------------------------------------ another beginning


@pytest.mark.slow
def test_a_new_run_starts_with_another_ones_parameters(
    finished, experiment, tmp_path, capsys
) -> None:
    capsys.readouterr()
    there = f"--config.train.init_from={finished}"
    assert run(experiment, tmp_path / "run", there, "--config.train.seed=1") == 0
    told = capsys.readouterr().err
    assert f"of {finished}/checkpoints/{STEPS}." in told and "starting: " in told
    first = lines(tmp_path / "run")[0]["loss"]
    assert first < lines(finished, evaluated=False)[3]["loss"]
    # From then on it resumes from its own.
    assert run(experiment, tmp_path / "run", there, "--config.train.seed=1") == 0
    assert f"resuming after step {STEPS}" in capsys.readouterr().err
