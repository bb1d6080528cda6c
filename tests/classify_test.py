"""A task is learned end to end: official files in, figures, submissions and a model out."""

import json
import pathlib
import shutil
from typing import Any

import jax
import pytest

from neo_jax import checkpoint, main, sharding, state, tokenizer
from neo_jax import config as config_lib
from neo_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from neo_jax.evaluate.glue import reading
from neo_jax.evaluate.glue.tasks import TASKS
from neo_jax.finetune import __main__ as suite_command
from neo_jax.finetune import suite
from tests import classify_fixtures
from tests.pretrain_test import _one_device as _one_device
from tests.pretrain_test import lines, summary
from tests.stopping import stopped_after

EXPERIMENT = """\
from neo_jax.experiments import glue

def get_config():
    config = glue.get_config()
    config.train.init_from = {base!r}
    config.classify.folder = {folder!r}
    config.data.update(seq_len=64, batch_size=4)
    config.eval.batch_size = 4
    config.classify.update(epochs=2.0, evaluations=2)
    config.optimizer.learning_rate = 1e-3
    config.train.log_every = 1
    config.checkpoint.update(every=2, minutes=0.0)
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Official files of all tasks; not to be changed."""
    where = tmp_path_factory.mktemp("data")
    classify_fixtures.write_all(where)
    return where


@pytest.fixture(scope="module")
def base(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a language model; not to be changed."""
    workdir = tmp_path_factory.mktemp("base")
    texts = [path.read_text() for path in sorted(folder.rglob("*.*"))]
    words = tokenizer.train_bpe(texts, 500)
    words.save(workdir)
    model = ModelConfig(
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        window_size=8,
        vocab_size=words.vocab_size,
        max_seq_len=64,
        initializer="hf",
    )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    config = Config(model=model, data=DataConfig(seq_len=64))
    checkpoint.save_params(workdir, state.create_params(model, mesh, 0), config)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    return workdir


def experiment(folder: pathlib.Path, base: pathlib.Path, suite: str, where: Any) -> str:
    path = where / f"mine_{suite}.py"
    path.write_text(EXPERIMENT.format(base=str(base), folder=str(folder / suite)))
    return str(path)


def learn(
    folder: pathlib.Path, base: pathlib.Path, workdir: pathlib.Path, name: str, *more: str
) -> int:
    """One task by the one command; its exit code."""
    workdir.parent.mkdir(exist_ok=True)
    mine = experiment(folder, base, TASKS[name].suite, workdir.parent)
    arguments = ["--config", mine, "--workdir", str(workdir)]
    try:
        main.main([*arguments, f"--config.classify.name={name}", *more])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def learn_suite(
    folder: pathlib.Path, base: pathlib.Path, workdir: pathlib.Path, suite: str, *more: str
) -> int:
    """Several tasks by the other command; its exit code."""
    mine = experiment(folder, base, suite, workdir.parent)
    try:
        suite_command.main(["--config", mine, "--workdir", str(workdir), *more])
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "form", "names"),
    [
        ("glue", "head", ""),
        ("super_glue", "head", ""),
        ("glue", "ask", ""),
        ("super_glue", "ask", ""),
        ("glue", "prompt", "stsb"),
        ("super_glue", "prompt", "copa,record"),
    ],
)
def test_every_task_runs_from_its_official_files_to_its_submission(
    of: str, form: str, names: str, folder, base, tmp_path
) -> None:
    how = (f"--config.classify.form={form}", f"--config.classify.suite={of}")
    how += ("--tasks", names, "--config.classify.epochs=1", "--config.classify.evaluations=1")
    assert learn_suite(folder, base, tmp_path / "all", of, *how) == 0
    found = json.loads((tmp_path / "all" / "results.json").read_text())
    chosen = [TASKS[name] for name in names.split(",") if name]
    of_suite = chosen or [task for task in TASKS.values() if task.suite == of]
    for task in of_suite:
        places = [name for name in found["tasks"] if name.split("/")[0] == task.name]
        assert places or task.name == "ax"  # whose labels are not published
        for place in places:
            assert set(task.metrics) < set(found["tasks"][place])
    written = {path.name for path in (tmp_path / "all").rglob("submission/*")}
    assert written == {task.submission for task in of_suite}


@pytest.fixture(scope="module")
def learned(folder, base, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a finished run; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "cb"
    assert learn(folder, base, workdir, "cb") == 0
    return workdir


def test_a_run_ends_with_official_figures_files_and_its_best(learned) -> None:
    found = summary(learned)
    assert set(TASKS["cb"].metrics) < set(found) and found["task"] == "cb"
    best = max(line["score"] for line in lines(learned) if line["split"] == "eval")
    assert found["score"] == best
    sent = (learned / "submission" / "CB.jsonl").read_text().splitlines()
    assert [json.loads(line)["idx"] for line in sent] == [0, 1, 2, 3]
    assert all(json.loads(line)["label"] in TASKS["cb"].labels for line in sent)


# Nothing moves, and batches of another size are judged.
STILL = ("--config.classify.epochs=0", "--config.train.num_steps=1", "--config.eval.every=0")
STILL += ("--config.optimizer.learning_rate=1e-12", "--config.eval.batch_size=3")


def killed(folder, base, workdir: pathlib.Path, *how: str) -> None:
    """A run that is killed after a step, and typed again."""
    with stopped_after(5):
        learn(folder, base, workdir, "cb", *how)
    assert learn(folder, base, workdir, "cb", *how) == 0


def test_a_killed_run_goes_on_to_the_digit(
    folder, base, learned, tmp_path, monkeypatch
) -> None:
    killed(folder, base, tmp_path / "cb")
    assert lines(tmp_path / "cb") == lines(learned)
    sent = "submission/CB.jsonl"
    assert (tmp_path / "cb" / sent).read_text() == (learned / sent).read_text()


LORA = ("--config.finetune.trainable=lora", "--config.model.lora_rank=2")
LORA += ("--config.model.lora_dropout=0.2",)


@pytest.mark.slow
@pytest.mark.parametrize("how", [LORA, ("--config.classify.form=prompt",)])
def test_each_way_of_learning_goes_on_after_a_kill_and_is_read_back(
    how, folder, base, tmp_path, monkeypatch
) -> None:
    assert learn(folder, base, tmp_path / "whole", "cb", *how) == 0
    killed(folder, base, tmp_path / "killed", *how)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    form = [part for part in how if "form" in part]
    assert learn(folder, tmp_path / "whole", tmp_path / "again", "cb", *STILL, *form) == 0
    for figure in ("score", "loss"):
        again, before = (summary(tmp_path / name)[figure] for name in ("again", "whole"))
        assert again == pytest.approx(before, rel=1e-5)


@pytest.mark.slow
def test_transformers_labels_alike_and_its_checkpoint_is_judged_alike(
    folder, base, learned, tmp_path
) -> None:
    transformers = pytest.importorskip("transformers")
    task = TASKS["cb"]
    asked = reading.read(task, "test", folder / "super_glue")
    pipe = transformers.pipeline("text-classification", model=str(learned / "hf"))
    theirs = [answer["label"] for answer in pipe([task.text(one) for one in asked])]
    sent = (learned / "submission" / "CB.jsonl").read_text().splitlines()
    assert theirs == [json.loads(line)["label"] for line in sent]
    # Read back, and held still: another batch size judges the same.
    still = (
        "--config.classify.epochs=0",
        "--config.train.num_steps=1",
        "--config.eval.every=0",
    )
    still += ("--config.optimizer.learning_rate=1e-12", "--config.eval.batch_size=3")
    for number, source in enumerate((learned / "hf", learned)):
        workdir = tmp_path / str(number)
        assert learn(folder, source, workdir, "cb", *STILL) == 0
        assert summary(workdir)["score"] == summary(learned)["score"]
        assert summary(workdir)["loss"] == pytest.approx(summary(learned)["loss"], rel=1e-5)


def test_a_suite_runs_what_is_missing_and_draws_its_table(
    folder, base, learned, tmp_path, monkeypatch, capsys
) -> None:
    workdir = tmp_path / "suite"
    shutil.copytree(learned, workdir / "cb" / "seed_0")
    ran: list[str] = []
    monkeypatch.setattr(
        suite.classify,
        "run",
        lambda config, where: (
            ran.append(f"{config.classify.name} {config.train.seed}"),
            shutil.copytree(learned, where),
        ),
    )
    how = ("--config.classify.suite=super_glue", "--tasks", "cb", "--seeds", "3")
    assert learn_suite(folder, base, workdir, "super_glue", *how) == 0
    assert ran == ["cb 1", "cb 2"]
    assert learn_suite(folder, base, workdir, "super_glue", *how) == 0 and len(ran) == 2
    score = 100 * summary(learned)["score"]
    assert f"| CB | score | {score:.1f} ± 0.0 | 3 |" in capsys.readouterr().out
    assert (workdir / "results.png").read_bytes().startswith(b"\x89PNG")
    assert (
        learn_suite(folder, base, workdir, "super_glue", *how, "--config.data.seq_len=32") == 2
    )
    told = capsys.readouterr().err.splitlines()[-1]
    assert "holds results of other settings (data.seq_len)" in told


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("bolq", "", "classification task 'bolq' is unknown; did you mean 'boolq'?"),
        (
            "sst2",
            "new_head=False",
            "has a head of 3 labels (entailment, contradiction, neutral)",
        ),
        ("cb", "folder=/nowhere", "CB: no train file found; tried /nowhere/CB/train.jsonl"),
        ("cb", "shots=2", "classify.shots=2 go with classify.form='ask'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    name: str, change: str, said: str, folder, learned, tmp_path, capsys
) -> None:
    mine = experiment(folder, learned, "glue" if name == "sst2" else "super_glue", tmp_path)
    more = [f"--config.classify.{change}"] if change else []
    arguments = ["--config", mine, "--workdir", str(tmp_path / "run"), *more]
    with pytest.raises(SystemExit) as exit_:
        main.main([*arguments, f"--config.classify.name={name}"])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
