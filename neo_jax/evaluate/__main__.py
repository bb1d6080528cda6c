"""The command `python -m neo_jax.evaluate`: scores of a model, and a report of them.

Enters: any checkpoint, names of tasks or sources of text, a folder of data. Leaves: a table on
the screen, and with `--json` a report as JSON, Markdown and PNG. Whatever can be refused is
refused before the checkpoint is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from neo_jax import compilation, distributed, host_memory, pretrained, sharding, state
from neo_jax.config import ConfigError, MeshConfig
from neo_jax.evaluate import card, documents, hosts, in_loop, memorisation, report, tasks
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.documents import Text
from neo_jax.evaluate.scoring import Scorer
from neo_jax.evaluate.tasks import Item, Outcome, Task
from neo_jax.language_model import LanguageModel

_EXAMPLES = """\
examples:
  benchmarks from local files, without a network:
    python -m neo_jax.evaluate --checkpoint runs/mine --tasks lambada_openai,piqa \\
        --data benchmarks --json mine.json
  perplexity of any text, in windows that overlap:
    python -m neo_jax.evaluate --checkpoint EleutherAI/gpt-neo-125m \\
        --text 'pile:data/pile?split=val' --stride 1024
  any task of lm-evaluation-harness (pip install 'neo_jax[eval]'):
    python -m neo_jax.evaluate --checkpoint runs/mine --tasks boolq,gsm8k --limit 100
  what a model knows by heart of its training text, and a card of all that is known:
    python -m neo_jax.evaluate --checkpoint runs/mine --memorisation sotu --json heart.json
    python -m neo_jax.evaluate --checkpoint runs/mine --card README.md --reports heart.json
  several models in one drawing:
    python -m neo_jax.evaluate --reports a.json,b.json --plot both.png

tasks without the harness: {names}
and mc:FILE (rows of query, choices, gold), pairs:FILE (rows of stereotype, anti_stereotype)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; a mistake is told in one line.

    Raises:
      SystemExit: 2 after a user's mistake; 1 where weights or data are not as they should be.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    try:
        if arguments.checkpoint is None or arguments.card is not None:
            _without_model(arguments)
            return
        host_memory.keep_freed_memory()  # before JAX starts its threads
        distributed.start()
        compilation.use_cache()
        _evaluate(arguments, argv)
    except ConfigError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.evaluate",
        description="Scores of a model: perplexity, benchmarks, bias, memory.",
        epilog=_EXAMPLES.format(names=", ".join(tasks.TASKS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", help="a workdir, a Hugging Face directory or a hub id")
    add("--tasks", default="", metavar="A,B", help="names of tasks, see below")
    add("--text", action="append", default=[], metavar="SOURCE", help="score text; repeatable")
    add("--memorisation", action="append", default=[], metavar="SOURCE", help="text to try")
    add("--text_field", default="text", help="of a record of text (%(default)s)")
    add("--stride", type=int, help="tokens scored by a window of text; left out: all it reads")
    add("--data", type=pathlib.Path, metavar="DIR", help="tasks' files; left out: the hub")
    add(
        "--json", type=pathlib.Path, metavar="OUT", help="write the report, OUT.md and OUT.png"
    )
    add("--limit", type=int, help="only the first so many samples of each task")
    add("--harness", action="store_true", help="let lm-evaluation-harness ask every task")
    add("--num_fewshot", type=int, help="examples before each question (by the harness)")
    add("--cache", metavar="PATH", help="keep the harness's answers here, for another run")
    add("--batch_size", type=int, help="rows; left out: as many as suit their length")
    add("--dtype", choices=("float32", "bfloat16"), help="of the parameters")
    add("--mesh", default="", metavar="AXIS=N,…", help="of devices; left out: fsdp over all")
    add("--reports", default="", metavar="A,B", help="reports for --card or --plot")
    add("--card", type=pathlib.Path, metavar="OUT", help="write a model card of a workdir")
    add("--plot", type=pathlib.Path, metavar="OUT", help="draw --reports side by side")
    return parser


# ----------------------------------------------------------------------- without a model


def _without_model(arguments: argparse.Namespace) -> None:
    """Cards and drawings, which need files alone."""
    reports = [report.read(pathlib.Path(name)) for name in _names(arguments.reports)]
    if arguments.card is not None:
        if arguments.checkpoint is None:
            raise ConfigError("--card needs --checkpoint, the workdir of a run.")
        if arguments.card.exists():
            raise ConfigError(f"--card {arguments.card} exists already; name another file.")
        text = card.card(pathlib.Path(arguments.checkpoint), reports)
        arguments.card.parent.mkdir(parents=True, exist_ok=True)
        arguments.card.write_text(text)
        print(f"wrote {arguments.card}")
    elif arguments.plot is not None and reports:
        _draw(reports, arguments.plot)
    else:
        raise ConfigError("--checkpoint is missing; or give --reports and --plot.")


def _draw(reports: list[dict[str, Any]], path: pathlib.Path) -> None:
    round_path = path.with_name(f"{path.stem}_radar{path.suffix}")
    drawn = [path] if report.bars(reports, path) else []
    drawn += [round_path] if report.radar(reports, round_path) else []
    if not drawn:
        raise ConfigError("--reports hold no figures to draw.")
    print(f"wrote {' and '.join(map(str, drawn))}")


# ------------------------------------------------------------------------------ evaluating


def _evaluate(arguments: argparse.Namespace, argv: list[str]) -> None:
    names = _names(arguments.tasks)
    if not (names or arguments.text or arguments.memorisation):
        raise ConfigError("there is nothing to do: give --tasks, --text or --memorisation.")
    for key in ("limit", "batch_size", "stride"):
        value = getattr(arguments, key)
        if value is not None and value < 1:
            raise ConfigError(f"--{key}={value} must be positive.")
    by_harness = arguments.harness or arguments.num_fewshot is not None
    own = [] if by_harness else [name for name in names if name in tasks.TASKS or ":" in name]
    others = [name for name in names if name not in own]
    mesh = _mesh(arguments.mesh)
    work = None
    if jax.process_index() == 0:
        work = _Work(
            arguments,
            [_load(tasks.find(name), arguments.data, arguments.limit) for name in own],
            _read_texts([*arguments.text, *arguments.memorisation], arguments),
            in_loop.of_harness(others, arguments.data),
        )

    started = time.monotonic()
    model = pretrained.load(arguments.checkpoint, dtype=arguments.dtype, mesh=mesh)
    if model.tokenizer is None:
        raise ConfigError(f"{arguments.checkpoint} has no tokenizer, and is asked in words.")
    scorer = Scorer(model.config, mesh, batch_size=arguments.batch_size, show_progress=True)
    outcomes = hosts.drive(hosts.calls_of(model, scorer), functools.partial(_ask, work, model))
    if outcomes is not None:
        _finish(arguments, argv, model, outcomes, time.monotonic() - started)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is to be asked, found and read."""

    arguments: argparse.Namespace
    loaded: list[tuple[Task, list[Item], str]]
    texts: dict[str, list[Text]]
    others: Any  # the harness's, as `harness.load` gives them; None: none are asked


def _ask(work: _Work | None, model: LanguageModel, calls: hosts.Calls) -> list[Outcome]:
    """Everything, in the order of the command line; on process 0 alone, which has the work."""
    assert work is not None and model.tokenizer is not None
    arguments = work.arguments
    asker = Asker(calls["score"], model.tokenizer, model.config.max_seq_len)
    outcomes = []
    for task, items, data in work.loaded:
        _tell(f"{task.name}: {len(items):,} samples of {data}")
        outcomes.append(tasks.run(task, items, asker, data, arguments.stride))
    for name in arguments.text:
        texts = work.texts[name]
        _tell(f"text {name}: {len(texts):,} documents")
        outcomes.append(_perplexity(name, texts, asker, arguments.stride))
    for name in arguments.memorisation:
        samples = arguments.limit or 1000
        outcomes.append(memorisation.check(work.texts[name], asker, name, samples=samples))
    if work.others is not None:
        outcomes += _by_harness(model, calls, work.others, arguments)
    for outcome in outcomes:
        if outcome.truncated:
            _tell(f"{outcome.task}: {outcome.truncated} contexts were cut at their front")
    return outcomes


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _mesh(text: str) -> jax.sharding.Mesh:
    sizes: dict[str, int] = {}
    for part in _names(text):
        axis, _, size = part.partition("=")
        if axis not in sharding.MESH_AXES or not size.lstrip("-").isdigit():
            raise ConfigError(
                f"--mesh {part!r} is not AXIS=N with an axis of "
                f"{', '.join(sharding.MESH_AXES)}."
            )
        sizes[axis] = int(size)
    if sizes and "fsdp" not in sizes and -1 not in sizes.values():
        sizes["fsdp"] = -1
    return sharding.make_mesh(MeshConfig(**sizes))


def _load(
    task: Task, folder: pathlib.Path | None, limit: int | None
) -> tuple[Task, list[Item], str]:
    items, data = tasks.load(task, folder)
    return task, items[:limit], data


def _read_texts(names: list[str], arguments: argparse.Namespace) -> dict[str, list[Text]]:
    limit = arguments.limit
    return {
        name: documents.read(name, arguments.text_field)[:limit]
        if name in arguments.text
        else documents.read(name, arguments.text_field)
        for name in names
    }


def _perplexity(name: str, texts: list[Text], asker: Asker, stride: int | None) -> Outcome:
    figures = documents.perplexities(texts, asker, stride)
    groups = {group: values for group, values in figures.items() if group != documents.ALL}
    task = "pile" if name.startswith("pile:") else f"text {name}"
    windows = f"windows with a stride of {stride or asker.max_seq_len} tokens"
    total = figures[documents.ALL]
    return Outcome(task, total, len(texts), 0, f"{name}, {windows}", groups=groups)


def _by_harness(
    model: LanguageModel,
    calls: hosts.Calls,
    loaded: Any,
    arguments: argparse.Namespace,
) -> list[Outcome]:
    from neo_jax.evaluate import harness  # lm_eval takes seconds to import

    return harness.run(
        harness.NeoJaxLM(model, calls=calls),
        loaded,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        cache=arguments.cache,
    )


def _finish(
    arguments: argparse.Namespace,
    argv: list[str],
    model: LanguageModel,
    outcomes: list[Outcome],
    seconds: float,
) -> None:
    devices = jax.devices()
    finished = report.build(
        outcomes,
        model=str(arguments.checkpoint),
        parameters=state.num_params(model.config),
        command=shlex.join(["python", "-m", "neo_jax.evaluate", *argv]),
        seconds=seconds,
        versions=_versions({outcome.driver for outcome in outcomes}),
        device=f"{len(devices)} × {devices[0].device_kind}",
    )
    print("\n".join(report.table(finished)))
    if arguments.json is not None:
        written = report.write(finished, arguments.json)
        print(f"wrote {', '.join(map(str, written))}")


def _versions(drivers: set[str]) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("neo_jax", "jax")}
    for driver in sorted(drivers):
        name, _, version = driver.partition(" ")
        if version:
            found[name] = version
    return found


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
