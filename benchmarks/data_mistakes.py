"""Bad input, each by a real command: `python benchmarks/data_mistakes.py`.

Makes one file or folder of each kind that cannot be prepared, runs `neo_jax.prepare` on it and
prints the line that it ended with. Ends with an error where a command succeeded, said more
than one line, or showed a traceback. Where a record is at fault, `--on_error skip` is run too,
and what its report counted is printed. Run by root, the command loses the right to read every
file where it must be denied one (by `setpriv`, of util-linux).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import zstandard
from array_record.python import array_record_module

GOOD = b'{"text": "a good record"}\n'


def main() -> None:
    """Prints two lines a mistake."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        records, others = work / "records", work / "others"
        for label, source, options in bad_records(records):
            output = work / label.replace(" ", "-")
            print(f"{label}:\n    {refusal(source, output, *options)}")
            print(f"    skipped: {skipped(source, work / f'{output.name}-skip', *options)}")
        for label, source, options in bad_sources(others):
            print(f"{label}:\n    {refusal(source, work / 'out', *options)}")
        print(f"permission denied:\n    {denied(work)}")
        print(f"tokens of another tokenizer:\n    {other_tokenizer(work)}")
        print(f"output holds another data set:\n    {not_written_over(work)}")


def bad_records(folder: pathlib.Path) -> list[tuple[str, pathlib.Path, list[str]]]:
    """Files with bad records between good ones: what they are, where, and more options."""
    folder.mkdir()
    packed = zstandard.ZstdCompressor().compress(GOOD * 50000)
    deep = GOOD * 100000 + b"nonsense\n" + GOOD * 100000
    files = {
        "truncated.jsonl.zst": packed[: len(packed) // 2],
        "not_zstd.jsonl.zst": b"no such thing" * 100,
        "json.jsonl": GOOD * 3 + b'{"text": \n' + GOOD,
        "deep.jsonl": deep,
        "field.jsonl": GOOD + b'{"content": "x", "id": 3}\n',
        "type.jsonl": GOOD + b'{"text": 3.5}\n',
        "floats.jsonl": GOOD + b'{"text": [0.5, 1.5]}\n',
        "ids.jsonl": b'{"text": [15496, 995]}\n{"text": [5, 50257]}\n',
        "negative.jsonl": b'{"text": [15496, 995]}\n{"text": [-1]}\n',
        "bytes.jsonl": GOOD + b'{"text": "\xff"}\n',
        "surrogate.jsonl": GOOD + b'"\\ud800"\n',
        "chat.jsonl": b'{"prompt": "x", "completion": "y"}\n{"prompt": "x"}\n',
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    writer = array_record_module.ArrayRecordWriter(str(folder / "ids.array_record"), "")
    for row in ({"text": [1, 2]}, {"text": [70000]}):
        writer.write(json.dumps(row).encode())
    writer.close()
    none = ["--holdout_every", "0"]
    labels = {
        "truncated zstd": "truncated.jsonl.zst",
        "no zstd at all": "not_zstd.jsonl.zst",
        "invalid JSON": "json.jsonl",
        "invalid JSON deep in a file": "deep.jsonl",
        "missing field": "field.jsonl",
        "wrong type": "type.jsonl",
        "ids of a wrong dtype": "floats.jsonl",
        "id beyond the vocabulary": "ids.jsonl",
        "id beyond the vocabulary, ArrayRecord": "ids.array_record",
        "negative id": "negative.jsonl",
        "no UTF-8": "bytes.jsonl",
        "lone surrogate": "surrogate.jsonl",
        "half an instruction": "chat.jsonl",
    }
    chat = ["--record_format", "instruction"]
    return [
        (label, folder / name, none + (chat if name == "chat.jsonl" else []))
        for label, name in labels.items()
    ]


def bad_sources(folder: pathlib.Path) -> list[tuple[str, str | pathlib.Path, list[str]]]:
    """What cannot be opened at all: what it is, where, and more options."""
    folder.mkdir()
    (folder / "empty").mkdir()
    (folder / "others").mkdir()
    (folder / "others" / "README").write_text("no data")
    (folder / "empty.jsonl").write_text("")
    (folder / "good.jsonl").write_bytes(GOOD)
    tfds = ["--tfds_dir", str(folder)]
    return [
        ("empty directory", folder / "empty", []),
        ("directory without data", folder / "others", []),
        ("no such path", folder / "nothing.jsonl", []),
        ("empty file", folder / "empty.jsonl", []),
        ("unknown TFDS set", "tfds:glue/nothing", tfds),
        ("The Pile is not there", f"pile:{folder}/pile", []),
        ("unknown option", f"pile:{folder}?splt=val", []),
        ("unknown tokenizer", folder / "good.jsonl", ["--tokenizer", "/no/such/file"]),
        ("no process", folder / "good.jsonl", ["--num_processes", "0"]),
        ("unknown file system", "nosuch://bucket/x", []),
    ]


def command(source: str | pathlib.Path, output: pathlib.Path, *options: str) -> list[str]:
    """The command line of one preparation."""
    line = [sys.executable, "-m", "neo_jax.prepare", "--source", str(source)]
    return [*line, "--output", str(output), *options]


def one_line(line: list[str]) -> str:
    """Runs what must fail, and returns what it said."""
    found = subprocess.run(line, capture_output=True, text=True)
    # A progress bar ends its lines with a carriage return and is not what is meant.
    said = [part for part in found.stderr.splitlines() if part.startswith("prepare: ")]
    assert found.returncode == 1 and len(said) == 1, (line, found)
    assert "Traceback" not in found.stderr and not found.stdout, (line, found)
    return said[0]


def refusal(source: str | pathlib.Path, output: pathlib.Path, *options: str) -> str:
    """The line that a source is refused with."""
    return one_line(command(source, output, *options))


def skipped(source: pathlib.Path, output: pathlib.Path, *options: str) -> str:
    """What `--on_error skip` counted."""
    line = command(source, output, "--on_error", "skip", *options)
    found = subprocess.run(line, capture_output=True, text=True)
    if found.returncode:  # nothing else was there
        return found.stderr.splitlines()[-1]
    left_out = json.loads((output / "manifest.json").read_text())["report"]["left_out"]
    assert sum(left_out.values()) == 1, left_out
    (told,) = (part for part in found.stdout.splitlines() if part.startswith("records "))
    return told


def denied(work: pathlib.Path) -> str:
    """A file that may not be read, among others, so that several processes meet it."""
    folder = work / "denied"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(GOOD * 100000)
    (folder / "a.jsonl").chmod(0)
    line = command(folder, work / "denied-out")
    if os.geteuid() == 0:
        line = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--", *line]
    return one_line(line)


def other_tokenizer(work: pathlib.Path) -> str:
    """Tokens of a trained tokenizer, asked for with GPT-2's."""
    (work / "words.jsonl").write_bytes(GOOD * 100)
    made = command(work / "words.jsonl", work / "bpe", "--tokenizer", "bpe:300")
    subprocess.run(made, check=True, capture_output=True)
    (work / "letter.py").write_text(
        "from neo_jax.experiments import base\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        f"    config.data.source = {str(work / 'bpe')!r}\n"
        "    return config\n"
    )
    line = [sys.executable, "-m", "neo_jax.main", "--config", str(work / "letter.py")]
    found = subprocess.run(
        [*line, "--workdir", str(work / "run")], capture_output=True, text=True
    )
    said = found.stderr.strip().splitlines()
    assert found.returncode and "Traceback" not in found.stderr, found
    return said[-1]


def not_written_over(work: pathlib.Path) -> str:
    """The same output, named for another source."""
    return refusal(work / "records" / "json.jsonl", work / "bpe", "--on_error", "skip")


if __name__ == "__main__":
    main()
