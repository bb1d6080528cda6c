"""Several tasks, each with several seeds, and the table of what came of them.

Enters: a config, tasks and a number of seeds. Leaves: a workdir a run, TASK/seed_N, and
results.json, results.md and results.png, written anew after each run. A run that is finished
is not run again, and one that was broken off goes on, so that the same command resumes.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from neo_jax import config as config_lib
from neo_jax.checkpoint.restoring import tell
from neo_jax.config import Config, ConfigError
from neo_jax.evaluate.glue import metrics, reading, tasks
from neo_jax.evaluate.glue.tasks import Task
from neo_jax.finetune import classify, judging

_SETTINGS = "suite.json"


def run(config: Config, names: Sequence[str], num_seeds: int, workdir: pathlib.Path) -> None:
    """Runs what is not finished, and writes the table.

    Args:
      config: of each run, but for the task's name and the seed, which counts from
        `train.seed`.
      names: of tasks; none, all of `classify.suite`.
      num_seeds: runs of each task.
      workdir: of all.

    Raises:
      ConfigError: an unknown task, data that is not there (all of it is listed), or a
        workdir with results of other settings.
      Whatever `run.start` raises.
    """
    chosen = [tasks.find(name) for name in names] or list(tasks.suite(config.classify.suite))
    homes = list(dict.fromkeys(judging.home_of(task).name for task in chosen))
    _require_data(homes, config)
    _settle(config, workdir)
    seeds = range(config.train.seed, config.train.seed + num_seeds)
    for name in homes:
        for seed in seeds:
            folder = workdir / name / f"seed_{seed}"
            if (folder / "summary.json").exists():
                continue
            tell(f"{tasks.TASKS[name].title}, seed {seed}: {folder}")
            classify.run(
                dataclasses.replace(
                    config,
                    train=dataclasses.replace(config.train, seed=seed),
                    classify=dataclasses.replace(config.classify, name=name),
                ),
                folder,
            )
            write_table(results(workdir), workdir)
    write_table(results(workdir), workdir)


def results(workdir: pathlib.Path) -> dict[str, Any]:
    """Figures of all finished runs below a workdir.

    Returns:
      `tasks`: by name (and split, where it is not the validation split) and metric, `mean`,
      `sd` (n - 1; 0 for one) and `values`; `seeds`: how many of each; `suite_score`: the mean
      of the tasks' scores, by seed, where a seed has finished all tasks.
    """
    found: dict[str, dict[int, Mapping[str, float]]] = {}
    for path in sorted(workdir.glob("*/seed_*/summary.json")):
        seed = int(path.parent.name.removeprefix("seed_"))
        summary = json.loads(path.read_text())
        figures = {summary["task"]: summary, **summary["also"]}
        for name, values in figures.items():
            task = tasks.TASKS[name.split("/")[0]]
            kept = {key: values[key] for key in (*task.metrics, "score")}
            found.setdefault(name, {})[seed] = kept
    order = list(tasks.TASKS)
    found = {
        name: found[name]
        for name in sorted(found, key=lambda name: order.index(name.split("/")[0]))
    }
    return {
        "tasks": {name: _by_metric(by_seed) for name, by_seed in found.items()},
        "seeds": {name: sorted(by_seed) for name, by_seed in found.items()},
        "suite_score": _suite_score(found),
    }


def write_table(found: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Writes results.json, results.md and results.png; each is whole or as it was."""
    if not found["tasks"]:
        return
    _replace(workdir / "results.json", (json.dumps(found, indent=2) + "\n").encode())
    _replace(workdir / "results.md", markdown(found).encode())
    _replace(workdir / "results.png", picture(found))


def markdown(found: Mapping[str, Any]) -> str:
    """A row for each task, figures in hundredths."""
    lines = ["| task | metric | mean ± sd | seeds |", "|---|---|---|---|"]
    for name, figures in found["tasks"].items():
        for metric, of in figures.items():
            if metric == "score" and len(figures) == 2:
                continue  # it is the only metric once more
            lines.append(
                f"| {_title(name)} | {metric} | {100 * of['mean']:.1f} ± {100 * of['sd']:.1f} "
                f"| {len(of['values'])} |"
            )
    of = found["suite_score"]
    if of["values"]:
        lines.append(
            f"| mean of tasks | score | {100 * of['mean']:.1f} ± {100 * of['sd']:.1f} "
            f"| {len(of['values'])} |"
        )
    return "\n".join(lines) + "\n"


def picture(found: Mapping[str, Any]) -> bytes:
    """Each task's score over the seeds, as PNG."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(found["tasks"])
    scores = [found["tasks"][name]["score"] for name in names]
    figure = Figure(figsize=(7, 1 + 0.35 * len(names)), layout="constrained")
    axis = FigureCanvasAgg(figure).figure.subplots()
    axis.barh(
        range(len(names)),
        [100 * of["mean"] for of in scores],
        xerr=[100 * of["sd"] for of in scores],
        color="tab:blue",
        alpha=0.6,
    )
    for place, of in enumerate(scores):
        axis.plot([100 * v for v in of["values"]], [place] * len(of["values"]), "k.", ms=3)
    axis.set_yticks(range(len(names)), [_title(name) for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("score (mean of the task's metrics, in hundredths); points are seeds")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _title(name: str) -> str:
    task, _, split = name.partition("/")
    return tasks.TASKS[task].title + (f" ({split})" if split else "")


def _by_metric(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    names = next(iter(by_seed.values()))
    return {name: _spread([by_seed[seed][name] for seed in sorted(by_seed)]) for name in names}


def _spread(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "sd": None, "values": []}
    mean, deviation = metrics.mean_and_deviation(values)
    return {"mean": mean, "sd": deviation, "values": values}


def _suite_score(found: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, Any]:
    counted = {
        name.removesuffix("/validation"): by_seed
        for name, by_seed in found.items()
        if not name.endswith("/test") and not _is_diagnostic(name)
    }
    seeds = [set(by_seed) for by_seed in counted.values()]
    seeds = [set(by_seed) for by_seed in counted.values()]
    shared = set.intersection(*seeds) if seeds else set()
    return _spread(
        [
            metrics.suite_score({name: by_seed[seed] for name, by_seed in counted.items()})
            for seed in sorted(shared)
        ]
    )


def _is_diagnostic(name: str) -> bool:
    return name.split("/")[0] in ("ax", "axb", "axg")


def _require_data(homes: Sequence[str], config: Config) -> None:
    missing = []
    for name in homes:
        task: Task = tasks.TASKS[name]
        try:
            for split in ("train", "validation"):
                judging.labelled(task, split, config)
        except reading.MissingSplit as error:
            missing.append((name, str(error)))
    if missing:
        left = [name for name in homes if name not in dict(missing)]
        hint = f"; --tasks {','.join(left)} leaves them out" if left else ""
        raise ConfigError(
            f"there is no data for {', '.join(name for name, _ in missing)} "
            f"({missing[0][1].rstrip('.')}){hint}."
        )


def _settle(config: Config, workdir: pathlib.Path) -> None:
    """Keeps the settings of all runs, or checks that they are those that are kept.

    Raises:
      ConfigError: they are others.
    """
    path = workdir / _SETTINGS
    now = json.loads(config_lib.to_json(config))
    if path.exists():
        before = json.loads(path.read_text())
        changed = [
            f"{section}.{key}"
            for section, keys in now.items()
            if isinstance(keys, dict)
            for key in keys
            if before.get(section, {}).get(key) != keys[key]
        ]
        if changed:
            raise ConfigError(
                f"--workdir {workdir} holds results of other settings "
                f"({', '.join(changed)}); choose another workdir, or take the change back."
            )
        return
    workdir.mkdir(parents=True, exist_ok=True)
    _replace(path, (json.dumps(now, indent=2) + "\n").encode())


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Process 0 writes for all."""
    if jax.process_index() != 0:
        return
    aside = path.with_name(f"{path.name}.partial")
    aside.write_bytes(content)
    aside.replace(path)
