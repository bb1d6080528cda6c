"""A model of ours inside lm-evaluation-harness, registered there as `neo_jax`.

Enters: a checkpoint, or a model that is loaded already, and the harness's requests. Leaves:
its log-likelihoods and texts, and with `run` the harness's results as `Outcome`s. This file
alone imports lm_eval (`pip install 'neo_jax[eval]'`), and nothing imports this file unless
the harness is asked for.

Tasks of harness_tasks/ have the names of the harness's own and take their place where a
folder of data is given, so that they need no network; all others run as the harness has
them. With several hosts process 0 drives: it alone talks to the harness, the others
compute what it asks for (hosts.py).

Source of the interface: lm_eval/api/model.py, 0.4.13; of what it must answer:
lm_eval/models/huggingface.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.api.task import Task
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager

from neo_jax import pretrained, sharding
from neo_jax.config import ConfigError, MeshConfig
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.documents import Figure
from neo_jax.evaluate.hosts import Calls, calls_of
from neo_jax.evaluate.scoring import Scorer
from neo_jax.evaluate.tasks import Outcome
from neo_jax.evaluate.tasks.registry import nearest
from neo_jax.language_model import LanguageModel

logger = logging.getLogger(__name__)

TASK_FOLDER = pathlib.Path(__file__).parent / "harness_tasks"
DRIVER = f"lm-eval {importlib.metadata.version('lm_eval')}"

_Pair = tuple[tuple[str, str], list[int], list[int]]


@register_model("neo_jax")
class NeoJaxLM(TemplateLM):
    """What the harness asks, answered by a `LanguageModel`.

    Args:
      checkpoint: a workdir of ours, a Hugging Face directory or hub id.
      batch_size: rows of a batch; "auto" or left out: as many as suit their length.
      dtype: of the parameters; left out, as they are stored.
      max_gen_toks: tokens to write where a task does not say.
      calls: of a model that is loaded already; see hosts.py.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: str | LanguageModel,
        *,
        batch_size: int | str | None = None,
        dtype: str | None = None,
        max_gen_toks: int = 256,
        calls: Calls | None = None,
    ):
        super().__init__()
        if not isinstance(checkpoint, LanguageModel):
            mesh = sharding.make_mesh(MeshConfig())
            checkpoint = pretrained.load(checkpoint, dtype=dtype, mesh=mesh)
            rows = None if batch_size in (None, "auto") else int(batch_size)
            scorer = Scorer(checkpoint.config, mesh, batch_size=rows, show_progress=True)
            calls = calls_of(checkpoint, scorer)
        assert calls is not None, "a loaded model comes with its calls"
        if checkpoint.tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer; the harness asks in words.")
        self.model, self.words, self._calls = checkpoint, checkpoint.tokenizer, calls
        self.asker = Asker(calls["score"], self.words, checkpoint.config.max_seq_len)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """Of end of text, which also stands before a context that is empty."""
        return self.words.eos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        return self.model.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's caches of requests."""
        return f"neo_jax_{self.words.fingerprint[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; GPT-2's tokenizer puts nothing before or after it."""
        return self.words.encode(string)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self.words.decode(tokens, skip_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[_Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        before = self.asker.truncated
        scores = self.asker.tokens([(context, rest) for _, context, rest in requests])
        if cut := self.asker.truncated - before:
            logger.warning(
                "%d of %d contexts were cut at their front: with their continuation they "
                "exceed the %d tokens that the model reads.",
                cut,
                len(requests),
                self.max_length,
            )
        answers = [(score.loglikelihood, score.is_greedy) for score in scores]
        for (words, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", words, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts in nats, every token predicted once."""
        texts = [request.args[0] for request in requests]
        answers = [rolled.loglikelihood for rolled in self.asker.rolling(texts)]
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        """Texts that follow contexts, up to a stop sequence; those asked alike together."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers = [""] * len(requests)
        for members in groups.values():
            settings = requests[members[0]].args[1]
            texts = self._written([requests[i].args[0] for i in members], settings)
            for index, text in zip(members, texts, strict=True):
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
                answers[index] = text
        return answers

    def _written(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        kwargs = normalize_gen_kwargs(settings, self.max_gen_toks)
        stops = handle_stop_sequences(list(kwargs["until"]), eos=self.words.eos_token)
        new = kwargs["max_gen_toks"]
        room = self.max_length - new
        if room < 1:
            raise ValueError(
                f"max_gen_toks={new} leaves no room for a context in the {self.max_length} "
                f"tokens that the model reads; lower it."
            )
        prompts = [ids or [self.words.eos_id] for ids in self.words.encode_batch(contexts)]
        if cut := sum(len(prompt) > room for prompt in prompts):
            self.asker.truncated += cut
            logger.warning("%d contexts were cut to their last %d tokens.", cut, room)
        options = {
            "max_new_tokens": new,
            "seed": int(kwargs.get("seed", 0)),
            "temperature": float(kwargs.get("temperature", 0.0)),
            "top_k": int(kwargs.get("top_k", 0)),
            "stop_strings": [stop for stop in stops if stop],
        }
        written = self._calls["write"]([prompt[-room:] for prompt in prompts], options)
        return [self._ended(ids, stops) for ids in written]

    def _ended(self, ids: list[int], stops: list[str]) -> str:
        if self.words.eos_id in ids:
            ids = ids[: ids.index(self.words.eos_id)]
        return postprocess_generated_text(self.words.decode(ids), stops, None)


# --------------------------------------------------------------------------------- running


@functools.cache  # reading the harness's thousands of task files takes seconds
def task_manager(folder: pathlib.Path | None, only_ours: bool = False) -> TaskManager:
    """The harness's tasks, with ours in their place where there is a folder of data.

    Args:
      folder: of data; None: the harness's tasks alone.
      only_ours: leave the harness's out, and be quick.
    """
    if folder is None:
        return TaskManager()
    logging.getLogger("lm_eval.tasks._index").setLevel(logging.ERROR)  # that ours replace its
    return TaskManager(
        include_path=str(TASK_FOLDER),
        include_defaults=not only_ours,
        metadata={"data": str(folder)},
    )


def manager_for(names: Sequence[str], folder: pathlib.Path | None) -> TaskManager:
    """A manager that knows all these tasks.

    Raises:
      ConfigError: none does; names the task, and those spelt nearly so.
    """
    ours = {path.stem for path in TASK_FOLDER.glob("*.yaml")}
    manager = task_manager(folder, only_ours=folder is not None and ours.issuperset(names))
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            raise ConfigError(f"task {name!r} is unknown{nearest(name, near or ['none'])}")
    return manager


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Tasks with their data, ready to be asked any number of times.

    Attributes:
      manager: knows their names.
      tasks: by the name that was asked for; a group or a tag is several.
      folder: of data; None: the harness's own.
    """

    manager: TaskManager
    tasks: dict[str, list[Task | Group]]
    folder: pathlib.Path | None


def load(names: Sequence[str], folder: pathlib.Path | None) -> Loaded:
    """Reads the data of tasks.

    Args:
      names: of tasks, groups or tags.
      folder: of data for the tasks that come with neo_jax; None: the harness's own.

    Raises:
      ConfigError: an unknown name, or data that is not to be had.
    """
    manager = manager_for(names, folder)
    tasks: dict[str, list[Task | Group]] = {}
    for name in names:
        try:
            found = manager.load([name])
        except ConfigError:
            raise
        except (OSError, ValueError, ImportError) as error:
            line = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"task {name!r} of the harness: its data cannot be had ({line}); without a "
                f"network take a task that neo_jax has files for, with --data."
            ) from None
        group = found["groups"].get(name)
        tasks[name] = list(found["tasks"].values()) if group is None else [group]
    return Loaded(manager, tasks, folder)


def run(
    model: NeoJaxLM,
    loaded: Loaded,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    cache: str | None = None,
    bootstrap_samples: int = 1000,
) -> list[Outcome]:
    """Runs tasks of the harness.

    Args:
      model: who is asked.
      loaded: the tasks.
      num_fewshot: examples before each question; left out, as the task has it.
      limit: only so many documents of each task.
      cache: path of a database of answers, which a later run takes up.
      bootstrap_samples: for the standard errors that are drawn; 0: these are left out.
    """
    outcomes = []
    for tasks in loaded.tasks.values():  # one by one, so that each knows what of it was cut
        before = model.asker.truncated
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            use_cache=cache,
            task_manager=loaded.manager,
            log_samples=False,
            bootstrap_iters=bootstrap_samples,
        )
        assert results is not None  # it is for other ranks alone, and we are always 0
        cut = model.asker.truncated - before
        outcomes += [
            _outcome(name, results, cut, loaded.folder) for name in results["n-samples"]
        ]
    return outcomes


def _outcome(name: str, results: Any, truncated: int, folder: pathlib.Path | None) -> Outcome:
    figures: dict[str, Figure] = {}
    values = results["results"][name]
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        label = metric if filter_name == "none" else key
        known = isinstance(stderr, int | float)
        figures[label] = Figure(float(value), float(stderr) if known else None)
    config = results["configs"].get(name, {})
    data = config.get("dataset_path") or str(folder)
    return Outcome(
        name, figures, results["n-samples"][name]["effective"], truncated, data, DRIVER
    )
