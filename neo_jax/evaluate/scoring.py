"""Log-likelihoods of tokens after others, for many requests at once, on any mesh.

Enters: a model, its parameters, and requests: tokens of which the last are scored. Leaves:
for each request the sum of its scored tokens' log-probabilities in nats, and whether each
of them was the likeliest. Logits exist for scored tokens alone.

Every host is given the same requests and returns the same scores; a request's score does
not depend on what is computed beside it.

Shapes: B rows, T positions, D embed, V vocab (padded), S shards of the batch, P positions of
a shard, Q scored tokens of a shard, K blocks of them, C tokens of a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neo_jax import sharding, state, xla_flags
from neo_jax.config import ModelConfig
from neo_jax.evaluate import batching
from neo_jax.evaluate.batching import Batch, Request
from neo_jax.model import NeoLM
from neo_jax.sharding import constrain
from neo_jax.state import Params

# Tokens of a batch on one device: on a CPU few, whose activations stay near its cores; on
# accelerators as many as keep them busy without much memory. A choice, not a measurement.
_TOKENS_PER_DEVICE = {"cpu": 1024}
_TOKENS_PER_ACCELERATOR = 32768
# About how many floating-point operations take as long as compiling one more shape.
_FLOPS_PER_PROGRAM = {"cpu": 2e11}
_FLOPS_PER_ACCELERATOR_PROGRAM = 1e15


class Score(NamedTuple):
    """Of a request.

    Attributes:
      loglikelihood: natural logarithm of the probability of its scored tokens.
      is_greedy: each of them is the likeliest after those before.
      num_greedy: how many of them are, up to the first that is not: what greedy decoding
        would write verbatim.
    """

    loglikelihood: float
    is_greedy: bool
    num_greedy: int


# What everything in this room asks of a model.
ScoreRequests: TypeAlias = Callable[[Sequence[Request]], list[Score]]


class Scorer:
    """Scores requests under one model's shape, on one mesh, for any of its parameters.

    Attributes:
      max_seq_len: tokens that the model can read; a request may have one more.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ):
        """See the class.

        Args:
          config: of the model.
          mesh: over which its parameters are spread, and batches will be.
          batch_size: rows of a batch; left out, as many as suit their length.
          show_progress: a bar on process 0.
        """
        self.config, self.mesh, self.max_seq_len = config, mesh, config.max_seq_len
        self._batch_size = batch_size
        self._show_progress = show_progress and jax.process_index() == 0
        graph, _ = state.model_graph(config)
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._run = jax.jit(
            functools.partial(_log_probs, graph),
            static_argnames="block",
            out_shardings=everywhere,
            compiler_options=xla_flags.forward_options(config, sharding.target()),
        )
        self._shards = math.prod(mesh.shape[axis] for axis in sharding.TABLE["batch"] or ())

    def score(self, params: Params, requests: Sequence[Request]) -> list[Score]:
        """The score of each request, in their order.

        Raises:
          ValueError: a request that scores nothing, has nothing before what it scores, or
            is longer than the model can read.
        """
        for request in requests:
            self._check(request)
        if not requests:
            return []
        sums = np.zeros(len(requests))
        scored = np.array([request.num_scored for request in requests])
        greedy = scored.copy()
        for batch, log_probs, is_best in self._results(params, requests):
            real = batch.owners >= 0
            owners = batch.owners[real]
            np.add.at(sums, owners, log_probs[real].astype(np.float64))
            missed = real & ~is_best
            np.minimum.at(greedy, batch.owners[missed], batch.ranks[missed])
        return [
            Score(float(nats), bool(leading == num), int(leading))
            for nats, leading, num in zip(sums, greedy, scored, strict=True)
        ]

    def _check(self, request: Request) -> None:
        total, scored = len(request.tokens), request.num_scored
        if not 1 <= scored < total <= self.max_seq_len + 1:
            raise ValueError(
                f"a request of {total} tokens that scores {scored} of them: it must score at "
                f"least one, have one before, and hold at most {self.max_seq_len + 1}."
            )

    def _results(
        self, params: Params, requests: Sequence[Request]
    ) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """Each batch with its results, which are fetched while the next one is computed."""
        platform = self.mesh.devices.flat[0].platform
        flops = _FLOPS_PER_PROGRAM.get(platform, _FLOPS_PER_ACCELERATOR_PROGRAM)
        tokens = _TOKENS_PER_DEVICE.get(platform, _TOKENS_PER_ACCELERATOR)
        batches = batching.plan(
            requests,
            shards=self._shards,
            tokens_per_batch=tokens * self._shards,
            tokens_per_program=flops / (2 * state.num_params(self.config)),
            longest=self.max_seq_len,
            batch_size=self._batch_size,
        )
        total = sum(batch.inputs.size for batch in batches)
        with tqdm.tqdm(
            total=total, unit="tok", unit_scale=True, disable=not self._show_progress
        ) as bar:
            before = None
            for batch in batches:
                now = batch, self._dispatch(params, batch)
                if before is not None:
                    yield before[0], *jax.device_get(before[1])
                    bar.update(before[0].inputs.size)
                before = now
            if before is not None:
                yield before[0], *jax.device_get(before[1])
                bar.update(before[0].inputs.size)

    def _dispatch(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        rows = sharding.batch_sharding(self.mesh, batch.inputs.shape)
        shards = sharding.named_sharding(self.mesh, ("batch", None), batch.places.shape)
        with jax.set_mesh(self.mesh):
            return self._run(
                params,
                _place(batch.inputs, rows),
                _place(batch.places, shards),
                _place(batch.targets, shards),
                block=batch.block,
            )


def _place(array: np.ndarray, placement: NamedSharding) -> jax.Array:
    """Every host holds the whole array and gives its devices their parts."""
    return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])


def _log_probs(
    graph: nnx.GraphDef[NeoLM],
    params: Params,
    inputs_BT: jax.Array,
    places_SQ: jax.Array,
    targets_SQ: jax.Array,
    *,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, float32, and whether it is the likeliest: [S, Q]."""
    model = nnx.merge(graph, params)
    hidden_BTD = model.hidden(inputs_BT)
    S, D = places_SQ.shape[0], hidden_BTD.shape[-1]
    hidden_SPD = constrain(hidden_BTD.reshape(S, -1, D), "batch", None, None)
    head_VD = model.head.astype(hidden_SPD.dtype)
    float_type = jnp.promote_types(hidden_SPD.dtype, jnp.float32)
    is_real_V = jnp.arange(head_VD.shape[0]) < model.config.vocab_size

    def one_block(block_KSC: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        places_SC, targets_SC = block_KSC
        x_SCD = jnp.take_along_axis(hidden_SPD, places_SC[..., None], axis=1)
        logits_SCV = jnp.einsum(
            "SCD,VD->SCV", x_SCD, head_VD, preferred_element_type=float_type
        )
        logits_SCV = constrain(logits_SCV, "batch", None, "vocab")
        logits_SCV = jnp.where(is_real_V, logits_SCV, -jnp.inf)
        target_SC = jnp.take_along_axis(logits_SCV, targets_SC[..., None], axis=-1)[..., 0]
        log_probs_SC = target_SC - jax.nn.logsumexp(logits_SCV, axis=-1)
        # The likeliest, or the first of several, as argmax has it; which is slow on a CPU.
        target_SC1, place_SC1 = target_SC[..., None], targets_SC[..., None]
        is_before_SCV = jnp.arange(head_VD.shape[0]) < place_SC1
        beaten_SCV = (logits_SCV > target_SC1) | ((logits_SCV == target_SC1) & is_before_SCV)
        return log_probs_SC, ~jnp.any(beaten_SCV, axis=-1)

    def into_blocks(x_SQ: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_SQ.reshape(S, -1, block), 1, 0)

    results = jax.lax.map(one_block, (into_blocks(places_SQ), into_blocks(targets_SQ)))
    log_probs_SQ, is_best_SQ = (jnp.moveaxis(x, 0, 1).reshape(S, -1) for x in results)
    return log_probs_SQ, is_best_SQ
