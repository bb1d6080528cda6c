"""Which source the next sequence comes from.

Enters: weights. Leaves: for any position in the stream of sequences, its source and how
many sequences that source gave before: whole numbers, found without walking there.

Sequences of a source are spread evenly, not drawn: the first source takes position t
where ⌊(t+1)·p⌋ > ⌊t·p⌋, the second divides what is left in the same way, and so on. After
any number of sequences each source's count is off its exact share by less than the number
of sources.
"""

from __future__ import annotations

import bisect
import fractions
from collections.abc import Sequence


class Mixture:
    """Weights of several sources, which may change at given positions.

    Args:
      weights: for each stage, a weight for each source; in each one or more are positive.
      changes: positions, in sequences since the start, at which stages 1, 2, … begin.
    """

    def __init__(self, weights: Sequence[Sequence[float]], changes: Sequence[int]) -> None:
        self.changes = tuple(changes)
        self._starts = [0, *changes]
        self._shares = [_shares_of_rest(stage) for stage in weights]
        self._before = [[0] * len(weights[0])]  # sequences of each source before each stage
        for stage, start in enumerate(changes):
            length = start - self._starts[stage]
            counts = _counts(length, self._shares[stage])
            self._before.append([a + b for a, b in zip(self._before[-1], counts, strict=True)])

    def place(self, position: int) -> tuple[int, int]:
        """The source of a sequence, and how many came from that source before."""
        stage = bisect.bisect_right(self._starts, position) - 1
        left = position - self._starts[stage]
        for source, (numerator, denominator) in enumerate(self._shares[stage]):
            taken = left * numerator // denominator
            if (left + 1) * numerator // denominator > taken:
                return source, self._before[stage][source] + taken
            left -= taken
        raise AssertionError("the last source takes all that is left")

    def counts(self, position: int) -> list[int]:
        """How many of the sequences before `position` came from each source."""
        stage = bisect.bisect_right(self._starts, position) - 1
        counts = _counts(position - self._starts[stage], self._shares[stage])
        return [a + b for a, b in zip(self._before[stage], counts, strict=True)]


def _shares_of_rest(weights: Sequence[float]) -> list[tuple[int, int]]:
    """Each source's exact part of what the sources before it left, as a fraction."""
    exact = [fractions.Fraction(weight) for weight in weights]
    shares = []
    for source, weight in enumerate(exact):
        rest = sum(exact[source:])
        share = weight / rest if rest else fractions.Fraction(0)
        shares.append((share.numerator, share.denominator))
    return shares


def _counts(length: int, shares: Sequence[tuple[int, int]]) -> list[int]:
    counts = []
    for numerator, denominator in shares:
        counts.append(length * numerator // denominator)
        length -= counts[-1]
    return counts
