"""A language model's answers by likelihood: a prompt, and an answer for each label.

Enters: a task, its examples, and a model that can be asked in words (evaluate/asking.py).
Leaves: predictions as metrics.py takes them. Nothing is learned; with shots, answered
examples of the training split stand before each question (Brown et al. 2020,
arXiv:2005.14165, section 2).

A label's score is the log-likelihood of its whole answer, not divided by its length: COPA
and ReCoRD are counted so in lm-evaluation-harness's super_glue tasks, and the other tasks'
answers are a word each. For STS-B it is the mean of the numbers 0 … 5, each with the
probability that the model gives it among the six.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from neo_jax.config import ConfigError
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.glue.metrics import Prediction
from neo_jax.evaluate.glue.tasks import Example, Task

_BETWEEN_SHOTS = "\n\n"


def answers(
    task: Task, examples: Sequence[Example], asker: Asker, shots: str = ""
) -> tuple[list[Prediction], list[np.ndarray]]:
    """What the model answers.

    Args:
      task: which.
      examples: of it.
      asker: the model. It counts the questions that lost tokens at their front
        (`asker.truncated`), so that the end of the question always stands.
      shots: what `shots_text` gives.

    Returns:
      A prediction for each example, and the log-probability of each of its answers among
      all of them.
    """
    candidates = [task.continuations(example) for example in examples]
    pairs = [
        (shots + task.asked(example), answer)
        for example, those in zip(examples, candidates, strict=True)
        for answer in those
    ]
    scores = iter(asker.pairs(pairs))
    log_probs = [
        _log_softmax(np.asarray([next(scores).loglikelihood for _ in those]))
        for those in candidates
    ]
    return [choose(task, each) for each in log_probs], log_probs


def choose(task: Task, log_probs: np.ndarray) -> Prediction:
    """The likeliest label or choice; STS-B's mean number.

    Args:
      task: which.
      log_probs: of each answer, normalised over them.
    """
    if task.is_regression:
        return float(np.exp(log_probs) @ np.arange(len(log_probs)))
    return int(log_probs.argmax())


def right_answer(task: Task, example: Example) -> int:
    """The place of the right one among `task.continuations`; a score is rounded.

    Raises:
      ValueError: the example has no label.
    """
    if example.label is None:
        raise ValueError(f"{task.title}: example {example.index} has no label.")
    # Halves go up, for Python's own rounding would favour even numbers.
    return int(example.label + 0.5)


def choose_shots(
    task: Task, training: Sequence[Example], count: int, seed: int
) -> list[Example]:
    """Examples to stand before a question, the same for all, drawn without repetition.

    Raises:
      ConfigError: fewer labelled examples than asked for.
    """
    labelled = [example for example in training if example.label is not None]
    if len(labelled) < count:
        raise ConfigError(
            f"{task.title}: {count} shots are wanted, and the training split has "
            f"{len(labelled)} labelled examples."
        )
    order = np.random.default_rng(seed).permutation(len(labelled))
    return [labelled[place] for place in order[:count]]


def shots_text(task: Task, shots: Sequence[Example]) -> str:
    """Answered questions, one after another, each with an empty line after it."""
    return "".join(
        task.asked(shot) + task.continuations(shot)[right_answer(task, shot)] + _BETWEEN_SHOTS
        for shot in shots
    )


def with_fields_of(task: Task, example: Example) -> Example:
    """An example of another task, whose fields are named as this task's, in their order."""
    names = tuple(task.columns)
    return dataclasses.replace(
        example, fields=dict(zip(names, example.fields.values(), strict=True))
    )


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())
