r"""Perplexity of documents, each scored by itself.

Enters: documents of any source, and a model to ask. Leaves: figures of all of them and of
each group, such as The Pile's subsets. With L the log-likelihood of a document in nats,
summed over documents, the definitions are those of lm-evaluation-harness:

    token_perplexity  exp(−ΣL / Σ tokens)
    word_perplexity   exp(−ΣL / Σ words), words as `re.split(r"\s+", text)` counts them
    byte_perplexity   exp(−ΣL / Σ UTF-8 bytes)
    bits_per_byte     −ΣL / (ln 2 × Σ UTF-8 bytes)
    pile_bits_per_byte  −ΣL / (ln 2 × Σ tokens) × 0.29335, the convention of the Pile's paper,
                        which takes a constant number of GPT-2 tokens a byte

Each document is predicted from an end-of-text token on; none follows it. Standard errors are
those of a ratio of two sums over documents, carried through exp (the delta method).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import sources
from neo_jax.data.records import Document
from neo_jax.evaluate.asking import Asker

ALL = "all"


@dataclasses.dataclass(frozen=True)
class Text:
    """A document: what is scored, and what its words and bytes are counted on."""

    scored: str
    counted: str
    group: str = ALL


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number and its standard error, where one can be told."""

    value: float
    stderr: float | None = None


def read(name: str, text_field: str = "text") -> list[Text]:
    """The documents of a source; see data/sources.py for its names.

    Raises:
      ConfigError: there is no such source, or a record in it is no text.
    """
    config = DataConfig(source=name, text_field=text_field)
    texts = []
    for record in sources.all_records(sources.open_source(name, config)):
        if isinstance(record, Document):
            texts.append(Text(record.text, record.text, record.group))
        elif record is not None:
            raise ConfigError(f"{record.where}: {record.reason}.")
    return texts


def count_words(text: str) -> int:
    """Words as lm-evaluation-harness counts them: an empty end is one, too."""
    return len(re.split(r"\s+", text))


def perplexities(
    texts: Sequence[Text], asker: Asker, stride: int | None = None
) -> dict[str, dict[str, Figure]]:
    """Figures by group, and of all together under `ALL`.

    Args:
      texts: documents; those without a token are left out.
      asker: the model.
      stride: tokens that a window predicts; see `asking.rolling_windows`.

    Raises:
      ValueError: no document has any text.
    """
    rolled = asker.rolling([text.scored for text in texts], stride)
    kept = [(t, r) for t, r in zip(texts, rolled, strict=True) if r.num_tokens]
    if not kept:
        raise ValueError(f"there is no text to evaluate: {len(texts)} empty documents.")
    groups = sorted({text.group for text, _ in kept})
    measures = {
        name: _figures([pair for pair in kept if name in (ALL, pair[0].group)])
        for name in dict.fromkeys([ALL, *(groups if len(groups) > 1 else [])])
    }
    measures[ALL]["empty_documents"] = Figure(len(texts) - len(kept))
    return measures


def _figures(kept: Iterable[tuple[Text, tuple[float, int]]]) -> dict[str, Figure]:
    columns = [
        (-nats, tokens, count_words(text.counted), len(text.counted.encode()))
        for text, (nats, tokens) in kept
    ]
    losses, tokens, words, num_bytes = np.asarray(columns, float).T
    per_token, per_word, per_byte = (
        _ratio(losses, counts) for counts in (tokens, words, num_bytes)
    )
    bits = 1 / math.log(2)
    return {
        "token_perplexity": _exp(per_token),
        "word_perplexity": _exp(per_word),
        "byte_perplexity": _exp(per_byte),
        "bits_per_byte": _scaled(per_byte, bits),
        "pile_bits_per_byte": _scaled(per_token, bits * sources.PILE_TOKENS_PER_BYTE),
        "loss": per_token,
        "documents": Figure(len(columns)),
        "tokens": Figure(tokens.sum()),
        "words": Figure(words.sum()),
        "bytes": Figure(num_bytes.sum()),
    }


def _ratio(sums: np.ndarray, counts: np.ndarray) -> Figure:
    value, n = float(sums.sum() / counts.sum()), len(sums)
    if n == 1:
        return Figure(value)
    left = np.square(sums - value * counts).sum() * n / (n - 1)
    return Figure(value, float(math.sqrt(left) / counts.sum()))


def _exp(figure: Figure) -> Figure:
    try:
        value = math.exp(figure.value)
    except OverflowError:
        value = math.inf
    return Figure(value, None if figure.stderr is None else value * figure.stderr)


def _scaled(figure: Figure, by: float) -> Figure:
    return Figure(figure.value * by, None if figure.stderr is None else figure.stderr * by)
