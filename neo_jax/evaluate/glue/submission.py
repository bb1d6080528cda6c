"""Predictions in the form that the benchmarks' servers take.

Enters: a task, its examples in order, predictions. Leaves: the official file's text.

Sources: gluebenchmark.com/faq (a .tsv with the header "index", "prediction");
super.gluebenchmark.com/faq and jiant's writer (a JSON object a line with "idx" and "label").
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

from neo_jax.evaluate.glue.metrics import Prediction
from neo_jax.evaluate.glue.tasks import Example, Task

# Whose predictions are written as numbers of labels, not names.
_AS_NUMBERS = ("cola", "sst2", "mrpc", "qqp", "wnli")
_AS_TRUTH = ("boolq", "wic")  # JSON strings "true" and "false"


def write(
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    folder: pathlib.Path,
) -> pathlib.Path:
    """Writes the file of a task's predictions; its name is the official one.

    Raises:
      ValueError: another number of predictions than of examples.
    """
    if len(examples) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples.")
    lines = _tsv if task.suite == "glue" else _multirc if task.name == "multirc" else _jsonl
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / task.submission
    aside = path.with_name(path.name + ".partial")
    aside.write_text("".join(line + "\n" for line in lines(task, examples, predictions)))
    return aside.replace(path)


def _tsv(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction]
) -> Iterator[str]:
    yield "index\tprediction"
    for example, prediction in zip(examples, predictions, strict=True):
        if task.is_regression:
            shown = f"{min(5.0, max(0.0, float(prediction))):.3f}"
        elif task.name in _AS_NUMBERS:
            shown = str(int(prediction))
        else:
            shown = task.labels[int(prediction)]
        yield f"{example.index}\t{shown}"


def _jsonl(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction]
) -> Iterator[str]:
    for example, prediction in zip(examples, predictions, strict=True):
        label: int | str
        if task.name == "copa":
            label = int(prediction)
        elif task.name == "record":
            label = example.choices[int(prediction)]
        elif task.name in _AS_TRUTH:
            label = task.labels[int(prediction)].lower()
        else:
            label = task.labels[int(prediction)]
        yield json.dumps({"idx": example.index, "label": label})


def _multirc(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction]
) -> Iterator[str]:
    """A line a passage, which holds its questions, which hold their answers."""
    del task
    rows = [
        (*_three(example), int(prediction))
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    for passage, of_passage in itertools.groupby(rows, key=lambda row: row[0]):
        questions = [
            {
                "idx": question,
                "answers": [{"idx": row[2], "label": row[3]} for row in of_question],
            }
            for question, of_question in itertools.groupby(of_passage, key=lambda row: row[1])
        ]
        yield json.dumps({"idx": passage, "passage": {"questions": questions}})


def _three(example: Example) -> tuple[int, int, int]:
    assert isinstance(example.index, tuple)
    return example.index
