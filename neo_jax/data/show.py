"""Look at what the model will see.

Enters: a pipeline or a prepared directory. Leaves: sequences as coloured text, with what is
masked and where documents meet, and histograms of documents' lengths and of sources.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from neo_jax.data.packing import Batch
from neo_jax.tokenizer import Tokenizer

_SEGMENT_COLOURS = ("36", "33", "35", "32", "34", "31")  # ANSI foregrounds, in turn
_DIM = "2"


def format_sequence(batch: Batch, row: int, tokenizer: Tokenizer, colour: bool) -> str:
    """One sequence as a person reads it: its targets, segment by segment.

    With `colour` each segment has its own and masked text is dim; without, a segment starts
    with its number in ⟨⟩ and masked text stands in ⟦⟧. Padding is told, not shown.
    """
    targets, weights = batch["targets"][row], batch["weights"][row]
    segments = _segments(batch, row, tokenizer.eos_id)
    length = int(np.count_nonzero(segments))
    header = (
        f"{length} tokens, {int(np.count_nonzero(weights))} learned, "
        f"{len(targets) - length} padding, {int(segments.max())} segment(s)"
    )
    body = []
    runs = itertools.groupby(range(length), key=lambda t: (int(segments[t]), weights[t] > 0))
    previous = 0
    for (segment, learned), places in runs:
        text = tokenizer.decode(targets[t] for t in places)
        if colour:
            code = _SEGMENT_COLOURS[segment % len(_SEGMENT_COLOURS)]
            body.append(f"\033[{code}{'' if learned else ';' + _DIM}m{text}\033[0m")
        else:
            mark = f"⟨{segment}⟩" if segment != previous else ""
            body.append(mark + (text if learned else f"⟦{text}⟧"))
        previous = segment
    return f"── {header}\n{''.join(body)}\n"


def _segments(batch: Batch, row: int, eos_id: int) -> np.ndarray:
    """1, 2, … for each document and 0 on padding, also where the batch does not say."""
    if "segment_ids" in batch:
        return batch["segment_ids"][row]
    inputs = batch["inputs"][row]
    begins = inputs == eos_id
    begins[0] = True
    # Padding is eos after eos without weight, up to the end of the row.
    is_padding = (inputs == eos_id) & (batch["targets"][row] == eos_id)
    is_padding &= batch["weights"][row] == 0
    kept = np.flatnonzero(~is_padding)
    length = int(kept[-1]) + 1 if len(kept) else 0
    return np.where(np.arange(len(inputs)) < length, np.cumsum(begins), 0)


def format_batches(
    batches: Iterator[Batch], count: int, tokenizer: Tokenizer, colour: bool
) -> Iterator[str]:
    """The first `count` sequences."""
    for batch in batches:
        for row in range(min(count, len(batch["inputs"]))):
            yield format_sequence(batch, row, tokenizer, colour)
        count -= len(batch["inputs"])
        if count <= 0:
            return


def write_histograms(
    path: str | os.PathLike[str],
    lengths: Mapping[str, np.ndarray],
    tokens: Mapping[str, int],
    seq_len: int,
) -> None:
    """A PNG of the documents' lengths and of what each source gives.

    Args:
      path: of the PNG.
      lengths: for each source, tokens of each document.
      tokens: for each source, or each part of one, its tokens.
      seq_len: tokens of a sequence, drawn beside the lengths.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    # Room for each source's bar, so that The Pile's 22 fit and one alone does not fill it.
    figure = Figure(figsize=(11, max(4.5, 0.28 * len(tokens))), layout="constrained")
    left, right = figure.subplots(1, 2)
    longest = max(int(values.max(initial=1)) for values in lengths.values())
    edges = np.geomspace(1, longest + 1, 50)
    for name, values in lengths.items():
        left.hist(values, bins=list(edges), histtype="step", label=_short(name))
    left.axvline(seq_len, color="grey", linestyle=":", label=f"one sequence, {seq_len}")
    left.set(xscale="log", xlabel="tokens of a document", ylabel="documents")
    left.legend(fontsize="small")
    names = sorted(tokens, key=lambda name: tokens[name])
    right.barh([_short(name) for name in names], [tokens[name] for name in names])
    right.set(xlabel="tokens", ylim=(-1, max(len(names), 4)))
    right.xaxis.set_major_locator(ticker.MaxNLocator(5))
    right.xaxis.set_major_formatter(ticker.EngFormatter())
    target = pathlib.Path(path)
    aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    figure.savefig(aside, format="png", dpi=120)
    aside.replace(target)


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"…{name[-31:]}"
