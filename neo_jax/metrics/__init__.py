"""From numbers of the training loop to everything a person reads about a run.

Enters: values of a step, times, the model's shape. Leaves, in the workdir: `metrics.jsonl`,
`tensorboard/`, `loss.png`, `summary.json`; on the terminal a progress bar, or in a log file a
line now and then; Weights & Biases if asked. Also the run's speed: tokens per second, and the
share of the chip's peak that the model's own arithmetic takes (MFU), counted in two ways.

`speed.py` counts, `lines.py` is the file, `plotting.py` draws it, `writing.py` writes.
"""

from neo_jax.metrics.lines import read_metrics
from neo_jax.metrics.plotting import plot_losses
from neo_jax.metrics.speed import FlopsPerToken, Throughput, flops_per_token, peak_flops
from neo_jax.metrics.writing import Split, Stream, Writer

__all__ = [
    "FlopsPerToken",
    "Split",
    "Stream",
    "Throughput",
    "Writer",
    "flops_per_token",
    "peak_flops",
    "plot_losses",
    "read_metrics",
]
