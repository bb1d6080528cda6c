"""The command `python -m neo_jax.plan`: will it fit, and how fast will it be, on which TPU?

Enters: an experiment and the name of a TPU. Leaves: HBM, predicted speed and a choice of
settings, from the real training step, or the real loop that writes text, compiled by the
TPU's own compiler on this machine; no TPU is needed. What the predictions assume:
planning/predict.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this machine only compiles

import tqdm

from neo_jax import config as config_lib
from neo_jax import pretrained
from neo_jax.config import Config, ConfigError
from neo_jax.finetune import tuning
from neo_jax.generate.options import Options
from neo_jax.planning import compiling, decoding, search, show, topologies
from neo_jax.planning.compiling import AnyReport, Report
from neo_jax.planning.decoding import DecodeReport
from neo_jax.planning.topologies import Topology

_EXAMPLES = """\
examples:
  does the 2.7B recipe fit 16 chips of v5e?
    python -m neo_jax.plan --config neo_2p7b --topology v5e-16 --json plan.json
  which mesh, remat and accumulation are best there? (compiles the best three)
    python -m neo_jax.plan --config neo_2p7b --topology v5e:4x4 --search --json plan.json
  two slices, and other settings:
    python -m neo_jax.plan --config neo_1p3b --topology v5e-16 --num_slices 2 \\
        --config.mesh.data=2 --config.model.remat=full
  how fast would it write, 16 texts side by side?
    python -m neo_jax.plan --config neo_2p7b --topology v5e-1 --decode --batch_size 16
  does tuning fit? adapters of the 2.7B model beside bfloat16 kernels on one chip:
    python -m neo_jax.plan --config finetune_text --topology v5e-1 \\
        --config.model=neo_2p7b --config.model.param_dtype=bfloat16 \\
        --config.model.remat=full --config.model.lora_rank=8 \\
        --config.finetune.trainable=lora --config.data.batch_size=4
  where does every tensor lie?
    python -m neo_jax.plan --config neo_125m --topology v5e-8 --show_sharding

topologies, by size (v5e and v6e: chips; the others: cores) or by grid, as in v5e:4x4:
{names}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      Exit status: 0 where something fits, 1 where nothing does, 2 after a user's mistake.
    """
    arguments, overrides = _parse(sys.argv[1:] if argv is None else argv)
    try:
        return run(arguments, overrides)
    except ConfigError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("plan: interrupted; what was compiled is kept.", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """As `main`, of parsed arguments.

    Raises:
      ConfigError: a mistake in the arguments or the config; one line.
    """
    topology = topologies.parse(arguments.topology, arguments.num_slices)
    topologies.libtpu_version()  # told before anything else is begun
    config = config_lib.load_experiment(arguments.config, overrides)
    if config.task != "pretrain" and config.train.init_from is not None:
        config = tuning.with_shape(config, pretrained.locate(config.train.init_from))
    output = None if arguments.json is None else pathlib.Path(arguments.json)
    _refuse_to_overwrite(output)
    print(topology)
    if arguments.show_sharding:
        print(show.sharding_table(config, topology))
        return 0
    cache = compiling.Cache(pathlib.Path(arguments.cache).expanduser())
    if arguments.decode:
        return _decode(config, topology, cache, arguments, output)
    if arguments.search:
        reports = _search(config, topology, cache, arguments.compile)
    else:
        reports = [_compile(config, topology, cache)]
    best = max(reports, key=lambda report: report.predicted_mfu_exact or 0.0)
    print(show.report_text(best, config))
    if best.fits:
        print(f"run it with:\n  {_command(arguments, overrides, best)}")
    else:
        print(f"plan: {_what_would_fit(config, topology, best)}", file=sys.stderr)
    if output is not None:
        tree = dataclasses.asdict(best)
        tree["command"] = _command(arguments, overrides, best) if best.fits else None
        if arguments.search:
            tree["searched"] = [dataclasses.asdict(report) for report in reports]
        _write(output, tree)
    return 0 if best.fits else 1


def _compile(config: Config, topology: Topology, cache: compiling.Cache) -> Report:
    """The training step's report."""
    name = f"{compiling.key(config, topology)}.{compiling.source_hash()}"
    make = functools.partial(compiling.compile_step, config, topology)
    return _known_or(make, Report, name, config, cache)


def _known_or(
    make: Callable[[], AnyReport],
    kind: type[AnyReport],
    name: str,
    config: Config,
    cache: compiling.Cache,
) -> AnyReport:
    """From the cache, or from the compiler, with a word on the wait."""
    known = cache.get(name, kind)
    if known is not None:
        print("  known from an earlier compilation", file=sys.stderr)
        return known
    print(f"  compiling, a minute or more of this machine {_told(config)} …", file=sys.stderr)
    began = time.monotonic()
    report = make()
    cache.put(name, report)
    print(f"  … {time.monotonic() - began:.0f} s", file=sys.stderr)
    return report


def _decode(
    config: Config,
    topology: Topology,
    cache: compiling.Cache,
    arguments: argparse.Namespace,
    output: pathlib.Path | None,
) -> int:
    """Reports on writing text; exit status as `main`."""
    options = Options(
        batch_size=arguments.batch_size,
        cache_dtype=arguments.cache_dtype,
        weight_dtype=arguments.weight_dtype,
    )
    length = arguments.context or config.model.max_seq_len
    decoding.mesh_of(config, topology, options, length)  # mistakes are told at once
    asked = decoding.key(config, topology, options, length)
    name = f"{asked}.{compiling.source_hash(*decoding.COMPILED_FROM)}"
    make = functools.partial(decoding.compile_decode, config, topology, options, length)
    report = _known_or(make, DecodeReport, name, config, cache)
    print(show.decode_text(report))
    if not report.fits:
        print(
            f"plan: does not fit {topology.key}: it needs {report.hbm_gib:.2f} GiB of "
            f"{report.hbm_limit_gib:.2f} a device, {report.over_by_gib:.2f} too many; lower "
            f"--batch_size or --context, or use int8.",
            file=sys.stderr,
        )
    if output is not None:
        _write(output, dataclasses.asdict(report))
    return 0 if report.fits else 1


def _search(
    config: Config, topology: Topology, cache: compiling.Cache, most: int
) -> list[Report]:
    """Compiles the most promising candidates, best first by estimate.

    Raises:
      ConfigError: no candidate divides over the topology.
    """
    candidates = search.candidates(config, topology)
    fitting = [c for c in candidates if c.fits]
    chosen = (fitting or candidates)[:most]
    print(
        f"  {len(candidates)} candidates, {len(fitting)} of them fit by estimate; compiling "
        f"the best {len(chosen)}",
        file=sys.stderr,
    )
    reports = []
    with tqdm.tqdm(chosen, unit="candidate", leave=False) as bar:
        for number, candidate in enumerate(bar, 1):
            bar.write(f"  {number} of {len(chosen)}: {candidate}", file=sys.stderr)
            reports.append(_compile(candidate.config, topology, cache))
            bar.write(f"     {show.one_line(reports[-1])}", file=sys.stderr)
    return reports


def _told(config: Config) -> str:
    return f"({config.model.num_layers} layers × {config.model.embed_dim})"


def _what_would_fit(config: Config, topology: Topology, report: Report) -> str:
    """How much is lacking, and the nearest settings that fit by estimate."""
    lacking = (
        f"does not fit {topology.key}: it needs {report.hbm_gib:.2f} GiB of "
        f"{report.hbm_limit_gib:.2f} a device, {report.over_by_gib:.2f} too many"
    )
    fitting = [c for c in search.candidates(config, topology) if c.fits]
    if fitting:
        return f"{lacking}; by estimate {fitting[0].flags()} would fit, --search makes sure."
    larger = search.smallest_that_fits(config, topology)
    if larger is not None:
        return f"{lacking}, and no mesh, remat or accumulation helps; {larger} would fit."
    return f"{lacking}, and no slice of {topology.kind} would fit it."


def _command(arguments: argparse.Namespace, overrides: Sequence[str], best: Report) -> str:
    """The training command with the settings of a report."""
    own = search.flags_of(best)
    named = {flag.strip('"').split("=")[0] for flag in own}
    kept = [override for override in overrides if override.split("=")[0] not in named]
    flags = [f"--config.{override}" for override in (*kept, *own)]
    return " ".join(
        [f"python -m neo_jax.main --config {arguments.config} --workdir runs/mine", *flags]
    )


def _refuse_to_overwrite(output: pathlib.Path | None) -> None:
    """A plan may replace a plan, and nothing else."""
    if output is None or not output.exists():
        return
    try:
        is_plan = "hbm_limit_gib" in json.loads(output.read_text())
    except (ValueError, TypeError, OSError):
        is_plan = False
    if not is_plan:
        raise ConfigError(f"--json {output} exists and is no plan; give another name.")


def _write(output: pathlib.Path, tree: Mapping[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(output.name + ".partial")
    aside.write_text(json.dumps(tree, indent=2) + "\n")
    os.replace(aside, output)
    print(f"wrote {output}")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    names = "\n".join("  " + ", ".join(sizes) for sizes in topologies.names().values())
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.plan",
        description="Compiles training, or decoding, for TPUs that are not here.",
        epilog=_EXAMPLES.format(names=names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="an experiment: a file or a name")
    parser.add_argument("--topology", required=True, help="as in v5e-16, v4-8 or v5e:4x4")
    parser.add_argument(
        "--num_slices", type=int, default=1, help="equal slices, joined by DCN (%(default)s)"
    )
    parser.add_argument("--json", metavar="OUT", help="write the report here, too")
    parser.add_argument(
        "--search", action="store_true", help="find mesh, remat and accumulation"
    )
    parser.add_argument(
        "--compile",
        type=int,
        default=3,
        metavar="N",
        help="candidates of a search to compile (%(default)s)",
    )
    parser.add_argument(
        "--show_sharding", action="store_true", help="print where every tensor lies, and stop"
    )
    writing = parser.add_argument_group("of text that is written")
    writing.add_argument(
        "--decode", action="store_true", help="plan the writing of text, not training"
    )
    writing.add_argument(
        "--batch_size", type=int, default=1, metavar="N", help="texts at a time (%(default)s)"
    )
    writing.add_argument(
        "--context", type=int, metavar="TOKENS", help="of a text; left out: all positions"
    )
    writing.add_argument(
        "--weight_dtype", choices=("auto", "int8"), default="auto", help="(%(default)s)"
    )
    writing.add_argument(
        "--cache_dtype",
        choices=("auto", "bfloat16", "float32", "int8"),
        default="auto",
        help="(%(default)s)",
    )
    parser.add_argument(
        "--cache", metavar="DIR", default=str(compiling.default_cache()), help="(%(default)s)"
    )
    parser.add_argument(
        "--config.SECTION.KEY", metavar="VALUE", dest="_", help="changes one setting"
    )
    known, rest = parser.parse_known_args(argv)
    overrides = []
    for flag in rest:
        if not flag.startswith("--config.") or "=" not in flag:
            parser.error(f"unknown argument {flag!r}; settings are --config.section.key=value")
        overrides.append(flag.removeprefix("--config."))
    for name in ("compile", "batch_size", "context"):
        value = getattr(known, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    if known.decode and known.search:
        parser.error("--search is of training; leave it out with --decode")
    return known, overrides


if __name__ == "__main__":
    sys.exit(main())
