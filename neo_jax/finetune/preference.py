"""Learning which of two answers is better: direct preference optimisation.

Enters: `task = "preference"`, a checkpoint, and records {"prompt", "chosen", "rejected"}
(`data.record_format = "preference"`). Leaves: a model that finds the chosen answers likelier
than the rejected ones, by more than the checkpoint did; or, with `preference.reference_free`,
likelier by itself, token for token.

The checkpoint's own log-probabilities do not change in training. They are computed once,
before it, by the very program that scores the answers later, and kept in the workdir
(reference.npz): no second model is in memory, also where all parameters are learned, and no
step asks the checkpoint again.

Sources: Rafailov et al. 2023, DPO (arXiv:2305.18290); Meng et al. 2024, SimPO
(arXiv:2405.14734) for `reference_free` with `length_normalised`; label smoothing as in Hugging
Face's trl, trainer/dpo_trainer.py.

Shapes: P pair, T position; of two answers the chosen one stands first.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from neo_jax import loss as loss_lib
from neo_jax import pretrained, sharding, state, train, trainable
from neo_jax import run as run_lib
from neo_jax.config import Config, ConfigError, PreferenceConfig
from neo_jax.data import corpus, examples
from neo_jax.data.corpus import Split
from neo_jax.data.examples import ExampleBatches
from neo_jax.data.pipeline import Pipeline
from neo_jax.data.records import Document
from neo_jax.finetune.tuning import Tuning
from neo_jax.loss import LossSums
from neo_jax.model import NeoLM
from neo_jax.state import Params
from neo_jax.tokenizer import Tokenizer
from neo_jax.train import Batch, LossFunction
from neo_jax.watch import Preemption

_MULTIPLE = 64  # lengths of batches are multiples of this
REFERENCE = "reference"  # of a batch: the checkpoint's log-probabilities, float32 [pairs, 2]


def run(config: Config, workdir: pathlib.Path) -> None:
    """Tunes and judges; resumes as pre-training does. Raises as `run.start`."""
    run_lib.start(PreferenceTuning, config, workdir)


# ------------------------------------------------------------------------------ the loss


def preference_terms(
    log_probs: Float[Array, "pairs 2"],
    reference: Float[Array, "pairs 2"],
    settings: PreferenceConfig,
) -> tuple[Float[Array, " pairs"], Float[Array, "pairs 2"]]:
    """The loss of each pair, and the rewards of its two answers.

    Args:
      log_probs: of the answers, by the model that learns; sums over their tokens, or means.
      reference: the same by the checkpoint; ignored where there is no reference.
      settings: `beta`, `target_margin`, `label_smoothing`, `reference_free`.
    """
    if settings.reference_free:
        reference = jnp.zeros_like(reference)
    rewards = settings.beta * (log_probs - reference)
    logits = rewards[:, 0] - rewards[:, 1] - settings.target_margin
    smoothing = settings.label_smoothing
    losses = -(
        (1 - smoothing) * jax.nn.log_sigmoid(logits) + smoothing * jax.nn.log_sigmoid(-logits)
    )
    return losses, rewards


def answer_log_probs(model: NeoLM, config: Config, batch: Batch) -> Float[Array, "pairs 2"]:
    """Log p of each answer given its prompt: a sum over its tokens, or their mean."""
    P, _, T = batch["inputs"].shape
    keys = batch.get(train.DROPOUT)
    hidden = model.hidden(
        batch["inputs"].reshape(2 * P, T),
        # Both answers of a pair lose the same inputs: what differs is what they say.
        dropout_keys=None if keys is None else jnp.repeat(keys, 2, axis=0),
    )
    log_probs = loss_lib.token_log_probs(
        hidden,
        model.head,
        batch["targets"].reshape(2 * P, T),
        vocab_size=config.model.vocab_size,
        block_size=config.loss.block_size,
    )
    learned = batch["learned"].reshape(2 * P, T).astype(log_probs.dtype)
    sums = (log_probs * learned).sum(axis=1)
    if config.preference.length_normalised:
        sums = sums / jnp.maximum(learned.sum(axis=1), 1)
    return sums.reshape(P, 2)


def preference_loss(model: NeoLM, config: Config, batch: Batch) -> LossSums:
    """Sums over the pairs, each times its weight."""
    log_probs = answer_log_probs(model, config, batch)
    losses, rewards = preference_terms(log_probs, batch[REFERENCE], config.preference)
    weights = batch["weights"]
    total = jnp.sum(weights * losses)
    margins = rewards[:, 0] - rewards[:, 1]
    extras = {
        "accuracy": jnp.sum(weights * (margins > 0)),
        "margin": jnp.sum(weights * margins),
        "chosen_reward": jnp.sum(weights * rewards[:, 0]),
        "rejected_reward": jnp.sum(weights * rewards[:, 1]),
    }
    return LossSums(total, total, jax.lax.stop_gradient(extras))


# ------------------------------------------------------------------------------ the pairs


class Pairs(NamedTuple):
    """Arrays of all pairs, and what had to be cut.

    `inputs`, `targets` int32 and `learned` bool are [pairs, 2, seq], `lengths` [pairs].
    """

    arrays: dict[str, np.ndarray]
    lengths: np.ndarray
    num_bytes: int
    cut_prompts: int
    cut_answers: int


def read_pairs(config: Config, words: Tokenizer, split: Split) -> Pairs:
    """All pairs of a split, tokenised: end of text, prompt, answer, end of text.

    What is longer than `data.seq_len` loses the start of its prompt; only an answer that is
    too long by itself loses its end.

    Raises:
      ConfigError: a source that cannot be read, or holds no pairs.
    """
    documents = [
        document
        for name in corpus.source_names(config.data, split)
        for _, document in corpus.split_records(name, config.data, split)
        if document is not None
    ]
    seq, eos = config.data.seq_len, words.eos_id
    shape = (len(documents), 2, seq)
    inputs, targets = np.full(shape, eos, np.int32), np.full(shape, eos, np.int32)
    learned, lengths = np.zeros(shape, bool), np.zeros(len(documents), np.int64)
    cut_prompts = cut_answers = num_bytes = 0
    for row, document in enumerate(documents):
        if not isinstance(document, Document):
            raise ConfigError(f"{document.where}: {document.reason}.")
        prompt, *answers = (words.encode(str(part)) for part, _ in document.parts)
        num_bytes += len(document.text.encode())
        # Both answers see the same prompt, so the longer one decides what is cut of it.
        room = max(0, seq - 1 - max(len(answer) for answer in answers))
        kept = prompt[max(0, len(prompt) - room) :]
        cut_prompts += len(kept) < len(prompt)
        for side, answer in enumerate(answers):
            ids = [eos, *kept, *answer, eos]
            cut_answers += len(ids) > seq + 1
            ids = ids[: seq + 1]
            count = len(ids) - 1
            inputs[row, side, :count], targets[row, side, :count] = ids[:-1], ids[1:]
            learned[row, side, len(kept) : count] = True
            lengths[row] = max(lengths[row], count)
    if not documents:
        raise ConfigError(f"data source {config.data.source!r} holds no pairs to {split} on.")
    arrays = {
        "inputs": inputs,
        "targets": targets,
        "learned": learned,
        "weights": np.ones(len(documents), np.float32),
        REFERENCE: np.zeros((len(documents), 2), np.float32),
    }
    return Pairs(arrays, lengths, num_bytes, cut_prompts, cut_answers)


# -------------------------------------------------------------------------------- the run


class PreferenceTuning(Tuning):
    """A run over pairs of answers, judged by pairs that it never saw."""

    config: Config
    loss: ClassVar[LossFunction] = staticmethod(preference_loss)

    def __init__(self, config: Config, workdir: pathlib.Path, preemption: Preemption) -> None:
        super().__init__(config, workdir, preemption)
        self._judge = jax.jit(self._batch_sums)

    def open_data(self) -> Pipeline:
        """See `Run`. The reference is computed here, or read from the workdir."""
        config = self.config
        self._pairs = {split: read_pairs(config, self.tokenizer, split) for split in _SPLITS}
        if not config.preference.reference_free:
            self._add_reference()
        size = config.data.batch_size
        rows = examples.share(size, *sharding.host_share(self.mesh, size))
        return examples.pipeline(self._batches("train", size, rows), config.data)

    def evaluate(self, params: Params, *, final: bool) -> dict[str, float]:
        """Loss, share of pairs that are told right, margin and rewards, of held-out pairs."""
        del final
        totals: dict[str, float] = {}
        for batch in self._held_out():
            self.preemption.leave_if_told()
            sums = self._judge(params, self.frozen, self.place(batch))
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        count = totals.pop("weight")
        return {name: value / count for name, value in totals.items()}

    def describe_data(self) -> str:
        """See `Run`."""
        train_pairs, held_out = self._pairs["train"], self._pairs["eval"]
        cut = train_pairs.cut_prompts, train_pairs.cut_answers
        told = (
            f" ({cut[0]:,} prompts and {cut[1]:,} answers cut to data.seq_len="
            f"{self.config.data.seq_len})"
            if any(cut)
            else ""
        )
        return (
            f"{len(train_pairs.lengths):,} pairs to learn from{told}, "
            f"{len(held_out.lengths):,} held out"
        )

    def _batches(self, split: Split, size: int, rows: tuple[int, int]) -> ExampleBatches:
        pairs = self._pairs[split]
        return ExampleBatches(
            arrays=pairs.arrays,
            lengths=pairs.lengths,
            tokens=("inputs", "targets", "learned"),
            multiple=_MULTIPLE,
            seed=self.config.train.seed,
            batch_size=size,
            host_rows=rows,
            num_bytes=pairs.num_bytes,
            endless=split == "train",
            length_group=self.config.data.length_group,
        )

    def _held_out(self) -> Iterator[Mapping[str, np.ndarray]]:
        size = self.eval_batch_size
        batches = self._batches("eval", size, (0, size))
        count = -(-batches.num_sequences // size)
        most = self.config.eval.max_batches or count
        return (batches.at(number * size) for number in range(min(count, most)))

    def _batch_sums(self, params: Params, frozen: Params, batch: Batch) -> dict[str, Array]:
        whole = trainable.join(params, frozen)
        sums = train.batch_loss(whole, self.graph, self.config, batch, preference_loss)
        return {"loss": sums.nll, **sums.extras, "weight": batch["weights"].sum()}

    def _add_reference(self) -> None:
        """The checkpoint's log-probabilities of all answers, kept for the next start."""
        path = self.workdir / "reference.npz"
        digest = self._reference_digest()
        if path.exists():
            held = np.load(path, allow_pickle=False)
            if str(held["digest"]) == digest:
                for split in _SPLITS:
                    self._pairs[split].arrays[REFERENCE][:] = held[split]
                return
        # The checkpoint as this run keeps it: in int8 where adapters learn beside that.
        plain = dataclasses.replace(self.config.model, lora_rank=0)
        params, (graph, _) = self._read(), state.model_graph(plain)
        with jax.set_mesh(self.mesh):
            ask = jax.jit(
                lambda params, batch: answer_log_probs(
                    nnx.merge(graph, params), self.config, batch
                )
            )
            for split in _SPLITS:
                self._ask_reference(split, functools.partial(ask, params))
        if jax.process_index() == 0:
            aside = path.with_name("reference.partial.npz")
            arrays: Mapping[str, Any] = {s: self._pairs[s].arrays[REFERENCE] for s in _SPLITS}
            np.savez(aside, digest=np.asarray(digest), **arrays)
            os.replace(aside, path)

    def _ask_reference(self, split: Split, ask: Callable[[Batch], Array]) -> None:
        size = self.eval_batch_size
        batches = dataclasses.replace(self._batches(split, size, (0, size)), endless=False)
        found = self._pairs[split].arrays[REFERENCE]
        starts = tqdm.tqdm(
            range(0, len(found), size),
            desc=f"asking the checkpoint, {split}",
            disable=jax.process_index() != 0,
        )
        for start in starts:
            self.preemption.leave_if_told()
            asked = multihost_utils.process_allgather(
                ask(self.place(batches.at(start))), tiled=True
            )
            found[start : start + size] = np.asarray(asked)[: len(found) - start]

    def _reference_digest(self) -> str:
        """What the reference depends on: checkpoint, pairs, and how they are scored."""
        assert self.source is not None
        digest = hashlib.sha256(pretrained.fingerprint(self.source).encode())
        model = self.config.model
        how = (model.param_dtype, model.kernel_dtype, model.compute_dtype)
        digest.update(f"{how} {self.config.preference.length_normalised}".encode())
        for pairs in self._pairs.values():
            digest.update(pairs.arrays["inputs"].tobytes())
            digest.update(pairs.arrays["learned"].tobytes())
        return digest.hexdigest()


_SPLITS: tuple[Split, ...] = ("train", "eval")
