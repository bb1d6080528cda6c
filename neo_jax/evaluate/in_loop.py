"""Benchmarks during training: `eval.tasks` of a config.

Enters: the config, and at every evaluation the parameters. Leaves: figures for
`metrics.jsonl`, named `task/metric`. Data is read once, when training starts, so that what is
missing is told before anything is compiled. Names that begin with `harness:` are
lm-evaluation-harness's, and need it; process 0 drives those (hosts.py).
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from neo_jax import state
from neo_jax.config import ConfigError, EvalConfig, ModelConfig
from neo_jax.evaluate import documents, hosts, tasks
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.batching import Request
from neo_jax.evaluate.documents import Figure, Text
from neo_jax.evaluate.scoring import Scorer
from neo_jax.evaluate.tasks import Item, Outcome, Task
from neo_jax.evaluate.tasks.registry import nearest
from neo_jax.language_model import LanguageModel
from neo_jax.state import Params
from neo_jax.tokenizer import Tokenizer

_TEXT = "text:"
_HARNESS = "harness:"
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
        asked = [name for name in config.tasks if name.startswith(_HARNESS)]
        self._loaded = of_harness([name.removeprefix(_HARNESS) for name in asked], folder)
        for name in (name for name in config.tasks if name not in asked):
            if name.startswith(_TEXT):
                self._texts[name] = documents.read(name.removeprefix(_TEXT))[:limit]
            else:
                task = tasks.find(name)
                items, data = tasks.load(task, folder)
                self._tasks.append((task, items[:limit], data))
        self._words, self._limit = words, limit
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
        if self._loaded is not None:
            model = self._language_model(params)
            asked = hosts.calls_of(model, self._scorer)
            # Not the model's own parameters, which it puts together anew once it has written.
            calls = {**asked, "score": lambda requests: score([Request(*r) for r in requests])}
            outcomes = hosts.drive(calls, functools.partial(self._ask_harness, model))
            found |= {_HARNESS + each.task: each.metrics for each in outcomes or []}
        return {
            f"{name}/{metric}": figure.value
            for name, figures in found.items()
            for metric, figure in figures.items()
        }

    def _language_model(self, params: Params) -> LanguageModel:
        config, mesh = self._scorer.config, self._scorer.mesh
        graph, _ = state.model_graph(config)
        own = jax.tree.map(lambda leaf: leaf, params)  # it empties the tree that it is given
        return LanguageModel(config, own, self._words, graph, mesh)

    def _ask_harness(self, model: LanguageModel, calls: hosts.Calls) -> list[Outcome]:
        from neo_jax.evaluate import harness  # lm_eval takes seconds to import

        asked = harness.NeoJaxLM(model, calls=calls)
        return harness.run(asked, self._loaded, limit=self._limit, bootstrap_samples=0)


def of_harness(names: Sequence[str], folder: pathlib.Path | None) -> Any:
    """Tasks of lm-evaluation-harness as `harness.load` gives them; None of none.

    Raises:
      ConfigError: the harness is not installed, or as `harness.load`.
    """
    if not names:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        known = nearest(names[0], tasks.TASKS)
        raise ConfigError(
            f"task {names[0]!r} is not among those that need no harness{known[:-1]}; for the "
            f"harness's, pip install 'neo_jax[eval]'."
        )
    from neo_jax.evaluate import harness  # lm_eval takes seconds to import

    return harness.load(names, folder)
