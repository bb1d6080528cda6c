"""Trains an experiment: `python -m neo_jax.main --config FILE_OR_NAME --workdir DIR`.

Enters: the command line. Leaves: a workdir with config.json, metrics.jsonl, checkpoints/,
loss.png, tensorboard/, tokenizer.json and summary.json. The same command again resumes.
"""

from __future__ import annotations

import argparse
import errno
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence

import jax

from neo_jax import compilation, distributed, host_memory, pretrain
from neo_jax import config as config_lib
from neo_jax.checkpoint import CheckpointError
from neo_jax.config import Config, ConfigError
from neo_jax.finetune import text
from neo_jax.run import DivergedError
from neo_jax.watch import EXIT_FAILED, EXIT_PREEMPTED, Preempted

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

# What a disk may answer while a run writes to it.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)

TASKS: Mapping[str, Callable[[Config, pathlib.Path], None]] = {
    "pretrain": pretrain.run,
    "finetune": text.run,
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
    workdir = flags.workdir
    try:
        config = config_lib.load_experiment(flags.config, overrides)
        host_memory.keep_freed_memory()  # before JAX starts its threads
        distributed.start(flags.coordinator, flags.num_processes, flags.process_id)
        compilation.use_cache()
        TASKS[config.task](config, workdir)
    except (CheckpointError, DivergedError) as error:
        _leave_if_alone(error)
        print(f"neo_jax: {error}", file=sys.stderr)
        raise SystemExit(EXIT_FAILED) from None
    except ConfigError as error:
        print(f"neo_jax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Preempted as error:
        print(f"neo_jax: {error}; the same command resumes.", file=sys.stderr)
        raise SystemExit(EXIT_PREEMPTED) from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"neo_jax: {error.strerror}{where}; mend that, and the same command resumes.",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_FAILED) from None
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # whichever XLA raises
        _leave_if_alone(error)
        raise
    except KeyboardInterrupt:
        print("neo_jax: interrupted; the same command resumes.", file=sys.stderr)
        raise SystemExit(130) from None


def _leave_if_alone(error: BaseException) -> None:
    """Ends this process if an error means that another one of the run is gone."""
    lost = distributed.lost_process(error)
    if lost is None:
        return
    print(
        f"neo_jax: process {jax.process_index()} of {jax.process_count()} lost another one of "
        f"this run ({lost}); start all of them again with the same command, and they resume "
        f"from the newest checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    # Not sys.exit: on the way out JAX would wait for the one that is gone.
    os._exit(distributed.EXIT_LOST)


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
    overrides = []
    rest = list(rest)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--config."):
            parser.error(f"unknown argument {flag!r}; settings are --config.section.key=value")
        if "=" not in flag and rest and not rest[0].startswith("--"):
            flag += "=" + rest.pop(0)
        overrides.append(flag.removeprefix("--config."))
    return known, overrides


if __name__ == "__main__":
    main()
