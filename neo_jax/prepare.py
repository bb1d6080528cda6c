"""The command `python -m neo_jax.prepare`: tokenise once, check, and look.

Enters: a source and how to read it. Leaves: a directory of tokens that `data.source` may
name, and an account of every record on standard output. `--show` and `--histogram` look at
a source or a prepared directory instead of writing one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from typing import Any

from neo_jax.config import ConfigError, DataConfig

_EXAMPLES = """examples:
  python -m neo_jax.prepare --source sotu --output /tmp/sotu
  python -m neo_jax.prepare --source 'texts/**/*.jsonl.zst' --output tokens --on_error skip
  python -m neo_jax.prepare --source pile:/data/pile --output tokens --holdout_every 0
  python -m neo_jax.prepare --source /tmp/sotu --show 3 --isolate_documents
  python -m neo_jax.prepare --source chats.jsonl --record_format instruction --show 2
  python -m neo_jax.prepare --verify /tmp/sotu
  python -m neo_jax.prepare --build_tfds tiny_shakespeare --manual_dir downloads
"""

# Keys of DataConfig that are options here, with what they mean.
_OPTIONS = {
    "source": "a name, a file, a directory or a glob; see neo_jax/data/sources.py",
    "tokenizer": "'gpt2', 'bpe:4096', a path or a hub id",
    "holdout_every": "hold out every n-th document; 0: none",
    "holdout_offset": "index of the first document held out",
    "record_format": "'text' or 'instruction'",
    "text_field": "the field of a record that holds its text or its token ids",
    "txt_documents": "what ends a document in .txt: 'file' or 'blank_lines'",
    "tfds_dir": "where TFDS keeps prepared data sets",
    "on_error": "'raise' or 'skip', on an unreadable record",
    "max_document_bytes": "leave out longer documents; 0: no limit",
    "seq_len": "tokens of a sequence, for --show",
    "packing": "'concat', 'best_fit' or 'none', for --show",
    "isolate_documents": "let attention start anew at each document, for --show",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (ConfigError, OSError) as error:
        print(f"prepare: {_as_options(str(error))}", file=sys.stderr)
    except KeyboardInterrupt:
        print("prepare: interrupted; the same command goes on from here.", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.prepare",
        description="Tokenise a source once, check it, or look at it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", help="directory to write; new, or of an unfinished run")
    parser.add_argument("--verify", metavar="DIR", help="compare every shard's checksum")
    parser.add_argument("--show", type=int, metavar="N", help="print N sequences")
    parser.add_argument("--histogram", metavar="PNG", help="draw lengths and sources")
    parser.add_argument("--split", choices=("train", "eval"), default="train")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--build_tfds", metavar="NAME", help="let TFDS build a data set")
    parser.add_argument("--manual_dir", help="files that --build_tfds need not download")
    parser.add_argument(
        "--num_processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenise; left out: one a core (%(default)s)",
    )
    parser.add_argument(
        "--shard_mib",
        type=int,
        default=256,
        help="text of a shard, in MiB; left out: %(default)s",
    )
    for field in dataclasses.fields(DataConfig):
        if field.name in _OPTIONS:
            _add_option(parser, field.name, field.default)
    return parser


def _add_option(parser: argparse.ArgumentParser, name: str, default: Any) -> None:
    text = f"{_OPTIONS[name]}; left out: {default}"
    if isinstance(default, bool):
        parser.add_argument(f"--{name}", action="store_true", help=_OPTIONS[name])
    else:
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)


def _as_options(message: str) -> str:
    """A message with the config's keys written as options of this command."""
    return re.sub(rf"(?<![\w/.])data\.({'|'.join(_OPTIONS)})\b", r"--\1", message)


def _run(arguments: argparse.Namespace) -> int:
    from neo_jax import config as configs
    from neo_jax.data import accounting, sources
    from neo_jax.data import prepare as preparing

    if arguments.build_tfds:
        tfds_dir, manual_dir = arguments.tfds_dir, arguments.manual_dir
        print(sources.build_tfds(arguments.build_tfds, tfds_dir, manual_dir))
        return 0
    if arguments.verify:
        print(accounting.format_report(preparing.verify(arguments.verify)))
        return 0
    for name in ("num_processes", "shard_mib"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}={getattr(arguments, name)} must be positive.")
    keys = {name: getattr(arguments, name) for name in _OPTIONS}
    sections = {"data": {**keys, "batch_size": 1}, "model": {"max_seq_len": keys["seq_len"]}}
    config = configs.build(sections).data
    if arguments.show or arguments.histogram:
        return _look(arguments, config)
    if not arguments.output:
        raise ConfigError("say where to with --output DIR, or look with --show N.")
    manifest = preparing.prepare(
        config,
        arguments.output,
        num_processes=arguments.num_processes,
        shard_bytes=arguments.shard_mib << 20,
    )
    print(accounting.format_report(manifest))
    return 0


def _look(arguments: argparse.Namespace, config: DataConfig) -> int:
    from neo_jax.data import pipeline, show, sources, store

    folder = sources.prepared_directory(config.source)
    if folder is not None:  # its own settings say which tokenizer and which hold-out
        settings = store.read_manifest(folder)["settings"]
        keys = ("tokenizer", "holdout_every", "holdout_offset")
        config = dataclasses.replace(config, **{key: settings[key] for key in keys})
    tokenizer = pipeline.load_tokenizer(config)
    batches = pipeline.build(config, tokenizer, seed=0, split=arguments.split)
    colour = arguments.colour == "always" or (
        arguments.colour == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    for text in show.format_batches(batches, arguments.show or 0, tokenizer, colour):
        print(text)
    if arguments.histogram:
        lengths = batches.document_lengths()
        totals = {name: int(values.sum()) for name, values in lengths.items()}
        if folder is not None:
            groups = store.read_manifest(folder)["report"]["groups"]
            totals = {name: counts["tokens"] for name, counts in groups.items()}
        show.write_histograms(arguments.histogram, lengths, totals, config.seq_len)
        print(arguments.histogram)
    batches.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
