"""From numbers of a step to files, services and the terminal.

Enters: a step's values. Leaves: `metrics.jsonl`, `tensorboard/`, `loss.png`, `summary.json`, a
progress bar or a log's lines, Weights & Biases if asked.

Only process 0 writes. A resumed run reads as if it had never stopped: what was logged after
the checkpoint is dropped before new lines are added.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import tqdm

from neo_jax.config import Config, ConfigError
from neo_jax.metrics.lines import json_line, metrics_file, plain, read_metrics, replace
from neo_jax.metrics.plotting import plot_losses

# The order of keys in a line; others follow.
_KEYS = (
    *("step", "split", "loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm"),
    *("tokens", "tokens_per_second", "step_seconds", "mfu_palm", "mfu_exact", "skipped"),
    *("non_finite", "rollbacks", "elapsed_seconds"),
)

Split = Literal["train", "eval"]
_Values = Mapping[str, float | int | None]


@runtime_checkable
class Stream(Protocol):
    """What progress is shown on; the standard error is one."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...

    def isatty(self) -> bool: ...


class _Sink(Protocol):
    def write(self, step: int, split: str, values: _Values) -> None: ...

    def close(self) -> None: ...


class Writer:
    """Writes the metrics of a run, and shows how far it is.

    Use as a context manager, or call `close`. On processes other than 0 it does nothing.

    Args:
      workdir: made if it does not exist.
      config: of the run.
      start_step: updates that the run has behind it. Lines after it are dropped, and
        TensorBoard hides what it has; with 0 all of them are.
      stream: where progress goes; left out: the standard error.
      clock: seconds; decides when a log file gets its next line.

    Raises:
      ConfigError: `train.wandb_project` is set, and wandb is not installed.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: Config,
        start_step: int,
        *,
        stream: Stream | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workdir, self._sinks = pathlib.Path(workdir), list[_Sink]()
        self._of_text = config.task in ("pretrain", "finetune")
        self._progress: _Progress | None = None
        if jax.process_index() != 0:
            return
        # First what can be refused, so that a refusal changes nothing.
        if config.train.wandb_project is not None:
            self._sinks.append(_Wandb(self._workdir, config, config.train.wandb_project))
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._sinks.append(_JsonLines(metrics_file(self._workdir), start_step))
        if config.train.tensorboard:
            self._sinks.append(_TensorBoard(self._workdir / "tensorboard", start_step))
        self._progress = _Progress(
            start_step, config.train.num_steps, stream or sys.stderr, clock
        )
        self._sinks.append(self._progress)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, split: Split, values: Mapping[str, Any]) -> None:
        """Logs one line of numbers.

        Args:
          step: updates made so far; 1 after the first.
          split: which text was scored.
          values: Python, NumPy or JAX scalars. `perplexity` is added beside a language
            model's `loss`. NaN and infinity, which JSON has no words for, become null.
        """
        numbers = {key: plain(value) for key, value in values.items() if value is not None}
        if self._of_text and "loss" in numbers and "perplexity" not in numbers:
            numbers["perplexity"] = plain(_exp(numbers["loss"]))
        order = [key for key in _KEYS if key in numbers]
        order += [key for key in numbers if key not in order]
        for sink in self._sinks:
            sink.write(step, split, {key: numbers[key] for key in order})

    def goodput(self, step: int, totals: Mapping[str, float]) -> None:
        """Draws the run's seconds by use, in TensorBoard alone."""
        for sink in self._sinks:
            if isinstance(sink, _TensorBoard):
                sink.write(step, "goodput", totals)

    def flush(self) -> None:
        """Waits until the lines written so far are on the disk."""
        for sink in self._sinks:
            if isinstance(sink, _JsonLines):
                sink.flush()

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step` updates; reads nothing from the device."""
        if self._progress:
            self._progress.advance(step)

    def say(self, text: str) -> None:
        """Prints text without breaking the progress bar."""
        if self._progress:
            self._progress.say(text)

    def plot(self) -> None:
        """Draws `loss.png` from `metrics.jsonl`."""
        if self._progress:
            plot_losses(self._workdir)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes `summary.json`: nested dicts and lists of scalars and strings."""
        if self._progress:
            text = json.dumps(plain(values), indent=2, allow_nan=False) + "\n"
            replace(self._workdir / "summary.json", text.encode())

    def close(self) -> None:
        """Ends the progress bar and flushes what is buffered."""
        for sink in self._sinks:
            sink.close()
        self._sinks, self._progress = [], None


def _exp(x: float | None) -> float | None:
    try:
        return None if x is None else math.exp(x)
    except OverflowError:
        return math.inf


class _JsonLines:
    """`metrics.jsonl`, one object a line, flushed line by line."""

    def __init__(self, path: pathlib.Path, start_step: int) -> None:
        if path.exists():
            last = start_step or -1  # a run that starts anew evaluates step 0 again
            kept = [line for line in read_metrics(path.parent) if line["step"] <= last]
            replace(path, "".join(map(json_line, kept)).encode())
        self._file = path.open("a", buffering=1)

    def write(self, step: int, split: str, values: _Values) -> None:
        self._file.write(json_line({"step": step, "split": split, **values}))

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """`tensorboard/`, one scalar per split and key."""

    def __init__(self, folder: pathlib.Path, start_step: int) -> None:
        import tensorboardX

        # The suffix keeps a quick restart from overwriting a file of the same second.
        self._writer = tensorboardX.SummaryWriter(
            str(folder),
            purge_step=start_step + 1 if start_step else 0,
            filename_suffix=f".{start_step}.{os.getpid()}",
        )

    def write(self, step: int, split: str, values: _Values) -> None:
        for key, value in values.items():
            if value is not None:  # a gap in the curve, rather than a warning a line
                self._writer.add_scalar(f"{split}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases, with `step` as the axis, so that a resumed run may step back."""

    def __init__(self, workdir: pathlib.Path, config: Config, project: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"train.wandb_project={project!r} needs Weights & Biases; "
                f"`pip install wandb`, or leave train.wandb_project out."
            ) from None
        workdir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            dir=str(workdir),
            resume="auto",
            config=dataclasses.asdict(config),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, split: str, values: _Values) -> None:
        self._run.log({"step": step, **{f"{split}/{key}": v for key, v in values.items()}})

    def close(self) -> None:
        self._run.finish()


class _Progress:
    """A bar on a terminal; elsewhere a line every now and then."""

    _SECONDS_BETWEEN_LINES = 15.0

    def __init__(
        self, start_step: int, num_steps: int, stream: Stream, clock: Callable[[], float]
    ) -> None:
        self._num_steps, self._stream, self._clock = num_steps, stream, clock
        self._last_line = -math.inf
        self._bar: tqdm.tqdm | None = None
        if stream.isatty():
            self._bar = tqdm.tqdm(
                total=num_steps,
                initial=start_step,
                unit="step",
                file=stream,
                dynamic_ncols=True,
            )

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, split: str, values: _Values) -> None:
        shown = ", ".join(_shown(values))
        if split != "train":
            self.say(f"{split} at step {step}: {shown}")
        elif self._bar is not None:
            self._bar.set_postfix_str(shown)
        elif step >= self._num_steps or self._due():
            self._last_line = self._clock()
            left = (self._num_steps - step) * (values.get("step_seconds") or 0)
            left_text = f", {tqdm.tqdm.format_interval(left)} left" if left else ""
            self.say(f"step {step}/{self._num_steps}: {shown}{left_text}")

    def _due(self) -> bool:
        return self._clock() - self._last_line >= self._SECONDS_BETWEEN_LINES

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _shown(values: _Values) -> Iterator[str]:
    """The few numbers worth a glance."""
    if "loss" in values:
        loss = values["loss"]
        yield "loss not finite" if loss is None else f"loss {loss:.4f}"
    if values.get("bits_per_byte") is not None:
        yield f"{values['bits_per_byte']:.4f} bits per byte"
    if values.get("tokens_per_second") is not None:
        yield f"{values['tokens_per_second']:,.0f} tokens/s"
    if values.get("mfu_exact") is not None:
        yield f"MFU {values['mfu_exact']:.1%}"
