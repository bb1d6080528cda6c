"""The training step, as arithmetic, and the loop, as a diary.

Enters: a state, an endless iterator of batches, and callables that log, evaluate and save.
Leaves: the state after the last step.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Num

from neo_jax import lora, optimizer, sharding, trainable, xla_flags
from neo_jax import loss as loss_lib
from neo_jax.checkpoint import Checkpointer
from neo_jax.config import Config
from neo_jax.data.pipeline import Pipeline
from neo_jax.metrics import Throughput, Writer
from neo_jax.model import NeoLM, compute_dtype
from neo_jax.state import Params, TrainState
from neo_jax.watch import HangWatch, Preempted, Preemption

Graph = nnx.GraphDef[NeoLM]
# inputs, targets int32 [batch, seq]; weights float32 [batch, seq]; where documents are
# isolated also segment_ids and positions, int32 [batch, seq]. Tasks with examples instead of
# text have arrays of their own, whose first dimension is the batch, too.
Batch = Mapping[str, Array]
DROPOUT = "dropout_keys"  # of a batch: uint32 [batch, 2]; only while training drops something
Metrics = dict[str, Num[Array, ""]]


@runtime_checkable
class LossFunction(Protocol):
    """What a task learns: sums of the losses of a batch, each row times its weight.

    Nothing is averaged in it; `weights` of the batch, summed, is what others divide by.
    """

    def __call__(self, model: NeoLM, config: Config, batch: Batch) -> loss_lib.LossSums: ...


def next_token_loss(model: NeoLM, config: Config, batch: Batch) -> loss_lib.LossSums:
    """Of a language model: cross-entropy of each token given those before it."""
    hidden = model.hidden(
        batch["inputs"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        dropout_keys=batch.get(DROPOUT),
    )
    return loss_lib.cross_entropy(
        hidden,
        model.head,
        batch["targets"],
        batch["weights"],
        vocab_size=config.model.vocab_size,
        z_loss=config.loss.z_loss,
        block_size=config.loss.block_size,
    )


def batch_loss(
    params: Params,
    graph: Graph,
    config: Config,
    batch: Batch,
    loss: LossFunction = next_token_loss,
) -> loss_lib.LossSums:
    """The loss of a model that is given as its parameters and its structure."""
    return loss(nnx.merge(graph, params), config, batch)


def compute_params(params: Params, born: nnx.State, config: Config) -> Params:
    """Parameters as the layers take them: kernels in the type of the computation.

    They are cast once a step and where they lie, so that half the bytes travel when a
    layer's are gathered. LayerNorms stay in their own precision, and the embedding is cast
    where it is used, so that the head's gradient is a float32 sum over many tokens.

    Args:
      params: as the optimiser keeps them; all of a model's, or a part.
      born: all of the model's as Params that know the names of their dimensions.
    """
    born = sharding.restricted(born, params)
    dtype = compute_dtype(config.model)

    def cast(path: Any, x: Array) -> Array:
        keys = [key.key for key in path]
        is_kernel = (keys[0], keys[-1]) == ("blocks", "kernel") and x.dtype != jnp.int8
        return x.astype(dtype) if is_kernel else x

    cast_params = jax.tree_util.tree_map_with_path(cast, params)
    where_they_lie = sharding.constrain_params(cast_params, born, gathered=False)
    if config.train.gather_weights == "layer" or "blocks" not in params:
        return where_they_lie
    return {
        **where_they_lie,
        "blocks": sharding.constrain_params(
            where_they_lie["blocks"], born["blocks"], gathered=True
        ),
    }


def gradients(
    params: Params,
    graph: Graph,
    config: Config,
    batch: Batch,
    loss: LossFunction = next_token_loss,
    frozen: Params | None = None,
) -> tuple[Params, loss_lib.LossSums]:
    """Gradients of the mean loss, and the mean losses.

    Args:
      params: those to learn.
      frozen: the model's others, which get no gradients.

    With `accumulation_steps` the batch passes in slices. Losses, gradients and weights are
    summed over the slices and divided once, so that slices with more padding count for less
    and the result is that of the whole batch.
    """
    total_weight = jnp.maximum(jnp.sum(batch["weights"]), 1)
    # It knows the names of every dimension.
    born = nnx.state(nnx.merge(graph, trainable.join(params, frozen or {})))
    weights = compute_params(params, born, config)
    fixed = compute_params(frozen or {}, born, config)

    def add_slice(
        carry: tuple[Params, loss_lib.LossSums], part: Batch
    ) -> tuple[tuple[Params, loss_lib.LossSums], None]:
        return jax.tree.map(jnp.add, carry, slice_gradients(part)), None

    def slice_gradients(part: Batch) -> tuple[Params, loss_lib.LossSums]:
        def mean_loss(weights: Params) -> tuple[Array, loss_lib.LossSums]:
            sums = batch_loss(trainable.join(weights, fixed), graph, config, part, loss)
            # Dividing here keeps bfloat16 gradients in range; it is linear.
            return sums.loss / total_weight, sums

        grads, sums = jax.grad(mean_loss, has_aux=True)(weights)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        own = sharding.restricted(born, params)
        return sharding.constrain_params(grads, own, gathered=False), sums

    slices = config.train.accumulation_steps
    if slices == 1:
        grads, sums = slice_gradients(batch)
    else:
        # Every slice takes each `slices`-th sequence: each device keeps to its own rows.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, slices, *x.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = jax.tree.map(
            lambda shape: jnp.zeros(shape.shape, shape.dtype),
            jax.eval_shape(slice_gradients, jax.tree.map(lambda x: x[0], parts)),
        )
        (grads, sums), _ = jax.lax.scan(add_slice, zeros, parts)
    return grads, jax.tree.map(lambda total: total / total_weight, sums)


def train_step(
    state: TrainState,
    batch: Batch,
    frozen: Params | None = None,
    *,
    graph: Graph,
    config: Config,
    tx: optax.GradientTransformationExtraArgs,
    loss: LossFunction = next_token_loss,
) -> tuple[TrainState, Metrics]:
    """One update, or none where the loss or the gradients are a spike.

    Args:
      state: of the parameters that are learned.
      batch: rows of all hosts.
      frozen: the model's other parameters.
      graph: the model's structure.
      config: the whole experiment.
      tx: the optimiser.
      loss: what the task learns.

    Returns:
      The new state, and scalars: `loss` (mean cross-entropy in nats), the task's own,
      `grad_norm` (before clipping), `learning_rate` (of this update), and the counters of
      `optimizer.Spikes`.
    """
    if config.model.lora_dropout:
        rows = batch["weights"].shape[0]
        batch = {**batch, DROPOUT: lora.row_keys(config.train.seed, state.step, rows)}
    grads, losses = gradients(state.params, graph, config, batch, loss, frozen)
    grad_norm = optimizer.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, grad_norm=grad_norm)
    params = optax.apply_updates(state.params, updates)
    skip, spikes = optimizer.judge(state.spikes, losses.nll, grad_norm, config.optimizer)

    # A select, not a branch: it is fused into the update, and costs nothing beside it.
    def unless_skipped(new: Array, old: Array) -> Array:
        return jnp.where(skip, old, new)

    schedule = optimizer.schedule(config.optimizer, config.train.num_steps)
    metrics = {
        "loss": losses.nll,
        **losses.extras,
        "grad_norm": grad_norm,
        # The optimiser counts its own updates.
        "learning_rate": schedule(state.step - state.spikes.skipped),
        "skipped": spikes.skipped,
        "skipped_in_a_row": spikes.skipped_in_a_row,
        "non_finite": spikes.non_finite,
    }
    return TrainState(
        step=state.step + 1,
        params=jax.tree.map(unless_skipped, params, state.params),
        opt_state=jax.tree.map(unless_skipped, opt_state, state.opt_state),
        spikes=spikes,
    ), metrics


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, global_rows: int) -> Batch:
    """This host's rows of a batch, as arrays over the whole mesh.

    Its rows fill the places on its own devices in order; where those are no one piece of the
    batch, the arrays hold the batch's rows in another order, on all hosts alike.
    """
    own_places = sharding.rows_by_process(mesh, global_rows)[jax.process_index()]

    def place(rows: np.ndarray) -> Array:
        shape = (global_rows, *rows.shape[1:])

        def part(at: tuple[slice, ...] | None) -> np.ndarray:
            assert at is not None
            own = np.searchsorted(own_places, np.arange(*at[0].indices(global_rows)))
            return rows[own][:, *at[1:]]

        return jax.make_array_from_callback(shape, sharding.batch_sharding(mesh, shape), part)

    return {key: place(rows) for key, rows in batch.items()}


ROLLED_BACK = "rolled back"  # begins the reason of such a jump of the data


class RollBack(Exception):
    """Too many updates in a row were left out.

    Attributes:
      step: the last of them.
      position: of the data after it, in sequences.
    """

    def __init__(self, step: int, position: int, skipped: int) -> None:
        super().__init__(f"{skipped} updates in a row were left out, the last at step {step}")
        self.step, self.position = step, position


class NotFinite(Exception):
    """A loss or a gradient is not finite, and `optimizer.skip_spikes` is off.

    Attributes:
      step: whose update was not made.
      params, batch: that led to it.
    """

    def __init__(self, step: int, params: Params, batch: Batch) -> None:
        super().__init__(f"loss or gradients of step {step} are not finite")
        self.step, self.params, self.batch = step, params, batch


@dataclasses.dataclass(frozen=True)
class _InFlight:
    """A step that was dispatched, and whose numbers nobody looked at yet."""

    step: int
    metrics: Metrics
    batch: Batch
    position: int  # of the data after its batch, in sequences

    @property
    def is_done(self) -> bool:
        return bool(self.metrics["loss"].is_ready())  # type: ignore[attr-defined]


class Verdict(NamedTuple):
    """What the evaluations so far say: the last was the best; it is time to end."""

    save: bool
    stop: bool


@dataclasses.dataclass(kw_only=True)
class Loop:
    """Trains from `state.step` to `train.num_steps`, or until `verdict` says so.

    Attributes:
      state: where it starts, donated; and where it is.
      frozen: parameters that are not learned.
      graph: structure of the model.
      config: the whole experiment.
      tx: the optimiser that made `state.opt_state`.
      loss: what the task learns.
      mesh: where everything lies.
      data: batches of this host, at the state's position.
      writer: takes a line every `train.log_every` steps.
      checkpointer: takes the state when it is due, and at the end.
      throughput: is told of every step.
      preemption: is asked after every step whether to save and leave.
      hang_watch: is told of every step.
      evaluate: parameters → metrics of the held-out text; called every `eval.every` steps.
        It raises Preempted where it is broken off.
      figure: the one of those metrics that tells better from worse.
      verdict: asked at the start and after every evaluation.
      evaluate_first: the state was saved in a hurry, and is due to be evaluated.
    """

    state: TrainState
    frozen: Params
    graph: Graph
    config: Config
    tx: optax.GradientTransformationExtraArgs
    loss: LossFunction
    mesh: Mesh
    data: Pipeline
    writer: Writer
    checkpointer: Checkpointer
    throughput: Throughput
    preemption: Preemption
    hang_watch: HangWatch
    evaluate: Callable[[Params], dict[str, float]]
    figure: Callable[[Mapping[str, float]], float]
    verdict: Callable[[], Verdict]
    evaluate_first: bool

    def __post_init__(self) -> None:
        config = self.config
        self._first = int(self.state.step)
        self._step = jax.jit(
            functools.partial(
                train_step, graph=self.graph, config=config, tx=self.tx, loss=self.loss
            ),
            donate_argnums=0,
            compiler_options=xla_flags.options(sharding.target(), slices=config.mesh.slices),
        )
        self._in_flight: _InFlight | None = None
        self._in_a_row = int(self.state.spikes.skipped_in_a_row)
        jumps = self.data.jumps()
        self._rollbacks = sum(jump["reason"].startswith(ROLLED_BACK) for jump in jumps)

    def run(self) -> TrainState:
        """The diary.

        Returns:
          The state after the last step.

        Raises:
          Preempted: the state is saved, and the machine is wanted back.
          RollBack: `train.rollback_after` updates in a row were left out.
          NotFinite: as its name says, with skipping off.
          CheckpointError: the state cannot be saved.
        """
        num_steps = self.config.train.num_steps
        judged = self.verdict() if self._first else Verdict(save=False, stop=False)
        if self.evaluate_first:
            _, judged = self._score(self._first)
        overdue = False
        for done in range(self._first + 1, num_steps + 1):
            if judged.stop:
                self.writer.say(f"step {done - 1}: it gets no better, and ends here")
                break
            self._begin(done)
            leaving = self.preemption.reached()
            held_out_loss = None
            # Evaluation comes before saving: a run killed in between repeats both or neither.
            # Who is told to leave has no time for it, and evaluates when it is back.
            if evaluation_due(self.config, done) and not leaving:
                self._finish()
                try:
                    held_out_loss, judged = self._score(done)
                except Preempted:
                    leaving = True
            is_last = done == num_steps or judged.stop
            overdue |= self.checkpointer.due(done)
            overdue |= held_out_loss is not None and judged.save
            if overdue or is_last or leaving:
                self._finish()
                # Amid spikes the parameters may be what is wrong: better an earlier one.
                if not self._in_a_row or is_last or leaving:
                    overdue = False
                    with self.throughput.pause("save"), self.hang_watch.pause():
                        self._save(done, held_out_loss)
            if leaving:
                self.checkpointer.wait()
                raise Preempted(self.checkpointer.latest_step())
        self._finish()
        return self.state

    def _begin(self, step: int) -> None:
        """Dispatches a step, and looks at the one before it while this one runs.

        So the device never waits for Python.
        """
        self.hang_watch.step(step)
        batch = self._next_batch()
        if step == self._first + 1:
            with self.throughput.pause("compile"), self.hang_watch.pause():
                self.state, metrics = jax.block_until_ready(
                    self._step(self.state, batch, self.frozen)
                )
                # Compiled now, not at a save.
                is_finite((self.state.params, self.state.opt_state))
        else:
            self.state, metrics = self._step(self.state, batch, self.frozen)
        self._finish()
        self._in_flight = _InFlight(step, metrics, batch, self.data.position)
        self.checkpointer.check()

    def _next_batch(self) -> Batch:
        """The device may still be busy: only when it is not, waiting costs anything."""
        began = time.monotonic()
        rows = next(self.data)
        if self._in_flight is None or self._in_flight.is_done:
            self.throughput.waited_for_data(time.monotonic() - began)
        return place_batch(rows, self.mesh, self.config.data.batch_size)

    def _finish(self) -> None:
        """Waits for the step in flight, logs it, and judges what it says."""
        if self._in_flight is None:
            return
        last, self._in_flight = self._in_flight, None
        config = self.config
        fetched = jax.device_get(last.metrics)
        in_a_row = self._in_a_row = int(fetched.pop("skipped_in_a_row"))
        # The step that compiled says nothing about speed.
        if last.step > self._first + 1:
            self.throughput.step(last.batch["inputs"].size)
        is_end = last.step in (1, config.train.num_steps)
        if last.step % config.train.log_every == 0 or is_end or in_a_row:
            line = {
                **fetched,
                **self.data.tokens_until(last.step),
                "rollbacks": self._rollbacks,
                **self.throughput.rates(),
                "elapsed_seconds": self.throughput.elapsed(),
            }
            self.writer.write(last.step, "train", line)
        self.writer.advance(last.step)
        if not in_a_row:
            return
        if not config.optimizer.skip_spikes:
            raise NotFinite(last.step, self.state.params, last.batch)
        self.writer.say(
            f"step {last.step}: update left out, loss {fetched['loss']:.4g}, "
            f"gradient norm {fetched['grad_norm']:.4g}"
        )
        if in_a_row == config.train.rollback_after:
            raise RollBack(last.step, last.position, in_a_row)

    def _score(self, step: int) -> tuple[float, Verdict]:
        with self.throughput.pause("eval"), self.hang_watch.pause():
            scores = self.evaluate(self.state.params)
        self.writer.write(step, "eval", scores)
        self.writer.plot()
        self.writer.flush()
        return self.figure(scores), self.verdict()

    def _save(self, step: int, held_out_loss: float | None) -> None:
        if not is_finite((self.state.params, self.state.opt_state)):
            self.writer.say(f"step {step}: not saved, since its state is not finite")
            return
        self.writer.flush()  # a checkpoint's metrics outlive the machine, too
        totals = self.throughput.totals()
        self.writer.goodput(step, totals)
        self.checkpointer.save(
            step,
            self.state,
            self.data.state(),
            self.config,
            score=held_out_loss,
            seconds=totals,
        )


def evaluation_due(config: Config, step: int) -> bool:
    """Whether the loop evaluates after this step; after the last, its caller does."""
    every = config.eval.every
    return bool(every) and step % every == 0 and step < config.train.num_steps


def is_finite(tree: Any) -> bool:
    """Whether all values of all float arrays are."""
    return bool(_all_finite([x for x in jax.tree.leaves(tree) if x.dtype != jnp.int32]))


@jax.jit
def _all_finite(arrays: list[Array]) -> Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in arrays]))
