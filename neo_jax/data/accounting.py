"""The account of every record that `prepare` met.

Enters: the outcome of each record. Leaves: counts, as JSON for the manifest and as a table
for people: nothing is left out without being counted.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from neo_jax.data.tokens import EncodedDocument, Outcome

_LEFT_OUT = ("empty", "too_long", "invalid", "undecodable")
_EXAMPLES = 5  # reasons of left-out records that are kept


class Tally:
    """Counts of records, by what became of them."""

    def __init__(self) -> None:
        self._groups: dict[str, collections.Counter[str]] = {}
        self._left_out: collections.Counter[str] = collections.Counter()
        self._examples: list[str] = []

    def add(self, outcome: Outcome) -> None:
        """Counts one record."""
        if isinstance(outcome, EncodedDocument):
            group = self._groups.setdefault(outcome.group, collections.Counter())
            group["documents"] += 1
            group["bytes"] += outcome.num_bytes
            group["tokens"] += len(outcome.ids) - 1
            return
        self._left_out[outcome.kind] += 1
        if outcome.kind != "empty" and len(self._examples) < _EXAMPLES:
            self._examples.append(outcome.reason)

    def merge(self, content: dict[str, Any]) -> None:
        """Adds what another tally's `content` gave."""
        for name, counts in content["groups"].items():
            self._groups.setdefault(name, collections.Counter()).update(counts)
        self._left_out.update(content["left_out"])
        self._examples = (self._examples + content["examples"])[:_EXAMPLES]

    def content(self) -> dict[str, Any]:
        """The counts, as JSON."""
        return {
            "groups": {name: dict(counts) for name, counts in sorted(self._groups.items())},
            "left_out": {kind: self._left_out[kind] for kind in _LEFT_OUT},
            "examples": self._examples,
        }


def report(content: dict[str, Any], digests: np.ndarray) -> dict[str, Any]:
    """The account of every record."""
    groups = content["groups"]
    totals = {
        key: sum(group[key] for group in groups.values())
        for key in ("documents", "bytes", "tokens")
    }
    duplicates = len(digests) - len(np.unique(digests))
    records = totals["documents"] + sum(content["left_out"].values())
    return {"records": records, **totals, "duplicates": duplicates, **content}


def describe(left_out: dict[str, int]) -> str:
    """Counts of left-out records in words."""
    return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in left_out.items())


def format_report(manifest: dict[str, Any]) -> str:
    """The account as a table for people."""
    account = manifest["report"]
    width = max(len(name) for name in [*account["groups"], "documents", "total"])
    lines = [f"{'source':{width}} {'documents':>12} {'bytes':>17} {'tokens':>16} tokens/byte"]
    rows = [*account["groups"].items(), ("total", account)]
    for name, counts in rows[-1:] if len(rows) == 2 else rows:
        rate = counts["tokens"] / max(counts["bytes"], 1)
        lines.append(
            f"{name:{width}} {counts['documents']:12,} {counts['bytes']:17,} "
            f"{counts['tokens']:16,} {rate:11.4f}"
        )
    lines.append(
        f"records {account['records']:,}: left out {describe(account['left_out'])}; exact "
        f"duplicates among the documents {account['duplicates']:,}"
    )
    lines += [f"  left out: {example}" for example in account["examples"]]
    for split, part in manifest["splits"].items():
        lines.append(
            f"{split}: {part['documents']:,} documents, {part['tokens']:,} tokens with their "
            f"ends, {len(part['shards'])} shards"
        )
    return "\n".join(lines)
