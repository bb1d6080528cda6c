"""Published figures, to stand beside ours.

Source: README.md of EleutherAI/gpt-neo at 23485e3, which also quotes GPT-2 and GPT-3. Its
HellaSwag is unnormalised accuracy. It names neither the normaliser of WikiText's perplexity
nor the prompts; we set WikiText beside the perplexity per word, lm-evaluation-harness's
first figure. Its pairs of bits per byte and perplexity on The Pile imply 0.2870 and 0.2869
tokens a byte, less than the 0.29335 of The Pile's paper. Accuracies are percentages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Cell(NamedTuple):
    """A task and its metric, as the tables here name them."""

    task: str
    metric: str


_COLUMNS = (
    Cell("pile", "bits_per_byte"),
    Cell("pile", "token_perplexity"),
    Cell("wikitext", "word_perplexity"),
    Cell("lambada_openai", "perplexity"),
    Cell("lambada_openai", "acc"),
    Cell("winogrande", "acc"),
    Cell("hellaswag", "acc"),
    Cell("mathqa", "acc"),
    Cell("pubmedqa", "acc"),
    Cell("piqa", "acc"),
)

_ROWS: Mapping[str, tuple[float | None, ...]] = {
    "GPT-Neo 125M": (None, None, 32.285, 30.266, 37.36, 50.43, 28.67, 22.78, 55.10, 63.06),
    "GPT-Neo 350M": (None, None, 22.5657, 13.876, 47.27, 51.14, 32.16, 23.45, 53.80, 65.07),
    "GPT-Neo 1.3B": (0.7527, 6.159, 13.10, 7.498, 57.23, 55.01, 38.66, 24.05, 54.40, 71.11),
    "GPT-Neo 2.7B": (0.7165, 5.646, 11.39, 5.626, 62.22, 56.50, 42.73, 24.72, 57.54, 72.14),
    "GPT-2 1.5B": (1.0468, None, 17.48, 10.634, 51.21, 59.40, 40.03, 23.64, 58.33, 70.78),
    "GPT-3 125M": (None, None, None, 18.6, 42.7, 52.0, 33.7, None, None, 64.6),
    "GPT-3 350M": (None, None, None, 9.09, 54.3, 52.1, 43.6, None, None, 70.2),
    "GPT-3 1.3B": (None, None, None, 5.44, 63.6, 58.7, 54.7, None, None, 75.1),
    "GPT-3 2.7B": (None, None, None, 4.60, 67.1, 62.3, 62.8, None, None, 75.6),
    "GPT-3 Ada": (0.9631, None, None, 9.954, 51.60, 52.90, 35.93, 24.29, 52.80, 68.88),
}


def figures(task: str, metric: str) -> dict[str, float]:
    """Published values by model, in the units of ours: accuracies as shares of 1."""
    cell = Cell(task, metric)
    if cell not in _COLUMNS:
        return {}
    at = _COLUMNS.index(cell)
    unit = 0.01 if metric.startswith("acc") else 1.0
    found = {name: row[at] for name, row in _ROWS.items()}
    return {name: value * unit for name, value in found.items() if value is not None}
