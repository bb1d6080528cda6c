"""From numbers of the training loop to everything a person reads about a run.

Enters: values of a step, times, the model's shape. Leaves, in the workdir: `metrics.jsonl`,
`tensorboard/`, `loss.png`, `summary.json`; on the terminal a progress bar, or in a log file a
line now and then; Weights & Biases if asked. Also the run's speed: tokens per second, and the
share of the chip's peak that the model's own arithmetic takes (MFU), counted in two ways.

Only process 0 writes. A resumed run reads as if it had never stopped: what was logged after
the checkpoint is dropped before new lines are added.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
import tqdm

from neo_jax.config import Config, ConfigError, FinetuneConfig, ModelConfig
from neo_jax.state import EVERYTHING

# ---------------------------------------------------------------------------------- speed


class FlopsPerToken(NamedTuple):
    """Forward and backward, per token of a full sequence."""

    palm: float  # every query counted with every key, as others publish it
    exact: float  # only the keys that causality and the window let a query see


def flops_per_token(
    model: ModelConfig, seq_len: int, finetune: FinetuneConfig = EVERYTHING
) -> FlopsPerToken:
    """Arithmetic that the model itself needs; recomputation does not count.

    Both are 6 per weight of a matrix product (the unpadded output head among them; biases,
    LayerNorm and the tables that are only looked up do no products), plus 12 × embed per key
    and layer for the scores and the mixing of values; a third of each is the forward pass.
    Frozen weights have no gradients, which spares 2 of the 6, and nothing goes backward below
    the lowest layer that learns.
    Source of the first: Chowdhery et al., PaLM (arXiv 2204.02311), appendix B.

    Args:
      model: the shape.
      seq_len: tokens.
      finetune: which weights are learned.
    """
    L, D, S = model.num_layers, model.embed_dim, seq_len
    widths = {"up": D + model.mlp_dim, "down": D + model.mlp_dim}
    layer, head = 4 * D * D + 2 * D * model.mlp_dim, model.vocab_size * D
    is_all, is_part = (finetune.trainable == kind for kind in ("all", "last_layers"))
    passed = min(finetune.last_layers, L) if is_part else L  # layers with a backward pass
    learned = 0 if finetune.trainable == "lora" else passed
    products = (2 * L + 2 * passed + 2 * learned) * layer + (6 if is_all else 4) * head
    products += 6 * L * model.lora_rank * sum(widths.get(t, 2 * D) for t in model.lora_targets)

    def mean_keys(kind: str) -> float:
        window = min(model.window_size, S) if kind == "local" else S
        return (window * (window + 1) / 2 + (S - window) * window) / S

    seen = [mean_keys(kind) for kind in model.layer_types]
    return FlopsPerToken(
        palm=products + 4 * D * S * (L + 2 * passed),
        exact=products + 4 * D * (sum(seen) + 2 * sum(seen[L - passed :])),
    )


# Name of a JAX device, peak TFLOP/s of dense bfloat16 products a chip, JAX devices a chip.
# TPU: docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}, "Peak compute per chip"; that
#   of v2 names none: Jouppi et al., CACM 63(7), 2020, doi 10.1145/3360307, table 1.
# NVIDIA, nvidia.com/en-us/data-center/{h100,h200,a100,l4,tesla-t4}: where the page counts
#   structured sparsity, half its figure. T4 has float16 products only.
_PEAK_TFLOPS = (
    (r"TPU v2", 46, 2),
    (r"TPU v3", 123, 2),
    (r"TPU v4", 275, 1),
    (r"TPU v5 ?(lite|e)", 197, 1),
    (r"TPU v5p?", 459, 1),
    (r"TPU v6 ?(lite|e)", 918, 1),
    (r"TPU ?v?7x", 2307, 2),
    (r"NVIDIA (H100 80GB HBM3|H200)", 989.4, 1),
    (r"NVIDIA H[12]00 NVL", 835.5, 1),
    (r"NVIDIA H100 PCIe", 756.5, 1),
    (r"NVIDIA A100[- ](SXM4|PCIE|80GB)[-\w ]*", 312, 1),
    (r"NVIDIA L4", 121, 1),
    (r"Tesla T4", 65, 1),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one JAX device in bfloat16; None where unknown, as for a CPU.

    Args:
      device_kind: `jax.devices()[0].device_kind`. A device is half a chip on TPU v2, v3 and
        7x, whose two cores JAX shows apart.
    """
    for pattern, tflops, devices in _PEAK_TFLOPS:
        if re.fullmatch(pattern, device_kind):
            return tflops * 1e12 / devices
    return None


class Throughput:
    """Times the steps between two log lines, without what is not training.

    Args:
      flops_per_token: see the function of that name.
      peak_flops: of one device, see `peak_flops`; None leaves MFU out.
      num_devices: that train together.
      clock: seconds.
    """

    def __init__(
        self,
        *,
        flops_per_token: FlopsPerToken,
        peak_flops: float | None,
        num_devices: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops, self._clock = flops_per_token, clock
        self._peak = peak_flops * num_devices if peak_flops else None
        self._paused = {"compile": 0.0, "eval": 0.0, "save": 0.0, "restart": 0.0}
        self._data = 0.0
        self._earlier: dict[str, float] = {}
        self._lost = 0.0
        self._started = clock()
        self._open_window()

    def resume(self, earlier: Mapping[str, float], lost_seconds: float) -> None:
        """Adds what earlier starts of the run took.

        Args:
          earlier: `totals` at the checkpoint that the run goes on from.
          lost_seconds: that passed after it, and will have to be spent again.
        """
        self._earlier, self._lost = dict(earlier), lost_seconds

    def _open_window(self) -> None:
        self._steps = self._tokens = 0
        self._window_started, self._window_paused = self._clock(), sum(self._paused.values())

    def step(self, tokens: int) -> None:
        """Counts a finished step; `tokens` of all hosts together."""
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def pause(self, kind: Literal["compile", "eval", "save", "restart"]) -> Iterator[None]:
        """The time inside is not training's; one at a time.

        Steps run asynchronously: wait for the last one before entering.
        """
        began = self._clock()
        try:
            yield
        finally:
            self._paused[kind] += self._clock() - began

    def waited_for_data(self, seconds: float) -> None:
        """Counts time in which the device had nothing to do for want of a batch."""
        self._data += seconds

    def elapsed(self) -> float:
        """Seconds of the run so far, all its starts together; while nothing ran none pass."""
        earlier = (v for key, v in self._earlier.items() if key.endswith("_seconds"))
        return self._clock() - self._started + self._lost + sum(earlier)

    def rates(self) -> dict[str, float]:
        """Since the last call: tokens_per_second, step_seconds, and MFU if the peak is known.

        Empty if no step was counted.
        """
        now, paused = self._clock(), sum(self._paused.values())
        seconds = now - self._window_started - (paused - self._window_paused)
        steps, tokens = self._steps, self._tokens
        self._open_window()
        if not steps or seconds <= 0:
            return {}
        rates = {"tokens_per_second": tokens / seconds, "step_seconds": seconds / steps}
        if self._peak:
            rates["mfu_palm"] = tokens / seconds * self._flops.palm / self._peak
            rates["mfu_exact"] = tokens / seconds * self._flops.exact / self._peak
        return rates

    def totals(self) -> dict[str, float]:
        """Seconds of the run by use, all its starts together.

        `restart` is restoring, and what was done after a checkpoint and had to be done again;
        the time in which nothing ran is not counted. `goodput` is training's share.
        """
        own = {**self._paused, "data": self._data}
        train = self._clock() - self._started - sum(own.values())
        own["restart"] += self._lost
        seconds = {
            f"{kind}_seconds": value + self._earlier.get(f"{kind}_seconds", 0.0)
            for kind, value in {"train": train, **own}.items()
        }
        total = sum(seconds.values())
        goodput = seconds["train_seconds"] / total if total > 0 else 0.0
        return {**seconds, "goodput": goodput}


# -------------------------------------------------------------------------------- writing

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
        self._sinks.append(_JsonLines(_metrics_file(self._workdir), start_step))
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
        numbers = {key: _plain(value) for key, value in values.items() if value is not None}
        if self._of_text and "loss" in numbers and "perplexity" not in numbers:
            numbers["perplexity"] = _plain(_exp(numbers["loss"]))
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
            text = json.dumps(_plain(values), indent=2, allow_nan=False) + "\n"
            _replace(self._workdir / "summary.json", text.encode())

    def close(self) -> None:
        """Ends the progress bar and flushes what is buffered."""
        for sink in self._sinks:
            sink.close()
        self._sinks, self._progress = [], None


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` in order; none if there is no file.

    A line that a killed run left half-written is passed over.
    """
    path = _metrics_file(pathlib.Path(workdir))
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def _metrics_file(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "metrics.jsonl"


def _json_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """What JSON can hold: Python scalars, None for NaN and infinity, nested."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, str):
        return value
    value = np.asarray(value).item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _exp(x: float | None) -> float | None:
    try:
        return None if x is None else math.exp(x)
    except OverflowError:
        return math.inf


def _replace(path: pathlib.Path, data: bytes) -> None:
    """Writes a whole file aside and renames it: readers see the old or the new."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(data)
    os.replace(aside, path)


class _JsonLines:
    """`metrics.jsonl`, one object a line, flushed line by line."""

    def __init__(self, path: pathlib.Path, start_step: int) -> None:
        if path.exists():
            last = start_step or -1  # a run that starts anew evaluates step 0 again
            kept = [line for line in read_metrics(path.parent) if line["step"] <= last]
            _replace(path, "".join(map(_json_line, kept)).encode())
        self._file = path.open("a", buffering=1)

    def write(self, step: int, split: str, values: _Values) -> None:
        self._file.write(_json_line({"step": step, "split": split, **values}))

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


# ------------------------------------------------------------------------------- plotting


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
    _replace(pathlib.Path(workdir) / "loss.png", picture.getvalue())


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
