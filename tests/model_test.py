"""The network: names and shapes of every weight, its symmetries, and eight devices as one."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neo_jax import sharding, state
from neo_jax.activations import ACTIVATIONS
from neo_jax.config import ConfigError, MeshConfig, ModelConfig, preset_model
from neo_jax.loss import cross_entropy
from neo_jax.model import NeoLM, init_stddevs

TINY = ModelConfig(
    num_layers=4,
    embed_dim=32,
    num_heads=4,
    window_size=8,
    vocab_size=200,
    max_seq_len=48,
    compute_dtype="float32",
)


@functools.cache
def params_of(config: ModelConfig):
    def init():
        return nnx.to_pure_dict(nnx.state(NeoLM(config, nnx.Rngs(params=jax.random.key(0)))))

    return jax.jit(init)()


@functools.cache
def _jitted_logits(config: ModelConfig):
    graph, _ = state.model_graph(config)
    return jax.jit(lambda p, ids, kwargs: nnx.merge(graph, p).logits(ids, **kwargs))


def logits(config: ModelConfig, params, ids, **kwargs) -> np.ndarray:
    return np.asarray(_jitted_logits(config)(params, jnp.asarray(ids), kwargs))


def random_ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, TINY.vocab_size, shape)


# ------------------------------------------------------------------------ names and shapes


def shapes_of(L, D, N, H, F, V, P):
    """The whole parameter tree as dotted names and shapes."""
    return {
        "blocks.attention.key.kernel": (L, D, N, H),
        "blocks.attention.out.bias": (L, D),
        "blocks.attention.out.kernel": (L, N, H, D),
        "blocks.attention.query.kernel": (L, D, N, H),
        "blocks.attention.value.kernel": (L, D, N, H),
        "blocks.ln_1.bias": (L, D),
        "blocks.ln_1.scale": (L, D),
        "blocks.ln_2.bias": (L, D),
        "blocks.ln_2.scale": (L, D),
        "blocks.mlp.down.bias": (L, D),
        "blocks.mlp.down.kernel": (L, F, D),
        "blocks.mlp.up.bias": (L, F),
        "blocks.mlp.up.kernel": (L, D, F),
        "embedder.embedding": (V, D),
        "embedder.positions": (P, D),
        "ln_f.bias": (D,),
        "ln_f.scale": (D,),
    }


def dotted(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
    }


@pytest.mark.parametrize(
    ("name", "dims", "count"),
    [
        ("neo_125m", (12, 768, 12, 64, 3072, 50304, 2048), 125_198_592),
        ("neo_350m", (24, 1024, 16, 64, 4096, 50304, 2048), 355_798_016),
        ("neo_1p3b", (24, 2048, 16, 128, 8192, 50304, 2048), 1_315_575_808),
        ("neo_2p7b", (32, 2560, 20, 128, 10240, 50304, 2048), 2_651_307_520),
    ],
)
def test_released_shapes(name, dims, count):
    """Every parameter of the four, without any memory; counts as the released files have."""
    config = preset_model(name)
    _, params = state.model_graph(config)
    params = dotted(params)
    assert {path: param.shape for path, param in params.items()} == shapes_of(*dims)
    assert state.num_params(config) == count
    pad_rows = config.padded_vocab_size - config.vocab_size
    assert sum(p.size for p in params.values()) == count + pad_rows * config.embed_dim
    assert all(len(p.get_metadata()["out_sharding"]) == p.ndim for p in params.values())


def test_untied_head_is_a_parameter_of_its_own():
    config = dataclasses.replace(TINY, tie_embeddings=False)
    params = params_of(config)
    assert params["untied_head"].shape == (256, 32)
    assert state.num_params(config) == state.num_params(TINY) + 200 * 32
    changed = {**params, "untied_head": 2 * params["untied_head"]}
    ids = random_ids(1, 5)
    np.testing.assert_array_equal(
        logits(config, changed, ids), 2 * logits(config, params, ids)
    )


def test_same_parameters_scanned_or_unrolled():
    other = dataclasses.replace(TINY, scan_layers=False, remat="full", attention="reference")
    jax.tree.map(np.testing.assert_array_equal, params_of(TINY), params_of(other))


@pytest.mark.parametrize("initializer", ["mtf", "hf"])
def test_initial_standard_deviations(initializer):
    config = dataclasses.replace(
        TINY, initializer=initializer, embed_dim=128, num_heads=4, tie_embeddings=False
    )
    D, H, L = 128, 32, 4
    expected = (
        {
            "blocks.attention.query.kernel": (D * H) ** -0.5,
            "blocks.attention.key.kernel": D**-0.5,
            "blocks.attention.value.kernel": D**-0.5,
            "blocks.attention.out.kernel": D**-0.5,
            "blocks.mlp.up.kernel": 0.02,
            "blocks.mlp.down.kernel": 0.02 / L**0.5,
            "embedder.embedding": 0.02,
            "embedder.positions": 0.01,
            "untied_head": 0.02,
        }
        if initializer == "mtf"
        else {}
    )
    assert len(init_stddevs(config)) == 9
    for path, leaf in dotted(params_of(config)).items():
        if path.endswith("bias"):
            assert not leaf.any(), path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
        else:
            assert leaf.std() == pytest.approx(expected.get(path, 0.02), rel=0.03), path
    kernels = params_of(config)["blocks"]["attention"]["query"]["kernel"]
    assert not np.allclose(kernels[0], kernels[1]), "layers began alike"


# ----------------------------------------------------------------------------- properties


@pytest.mark.parametrize("attention", ["reference", "banded"])
def test_later_tokens_change_nothing_before_them(attention):
    """To the bit."""
    config = dataclasses.replace(TINY, attention=attention)
    ids = random_ids(2, 40)
    changed = ids.copy()
    changed[:, 23] = (changed[:, 23] + 1) % TINY.vocab_size
    a, b = (logits(config, params_of(config), x) for x in (ids, changed))
    np.testing.assert_array_equal(a[:, :23], b[:, :23])
    assert (a[:, 23:] != b[:, 23:]).any(axis=-1).all()


@pytest.mark.parametrize("attention", ["reference", "banded"])
def test_a_local_layer_alone_sees_its_window(attention):
    """In a model of one local layer, to the bit: 7 back is seen, 8 back is not."""
    config = dataclasses.replace(
        TINY, num_layers=1, attention_types=("local",), attention=attention
    )
    ids = random_ids(2, 40)
    changed = ids.copy()
    changed[:, 10] = (changed[:, 10] + 1) % TINY.vocab_size
    a, b = (logits(config, params_of(config), x) for x in (ids, changed))
    differs = (a != b).any(axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(differs), np.arange(10, 18))


@pytest.mark.parametrize("attention", ["reference", "banded"])
def test_packed_documents_are_as_if_alone(attention):
    config = dataclasses.replace(TINY, attention=attention)
    params = params_of(config)
    ids = random_ids(1, 40)
    lengths = (13, 2, 25)
    segments = np.repeat(np.arange(3), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = logits(
        config,
        params,
        ids,
        positions=jnp.asarray(positions),
        segment_ids=jnp.asarray(segments),
    )
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = logits(config, params, ids[:, part])
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)
        start += length


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_vocabulary_padding_is_invisible(tie_embeddings):
    """The padded rows reach neither logits nor loss, and get no gradient."""
    config = dataclasses.replace(TINY, tie_embeddings=tie_embeddings)
    params = params_of(config)
    key = "embedder" if tie_embeddings else "untied_head"
    table = params["embedder"]["embedding"] if tie_embeddings else params["untied_head"]
    huge = table.at[config.vocab_size :].set(1e6)
    changed = {
        **params,
        key: {**params["embedder"], "embedding": huge} if tie_embeddings else huge,
    }
    ids = random_ids(2, 9)
    before, after = logits(config, params, ids), logits(config, changed, ids)
    assert before.shape == (2, 9, config.vocab_size)
    np.testing.assert_array_equal(before, after)
    (loss, _), grads = loss_and_grads(config, params, ids)
    (padded_loss, _), _ = loss_and_grads(config, changed, ids)
    assert loss == padded_loss
    grad = grads["embedder"]["embedding"] if tie_embeddings else grads["untied_head"]
    assert not grad[config.vocab_size :].any() and grad[: config.vocab_size].any()


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match=r"49 tokens exceed model\.max_seq_len=48"):
        logits(TINY, params_of(TINY), random_ids(1, 49))


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    ids = random_ids(2, 20)
    half = logits(config, params_of(TINY), ids)
    full = logits(TINY, params_of(TINY), ids)
    assert half.dtype == np.float32
    assert 1e-4 < np.abs(half - full).max() / full.std() < 0.1


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_differ(name):
    x = jnp.asarray([-0.7, 0.5, 12])
    others = [ACTIVATIONS[n](x).tolist() for n in ACTIVATIONS if n != name]
    assert ACTIVATIONS[name](x).tolist() not in others


def test_every_activation_has_a_name_in_the_config():
    names = typing.get_args(typing.get_type_hints(ModelConfig)["activation"])
    assert set(names) == set(ACTIVATIONS) and len(names) == len(ACTIVATIONS)


# -------------------------------------------------------------------------------- gradients


@functools.cache
def _jitted_loss_and_grads(config: ModelConfig):
    graph, _ = state.model_graph(config)

    def loss(params, ids):
        model = nnx.merge(graph, params)
        sums = cross_entropy(
            model.hidden(ids[:, :-1]),
            model.head,
            ids[:, 1:],
            jnp.ones(ids[:, 1:].shape),
            vocab_size=config.vocab_size,
            z_loss=1e-3,
            block_size=8,
        )
        return sums.loss, sums.nll

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def loss_and_grads(config: ModelConfig, params, ids):
    return _jitted_loss_and_grads(config)(params, jnp.asarray(ids))


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "full"},
        {"scan_layers": False, "remat": "full", "attention": "reference"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_ways_of_computing_agree(changes):
    ids = random_ids(8, 33)
    params = params_of(TINY)
    expected = loss_and_grads(TINY, params, ids)
    actual = loss_and_grads(dataclasses.replace(TINY, **changes), params, ids)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), actual, expected
    )


def test_remat_keeps_less_for_the_backward_pass():
    config = dataclasses.replace(TINY, num_layers=16, embed_dim=64)

    def bytes_kept(remat: str) -> int:
        changed = dataclasses.replace(config, remat=remat)
        graph, _ = state.model_graph(changed)

        def loss(params, ids):
            return nnx.merge(graph, params).hidden(ids).sum()

        shapes = jax.eval_shape(lambda: params_of(config))
        ids = jax.ShapeDtypeStruct((8, 48), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(shapes, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_kept("full") < 0.5 * bytes_kept("none")


# ------------------------------------------------------------------------------ 8 devices


@pytest.mark.parametrize(
    ("sizes", "attention"),
    [
        pytest.param((2, 2, 2), "banded", marks=pytest.mark.slow),
        pytest.param((1, 8, 1), "reference", marks=pytest.mark.slow),
        ((2, 1, 4), "banded"),
    ],
)
def test_eight_devices_equal_one(sizes, attention):
    data, fsdp, tensor = sizes
    config = dataclasses.replace(TINY, attention=attention)
    mesh = sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    params, ids = params_of(config), random_ids(8, 33)
    _, abstract = state.model_graph(config)
    places = nnx.to_pure_dict(sharding.param_shardings(abstract, mesh))
    expected = loss_and_grads(config, params, ids)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, places)
        spread = jax.device_put(ids, sharding.named_sharding(mesh, ("batch", None), ids.shape))
        assert len(placed["blocks"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
        actual = loss_and_grads(config, placed, spread)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5), actual, expected
    )


def test_heads_that_do_not_divide_are_refused_with_the_fix():
    _, params = state.model_graph(preset_model("neo_2p7b"))
    mesh = sharding.make_mesh(MeshConfig(fsdp=1, tensor=8))
    with pytest.raises(ConfigError, match=r"heads=20 does not divide over tensor=8.*4, 5, 10"):
        sharding.param_shardings(params, mesh)


def test_released_shapes_divide_over_a_mesh(mesh):
    for name in ("neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b"):
        _, params = state.model_graph(preset_model(name))
        places = dotted(nnx.to_pure_dict(sharding.param_shardings(params, mesh)))
        for path, param in dotted(params).items():
            part = places[path].shard_shape(param.shape)
            split = np.prod(param.shape) // np.prod(part)
            # fsdp 2 × tensor 2; a bias or the position table has one of the two at most.
            assert split == (4 if path.endswith(("kernel", "embedding")) else 2), path


# --------------------------------------------------------------------------------- NNX


def test_simple_nnx_trees_suffice():
    """The model needs neither NNX's graph mode nor its graph updates."""
    code = (
        "import jax.numpy as jnp; from flax import nnx\n"
        "from neo_jax.config import ModelConfig; from neo_jax.model import NeoLM\n"
        "c = ModelConfig(num_layers=2, embed_dim=8, num_heads=2, vocab_size=9)\n"
        "graph, params = nnx.split(NeoLM(c, nnx.Rngs(0)))\n"
        "names = params['blocks']['mlp']['up']['kernel'].get_metadata()['out_sharding']\n"
        "assert names == ('layers', 'embed', 'mlp'), names\n"
        "model = nnx.merge(graph, nnx.to_pure_dict(params))\n"
        "assert model.logits(jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 9)\n"
    )
    switches = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    root = str(pathlib.Path(__file__).parents[1])
    environment = {**os.environ, **switches, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
