"""Trains an experiment: `python -m neo_jax.main --config FILE_OR_NAME --workdir DIR`.

Enters: the command line. Leaves: a workdir with config.json, metrics.jsonl, checkpoints/,
loss.png, tensorboard/, tokenizer.json and summary.json. The same command again resumes.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

from neo_jax import compilation, distributed, exits, host_memory, pretrain
from neo_jax import config as config_lib
from neo_jax.config import Config
from neo_jax.finetune import classify, preference, text

_EXAMPLES = """\
examples:
  learn English on a CPU, in minutes:
    python -m neo_jax.main --config cpu_smoke --workdir runs/cpu_smoke
  a released recipe with other text:
    python -m neo_jax.main --config experiments/neo_125m.py --workdir runs/mine \\
        --config.data.source=/data/text --config.optimizer.warmup_steps=500
  go on after an interruption: the same command again
  on every host of a TPU pod:
    python -m neo_jax.main --config neo_1p3b --workdir /shared/run --coordinator auto
  two processes on one machine (4 simulated devices each: XLA_FLAGS), in two shells:
    python -m neo_jax.main --config cpu_smoke --workdir runs/two \\
        --coordinator localhost:9876 --num_processes 2 --process_id 0   # and 1

experiments by name: {names}
settings and their defaults: neo_jax/config/
"""

TASKS: Mapping[str, Callable[[Config, pathlib.Path], None]] = {
    "pretrain": pretrain.run,
    "finetune": text.run,
    "classify": classify.run,
    "preference": preference.run,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; whatever ends it too early is told in one line.

    Raises:
      SystemExit: 2 after a user's mistake; 1 where the run cannot go on (a full disk, a loss
        that diverged); 75 where it was told to stop, and saved; 130 where it was
        interrupted. After 75 and 130 the same command resumes. Where another process of the
        run is gone, this one ends with 69, and the same commands on all of them resume.
    """
    flags, overrides = _parse(sys.argv[1:] if argv is None else argv)
    with exits.told_in_one_line():
        config = config_lib.load_experiment(flags.config, overrides)
        host_memory.keep_freed_memory()  # before JAX starts its threads
        distributed.start(flags.coordinator, flags.num_processes, flags.process_id)
        compilation.use_cache()
        TASKS[config.task](config, flags.workdir)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and overrides as `section.key=value`."""
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.main",
        description="Trains an experiment, or goes on with it.",
        epilog=_EXAMPLES.format(names=", ".join(config_lib.experiment_names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, help="an experiment: a Python file or a name"
    )
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, help="folder of the run's results"
    )
    environment = os.environ.get
    several = parser.add_argument_group("several processes, one command in each")
    several.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        default=environment("JAX_COORDINATOR_ADDRESS"),
        help="of process 0, or auto on a TPU pod; default: $JAX_COORDINATOR_ADDRESS",
    )
    several.add_argument(
        "--num_processes",
        type=int,
        default=environment("JAX_NUM_PROCESSES"),
        help="default: $JAX_NUM_PROCESSES",
    )
    several.add_argument(
        "--process_id",
        type=int,
        default=environment("JAX_PROCESS_ID"),
        help="of this one, from 0; default: $JAX_PROCESS_ID",
    )
    parser.add_argument(
        "--config.SECTION.KEY",
        metavar="VALUE",
        dest="_",
        help="changes one setting, as in --config.train.num_steps=100; repeatable",
    )
    known, rest = parser.parse_known_args(argv)
    return known, exits.overrides(parser, rest)


if __name__ == "__main__":
    main()
