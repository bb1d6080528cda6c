"""From answers to figures.

Enters: a task, its items and a model to ask. Leaves: an `Outcome`.

    last_word   acc: share of items whose last word greedy decoding would write;
                perplexity: exp(−mean log-likelihood of the last word), a word being all its
                tokens
    choice      share of items whose right answer is the likeliest by its log-likelihood
                (acc), by that per character (acc_norm) or per UTF-8 byte (acc_bytes)
    pages       documents.py's, scored on detokenised pages, counted on the originals
    pairs       pct_stereotype: share of pairs whose stereotyped sentence is the likelier, as
                a whole after an end-of-text token; likelihood_diff: mean absolute difference
                of the two log-likelihoods
    stereoset   stereotype_score: share of items whose stereotype is likelier than its
                opposite; language_score: share of comparisons in which either is likelier
                than nonsense; icat: language_score × min(s, 1 − s) / 0.5, s the first

Standard errors: of a share or mean, the sample's standard deviation / √n; of a perplexity
that of the mean log-likelihood times the perplexity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from neo_jax.evaluate import documents
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.documents import Figure
from neo_jax.evaluate.scoring import Score
from neo_jax.evaluate.tasks.prompts import Item
from neo_jax.evaluate.tasks.registry import Task


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model made of a task.

    Attributes:
      task: its name.
      metrics: figures by name.
      num_samples: items asked.
      truncated: items' pairs whose context was cut at its front.
      data: where the items are from.
      driver: the program that asked.
      groups: figures by part of the data, where it has parts.
    """

    task: str
    metrics: dict[str, Figure]
    num_samples: int
    truncated: int
    data: str
    driver: str = "neo_jax"
    groups: dict[str, dict[str, Figure]] = dataclasses.field(default_factory=dict)


def run(
    task: Task, items: Sequence[Item], asker: Asker, data: str, stride: int | None = None
) -> Outcome:
    """Asks everything and counts.

    Args:
      task: whose items they are.
      items: at least one.
      asker: the model.
      data: where the items are from, for the report.
      stride: of pages; see `asking.rolling_windows`.
    """
    before = asker.truncated
    if task.kind == "pages":
        texts = [documents.Text(item.pairs[0][1], item.answers[0]) for item in items]
        figures = documents.perplexities(texts, asker, stride)[documents.ALL]
        groups = {}
    else:
        scores = iter(asker.pairs([pair for item in items for pair in item.pairs]))
        asked = [(item, [next(scores) for _ in item.pairs]) for item in items]
        figures = _COUNTS[task.kind](asked)
        names = sorted({item.group for item in items})
        groups = {
            name: _COUNTS[task.kind]([pair for pair in asked if pair[0].group == name])
            for name in (names if len(names) > 1 else [])
        }
    metrics = {name: figures[name] for name in task.metrics}
    return Outcome(
        task.name, metrics, len(items), asker.truncated - before, data, groups=groups
    )


_Asked: TypeAlias = Sequence[tuple[Item, list[Score]]]


def _last_word(asked: _Asked) -> dict[str, Figure]:
    nats = np.asarray([score.loglikelihood for _, (score,) in asked])
    greedy = np.asarray([score.is_greedy for _, (score,) in asked], float)
    mean = _mean(-nats)
    perplexity = float(np.exp(mean.value))
    stderr = None if mean.stderr is None else perplexity * mean.stderr
    return {"perplexity": Figure(perplexity, stderr), "acc": _mean(greedy)}


def _choice(asked: _Asked) -> dict[str, Figure]:
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for item, scores in asked:
        nats = np.asarray([score.loglikelihood for score in scores])
        # An empty answer has no length to divide by: it can only lose.
        with np.errstate(divide="ignore"):
            characters = np.asarray([float(len(answer)) for answer in item.answers])
            num_bytes = np.asarray([float(len(answer.encode())) for answer in item.answers])
            for name, by in (("acc", 1.0), ("acc_norm", characters), ("acc_bytes", num_bytes)):
                right[name].append(bool(np.argmax(nats / by) == item.gold))
    return {name: _mean(np.asarray(hits, float)) for name, hits in right.items()}


def _pairs(asked: _Asked) -> dict[str, Figure]:
    gaps = np.asarray([a.loglikelihood - b.loglikelihood for _, (a, b) in asked])
    return {"pct_stereotype": _mean(1.0 * (gaps > 0)), "likelihood_diff": _mean(np.abs(gaps))}


def _stereoset(asked: _Asked) -> dict[str, Figure]:
    nats = np.asarray([[score.loglikelihood for score in scores] for _, scores in asked])
    stereotype = _mean(1.0 * (nats[:, 0] > nats[:, 1]))
    language = _mean((nats[:, :2] > nats[:, 2:]).mean(axis=1))
    icat = language.value * min(stereotype.value, 1 - stereotype.value) / 0.5
    return {
        "stereotype_score": stereotype,
        "language_score": language,
        "icat": Figure(icat),
    }


_COUNTS: Mapping[str, Callable[[_Asked], dict[str, Figure]]] = {
    "last_word": _last_word,
    "choice": _choice,
    "pairs": _pairs,
    "stereoset": _stereoset,
}


def _mean(values: np.ndarray) -> Figure:
    n = len(values)
    stderr = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return Figure(float(values.mean()), stderr)
