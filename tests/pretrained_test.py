"""`neo_jax.load`: one door for every kind of checkpoint, and what it refuses."""

import dataclasses
import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neo_jax
from neo_jax import checkpoint, config, hf, optimizer, pretrained, sharding, state, tokenizer

MODEL = config.ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    window_size=8,
    vocab_size=300,
    max_seq_len=64,
    compute_dtype="float32",
)
TINY_MTF = pathlib.Path(__file__).parent / "fixtures" / "mtf_tiny"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A workdir as training leaves it: state with moments, data, config, tokenizer."""
    folder = tmp_path_factory.mktemp("workdir")
    whole = config.Config(model=MODEL, data=config.DataConfig(seq_len=64))
    mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
    tx = optimizer.build(whole.optimizer, 10)
    with checkpoint.Checkpointer(folder, whole.checkpoint) as saved:
        saved.save(3, state.create(MODEL, mesh, tx, seed=1), {"position": 5}, whole)
    (folder / "config.json").write_text(config.to_json(whole))
    tokenizer.train_bpe(["some words", "and others"] * 9, 280).save(folder)
    return folder


@pytest.fixture(scope="module")
def written(workdir, tmp_path_factory) -> pathlib.Path:
    """The same model as Hugging Face has it."""
    model = pretrained.read(workdir)
    return hf.write(model.params, model.config, tmp_path_factory.mktemp("hf"))


def test_workdir_and_directory_answer_alike(workdir, written):
    ids = np.arange(20).reshape(2, 10)
    ours, theirs = neo_jax.load(workdir), neo_jax.load(str(written))
    assert ours.config == MODEL and isinstance(ours, pretrained.LanguageModel)
    answers = ours.logits(ids)
    assert answers.shape == (2, 10, 300) and answers.dtype == jnp.float32
    np.testing.assert_array_equal(answers, theirs.logits(ids.tolist()))
    assert ours.tokenizer.decode(ours.tokenizer.encode("some words")) == "some words"
    assert theirs.tokenizer is None


def test_parameters_of_a_workdir_are_those_that_were_trained(workdir):
    mesh = sharding.make_mesh(config.MeshConfig())
    trained = state.create(MODEL, mesh, optimizer.build(config.OptimizerConfig(), 10), seed=1)
    loaded = pretrained.read(workdir).params
    jax.tree.map(np.testing.assert_array_equal, loaded, trained.params)


@pytest.mark.parametrize("kind", ["workdir", "hf", "mtf"])
def test_every_kind_lands_sharded(workdir, written, kind, mesh):
    source = {"workdir": workdir, "hf": written, "mtf": TINY_MTF}[kind]
    model = neo_jax.load(source, mesh=mesh)
    wanted = hf.abstract_params(model.config, mesh=mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, model.params) == jax.tree.map(
        lambda leaf: leaf.sharding, wanted
    )


@pytest.mark.slow
def test_a_mesh_answers_as_one_device(written, mesh):
    # Three rows, which the mesh's four groups of devices cannot share evenly.
    ids, whole = [[1, 2, 3], [4, 5, 6], [7, 8, 9]], neo_jax.load(written)
    spread = neo_jax.load(written, mesh=mesh)
    np.testing.assert_allclose(spread.logits(ids), whole.logits(ids), atol=1e-5)
    np.testing.assert_allclose(spread.embed(ids), whole.embed(ids), atol=1e-5)
    for ours, theirs in zip(spread.score(ids), whole.score(ids), strict=True):
        np.testing.assert_allclose(ours.log_probs[1:], theirs.log_probs[1:], atol=1e-5)


@pytest.mark.slow
def test_writing_keeps_the_weights_once(workdir, written):
    def live() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    ids, before = [[1, 2, 3]], live()
    model = neo_jax.load(written)
    weights = state.num_bytes(model.params)
    params = jax.tree.map(np.array, model.params)  # copies, which keep no array alive
    logits = np.array(model.logits(ids))
    model.generate(ids, max_new_tokens=3)
    assert weights <= live() - before < 1.1 * weights
    # What they were is there still.
    np.testing.assert_allclose(model.logits(ids), logits, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    del model
    small = neo_jax.load(written, weight_dtype="int8")
    assert live() - before < 0.65 * weights  # of a model this small a third is tables
    (text,) = small.generate(ids, max_new_tokens=3, logprobs=0)
    (scored,) = small.score([ids[0] + text.token_ids])
    np.testing.assert_allclose(scored.log_probs[3:], text.log_probs, atol=1e-4)
    assert np.abs(small.logits(ids) - logits).max() > 1e-5
    with pytest.raises(config.ConfigError, match="keeps no other parameters"):
        _ = small.params
    with pytest.raises(config.ConfigError, match="weight_dtype='int4' must be"):
        neo_jax.load(written, weight_dtype="int4")


def test_texts_of_any_length_are_scored_where_sequences_are_split(written):
    mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=1, tensor=2, context=2))
    whole, spread = neo_jax.load(written), neo_jax.load(written, mesh=mesh)
    ids = np.arange(21).reshape(3, 7)
    np.testing.assert_allclose(spread.logits(ids), whole.logits(ids), atol=1e-5)
    for texts in ([[5, 6, 7], [1] * 63], [[3] * 64]):
        ours, theirs = spread.score(texts), whole.score(texts)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.log_probs[1:], other.log_probs[1:], atol=1e-5)
    np.testing.assert_allclose(spread.embed(ids), whole.embed(ids), atol=1e-5)


def test_dtype_of_every_kind(workdir, written):
    for source in (workdir, written, TINY_MTF):
        model = neo_jax.load(source, dtype="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.bfloat16.dtype}
        assert model.config.param_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"integers \[batch, seq\], not int64 \[2\]"),
        ([[0.5]], r"not float64 \[1, 1\]"),
        ([[300]], r"reach from 300 to 300; the vocabulary has 0 … 299"),
        ([[-1]], "reach from -1"),
        ([[0] * 65], r"65 tokens exceed model\.max_seq_len=64"),
    ],
)
def test_ids_refused(written, ids, message):
    with pytest.raises(ValueError, match=message):
        neo_jax.load(written).logits(ids)


def test_checkpoints_refused(tmp_path, workdir):
    with pytest.raises(config.ConfigError, match="is not a directory"):
        neo_jax.load(tmp_path / "nothing")
    with pytest.raises(config.ConfigError, match=r"holds no config\.json"):
        neo_jax.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(config.ConfigError, match=r"config\.json cannot be read"):
        neo_jax.load(tmp_path)
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    with pytest.raises(config.ConfigError, match="holds no checkpoint; train there first"):
        neo_jax.load(tmp_path)


def test_a_classifier_is_no_language_model(tmp_path):
    head = hf.Head("GPTNeoForSequenceClassification", ("a", "b"))
    shapes = hf.abstract_params(dataclasses.replace(MODEL, compute_dtype="auto"), head)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    hf.write(params, MODEL, tmp_path, head=head)
    with pytest.raises(config.ConfigError, match="has no language model's head"):
        neo_jax.load(tmp_path)
