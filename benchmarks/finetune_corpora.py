"""Writes the corpora that experiments/cpu_hour.py reads, from files as they are published.

    python benchmarks/finetune_corpora.py SOURCE OUTPUT

SOURCE holds wikipedia-enwiki-106/articles.jsonl, wikitext/wiki.valid.raw,
wikitext/wikitext103_1000.json and tinystories/tinystories_1000.json. WikiText's test split is
never read.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from collections.abc import Iterable


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("output", type=pathlib.Path)
    flags = parser.parse_args()
    source, output = flags.source, flags.output
    output.mkdir(parents=True, exist_ok=True)

    articles = (source / "wikipedia-enwiki-106/articles.jsonl").read_text().splitlines()
    write(output / "wikipedia.jsonl", (json.loads(line)["text"] for line in articles))

    raw = (source / "wikitext/wiki.valid.raw").read_text()
    pages = re.split(r"\n(?= = [^=].*[^=] = \n)", raw)
    pieces = json.loads((source / "wikitext/wikitext103_1000.json").read_text())
    write(output / "wikitext.jsonl", map(detokenise, [*pages, *pieces]))

    stories = json.loads((source / "tinystories/tinystories_1000.json").read_text())
    write(output / "tinystories.jsonl", stories)


def write(path: pathlib.Path, documents: Iterable[str]) -> None:
    """One record a document, and a line that counts them."""
    kept = [text.strip() for text in documents if text.strip()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
    print(f"{path}: {len(kept)} documents, {path.stat().st_size:,} bytes")


def detokenise(text: str) -> str:
    """WikiText's tokens as running text: its spaces before punctuation are taken back."""
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r" ([.,;:!?)\]%])", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    text = re.sub(r'" ([^"]*) "', r'"\1"', text)
    return text.replace(" 's", "'s").replace("s ' ", "s' ").replace(" n't", "n't")


if __name__ == "__main__":
    main()
