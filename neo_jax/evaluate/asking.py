"""Strings in, log-likelihoods out: what benchmarks ask of a language model.

Enters: pairs of a context and its continuation, or whole texts. Leaves: for each pair the
log-likelihood of the continuation in nats and whether greedy decoding would write it; for
each text its log-likelihood, every token predicted once.

Tokens are cut as lm-evaluation-harness 0.4 cuts them (lm_eval/api/model.py, TemplateLM):
spaces at the end of a context belong to the continuation; the continuation's tokens are
those of the joined text after as many as the context alone has; an empty context is the
end-of-text token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from neo_jax.evaluate.batching import Request
from neo_jax.evaluate.scoring import Score, ScoreRequests
from neo_jax.tokenizer import Tokenizer


class Rolled(NamedTuple):
    """Of a text: natural logarithm of its probability, and its tokens."""

    loglikelihood: float
    num_tokens: int


class Asker:
    """A model that can be asked in words.

    Attributes:
      truncated: pairs whose context lost tokens at its front, since they and their
        continuation were longer than the model can read.
    """

    def __init__(self, score: ScoreRequests, tokenizer: Tokenizer, max_seq_len: int):
        self.score, self.tokenizer, self.max_seq_len = score, tokenizer, max_seq_len
        self.truncated = 0

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """The score of each continuation after its context.

        Raises:
          ValueError: a continuation without tokens, or longer than the model can read.
        """
        return self.tokens(self.encode_pairs(pairs))

    def tokens(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """`pairs` in token ids; each context holds at least one."""
        return self.score([self._fitted(*pair) for pair in pairs])

    def rolling(self, texts: Sequence[str], stride: int | None = None) -> list[Rolled]:
        """The log-likelihood of each text after an end-of-text token.

        Args:
          texts: an empty one has log-likelihood 0.
          stride: see `rolling_windows`.
        """
        encoded = self.tokenizer.encode_batch(texts)
        windows = [
            list(rolling_windows(ids, self.tokenizer.eos_id, self.max_seq_len, stride))
            for ids in encoded
        ]
        scores = iter(self.score([window for each in windows for window in each]))
        return [
            Rolled(sum(next(scores).loglikelihood for _ in each), len(ids))
            for ids, each in zip(encoded, windows, strict=True)
        ]

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]]
    ) -> list[tuple[list[int], list[int]]]:
        """Contexts and continuations as token ids; see the head of the file."""
        moved = []
        for context, continuation in pairs:
            bare = context.rstrip() if context else context
            moved.append((bare, context[len(bare) :] + continuation))
        whole = self.tokenizer.encode_batch([a + b for a, b in moved])
        alone = self.tokenizer.encode_batch([a for a, _ in moved])
        return [
            self._split(pair, joined, len(context))
            for pair, joined, context in zip(pairs, whole, alone, strict=True)
        ]

    def _split(
        self, pair: tuple[str, str], joined: list[int], length: int
    ) -> tuple[list[int], list[int]]:
        eos = self.tokenizer.eos_id
        if length == 0 and joined[:1] != [eos]:
            joined = [eos, *joined]
        cut = max(length, 1)
        if len(joined) <= cut:
            raise ValueError(
                f"after {pair[0][-40:]!r} the continuation {pair[1]!r} has no tokens to score."
            )
        return joined[:cut], joined[cut:]

    def _fitted(self, context: list[int], continuation: list[int]) -> Request:
        if len(continuation) > self.max_seq_len:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than the model can "
                f"read, {self.max_seq_len}."
            )
        tokens = context + continuation
        if len(tokens) > self.max_seq_len + 1:
            self.truncated += 1
            tokens = tokens[-(self.max_seq_len + 1) :]
        return Request(tokens, len(continuation))


def rolling_windows(
    tokens: list[int], prefix: int, max_seq_len: int, stride: int | None = None
) -> Iterator[Request]:
    """Windows over a document that together predict each of its tokens once.

    The first reads `prefix` and the document's beginning, and predicts all that it can.
    Each one after it reads `max_seq_len` tokens, up to the one before the last that it
    predicts, and predicts `stride` tokens more; the last one predicts what is left, with
    as many before it as the model can read. Source: lm-evaluation-harness,
    lm_eval/utils.py, get_rolling_token_windows; its context_len is max_seq_len − stride + 1.

    Args:
      tokens: of the document; none of them, no windows.
      prefix: the token that stands before the document.
      max_seq_len: tokens that the model can read.
      stride: tokens that a window predicts; left out, `max_seq_len`: windows do not overlap.

    Raises:
      ValueError: the stride is not in 1 … max_seq_len.
    """
    stride = max_seq_len if stride is None else stride
    if not 1 <= stride <= max_seq_len:
        raise ValueError(f"stride={stride} must lie in 1 … {max_seq_len}.")
    done = min(max_seq_len, len(tokens))
    if done:
        yield Request([prefix, *tokens[:done]], done)
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        yield Request(tokens[end - max_seq_len - 1 : end], end - done)
        done = end
