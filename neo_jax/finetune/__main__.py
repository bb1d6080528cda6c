"""A suite of tasks: `python -m neo_jax.finetune --config glue --workdir DIR --seeds 5`.

Enters: the command line. Leaves: a workdir for each task and seed, and the table of all:
results.json, results.md, results.png. The same command again resumes.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from neo_jax import compilation, distributed, exits, host_memory
from neo_jax import config as config_lib
from neo_jax.finetune import suite

_EXAMPLES = """\
examples:
  every GLUE task, five seeds each, from the benchmark's own files:
    python -m neo_jax.finetune --config glue --workdir runs/glue --seeds 5 \\
        --config.train.init_from=EleutherAI/gpt-neo-125m --config.classify.folder=data/glue
  two of them, with the language model's own head and a prompt:
    python -m neo_jax.finetune --config glue --workdir runs/two --tasks cola,sst2 \\
        --config.train.init_from=runs/cpu_hour --config.classify.form=prompt
  nothing learned: answers after four examples each, drawn three times:
    python -m neo_jax.finetune --config superglue --workdir runs/asked --seeds 3 \\
        --config.train.init_from=EleutherAI/gpt-neo-1.3B --config.classify.form=ask \\
        --config.classify.shots=4
  go on after an interruption: the same command again
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; whatever ends it too early is told in one line.

    Raises:
      SystemExit: as neo_jax/exits.py says.
    """
    flags, overrides = _parse(sys.argv[1:] if argv is None else argv)
    with exits.told_in_one_line():
        config = config_lib.load_experiment(flags.config, overrides)
        host_memory.keep_freed_memory()  # before JAX starts its threads
        distributed.start()
        compilation.use_cache()
        names = [name for name in flags.tasks.split(",") if name]
        suite.run(config, names, flags.seeds, flags.workdir)
        print((flags.workdir / "results.md").read_text(), end="")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and overrides as `section.key=value`."""
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.finetune",
        description="Learns several tasks of GLUE or SuperGLUE with several seeds.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="an experiment whose task is classify")
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="folder of all runs"
    )
    parser.add_argument(
        "--tasks", default="", metavar="A,B", help="default: all of classify.suite"
    )
    parser.add_argument(
        "--seeds", default=1, type=_positive, help="runs of each task; default: 1"
    )
    parser.add_argument(
        "--config.SECTION.KEY",
        metavar="VALUE",
        dest="_",
        help="changes one setting of all runs; repeatable",
    )
    known, rest = parser.parse_known_args(argv)
    return known, exits.overrides(parser, rest)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be positive")
    return value


if __name__ == "__main__":
    main()
