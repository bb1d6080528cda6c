"""Pre-training: from a config and an empty or half-filled workdir to a summary.

Enters: `task = "pretrain"`. Leaves: a trained checkpoint, held-out scores and a sample of
text. Everything that can be refused is refused before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from neo_jax import checkpoint, diagnose, optimizer, sharding, state, tokenizer, train
from neo_jax import config as config_lib
from neo_jax.checkpoint import Checkpointer
from neo_jax.checkpoint.restoring import agree, tell
from neo_jax.config import Config, ConfigError
from neo_jax.data import pipeline, sources
from neo_jax.evaluate import in_loop, perplexity
from neo_jax.generate import Generator, Options
from neo_jax.metrics import Throughput, Writer, flops_per_token, peak_flops, read_metrics
from neo_jax.state import Params, TrainState
from neo_jax.train import Batch, NotFinite, RollBack
from neo_jax.watch import HangWatch, Preemption

_MOST_ROLLBACKS = 3  # to one checkpoint


def run(config: Config, workdir: pathlib.Path) -> None:
    """Trains, evaluates and samples, from the workdir's newest checkpoint if it has one.

    Raises:
      ConfigError: the config, the data, the workdir or the machine do not allow it.
      Preempted: the machine is wanted back; the state is saved.
      DivergedError: the loss is not finite, or stays a spike wherever it is taken up.
    """
    with Preemption() as preemption:
        pretraining = Pretraining(config, workdir, preemption)
        with jax.set_mesh(pretraining.mesh), Checkpointer(workdir, config.checkpoint) as saved:
            pretraining.finish(pretraining.train(saved), saved)


class DivergedError(Exception):
    """Training cannot go on by itself; the message says where and what to look at."""


class Pretraining:
    """What a run holds: mesh, model, optimiser, tokenizer, text, and where its results go."""

    def __init__(self, config: Config, workdir: pathlib.Path, preemption: Preemption) -> None:
        self.config, self.workdir, self.preemption = config, workdir, preemption
        self.mesh = sharding.make_mesh(config.mesh)
        self.tx = optimizer.build(config.optimizer, config.train.num_steps)
        self.graph, _ = state.model_graph(config.model)
        self.abstract = state.abstract(config.model, self.mesh, self.tx)
        sharding.batch_sharding(self.mesh, (config.data.batch_size, config.data.seq_len))
        preflight(config, self.abstract)
        open_workdir(config, workdir)
        self.tokenizer = _load_tokenizer(config, workdir)
        share = sharding.host_share(self.mesh, config.data.batch_size)
        self.data = pipeline.build(
            config.data,
            self.tokenizer,
            seed=config.train.seed,
            split="train",
            process_index=share[0],
            process_count=share[1],
        )
        self.held_out = _held_out(config, self.tokenizer)
        self.benchmarks = in_loop.Benchmarks(
            config.eval, config.model, self.mesh, self.tokenizer
        )
        self.throughput = Throughput(
            flops_per_token=flops_per_token(config.model, config.data.seq_len),
            peak_flops=peak_flops(self.mesh.devices.flat[0].device_kind),
            num_devices=self.mesh.size,
        )
        self._sum_losses = jax.jit(self._batch_sums)

    def train(self, saved: Checkpointer) -> TrainState:
        """Runs the loop to its end, from a fresh state or the newest good checkpoint.

        Too many spikes in a row are another start from there, with other data.
        """
        current = self._start(saved, _elapsed_seconds(self.workdir))
        write_config(self.config, self.workdir)  # nothing is refused from here on
        rolled_back_to: list[int] = []
        while True:
            try:
                return self._run(current, saved)
            except NotFinite as error:
                where = diagnose.first_not_finite(
                    error.params, self.graph, self.config, error.batch
                )
                raise DivergedError(f"{error}: {where}; the update was not made.") from None
            except RollBack as error:
                # Without its traceback, which would keep the old state in memory.
                cause = error.with_traceback(None)
            current = self._roll_back(saved, cause)
            step = int(current.step)
            rolled_back_to.append(step)
            if rolled_back_to.count(step) > _MOST_ROLLBACKS:
                raise DivergedError(
                    f"{cause}, and so it was with other data {_MOST_ROLLBACKS} times from "
                    f"step {step}; lower optimizer.learning_rate, or look at the data "
                    f"before sequence {self.data.position}."
                )

    def _run(self, current: TrainState, saved: Checkpointer) -> TrainState:
        config, step = self.config, int(current.step)
        due = train.evaluation_due(config, step) and not _is_logged(self.workdir, step)
        with (
            Writer(self.workdir, config, step) as writer,
            HangWatch(self.workdir / "hangs.txt", writer.say) as hang_watch,
            self.preemption.deferred(),
        ):
            writer.say(self._headline(step))
            return train.run(
                current,
                graph=self.graph,
                config=config,
                tx=self.tx,
                mesh=self.mesh,
                data=self.data,
                writer=writer,
                checkpointer=saved,
                throughput=self.throughput,
                preemption=self.preemption,
                hang_watch=hang_watch,
                evaluate=lambda params: {
                    **self.score(params, config.data.seq_len),
                    **self.benchmarks.score(params),
                },
                evaluate_first=bool(agree(step > 0 and due)),
            )

    def _start(self, saved: Checkpointer, elapsed: float | None = None) -> TrainState:
        """A fresh state, or the newest good checkpoint with the data where it stood.

        Args:
          elapsed: seconds that earlier starts took, lost work included; None within a start.
        """
        with self.throughput.pause("restart"):
            saved.wait()
            step = saved.newest_good()
            meta = {} if step is None else saved.meta(step)
            if step is None or saved.is_params_alone(step):
                self.data.restore({**self.data.state(), "position": 0, "step": 0})
                current = self._fresh(saved, step)
            else:
                current = saved.read(step, self.abstract)
                self.data.restore(meta["data"])
        if elapsed is not None:
            seconds = meta.get("seconds", {})
            kept = sum(v for key, v in seconds.items() if key.endswith("_seconds"))
            self.throughput.resume(seconds, max(0.0, elapsed - kept))
        return current

    def _fresh(self, saved: Checkpointer, step: int | None) -> TrainState:
        """The state before the first step; its parameters may come from somewhere else."""
        config = self.config
        fresh = state.create(config.model, self.mesh, self.tx, config.train.seed)
        if step is not None:
            params = saved.read(step, {"params": self.abstract.params})["params"]
        elif config.train.init_from is not None:
            params = checkpoint.restore_matching(config.train.init_from, fresh.params)
        else:
            return fresh
        return dataclasses.replace(fresh, params=params)

    def _roll_back(self, saved: Checkpointer, error: RollBack) -> TrainState:
        """The last good checkpoint, and the data past all that was met since."""
        jumps = self.data.jumps()  # an earlier one from the same checkpoint among them
        current = self._start(saved)
        first, step = self.data.position, int(current.step)
        self.data.restore({**self.data.state(), "jumps": jumps})
        self.data.skip(
            error.position - first,
            f"{train.ROLLED_BACK} from step {error.step} to {step}",
        )
        tell(
            f"{error}; back to step {step}. The batches of steps {step + 1} … {error.step}, "
            f"sequences {first} … {error.position - 1}, are left out from now on."
        )
        in_a_row = jax.tree.map(jnp.zeros_like, current.spikes.skipped_in_a_row)
        spikes = current.spikes._replace(skipped_in_a_row=in_a_row)
        return dataclasses.replace(current, spikes=spikes)

    def finish(self, current: TrainState, saved: Checkpointer) -> None:
        """Scores the held-out text, writes a sample, and sums the run up."""
        stride = self.config.eval.stride or self.config.data.seq_len
        num_steps = int(current.step)
        with Writer(self.workdir, self.config, num_steps) as writer:
            with self.throughput.pause("eval"):
                scores = self.score(current.params, stride)
                scores |= self.benchmarks.score(current.params)
            # A finished run that is started again is scored again, but logged once.
            if not _is_logged(self.workdir, num_steps):
                writer.write(num_steps, "eval", scores)
            with self.throughput.pause("save"):
                saved.wait()
            sample = self.sample(current.params)
            if sample:
                writer.say(f"\n{'— a sample ':—<72}\n{sample}\n{'':—<72}")
            for line in _beside_references(self.config, scores["bits_per_byte"]):
                writer.say(line)
            writer.plot()
            writer.summary(
                {
                    "step": num_steps,
                    "parameters": state.num_params(self.config.model),
                    **scores,
                    "perplexity": math.exp(scores["loss"]),
                    "held_out_bytes": self.held_out.num_bytes,
                    "stride": stride,
                    "sample": sample,
                    "skipped": int(current.spikes.skipped),
                    "non_finite": int(current.spikes.non_finite),
                    "jumps": self.data.jumps(),
                    **self.throughput.totals(),
                }
            )
            writer.goodput(num_steps, self.throughput.totals())
            writer.say(f"see {self.workdir / 'loss.png'} and {self.workdir / 'summary.json'}")

    def score(self, params: Params, stride: int) -> dict[str, float]:
        """Loss (nats) and bits per byte of the held-out text; see evaluate/perplexity.py.

        Raises:
          Preempted: told to leave in its midst.
        """

        def sum_losses(batch: Mapping[str, np.ndarray]) -> tuple[float, float]:
            self.preemption.leave_if_told()
            nll, weight = self._sum_losses(params, self._place(batch))
            return float(nll), float(weight)

        return perplexity.evaluate(
            self.held_out,
            sum_losses,
            seq_len=self.config.data.seq_len,
            stride=stride,
            batch_size=self._eval_batch_size,
            max_batches=self.config.eval.max_batches,
        )

    def sample(self, params: Params) -> str:
        """`eval.sample_tokens` of text, the prompt before them, within `data.seq_len`."""
        settings, context = self.config.eval, self.config.data.seq_len
        count = min(settings.sample_tokens, context - 1)
        if count == 0:
            return ""
        prompt = [self.tokenizer.eos_id, *self.tokenizer.encode(settings.prompt)]
        prompt = prompt[-(context - count) :]
        options = Options(
            max_new_tokens=count,
            temperature=settings.temperature,
            top_k=settings.top_k,
            eos_token_id=(),  # a document's end is shown, and does not end the sample
            seed=self.config.train.seed,
        )
        generator = Generator(self.config.model, self.graph, params, self.tokenizer)
        (written,) = generator.write([prompt], options)
        return self.tokenizer.decode(prompt[1:] + written.token_ids)

    @property
    def _eval_batch_size(self) -> int:
        return self.config.eval.batch_size or self.config.data.batch_size

    def _place(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Every host has the whole text at hand and gives the mesh its own rows."""
        index, count = sharding.host_share(self.mesh, self._eval_batch_size)
        rows = self._eval_batch_size // count
        first = rows * index
        own = {key: array[first : first + rows] for key, array in batch.items()}
        return train.place_batch(own, self.mesh, self._eval_batch_size)

    def _batch_sums(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums = train.batch_loss(params, self.graph, self.config, batch)
        return sums.nll, batch["weights"].sum()

    def _headline(self, step: int) -> str:
        model, data = state.num_params(self.config.model), self.data
        start = f"resuming after step {step}" if step else "starting"
        return (
            f"{start}: {model:,} parameters on {self.mesh.size} × "
            f"{self.mesh.devices.flat[0].device_kind}; {data.num_documents:,} documents, "
            f"{data.num_bytes:,} bytes, {data.num_tokens:,} tokens to learn from, "
            f"{self.held_out.num_bytes:,} bytes held out"
        )


# -------------------------------------------------------------------- before compiling


def preflight(config: Config, abstract: TrainState) -> None:
    """Refuses a run that the machine has no room for, or no data.

    Raises:
      ConfigError: names the bytes needed and present, of memory and of data, in one line.
    """
    missing = []
    # Gradients live beside the state; activations come on top and are not counted here.
    needed = state.num_bytes(abstract) + state.num_bytes(abstract.params)
    present = _memory_bytes()
    if needed > present:
        missing.append(
            f"parameters, moments and gradients need {needed:,} bytes ({needed / 2**30:.1f} "
            f"GiB) of memory, and this machine has {present:,} ({present / 2**30:.1f} GiB): "
            f"use more devices, or fewer layers (--config.model.num_layers=…)"
        )
    try:
        sources.preflight(config.data)
    except ConfigError as error:
        missing.append(str(error))
    if missing:
        raise ConfigError("; ".join(missing))


def _memory_bytes() -> int:
    """Of all devices; on a CPU, of the machine."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        own = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return own * jax.process_count()
    return len(devices) * int((devices[0].memory_stats() or {})["bytes_limit"])


def open_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Creates the workdir, or checks that the run in it is this one.

    Raises:
      ConfigError: it cannot be written, or holds a run of another model or data.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise ConfigError(
            f"--workdir {workdir} cannot be written: {error.strerror}; choose another."
        ) from None
    _refuse_separate_folders(workdir)
    path = workdir / "config.json"
    if path.exists():
        _refuse_another_run(config_lib.from_json(path.read_text()), config, workdir)


def _refuse_separate_folders(workdir: pathlib.Path) -> None:
    """Every process writes its part of a checkpoint, so all must see one folder."""
    if jax.process_count() == 1:
        return
    mark = workdir / f".shared.{agree(time.time_ns() % 10**9)}"
    if jax.process_index() == 0:
        mark.touch()
    agree(0)  # the mark is there
    seen = multihost_utils.process_allgather(np.asarray(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        raise ConfigError(
            f"--workdir {workdir} is not one folder for all processes: "
            f"{', '.join(map(str, np.flatnonzero(~seen)))} of {len(seen)} do not see what "
            f"process 0 writes; use a file system that they share."
        )


def write_config(config: Config, workdir: pathlib.Path) -> None:
    """Writes config.json, aside first, so that it is never half there."""
    path = workdir / "config.json"
    if jax.process_index() == 0:
        aside = path.with_suffix(".partial")
        aside.write_text(config_lib.to_json(config))
        os.replace(aside, path)


# How a model is computed may change from one start to the next; what it is may not.
_HOW = (
    "compute_dtype",
    "attention",
    "scan_layers",
    "remat",
    "remat_save",
    "remat_offload",
)


def _refuse_another_run(before: Config, now: Config, workdir: pathlib.Path) -> None:
    old, new = dataclasses.asdict(before.model), dataclasses.asdict(now.model)
    changed = [key for key in old if old[key] != new[key] and key not in _HOW]
    if changed and any((workdir / "checkpoints").glob("*")):
        listed = ", ".join(f"model.{key} {old[key]!r} → {new[key]!r}" for key in changed)
        raise ConfigError(
            f"--workdir {workdir} holds a run of another model ({listed}); "
            f"choose another workdir, or take the change back."
        )


def _elapsed_seconds(workdir: pathlib.Path) -> float:
    """Seconds that earlier starts had taken when they last said so.

    Of clocks that only run forwards, so that it does not matter if the machine's is set.
    """
    said = (line.get("elapsed_seconds") for line in read_metrics(workdir))
    return max((seconds for seconds in said if seconds is not None), default=0.0)


def _is_logged(workdir: pathlib.Path, step: int) -> bool:
    """Whether the held-out text was scored at this step, by an earlier start."""
    return any(
        (line["step"], line.get("split")) == (step, "eval") for line in read_metrics(workdir)
    )


def _load_tokenizer(config: Config, workdir: pathlib.Path) -> tokenizer.Tokenizer:
    """The workdir's own, or the one that the config names, which is then kept there."""
    if (workdir / tokenizer.FILE_NAME).exists():
        words = tokenizer.load(str(workdir))
    else:
        words = pipeline.load_tokenizer(config.data)
        if jax.process_index() == 0:
            words.save(workdir)
    if words.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} has {words.vocab_size} ids, more than "
            f"model.vocab_size={config.model.vocab_size}; set the latter to it."
        )
    return words


def _held_out(config: Config, words: tokenizer.Tokenizer) -> perplexity.HeldOut:
    # It is read once, here: workers would take longer to start than to read it.
    data = dataclasses.replace(config.data, num_workers=0)
    source = pipeline.build(data, words, seed=config.train.seed, split="eval")
    batches: Iterator[Mapping[str, np.ndarray]] = source
    held_out = perplexity.HeldOut.collect(batches, source.num_bytes)
    source.close()
    return held_out


def _beside_references(config: Config, bits_per_byte: float) -> Iterator[str]:
    """The final figure in its place among those that the experiment names."""
    if not config.eval.references:
        return
    yield "held-out text, bits per byte:"
    rows = [*config.eval.references, ("this model", bits_per_byte)]
    for name, value in sorted(rows, key=lambda row: -row[1]):
        mark = "→" if name == "this model" else " "
        yield f"  {mark} {value:.3f}  {name}"
