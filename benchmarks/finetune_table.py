"""What reading gives a small GPT-Neo on GLUE and SuperGLUE, beside models that read nothing.

    python benchmarks/finetune_table.py --checkpoint runs/cpu_hour --data DATA --output OUT

DATA holds glue/ and super_glue/ with official files. For each task that is there, and each
seed, a GPT-Neo is tuned from the checkpoint (head on the last token) and, by the same recipe,
from random weights of the same shape; beside them stand the commonest label, and TF-IDF with
logistic regression. A run is a folder of OUT and one JSON in OUT/results; what is there is not
run again, so that the same command goes on, small tasks first. `--only table` writes OUT's
table.md and table.json from what there is.

What this is not: GPT-Neo's published weights, GLUE's hidden test sets, or a search for the
best recipe. All figures are of validation splits, on which each run's best of two
checkpoints is chosen, for tuned and random weights alike. BoolQ's training split is not at
hand: here its validation split is parted, every fifth row to judge and the others to learn
from. MRPC's "validation" is the corpus' own test split, CoLA's both of its development files.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from neo_jax import compilation, exits
from neo_jax import config as config_lib
from neo_jax.config import Config, ConfigError
from neo_jax.evaluate.glue import metrics, reading, tasks
from neo_jax.finetune import baselines, classify


class Recipe(NamedTuple):
    """How long a task is learned, and how many tokens its rows have."""

    name: str
    epochs: float
    seq_len: int = 96  # where a text is longer (BoolQ, RTE), its longest field is cut


# From the least work to the most, a choice by cost and not by score, so that ten runs of each
# take about 90 CPU-minutes with the model of cpu_hour (6,500 tokens a second on two cores).
# CoLA's and SST-2's single sentences seldom have more tokens than theirs.
# `--longer 4` is the recipe for a machine with more time.
TASKS = (
    Recipe("cb", 3.0),
    Recipe("copa", 2.0),
    Recipe("wsc", 1.0),
    Recipe("rte", 0.5),
    Recipe("wic", 0.5),
    Recipe("boolq", 0.5),
    Recipe("mrpc", 0.5),
    Recipe("stsb", 0.5),
    Recipe("cola", 4.0, 32),
    Recipe("sst2", 0.4, 48),
)
KINDS = ("pretrained", "random")
RANKS = (8, 16, 32, 64)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--tasks", default=",".join(recipe.name for recipe in TASKS))
    parser.add_argument("--seeds", default=5, type=int)
    parser.add_argument("--first_seed", default=0, type=int)
    parser.add_argument("--longer", default=1.0, type=float, help="times as many epochs")
    parser.add_argument("--learning_rate", default=5e-4, type=float)
    parser.add_argument("--minutes", default=1e9, type=float, help="start no run after these")
    parser.add_argument("--only", choices=("table", "baselines", "tuning", "lora"))
    flags = parser.parse_args()
    with exits.told_in_one_line():
        _run(flags)


def _run(flags: argparse.Namespace) -> None:
    compilation.use_cache()
    (flags.output / "results").mkdir(parents=True, exist_ok=True)
    folder = _data(flags.data, flags.output / "data")
    chosen = [
        recipe._replace(epochs=flags.longer * recipe.epochs)
        for recipe in TASKS
        if recipe.name in flags.tasks.split(",")
    ]
    if flags.only in (None, "baselines"):
        for recipe in chosen:
            _baselines(tasks.TASKS[recipe.name], folder, flags.output)
    began = time.monotonic()
    for recipe, seed, kind in _runs(chosen, flags):
        if time.monotonic() - began > 60 * flags.minutes:
            break
        _tune(recipe, seed, kind, folder, flags)
    _write_table(flags.output)


def _runs(chosen: Sequence[Recipe], flags: Any) -> list[tuple[Recipe, int, str]]:
    """Every run, seed by seed within a task, so that a broken-off table has whole rows."""
    seeds = range(flags.first_seed, flags.first_seed + flags.seeds)
    if flags.only in ("table", "baselines"):
        return []
    if flags.only == "lora":
        (recipe,) = [recipe for recipe in chosen if recipe.name == "sst2"]
        return [(recipe, seed, f"lora_{rank}") for seed in seeds for rank in RANKS]
    return [(recipe, seed, kind) for recipe in chosen for seed in seeds for kind in KINDS]


def _data(source: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    """A folder with all tasks' folders; BoolQ's is parted here."""
    output.mkdir(parents=True, exist_ok=True)
    missing = [name for name in ("glue", "super_glue/BoolQ") if not (source / name).is_dir()]
    if missing:
        raise ConfigError(f"--data {source} has no {' and no '.join(missing)}.")
    for suite in ("glue", "super_glue"):
        for place in (source / suite).iterdir():
            link = output / place.name
            if place.is_dir() and place.name != "BoolQ" and not link.exists():
                link.symlink_to(place.resolve())
    parted = output / "BoolQ"
    parted.mkdir(exist_ok=True)
    rows = (source / "super_glue/BoolQ/val.jsonl").read_text().splitlines(keepends=True)
    parts = {"val": rows[::5], "train": [row for i, row in enumerate(rows) if i % 5]}
    for name, part in parts.items():
        (parted / f"{name}.jsonl").write_text("".join(part))
    return output


def _task(name: str) -> tasks.Task:
    return tasks.TASKS["super_rte" if name == "rte" else name]


def _baselines(task: tasks.Task, folder: pathlib.Path, output: pathlib.Path) -> None:
    task = _task(task.name)
    training = reading.read(task, "train", folder)
    asked = reading.read(task, "validation", folder)
    for kind, answer in (
        ("majority", baselines.majority),
        ("words", baselines.words_alone),
    ):
        path = output / "results" / f"{task.name}.{kind}.0.json"
        if not path.exists():
            began = time.monotonic()
            figures = metrics.scores(task, asked, answer(task, training, asked))
            _write(path, {**figures, "seconds": time.monotonic() - began})
            print(path.stem, figures, flush=True)


def _config(recipe: Recipe, seed: int, kind: str, folder: Any, flags: Any) -> Config:
    settings = [
        f"classify.name={_task(recipe.name).name}",
        f"classify.folder={folder}",
        f"classify.epochs={recipe.epochs}",
        f"classify.random_weights={kind == 'random'}",
        f"train.init_from={flags.checkpoint}",
        f"train.seed={seed}",
        f"optimizer.learning_rate={flags.learning_rate}",
        f"data.seq_len={recipe.seq_len}",
        "data.length_group=32",
        "classify.evaluations=2",
        "model.scan_layers=False",
        "finetune.export=none",
        "mesh.fsdp=1",
    ]
    if kind.startswith("lora_"):
        rank = kind.removeprefix("lora_")
        settings += [
            "finetune.trainable=lora",
            f"model.lora_rank={rank}",
            f"model.lora_alpha={rank}",
            f"optimizer.learning_rate={4 * flags.learning_rate}",
        ]
    return config_lib.load_experiment("glue", settings)


def _tune(recipe: Recipe, seed: int, kind: str, folder: Any, flags: Any) -> None:
    task = _task(recipe.name)
    path = flags.output / "results" / f"{task.name}.{kind}.{seed}.json"
    if path.exists():
        return
    workdir = flags.output / "runs" / f"{task.name}_{kind}_{seed}"
    config = _config(recipe, seed, kind, folder, flags)
    began = time.process_time()
    classify.run(config, workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    kept = {key: summary[key] for key in (*task.metrics, "score", "step", "parameters")}
    kept |= {"cpu_seconds": time.process_time() - began, "epochs": recipe.epochs}
    kept |= {"learning_rate": config.optimizer.learning_rate}
    _write(path, kept)
    shutil.rmtree(workdir)  # a hundred checkpoints would fill the disk
    print(path.stem, kept, flush=True)


# ----------------------------------------------------------------------------------- table


def _write_table(output: pathlib.Path) -> None:
    """table.json: all figures by task and kind; table.md: the task's own score."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for path in sorted((output / "results").glob("*.json")):
        name, kind, _ = path.stem.split(".")
        found.setdefault(name, {}).setdefault(kind, []).append(json.loads(path.read_text()))
    kinds = ["majority", "words", "random", "pretrained", *(f"lora_{rank}" for rank in RANKS)]
    kinds = [kind for kind in kinds if any(kind in of for of in found.values())]
    lines = [f"| task | metric | {' | '.join(kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for name in dict.fromkeys(_task(recipe.name).name for recipe in TASKS):
        if name not in found:
            continue
        task = tasks.TASKS[name]
        for metric in task.metrics:
            cells = [_cell([run[metric] for run in found[name].get(k, [])]) for k in kinds]
            lines.append(f"| {task.title} | {metric} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (output / "table.md").write_text(text)
    _write(output / "table.json", found)
    print(text)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f} ({len(values)})"


def _write(path: pathlib.Path, content: Any) -> None:
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(content, indent=2) + "\n")
    aside.replace(path)


if __name__ == "__main__":
    main()
