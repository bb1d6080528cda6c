"""A task's data and its relatives, and what is written of predictions.

Enters: a task, where its data lies, and a function from examples to predictions. Leaves:
figures by the official metrics, and the files that the benchmarks' servers take.

Some tasks have no training split: they are answered by what learned another one, their home
(Wang et al. 2018, section 3.4; Wang et al. 2019, section 3.2).
"""

from __future__ import annotations

import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from neo_jax.config import Config, ConfigError
from neo_jax.evaluate.glue import metrics, reading, submission, tasks
from neo_jax.evaluate.glue.asking import with_fields_of
from neo_jax.evaluate.glue.metrics import Prediction
from neo_jax.evaluate.glue.tasks import Example, Task

_HOMES: Mapping[str, str] = types.MappingProxyType(
    {
        "mnli_mismatched": "mnli_matched",
        "ax": "mnli_matched",
        "axb": "super_rte",
        "axg": "super_rte",
    }
)

# Examples of the home task's form in, predictions out.
Predict: TypeAlias = Callable[[Sequence[Example]], Sequence[Prediction]]


def home_of(task: Task) -> Task:
    """The task whose training split teaches this one; mostly itself."""
    return tasks.TASKS[_HOMES.get(task.name, task.name)]


def family(home: Task) -> list[Task]:
    """A task, and those that are answered by what learned it."""
    return [task for task in tasks.TASKS.values() if home_of(task) is home]


def task_of(config: Config) -> Task:
    """The task that a config names, as its home.

    Raises:
      ConfigError: none is named, or it is unknown.
    """
    if config.classify.name is None:
        raise ConfigError(
            f"task 'classify' needs a task's name, as in --config.classify.name=sst2; there "
            f"are {', '.join(tasks.TASKS)}."
        )
    return home_of(tasks.find(config.classify.name))


def read(task: Task, split: str, config: Config) -> list[Example]:
    """Examples from the folder of official files, or from TFDS.

    Raises as `reading.read`.
    """
    if config.classify.folder is None:
        return reading.read_tfds(task, split, pathlib.Path(config.data.tfds_dir))
    return reading.read(task, split, pathlib.Path(config.classify.folder))


def labelled(task: Task, split: str, config: Config) -> list[Example]:
    """As `read`, of a split that is learned or judged.

    Raises:
      ConfigError: as `read`, or an example has no label.
    """
    examples = read(task, split, config)
    for example in examples:
        if not _is_labelled(example):
            raise ConfigError(
                f"{task.title}: example {example.index} of the {split} split has no label."
            )
    return examples


def report(
    home: Task, config: Config, predict: Predict, workdir: pathlib.Path
) -> dict[str, Any]:
    """Predictions for all that was not judged while learning, where its data is there.

    Returns:
      `also`: figures by task and split, where labels are published; `submissions`: the files
      written, below `workdir`.
    """
    also: dict[str, dict[str, float]] = {}
    written: list[str] = []
    for task, split, examples in _others(home, config):
        alike = examples if task is home else [with_fields_of(home, e) for e in examples]
        predictions = predict(alike)
        if all(map(_is_labelled, examples)):
            also[f"{task.name}/{split}"] = metrics.scores(task, examples, predictions)
        if split == "test" and jax.process_index() == 0:
            path = submission.write(task, examples, predictions, workdir / "submission")
            written.append(str(path.relative_to(workdir)))
    return {"also": also, "submissions": written}


def _others(home: Task, config: Config) -> Iterator[tuple[Task, str, list[Example]]]:
    for task in family(home):
        for split in ("validation", "test"):
            if (task, split) == (home, "validation"):
                continue
            try:
                examples = read(task, split, config)
            except reading.MissingSplit:
                continue
            yield task, split, examples


def _is_labelled(example: Example) -> bool:
    return example.label is not None or bool(example.accepted)
