"""From files to rows, one function a format.

Enters: a path, local or remote, and perhaps a range of it. Leaves: `Row`s and
`Unreadable`s in the file's order.

Formats go by their suffix: `.txt` and `.raw`, `.jsonl` and `.json`, each also with
`.gz`, `.zst`, `.bz2` or `.xz` behind it; `.parquet`; `.arrow`; and ArrayRecord, whose
records are UTF-8 text or JSON objects. Paths that fsspec knows, such as `gs://bucket/…`,
are read in place, and ArrayRecord files from a local copy in ~/.cache/neo_jax.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import pathlib
import re
import zlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import fsspec
import zstandard

from neo_jax.config import ConfigError
from neo_jax.data.records import Row, Unreadable

TEXT_SUFFIXES = (".txt", ".raw")
JSON_SUFFIXES = (".jsonl", ".json")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
KNOWN_FORMATS = (
    f"known by their names are {', '.join((*TEXT_SUFFIXES, *JSON_SUFFIXES))}, also with "
    f"{', '.join(COMPRESSIONS)}, and .parquet, .arrow, .array_record"
)
_CHUNK_BYTES = 1 << 20
_ROWS_AT_A_TIME = 256
# What file systems call the version of a file.
_VERSION_KEYS = ("generation", "etag", "ETag", "mtime", "LastModified", "created")

RowOrError: TypeAlias = Row | Unreadable


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of one file: `start` to `stop`, or all of it where `stop` is None.

    Counted in bytes for `.jsonl`, in row groups for Parquet, in records for ArrayRecord. A
    line belongs to the piece in which it starts.
    """

    path: str
    start: int = 0
    stop: int | None = None


def file_format(path: str) -> str | None:
    """One of "text", "json", "parquet", "arrow", "array_record"; None: not known."""
    name = path.rsplit("/", 1)[-1]
    if _ARRAY_RECORD.search(name):
        return "array_record"
    base, suffix = _split_compression(name)
    if suffix == ".parquet" and base == name:
        return "parquet"
    if suffix == ".arrow" and base == name:
        return "arrow"
    if suffix in TEXT_SUFFIXES:
        return "text"
    return "json" if suffix in JSON_SUFFIXES else None


def rows(span: Span, txt_documents: str) -> Iterator[RowOrError]:
    """The rows of a piece of a file; a file that cannot be read to its end yields why.

    Raises:
      ConfigError: no permission, or the file is gone.
    """
    form = file_format(span.path)
    try:
        if form == "text":
            yield from _text_rows(span, txt_documents)
        elif form == "json":
            yield from _json_rows(span)
        elif form == "parquet":
            yield from _parquet_rows(span)
        elif form == "arrow":
            yield from _arrow_rows(span)
        elif form == "array_record":
            yield from _array_record_rows(span)
        else:
            raise ConfigError(f"{span.path}: {KNOWN_FORMATS}.")
    except OSError as error:
        raise _unreachable(span.path, error) from None
    except _Broken as error:
        yield Unreadable(span.path, str(error))


def count(span: Span, txt_documents: str) -> int:
    """How many items `rows` gives for a piece of a file, without building them.

    Raises:
      ConfigError: no permission, or the file is gone.
    """
    form = file_format(span.path)
    try:
        if form == "text" and txt_documents == "file":
            return 1
        if form == "json" and not _is_json_array(span.path):
            return _count_lines(span)
        if form == "parquet":
            metadata = _open_parquet(span.path).metadata
            groups = range(metadata.num_row_groups)[span.start : span.stop]
            return sum(metadata.row_group(i).num_rows for i in groups)
        if form == "array_record":
            total = _open_array_record(span.path).num_records()
            return len(range(total)[span.start : span.stop])
    except OSError as error:
        raise _unreachable(span.path, error) from None
    except _Broken:
        pass
    return sum(1 for _ in rows(span, txt_documents))


def _count_lines(span: Span) -> int:
    number = 0
    try:
        for line in _lines(span.path, span.start, span.stop):
            number += bool(line.strip())
    except _Broken:
        number += 1  # `rows` tells of it once
    return number


def where(span: Span, index: int) -> str:
    """Names a row for an error's message, as a person would look it up in the file."""
    form = file_format(span.path)
    if form == "json":
        if _is_json_array(span.path):
            return f"{span.path} item {index}"
        # Lines are counted from the start of the file only when one must be named.
        before = sum(1 for _ in _lines(span.path, 0, span.start)) if span.start else 0
        return f"{span.path} line {before + index}"
    if form == "text":
        return f"{span.path} line {index}" if index else span.path
    return f"{span.path} {'record' if form == 'array_record' else 'row'} {index}"


def split(path: str, size: int, unit_bytes: int) -> list[Span]:
    """Pieces of a file of about `unit_bytes` bytes; one piece where it cannot be cut."""
    pieces = max(1, size // unit_bytes)
    form = file_format(path)
    if pieces == 1 or form in ("text", "arrow", None):
        return [Span(path)]
    try:
        if form == "parquet":
            total = _open_parquet(path).metadata.num_row_groups
        elif form == "array_record":
            total = _open_array_record(path).num_records()
        else:
            whole = _split_compression(path)[0] != path or _is_json_array(path)
            total = 1 if whole else size
    except _Broken:  # `rows` tells why
        total = 1
    pieces = min(pieces, max(total, 1))
    if pieces == 1:
        return [Span(path)]
    cuts = [total * i // pieces for i in range(pieces + 1)]
    return [Span(path, start, stop) for start, stop in itertools.pairwise(cuts)]


def local_copy(path: str) -> str:
    """A path that libraries without remote files can open; remote ones are copied once.

    Copies stay in the user's cache, one of each version of a file.
    """
    if not is_remote(path):
        return path.removeprefix("file://")
    with reaching(path):
        system, place = fsspec.core.url_to_fs(path)
        info = system.info(place)
        version = next((str(info[key]) for key in _VERSION_KEYS if key in info), "")
        key = hashlib.sha256(json.dumps([path, info["size"], version]).encode()).hexdigest()
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        target = root / "neo_jax" / key[:24] / place.rsplit("/", 1)[-1]
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            system.get_file(place, str(aside))
            aside.replace(target)
    return str(target)


def sizes(folder: str) -> dict[str, int]:
    """The files of a directory by their names, and their sizes in bytes."""
    if not is_remote(folder):
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    with reaching(folder):
        system, place = fsspec.core.url_to_fs(folder)
        found = system.ls(place, detail=True)
    return {f["name"].rsplit("/", 1)[-1]: f["size"] for f in found if f["type"] == "file"}


def is_remote(path: str) -> bool:
    """Whether a path lies on a file system that other libraries cannot open."""
    return "://" in path and not path.startswith("file://")


@contextlib.contextmanager
def reaching(path: str) -> Iterator[None]:
    """Whatever the library of a remote file system raises, as an OSError of one line."""
    try:
        yield
    except (OSError, ImportError, _Broken):
        raise
    except Exception as error:  # each library has its own, from credentials to transport
        if not is_remote(path):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise OSError(f"{type(error).__name__}: {reason}") from error


def _unreachable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: {error.strerror or error}.")


class _Broken(ValueError):
    """A file that ends early or is not of its format."""


def _split_compression(path: str) -> tuple[str, str]:
    """The path without `.gz` and the like, and the suffix that then ends it."""
    base = path
    for suffix in COMPRESSIONS:
        base = base.removesuffix(suffix)
    return base, pathlib.PurePosixPath(base).suffix


# ----------------------------------------------------------------------------------- bytes


def chunks(path: str, start: int = 0) -> Iterator[bytes]:
    """The decompressed bytes of a file, a megabyte or so at a time, from byte `start` on."""
    with reaching(path), fsspec.open(path, "rb") as file:
        if path.endswith(".zst"):
            yield from _zstd_chunks(file)
            return
        openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
        opener = openers.get(pathlib.PurePosixPath(path).suffix)
        stream = opener(file) if opener else file
        if start:
            stream.seek(start)
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
        except EOFError:
            raise _Broken("the compressed file ends early, it is truncated") from None
        except (OSError, lzma.LZMAError, zlib.error) as error:
            if not opener:
                raise
            raise _Broken(f"the compressed file is damaged: {error}") from None


def _zstd_chunks(file: Any) -> Iterator[bytes]:
    # Not `stream_reader`, which takes a truncated file for a finished one.
    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    fresh = True  # no byte of this frame was read yet
    while data := file.read(_CHUNK_BYTES):
        while data:
            try:
                chunk = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise _Broken(f"the zstd file is damaged: {error}") from None
            if chunk:
                yield chunk
            fresh = frame.eof
            data = frame.unused_data if frame.eof else b""
            if frame.eof:  # another frame may follow
                frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    if not fresh:
        raise _Broken("the zstd file ends early, it is truncated")


def _lines(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Lines, without their ends, that start in bytes [start, stop)."""
    place = max(start - 1, 0)  # of `rest`; one earlier, to see whether a line starts at start
    skip = start > 0
    rest = b""
    for chunk in chunks(path, place):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if stop is not None and place >= stop:
                return
            place += len(line) + 1
            if skip:
                skip = False
                continue
            yield line
    if rest and not skip and (stop is None or place < stop):
        yield rest


# ------------------------------------------------------------------------------------ text


def _text_rows(span: Span, txt_documents: str) -> Iterator[RowOrError]:
    if txt_documents == "file":
        yield _decoded(span, 0, b"".join(chunks(span.path)))
        return
    block: list[bytes] = []
    first = 1
    for number, line in enumerate(_lines(span.path), start=1):
        if line.strip():
            first = first if block else number
            block.append(line)
        elif block:
            yield _decoded(span, first, b"\n".join(block))
            block = []
    if block:
        yield _decoded(span, first, b"\n".join(block))


def _decoded(span: Span, index: int, data: bytes) -> RowOrError:
    try:
        return Row(index, data.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
        return Unreadable(where(span, index), reason, "undecodable")


# ------------------------------------------------------------------------------------ JSON


def _is_json_array(path: str) -> bool:
    if not _split_compression(path)[0].endswith(".json"):
        return False
    head = next(chunks(path), b"")
    return head.lstrip()[:1] == b"["


def _json_rows(span: Span) -> Iterator[RowOrError]:
    if _is_json_array(span.path):
        try:
            values = json.loads(b"".join(chunks(span.path)))
        except ValueError as error:
            raise _Broken(f"not valid JSON: {error}") from None
        for index, value in enumerate(values, start=1):
            yield _json_row(span, index, value)
        return
    for index, line in enumerate(_lines(span.path, span.start, span.stop), start=1):
        if line.strip():
            yield _parsed(span, index, line)


def _parsed(span: Span, index: int, line: bytes) -> RowOrError:
    try:
        return _json_row(span, index, json.loads(line))
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} of the line is not UTF-8"
        return Unreadable(where(span, index), reason, "undecodable")
    except ValueError as error:
        return Unreadable(where(span, index), f"not valid JSON: {error}")


def _json_row(span: Span, index: int, value: Any) -> RowOrError:
    if isinstance(value, (str, dict)):
        return Row(index, value)
    reason = f"JSON of type {type(value).__name__}; it must be text or an object"
    return Unreadable(where(span, index), reason)


# ----------------------------------------------------------------------- Parquet and Arrow


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(fsspec.open(path, "rb").open())
    except pyarrow.ArrowInvalid as error:
        raise _Broken(f"not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _parquet_rows(span: Span) -> Iterator[RowOrError]:
    file = _open_parquet(span.path)
    groups = range(file.metadata.num_row_groups)[span.start : span.stop]
    first = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
    batches = file.iter_batches(batch_size=_ROWS_AT_A_TIME, row_groups=list(groups))
    yield from _batch_rows(batches, first)


def _arrow_rows(span: Span) -> Iterator[RowOrError]:
    import pyarrow

    with fsspec.open(span.path, "rb") as file:
        data = io.BytesIO(file.read()) if "://" in span.path else file
        try:
            batches: Any = pyarrow.ipc.open_stream(data)
        except pyarrow.ArrowInvalid:
            try:
                reader = pyarrow.ipc.open_file(span.path if data is file else data)
            except pyarrow.ArrowInvalid as error:
                reason = str(error).splitlines()[0]
                raise _Broken(f"not a readable Arrow file: {reason}") from None
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        yield from _batch_rows(batches, 0)


def _batch_rows(batches: Iterator[Any], first: int) -> Iterator[RowOrError]:
    import pyarrow

    try:
        for batch in batches:
            for fields in batch.to_pylist():
                yield Row(first, fields)
                first += 1
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _Broken(
            f"unreadable from row {first} on: {str(error).splitlines()[0]}"
        ) from None


# ----------------------------------------------------------------------------- ArrayRecord


def _open_array_record(path: str) -> Any:
    from array_record.python import array_record_module

    local = local_copy(path)
    with open(local, "rb"):  # says why it cannot be opened; the library does not
        pass
    try:
        reader = array_record_module.ArrayRecordReader(local)
        if not reader.ok():
            reader.close()  # raises what is wrong
        return reader
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise _Broken(f"not a readable ArrayRecord file: {reason}") from None


def _array_record_rows(span: Span) -> Iterator[RowOrError]:
    reader = _open_array_record(span.path)
    stop = reader.num_records() if span.stop is None else span.stop
    as_json: bool | None = None
    for start in range(span.start, stop, _ROWS_AT_A_TIME):
        end = min(start + _ROWS_AT_A_TIME, stop)
        try:
            records = reader.read(start, end)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise _Broken(f"unreadable from record {start} on: {reason}") from None
        as_json = _holds_objects(reader) if as_json is None else as_json
        for index, data in enumerate(records, start=start):
            yield _parsed(span, index, data) if as_json else _decoded(span, index, data)
    reader.close()


def _holds_objects(reader: Any) -> bool:
    """Whether the file's first record is a JSON object; then all of them must be."""
    (head,) = reader.read([0])
    if head.lstrip()[:1] != b"{":
        return False
    try:
        return isinstance(json.loads(head), dict)
    except ValueError:
        return False
