"""Small files in the official form of every GLUE and SuperGLUE task, with all their splits."""

import json
import pathlib
from typing import Any

from neo_jax.evaluate.glue.tasks import TASKS, Task

COUNTS = {"train": 12, "validation": 6, "test": 4}
_COLUMNS = {  # the official header of each table, of a labelled split
    "cola": ("source", "label", "star", "sentence"),
    "sst2": ("sentence", "label"),
    "mrpc": ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
    "qqp": ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
    "stsb": ("index", "genre", "sentence1", "sentence2", "score"),
    "mnli_matched": ("index", "promptID", "sentence1", "sentence2", "label1", "gold_label"),
    "qnli": ("index", "question", "sentence", "label"),
    "rte": ("index", "sentence1", "sentence2", "label"),
    "wnli": ("index", "sentence1", "sentence2", "label"),
    "ax": ("index", "sentence1", "sentence2"),
}
_COLUMNS["mnli_mismatched"] = _COLUMNS["mnli_matched"]
_LABELS = ("label", "gold_label", "Quality", "is_duplicate", "score")


def write_all(folder: pathlib.Path) -> None:
    """GLUE in folder/glue and SuperGLUE in folder/super_glue."""
    for task in TASKS.values():
        for split in task.files:
            place = folder / task.suite / task.folders[0]
            place.mkdir(parents=True, exist_ok=True)
            path = place / task.files[split][0]
            lines = _table(task, split) if task.suite == "glue" else _objects(task, split)
            path.write_text("".join(line + "\n" for line in lines))


def _table(task: Task, split: str) -> list[str]:
    names = _COLUMNS[task.name]
    if split == "test":
        names = ("index", *(n for n in names if n not in (*_LABELS, "index", "label1")))
    rows = [] if task.name == "cola" and split != "test" else ["\t".join(names)]
    for number in range(COUNTS[split]):
        cells = [_cell(task, name, number) for name in names]
        rows.append("\t".join(cells))
    return rows


def _cell(task: Task, name: str, number: int) -> str:
    if name == "score":
        return f"{number % 6}.5" if number % 6 < 5 else "5.0"
    if name in _LABELS:
        place = number % len(task.labels)
        return task.labels[place] if task.written == "name" else str(place)
    if name in ("index", "id"):
        return str(number)
    return f"{name} {_word(number, 2)} {number} says"


def _word(number: int, count: int) -> str:
    return ("good", "bad", "odd")[number % count]


def _objects(task: Task, split: str) -> list[str]:
    make = {"multirc": _multirc, "record": _record}.get(task.name, _object)
    return [json.dumps(make(task, split, number)) for number in range(COUNTS[split])]


def _object(task: Task, split: str, number: int) -> dict[str, Any]:
    row: dict[str, Any] = {"idx": number}
    for name, columns in task.columns.items():
        row[columns[0] if columns else name] = f"{name} {_word(number, 2)} {number}"
    is_labelled = split != "test" or task.name in ("axb", "axg")
    if task.name == "wsc":
        row = {"idx": number, "text": "Ann met Eve when she came."}
        row["target"] = {"span1_index": 0, "span2_index": 4}
        row["target"] |= {"span1_text": ("Ann", "Eve")[number % 2], "span2_text": "she"}
    if task.name == "copa":
        row |= {"premise": "It rained.", "question": ("cause", "effect")[number % 2]}
        row |= {"choice1": f"Roads {number} got wet.", "choice2": "I sang."}
        if is_labelled:
            row["label"] = number % 2
    elif is_labelled:
        label = task.labels[number % len(task.labels)]
        row["label"] = {"True": True, "False": False}.get(label, label)
    if task.name == "axg":
        row["pair_id"] = number // 2
    return row


def _multirc(task: Task, split: str, number: int) -> dict[str, Any]:
    answers = [
        {"text": text, "idx": 2 * number + i} | ({} if split == "test" else {"label": i})
        for i, text in enumerate(("a dog", "a cat"))
    ]
    question = {"question": "Who sat?", "idx": number, "answers": answers}
    passage = {"text": f"Cat {number} sat.", "questions": [question]}
    return {"idx": number, "passage": passage}


def _record(task: Task, split: str, number: int) -> dict[str, Any]:
    query: dict[str, Any] = {"query": "It was @placeholder who left.", "idx": number}
    if split != "test":
        query["answers"] = [{"text": ("Ann", "Eve")[number % 2]}]
    entities = [{"start": 0, "end": 2}, {"start": 8, "end": 10}]
    passage = {"text": "Ann met Eve.\n@highlight\nThey spoke.", "entities": entities}
    return {"idx": number, "passage": passage, "qas": [query]}
