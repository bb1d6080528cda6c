"""Instructions are judged and learned alike, however rows, padding and devices lie."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from neo_jax import config as config_lib
from neo_jax import pretrain, sharding, state, tokenizer, train
from neo_jax.config import Config, MeshConfig
from neo_jax.data import pipeline
from neo_jax.evaluate import perplexity
from neo_jax.finetune import rates, text
from neo_jax.state import Params
from tests.train_test import assert_close

EXAMPLES = [
    {"prompt": "Say yes.", "completion": " Yes."},
    {"prompt": "Count to five, please, and do it slowly:", "completion": " one two three"},
    {"prompt": "?", "completion": " What is it that you would like to know of me?"},
    {"prompt": "Name a colour.\n", "completion": "Green"},
]


@functools.cache
def words() -> tokenizer.Tokenizer:
    return tokenizer.train_bpe([" ".join(row.values()) for row in EXAMPLES] * 5, 290)


def experiment(
    path: pathlib.Path, packing: str = "none", **sections: dict[str, Any]
) -> Config:
    tree = config_lib.default_config()
    tree.task = "finetune"
    tree.model.update(num_layers=2, embed_dim=32, num_heads=4, window_size=8)
    tree.model.update(vocab_size=words().vocab_size, max_seq_len=128, compute_dtype="float32")
    tree.data.update(source=str(path), record_format="instruction", holdout_every=0)
    tree.data.update(packing=packing, isolate_documents=packing != "none", seq_len=128)
    tree.data.update(batch_size=4 if packing == "none" else 1)
    # A large eps: Adam divides a gradient by itself, also one that is rounding error.
    tree.optimizer.update(learning_rate=1e-3, warmup_steps=0, eps=1e-2, schedule="constant")
    for name, changes in sections.items():
        tree[name].update(changes)
    return config_lib.build(tree)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    return path


@functools.cache
def params_of(model: config_lib.ModelConfig) -> Params:
    """Fresh, but for zeros: biases, scales and adapters have learned something."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    flat = traverse_util.flatten_dict(jax.device_get(state.create_params(model, mesh, 0)))
    rng = np.random.default_rng(0)
    return traverse_util.unflatten_dict(
        {
            path: leaf
            if path[-1] == "kernel"
            else leaf + rng.normal(0, 0.05, leaf.shape).astype(leaf.dtype)
            for path, leaf in flat.items()
        }
    )


def sums_of(config: Config) -> Any:
    """(sum of losses, sum of weights) of a batch."""
    graph, _ = state.model_graph(config.model)
    params = jax.tree.map(jnp.asarray, params_of(config.model))
    run = jax.jit(lambda batch: train.batch_loss(params, graph, config, batch).nll)
    return lambda batch: (float(run(batch)), float(batch["weights"].sum()))


@pytest.fixture(scope="module")
def expected(path: pathlib.Path) -> tuple[float, float]:
    """Loss and bits per byte of the answers, one example after another."""
    config = experiment(path)
    graph, _ = state.model_graph(config.model)
    params = jax.tree.map(jnp.asarray, params_of(config.model))
    run = jax.jit(lambda ids: jax.nn.log_softmax(nnx.merge(graph, params).logits(ids)))
    total = count = size = 0
    for example in EXAMPLES:
        prompt, answer = (words().encode(example[key]) for key in ("prompt", "completion"))
        ids = [words().eos_id, *prompt, *answer, words().eos_id]
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        log_p = np.asarray(run(padded))[0]
        for place in range(1 + len(prompt), len(ids)):
            total -= float(log_p[place - 1, ids[place]])
            count += 1
        size += len(example["completion"].encode())
    return total / count, total / size / float(np.log(2))


@pytest.mark.parametrize(
    ("packing", "batch_size", "seq_len"),
    [("none", 4, 128), ("best_fit", 1, 128), ("concat", 3, 96)],
)
def test_answers_are_scored_after_their_own_prompts_whatever_the_rows(
    path, expected, packing: str, batch_size: int, seq_len: int
) -> None:
    config = experiment(path, packing, data={"eval_source": str(path), "seq_len": seq_len})
    held_out = pretrain._held_out(config, words(), batch_size)
    assert isinstance(held_out, perplexity.HeldOutRows)
    scores = held_out.evaluate(sums_of(config))
    assert scores["loss"] == pytest.approx(expected[0], rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(expected[1], rel=1e-5)


def test_the_side_of_the_padding_does_not_matter(path, expected) -> None:
    config = experiment(path, "none", data={"isolate_documents": True})
    (batch,) = first_batch(config)
    length = (batch["segment_ids"] > 0).sum(axis=1)
    left = {
        key: np.stack([np.roll(row, -n) for row, n in zip(rows, length, strict=True)])
        for key, rows in batch.items()
    }
    assert (left["segment_ids"][:, 0] == 0).all() and (left["segment_ids"][:, -1] > 0).all()
    for rows in (batch, left):
        nll, weight = sums_of(config)(rows)
        assert nll / weight == pytest.approx(expected[0], rel=1e-5)


def first_batch(config: Config) -> list[dict[str, np.ndarray]]:
    rows = pipeline.build(config.data, words(), seed=0, split="train")
    batch = next(rows)
    rows.close()
    return [batch]


@pytest.mark.slow
def test_devices_and_slices_leave_the_gradients_as_they_are(path) -> None:
    def gradients(config: Config, devices: int) -> Any:
        graph, _ = state.model_graph(config.model)
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        (batch,) = first_batch(config)
        with jax.set_mesh(mesh):
            like = state.abstract_params(config.model, mesh)
            places = jax.tree.map(lambda leaf: leaf.sharding, like)
            params = jax.device_put(params_of(config.model), places)
            placed = train.place_batch(batch, mesh, config.data.batch_size)
            run = jax.jit(lambda p, b: train.gradients(p, graph, config, b))
            return jax.device_get(run(params, placed))

    one = gradients(experiment(path), 1)
    many = experiment(path, mesh={"fsdp": 2, "tensor": 4}, train={"accumulation_steps": 2})
    assert_close(gradients(many, 8), one, 1e-5)


def test_the_rate_falls_with_the_size_and_is_ten_times_as_high_for_adapters() -> None:
    def rate(name: str, trainable: str = "all", given: float = 0.0) -> float:
        tree = config_lib.default_config()
        tree.task = "finetune"
        tree.optimizer.learning_rate = given
        tree.model = config_lib.preset(name)
        tree.finetune.trainable = trainable
        tree.model.lora_rank = 8 * (trainable == "lora")
        return rates.settled(config_lib.build(tree)).optimizer.learning_rate

    full = [rate(name) for name in ("neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b")]
    assert full == [6e-5, 3.8e-5, 2.2e-5, 1.6e-5]
    assert rate("neo_2p7b", "lora") == 1.6e-4
    assert rate("neo_2p7b", given=3e-3) == 3e-3


def test_records_that_no_row_holds_are_counted(path) -> None:
    def told(seq_len: int) -> str:
        config = experiment(path, data={"seq_len": seq_len})
        data = pipeline.build(config.data, words(), seed=0, split="train")
        return text.cut_records(config, data)

    lengths = [len(words().encode("".join(row.values()))) + 1 for row in EXAMPLES]
    assert told(max(lengths)) == ""
    assert told(max(lengths) - 1).startswith("; 1 records are longer than data.seq_len=")
