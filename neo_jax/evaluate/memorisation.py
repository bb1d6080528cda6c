"""How much of its training text a model can write down by heart.

Enters: texts, and a model to ask. Leaves: how often, and how far, greedy decoding goes on
verbatim. From each text one place is taken: `prompt` tokens are given, the `length` after
them are what is looked for. Texts that the model never saw are the measure to compare with.

Nothing is generated: greedy decoding writes the text's own tokens exactly as long as each
of them is the likeliest after the true ones before it, which one pass over the text shows.
After Carlini et al. 2022 (arXiv:2202.07646), who take 50 and 50 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neo_jax.config import ConfigError
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.documents import Figure, Text
from neo_jax.evaluate.tasks import Outcome

NAME = "memorisation"


def check(
    texts: Sequence[Text],
    asker: Asker,
    data: str,
    *,
    prompt: int = 50,
    length: int = 50,
    samples: int = 1000,
    seed: int = 0,
) -> Outcome:
    """Statistics of verbatim continuation.

    Args:
      texts: of the training data, or for comparison others.
      asker: the model.
      data: where the texts are from, for the report.
      prompt: tokens given.
      length: tokens looked for.
      samples: places, at most; drawn over all tokens alike.
      seed: of the places.

    Raises:
      ConfigError: no text is long enough.
    """
    ids = asker.tokenizer.encode_batch([text.scored for text in texts])
    rooms = np.asarray([max(0, len(each) - prompt - length + 1) for each in ids])
    ends = np.cumsum(rooms)
    total = int(ends[-1]) if len(ends) else 0
    if not total:
        raise ConfigError(
            f"{data}: none of {len(ids)} documents has the {prompt + length} tokens that the "
            f"memorisation check looks at."
        )
    draw = np.random.default_rng(seed)
    places = np.sort(draw.choice(total, min(samples, total), replace=False))
    pairs = []
    for place in places:
        which = int(np.searchsorted(ends, place, side="right"))
        start = int(place - (ends[which] - rooms[which]))
        cut = start + prompt
        pairs.append((ids[which][start:cut], ids[which][cut : cut + length]))
    matches = np.asarray([score.num_greedy for score in asker.tokens(pairs)], float)
    exact = matches == length
    n = len(matches)
    figures = {
        "exact_match": Figure(float(exact.mean()), _stderr(exact)),
        "mean_match": Figure(float(matches.mean()), _stderr(matches)),
        "median_match": Figure(float(np.median(matches))),
        "longest_match": Figure(float(matches.max())),
    }
    return Outcome(NAME, figures, n, 0, f"{data}, {prompt} + {length} tokens, seed {seed}")


def _stderr(values: np.ndarray) -> float | None:
    n = len(values)
    return float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
