"""`loss.png`, drawn from `metrics.jsonl`.

Enters: a workdir. Leaves: the picture in it.
"""

from __future__ import annotations

import io
import pathlib
from typing import Any

import numpy as np

from neo_jax.metrics.lines import read_metrics, replace


def plot_losses(workdir: pathlib.Path) -> None:
    """Draws `loss.png`: losses, bits per byte of held-out text, the learning rate.

    Without a logged loss there is nothing to draw, and no file.
    """
    from matplotlib.figure import Figure  # not pyplot, which holds global state

    lines = read_metrics(workdir)
    train, held_out = _Curves(lines, "train"), _Curves(lines, "eval")
    if not (train.has("loss") or held_out.has("loss")):
        return
    heights = {"loss": 3.0}
    if held_out.has("bits_per_byte"):
        heights["bits per byte"] = 1.6
    if train.has("learning_rate"):
        heights["learning rate"] = 1.0
    figure = Figure(figsize=(8, 1 + 1.2 * sum(heights.values())), layout="constrained")
    grid = figure.subplots(
        len(heights), sharex=True, squeeze=False, height_ratios=list(heights.values())
    )
    axes = dict(zip(heights, grid[:, 0], strict=True))
    for name, axis in axes.items():
        axis.set_ylabel(name)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    grid[-1, 0].set_xlabel("step")
    figure.suptitle(pathlib.Path(workdir).resolve().name)
    _draw_losses(axes["loss"], train, held_out)
    if "bits per byte" in axes:
        _draw_held_out(axes["bits per byte"], *held_out["bits_per_byte"])
    if "learning rate" in axes:
        axes["learning rate"].plot(*train["learning_rate"], color="tab:gray")
        axes["learning rate"].set_ylim(bottom=0)
        axes["learning rate"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.align_ylabels()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    replace(pathlib.Path(workdir) / "loss.png", picture.getvalue())


class _Curves:
    """Steps and values of one split; NaN where a value is missing."""

    def __init__(self, lines: list[dict[str, Any]], split: str) -> None:
        self._lines = [line for line in lines if line.get("split") == split]

    def has(self, key: str) -> bool:
        return any(line.get(key) is not None for line in self._lines)

    def __getitem__(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        pairs = [(x["step"], x[key]) for x in self._lines if key in x]
        values = np.array(pairs, dtype=float).reshape(-1, 2)  # None becomes NaN
        return values[:, 0], values[:, 1]


def _draw_losses(axis: Any, train: _Curves, held_out: _Curves) -> None:
    steps, losses = train["loss"]
    width = max(1, len(losses) // 50)
    if width > 1:
        axis.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    label = "train" if width == 1 else f"train, mean of {width} lines"
    axis.plot(steps, _smooth(losses, width), color="tab:blue", label=label)
    if held_out.has("loss"):
        _draw_held_out(axis, *held_out["loss"])
    axis.legend(frameon=False)


def _draw_held_out(axis: Any, steps: np.ndarray, values: np.ndarray) -> None:
    axis.plot(steps, values, "o-", color="tab:orange", markersize=4, label="held out")
    axis.annotate(
        f"{values[-1]:.3f}",
        (steps[-1], values[-1]),
        xytext=(0, 7),
        textcoords="offset points",
        ha="right",
        color="tab:orange",
    )


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of up to `width` neighbours, of those that are finite."""
    finite = np.isfinite(values)
    window = np.ones(width)
    total = np.convolve(np.where(finite, values, 0), window, mode="same")
    count = np.convolve(finite.astype(float), window, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
