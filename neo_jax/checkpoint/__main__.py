"""The command `python -m neo_jax.checkpoint VERB DIR`: what a run's checkpoints are.

Enters: a workdir. Leaves: a list, a description, a verdict on every file, or fewer
checkpoints. No array is read, and nothing but `prune` changes anything.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from neo_jax import config as config_lib
from neo_jax.checkpoint import restoring
from neo_jax.checkpoint.folder import DELETED, META, PARTIAL, REFUSED, Folder
from neo_jax.config import CheckpointConfig, ConfigError

_EXAMPLES = """\
examples:
  which checkpoints are there:
    python -m neo_jax.checkpoint ls runs/mine
  what is in the newest, or in another: where the data stood, versions, arrays:
    python -m neo_jax.checkpoint show runs/mine --step 300
  is every file of every checkpoint as it was written (exit code 1 if not):
    python -m neo_jax.checkpoint verify runs/mine
  keep the newest 2, every 10,000th and the best; first look what would go:
    python -m neo_jax.checkpoint prune runs/mine --keep 2 --keep_every 10000 --dry_run
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; a user's mistake ends it with one line and exit code 2."""
    arguments = _parse(argv)
    folder = Folder.of(arguments.dir)
    try:
        if not (folder.steps() or folder.leftovers(PARTIAL, REFUSED, DELETED)):
            raise ConfigError(f"{arguments.dir} holds no checkpoint; name a run's workdir.")
        done = arguments.run(folder, arguments)
    except ConfigError as error:
        print(f"neo_jax.checkpoint: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # piped into `head`
        raise SystemExit(0) from None
    raise SystemExit(done)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.checkpoint",
        description="Lists, describes, verifies or thins out a run's checkpoints.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, what: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=what, description=what)
        added.add_argument("dir", type=pathlib.Path, metavar="DIR", help="a run's workdir")
        added.set_defaults(run=run)
        return added

    verb("ls", _ls, "list the checkpoints, oldest first")
    show = verb("show", _show, "describe one checkpoint")
    show.add_argument("--step", type=int, help="left out: the newest")
    verify = verb("verify", _verify, "compare every file with its digest")
    verify.add_argument("--step", type=int, help="left out: all")
    prune = verb("prune", _prune, "remove checkpoints, and what was broken off or refused")
    default = CheckpointConfig()
    for key, what in (
        ("keep", "newest checkpoints to keep"),
        ("keep_every", "keep those at multiples of this step, too; 0: none"),
        ("keep_best", "keep as many of the lowest held-out loss, too"),
    ):
        value = getattr(default, key)
        prune.add_argument(
            f"--{key}", type=int, default=value, metavar="N", help=f"{what} ({value})"
        )
    prune.add_argument("--dry_run", action="store_true", help="only say what would go")
    return parser.parse_args(argv)


def _ls(folder: Folder, _: argparse.Namespace) -> int:
    steps = folder.steps()
    scores = {step: folder.meta(step).get("score") for step in steps}
    scored = {step: score for step, score in scores.items() if score is not None}
    best = min(scored, key=scored.__getitem__, default=None)
    rows = [("step", "saved at", "size", "held-out loss", "")]
    for step in steps:
        meta, score = folder.meta(step), scores[step]
        marks = [name for name, at in (("newest", steps[-1]), ("best", best)) if at == step]
        rows.append(
            (
                str(step),
                str(meta.get("saved_at", "?"))[:19],
                _size(folder.at(step)),
                "" if score is None else f"{score:.4f}",
                ", ".join(marks if meta else [f"no readable {META}"]),
            )
        )
    for path in folder.leftovers(PARTIAL, REFUSED, DELETED):
        rows.append((path.name, "", _size(path), "", "`prune` removes it"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (text.rjust(width) for text, width in zip(row, widths[:-1], strict=False))
        print("  ".join([*cells, row[-1]]).rstrip())
    return 0


def _show(folder: Folder, arguments: argparse.Namespace) -> int:
    step = _one(folder, arguments.step)
    problem = folder.problem(step)
    if problem:
        raise ConfigError(f"checkpoint {folder.at(step)} is refused: {problem}.")
    meta = folder.meta(step)
    config = meta.pop("config")
    print(json.dumps(meta, indent=2))
    print("\nconfig, where it is not the default:")
    for line in _not_default(config):
        print(f"  {line}")
    print("\narrays:")
    for name, (shape, dtype) in restoring.names_saved(folder, step).items():
        print(f"  {name}  {dtype} {list(shape)}")
    return 0


def _verify(folder: Folder, arguments: argparse.Namespace) -> int:
    steps = folder.steps() if arguments.step is None else [_one(folder, arguments.step)]
    problems = {step: folder.problem(step) for step in steps}
    for step, problem in problems.items():
        print(f"{step}: {'good' if problem is None else f'refused: {problem}'}")
    return int(any(problems.values()))


def _prune(folder: Folder, arguments: argparse.Namespace) -> int:
    config = CheckpointConfig(
        keep=arguments.keep, keep_every=arguments.keep_every, keep_best=arguments.keep_best
    )
    with folder.locked():  # what a run is about to finish looks broken off
        going = folder.superfluous(config)
        staying = [step for step in folder.steps() if step not in going]
        if going and all(map(folder.problem, staying)):
            raise ConfigError(
                f"none of the checkpoints that would stay ({', '.join(map(str, staying))}) is "
                f"good; nothing is removed. `verify` says which ones are."
            )
        broken = folder.leftovers(PARTIAL, REFUSED, DELETED)
        for name in [*map(str, going), *(path.name for path in broken)]:
            print(f"{'would remove' if arguments.dry_run else 'removing'} {name}")
        if not arguments.dry_run:
            folder.delete(going)
            folder.clean(PARTIAL, REFUSED, DELETED)
    return 0


def _one(folder: Folder, step: int | None) -> int:
    steps = folder.steps()
    if not steps or (step is not None and step not in steps):
        listed = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"--step {step}: there are {listed}.")
    return steps[-1] if step is None else step


def _not_default(config: dict[str, Any]) -> list[str]:
    default = config_lib.default_config().to_dict()
    lines = []
    for section, values in config.items():
        if isinstance(values, dict):
            usual = json.loads(json.dumps(default.get(section, {})))
            lines += [f"{section}.{k} = {v!r}" for k, v in values.items() if v != usual.get(k)]
    return lines


def _size(path: pathlib.Path) -> str:
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return f"{total / 2**20:,.1f} MiB"


if __name__ == "__main__":
    main()
