"""A list of a folder's files with their digests, so that a flipped byte is told by name.

Enters: a folder. Leaves: its file DIGESTS, a line per file, `digest size path`, and a last
line with the digest of those before it. xxh3 finds accidents, of disks and copies; it is no
protection against a forger.
"""

from __future__ import annotations

import os
import pathlib

import xxhash

FILE_NAME = "DIGESTS"
_BLOCK = 1 << 22  # bytes read at a time


def write(folder: pathlib.Path) -> None:
    """Lists every file below `folder`, and waits until list and folders are on the disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [_line(folder, path) for path in paths if path.name != FILE_NAME]
    text = "".join(lines)
    write_through(folder / FILE_NAME, (text + _last_line(text)).encode())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)


def problem(folder: pathlib.Path) -> str | None:
    """Why the files are not those that were written; None if they are.

    Files that the list does not name are passed over.
    """
    try:
        text = (folder / FILE_NAME).read_bytes().decode()
    except FileNotFoundError:
        return f"it has no file {FILE_NAME}, so it was never finished"
    except (OSError, UnicodeDecodeError):
        return f"its file {FILE_NAME} cannot be read"
    *lines, last = text.splitlines(keepends=True) or [""]
    if last != _last_line("".join(lines)):
        return f"its file {FILE_NAME} is damaged"
    for line in lines:
        digest, size, name = line.rstrip("\n").split(" ", 2)
        path = folder / name
        try:
            found = path.stat().st_size
            if found != int(size):
                return f"its file {name} has {found:,} bytes instead of {int(size):,}"
            if _digest(path) != digest:
                return f"its file {name} is damaged"
        except OSError as error:
            return f"its file {name} cannot be read: {error.strerror}"
    return None


def write_through(path: pathlib.Path, data: bytes) -> None:
    """Writes a file and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: pathlib.Path) -> None:
    """Waits until the names in a folder are on the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _line(folder: pathlib.Path, path: pathlib.Path) -> str:
    return f"{_digest(path)} {path.stat().st_size} {path.relative_to(folder).as_posix()}\n"


def _last_line(text: str) -> str:
    data = text.encode()
    return f"{xxhash.xxh3_128_hexdigest(data)} {len(data)} {FILE_NAME}\n"


def _digest(path: pathlib.Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
