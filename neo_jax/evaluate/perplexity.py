"""How well a model predicts text: mean loss, perplexity, bits per byte.

Enters: a stream of tokens and a function that sums losses. Leaves: figures under exact
definitions. Documents that are scored one by one, as benchmarks have it, are documents.py's.

    loss           mean cross-entropy of the scored tokens, in nats; each document's closing
                   end-of-text token is one of them
    perplexity     exp(loss)
    bits_per_byte  loss × tokens / (ln 2 × UTF-8 bytes of the text), which compares across
                   tokenizers

Every token is scored exactly once. A window reads `seq_len` tokens and scores its last
`stride`; with stride = seq_len windows do not overlap and the first tokens of each have
little to go by, with a smaller one every token sees at least seq_len − stride before it.
Answers of instructions are scored after their own prompts, and prompts are not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Int

# A batch of windows on this host → (sum of losses in nats, sum of weights), over all hosts.
SumLosses = Callable[[Mapping[str, np.ndarray]], tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A text to be predicted.

    `tokens` are the targets, in order; `first` stands before the first of them.
    """

    tokens: Int[np.ndarray, " tokens"]
    first: int
    num_bytes: int  # of the text, UTF-8

    @classmethod
    def collect(cls, batches: Iterator[Mapping[str, np.ndarray]], num_bytes: int) -> HeldOut:
        """From non-overlapping windows in order, as an eval pipeline gives them."""
        first, parts = None, []
        for batch in batches:
            if first is None:
                first = int(batch["inputs"][0, 0])
            parts.append(batch["targets"][batch["weights"] > 0])
        if first is None:
            raise ValueError("there is no text to evaluate.")
        return cls(np.concatenate(parts), first, num_bytes)


@dataclasses.dataclass(frozen=True)
class HeldOutRows:
    """Texts of which a part is to be predicted, as answers are after their prompts.

    `batches` are those of a pipeline: inputs, targets, weights, and what isolates documents.
    """

    batches: tuple[Mapping[str, np.ndarray], ...]
    num_bytes: int  # of the parts that are predicted, UTF-8

    @classmethod
    def collect(
        cls,
        batches: Iterator[Mapping[str, np.ndarray]],
        decode: Callable[[list[int]], str],
        eos_id: int,
    ) -> HeldOutRows:
        """From an eval pipeline of isolated documents; `decode` is a tokenizer's."""
        kept, num_bytes = tuple(batches), 0
        for batch in kept:
            learned = batch["targets"][batch["weights"] > 0]
            num_bytes += len(decode(learned[learned != eos_id].tolist()).encode())
        if not num_bytes:
            raise ValueError("there is no text to evaluate.")
        return cls(kept, num_bytes)

    def evaluate(self, sum_losses: SumLosses, *, max_batches: int = 0) -> dict[str, float]:
        """Scores each answer given its own prompt; figures and `max_batches` as `evaluate`."""
        counts = [float(batch["weights"].sum()) for batch in self.batches]
        asked = self.batches[: max_batches or None]
        sums = [sum_losses(batch) for batch in asked]
        scored = sum(weight for _, weight in sums)
        loss = sum(nll for nll, _ in sums) / scored
        bits = loss * sum(counts) / self.num_bytes / math.log(2)
        return {"loss": loss, "bits_per_byte": bits, "tokens": scored}


def windows(
    text: HeldOut, *, seq_len: int, stride: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of windows that together score every token once.

    Yields:
      inputs, targets int32 [batch, seq] and weights float32 [batch, seq]; the last batch is
      filled up with rows of weight 0.
    """
    stream = np.concatenate([[text.first], text.tokens]).astype(np.int32)
    count = len(text.tokens)
    # Window w scores the targets [start + seq_len - stride, start + seq_len); the first one
    # all of its own.
    starts = [0, *range(stride, count - seq_len + stride, stride)]
    for at in range(0, len(starts), batch_size):
        batch = {
            "inputs": np.zeros((batch_size, seq_len), np.int32),
            "targets": np.zeros((batch_size, seq_len), np.int32),
            "weights": np.zeros((batch_size, seq_len), np.float32),
        }
        for row, start in enumerate(starts[at : at + batch_size]):
            length = min(seq_len, count - start)
            batch["inputs"][row, :length] = stream[start : start + length]
            batch["targets"][row, :length] = stream[start + 1 : start + 1 + length]
            batch["weights"][row, 0 if start == 0 else seq_len - stride : length] = 1
        yield batch


def evaluate(
    text: HeldOut,
    sum_losses: SumLosses,
    *,
    seq_len: int,
    stride: int,
    batch_size: int,
    max_batches: int = 0,
) -> dict[str, float]:
    """Scores a text.

    Args:
      text: what to predict.
      sum_losses: the model.
      seq_len: tokens of a window.
      stride: tokens scored by a window.
      batch_size: windows at a time, all hosts together.
      max_batches: stop after these many; 0: the whole text.

    Returns:
      loss (nats), bits_per_byte (of a part of the text: at the whole's tokens per byte), and
      tokens (how many were scored).
    """
    total, scored = 0.0, 0.0
    batches = windows(text, seq_len=seq_len, stride=stride, batch_size=batch_size)
    for number, batch in enumerate(batches, 1):
        nll, weight = sum_losses(batch)
        total += nll
        scored += weight
        if number == max_batches:
            break
    loss = total / scored
    tokens_per_byte = len(text.tokens) / text.num_bytes
    return {
        "loss": loss,
        "bits_per_byte": loss * tokens_per_byte / math.log(2),
        "tokens": scored,
    }
