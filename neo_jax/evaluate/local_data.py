"""The data of the task files in harness_tasks/, for lm-evaluation-harness.

Enters: the folder that the harness was given as metadata, `{"data": FOLDER}`. Leaves: a
data set with one split, `test`, whose rows are what tasks/prompts.py makes of them.
The harness calls these functions by the names in its task files.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from neo_jax.config import ConfigError
from neo_jax.evaluate import documents, tasks
from neo_jax.evaluate.tasks.registry import load_rows


def dataset(task_name: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """The items of a task as a `datasets` split.

    Args:
      task_name: of tasks/registry.py.
      data: folder that holds its files.

    Raises:
      ConfigError: no folder, or nothing of the task in it.
    """
    import datasets  # belongs to the extra `eval`, and takes seconds to import

    if data is None:
        raise ConfigError(
            f"task {task_name!r} takes its data from a folder: give lm-eval "
            f'--metadata \'{{"data": "FOLDER"}}\', or neo_jax.evaluate --data FOLDER.'
        )
    task, folder = tasks.find(task_name), pathlib.Path(data)
    if task.kind == "pages":
        rows = load_rows(task, folder)[0]
        return {"test": datasets.Dataset.from_list(rows)}
    items = tasks.load(task, folder)[0]
    return {"test": datasets.Dataset.from_list([_fields(item) for item in items])}


def _fields(item: tasks.Item) -> dict[str, Any]:
    return {
        "context": item.pairs[0][0],
        "contexts": [context for context, _ in item.pairs],
        "continuation": item.pairs[0][1].removeprefix(" "),
        "answers": list(item.answers),
        "gold": item.gold,
    }


lambada_openai = functools.partial(dataset, "lambada_openai")
lambada_standard = functools.partial(dataset, "lambada_standard")
hellaswag = functools.partial(dataset, "hellaswag")
winogrande = functools.partial(dataset, "winogrande")
piqa = functools.partial(dataset, "piqa")
mathqa = functools.partial(dataset, "mathqa")
pubmedqa = functools.partial(dataset, "pubmedqa")
arc_easy = functools.partial(dataset, "arc_easy")
arc_challenge = functools.partial(dataset, "arc_challenge")
wikitext = functools.partial(dataset, "wikitext")


def wikitext_text(row: Mapping[str, Any]) -> str:
    """What of a page is scored."""
    page = tasks.find("wikitext").parse(row)
    return page.pairs[0][1]


def wikitext_results(row: Mapping[str, Any], results: Sequence[float]) -> dict[str, Any]:
    """A page's log-likelihood with what it is divided by, counted on the original."""
    page, (nats,) = row["page"], results
    return {
        "word_perplexity": (nats, documents.count_words(page)),
        "byte_perplexity": (nats, len(page.encode())),
        "bits_per_byte": (nats, len(page.encode())),
    }
