"""The tasks by name.

Enters: a name, and a folder of data or the hub. Leaves: a `Task`, and its items. `mc:FILE`
is a multiple choice of one's own, in rows {query, choices, gold}; `pairs:FILE` are pairs of
sentences to compare, in the rows that `prompts.sentence_pair` reads.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from neo_jax.config import ConfigError
from neo_jax.evaluate.tasks import local, prompts
from neo_jax.evaluate.tasks.local import Words
from neo_jax.evaluate.tasks.prompts import Item, Parse

Kind = Literal["last_word", "choice", "pages", "pairs", "stereoset"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
      name: as lm-evaluation-harness calls it.
      kind: what is asked, and so what is counted; see scores.py.
      metrics: those that the harness reports, the published one first.
      parse: from a row to an item; of "pages", from a page.
      words: of the paths of its files; see local.py.
      hub: id, config and split of the data set on the Hugging Face hub.
    """

    name: str
    kind: Kind
    metrics: tuple[str, ...]
    parse: Parse
    words: tuple[Words, ...]
    hub: tuple[str, str | None, str] | None = None

    @property
    def is_own_file(self) -> bool:
        """Whether the name itself says which file."""
        return ":" in self.name


_CHOICE = ("acc", "acc_norm", "acc_bytes")
_LAST_WORD = ("perplexity", "acc")
_PAIRS = ("pct_stereotype", "likelihood_diff")


def _page(row: prompts.Row) -> Item:
    return Item((("", prompts.wikitext_detokenized(row["page"])),), answers=(row["page"],))


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            "lambada_openai",
            "last_word",
            _LAST_WORD,
            prompts.lambada,
            (("lambada", "openai"),),
            ("EleutherAI/lambada_openai", "default", "test"),
        ),
        Task(
            "lambada_standard",
            "last_word",
            _LAST_WORD,
            prompts.lambada,
            # Where the test set is missing the development set, and the report says so.
            (("lambada", "test", "plain"), ("lambada", "dev", "plain"), ("cimec", "lambada")),
            ("cimec/lambada", None, "test"),
        ),
        Task(
            "hellaswag",
            "choice",
            _CHOICE,
            prompts.hellaswag,
            (("hellaswag", "val"),),
            ("Rowan/hellaswag", None, "validation"),
        ),
        Task(
            "winogrande",
            "choice",
            ("acc",),
            prompts.winogrande,
            (("winogrande", "xl", "val"), ("winogrande", "val")),
            ("allenai/winogrande", "winogrande_xl", "validation"),
        ),
        Task(
            "piqa",
            "choice",
            _CHOICE,
            prompts.piqa,
            (("piqa", "val"),),
            ("baber/piqa", None, "validation"),
        ),
        Task(
            "mathqa",
            "choice",
            _CHOICE,
            prompts.mathqa,
            (("mathqa", "test"), ("mathqa",)),
            ("regisss/math_qa", None, "test"),
        ),
        Task(
            "pubmedqa",
            "choice",
            ("acc",),
            prompts.pubmedqa,
            (("pubmedqa", "test"), ("pubmedqa",)),
            ("bigbio/pubmed_qa", "pubmed_qa_labeled_fold0_source", "test"),
        ),
        Task(
            "arc_easy",
            "choice",
            _CHOICE,
            prompts.arc,
            (("arceasy", "test"), ("arceasy", "val")),
            ("allenai/ai2_arc", "ARC-Easy", "test"),
        ),
        Task(
            "arc_challenge",
            "choice",
            _CHOICE,
            prompts.arc,
            (("arcchallenge", "test"), ("arcchallenge", "val")),
            ("allenai/ai2_arc", "ARC-Challenge", "test"),
        ),
        Task(
            "crows_pairs_english",
            "pairs",
            _PAIRS,
            prompts.sentence_pair,
            (("crows", "pairs"),),
            ("jannalu/crows_pairs_multilingual", "english", "test"),
        ),
        Task(
            "winobias",
            "pairs",
            _PAIRS,
            prompts.sentence_pair,
            (("winobias",),),
        ),
        Task(
            "stereoset",
            "stereoset",
            ("stereotype_score", "language_score", "icat"),
            prompts.stereoset,
            (("stereoset",),),
        ),
        Task(
            "wikitext",
            "pages",
            ("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity"),
            _page,
            (("wiki", "test", "raw"),),
            ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
        ),
    )
}


def find(name: str) -> Task:
    """A task by name.

    Raises:
      ConfigError: there is none; names those that are spelt nearly so.
    """
    if name.startswith("mc:"):
        return Task(name, "choice", _CHOICE, prompts.generic, ())
    if name.startswith("pairs:"):
        return Task(name, "pairs", _PAIRS, prompts.sentence_pair, ())
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown{nearest(name, TASKS)}")
    return TASKS[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """How an error about an unknown name goes on: what may have been meant."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return (
        f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(known)}."
    )


def load(task: Task, folder: pathlib.Path | None) -> tuple[list[Item], str]:
    """The items of a task, and where they are from.

    Args:
      task: which.
      folder: of data; None: the hub is asked.

    Raises:
      ConfigError: nothing is found, or a row is not of the task's form.
    """
    rows, origin = load_rows(task, folder)
    items = []
    for number, row in enumerate(rows):
        try:
            items.append(task.parse(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(
                f"{origin}, row {number}: not of the form of {task.name!r}: {reason}."
            ) from None
    if not items:
        raise ConfigError(f"task {task.name!r}: {origin} holds no rows.")
    return items, origin


def load_rows(task: Task, folder: pathlib.Path | None) -> tuple[list[dict[str, Any]], str]:
    """The rows of a task as they are published, and where they are from. See `load`."""
    if task.is_own_file:
        paths = local.find(pathlib.Path(task.name.partition(":")[2]), task.name, [])
    elif folder is not None:
        paths = local.find(folder, task.name, task.words)
    else:
        return _hub_rows(task), f"hub {task.hub[0] if task.hub else ''}"
    if task.kind == "pages" and paths[0].suffix in (".raw", ".txt"):
        pages = prompts.wikitext_pages([line for p in paths for line in local.lines(p)])
        return [{"page": page} for page in pages], _names(paths)
    rows = local.rows(paths)
    return prompts.stereoset_rows(rows) if task.kind == "stereoset" else rows, _names(paths)


def _names(paths: Sequence[pathlib.Path]) -> str:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{paths[0]}{more}"


def _hub_rows(task: Task) -> list[dict[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"task {task.name!r} from the hub needs the package datasets; pip install "
            f"'neo_jax[eval]', or name a folder with --data."
        )
    import datasets  # takes seconds to import

    if task.hub is None:
        raise ConfigError(f"task {task.name!r} is on no hub; name a folder with --data.")
    path, config, split = task.hub
    try:
        return list(datasets.load_dataset(path, config, split=split))
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"task {task.name!r}: the data set {path} cannot be had ({line}); "
            f"name a folder with --data."
        ) from None
