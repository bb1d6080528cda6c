"""A run: what every task shares, from an empty or half-filled workdir to a summary.

Enters: a config, a workdir, and a task, which says what is learned from which data, where the
first parameters come from, and how they are judged. Leaves: a trained checkpoint and
summary.json. Everything that can be refused is refused before anything is compiled.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from neo_jax import (
    checkpoint,
    diagnose,
    optimizer,
    sharding,
    state,
    tokenizer,
    train,
    trainable,
)
from neo_jax import config as config_lib
from neo_jax.checkpoint import Checkpointer
from neo_jax.checkpoint.restoring import agree, tell
from neo_jax.config import Config, ConfigError
from neo_jax.data import pipeline
from neo_jax.data.pipeline import Pipeline
from neo_jax.metrics import Throughput, Writer, flops_per_token, peak_flops, read_metrics
from neo_jax.state import Params, TrainState
from neo_jax.train import Batch, LossFunction, NotFinite, RollBack, Verdict
from neo_jax.watch import HangWatch, Preemption

_MOST_ROLLBACKS = 3  # to one checkpoint


class DivergedError(Exception):
    """Training cannot go on by itself; the message says where and what to look at."""


def start(
    task: Callable[[Config, pathlib.Path, Preemption], Run],
    config: Config,
    workdir: pathlib.Path,
) -> None:
    """Trains, evaluates and sums up, from the workdir's newest checkpoint if it has one.

    Args:
      task: makes the run; a subclass of `Run`.
      config: the whole experiment.
      workdir: where its results are, or will be.

    Raises:
      ConfigError: the config, the data, the workdir or the machine do not allow it.
      Preempted: the machine is wanted back; the state is saved.
      DivergedError: the loss is not finite, or stays a spike wherever it is taken up.
    """
    with Preemption() as preemption:
        run = task(config, workdir, preemption)
        with jax.set_mesh(run.mesh), Checkpointer(workdir, run.config.checkpoint) as saved:
            run.finish(run.train(saved), saved)


class Run(abc.ABC):
    """What a run holds: mesh, model, optimiser, tokenizer, data, and where its results go.

    A task is a subclass. It opens its data and judges parameters; it may say what the loss is
    and where a new run's parameters come from.

    Attributes:
      config: the whole experiment, as resolved.
      mesh: where everything lies.
      graph: structure of the model.
      frozen: parameters that are used and not learned; empty where all are learned.
      tokenizer: of the run, kept in the workdir.
      data: batches of this host.
    """

    loss: ClassVar[LossFunction] = staticmethod(train.next_token_loss)
    # Whether the best checkpoint, by `figure`, is what a run ends with, and not the last.
    ends_with_best: ClassVar[bool] = False

    def __init__(self, config: Config, workdir: pathlib.Path, preemption: Preemption) -> None:
        self.config, self.workdir, self.preemption = config, workdir, preemption
        self.mesh = sharding.make_mesh(config.mesh)
        self.tx = optimizer.build(config.optimizer, config.train.num_steps)
        self.graph, _ = state.model_graph(config.model)
        self.abstract = state.abstract(config.model, self.mesh, self.tx, config.finetune)
        self.frozen: Params = {}
        sharding.batch_sharding(self.mesh, (config.data.batch_size, config.data.seq_len))
        missing = [*self._missing_memory(), *self.missing_data()]
        if missing:
            raise ConfigError("; ".join(missing))
        open_workdir(config, workdir)
        self.tokenizer = self.open_tokenizer()
        self.data = self.open_data()
        self.throughput = Throughput(
            flops_per_token=flops_per_token(
                config.model, config.data.seq_len, config.finetune
            ),
            peak_flops=peak_flops(self.mesh.devices.flat[0].device_kind),
            num_devices=self.mesh.size,
        )

    # ---------------------------------------------------------------- what a task says

    def missing_data(self) -> list[str]:
        """A line for each thing that the data lacks, found without reading it."""
        return []

    def open_tokenizer(self) -> tokenizer.Tokenizer:
        """The workdir's own, or the one that the config names, which is then kept there."""
        return load_tokenizer(self.config, self.workdir)

    @abc.abstractmethod
    def open_data(self) -> Pipeline:
        """This host's batches of what is learned.

        Raises:
          ConfigError: there is none, or it cannot be read.
        """

    def initial_params(self) -> tuple[Params, Params]:
        """The learned and the frozen parameters before the first step, each where it lies."""
        config = self.config
        fresh = state.create_params(
            config.model, self.mesh, config.train.seed, config.finetune
        )
        if config.train.init_from is not None:
            fresh = checkpoint.restore_matching(config.train.init_from, fresh)
        return fresh, {}

    def frozen_params(self) -> Params:
        """The frozen parameters alone, for a run that goes on from a checkpoint."""
        return {}

    @abc.abstractmethod
    def evaluate(self, params: Params, *, final: bool) -> dict[str, float]:
        """Figures of parameters on held-out data, by name.

        Args:
          params: the learned ones.
          final: at the end, and not amid training.

        Raises:
          Preempted: told to leave in its midst.
        """

    def figure(self, scores: Mapping[str, float]) -> float:
        """The figure that tells better from worse; less is better."""
        return scores["loss"]

    def conclude(
        self, params: Params, scores: Mapping[str, float], writer: Writer
    ) -> dict[str, Any]:
        """What a task does once its parameters are final, and what summary.json says of it."""
        del params, writer
        return dict(scores)

    # ------------------------------------------------------------------------- the loop

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
                    trainable.join(error.params, self.frozen),
                    self.graph,
                    self.config,
                    error.batch,
                    type(self).loss,
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
            loop = train.Loop(
                state=current,
                frozen=self.frozen,
                graph=self.graph,
                config=config,
                tx=self.tx,
                loss=type(self).loss,
                mesh=self.mesh,
                data=self.data,
                writer=writer,
                checkpointer=saved,
                throughput=self.throughput,
                preemption=self.preemption,
                hang_watch=hang_watch,
                evaluate=lambda params: self.evaluate(params, final=False),
                figure=self.figure,
                verdict=self._verdict,
                evaluate_first=bool(agree(step > 0 and due)),
            )
            return loop.run()

    def _verdict(self) -> Verdict:
        """Whether the last evaluation was the best, and whether it is time to end.

        It is read from the metrics, so that a run that was killed judges as it would have.
        """
        patience = self.config.finetune.patience
        if not self.ends_with_best and not patience:
            return Verdict(save=False, stop=False)
        figures = [
            self.figure(line)
            for line in read_metrics(self.workdir)
            if line.get("split") == "eval"
        ]
        since_best = len(figures) - 1 - int(np.argmin(figures)) if figures else 0
        return Verdict(
            save=bool(agree(self.ends_with_best and bool(figures) and since_best == 0)),
            stop=bool(agree(0 < patience <= since_best)),
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
                self.frozen = self.frozen or self.frozen_params()
        if elapsed is not None:
            seconds = meta.get("seconds", {})
            kept = sum(v for key, v in seconds.items() if key.endswith("_seconds"))
            self.throughput.resume(seconds, max(0.0, elapsed - kept))
        return current

    def _fresh(self, saved: Checkpointer, step: int | None) -> TrainState:
        """The state before the first step; its parameters may come from somewhere else."""
        if step is None:
            params, self.frozen = self.initial_params()
        else:
            params = saved.read(step, {"params": self.abstract.params})["params"]
            self.frozen = self.frozen_params()
        return state.begin(params, self.abstract, self.tx)

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

    # -------------------------------------------------------------------------- the end

    def finish(self, current: TrainState, saved: Checkpointer) -> None:
        """Judges the final parameters, lets the task use them, and sums the run up."""
        num_steps, params = int(current.step), current.params
        with Writer(self.workdir, self.config, num_steps) as writer:
            with self.throughput.pause("eval"):
                scores = self.evaluate(params, final=True)
            # A finished run that is started again is scored again, but logged once.
            if not _is_logged(self.workdir, num_steps):
                writer.write(num_steps, "eval", scores)
            with self.throughput.pause("save"):
                saved.wait()
            best = saved.best() if self.ends_with_best else None
            at_best = {} if best is None else {"best_step": num_steps}
            if best is not None and best[1] < self.figure(scores):
                writer.say(f"the best checkpoint is that of step {best[0]}")
                at_best = {"best_step": best[0]}
                params = saved.read(best[0], {"params": self.abstract.params})["params"]
                with self.throughput.pause("eval"):
                    scores = self.evaluate(params, final=True)
            own = self.conclude(params, scores, writer)
            writer.plot()
            writer.summary(
                {
                    "step": num_steps,
                    "parameters": state.num_params(self.config.model),
                    **own,
                    **at_best,
                    "skipped": int(current.spikes.skipped),
                    "non_finite": int(current.spikes.non_finite),
                    "jumps": self.data.jumps(),
                    **self.throughput.totals(),
                }
            )
            writer.goodput(num_steps, self.throughput.totals())
            writer.say(f"see {self.workdir / 'loss.png'} and {self.workdir / 'summary.json'}")

    def whole(self, params: Params) -> Params:
        """All of the model's parameters, the frozen ones with the learned ones."""
        return trainable.join(params, self.frozen)

    @property
    def eval_batch_size(self) -> int:
        """Rows of the batches that are judged."""
        return self.config.eval.batch_size or self.config.data.batch_size

    def place(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Every host has all of the held-out data at hand and gives its devices their rows."""

        def place(array: np.ndarray) -> jax.Array:
            rows = sharding.batch_sharding(self.mesh, array.shape)
            return jax.make_array_from_callback(array.shape, rows, lambda at: array[at])

        return {key: place(array) for key, array in batch.items()}

    def _headline(self, step: int) -> str:
        model = state.num_params(self.config.model)
        start = f"resuming after step {step}" if step else "starting"
        learned = sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))
        some = f", {learned:,} of them learned," if self.frozen else ""
        return (
            f"{start}: {model:,} parameters{some} on {self.mesh.size} × "
            f"{self.mesh.devices.flat[0].device_kind}; {self.describe_data()}"
        )

    def describe_data(self) -> str:
        """How much there is to learn from, and to be judged by, in a few words."""
        return f"{self.data.num_documents:,} examples to learn from"

    def _missing_memory(self) -> list[str]:
        """A line where parameters, moments and gradients do not fit into this machine."""
        # Gradients live beside the state; activations come on top and are not counted here.
        _, frozen = trainable.divide(
            state.abstract_params(self.config.model, self.mesh), self.config.finetune
        )
        needed = sum(map(state.num_bytes, (self.abstract, self.abstract.params, frozen)))
        present = _memory_bytes()
        if needed <= present:
            return []
        return [
            f"parameters, moments and gradients need {needed:,} bytes ({needed / 2**30:.1f} "
            f"GiB) of memory, and this machine has {present:,} ({present / 2**30:.1f} GiB): "
            f"use more devices, or fewer layers (--config.model.num_layers=…)"
        ]


# ------------------------------------------------------------------------- the workdir


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


def load_tokenizer(config: Config, workdir: pathlib.Path) -> tokenizer.Tokenizer:
    """The workdir's own, or the one that the config names, which is then kept there."""
    if (workdir / tokenizer.FILE_NAME).exists():
        words = tokenizer.load(str(workdir))
    else:
        words = pipeline.load_tokenizer(config.data)
    return keep_tokenizer(words, config, workdir)


def keep_tokenizer(
    words: tokenizer.Tokenizer, config: Config, workdir: pathlib.Path
) -> tokenizer.Tokenizer:
    """Puts a tokenizer into the workdir, where evaluation and export find it.

    Raises:
      ConfigError: it has more ids than the model.
    """
    if words.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} has {words.vocab_size} ids, more than "
            f"model.vocab_size={config.model.vocab_size}; set the latter to it."
        )
    if jax.process_index() == 0 and not (workdir / tokenizer.FILE_NAME).exists():
        words.save(workdir)
    return words
