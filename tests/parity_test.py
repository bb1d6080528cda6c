"""The model against transformers' GPTNeoForCausalLM and against a NumPy GPT-Neo.

Errors are measured in units of the logits' scale: the largest difference over the largest
of the reference's logits. Above the bounds here something other than the order of
floating-point sums differs. How much that order alone can do shows in the tests against
float64, where our error is held against torch's own.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import reference
from neo_jax import hf
from neo_jax.config import ModelConfig, preset_model
from neo_jax.loss import cross_entropy
from neo_jax.model import NeoLM
from neo_jax.state import Params, model_graph

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
SHAPES = ("neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b")
SMALL = ModelConfig(
    num_layers=4,
    embed_dim=64,
    num_heads=4,
    window_size=8,
    vocab_size=301,
    max_seq_len=64,
    compute_dtype="float32",
)
ODD = ModelConfig(
    num_layers=3,
    attention_types=("global", "local", "local"),
    embed_dim=24,
    num_heads=1,
    mlp_dim=50,
    window_size=7,
    vocab_size=97,
    vocab_multiple=10,
    max_seq_len=40,
    activation="relu",
    layer_norm_eps=1e-3,
    tie_embeddings=False,
    compute_dtype="float32",
)


# ------------------------------------------------------------------------------ both sides


def torch_model(config: ModelConfig, initializer: str, seed: int = 0):
    """A GPTNeoForCausalLM with random weights of either initialiser; biases not left at 0."""
    torch.manual_seed(seed)
    model = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(**hf.config_to_hf(config), attn_implementation="eager")
    )
    if initializer == "mtf":
        graph_free = dataclasses.replace(config, initializer="mtf", param_dtype="float32")
        weights = hf.to_hf(fresh_params(graph_free, seed), config)
        load(model, weights)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
    return model.eval()


@functools.cache
def _jitted_init(config: ModelConfig):
    return jax.jit(lambda key: nnx.state(NeoLM(config, nnx.Rngs(params=key))))


def fresh_params(config: ModelConfig, seed: int) -> Params:
    return nnx.to_pure_dict(_jitted_init(config)(jax.random.key(seed)))


def dense_params(config: ModelConfig) -> Params:
    """Random numbers everywhere, also in biases and scales; float64."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0.1, 0.3, leaf.shape), hf.abstract_params(config)
    )


def load(model, weights) -> None:
    weights = {name: torch.from_numpy(np.array(a)) for name, a in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}


def numpy_state(model) -> dict[str, np.ndarray]:
    state = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@functools.cache
def _jitted_logits(config: ModelConfig):
    graph, _ = model_graph(config)
    return jax.jit(lambda params, ids, kw: nnx.merge(graph, params).logits(ids, **kw))


def our_logits(config: ModelConfig, params: Params, ids, **kwargs) -> np.ndarray:
    return np.asarray(_jitted_logits(config)(params, jnp.asarray(ids), kwargs))


def torch_logits(model, ids, mask=None, positions=None) -> np.ndarray:
    as_tensor = lambda x: None if x is None else torch.tensor(x)  # noqa: E731
    with torch.no_grad():
        return model(
            as_tensor(ids),
            attention_mask=as_tensor(mask),
            position_ids=as_tensor(positions),
            use_cache=False,
        ).logits.numpy()


@contextlib.contextmanager
def torch_in_double() -> Iterator[None]:
    """Double throughout: transformers casts queries and keys to float32 even then."""
    module = transformers.models.gpt_neo.modeling_gpt_neo

    class Double(types.ModuleType):
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    module.torch = Double("torch")
    try:
        yield
    finally:
        module.torch = torch


def error(actual: np.ndarray, expected: np.ndarray, where=...) -> float:
    assert actual.shape == expected.shape and np.isfinite(actual).all()
    difference = np.abs(actual.astype(np.float64) - expected)[where]
    return float(difference.max() / np.abs(expected[where]).max())


def random_ids(config: ModelConfig, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, shape)


def padded_rows(seq: int) -> dict[str, np.ndarray]:
    """Masks, positions and segments [3, seq]: no padding, padding left, padding right."""
    mask = np.ones((3, seq), np.int64)
    mask[1, : seq // 3] = 0
    mask[2, seq - seq // 4 :] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return {"mask": mask, "positions": positions}


def compare(config: ModelConfig, model, params: Params, seq: int) -> float:
    """The error over the real tokens of three rows, two of them padded where that can be."""
    rows = padded_rows(seq)
    ids = random_ids(config, 3, seq)
    expected = torch_logits(model, ids, rows["mask"], rows["positions"])
    actual = our_logits(
        config,
        params,
        ids,
        positions=jnp.asarray(rows["positions"]),
        segment_ids=jnp.asarray(rows["mask"]),
    )
    return error(actual, expected, rows["mask"] == 1)


# ------------------------------------------------------------------------------------ fp32


@pytest.mark.parametrize("attention", ["reference", "banded"])
@pytest.mark.parametrize(
    ("seq", "initializer"), [(1, "hf"), (8, "mtf"), (9, "hf"), (64, "hf")]
)
def test_logits_equal_torch(seq, initializer, attention):
    config = dataclasses.replace(SMALL, attention=attention)
    model = torch_model(config, initializer)
    params = hf.from_hf(numpy_state(model), config)
    assert compare(config, model, params, seq) < TOLERANCE


def test_logits_equal_torch_without_masks():
    model = torch_model(SMALL, "hf")
    ids = random_ids(SMALL, 2, 50)
    actual = our_logits(SMALL, hf.from_hf(numpy_state(model), SMALL), ids)
    assert error(actual, torch_logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize(("scan_layers", "remat"), [(False, "none"), (True, "full")])
@pytest.mark.parametrize("base", [SMALL, ODD], ids=["small", "odd"])
def test_scan_and_remat_equal_torch(base, remat, scan_layers):
    config = dataclasses.replace(base, remat=remat, scan_layers=scan_layers)
    model = torch_model(config, "hf")
    ids = random_ids(config, 2, 33)
    params = hf.from_hf(numpy_state(model), config)
    assert error(our_logits(config, params, ids), torch_logits(model, ids)) < TOLERANCE


@pytest.mark.parametrize("name", SHAPES)
def test_released_widths_equal_torch(name):
    config = preset_model(name, num_layers=2, vocab_size=500, compute_dtype="float32")
    model = torch_model(config, "hf")
    params = hf.from_hf(numpy_state(model), config)
    assert compare(config, model, params, 257) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_layers", "initializer"),
    [
        ("neo_125m", 12, "mtf"),
        ("neo_125m", 12, "hf"),
        ("neo_350m", 24, "mtf"),
        ("neo_350m", 24, "hf"),
        ("neo_1p3b", 2, "mtf"),
        ("neo_2p7b", 2, "mtf"),
    ],
)
def test_released_shapes_equal_torch(name, num_layers, initializer):
    """Real vocabulary, width, heads and lengths; the two large ones with fewer layers."""
    config = preset_model(name, num_layers=num_layers, compute_dtype="float32")
    model = torch_model(config, initializer)
    params = hf.from_hf(numpy_state(model), config)
    assert compare(config, model, params, 385) < TOLERANCE  # 128 of them padding on the left
    for seq in (1, 255, 256, 257, 513, *[2048] * (initializer == "mtf")):
        ids = random_ids(config, 1, seq)
        expected = torch_logits(model, ids)
        assert error(our_logits(config, params, ids), expected) < TOLERANCE, seq


# --------------------------------------------------------------------------------- float64


def saturated(model) -> None:
    """Scales queries and keys until each query looks at hardly more than one key."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(6)


@pytest.mark.parametrize("attention", ["reference", "banded"])
@pytest.mark.parametrize(
    "name", ["small", *(pytest.param(name, marks=pytest.mark.slow) for name in SHAPES)]
)
def test_saturated_attention(name, attention):
    """Exact in float64; in float32 no further from it than twice torch's own error."""
    small = {"num_layers": 2, "vocab_size": 500, "compute_dtype": "float32"}
    config = SMALL if name == "small" else preset_model(name, **small)
    config = dataclasses.replace(config, attention=attention)
    model = torch_model(config, "hf")
    if name == "small":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
    saturated(model)
    state = numpy_state(model)
    ids = random_ids(config, 1, 64 if name == "small" else 300)
    torch_32 = torch_logits(model, ids)
    with torch_in_double():
        exact = torch_logits(model.double(), ids)
    ours_32 = our_logits(config, hf.from_hf(state, config), ids)
    with jax.enable_x64(True):
        in_double = dataclasses.replace(config, compute_dtype="float64", param_dtype="float64")
        state_64 = {key: a.astype(np.float64) for key, a in state.items()}
        ours_64 = our_logits(in_double, hf.from_hf(state_64, in_double), ids)
    assert ours_64.dtype == np.float64
    assert error(ours_64, exact) < 1e-9 < TOLERANCE
    assert error(ours_32, exact) <= 2 * error(torch_32, exact)


# --------------------------------------------------------------------------- NumPy's GPT-Neo


@pytest.mark.parametrize("attention", ["reference", "banded"])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        dataclasses.replace(ODD, activation="gelu", window_size=1),
        dataclasses.replace(ODD, activation="silu", attention_types=("local",)),
        dataclasses.replace(ODD, activation="gelu_new", window_size=37, num_heads=8),
    ],
    ids=["small", "window_1", "local", "window_is_seq"],
)
def test_logits_equal_numpy(config, attention):
    with jax.enable_x64(True):
        config = dataclasses.replace(
            config, attention=attention, compute_dtype="float64", param_dtype="float64"
        )
        params = dense_params(config)
        ids = random_ids(config, 2, 37)
        actual = our_logits(config, params, ids)
    state = hf.to_hf(params, config)
    expected = np.stack(
        [
            reference.logits(
                state,
                row,
                layer_types=config.layer_types,
                num_heads=config.num_heads,
                window=config.window_size,
                activation=config.activation,
                eps=config.layer_norm_eps,
            )
            for row in ids
        ]
    )
    assert error(actual, expected) < 1e-10


def test_odd_shape_equals_numpy_in_float32():
    params = jax.tree.map(np.float32, dense_params(ODD))
    ids = random_ids(ODD, 1, 40)
    expected = reference.logits(
        hf.to_hf(params, ODD),
        ids[0],
        layer_types=("global", "local", "local"),
        num_heads=1,
        window=7,
        activation="relu",
        eps=1e-3,
    )
    assert error(our_logits(ODD, params, ids)[0], expected) < TOLERANCE


# -------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    ("base", "attention", "scan_layers", "remat"),
    [
        (SMALL, "reference", True, "none"),
        (SMALL, "banded", False, "full"),
        (ODD, "banded", True, "full"),
    ],
)
def test_gradients_equal_torch(base, remat, scan_layers, attention):
    config = dataclasses.replace(
        base, remat=remat, scan_layers=scan_layers, attention=attention
    )
    model = torch_model(config, "hf")
    ids = random_ids(config, 3, 33)
    params = hf.from_hf(numpy_state(model), config)
    graph, _ = model_graph(config)

    @jax.jit
    def mean_loss(params, ids):
        lm = nnx.merge(graph, params)
        weights = jnp.ones((3, 32))
        sums = cross_entropy(
            lm.hidden(ids[:, :-1]),
            lm.head,
            ids[:, 1:],
            weights,
            vocab_size=config.vocab_size,
            z_loss=0.0,
            block_size=20,
        )
        return sums.loss / weights.sum()

    loss, grads = jax.value_and_grad(mean_loss)(params, jnp.asarray(ids))
    expected = model(torch.tensor(ids), labels=torch.tensor(ids), use_cache=False).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    actual = hf.to_hf(jax.tree.map(np.asarray, grads), config)
    assert set(actual) == set(theirs)
    for name, gradient in theirs.items():
        scale = np.abs(gradient).max()
        assert np.abs(actual[name] - gradient).max() < TOLERANCE * scale, name
