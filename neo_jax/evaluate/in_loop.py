"""Benchmarks during training: `eval.tasks` of a config.

Enters: the config, and at every evaluation the parameters. Leaves: figures for
`metrics.jsonl`, named `task/metric`. Data is read once, when training starts, so that what is
missing is told before anything is compiled.
"""

from __future__ import annotations

import functools
import pathlib

from jax.sharding import Mesh

from neo_jax.config import EvalConfig, ModelConfig
from neo_jax.evaluate import documents, tasks
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.documents import Figure, Text
from neo_jax.evaluate.scoring import Scorer
from neo_jax.evaluate.tasks import Item, Task
from neo_jax.state import Params
from neo_jax.tokenizer import Tokenizer

_TEXT = "text:"
_OF_TEXT = ("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


class Benchmarks:
    """The tasks that a config names, ready to be asked of any parameters.

    Raises:
      ConfigError: a task is unknown, or its data is not there.
    """

    def __init__(self, config: EvalConfig, model: ModelConfig, mesh: Mesh, words: Tokenizer):
        limit = config.tasks_limit or None
        folder = None if config.tasks_data is None else pathlib.Path(config.tasks_data)
        self._texts: dict[str, list[Text]] = {}
        self._tasks: list[tuple[Task, list[Item], str]] = []
        for name in config.tasks:
            if name.startswith(_TEXT):
                self._texts[name] = documents.read(name.removeprefix(_TEXT))[:limit]
            else:
                task = tasks.find(name)
                items, data = tasks.load(task, folder)
                self._tasks.append((task, items[:limit], data))
        self._words = words
        self._scorer = Scorer(model, mesh)

    def score(self, params: Params) -> dict[str, float]:
        """Figures by `task/metric`; none where the config names no tasks."""
        score = functools.partial(self._scorer.score, params)
        asker = Asker(score, self._words, self._scorer.max_seq_len)
        found: dict[str, dict[str, Figure]] = {
            task.name: tasks.run(task, items, asker, data).metrics
            for task, items, data in self._tasks
        }
        for name, texts in self._texts.items():
            figures = documents.perplexities(texts, asker)[documents.ALL]
            found[name] = {metric: figures[metric] for metric in _OF_TEXT}
        return {
            f"{name}/{metric}": figure.value
            for name, figures in found.items()
            for metric, figure in figures.items()
        }
