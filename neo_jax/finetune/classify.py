"""A task of GLUE or SuperGLUE, learned or asked, from any checkpoint.

Enters: `task = "classify"`, `classify.name`, a checkpoint, and the benchmark's own files or
TFDS. Leaves: what every run leaves, the official figures of the validation split, the
submission's files where there is a test split, and, with `finetune.export="hf"`, a directory
that transformers loads: a GPTNeoForSequenceClassification where a head was learned.

The best checkpoint is the one with the best score on the validation split, which is the split
that is reported, as GLUE's tables do; the test split's labels are the benchmark's.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from neo_jax import hf, lora, pretrained, sharding, state, train, trainable
from neo_jax import run as run_lib
from neo_jax.config import Config, ConfigError
from neo_jax.data import examples as examples_lib
from neo_jax.data.examples import ExampleBatches
from neo_jax.data.pipeline import Pipeline
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.glue import asking, metrics
from neo_jax.evaluate.glue.metrics import Prediction
from neo_jax.evaluate.glue.tasks import Example, Task
from neo_jax.evaluate.scoring import Scorer
from neo_jax.finetune import heads, judging, rows
from neo_jax.finetune.rows import Rows
from neo_jax.finetune.tuning import Tuning
from neo_jax.metrics import Writer
from neo_jax.state import Params
from neo_jax.train import Batch


def run(config: Config, workdir: pathlib.Path) -> None:
    """Learns and judges a task, or asks it; a finished or broken-off run goes on.

    Raises as `run.start`.
    """
    if config.classify.form == "ask":
        ask(config, workdir)
    else:
        kind = HeadTuning if config.classify.form == "head" else PromptTuning
        run_lib.start(kind, config, workdir)


class Classification(Tuning):
    """What both forms share: data, steps and scores."""

    config: Config
    task: Task
    training: list[Example]
    validation: list[Example]

    def resolved(self, config: Config) -> Config:
        """The config with what the task and the size of its data settle.

        Raises:
          ConfigError: data that is missing or wrong, or a checkpoint that does not fit.
        """
        config = super().resolved(config)
        self.task = judging.task_of(config)
        if config.classify.random_weights and config.finetune.trainable != "all":
            raise ConfigError(
                f"classify.random_weights with finetune.trainable="
                f"{config.finetune.trainable!r} would leave most weights random; learn all."
            )
        self.training = self.learned(judging.labelled(self.task, "train", config))
        self.validation = judging.labelled(self.task, "validation", config)
        if not config.classify.epochs:
            return config
        batch_size = config.data.batch_size
        num_rows = sum(self.rows_of(example) for example in self.training)
        steps = max(1, math.ceil(config.classify.epochs * num_rows / batch_size))
        every = math.ceil(steps / config.classify.evaluations)
        warmup = min(config.optimizer.warmup_steps, steps // 10)
        return dataclasses.replace(
            config,
            train=dataclasses.replace(config.train, num_steps=steps),
            eval=dataclasses.replace(config.eval, every=every),
            optimizer=dataclasses.replace(config.optimizer, warmup_steps=warmup),
        )

    def learned(self, examples: list[Example]) -> list[Example]:
        """Those that something can be learned from."""
        return examples

    def rows_of(self, example: Example) -> int:
        """Rows that an example gives to learn from."""
        del example
        return 1

    @abc.abstractmethod
    def encode(self, examples: Sequence[Example]) -> Rows:
        """Rows to learn from."""

    @abc.abstractmethod
    def predict(
        self, params: Params, examples: Sequence[Example]
    ) -> tuple[list[Prediction], float]:
        """Predictions, and the mean loss of the right labels (nan where none is known)."""

    def open_data(self) -> Pipeline:
        """See `Run`."""
        config = self.config
        encoded = self.encode(self.training)
        self.truncated = encoded.truncated
        index, count = sharding.host_share(self.mesh, config.data.batch_size)
        batches = ExampleBatches(
            arrays=encoded.arrays,
            lengths=encoded.lengths,
            tokens=[name for name, array in encoded.arrays.items() if array.ndim == 2],
            multiple=encoded.multiple,
            seed=config.train.seed,
            batch_size=config.data.batch_size,
            host_rows=examples_lib.share(config.data.batch_size, index, count),
            length_group=config.data.length_group,
        )
        return examples_lib.pipeline(batches, config.data)

    def describe_data(self) -> str:
        """See `Run`."""
        cut = f" ({self.truncated:,} cut)" if self.truncated else ""
        return (
            f"{self.task.title}: {len(self.training):,} examples in "
            f"{self.data.num_sequences:,} rows{cut}, {len(self.validation):,} to judge"
        )

    def initial_params(self) -> tuple[Params, Params]:
        """See `Tuning`."""
        config = self.config
        if config.classify.random_weights:
            return state.create_params(config.model, self.mesh, config.train.seed), {}
        return super().initial_params()

    def evaluate(self, params: Params, *, final: bool) -> dict[str, float]:
        """The official figures of the validation split, `score`, their mean, and the loss."""
        del final
        predictions, loss = self.predict(params, self.validation)
        return {"loss": loss, **metrics.scores(self.task, self.validation, predictions)}

    def figure(self, scores: Mapping[str, float]) -> float:
        """The score, turned round: less is better."""
        return -scores["score"]

    def conclude(
        self, params: Params, scores: Mapping[str, float], writer: Writer
    ) -> dict[str, Any]:
        """Answers the test split and the task's relatives, where they are there."""
        said = super().conclude(params, scores, writer)
        others = judging.report(
            self.task,
            self.config,
            lambda examples: self.predict(params, examples)[0],
            self.workdir,
        )
        return {"task": self.task.name, "truncated": self.truncated, **said, **others}


class HeadTuning(Classification):
    """A head on the last real token."""

    loss = staticmethod(heads.classification_loss)

    def resolved(self, config: Config) -> Config:
        """See `Classification`; the model gets the task's head."""
        config = super().resolved(config)
        if config.finetune.export == "peft":
            raise ConfigError(
                "finetune.export='peft' writes adapters alone, and a head is none; use 'hf', "
                "which merges them."
            )
        count, names = self.task.num_outputs, label_names(self.task)
        assert self.source is not None
        head = pretrained.head_of(self.source)
        is_kept = head is not None and self._is_of_text(head) and not self._drops_head(config)
        if head is not None and is_kept and len(head.labels) != count:
            raise ConfigError(
                f"{self.source} has a head of {len(head.labels)} labels "
                f"({', '.join(head.labels)}), and {self.task.title} has {count} "
                f"({', '.join(names)}); --config.classify.new_head=True starts a new one."
            )
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, num_labels=count),
            classify=dataclasses.replace(config.classify, labels=names),
        )

    def keeps_head(self, head: hf.Head) -> bool:
        """See `Tuning`."""
        return self._is_of_text(head) and not self._drops_head(self.config)

    def rows_of(self, example: Example) -> int:
        """See `Classification`."""
        return len(example.choices) if self.task.has_choices else 1

    def encode(self, examples: Sequence[Example]) -> Rows:
        """See `Classification`."""
        return rows.for_head(self.task, examples, self.tokenizer, self.config.data.seq_len)

    def predict(
        self, params: Params, examples: Sequence[Example]
    ) -> tuple[list[Prediction], float]:
        """See `Classification`."""
        encoded = self.encode(examples)
        scores = self.scores(params, encoded)
        return choose(self.task, scores, encoded.owners), _mean_loss(scores, encoded)

    def scores(self, params: Params, encoded: Rows) -> np.ndarray:
        """Scores of the labels, float32 [rows, labels]; batches hold rows of like length."""
        size, total = self.eval_batch_size, len(encoded.lengths)
        found = np.zeros((total, self.config.model.num_labels), np.float32)
        order = np.argsort(encoded.lengths, kind="stable")
        longest = encoded.arrays["inputs"].shape[1]
        for first in range(0, total, size):
            self.preemption.leave_if_told()
            own = order[first : first + size]
            filled = np.concatenate([own, own[-1:].repeat(size - len(own))])
            seq = -(-int(encoded.lengths[own].max()) // encoded.multiple) * encoded.multiple
            batch = {
                "inputs": encoded.arrays["inputs"][filled, : min(seq, longest)],
                "lengths": encoded.arrays["lengths"][filled],
            }
            found[own] = self._scores(params, self.frozen, self.place(batch))[: len(own)]
        return found

    def write_model(self, params: Params, folder: pathlib.Path) -> None:
        """See `Tuning`; a GPTNeoForSequenceClassification with its labels' names."""
        merged, plain = lora.merge(self.whole(params), self.config.model)
        head = hf.Head(
            hf.TEXT_HEAD,
            label_names(self.task),
            pad_token_id=self.tokenizer.eos_id,
            problem_type=(
                "regression" if self.task.is_regression else "single_label_classification"
            ),
        )
        shape, tree = hf.with_head(plain, merged)
        hf.write(tree, shape, folder, head=head, eos_id=self.tokenizer.eos_id)

    @functools.cached_property
    def _scores(self) -> Any:
        def run(params: Params, frozen: Params, batch: Batch) -> jax.Array:
            model = nnx.merge(self.graph, trainable.join(params, frozen))
            return heads.scores(model, batch["inputs"], batch["lengths"])

        return jax.jit(run, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    @staticmethod
    def _is_of_text(head: hf.Head) -> bool:
        return head.architecture == hf.TEXT_HEAD

    @staticmethod
    def _drops_head(config: Config) -> bool:
        return config.classify.new_head or config.classify.random_weights


class PromptTuning(Classification):
    """The language model itself, which learns to write the answer."""

    loss = staticmethod(train.next_token_loss)

    def learned(self, examples: list[Example]) -> list[Example]:
        """ReCoRD has questions whose answer is none of the passage's entities."""
        return [example for example in examples if example.label is not None]

    def encode(self, examples: Sequence[Example]) -> Rows:
        """See `Classification`."""
        return rows.for_prompt(self.task, examples, self.tokenizer, self.config.data.seq_len)

    def predict(
        self, params: Params, examples: Sequence[Example]
    ) -> tuple[list[Prediction], float]:
        """See `Classification`."""
        room = self.config.data.seq_len + 1
        short, _ = rows.shortened_to_ask(self.task, examples, self.tokenizer, room)
        score = functools.partial(self._scorer.score, self.whole(params))
        asker = Asker(score, self.tokenizer, self._scorer.max_seq_len)
        predictions, log_probs = asking.answers(self.task, short, asker)
        return predictions, _mean_nll(self.task, examples, log_probs)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.config.model, self.mesh)


def ask(config: Config, workdir: pathlib.Path) -> None:
    """Answers a task by likelihood, without learning; writes summary.json.

    Raises:
      ConfigError: no checkpoint, no tokenizer beside it, or data that is missing or wrong.
    """
    source = config.train.init_from
    if source is None:
        raise ConfigError(
            "classify.form='ask' asks a trained model; name it: --config.train.init_from=…"
        )
    task = judging.task_of(config)
    validation = judging.labelled(task, "validation", config)
    mesh = sharding.make_mesh(config.mesh)
    model = pretrained.load(source, mesh=mesh)
    if model.tokenizer is None:
        raise ConfigError(f"{source} has no tokenizer, and questions are words.")
    words = model.tokenizer
    run_lib.open_workdir(dataclasses.replace(config, model=model.config), workdir)
    shots = ""
    if config.classify.shots:
        training = judging.labelled(task, "train", config)
        chosen = asking.choose_shots(task, training, config.classify.shots, config.train.seed)
        shots = asking.shots_text(task, chosen)
    scorer = Scorer(model.config, mesh)
    asker = Asker(functools.partial(scorer.score, model.params), words, scorer.max_seq_len)
    predictions, log_probs = asking.answers(task, validation, asker, shots)
    summary = {
        "task": task.name,
        "shots": config.classify.shots,
        "loss": _mean_nll(task, validation, log_probs),
        **metrics.scores(task, validation, predictions),
        "truncated": asker.truncated,
        **judging.report(
            task, config, lambda those: asking.answers(task, those, asker, shots)[0], workdir
        ),
    }
    if jax.process_index() == 0:
        run_lib.write_config(dataclasses.replace(config, model=model.config), workdir)
        aside = workdir / "summary.json.partial"
        aside.write_text(json.dumps(summary, indent=2) + "\n")
        aside.replace(workdir / "summary.json")


# ------------------------------------------------------------------------------- answers


def label_names(task: Task) -> tuple[str, ...]:
    """Names of a head's outputs, in its order."""
    return task.labels or (("score",) if task.is_regression else ("wrong", "right"))


def choose(task: Task, scores: np.ndarray, owners: np.ndarray) -> list[Prediction]:
    """From scores of rows to predictions of examples.

    Args:
      task: which.
      scores: [rows, labels].
      owners: the example of each row, ascending.

    Returns:
      The best label; the number; or the choice that looks most right beside wrong.
    """
    if task.is_regression:
        return [float(score) for score in scores[:, 0]]
    if not task.has_choices:
        return [int(label) for label in scores.argmax(-1)]
    rightness = scores[:, 1] - scores[:, 0]
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    return [int(part.argmax()) for part in np.split(rightness, starts[1:])]


def _mean_loss(scores: np.ndarray, encoded: Rows) -> float:
    labels, weights = encoded.arrays["labels"], encoded.arrays["weights"]
    if not weights.any():
        return math.nan
    if scores.shape[1] == 1:
        return float(np.average((scores[:, 0] - labels) ** 2, weights=weights))
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(scores)))
    return float(-np.average(log_probs[np.arange(len(labels)), labels], weights=weights))


def _mean_nll(
    task: Task, examples: Sequence[Example], log_probs: Sequence[np.ndarray]
) -> float:
    """Of the right answers among all of them, in nats."""
    known = [
        -each[asking.right_answer(task, example)]
        for example, each in zip(examples, log_probs, strict=True)
        if example.label is not None
    ]
    return float(np.mean(known)) if known else math.nan
