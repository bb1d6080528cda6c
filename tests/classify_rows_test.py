"""Examples as rows, a head's step as torch's, and answers by likelihood."""

import dataclasses
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from neo_jax import hf, state, tokenizer, train
from neo_jax.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.glue import asking, reading
from neo_jax.evaluate.glue.tasks import TASKS, Example
from neo_jax.evaluate.scoring import Score
from neo_jax.finetune import baselines, classify, heads, rows
from tests import classify_fixtures


@pytest.fixture(scope="module")
def words() -> tokenizer.Tokenizer:
    return tokenizer.train_bpe(["a passage of words and a question of them " * 3] * 4, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    where = tmp_path_factory.mktemp("data")
    classify_fixtures.write_all(where)
    return where


# ----------------------------------------------------------------------------------- rows


def boolq(passage: str, label: int | None = 1) -> Example:
    return Example(0, {"passage": passage, "question": "a question"}, label)


def test_a_row_is_the_tasks_text_filled_up_on_the_right(words) -> None:
    task, asked = TASKS["boolq"], [boolq("a"), boolq("a passage", None)]
    made = rows.for_head(task, asked, words, 64)
    for row, example in enumerate(asked):
        length = made.arrays["lengths"][row]
        inputs = made.arrays["inputs"][row]
        assert inputs[:length].tolist() == words.encode(task.text(example))
        assert set(inputs[length:]) <= {words.eos_id}
    assert made.arrays["weights"].tolist() == [1, 0] and made.truncated == 0


def test_a_long_passage_loses_its_end_and_the_question_stays(words) -> None:
    task, asked = TASKS["boolq"], [boolq("a passage of words " * 50), boolq("a")]
    made = rows.for_head(task, asked, words, 48)
    text = words.decode(made.arrays["inputs"][0][: made.lengths[0]])
    assert made.truncated == 1 and 40 < made.lengths[0] <= 48
    assert text.startswith("passage: a passage of") and text.endswith("question: a question")
    prompt = rows.for_prompt(task, asked, words, 60)
    assert prompt.arrays["inputs"].shape[1] <= 60
    assert "Question: a question?" in words.decode(prompt.arrays["inputs"][0])
    with pytest.raises(ConfigError, match="BoolQ: example 0 does not fit into 4 tokens"):
        rows.for_head(task, asked, words, 4)


def test_half_a_character_is_not_left_at_a_cut(words) -> None:
    made = rows.for_head(TASKS["boolq"], [boolq("\u00e9" * 90)], words, 50)
    assert "\ufffd" not in words.decode(made.arrays["inputs"][0])


@pytest.mark.parametrize("name", ["copa", "record"])
def test_each_choice_is_a_row_that_is_right_or_wrong(name: str, folder, words) -> None:
    task = TASKS[name]
    examples = reading.read(task, "validation", folder / "super_glue")
    made = rows.for_head(task, examples, words, 128)
    assert made.owners.tolist() == [i // 2 for i in range(12)]
    labels = made.arrays["labels"].reshape(-1, 2)
    assert (labels.argmax(-1) == [e.label for e in examples]).all() and (
        labels.sum(-1) == 1
    ).all()
    scores = np.stack([1 - labels.ravel(), labels.ravel()], axis=-1)
    chosen = classify.choose(task, scores, made.owners)
    assert chosen == [example.label for example in examples]


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"ax", "axb", "axg"}))
def test_a_prompt_learns_the_right_answers_tokens_alone(name: str, folder, words) -> None:
    task = TASKS[name]
    examples = reading.read(task, "train", folder / task.suite)
    made = rows.for_prompt(task, examples, words, 256)
    for row, example in enumerate(examples):
        counts = made.arrays["weights"][row] > 0
        learned = words.decode(made.arrays["targets"][row][counts])
        answer = task.continuations(example)[asking.right_answer(task, example)]
        assert learned.strip() == answer.strip()
        # What is asked is what is learned: evaluation scores the same tokens after the same.
        asker = Asker(lambda requests: [], words, 256)
        ((before, scored),) = asker.encode_pairs([(task.asked(example), answer)])
        assert scored == made.arrays["targets"][row][counts].tolist()
        assert before == made.arrays["inputs"][row][: len(before)].tolist()


# --------------------------------------------------------------------------------- a head


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch, whose threads cost more than they do on matrices of this size."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(words: tokenizer.Tokenizer, num_labels: int) -> ModelConfig:
    return ModelConfig(
        num_layers=2,
        embed_dim=32,
        num_heads=2,
        window_size=8,
        vocab_size=words.vocab_size,
        max_seq_len=48,
        num_labels=num_labels,
        initializer="hf",
        compute_dtype="float32",
    )


def batch_of(words: tokenizer.Tokenizer, num_labels: int, count: int = 16) -> train.Batch:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, count).astype(np.int32)
    lengths[0] = 40
    inputs = rng.integers(1, words.vocab_size, (count, 40)).astype(np.int32)
    inputs[np.arange(40) >= lengths[:, None]] = words.eos_id
    labels = rng.integers(0, num_labels, count).astype(np.int32)
    if num_labels == 1:
        labels = rng.uniform(0, 5, count).astype(np.float32)
    weights = np.ones(count, np.float32)
    arrays = {"inputs": inputs, "lengths": lengths, "labels": labels, "weights": weights}
    return {key: jnp.asarray(array) for key, array in arrays.items()}


def params_of(model: ModelConfig, seed: int = 0) -> state.Params:
    rng = np.random.default_rng(seed)
    _, shapes = state.model_graph(model)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), jnp.float32),
        nnx.to_pure_dict(shapes),
    )
    params["ln_f"]["scale"] += 1
    return params


@pytest.mark.parametrize("num_labels", [pytest.param(3, marks=pytest.mark.slow), 1])
def test_a_step_of_the_head_is_torchs(num_labels: int, words, one_thread) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = network(words, num_labels)
    params, batch = params_of(model), batch_of(words, num_labels)
    config = Config(model=model, data=DataConfig(seq_len=40, batch_size=16))
    graph, _ = state.model_graph(model)
    ours, sums = train.gradients(params, graph, config, batch, heads.classification_loss)

    names = tuple(f"LABEL_{i}" for i in range(num_labels))
    kind = "regression" if num_labels == 1 else "single_label_classification"
    head = hf.Head(hf.TEXT_HEAD, names, words.eos_id, kind)
    shape, tree = hf.with_head(model, params)
    values = hf.config_to_hf(shape) | {"num_labels": num_labels, "problem_type": kind}
    theirs = transformers.GPTNeoForSequenceClassification(
        transformers.GPTNeoConfig(**values, pad_token_id=words.eos_id)
    ).eval()
    weights = {k: torch.tensor(v) for k, v in hf.to_hf(tree, shape, head).items()}
    assert not theirs.load_state_dict(weights, strict=False).unexpected_keys
    inputs = np.asarray(batch["inputs"])
    out = theirs(
        torch.tensor(inputs, dtype=torch.long),
        attention_mask=torch.tensor(inputs != words.eos_id).long(),
        labels=torch.tensor(np.array(batch["labels"])).to(
            torch.float32 if num_labels == 1 else torch.long
        ),
    )
    out.loss.backward()
    assert float(sums.loss) == pytest.approx(out.loss.item(), rel=1e-5)
    expected = {name: leaf.grad.numpy() for name, leaf in theirs.named_parameters()}
    wte = expected["transformer.wte.weight"]
    expected["transformer.wte.weight"] = wte[: model.vocab_size]
    for name, gradient in hf.to_hf(hf.with_head(model, ours)[1], shape, head).items():
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=1e-5 * scale)


def test_neither_padding_nor_its_amount_nor_the_side_change_a_score(words) -> None:
    model = network(words, 2)
    graph, _ = state.model_graph(model)
    network_ = nnx.merge(graph, params_of(model))
    batch = batch_of(words, 2, count=4)
    inputs, lengths = np.asarray(batch["inputs"]), np.asarray(batch["lengths"])
    right = heads.scores(network_, batch["inputs"], batch["lengths"])
    more = np.pad(inputs, [(0, 0), (0, 8)], constant_values=7)
    np.testing.assert_allclose(
        heads.scores(network_, jnp.asarray(more), batch["lengths"]), right, atol=1e-6
    )
    left = np.stack([np.roll(row, 40 - n) for row, n in zip(inputs, lengths, strict=True)])
    place = np.arange(40) - (40 - lengths[:, None])
    hidden = network_.hidden(
        jnp.asarray(left),
        positions=jnp.asarray(np.maximum(place, 0)),
        segment_ids=jnp.asarray((place >= 0).astype(np.int32)),
    )
    np.testing.assert_allclose(network_.labels(hidden[:, -1]), right, atol=1e-5)


@pytest.mark.parametrize("slices", [1, 4])
def test_eight_devices_and_slices_are_one_device(slices: int, mesh, words) -> None:
    model = network(words, 3)
    params, batch = params_of(model), batch_of(words, 3)
    batch = {**batch, "weights": batch["weights"].at[5].set(0)}
    config = Config(
        model=model,
        data=DataConfig(seq_len=40, batch_size=16),
        train=TrainConfig(accumulation_steps=slices),
    )
    alone = dataclasses.replace(config, train=TrainConfig())
    graph, _ = state.model_graph(model)
    expected, sums = train.gradients(params, graph, alone, batch, heads.classification_loss)

    @jax.jit
    def run(params: state.Params, batch: train.Batch):
        return train.gradients(params, graph, config, batch, heads.classification_loss)

    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, state.abstract_params(model, mesh))
        placed = train.place_batch(jax.tree.map(np.asarray, dict(batch)), mesh, 16)
        found, ours = run(jax.device_put(params, places), placed)
    assert float(ours.loss) == pytest.approx(float(sums.loss), rel=1e-5)
    assert float(ours.extras["accuracy"]) == pytest.approx(float(sums.extras["accuracy"]))
    for path, leaf in jax.tree.leaves_with_path(expected):
        scale = max(float(jnp.abs(leaf).max()), 1e-3)
        np.testing.assert_allclose(
            dict(jax.tree.leaves_with_path(found))[path], leaf, rtol=0, atol=1e-5 * scale
        )


def test_the_head_is_learned(words) -> None:
    model = network(words, 2)
    batch = batch_of(words, 2)
    config = Config(model=model, data=DataConfig(seq_len=40, batch_size=16))
    graph, _ = state.model_graph(model)
    params, tx = params_of(model), optax.adam(3e-3)
    moments = tx.init(params)

    @jax.jit
    def step(params, moments):
        grads, sums = train.gradients(params, graph, config, batch, heads.classification_loss)
        updates, moments = tx.update(grads, moments)
        return optax.apply_updates(params, updates), moments, sums.extras["accuracy"]

    for _ in range(30):
        params, moments, accuracy = step(params, moments)
    assert accuracy == 1


# -------------------------------------------------------------------------------- answers


class Parrot:
    """Scores a continuation by how often its words stood before."""

    def __init__(self, words: tokenizer.Tokenizer) -> None:
        self.words = words
        self.seen: list[str] = []

    def __call__(self, requests) -> list[Score]:
        scores = []
        for tokens, num in requests:
            text = self.words.decode(tokens[:-num])
            self.seen.append(text)
            answer = self.words.decode(tokens[-num:])
            scores.append(Score(float(text.count(answer.strip())), False, 0))
        return scores


def sst2(sentence: str, label: int | None) -> Example:
    return Example(0, {"sentence": sentence}, label)


def test_the_likeliest_answer_wins_and_shots_stand_before(words) -> None:
    task = TASKS["sst2"]
    parrot = Parrot(words)
    asker = Asker(parrot, words, 512)
    asked = [sst2("good good", None), sst2("bad", None)]
    assert asking.answers(task, asked, asker)[0] == [1, 0]
    training = [sst2(f"plain {i}", i % 2) for i in range(10)]
    shots = asking.choose_shots(task, training, 3, seed=4)
    assert shots == asking.choose_shots(task, training, 3, seed=4)
    assert shots != asking.choose_shots(task, training, 3, seed=5)
    assert len({shot.fields["sentence"] for shot in shots}) == 3
    text = asking.shots_text(task, shots)
    parrot.seen.clear()
    asking.answers(task, asked[:1], asker, text)
    (before, *_) = parrot.seen
    assert before == text + "Review: good good\nThe reviewer found it"
    for shot in shots:
        right = (" bad", " good")[int(shot.label or 0)]
        assert f"{shot.fields['sentence']}\nThe reviewer found it{right}\n\n" in text


def test_too_many_shots_and_no_room_are_told(words) -> None:
    with pytest.raises(ConfigError, match=r"SST-2: 3 shots are wanted, and .* has 2 labelled"):
        asking.choose_shots(TASKS["sst2"], [sst2("a", 0), sst2("b", 1), sst2("c", None)], 3, 0)
    asker = Asker(Parrot(words), words, 24)
    asking.answers(TASKS["sst2"], [sst2("good " * 30, None)], asker)
    assert asker.truncated == 2  # the question with each of its answers


def test_a_number_is_the_mean_of_the_answers(words) -> None:
    task = TASKS["stsb"]
    log_probs = np.log([0.1, 0.1, 0.1, 0.1, 0.1, 0.5])
    assert asking.choose(task, log_probs) == pytest.approx(0.1 * 10 + 0.5 * 5)
    assert [asking.right_answer(task, Example(0, {}, x)) for x in (0.4, 2.5, 5.0)] == [0, 3, 5]


# ------------------------------------------------------------------------------ baselines


def test_words_alone_learn_what_words_tell_and_the_majority_does_not(folder) -> None:
    for name in ("sst2", "stsb", "copa"):
        task = TASKS[name]
        training = reading.read(task, "train", folder / task.suite)
        asked = reading.read(task, "validation", folder / task.suite)
        learned = baselines.words_alone(task, training, asked)
        assert len(learned) == len(asked)
        assert len(set(baselines.majority(task, training, asked))) == 1
    task = TASKS["sst2"]
    training = reading.read(task, "train", folder / "glue")
    asked = reading.read(task, "validation", folder / "glue")
    assert baselines.words_alone(task, training, asked) == [e.label for e in asked]
