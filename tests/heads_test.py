"""Heads that were trained: by transformers and read here, by us and read there.

Three small tasks about made-up texts, one for each head: is the text kind or rude, which
tokens are, and where is the word that tells. Each is learnt in both libraries, until it is
known; then both must give every label alike, ours through transformers' own pipelines.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from neo_jax import hf, state, tokenizer
from neo_jax.config import ModelConfig

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

STEPS = 80
KIND, RUDE = ["lovely", "superb", "happy"], ["awful", "dreadful", "sad"]
PLAIN = ["the", "day", "was", "a", "film", "and", "it", "rained", "on", "us"]
SEQ = 32
HEADS = {
    "text": hf.Head("GPTNeoForSequenceClassification", ("rude", "kind"), pad_token_id=0),
    "tokens": hf.Head("GPTNeoForTokenClassification", ("O", "RUDE", "KIND"), pad_token_id=0),
    "span": hf.Head("GPTNeoForQuestionAnswering", ("LABEL_0", "LABEL_1"), pad_token_id=0),
}


TASKS = ["text", "tokens", "span"]


@pytest.fixture(autouse=True)
def one_thread():
    """Of torch, whose threads cost more than they do on matrices of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def words() -> tokenizer.Tokenizer:
    return tokenizer.train_bpe([" ".join(KIND + RUDE + PLAIN)] * 5, 320)


def config() -> ModelConfig:
    return ModelConfig(
        num_layers=2,
        embed_dim=32,
        num_heads=2,
        window_size=8,
        vocab_size=words().vocab_size,
        max_seq_len=SEQ,
        initializer="hf",
        compute_dtype="float32",
    )


def texts(count: int, seed: int) -> list[str]:
    """Texts of plain words with one that tells."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        chosen = list(rng.choice(PLAIN, rng.integers(2, 7)))
        chosen.insert(int(rng.integers(len(chosen) + 1)), rng.choice(KIND + RUDE))
        result.append(" " + " ".join(chosen))
    return result


def examples(lines: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Ids [batch, seq], padded with 0, and each task's labels; -100 counts for nothing."""
    ids = np.zeros((len(lines), SEQ), np.int32)
    kind = np.zeros(len(lines), np.int32)
    tokens = np.full((len(lines), SEQ), -100, np.int32)
    span = np.zeros((len(lines), 2), np.int32)
    for row, line in enumerate(lines):
        at = 0
        for word in line.split():
            parts = words().encode(f" {word}")
            here = slice(at, at + len(parts))
            ids[row, here] = parts
            tokens[row, here] = (word in RUDE) + 2 * (word in KIND)
            if word in KIND + RUDE:
                kind[row], span[row] = word in KIND, (at, at + len(parts) - 1)
            at += len(parts)
        assert words().encode(line) == ids[row, :at].tolist()
    return ids, {"text": kind, "tokens": tokens, "span": span}


def ours_answers(task: str, shape: ModelConfig, params, ids: np.ndarray) -> jax.Array:
    """Logits whose last dimension is what each label of `examples` chooses from."""
    graph, _ = state.model_graph(shape)
    hidden = nnx.merge(graph, params["model"]).hidden(jnp.asarray(ids))
    logits = hf.head_logits(params["head"], hidden)
    if task == "text":
        return logits[jnp.arange(len(ids)), hf.last_token(jnp.asarray(ids), 0)]
    if task == "span":
        return jnp.where(ids[:, :, None] == 0, -1e9, logits).swapaxes(1, 2)
    return logits


def theirs_answers(task: str, model, ids: np.ndarray):
    ids = torch.tensor(ids, dtype=torch.long)
    outputs = model(ids, attention_mask=(ids != 0).long())
    if task == "span":
        both = torch.stack([outputs.start_logits, outputs.end_logits], dim=1)
        return both.masked_fill((ids == 0)[:, None], -1e9)
    return outputs.logits


def train_ours(task: str):
    """A model of ours from nothing, by a plain loop."""
    shape, head = config(), HEADS[task]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.02, leaf.shape), leaf.dtype),
        hf.abstract_params(shape, head),
    )
    params["model"]["ln_f"]["scale"] += 1
    for name in ("ln_1", "ln_2"):
        params["model"]["blocks"][name]["scale"] += 1
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, moments, ids, labels):
        def loss(params):
            logits = ours_answers(task, shape, params, ids)
            weights = labels != -100
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels * weights)
            return (each * weights).sum() / weights.sum()

        updates, moments = tx.update(jax.grad(loss)(params), moments)
        return optax.apply_updates(params, updates), moments

    moments = tx.init(params)
    for i in range(STEPS):
        ids, labels = examples(texts(32, seed=i))
        params, moments = step(params, moments, ids, labels[task])
    return params


def train_theirs(task: str):
    """A model of transformers' from nothing, by a plain loop."""
    torch.manual_seed(0)
    head = HEADS[task]
    values = hf.config_to_hf(config()) | {"id2label": dict(enumerate(head.labels))}
    values |= {"label2id": {name: i for i, name in enumerate(head.labels)}, "pad_token_id": 0}
    model = getattr(transformers, head.architecture)(transformers.GPTNeoConfig(**values))
    model.eval()  # without the classifiers' dropout
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for i in range(STEPS):
        ids, labels = examples(texts(32, seed=i))
        logits = theirs_answers(task, model, ids)
        wanted = torch.tensor(labels[task], dtype=torch.long)
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1)
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


def check_alike(task: str, folder, theirs) -> None:
    """`folder`, read by us, and `theirs` label unseen texts alike, and rightly."""
    model = hf.read(folder)
    assert model.head == HEADS[task]
    lines = texts(64, seed=1000)
    ids, labels = examples(lines)
    ours = np.asarray(ours_answers(task, model.config, model.params, ids))
    with torch.no_grad():
        expected = theirs_answers(task, theirs, ids).numpy()
    real = np.broadcast_to(np.expand_dims(labels[task] != -100, -1), ours.shape)
    np.testing.assert_allclose(ours[real], expected[real], rtol=1e-4, atol=2e-4)
    chosen, counts = ours.argmax(-1), labels[task] != -100
    np.testing.assert_array_equal(chosen[counts], expected.argmax(-1)[counts])
    assert (chosen == labels[task])[counts].mean() > 0.95  # it has been learnt
    if task == "text":
        pipe = transformers.pipeline("text-classification", model=str(folder))
        names = [answer["label"] for answer in pipe(lines)]
        assert names == [HEADS[task].labels[i] for i in chosen] and len(set(names)) == 2
    if task == "tokens":
        pipe = transformers.pipeline(
            "token-classification", model=str(folder), ignore_labels=[]
        )
        for row, answer in enumerate(pipe(lines)):
            names = [HEADS[task].labels[i] for i in chosen[row][counts[row]]]
            assert [token["entity"] for token in answer] == names


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_trained_by_us_and_read_there(task, tmp_path):
    params = train_ours(task)
    hf.write(params, config(), tmp_path, head=HEADS[task], eos_id=words().eos_id)
    hf.write_tokenizer(words(), tmp_path, SEQ)
    kind = getattr(transformers, HEADS[task].architecture)
    theirs, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    check_alike(task, tmp_path, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_trained_there_and_read_here(task, tmp_path):
    theirs = train_theirs(task)
    theirs.save_pretrained(tmp_path)
    hf.write_tokenizer(words(), tmp_path, SEQ)
    check_alike(task, tmp_path, theirs)
