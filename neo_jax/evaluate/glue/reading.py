"""The examples of a task, from the official files or from TFDS.

Enters: a task, a split, and a folder of official files (`CoLA/train.tsv`, `BoolQ/val.jsonl`,
as the benchmarks' sites give them) or TFDS's prepared sets. Leaves: a list of `Example`s in
the files' order, with labels as places in the task's official order.

The official .tsv files know no quoting: a quote is a character like any other.
"""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from neo_jax.config import ConfigError
from neo_jax.evaluate.glue.tasks import PLACEHOLDER, Example, Task

SPLITS = ("train", "validation", "test")
# TFDS keeps what SuperGLUE's own files nest, and calls some tasks by other names.
_TFDS_NAMES = {
    "mnli_matched": "glue/mnli",
    "mnli_mismatched": "glue/mnli",
    "super_rte": "super_glue/rte",
}
_Row = Mapping[str, Any]


class MissingSplit(ConfigError):
    """A task's split is not there; the message says where it was looked for."""


def read(task: Task, split: str, folder: pathlib.Path) -> list[Example]:
    """Examples of official files.

    Args:
      task: which.
      split: "train", "validation" or "test"; a test split mostly has no labels.
      folder: holds a folder for each task, or is the task's own.

    Raises:
      MissingSplit: no such file; the paths tried are listed.
      ConfigError: a missing column (those that are there are listed), or a label that the
        task does not know; one line with the row.
    """
    examples: list[Example] = []
    for path in _find(task, split, folder):
        rows = _tsv_rows(task, path) if path.suffix != ".jsonl" else _json_rows(path)
        for where, row in rows:
            examples.extend(_NESTED.get(task.name, _flat)(task, row, where, len(examples)))
    if not examples:
        raise ConfigError(f"{task.title}: the {split} split in {folder} is empty.")
    return examples


def read_tfds(task: Task, split: str, tfds_dir: pathlib.Path) -> list[Example]:
    """Examples of a set that TFDS prepared as ArrayRecord; needs no TensorFlow.

    Raises:
      MissingSplit: it is not prepared there; the folder tried is named.
    """
    name = _TFDS_NAMES.get(task.name, f"{task.suite}/{task.name}")
    root = tfds_dir.expanduser() / name
    versions = sorted(root.glob("*/dataset_info.json"))
    if not versions:
        raise MissingSplit(
            f"{task.title}: TFDS has not prepared {name}; tried {root}/*/dataset_info.json. "
            f"Build it where TensorFlow is installed: "
            f"python -m neo_jax.prepare --build_tfds {name}"
        )
    import tensorflow_datasets as tfds  # does not import TensorFlow by itself

    if task.name.startswith("mnli_") and split != "train":
        split = f"{split}_{task.name.removeprefix('mnli_')}"
    builder = tfds.builder_from_directory(str(versions[-1].parent))
    if split not in builder.info.splits:
        have = ", ".join(builder.info.splits)
        raise MissingSplit(f"{task.title}: {name} has no split {split!r}; there are {have}.")
    return [
        _of_tfds(task, dict(row), f"{name} row {number}")
        for number, row in enumerate(builder.as_data_source(split))
    ]


# ------------------------------------------------------------------------------- files


def _find(task: Task, split: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a split; several where the official one was published in parts."""
    if split not in task.files:
        have = ", ".join(task.files)
        raise MissingSplit(f"{task.title} has no split {split!r}; there are {have}.")
    places = [folder / name for name in task.folders] + [folder]
    tried: list[str] = []
    for place in places:
        for names in task.files[split]:
            paths = [place / name for name in names.split("+")]
            if all(path.is_file() for path in paths):
                return paths
            tried.extend(str(path) for path in paths)
    raise MissingSplit(f"{task.title}: no {split} file found; tried {', '.join(tried)}.")


def _tsv_rows(task: Task, path: pathlib.Path) -> Iterator[tuple[str, _Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header: Sequence[str] | None = None
        # CoLA's labelled files begin with their first sentence.
        if task.name == "cola" and not path.name.startswith("test"):
            header = ("source", "label", "star", "sentence")
        for number, cells in enumerate(rows, 1):
            where = f"{path}:{number}"
            if header is None:
                header = cells
            elif len(cells) < len(header):
                raise ConfigError(
                    f"{where}: {len(cells)} columns instead of {len(header)} "
                    f"({', '.join(header)})."
                )
            else:
                yield where, dict(zip(header, cells, strict=False))


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, _Row]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where}: not valid JSON: {error.msg}.") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: a JSON object is wanted, not {line.strip()[:40]}")
            yield where, row


# ------------------------------------------------------------------------------- rows


def _pick(row: _Row, names: Sequence[str], where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ConfigError(
        f"{where}: no column {' or '.join(map(repr, names))}; there are {', '.join(row)}."
    )


def _index(row: _Row, default: int) -> int:
    try:
        return int(row.get("idx", row.get("index", default)))
    except (TypeError, ValueError):
        return default


def _flat(task: Task, row: _Row, where: str, number: int) -> Iterator[Example]:
    """One row, one example."""
    fields = {key: _pick(row, names, where) for key, names in task.columns.items()}
    written: Any = None
    for name in ("label", "gold_label", "Quality", "is_duplicate", "score"):
        if name in row:
            written = row[name]
            break
    choices: tuple[str, ...] = ()
    if task.name == "copa":
        choices = tuple(str(_pick(row, (f"choice{n}",), where)) for n in (1, 2))
    group = _index(row, number) // 2 if task.name == "axg" else None
    if task.name == "axg" and "pair_id" in row:
        group = int(row["pair_id"])
    yield Example(
        index=_index(row, number),
        fields={key: str(value) for key, value in fields.items()},
        label=_label(task, written, where, choices),
        choices=choices,
        group=group,
    )


def _label(
    task: Task, written: Any, where: str, choices: Sequence[str] = ()
) -> int | float | None:
    if written is None or written in ("", -1):
        return None
    if task.is_regression:
        try:
            score = float(written)
        except ValueError:
            score = -1.0
        if not 0 <= score <= 5:
            raise ConfigError(f"{where}: score {written!r} does not lie in 0 … 5.")
        return score
    names = task.labels or choices
    if task.written == "name" and str(written) in task.labels:
        return task.labels.index(str(written))
    # BoolQ and others write JSON's true and false, of which Python's names are the labels.
    if str(written) in ("true", "false"):
        return task.labels.index(str(written).capitalize())
    if task.written == "index" and str(written).isdigit() and int(written) < len(names):
        return int(written)
    known = ", ".join(task.labels) if task.written == "name" else f"0 … {len(names) - 1}"
    raise ConfigError(f"{where}: label {written!r} is not one of {known}.")


def _multirc(task: Task, row: _Row, where: str, number: int) -> Iterator[Example]:
    """A passage with its questions, each with its answers: an example an answer."""
    passage = _pick(row, ("passage",), where)
    for question in _pick(passage, ("questions",), where):
        for answer in _pick(question, ("answers",), where):
            index = (_index(row, number), int(question["idx"]), int(answer["idx"]))
            yield Example(
                index=index,
                fields={
                    "paragraph": str(passage["text"]),
                    "question": str(question["question"]),
                    "answer": str(answer["text"]),
                },
                label=_label(task, answer.get("label"), where),
                group=index[:2],
            )


def _record(task: Task, row: _Row, where: str, number: int) -> Iterator[Example]:
    """A passage with its entities and queries: an example a query, a choice an entity."""
    passage = _pick(row, ("passage",), where)
    text = str(_pick(passage, ("text",), where))
    spans = [(int(e["start"]), int(e["end"])) for e in _pick(passage, ("entities",), where)]
    # `end` is the last character's place, its own included.
    entities = tuple(dict.fromkeys(text[start : end + 1] for start, end in sorted(spans)))
    for query in _pick(row, ("qas",), where):
        answers = tuple(dict.fromkeys(str(a["text"]) for a in query.get("answers", ())))
        yield _record_example(
            task, int(query["idx"]), text, str(query["query"]), entities, answers, where
        )


def _record_example(
    task: Task,
    index: int,
    passage: str,
    query: str,
    entities: tuple[str, ...],
    answers: tuple[str, ...],
    where: str,
) -> Example:
    if PLACEHOLDER not in query or not entities:
        raise ConfigError(
            f"{where}: {task.title} wants entities, and {PLACEHOLDER} in a query."
        )
    known = [entity for entity in entities if entity in answers]
    return Example(
        index=index,
        # The highlights below the passage are marked so; they are sentences of their own.
        fields={"passage": passage.replace("\n@highlight\n", "\n"), "query": query},
        label=entities.index(known[0]) if known else None,
        choices=entities,
        accepted=answers,
    )


def _wsc(task: Task, row: _Row, where: str, number: int) -> Iterator[Example]:
    """A text in which a pronoun and a noun are marked."""
    target = _pick(row, ("target",), where)
    yield Example(
        index=_index(row, number),
        fields={
            "text": str(_pick(row, ("text",), where)),
            "pronoun": str(_pick(target, ("span2_text",), where)),
            "noun": str(_pick(target, ("span1_text",), where)),
        },
        label=_label(task, row.get("label"), where),
    )


_NESTED: Mapping[str, Callable[[Task, _Row, str, int], Iterator[Example]]] = {
    "multirc": _multirc,
    "record": _record,
    "wsc": _wsc,
}


# ------------------------------------------------------------------------------- TFDS


def _of_tfds(task: Task, row: dict[str, Any], where: str) -> Example:
    """A row of TFDS, whose labels are places in the same order, and -1 where there is none."""
    row = {key: _decoded(value) for key, value in row.items()}
    index: Any = row.get("idx", 0)
    if task.name == "record":
        entities = tuple(dict.fromkeys(row["entities"]))
        answers = tuple(dict.fromkeys(row["answers"]))
        place = int(index["query"])
        text, query = row["passage"], row["query"]
        return _record_example(task, place, text, query, entities, answers, where)
    if task.name == "multirc":
        index = tuple(int(index[key]) for key in ("paragraph", "question", "answer"))
    elif task.name == "wsc":
        row |= {"pronoun": row["span2_text"], "noun": row["span1_text"]}
    choices = (row["choice1"], row["choice2"]) if task.name == "copa" else ()
    names = {key: task.columns[key] or (key,) for key in task.columns}
    label = row.get("label")
    if label is not None:
        label = float(label) if task.is_regression else int(label)
    return Example(
        index=index if isinstance(index, tuple) else int(index),
        fields={key: str(_pick(row, (key, *names[key]), where)) for key in names},
        label=None if label is None or label < 0 else label,
        choices=choices,
        group=index[:2] if task.name == "multirc" else _pair_of(task, index),
    )


def _pair_of(task: Task, index: Any) -> int | None:
    return int(index) // 2 if task.name == "axg" else None


def _decoded(value: Any) -> Any:
    """Bytes as text, at every depth of lists and arrays."""
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "tolist") and not isinstance(value, str):
        return _decoded(value.tolist())
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return value
