"""The command `python -m neo_jax.generate`: a model continues what it is given.

Enters: a checkpoint of any kind, and a prompt, a file of prompts, or a person who types them.
Leaves: texts on the screen as they are written, and as JSON where asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from neo_jax import compilation, host_memory, pretrained, sharding
from neo_jax.config import ConfigError, MeshConfig
from neo_jax.generate import Options, Written, from_keywords
from neo_jax.language_model import LanguageModel

_EXAMPLES = """examples:
  python -m neo_jax.generate --checkpoint runs/cpu_smoke --prompt "Fellow citizens"
  python -m neo_jax.generate --checkpoint EleutherAI/gpt-neo-125m --prompt "Once" \\
      --max_new_tokens 100 --temperature 0.8 --top_k 40 --seed 1 --json out.json
  python -m neo_jax.generate --checkpoint runs/mine --prompts_file prompts.txt --num_beams 4
  python -m neo_jax.generate --checkpoint runs/large --assistant_model runs/small \
      --num_assistant_tokens 5 --prompt "Once"
  python -m neo_jax.generate --checkpoint runs/mine          (type prompts; Ctrl-D ends)

A file of prompts holds one prompt a line, or JSON strings or lists of token ids (.jsonl).
Options that are left out have the defaults of neo_jax.generate.Options; without
--temperature or a filter such as --top_k the likeliest token is taken each time.
"""

# Options of `Options` that the command line has, and how their text is read.
_NUMBERS: dict[str, type] = {
    "max_new_tokens": int,
    "min_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "typical_p": float,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "no_repeat_ngram_size": int,
    "num_return_sequences": int,
    "best_of": int,
    "num_beams": int,
    "length_penalty": float,
    "logprobs": int,
    "seed": int,
    "prompt_lookup_num_tokens": int,
    "num_assistant_tokens": int,
    "batch_size": int,
}
_TOKENS = "eos_token_id"  # may be given several times
_LISTS = {"stop_strings": "text that ends a continuation", "bad_words": "text never written"}
_CHOICES = {
    "overflow": ("refuse", "truncate_left", "interpolate"),
    "cache_dtype": ("auto", "float32", "bfloat16", "int8"),
    "weight_dtype": ("auto", "int8"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _arguments(argv)
    host_memory.keep_freed_memory()
    compilation.use_cache()
    try:
        options = from_keywords(_options(arguments))
        prompts = _prompts(arguments)
        if arguments.json is not None and os.path.exists(arguments.json):
            raise ConfigError(f"--json {arguments.json} exists; give another file.")
        load = functools.partial(
            pretrained.load,
            dtype=arguments.dtype,
            mesh=_mesh(arguments.mesh),
            weight_dtype=options.weight_dtype,
        )
        model = load(arguments.checkpoint)
        helper = arguments.assistant_model and load(arguments.assistant_model)
        write = functools.partial(model.generate, assistant_model=helper, **_keywords(options))
        if prompts is None:
            _talk(model, write)
        else:
            _answer(model, write, prompts, options, arguments.json)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    return 0


class _Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"generate: {message}\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name, parser._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them."
        parser.error(f"there is no option {name}; {hint}")
    return arguments


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m neo_jax.generate",
        description="Continue prompts with a model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint", required=True, help="a workdir, a directory or a hub id"
    )
    parser.add_argument("--prompt", action="append", help="text; may be given several times")
    parser.add_argument(
        "--prompts_file", type=pathlib.Path, help="one prompt a line, or .jsonl"
    )
    parser.add_argument("--json", metavar="OUT", help="file for the results; - for the screen")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16")
    parser.add_argument(
        "--mesh", help="devices, such as data=2,tensor=4; left out: one device"
    )
    parser.add_argument(
        "--assistant_model", help="a smaller model of the same tokens, which guesses"
    )
    parser.add_argument("--early_stopping", action="store_true", help="of beams")
    parser.add_argument("--echo", action="store_true", help="show the prompt before the text")
    for name, kind in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper())
    parser.add_argument(
        f"--{_TOKENS}", action="append", type=int, metavar="INT", help="token that ends a text"
    )
    for name, meaning in _LISTS.items():
        parser.add_argument(f"--{name}", action="append", metavar="TEXT", help=meaning)
    for name, choices in _CHOICES.items():
        parser.add_argument(f"--{name}", choices=choices)
    parser.add_argument(
        "--logit_bias",
        action="append",
        metavar="ID=NUMBER",
        help="what a token's score is raised by, as in 262=-5",
    )
    return parser


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = (*_NUMBERS, _TOKENS, *_LISTS, *_CHOICES)
    given = {name: getattr(arguments, name) for name in names}
    switches = {"echo": arguments.echo, "early_stopping": arguments.early_stopping}
    if arguments.logit_bias is not None:
        given["logit_bias"] = dict(map(_bias, arguments.logit_bias))
    return switches | {k: v for k, v in given.items() if v is not None}


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise ConfigError(f"--logit_bias {text!r} is not ID=NUMBER, as in 262=-5.") from None


def _prompts(arguments: argparse.Namespace) -> list[str | list[int]] | None:
    """The prompts of the command line and of the file; None where somebody is to type them."""
    prompts: list[Any] = list(arguments.prompt or ())
    path = arguments.prompts_file
    if path is not None:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
        try:
            prompts += [json.loads(x) for x in lines] if path.suffix == ".jsonl" else lines
        except json.JSONDecodeError as error:
            raise ConfigError(f"--prompts_file {path} is no JSON lines: {error}.") from None
        if not prompts:
            raise ConfigError(f"--prompts_file {path} holds no prompt.")
    return prompts if prompts or arguments.prompt else None


def _mesh(text: str | None) -> jax.sharding.Mesh | None:
    if text is None:
        return None
    sizes = {"fsdp": 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sharding.MESH_AXES or not size.lstrip("-").isdigit():
            raise ConfigError(
                f"--mesh {text!r}: {part!r} is not AXIS=SIZE; the axes are "
                f"{', '.join(sharding.MESH_AXES)}."
            )
        sizes[axis] = int(size)
    return sharding.make_mesh(MeshConfig(**sizes))


def _answer(
    model: LanguageModel,
    write: Callable[..., list[Written]],
    prompts: list[Any],
    options: Options,
    output: str | None,
) -> None:
    """Continues all prompts; text streams to the screen where there is only one."""
    shows = output != "-" and model.tokenizer is not None
    streams = shows and len(prompts) * options.rows_per_prompt == 1 and not options.echo
    ids = model.token_ids(prompts, None)
    written = write(ids, stream=_show if streams else None)
    if streams:
        print()
    each = options.num_return_sequences
    records = [_record(prompts[i // each], one) for i, one in enumerate(written)]
    if shows and not streams:
        for record in records:
            print(f"--- {record['prompt']!r}\n{record['text']}")
    elif model.tokenizer is None and output != "-":
        for record in records:
            print(record["token_ids"])
    if output == "-":
        print(json.dumps(records, ensure_ascii=False, indent=2))
    elif output is not None:
        _write_json(pathlib.Path(output), records)


def _keywords(options: Options) -> dict[str, Any]:
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}


def _record(prompt: Any, written: Written) -> dict[str, Any]:
    """What the JSON holds of one text; without what was not asked for."""
    fields = {"prompt": prompt, **dataclasses.asdict(written)}
    return {key: value for key, value in fields.items() if value is not None}


def _write_json(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(
        json.dumps(records, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    aside.replace(path)


def _show(_: int, piece: str) -> None:
    print(piece, end="", flush=True)


def _talk(model: LanguageModel, write: Callable[..., list[Written]]) -> None:
    """Continues what somebody types, until the input ends."""
    if model.tokenizer is None:
        raise ConfigError(
            "the model came without a tokenizer; give token ids in a .jsonl file."
        )
    is_person = sys.stdin.isatty()
    if is_person:
        print("Type the beginning of a text, and Return; Ctrl-D ends.")
    while True:
        if is_person:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        try:
            write([line.rstrip("\n")], stream=_show)
        except ConfigError as error:
            print(error, end="")
        print()


if __name__ == "__main__":
    sys.exit(main())
