"""The training step, as arithmetic, and the loop, as a diary.

Enters: a state, an endless iterator of batches, and callables that log, evaluate and save.
Leaves: the state after the last step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from neo_jax import loss as loss_lib
from neo_jax import optimizer, sharding
from neo_jax.checkpoint import Checkpointer
from neo_jax.config import Config
from neo_jax.data.pipeline import Pipeline
from neo_jax.metrics import Throughput, Writer
from neo_jax.model import NeoLM
from neo_jax.state import Params, TrainState

Graph = nnx.GraphDef[NeoLM]
# inputs, targets int32 [batch, seq]; weights float32 [batch, seq]; where documents are
# isolated also segment_ids and positions, int32 [batch, seq].
Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]


def batch_loss(
    params: Params, graph: Graph, config: Config, batch: Batch
) -> loss_lib.LossSums:
    """Sums of the losses of one batch; nothing is averaged here."""
    model = nnx.merge(graph, params)
    hidden = model.hidden(
        batch["inputs"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
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


def gradients(
    params: Params, graph: Graph, config: Config, batch: Batch
) -> tuple[Params, loss_lib.LossSums]:
    """Gradients of the mean loss, and the mean losses.

    With `accumulation_steps` the batch passes in slices. Losses, gradients and weights are
    summed over the slices and divided once, so that slices with more padding count for less
    and the result is that of the whole batch.
    """
    total_weight = jnp.maximum(jnp.sum(batch["weights"]), 1)

    def add_slice(
        carry: tuple[Params, loss_lib.LossSums], part: Batch
    ) -> tuple[tuple[Params, loss_lib.LossSums], None]:
        return jax.tree.map(jnp.add, carry, slice_gradients(part)), None

    def slice_gradients(part: Batch) -> tuple[Params, loss_lib.LossSums]:
        def loss(params: Params) -> tuple[Array, loss_lib.LossSums]:
            sums = batch_loss(params, graph, config, part)
            # Dividing here keeps bfloat16 gradients in range; it is linear.
            return sums.loss / total_weight, sums

        return jax.grad(loss, has_aux=True)(params)

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
    return grads, loss_lib.LossSums(*(total / total_weight for total in sums))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graph: Graph,
    config: Config,
    tx: optax.GradientTransformationExtraArgs,
) -> tuple[TrainState, Metrics]:
    """One update.

    Returns:
      The new state, and scalars: `loss` (mean cross-entropy in nats), `grad_norm` (before
      clipping), `learning_rate` (of this update).
    """
    grads, losses = gradients(state.params, graph, config, batch)
    grad_norm = optimizer.global_norm(grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, grad_norm=grad_norm)
    schedule = optimizer.schedule(config.optimizer, config.train.num_steps)
    metrics = {
        "loss": losses.nll,
        "grad_norm": grad_norm,
        "learning_rate": schedule(state.step),
    }
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), metrics


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, global_rows: int) -> Batch:
    """This host's rows of a batch, as arrays over the whole mesh."""
    return {
        key: jax.make_array_from_process_local_data(
            sharding.batch_sharding(mesh, (global_rows, rows.shape[1])),
            rows,
            (global_rows, rows.shape[1]),
        )
        for key, rows in batch.items()
    }


def run(
    state: TrainState,
    *,
    graph: Graph,
    config: Config,
    tx: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    data: Pipeline,
    writer: Writer,
    checkpointer: Checkpointer,
    throughput: Throughput,
    evaluate: Callable[[Params], dict[str, float]],
) -> TrainState:
    """Trains from `state.step` to `train.num_steps`.

    Args:
      state: donated.
      graph: structure of the model.
      config: the whole experiment.
      tx: the optimiser that made `state.opt_state`.
      mesh: where everything lies.
      data: batches of this host, at the state's position.
      writer: takes a line every `train.log_every` steps.
      checkpointer: takes the state every `checkpoint.every` steps, and at the end.
      throughput: is told of every step.
      evaluate: parameters → metrics of the held-out text; called every `eval.every` steps.
    """
    num_steps = config.train.num_steps
    tokens_per_step = config.data.batch_size * config.data.seq_len
    first = int(state.step)
    step_fn = jax.jit(
        functools.partial(train_step, graph=graph, config=config, tx=tx), donate_argnums=0
    )
    in_flight: tuple[int, Metrics] | None = None

    def finish() -> None:
        """Waits for the step in flight and logs it."""
        nonlocal in_flight
        if in_flight is None:
            return
        done, metrics = in_flight
        in_flight = None
        fetched = jax.device_get(metrics)
        # The step that compiled says nothing about speed.
        if done > first + 1:
            throughput.step(tokens_per_step)
        if done % config.train.log_every == 0 or done in (first + 1, num_steps):
            line = {**fetched, "tokens": done * tokens_per_step, **throughput.rates()}
            writer.write(done, "train", line)
        writer.advance(done)

    for step in range(first, num_steps):
        batch = place_batch(next(data), mesh, config.data.batch_size)
        if step == first:
            with throughput.pause("compile"):
                state, metrics = jax.block_until_ready(step_fn(state, batch))
        else:
            state, metrics = step_fn(state, batch)
        # The step before this one is looked at now, while this one runs: the device never
        # waits for Python.
        finish()
        in_flight = step + 1, metrics

        # Evaluation comes before saving: a run killed in between repeats both or neither.
        if config.eval.every and (step + 1) % config.eval.every == 0 and step + 1 < num_steps:
            finish()
            with throughput.pause("eval"):
                writer.write(step + 1, "eval", evaluate(state.params))
            writer.plot()
        if (step + 1) % config.checkpoint.every == 0 or step + 1 == num_steps:
            finish()
            with throughput.pause("save"):
                checkpointer.save(step + 1, state, data.state(), config)
    finish()
    return state
