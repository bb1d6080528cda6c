"""Original checkpoints: the reader against TensorFlow's own files, and what is refused.

tests/fixtures/mtf_tiny was written by TensorFlow 2.21, see write_mtf_fixture.py. Where
NEO_JAX_TF_PYTHON names a Python with TensorFlow, more is written and compared.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import reference
import write_mtf_fixture as fixture
from neo_jax import hf, mtf, sharding, state
from neo_jax.config import ConfigError, MeshConfig, preset_model

TINY = pathlib.Path(__file__).parent / "fixtures" / "mtf_tiny"


def run_tensorflow(*arguments: str) -> None:
    python = os.environ.get("NEO_JAX_TF_PYTHON")
    if not python:
        pytest.skip(
            "NEO_JAX_TF_PYTHON names no Python with TensorFlow; `make tf-env` makes one"
        )
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([python, fixture.__file__, *arguments], check=True, env=quiet)


def torch_state() -> dict[str, np.ndarray]:
    """The fixture as transformers' load_tf_weights_in_gpt_neo maps it, step for step."""
    renames = (
        ("attn/compute_output_bias/o_b", "attn/attention/out_proj/bias"),
        ("attn/q", "attn/attention/q_proj/weight"),
        ("attn/k", "attn/attention/k_proj/weight"),
        ("attn/v", "attn/attention/v_proj/weight"),
        ("attn/o", "attn/attention/out_proj/weight"),
        ("norm_", "ln_"),
        ("conv1d_main/", ""),
        ("kernel", "weight"),
    )
    result = {}
    for name, array in fixture.variables().items():
        name = name.removeprefix("gpt2/")
        for old, new in renames:
            if old in name:
                name = name.replace(old, new)
                if old.startswith("attn/"):
                    break
        parts = name.split("/")
        parts[-1] = {"g": "weight", "b": "bias"}.get(parts[-1], parts[-1])
        if parts[0].startswith("h"):
            parts[0] = f"h.{parts[0][1:]}"
        if parts[0] in ("wte", "wpe"):
            parts.append("weight")
        if array.ndim == 2 and parts[0] not in ("wte", "wpe"):
            array = array.T
        if parts[0] == "wte":
            array = array[: fixture.CONFIG["n_vocab"]]
        result[f"transformer.{'.'.join(parts)}"] = array
    return result


# ---------------------------------------------------------------------------- the reader


def test_every_variable_is_read_as_tensorflow_wrote_it():
    bundle = mtf.open_bundle(TINY / "model.ckpt-7")
    expected = fixture.variables()
    slots = {f"{name}/adam_{slot}" for name in expected for slot in "mv"}
    assert set(bundle) == {*expected, *slots, "global_step"}
    assert bundle["global_step"].read() == 7
    for name, array in expected.items():
        assert bundle[name].dtype == array.dtype and bundle[name].shape == array.shape
        np.testing.assert_array_equal(bundle[name].read(), array)
    assert (bundle["gpt2/wte/adam_m"].read() == 99).all()


@pytest.mark.parametrize("source", [TINY, TINY / "model.ckpt-7"])
def test_model_equals_the_loaders_mapping(source):
    """Bit by bit the state that transformers' loader builds, and the logits of that state."""
    assert mtf.is_checkpoint(source)
    model = mtf.read(source)
    expected = torch_state()
    actual = hf.to_hf(model.params, model.config)
    assert set(actual) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)
    ids = np.random.default_rng(0).integers(0, 53, 16)
    graph, _ = state.model_graph(model.config)
    logits = nnx.merge(graph, model.params).logits(jnp.asarray(ids[None]))[0]
    settings = {"num_heads": 2, "window": 4, "activation": "gelu_new", "eps": 1e-5}
    theirs = reference.logits(expected, ids, layer_types=("global", "local"), **settings)
    assert np.abs(logits - theirs).max() < 2e-5 * theirs.std()


def test_the_newest_step_is_taken(tmp_path):
    """By number: 12 comes after 7, whatever the alphabet says."""
    folder = pathlib.Path(shutil.copytree(TINY, tmp_path / "m"))
    for file in folder.glob("model.ckpt-7.*"):
        shutil.copy(file, folder / file.name.replace("-7.", "-12."))
    assert mtf.checkpoint_prefix(folder).name == "model.ckpt-12"
    assert mtf.checkpoint_prefix(folder / "model.ckpt-7").name == "model.ckpt-7"


def test_logits_equal_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = mtf.read(TINY)
    theirs = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(**hf.config_to_hf(model.config))
    )
    weights = {name: torch.tensor(array) for name, array in torch_state().items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    theirs.tie_weights()
    ids = np.random.default_rng(0).integers(0, 53, (2, 16))
    graph, _ = state.model_graph(model.config)
    ours = nnx.merge(graph, model.params).logits(jnp.asarray(ids))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    assert np.abs(ours - expected).max() < 2e-5 * expected.std()


def test_variables_land_sharded():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    whole = mtf.read(TINY)
    _, abstract = state.model_graph(whole.config)
    places = nnx.to_pure_dict(sharding.param_shardings(abstract, mesh))
    placed = mtf.read(TINY, mesh=mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed.params) == places
    jax.tree.map(np.testing.assert_array_equal, placed.params, whole.params)


def test_fresh_files_of_tensorflow(tmp_path):
    """The committed fixture is what TensorFlow writes; bfloat16 and newer steps are read."""
    run_tensorflow(str(tmp_path))
    for file in sorted(TINY.glob("*.*")):  # but not `checkpoint`, which holds a path
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name
    run_tensorflow(str(tmp_path), "12", "bfloat16")
    assert mtf.checkpoint_prefix(tmp_path).name == "model.ckpt-12"
    model = mtf.read(tmp_path)
    assert model.config.param_dtype == "bfloat16"
    expected = torch_state()["transformer.h.1.mlp.c_fc.weight"].astype(ml_dtypes.bfloat16)
    actual = hf.to_hf(model.params, model.config)["transformer.h.1.mlp.c_fc.weight"]
    assert actual.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(actual, expected)


# -------------------------------------------------------------------------------- configs


def test_released_configs():
    """GPT3_XL_pretrained.json and GPT3_2-7B_pretrained.json are the released shapes."""
    common = {
        "n_vocab": 50257,
        "n_ctx": 2048,
        "activation_function": "gelu",
        "padding_id": 50257,
    }
    pairs = {
        "neo_1p3b": {"n_head": 16, "n_embd": 2048, "n_layer": 24},
        "neo_2p7b": {"n_head": 20, "n_embd": 2560, "n_layer": 32},
    }
    for name, values in pairs.items():
        pattern = [[["global", "local"], values["n_layer"] // 2]]
        values = {**common, **values, "attention_types": pattern}
        assert mtf.config_from_mtf(values) == preset_model(name)


@pytest.mark.parametrize(
    ("base", "n_head", "n_embd", "n_layer", "n_ctx"),
    [
        ("neo_1p3b", 32, 2048, 24, 2048),  # gpt3_XL_256.json, gpt3_XL_256_Pile.json
        ("neo_2p7b", 32, 2560, 32, 2048),  # gpt3_2-7B_256.json
        ("neo_125m", 6, 768, 12, 1024),  # gpt2_small.json
    ],
)
def test_the_other_configs_of_master(base, n_head, n_embd, n_layer, n_ctx):
    """Other models than the released: global attention only, and other heads."""
    values = {
        "n_head": n_head,
        "n_vocab": 50257,
        "n_embd": n_embd,
        "n_ctx": n_ctx,
        "n_layer": n_layer,
        "attention_types": [[["global"], n_layer]],
        "activation_function": "gelu",
        "weight_decay": 0.1,
        "mesh_shape": "x:128,y:2",
    }
    config = mtf.config_from_mtf(values)
    changes = {"num_heads": n_head, "attention_types": ("global",), "max_seq_len": n_ctx}
    assert config == preset_model(base, **changes)


def test_activations_of_the_original():
    """`activation_function` is read by no version of it; later ones read `activation_fn`."""
    assert mtf.config_from_mtf(fixture.CONFIG).activation == "gelu_new"
    values = {**fixture.CONFIG, "activation_function": "selu", "activation_fn": "relu"}
    assert mtf.config_from_mtf(values).activation == "relu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": None}, "lacks n_embd"),
        ({"rezero": True}, "sets rezero=True"),
        ({"moe_layers": [1]}, "sets moe_layers"),
        ({"rotary_emb": True}, "sets rotary_emb=True"),
        ({"mlm_training": True}, "sets mlm_training=True"),
        ({"activation_fn": "snake"}, "sets activation_fn='snake'; only gelu, relu, silu"),
        ({"attention_types": [[["linear"], 2]]}, "'linear' is unknown"),
    ],
)
def test_configs_refused(changes, message):
    values = {**fixture.CONFIG, **changes}
    values = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        mtf.config_from_mtf(values)


# -------------------------------------------------------------------------------- refused


def test_files_refused(tmp_path):
    folder = tmp_path / "m"

    def message() -> str:
        with pytest.raises(ValueError, match=r"\w") as raised:
            mtf.read(folder)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    def fresh() -> pathlib.Path:
        shutil.rmtree(folder, ignore_errors=True)
        return pathlib.Path(shutil.copytree(TINY, folder)) / "model.ckpt-7"

    data = fresh().with_name("model.ckpt-7.data-00000-of-00001")
    data.write_bytes(data.read_bytes()[:9000])
    assert "is cut off in variable" in message()
    data.unlink()
    assert "is missing, which holds variable" in message()
    index = fresh().with_name("model.ckpt-7.index")
    index.write_bytes(index.read_bytes()[:-7])
    assert "is not a whole index" in message()
    index.unlink()
    assert "holds no TensorFlow checkpoint" in message()
    fresh()
    (folder / "config.json").unlink()
    assert "cannot be read as JSON" in message()
    (folder / "config.json").write_text(
        json.dumps({**fixture.CONFIG, "n_layer": 3} | {"attention_types": ["global"]})
    )
    assert "missing: transformer.h.2.ln_1.weight" in message()
    (folder / "config.json").write_text(
        json.dumps({**fixture.CONFIG, "n_layer": 1} | {"attention_types": ["global"]})
    )
    told = message()  # of another network, but not the optimiser's slots
    assert "unexpected: gpt2/h1/" in told and "missing" not in told and "adam" not in told
    (folder / "config.json").write_text(json.dumps({**fixture.CONFIG, "n_ctx": 17}))
    assert "transformer.wpe.weight [16, 8] instead of [17, 8]" in message()


def test_a_vocabulary_larger_than_the_table_is_refused(tmp_path):
    config = tmp_path / "c.json"
    config.write_text(json.dumps({**fixture.CONFIG, "n_vocab": 65}))
    with pytest.raises(ValueError, match=r"wte\.weight \[64, 8\] instead of \[65, 8\]"):
        mtf.read(TINY, config_file=config)


def test_dtype_on_the_way():
    model = mtf.read(TINY, dtype="bfloat16")
    assert model.params["ln_f"]["scale"].dtype == jnp.bfloat16
    assert model.config == dataclasses.replace(mtf.read(TINY).config, param_dtype="bfloat16")
