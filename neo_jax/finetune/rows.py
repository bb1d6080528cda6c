"""Examples of GLUE and SuperGLUE as arrays of token ids.

Enters: a task, its examples, a tokenizer. Leaves: rows, filled up on the right, each with the
number of its tokens, its label and its weight; and which row is whose.

For a head a row is what `Task.text` says: an example, or, where choices differ from example
to example (COPA, ReCoRD), an example with one of its choices, labelled 1 where that is right.
For a prompt it is the question with an answer, of which the answer's tokens alone are learned.

What is too long loses words at the end of its longest field, as often as needed, so that the
question stays whole; how many rows that befell is counted.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from neo_jax.config import ConfigError
from neo_jax.evaluate.glue.asking import right_answer
from neo_jax.evaluate.glue.tasks import Example, Task
from neo_jax.tokenizer import Tokenizer

_LENGTH_STEP = 8  # lengths of batches are multiples of it,
_MOST_LENGTHS = 6  # or of more, so that no more of them are compiled


class Rows(NamedTuple):
    """Rows of tokens and what belongs to them.

    Attributes:
      arrays: `inputs` int32 [rows, seq]; for a head `lengths` int32, `labels` (int32, or
        float32 for a number) and `weights` float32, all [rows]; for a prompt `targets` int32
        and `weights` float32, [rows, seq].
      lengths: tokens of each row.
      owners: the example of each row.
      truncated: rows that lost words.
    """

    arrays: Mapping[str, np.ndarray]
    lengths: np.ndarray
    owners: np.ndarray
    truncated: int

    @property
    def multiple(self) -> int:
        """What lengths of batches are rounded up to."""
        longest = int(self.lengths.max(initial=1))
        steps = -(-longest // (_LENGTH_STEP * _MOST_LENGTHS))
        return _LENGTH_STEP * steps


def for_head(task: Task, examples: Sequence[Example], words: Tokenizer, seq_len: int) -> Rows:
    """What a head reads of examples, in their order.

    Rows without a label have weight 0.

    Raises:
      ConfigError: a text that is too long, and of which nothing can be left out.
    """
    asked = list(_with_choices(task, examples))
    ids, _, truncated = encode(
        [example for _, example, _ in asked],
        [functools.partial(task.text, choice=choice) for _, _, choice in asked],
        words,
        seq_len,
        task.title,
    )
    labels = [_head_label(task, example, choice) for _, example, choice in asked]
    inputs, lengths = _filled(ids, words.eos_id)
    known = np.asarray([label is not None for label in labels])
    kind = np.float32 if task.is_regression else np.int32
    return Rows(
        {
            "inputs": inputs,
            "lengths": lengths,
            "labels": np.asarray([label or 0 for label in labels], kind),
            "weights": known.astype(np.float32),
        },
        lengths,
        np.asarray([owner for owner, _, _ in asked]),
        truncated,
    )


def for_prompt(
    task: Task, examples: Sequence[Example], words: Tokenizer, seq_len: int
) -> Rows:
    """Questions with their right answers, whose tokens alone have weight.

    Raises:
      ConfigError: as `for_head`.
      ValueError: an example without label.
    """
    answers = [task.continuations(one)[right_answer(task, one)] for one in examples]
    ids, shortened, truncated = encode(
        examples,
        [functools.partial(_answered, task, answer) for answer in answers],
        words,
        seq_len + 1,
        task.title,
    )
    # A space at the question's end belongs to the answer, as where it is asked.
    before = words.encode_batch([task.asked(one).rstrip() for one in shortened])
    whole, lengths = _filled(ids, words.eos_id)
    places = np.arange(whole.shape[1] - 1)
    asked = np.asarray([len(those) for those in before])
    counts = (places >= asked[:, None] - 1) & (places < lengths[:, None] - 1)
    return Rows(
        {
            "inputs": np.ascontiguousarray(whole[:, :-1]),
            "targets": np.ascontiguousarray(whole[:, 1:]),
            "weights": counts.astype(np.float32),
        },
        lengths - 1,
        np.arange(len(examples)),
        truncated,
    )


def shortened_to_ask(
    task: Task, examples: Sequence[Example], words: Tokenizer, room: int
) -> tuple[list[Example], int]:
    """Examples whose question and longest answer fit into `room` tokens.

    Returns:
      Them, and how many lost words for that.
    """
    _, shortened, truncated = encode(
        examples,
        [
            functools.partial(_answered, task, max(task.continuations(example), key=len))
            for example in examples
        ],
        words,
        room,
        task.title,
    )
    return shortened, truncated


def encode(
    examples: Sequence[Example],
    renderings: Sequence[Callable[[Example], str]],
    words: Tokenizer,
    most: int,
    title: str,
) -> tuple[list[list[int]], list[Example], int]:
    """Token ids of each example's text, at most `most` of them.

    Returns:
      The ids; the examples as they were cut; how many were.

    Raises:
      ConfigError: a text that is too long however much its fields are cut.
    """
    texts = [render(one) for render, one in zip(renderings, examples, strict=True)]
    ids, kept, truncated = words.encode_batch(texts), list(examples), 0
    for row, (render, example) in enumerate(zip(renderings, examples, strict=True)):
        if len(ids[row]) <= most:
            continue
        truncated += 1
        while (excess := len(ids[row]) - most) > 0:
            example = _shortened(example, excess, words, most, title)
            ids[row] = words.encode(render(example))
        kept[row] = example
    return ids, kept, truncated


def _shortened(
    example: Example, excess: int, words: Tokenizer, most: int, title: str
) -> Example:
    """The example without the last `excess` tokens of its longest field, or all of them."""
    fields = {name: words.encode(value) for name, value in example.fields.items()}
    longest = max(fields, key=lambda name: len(fields[name]))
    if not fields[longest]:
        raise ConfigError(
            f"{title}: example {example.index} does not fit into {most} tokens however it is "
            f"cut; raise data.seq_len."
        )
    kept = words.decode(fields[longest][:-excess]) if excess < len(fields[longest]) else ""
    # Half a character at the end would be told apart from the field's own text.
    return dataclasses.replace(
        example, fields={**example.fields, longest: kept.rstrip("\ufffd")}
    )


def _with_choices(
    task: Task, examples: Sequence[Example]
) -> Iterator[tuple[int, Example, int | None]]:
    for owner, example in enumerate(examples):
        if not task.has_choices:
            yield owner, example, None
        for choice in range(len(example.choices) if task.has_choices else 0):
            yield owner, example, choice


def _answered(task: Task, answer: str, example: Example) -> str:
    return task.asked(example) + answer


def _head_label(task: Task, example: Example, choice: int | None) -> int | float | None:
    if choice is not None and example.accepted:
        return int(example.choices[choice] in example.accepted)
    if choice is None or example.label is None:
        return example.label
    return int(choice == example.label)


def _filled(ids: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one length, filled up on the right, and how long each was."""
    lengths = np.asarray([len(row) for row in ids], np.int32)
    array = np.full((len(ids), int(lengths.max(initial=1))), pad, np.int32)
    for row, those in enumerate(ids):
        array[row, : len(those)] = those
    return array, lengths
