"""What an evaluation leaves behind: JSON, Markdown beside the published figures, a plot.

Enters: the outcomes of tasks, and what they are of. Leaves: a report as a plain dict, its
text, and drawings of one report or several. Every row names its metric, what the metric is
divided by, the number of samples and the standard error; the head names the command.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neo_jax.config import ConfigError
from neo_jax.evaluate import published
from neo_jax.evaluate.tasks import Outcome

FORMAT = "neo_jax evaluation 1"

DEFINITIONS: Mapping[str, str] = {
    "acc": "share of samples answered right; choices by summed log-likelihood, unnormalised",
    "acc_norm": "as acc, log-likelihoods divided by the answer's characters",
    "acc_bytes": "as acc, log-likelihoods divided by the answer's UTF-8 bytes",
    "perplexity": "exp of the mean negative log-likelihood of the last word, all its tokens",
    "token_perplexity": "exp of the negative log-likelihood a token",
    "word_perplexity": "exp of the negative log-likelihood a word of the original text",
    "byte_perplexity": "exp of the negative log-likelihood a UTF-8 byte of the original text",
    "bits_per_byte": "negative log2-likelihood a UTF-8 byte of the original text",
    "pile_bits_per_byte": "negative log2-likelihood a token × 0.29335 tokens a byte",
    "loss": "negative log-likelihood a token, nats",
    "pct_stereotype": "share of pairs whose stereotyped sentence is the likelier; 0.5 is even",
    "likelihood_diff": "mean absolute difference of a pair's log-likelihoods, nats",
    "stereotype_score": "share whose stereotype is likelier than its opposite; 0.5 is even",
    "language_score": "share of comparisons in which sense is likelier than nonsense",
    "icat": "language_score × min(s, 1 − s) / 0.5, s the stereotype_score; 1 is best",
    "exact_match": "share of continuations that greedy decoding writes verbatim, whole",
    "mean_match": "tokens that greedy decoding writes verbatim, from the first one on, mean",
    "longest_match": "the most of them",
}
# How a metric is read, by a part of its name; the others are better when higher.
_READ = {
    "perplexity": "lower is better",
    "bits": "lower is better",
    "loss": "lower is better",
    "diff": "lower is more even",
    "stereotype": "50 is even",
    "match": "less is less by heart",
}
# Counts are printed, not judged.
_COUNTS = ("documents", "tokens", "words", "bytes", "empty_documents")


def build(
    outcomes: Sequence[Outcome],
    *,
    model: str,
    parameters: int,
    command: str,
    seconds: float,
    versions: Mapping[str, str],
    device: str,
) -> dict[str, Any]:
    """The report, ready for `json.dumps`.

    Args:
      outcomes: of tasks, in the order in which they are told.
      model: name or path.
      parameters: their number.
      command: that gave it.
      seconds: wall time of the whole.
      versions: of the programs that had a part in it.
      device: what it ran on.
    """
    return {
        "format": FORMAT,
        "model": model,
        "parameters": parameters,
        "command": command,
        "seconds": round(seconds, 1),
        "device": device,
        "versions": dict(versions),
        "tasks": {outcome.task: _task(outcome) for outcome in outcomes},
    }


def _task(outcome: Outcome) -> dict[str, Any]:
    return {
        "samples": outcome.num_samples,
        "truncated": outcome.truncated,
        "data": outcome.data,
        "driver": outcome.driver,
        "metrics": {
            name: _metric(outcome.task, name, f) for name, f in outcome.metrics.items()
        },
        "groups": {
            group: {
                name: {"value": f.value, "stderr": f.stderr} for name, f in figures.items()
            }
            for group, figures in outcome.groups.items()
        },
    }


def _metric(task: str, name: str, figure: Any) -> dict[str, Any]:
    beside = published.figures(task, name)
    return {
        "value": figure.value,
        "stderr": figure.stderr,
        "definition": DEFINITIONS.get(name.split(",")[0], ""),
        "published": beside,
        "difference": {model: figure.value - value for model, value in beside.items()},
    }


def read(path: pathlib.Path) -> dict[str, Any]:
    """A report that `write` left.

    Raises:
      ConfigError: it cannot be read, or is something else.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ConfigError(f"{path} is no report of neo_jax.evaluate.")
    return report


def write(report: Mapping[str, Any], path: pathlib.Path) -> list[pathlib.Path]:
    """Writes PATH as JSON, and beside it the same name with `.md` and `.png`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text, drawing = path.with_suffix(".md"), path.with_suffix(".png")
    _replace(path, (json.dumps(_finite(report), indent=2, allow_nan=False) + "\n").encode())
    _replace(text, markdown(report).encode())
    written = [path, text]
    if bars([report], drawing):
        written.append(drawing)
    return written


def _replace(path: pathlib.Path, data: bytes) -> None:
    """Readers see the old file or the new one."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(data)
    os.replace(aside, path)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -------------------------------------------------------------------------------- Markdown


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"# {report['model']}",
        "",
        f"{report['parameters']:,} parameters, on {report['device']}, "
        f"{report['seconds']:,.0f} s. "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        f"    {report['command']}",
        "",
        *table(report),
        "",
        *_groups(report),
        *_beside(report),
        "± is the standard error.",
        *_notes(report),
        "",
    ]
    return "\n".join(lines)


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """All figures of a report as a Markdown table."""
    yield "| task | metric | value | ± | samples |"
    yield "|---|---|---|---|---|"
    for task, entry in report["tasks"].items():
        for name, metric in entry["metrics"].items():
            yield (
                f"| {task} | {name} | {_number(name, metric['value'])} | "
                f"{_number(name, metric['stderr'])} | {entry['samples']:,} |"
            )


def _groups(report: Mapping[str, Any]) -> Iterator[str]:
    for task, entry in report["tasks"].items():
        if not entry["groups"]:
            continue
        names = list(next(iter(entry["groups"].values())))
        yield f"## {task}, by part"
        yield ""
        yield f"| part | {' | '.join(names)} |"
        yield "|---" * (len(names) + 1) + "|"
        for group, figures in entry["groups"].items():
            cells = [_number(name, figures[name]["value"]) for name in names]
            yield f"| {group} | {' | '.join(cells)} |"
        yield ""


def _beside(report: Mapping[str, Any]) -> Iterator[str]:
    for task, entry in report["tasks"].items():
        for name, metric in entry["metrics"].items():
            if not metric["published"]:
                continue
            yield f"## {task}, {name}, beside published figures"
            yield ""
            yield "| model | published | Δ of ours |"
            yield "|---|---|---|"
            for model, value in metric["published"].items():
                gap = metric["value"] - value
                ours = _number(name, gap, sign=True).replace(" %", " points")
                yield f"| {model} | {_number(name, value)} | {ours} |"
            yield ""


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    metrics = {name for entry in report["tasks"].values() for name in entry["metrics"]}
    for name in sorted(metrics):
        if definition := DEFINITIONS.get(name.split(",")[0]):
            yield f"- {name}: {definition}"
    for task, entry in report["tasks"].items():
        cut = entry["truncated"]
        tail = f"; {cut} contexts were cut at their front" if cut else ""
        yield f"- {task}: {entry['data']}, asked by {entry['driver']}{tail}"


def _number(name: str, value: float | None, sign: bool = False) -> str:
    if value is None:
        return "–"
    plus = "+" if sign else ""
    if name in _COUNTS:
        return f"{value:,.0f}"
    if _is_share(name):
        return f"{100 * value:{plus}.2f} %"
    return f"{value:{plus},.1f}" if abs(value) >= 1000 else f"{value:{plus}.4f}"


def _is_share(name: str) -> bool:
    return name.startswith(("acc", "pct", "exact_match", "stereotype_score", "language_score"))


# --------------------------------------------------------------------------------- drawing


def bars(reports: Sequence[Mapping[str, Any]], path: pathlib.Path) -> bool:
    """Models side by side: one panel for each published metric, else for a task's first.

    Returns:
      Whether there was anything to draw.
    """
    cells = [cell for cell in _cells(reports) if cell[1] not in _COUNTS]
    known = [cell for cell in cells if published.figures(*cell)]
    firsts = {task: (task, name) for task, name in reversed(cells)}
    cells = [c for c in cells if c in known or (firsts[c[0]] == c and c[0] not in dict(known))]
    if not cells:
        return False
    from matplotlib import figure  # takes a second to import

    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    drawing = figure.Figure(figsize=(5 * columns, 0.6 + 3.2 * rows), layout="constrained")
    for index, (task, name) in enumerate(cells):
        axis = drawing.add_subplot(rows, columns, index + 1)
        _draw_bars(axis, reports, task, name)
    drawing.savefig(path, dpi=110)
    return True


def _draw_bars(axis: Any, reports: Sequence[Mapping[str, Any]], task: str, name: str) -> None:
    unit = 100 if _is_share(name) else 1
    ours = [
        (_short(report["model"]), metric["value"] * unit, (metric["stderr"] or 0) * unit)
        for report in reports
        if (metric := _metric_of(report, task, name)) and metric["value"] is not None
    ]
    others = [(m, v * unit, 0.0) for m, v in published.figures(task, name).items()]
    labels, values, errors = zip(*(others + ours), strict=True)
    colours = ["#b8c4ce"] * len(others) + ["#1f77b4"] * len(ours)
    axis.barh(range(len(labels)), values, xerr=errors, color=colours)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(max(len(labels), 5) - 0.5, -0.5)  # the first on top, no bar too fat
    better = next((how for part, how in _READ.items() if part in name), "higher is better")
    percent = ", %" if unit == 100 else ""
    axis.set_title(f"{task}: {name}{percent}\n({better})", fontsize=9)
    if unit != 100 and max(values) > 50 * max(min(values), 1e-9):
        axis.set_xscale("log")
    else:
        axis.set_xlim(left=0)


def radar(reports: Sequence[Mapping[str, Any]], path: pathlib.Path) -> bool:
    """Accuracies of several models around a circle, in percent.

    Returns:
      Whether there are the three tasks with an accuracy that a shape needs.
    """
    tasks = [task for task, name in _cells(reports) if name == "acc"]
    tasks = [t for t in tasks if all(_metric_of(report, t, "acc") for report in reports)]
    if len(tasks) < 3:
        return False
    from matplotlib import figure  # takes a second to import

    angles = [2 * math.pi * i / len(tasks) for i in range(len(tasks))]
    drawing = figure.Figure(figsize=(7, 6), layout="constrained")
    axis = drawing.add_subplot(projection="polar")
    for report in reports:
        values = [100 * _metric_of(report, task, "acc")["value"] for task in tasks]
        axis.plot([*angles, 0.0], [*values, values[0]], label=_short(report["model"]))
        axis.fill(angles, values, alpha=0.1)
    axis.set_xticks(angles, tasks, fontsize=8)
    axis.set_ylim(0, 100)
    axis.set_title("accuracy, %", fontsize=10)
    axis.legend(loc="upper left", bbox_to_anchor=(1.1, 1.05), fontsize=8)
    drawing.savefig(path, dpi=110, bbox_inches="tight")
    return True


def _cells(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Pairs of task and metric that any report has, in their order."""
    return list(
        dict.fromkeys(
            (task, name)
            for report in reports
            for task, entry in report["tasks"].items()
            for name in entry["metrics"]
        )
    )


def _metric_of(report: Mapping[str, Any], task: str, name: str) -> Any:
    return report["tasks"].get(task, {}).get("metrics", {}).get(name)


def _short(model: str) -> str:
    return model if len(model) <= 24 else f"…{model[-23:]}"
