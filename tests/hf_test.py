"""Hugging Face's GPT-Neo in and out: configs, names, files, heads, and what is refused."""

import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from neo_jax import hf, sharding, state
from neo_jax.activations import ACTIVATIONS
from neo_jax.config import ConfigError, MeshConfig, ModelConfig, preset_model

SMALL = ModelConfig(
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    window_size=8,
    vocab_size=300,
    max_seq_len=64,
    compute_dtype="float32",
)
UNTIED = dataclasses.replace(
    SMALL,
    num_layers=3,
    attention_types=("global", "local", "local"),
    tie_embeddings=False,
    num_heads=1,
    mlp_dim=20,
    activation="relu",
    layer_norm_eps=1e-3,
    vocab_size=211,
)


def random_state(config: ModelConfig, dtype=np.float32, head: hf.Head | None = None):
    """A state dict in Hugging Face's names, drawn without either model."""
    rng = np.random.default_rng(0)
    return {
        entry.name: rng.normal(0, 0.1, entry.shape).astype(dtype)
        for entry in hf.name_table(config, head)
    }


def save(folder: pathlib.Path, config: ModelConfig, weights, **changes) -> pathlib.Path:
    """A directory as `save_pretrained` would leave it, without transformers."""
    folder.mkdir(exist_ok=True)
    values = {**hf.config_to_hf(config), **changes}
    (folder / "config.json").write_text(json.dumps(values))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return folder


def assert_same(actual, expected) -> None:
    """Equal to the bit, types included."""
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        assert np.asarray(actual[name]).tobytes() == np.asarray(array).tobytes(), name


def logits(config: ModelConfig, params, ids) -> np.ndarray:
    graph, _ = state.model_graph(config)
    params = jax.tree.map(jnp.asarray, params)
    return np.asarray(nnx.merge(graph, params).logits(jnp.asarray(ids)))


# -------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", ["neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b", "tiny"])
def test_config_round_trip(name):
    config = preset_model(name)
    assert hf.config_from_hf(json.loads(json.dumps(hf.config_to_hf(config)))) == config


def test_config_of_other_shapes():
    assert hf.config_from_hf(hf.config_to_hf(UNTIED)) == dataclasses.replace(
        UNTIED, compute_dtype="auto"
    )


def test_released_config():
    """EleutherAI/gpt-neo-125m's config.json, as far as it says what is computed."""
    config = hf.config_from_hf(
        {
            "activation_function": "gelu_new",
            "architectures": ["GPTNeoForCausalLM"],
            "attention_dropout": 0,
            "attention_layers": ["global", "local"] * 6,
            "attention_types": [[["global", "local"], 6]],
            "hidden_size": 768,
            "intermediate_size": None,
            "layer_norm_epsilon": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neo",
            "num_heads": 12,
            "num_layers": 12,
            "vocab_size": 50257,
            "window_size": 256,
        }
    )
    assert config == preset_model("neo_125m")


@pytest.mark.parametrize(
    ("hidden_size", "num_layers"),
    [(64, 8), (128, 8), (256, 8), (512, 8), (768, 4), (1024, 1), (768, 2)],
)
def test_tinystories_configs(hidden_size, num_layers):
    """16 heads at every width; window 256, 2048 positions, GPT-2's vocabulary."""
    config = hf.config_from_hf(
        {
            "model_type": "gpt_neo",
            "hidden_size": hidden_size,
            "num_heads": 16,
            "num_layers": num_layers,
            "attention_types": [[["global", "local"], num_layers // 2]]
            if num_layers > 1
            else [[["global"], 1]],
            "intermediate_size": None,
            "resid_dropout": 0,
            "vocab_size": 50257,
        }
    )
    assert config.num_heads == 16 and config.mlp_dim == 4 * hidden_size
    assert config.window_size == 256 and config.max_seq_len == 2048


def test_older_words_for_the_same_key():
    config = hf.config_from_hf(
        {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_size": 16,
            "n_positions": 99,
            "attention_types": [[["local"], 1], [["global"], 1]],
            "activation_function": "swish",
        }
    )
    assert (config.num_layers, config.num_heads, config.max_seq_len) == (2, 4, 99)
    assert config.attention_types == ("local", "global") and config.activation == "silu"


def test_activations_by_every_name_of_transformers():
    """Each name means the function of ours that transformers computes under it."""
    torch, transformers = torch_and_transformers()
    x = np.linspace(-12, 12, 401, dtype=np.float32)
    met = set()
    for theirs in sorted(set(transformers.activations.ACT2CLS) - {"prelu", "xielu"}):
        ours = hf.config_from_hf({"activation_function": theirs}).activation
        expected = transformers.activations.ACT2FN[theirs](torch.tensor(x)).numpy()
        given = ACTIVATIONS[ours](jnp.asarray(x))
        np.testing.assert_allclose(given, expected, rtol=2e-6, atol=2e-6, err_msg=theirs)
        met.add(ours)
    assert met == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_goes_out_under_the_name_it_came_by(name):
    config = hf.config_from_hf({"activation_function": name})
    assert hf.config_to_hf(config)["activation_function"] == name


def test_dropout_is_passed_over_with_a_note(caplog):
    config = hf.config_from_hf({"attention_dropout": 0.1, "embed_dropout": 0.0})
    assert config == preset_model("neo_1p3b")
    assert "attention_dropout" in caplog.text and "embed_dropout" not in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2', which is not GPT-Neo"),
        ({"model_type": "gptj"}, "model_type 'gptj', which is not GPT-Neo"),
        ({"activation_function": "mich"}, "function 'mich' is unknown, did you mean 'mish'"),
        ({"activation_function": "prelu"}, "function 'prelu' learns weights of its own"),
        ({"num_layers": 3}, "describes 2 layers, but model.num_layers=3"),
        ({"num_heads": 7}, "num_heads=7 does not divide"),
        ({"attention_types": [[["sliding"], 24]]}, "'sliding' is unknown"),
        ({"hidden_size": "wide"}, "embed_dim='wide' must be of type int"),
    ],
)
def test_configs_refused(values, message):
    with pytest.raises(ConfigError, match=message) as raised:
        hf.config_from_hf(values)
    assert "\n" not in str(raised.value)


# ------------------------------------------------------------------------------ in memory


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
def test_round_trip_in_memory(config, dtype):
    weights = random_state(config, dtype)
    params = hf.from_hf(weights, config)
    shapes = jax.tree.map(lambda leaf: leaf.shape, hf.abstract_params(config))
    assert jax.tree.map(lambda leaf: leaf.shape, params) == shapes
    assert_same(hf.to_hf(params, config), weights)
    assert not params["embedder"]["embedding"][config.vocab_size :].any()


def test_every_tensor_has_its_own_place():
    weights = random_state(UNTIED)
    params = hf.from_hf(weights, UNTIED)
    layer, D, H = 2, UNTIED.embed_dim, UNTIED.head_dim
    kernel = params["blocks"]["attention"]["key"]["kernel"][layer]
    theirs = weights[f"transformer.h.{layer}.attn.attention.k_proj.weight"]
    assert kernel.shape == (D, 1, H)
    np.testing.assert_array_equal(kernel[:, 0], theirs.T)
    assert len({array.tobytes() for array in weights.values()}) == len(weights)


def test_masks_of_older_checkpoints_and_bare_models():
    weights = random_state(SMALL)
    bare = {name.removeprefix("transformer."): a for name, a in weights.items()}
    bare["h.0.attn.attention.bias"] = np.ones((1, 1, 64, 64), np.uint8)
    bare["h.0.attn.attention.masked_bias"] = np.float32(-1e9)
    assert_same(hf.to_hf(hf.from_hf(bare, SMALL), SMALL), weights)


def test_a_tied_head_may_be_written_out_but_not_differ():
    weights = random_state(SMALL)
    written_out = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    hf.from_hf(written_out, SMALL)
    written_out["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        hf.from_hf(written_out, SMALL)


def test_report_of_names_and_shapes():
    weights = random_state(SMALL)
    del weights["transformer.h.1.mlp.c_fc.bias"]
    weights["transformer.h.9.extra"] = np.zeros(3)
    weights["transformer.wpe.weight"] = np.zeros((60, 32), np.float32)
    with pytest.raises(ValueError, match="do not fit") as raised:
        hf.from_hf(weights, SMALL)
    for part in (
        "missing: transformer.h.1.mlp.c_fc.bias",
        "unexpected: transformer.h.9.extra",
        "transformer.wpe.weight [60, 32] instead of [64, 32]",
    ):
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
def test_round_trip_on_disk(tmp_path, config, dtype):
    weights = random_state(config, jnp.dtype(dtype))
    source = save(tmp_path / "source", config, weights)
    model = hf.read(source)
    assert model.config == dataclasses.replace(config, param_dtype=dtype, compute_dtype="auto")
    written = hf.write(model.params, model.config, tmp_path / "ours", shard_bytes=20_000)
    files = sorted(written.glob("*.safetensors"))
    assert len(files) > 2 and max(f.stat().st_size for f in files) < 50_000
    joined = {k: v for f in files for k, v in safetensors.numpy.load_file(f).items()}
    assert_same(joined, weights)
    again = hf.read(written)
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_dtype_on_the_way(tmp_path):
    weights = random_state(SMALL)
    half = hf.read(save(tmp_path / "a", SMALL, weights), dtype="bfloat16")
    assert half.params["ln_f"]["scale"].dtype == jnp.bfloat16
    hf.write(half.params, half.config, tmp_path / "b", dtype="float32")
    stored = safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors")
    rounded = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in weights.items()}
    assert_same(stored, rounded)


def test_float16_becomes_float32(tmp_path):
    weights = random_state(SMALL, np.float16)
    model = hf.read(save(tmp_path / "a", SMALL, weights))
    assert model.config.param_dtype == "float32"
    assert_same(
        hf.to_hf(model.params, model.config),
        {k: v.astype(np.float32) for k, v in weights.items()},
    )


def test_weights_land_sharded(tmp_path):
    """On eight devices; each leaf where the table of sharding.py wants it."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    _, abstract = state.model_graph(SMALL)
    places = nnx.to_pure_dict(sharding.param_shardings(abstract, mesh))
    weights = random_state(SMALL)
    source = save(tmp_path / "source", SMALL, weights)
    model = hf.read(source, mesh=mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, model.params) == places
    kernel = model.params["blocks"]["mlp"]["up"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(4, 16, 64)}
    assert_same(hf.to_hf(model.params, model.config), weights)


@pytest.mark.parametrize("devices", [1, 8])
def test_memory_stays_bounded(tmp_path, devices):
    """Reading holds the parameters once, and no more than two tensors beside them.

    Measured in a fresh process: how much its peak of resident memory grows.
    """
    config = preset_model(
        "neo_125m", num_layers=8, embed_dim=512, num_heads=8, vocab_size=30_000
    )
    source = save(tmp_path / "source", config, random_state(config))
    root = pathlib.Path(__file__).parents[1]
    code = (
        "import resource, sys, jax\n"
        "from neo_jax import config, hf, sharding, state\n"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "mesh = sharding.make_mesh(config.MeshConfig()) if jax.device_count() > 1 else None\n"
        "before = peak()\n"
        "model = hf.read(sys.argv[1], mesh=mesh)\n"
        "jax.block_until_ready(model.params)\n"
        "print(peak() - before, state.num_bytes(model.params))\n"
    )
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", code, source],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": flags},
    )
    grown, target = map(int, done.stdout.split())
    largest = 4 * config.vocab_size * config.embed_dim
    assert target > 150e6
    assert grown < target + 2 * largest + 150e6  # 150 MB: the compiler and its code


# ------------------------------------------------------------------------- against torch


def torch_and_transformers():
    return pytest.importorskip("torch"), pytest.importorskip("transformers")


@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
def test_transformers_loads_what_we_write(tmp_path, config):
    torch, transformers = torch_and_transformers()
    params = hf.from_hf(random_state(config), config)
    hf.write(params, config, tmp_path, shard_bytes=30_000, eos_id=7)
    model, info = transformers.GPTNeoForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == torch.float32 and model.generation_config.eos_token_id == 7
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 30))
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(config, params, ids), expected, atol=2e-5)


@pytest.mark.parametrize("config", [SMALL, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin", "bfloat16"])
def test_we_load_what_transformers_writes(tmp_path, config, kind):
    torch, transformers = torch_and_transformers()
    model = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(**hf.config_to_hf(config))
    )
    if kind == "bfloat16":
        model = model.bfloat16()
    model.save_pretrained(tmp_path, **({"max_shard_size": "30KB"} if kind == "shards" else {}))
    if kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    if kind == "shards":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = hf.read(tmp_path)
    bits = torch.int16 if kind == "bfloat16" else torch.int32
    ours = hf.to_hf(loaded.params, loaded.config)
    for name, tensor in model.state_dict().items():
        if name in ours:
            assert ours[name].tobytes() == tensor.contiguous().view(bits).numpy().tobytes()
    assert len(ours) == len(dict(model.named_parameters()))


HEADED = [
    hf.Head("GPTNeoForSequenceClassification", ("no", "maybe", "yes"), pad_token_id=0),
    hf.Head("GPTNeoForTokenClassification", ("A", "B", "C", "D")),
    hf.Head("GPTNeoForQuestionAnswering", ("LABEL_0", "LABEL_1")),
]


@pytest.mark.parametrize("head", HEADED, ids=lambda head: head.architecture)
def test_heads_both_ways(tmp_path, head):
    torch, transformers = torch_and_transformers()
    kind = getattr(transformers, head.architecture)
    params = hf.from_hf(random_state(SMALL, head=head), SMALL, head)
    hf.write(params, SMALL, tmp_path / "ours", head=head)
    model, info = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert tuple(model.config.id2label.values()) == head.labels
    with torch.no_grad():
        for parameter in model.parameters():  # as if trained there
            parameter.add_(0.01)
    model.save_pretrained(tmp_path / "theirs")
    loaded = hf.read(tmp_path / "theirs")
    assert loaded.head == head
    ids = np.random.default_rng(0).integers(1, SMALL.vocab_size, (3, 20))
    ids[1, 15:] = 0
    graph, _ = state.model_graph(loaded.config)
    hidden = nnx.merge(graph, loaded.params["model"]).hidden(jnp.asarray(ids))
    ours = hf.head_logits(loaded.params["head"], hidden)
    with torch.no_grad():
        outputs = model(torch.tensor(ids))
    if head.architecture == "GPTNeoForSequenceClassification":
        last = hf.last_token(jnp.asarray(ids), head.pad_token_id)
        np.testing.assert_array_equal(last, [19, 14, 19])
        ours, theirs = ours[jnp.arange(3), last], outputs.logits
    elif head.architecture == "GPTNeoForQuestionAnswering":
        theirs = torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    else:
        theirs = outputs.logits
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


def test_a_classifier_of_ours_in_their_pipeline(tmp_path):
    """Texts in, the same labels out, by transformers' own pipeline and by us."""
    _, transformers = torch_and_transformers()
    from neo_jax import tokenizer

    words = tokenizer.load("gpt2")
    config = dataclasses.replace(SMALL, vocab_size=words.vocab_size)
    head = hf.Head("GPTNeoForSequenceClassification", ("bad", "good"), pad_token_id=50256)
    weights = random_state(config, head=head)
    weights["transformer.ln_f.bias"][:] = 0  # which would speak for one label on any text
    weights["transformer.wte.weight"] *= 20
    params = hf.from_hf(weights, config, head)
    hf.write(params, config, tmp_path, head=head, eos_id=words.eos_id)
    hf.write_tokenizer(words, tmp_path, config.max_seq_len)
    texts = ["What a fine day.", "Rain again!", "Née à Zürich; 中文 too.", "no", "x " * 20]
    pipe = transformers.pipeline("text-classification", model=str(tmp_path))
    theirs = [answer["label"] for answer in pipe(texts)]
    graph, _ = state.model_graph(config)

    @jax.jit
    def scores(params, ids):
        hidden = nnx.merge(graph, params["model"]).hidden(ids)
        return hf.head_logits(params["head"], hidden)[0, hf.last_token(ids, 50256)[0]]

    ours = []
    for text in texts:
        ids = [*words.encode(text), *[50256] * 64][:64]
        ours.append(head.labels[int(scores(params, jnp.asarray([ids])).argmax())])
    assert ours == theirs and set(ours) == {"bad", "good"}


def test_the_tokenizer_that_we_write(tmp_path):
    _, transformers = torch_and_transformers()
    from neo_jax import tokenizer

    words = tokenizer.load("gpt2")
    hf.write_tokenizer(words, tmp_path, 2048)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "Née à Zürich;  中文\n\n too <|endoftext|> x"
    assert theirs(text)["input_ids"] == words.encode(text)
    assert theirs.eos_token_id == words.eos_id and theirs.model_max_length == 2048
    hf.copy_tokenizer(tmp_path, tmp_path)


# -------------------------------------------------------------------------------- refused


def test_files_refused(tmp_path):
    weights = random_state(SMALL)
    folder = save(tmp_path / "m", SMALL, weights)
    file = folder / "model.safetensors"
    whole = file.read_bytes()

    def message() -> str:
        with pytest.raises(ValueError, match=str(tmp_path)) as raised:
            hf.read(folder)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    file.write_bytes(whole[:-10])
    assert "is not a whole safetensors file" in message()
    file.write_bytes(whole[:100])
    assert "is not a whole safetensors file" in message()
    file.unlink()
    assert "holds neither model.safetensors nor pytorch_model.bin" in message()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names shards that are missing: model-00001-of-00002.safetensors" in message()
    for index in ({}, {"weight_map": {}}, {"weight_map": {"a": "../model.safetensors"}}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert "has no 'weight_map' of tensors to files beside it" in message()
    (folder / "model.safetensors.index.json").write_text("{")
    assert "cannot be read as JSON" in message()
    (folder / "config.json").unlink()
    assert "holds no config.json" in message()


def test_weights_that_are_no_floats_are_refused(tmp_path):
    weights = random_state(SMALL)
    weights["transformer.ln_f.weight"] = np.ones(SMALL.embed_dim, np.int8)
    with pytest.raises(ValueError, match=r"^transformer.ln_f.weight is stored as int8; .*$"):
        hf.read(save(tmp_path / "m", SMALL, weights))


def test_float64_is_read_as_float32(tmp_path):
    weights = random_state(SMALL)
    wider = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    model = hf.read(save(tmp_path / "m", SMALL, wider))
    assert model.config.param_dtype == "float32"
    for name, tensor in hf.to_hf(model.params, model.config).items():
        np.testing.assert_array_equal(tensor, weights[name])


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"epoch": 3}])
def test_a_bin_of_other_things_is_refused(tmp_path, content):
    torch, _ = torch_and_transformers()
    folder = save(tmp_path / "m", SMALL, random_state(SMALL))
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"^\S+ is refused, it holds other things than .*$"):
        hf.read(folder)


def test_writing_over_weights_is_refused(tmp_path):
    params = hf.from_hf(random_state(SMALL), SMALL)
    hf.write(params, SMALL, tmp_path)
    with pytest.raises(ValueError, match="holds weights already"):
        hf.write(params, SMALL, tmp_path)


def test_nan_is_warned_of(tmp_path, caplog):
    weights = random_state(SMALL)
    weights["transformer.h.3.ln_2.bias"][5] = np.nan
    weights["transformer.wpe.weight"][0, 0] = np.inf
    hf.read(save(tmp_path / "m", SMALL, weights))
    assert "transformer.h.3.ln_2.bias holds NaN" in caplog.text
    assert "transformer.wpe.weight holds infinities" in caplog.text


class _Malicious:
    def __init__(self, mark: str):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("archive", [True, False])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, archive):
    torch, _ = torch_and_transformers()
    folder = save(tmp_path / "m", SMALL, random_state(SMALL))
    (folder / "model.safetensors").unlink()
    mark = tmp_path / "executed"
    bomb = {"transformer.wte.weight": _Malicious(str(mark))}
    if archive:
        torch.save(bomb, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match=r"^\S+ is refused, .*; give a .*$") as refused:
        hf.read(folder)
    assert "weights_only" not in str(refused.value)  # and no advice to trust it
    assert not mark.exists()
    pickle.loads(pickle.dumps(bomb))  # the same bytes, had they been trusted
    assert mark.exists()


@pytest.mark.parametrize("name", ["/no/such/dir", "./nothing", "a/b/c"])
def test_a_directory_that_is_not_there(name):
    with pytest.raises(ConfigError, match="is not a directory"):
        hf.read(name)
