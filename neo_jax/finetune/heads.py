"""A head on the last real token: scores of labels, and what is learned from them.

Enters: a model with `num_labels`, and a batch whose rows end where `lengths` says. Leaves:
scores [batch, labels], and sums of losses as train.py takes them.

As in transformers' GPTNeoForSequenceClassification: the final hidden state of the last token
that is not padding, times a matrix without a bias; cross-entropy over the labels, or, where
there is one label, the squared distance to a number.

Shapes: B batch, T position, D embed, L label.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo_jax.config import Config
from neo_jax.lora import RowKeys
from neo_jax.loss import LossSums
from neo_jax.model import NeoLM
from neo_jax.train import DROPOUT, Batch


def scores(
    model: NeoLM,
    ids: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    dropout_keys: RowKeys | None = None,
) -> Float[Array, "batch labels"]:
    """Scores of the labels, at least float32; padding stands on the right.

    Args:
      model: with a classifier.
      ids: token ids; what stands beyond a row's length is never seen.
      lengths: tokens of each row, at least 1.
      dropout_keys: of the adapters, one a row; left out, nothing is dropped.
    """
    hidden_BTD = model.hidden(ids, dropout_keys=dropout_keys)
    last_B11 = (lengths - 1)[:, None, None]
    last_BD = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0]
    return model.labels(last_BD)


def classification_loss(model: NeoLM, config: Config, batch: Batch) -> LossSums:
    """Cross-entropy of the labels, or squared distances where there is a single one.

    Args:
      model: with a classifier.
      config: its `model.num_labels` tells which.
      batch: `inputs` [batch, seq]; `lengths`, `labels`, `weights` [batch].
    """
    scores_BL = scores(model, batch["inputs"], batch["lengths"], batch.get(DROPOUT))
    labels_B, weights_B = batch["labels"], batch["weights"]
    if config.model.num_labels == 1:
        each_B = jnp.square(scores_BL[:, 0] - labels_B)
        total = jnp.sum(each_B * weights_B)
        return LossSums(total, jax.lax.stop_gradient(total))
    log_probs_BL = jax.nn.log_softmax(scores_BL)
    each_B = -jnp.take_along_axis(log_probs_BL, labels_B[:, None], axis=1)[:, 0]
    is_right_B = jnp.argmax(scores_BL, axis=-1) == labels_B
    total = jnp.sum(each_B * weights_B)
    return LossSums(
        total,
        jax.lax.stop_gradient(total),
        {"accuracy": jnp.sum(is_right_B * weights_B)},
    )
