"""Writes docs/tpu_fit.md: each released shape on each TPU, as the TPU's compiler sees it.

    python benchmarks/tpu_fit.py                       # compile what is missing, then write
    python benchmarks/tpu_fit.py --write_only          # write from what is known
    python benchmarks/tpu_fit.py --cells neo_2p7b@v5e-16 --compile 3
    python benchmarks/tpu_fit.py --add neo_2p7b=plan.json  # as `plan --json` wrote it

Needs the extra `plan`; about a minute of two cores and 3 GiB a compilation. What was compiled
is kept in docs/tpu_fit.json after each, so that it can be stopped at any time; cells that were
not compiled are marked. A cell compiles its best candidates by estimate and shows the best of
what came out. `--set` compiles one setting of a cell, where a person knows better.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tqdm

from neo_jax import config as config_lib
from neo_jax.config import Config
from neo_jax.planning import compiling, search, topologies
from neo_jax.planning.compiling import Report
from neo_jax.planning.topologies import Topology

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PRESETS = ("neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b")
# Most wanted first: a run that is stopped has done those.
TOPOLOGIES = (
    *(
        ("v5e-16", 1),
        ("v6e-16", 1),
        ("v5e:2x2", 1),
        ("v5e-64", 1),
        ("v5e-256", 1),
        ("v6e-8", 1),
    ),
    *(("v4-8", 1), ("v4-32", 1), ("v5e-1", 1), ("v5e-8", 1), ("v5p-8", 1), ("v5p-16", 1)),
    *(("tpu7x-8", 1), ("v5e-16", 2)),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A released shape, trained as released, on one machine."""

    preset: str
    topology: Topology

    @property
    def name(self) -> str:
        return f"{self.preset}@{self.topology.key}"

    def config(self, *overrides: str) -> Config:
        """The experiment of that name, its batch and its length unchanged."""
        return config_lib.load_experiment(self.preset, overrides)


def cells() -> Iterator[Cell]:
    """All of the table, in the order in which they are compiled."""
    for name, slices in TOPOLOGIES:
        for preset in reversed(PRESETS):
            yield Cell(preset, topologies.parse(name, slices))


def main() -> None:
    """Compiles what is missing and asked for; writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cells", nargs="*", help="as in neo_2p7b@v5e-16; left out: all")
    parser.add_argument("--compile", type=int, default=3, help="candidates a cell (3)")
    parser.add_argument("--set", nargs="*", default=[], help="section.key=value, not a search")
    parser.add_argument(
        "--add", nargs="*", default=[], help="PRESET=PLAN.json, written by plan"
    )
    parser.add_argument("--write_only", action="store_true", help="compile nothing")
    parser.add_argument(
        "--bare_products", action="store_true", help="compile the yardsticks, seconds each"
    )
    arguments = parser.parse_args()
    store = Store(DOCS / "tpu_fit.json")
    if arguments.bare_products:
        for kind in tqdm.tqdm(topologies.GENERATIONS, unit="product"):
            store.bare_product(kind)
    for entry in arguments.add:
        preset, _, path = entry.partition("=")
        store.add(preset, json.loads(pathlib.Path(path).read_text()))
    wanted = [] if arguments.add else list(cells())
    if arguments.cells:
        asked = [name.split("@") for name in arguments.cells]
        wanted = [Cell(preset, topologies.parse(*_slices(where))) for preset, where in asked]
    if not arguments.write_only:
        for cell in tqdm.tqdm(wanted, unit="cell"):
            for config in _to_compile(cell, arguments.compile, arguments.set):
                store.compile(cell, config)
    (DOCS / "tpu_fit.md").write_text(page(store))
    print(f"wrote {DOCS / 'tpu_fit.md'}", file=sys.stderr)


def _slices(name: str) -> tuple[str, int]:
    """`2xv5e-16` → v5e-16, 2."""
    number, _, rest = name.partition("x")
    return (rest, int(number)) if number.isdigit() and rest else (name, 1)


def _to_compile(cell: Cell, most: int, settings: list[str]) -> list[Config]:
    if settings:
        return [cell.config(*settings)]
    found = search.candidates(cell.config(), cell.topology)
    return [candidate.config for candidate in found if candidate.fits][:most]


class Store:
    """docs/tpu_fit.json: reports by cell, then by what they were compiled from."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._tree = json.loads(path.read_text()) if path.exists() else {}

    def compile(self, cell: Cell, config: Config) -> None:
        """Unless it is known already."""
        key = compiling.key(config, cell.topology)
        if key in self._tree.get(cell.name, {}):
            return
        report = compiling.compile_step(config, cell.topology)
        self._tree.setdefault(cell.name, {})[key] = dataclasses.asdict(report)
        self._write()

    def add(self, preset: str, tree: dict[str, Any]) -> None:
        """A report that `plan` wrote."""
        names = {field.name for field in dataclasses.fields(Report)}
        report = {name: value for name, value in tree.items() if name in names}
        settings = {k: v for k, v in report.items() if k != "compile_seconds"}
        text = json.dumps(settings, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._tree.setdefault(f"{preset}@{report['topology']}", {})[key] = report
        self._write()

    def _write(self) -> None:
        text = json.dumps(self._tree, indent=1, sort_keys=True) + "\n"
        aside = self._path.with_suffix(".partial")
        aside.write_text(text)
        os.replace(aside, self._path)

    def bare_product(self, kind: str) -> None:
        """Share of peak of an 8192³ bfloat16 product, by the predictor."""
        name = topologies.names()[kind][0]
        share = compiling.bare_product_share(topologies.parse(name))
        self._tree.setdefault("bare products", {})[kind] = share
        self._write()

    def share(self, kind: str) -> float | None:
        """As `bare_product` found it; None if it did not."""
        return self._tree.get("bare products", {}).get(kind)

    def reports(self, cell: Cell) -> list[Report]:
        """Best first; those that do not fit last."""
        known = [Report(**tree) for tree in self._tree.get(cell.name, {}).values()]
        return sorted(known, key=lambda r: -(r.predicted_mfu_exact or 0.0))


# ----------------------------------------------------------------------------------- page

HEAD = """# What fits on which TPU, and how fast

Generated by `python benchmarks/tpu_fit.py`; nothing here was measured on a TPU. Each row is
the real training step of a released recipe (its batch of 256 or 512 sequences of 2048 tokens,
or what the row says; float32 parameters and moments, bfloat16 products), compiled by the TPU's
own compiler (libtpu {libtpu}) on a CPU. HBM is the compiler's figure for one device.
Speed is predicted: [plan.md](plan.md) says from what, and how far to trust it. `MFU` counts
the arithmetic that causality and the window leave (exact); `of a product` is that MFU over
the share of peak that a bare 8192³ product reaches by the same predictor.

"not compiled" is what it says; `python -m neo_jax.plan --config neo_2p7b --topology v5e-16
--search` compiles it. Where there is a row, the best compiled setting is shown, which need not
be the best there is.
"""


def page(store: Store) -> str:
    """The whole of docs/tpu_fit.md."""
    sections, versions = [], set()
    for name, slices in TOPOLOGIES:
        topology = topologies.parse(name, slices)
        rows = []
        for preset in PRESETS:
            reports = store.reports(Cell(preset, topology))
            versions |= {report.libtpu for report in reports}
            rows.append(_row(preset, reports, store.share(topology.kind)))
        sections.append("\n".join([f"## {_title(topology)}", "", _COLUMNS, _RULE, *rows]))
    head = HEAD.format(libtpu=", ".join(sorted(versions)) or "none yet")
    return head + "\n" + "\n\n".join(sections) + "\n"


_COLUMNS = (
    "| shape | mesh | remat | slices × sequences a device | HBM, GiB | tokens/s/chip | MFU "
    "| PaLM's | of a product |"
)
_RULE = "|---|---|---|---|---|---|---|---|---|"


def _title(topology: Topology) -> str:
    slices = f"{topology.num_slices} × " if topology.num_slices > 1 else ""
    chips = f"{topology.chips} chip" + "s" * (topology.chips > 1)
    limit = topology.generation.hbm_limit_gib
    return f"{slices}{topology.name} ({topology.key}): {chips}, {limit} GiB a device"


def _row(preset: str, reports: list[Report], share: float | None) -> str:
    batch_size = config_lib.load_experiment(preset).data.batch_size
    if not reports:
        return f"| {preset} | not compiled |" + " |" * 7
    best = reports[0]
    mesh = " × ".join(f"{axis} {size}" for axis, size in best.mesh.items() if size > 1)
    shards = best.mesh["data"] * best.mesh["fsdp"] * best.accumulation_steps
    sequences = f"{best.accumulation_steps} × {best.batch_size / shards:g}"
    if best.batch_size != batch_size:
        sequences += f" ({best.batch_size} a step)"
    if best.predicted_mfu_exact is None:
        lacking = f"{best.hbm_gib:.2f}, does not fit"
        return f"| {preset} | {mesh} | {best.remat} | {sequences} | {lacking} |" + " |" * 4
    return (
        f"| {preset} | {mesh or 'one device'} | {best.remat} | {sequences} "
        f"| {best.hbm_gib:.2f} | {best.predicted_tokens_per_second_per_chip:,.0f} "
        f"| {best.predicted_mfu_exact:.1%} | {best.predicted_mfu_palm:.1%} "
        f"| {f'{best.predicted_mfu_exact / share:.0%}' if share else ''} |"
    )


if __name__ == "__main__":
    main()
