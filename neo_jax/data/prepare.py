"""Tokenise a source once.

Enters: a source and the data settings. Leaves: a directory of tokens (see store.py) with a
manifest that says what it is and an account of every record.

Each unit of the source is tokenised by one process, a shard at a time. A shard counts as
done once its notes, `part-*.json`, are written; a process that is killed loses at most the
shard it was at, and the next run goes on from there, to the same bytes. When all are done
the notes become the manifest.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from neo_jax import tokenizer as tokenizers
from neo_jax.config import ConfigError, DataConfig
from neo_jax.data import accounting, corpus, sources, store
from neo_jax.data.sources import Source, Unit
from neo_jax.data.store import ShardWriter
from neo_jax.data.tokens import LeftOut, Outcome, encode, token_dtype

_PLAN = "prepare.json"  # the settings of a run that is not finished
_LOCK = ".lock"
_SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class Job:
    """What every process needs to know; the same for all units."""

    source: Source
    config: DataConfig
    folder: pathlib.Path
    shard_bytes: int  # UTF-8 bytes of text after which a shard is closed


def prepare(
    config: DataConfig,
    output: str | os.PathLike[str],
    *,
    num_processes: int,
    shard_bytes: int,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Tokenises `config.source` into the directory `output`, or goes on doing so.

    Args:
      config: the data settings; `source`, `tokenizer`, the hold-out and those that say how
        records are read.
      output: a local directory, new, empty, or left by an earlier run of the same settings.
      num_processes: how many tokenise at a time.
      shard_bytes: UTF-8 bytes of text a shard.
      show_progress: whether to draw a bar on standard error.

    Returns:
      The manifest.

    Raises:
      ConfigError: the output holds something else, the source is missing or has no text, a
        record is unreadable and `config.on_error` is "raise", or a process was killed.
    """
    folder = pathlib.Path(output).expanduser()
    if "://" in os.fspath(output):
        raise ConfigError(f"--output {os.fspath(output)} must be a local directory; copy it.")
    source = sources.open_source(config.source, config)
    with _locked(folder):
        _remove_false_start(folder)
        tokenizer = _tokenizer(config, folder)
        settings = _settings(source, config, tokenizer, shard_bytes)
        if (done := _finished(folder, settings)) is not None:
            return done
        _start_or_resume(folder, settings, tokenizer)
        job = Job(source, config, folder, shard_bytes)
        _run(job, tokenizer, num_processes, show_progress)
        manifest = _finish(folder, settings, tokenizer)
    return manifest


# ------------------------------------------------------------------------ the output folder


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder, and keeps a second run out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror}.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--output {folder}: another run is writing there.") from None
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)


def _remove_false_start(folder: pathlib.Path) -> None:
    """Empties the folder of a run that ended before its first shard was complete."""
    done = (folder / sources.MANIFEST).exists() or any(folder.glob("part-*.json"))
    if (folder / _PLAN).exists() and not done:
        _remove_all(folder)


def _tokenizer(config: DataConfig, folder: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer; one that an earlier run trained is not trained again."""
    trained = config.tokenizer.startswith("bpe:") and (folder / tokenizers.FILE_NAME).is_file()
    return tokenizers.load(folder) if trained else corpus.load_tokenizer(config)


def _settings(
    source: Source, config: DataConfig, tokenizer: tokenizers.Tokenizer, shard_bytes: int
) -> dict[str, Any]:
    """All that decides the bytes written."""
    identity = json.dumps(source.identity()).encode()
    return {
        "source": source.name,
        "files": hashlib.sha256(identity).hexdigest(),
        "tokenizer": config.tokenizer,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "holdout_every": config.holdout_every,
        "holdout_offset": config.holdout_offset,
        "record_format": config.record_format,
        "text_field": config.text_field,
        "txt_documents": config.txt_documents,
        "on_error": config.on_error,
        "max_document_bytes": config.max_document_bytes,
        "shard_bytes": shard_bytes,
        "block_tokens": store.BLOCK_TOKENS,
    }


def _finished(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a run of the same settings that is complete."""
    if not (folder / sources.MANIFEST).exists():
        return None
    manifest = store.read_manifest(folder)
    _require_same(folder, manifest.get("settings", {}), settings)
    _remove_notes(folder)
    return manifest


def _start_or_resume(
    folder: pathlib.Path, settings: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> None:
    plan = folder / _PLAN
    if plan.exists():
        try:
            _require_same(folder, json.loads(plan.read_text()), settings)
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{plan} is damaged; remove {folder}.") from None
    else:
        others = [p.name for p in sorted(folder.iterdir()) if not _is_ours(p.name)]
        if others:
            raise ConfigError(
                f"--output {folder} holds other files, {others[0]!r} first; name a new folder."
            )
    for stale in folder.glob("*.tmp"):
        stale.unlink()
    tokenizer.save(folder)
    _write_json(plan, settings)


def _is_ours(name: str) -> bool:
    """Whether a run that was killed before it wrote its plan may have left this file."""
    return name in (_LOCK, tokenizers.FILE_NAME) or name.endswith(".tmp")


def _require_same(
    folder: pathlib.Path, theirs: dict[str, Any], settings: dict[str, Any]
) -> None:
    for key, value in settings.items():
        if theirs.get(key) != value:
            raise ConfigError(
                f"--output {folder} holds another data set, made with "
                f"{key}={theirs.get(key)!r} instead of {value!r}; name a new folder."
            )


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)


# ------------------------------------------------------------------------------ processes


def _run(
    job: Job, tokenizer: tokenizers.Tokenizer, num_processes: int, show_progress: bool
) -> None:
    """Brings every unit to its end."""
    units = job.source.units()
    # tqdm counts text; files that are compressed hold more of it than their size says.
    with tqdm.tqdm(
        desc=f"prepare {job.source.name}",
        unit="B",
        unit_scale=True,
        disable=not show_progress,
    ) as bar:
        if num_processes == 1 or len(units) == 1:
            firsts = _first_records(job, units, map)
            with _one_thread():
                for number, (unit, first) in enumerate(zip(units, firsts, strict=True)):
                    prepare_unit(job, tokenizer, number, unit, first, bar.update)
        else:
            _run_parallel(job, tokenizer, units, num_processes, bar)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps `tokenizers` to one thread: the processes are the parallelism."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _run_parallel(
    job: Job,
    tokenizer: tokenizers.Tokenizer,
    units: Sequence[Unit],
    num_processes: int,
    bar: tqdm.tqdm[Any],
) -> None:
    context = multiprocessing.get_context("spawn")
    done = context.SimpleQueue()
    reporter = threading.Thread(target=_report_progress, args=(done, bar), daemon=True)
    reporter.start()
    pool = concurrent.futures.ProcessPoolExecutor(
        num_processes, context, _start_process, (job, tokenizer, os.getpid(), done)
    )
    try:
        with _one_thread(), pool:
            firsts = _first_records(job, units, pool.map)
            futures = [
                pool.submit(_in_process, number, unit, first)
                for number, (unit, first) in enumerate(zip(units, firsts, strict=True))
            ]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except concurrent.futures.process.BrokenProcessPool:
        raise ConfigError(
            "a process that tokenises was killed, perhaps for want of memory; run the same "
            "command again, with fewer --num_processes."
        ) from None
    finally:
        done.put(None)
        reporter.join()


def _report_progress(done: Any, bar: tqdm.tqdm[Any]) -> None:
    while (num_bytes := done.get()) is not None:
        bar.update(num_bytes)


_process: tuple[Job, tokenizers.Tokenizer, Callable[[int], Any]]


def _start_process(job: Job, tokenizer: tokenizers.Tokenizer, parent: int, done: Any) -> None:
    global _process
    _process = job, tokenizer, done.put
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    """A run that was killed must not go on writing beside the next one."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _in_process(number: int, unit: Unit, first: int) -> None:
    job, tokenizer, done = _process
    prepare_unit(job, tokenizer, number, unit, first, done)


def _count_in_process(unit: Unit) -> int:
    return _process[0].source.count(unit)


def _first_records(job: Job, units: Sequence[Unit], parallel: Callable[..., Any]) -> list[int]:
    """Each unit's first record, counted in the whole source; it decides what is held out."""
    if not job.config.holdout_every or len(units) == 1:
        return [0] * len(units)
    count = job.source.count if parallel is map else _count_in_process
    counts = list(parallel(count, units[:-1]))
    return [0, *itertools.accumulate(counts)]


# ----------------------------------------------------------------------------- one unit


def prepare_unit(
    job: Job,
    tokenizer: tokenizers.Tokenizer,
    number: int,
    unit: Unit,
    first: int,
    progress: Callable[[int], Any],
) -> None:
    """Writes the shards of one unit that are not there yet.

    Args:
      job: what is common to all units.
      tokenizer: gives the ids.
      number: of the unit.
      unit: what to read.
      first: index of its first record in the whole source.
      progress: is told how many bytes of text were done.
    """
    part, consumed = 0, 0
    while (notes := _notes(job.folder, number, part)) is not None:
        progress(sum(group["bytes"] for group in notes["groups"].values()))
        if notes["last"]:
            return
        part, consumed = part + 1, notes["consumed"]
    records = enumerate(job.source.records(unit), start=first)
    rest = itertools.islice(records, consumed, None)
    outcomes = encode(rest, tokenizer, job.config)
    last = False
    while not last:
        consumed, last = _write_part(
            job, tokenizer, f"{number:05d}-{part:04d}", outcomes, first, progress
        )
        part += 1


def _notes(folder: pathlib.Path, number: int, part: int) -> dict[str, Any] | None:
    path = folder / f"part-{number:05d}-{part:04d}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _write_part(
    job: Job,
    tokenizer: tokenizers.Tokenizer,
    label: str,
    outcomes: Iterator[Outcome],
    first: int,
    progress: Callable[[int], Any],
) -> tuple[int, bool]:
    """Writes the next shard of each split; returns records consumed, and if that was all."""
    config = job.config
    writers: dict[str, ShardWriter] = {}
    tally = accounting.Tally()
    digests: list[int] = []
    consumed, size = 0, 0
    for outcome in outcomes:
        consumed = outcome.index - first + 1
        tally.add(outcome)
        if isinstance(outcome, LeftOut):
            continue
        held_out = sources.is_held_out(
            outcome.index, config.holdout_every, config.holdout_offset
        )
        split = _SPLITS[held_out]
        if split not in writers:
            path = job.folder / f"{split}-{label}.array_record"
            writers[split] = ShardWriter(path, tokenizer.vocab_size)
        writers[split].add(outcome)
        digests.append(outcome.digest)
        progress(outcome.num_bytes)
        size += outcome.num_bytes
        if size >= job.shard_bytes:
            break
    last = size < job.shard_bytes
    arrays = {split: np.asarray(w.lengths, np.uint32) for split, w in writers.items()}
    for split, writer in writers.items():
        _, codes = np.unique(writer.groups, return_inverse=True)
        arrays[f"{split}_groups"] = codes.astype(np.uint16)
    _write_arrays(job.folder, label, digests=np.asarray(digests, np.uint64), **arrays)
    shards = {split: writer.finish() for split, writer in writers.items()}
    notes = {"consumed": consumed, "last": last, "shards": shards, **tally.content()}
    _write_json(job.folder / f"part-{label}.json", notes)
    return consumed, last


def _write_arrays(folder: pathlib.Path, label: str, **arrays: np.ndarray) -> None:
    path = folder / f"part-{label}.npz"
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    aside.replace(path)


# ----------------------------------------------------------------------------- the manifest


def _finish(
    folder: pathlib.Path, settings: dict[str, Any], tokenizer: tokenizers.Tokenizer
) -> dict[str, Any]:
    """Makes the manifest out of the notes, and removes them."""
    paths = sorted(folder.glob("part-*.json"))
    notes = [json.loads(path.read_text()) for path in paths]
    arrays = [_read_arrays(path.with_suffix(".npz")) for path in paths]
    tally = accounting.Tally()
    for note in notes:
        tally.merge(note)
    found = {split: _finish_split(folder, split, notes, arrays) for split in _SPLITS}
    splits = {split: part for split, part in found.items() if part is not None}
    report = accounting.report(tally.content(), np.concatenate([a["digests"] for a in arrays]))
    if "train" not in splits:
        _remove_all(folder)
        raise ConfigError(
            f"data source {settings['source']!r} gave no document to train on; of "
            f"{report['records']} records were {accounting.describe(report['left_out'])}, and "
            f"{report['documents']} held out."
        )
    manifest = {
        "format": sources.MANIFEST_FORMAT,
        "tokenizer": settings["tokenizer"],
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "dtype": np.dtype(token_dtype(tokenizer.vocab_size)).name,
        "settings": settings,
        "splits": splits,
        "report": report,
    }
    _write_json(folder / sources.MANIFEST, manifest)
    _remove_notes(folder)
    return manifest


def _finish_split(
    folder: pathlib.Path,
    split: str,
    notes: Sequence[dict[str, Any]],
    arrays: Sequence[dict[str, np.ndarray]],
) -> dict[str, Any] | None:
    """Writes a split's index; returns its part of the manifest, None where it is empty."""
    pairs = [(n["shards"][split], a) for n, a in zip(notes, arrays, strict=True) if split in a]
    if not pairs:
        return None
    shards = [shard for shard, _ in pairs]
    lengths = np.concatenate([a[split] for _, a in pairs])
    ends = np.cumsum(lengths, dtype=np.int64)
    index = [_write_index(folder / f"{split}.ends.npy", ends)]
    names = sorted({name for shard in shards for name in shard["groups"]})
    if len(names) > 1:
        # A part numbers the groups that it met; here they get the split's own numbers.
        groups = [
            np.searchsorted(names, sorted(shard["groups"]))[a[f"{split}_groups"]]
            for shard, a in pairs
        ]
        codes = np.concatenate(groups).astype(np.uint16)
        index.append(_write_index(folder / f"{split}.groups.npy", codes))
    totals = {key: sum(s[key] for s in shards) for key in ("documents", "tokens", "bytes")}
    return {**totals, "shards": shards, "index": index}


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:  # closed again: a large corpus has thousands of parts
        return dict(file)


def _write_index(path: pathlib.Path, numbers: np.ndarray) -> dict[str, Any]:
    """Writes one number for each document; returns the file's line of the manifest."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        np.save(file, numbers)
    aside.replace(path)
    return {
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "sha256": _sha256(path),
    }


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_notes(folder: pathlib.Path) -> None:
    for path in [folder / _PLAN, *folder.glob("part-*"), *folder.glob("*.tmp")]:
        path.unlink(missing_ok=True)


def _remove_all(folder: pathlib.Path) -> None:
    _remove_notes(folder)
    ours = [
        folder / tokenizers.FILE_NAME,
        *folder.glob("*.array_record"),
        *folder.glob("*.npy"),
    ]
    for path in ours:
        path.unlink(missing_ok=True)


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads every shard of a prepared directory and compares its checksum.

    Returns:
      The manifest.

    Raises:
      ConfigError: a file is missing or not what it was.
    """
    path = pathlib.Path(folder)
    manifest = store.read_manifest(path)
    for part in manifest["splits"].values():
        store.require_files(str(path), part)
        for entry in store.files_of(part):
            if _sha256(path / entry["file"]) != entry["sha256"]:
                raise ConfigError(f"{path / entry['file']} is damaged: its checksum differs.")
    return manifest
