"""The recipes are exact: schedules, clipping, Adam, decay, against independent arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from neo_jax import config as config_lib
from neo_jax import optimizer
from neo_jax.config import ConfigError, OptimizerConfig

# The two recipes, with phases short enough that 20 steps see them all.
RECIPES = {
    "modern": OptimizerConfig(learning_rate=0.05, warmup_steps=6, decay_steps=15),
    "mtf": OptimizerConfig(
        learning_rate=0.05,
        warmup_steps=6,
        decay_steps=15,
        schedule="mtf_cosine",
        bias_correction=False,
    ),
}
NUM_STEPS = 20

# A regression on fixed data, y ≈ ((table[i] · kernel) * scale + bias), whose gradient is short
# enough to write by hand. Only `table` and `kernel` decay.
TOKENS = np.array([0, 3, 1, 4, 2, 2, 0, 1])


def problem() -> tuple[dict, np.ndarray]:
    rng = np.random.default_rng(0)
    params = {
        "embedder": {"embedding": rng.normal(size=(5, 4))},
        "ln_f": {"scale": 1 + 0.1 * rng.normal(size=3), "bias": 0.1 * rng.normal(size=3)},
        "head": {"kernel": rng.normal(size=(4, 3))},
    }
    return params, rng.normal(size=(len(TOKENS), 3))


def loss_fn(params, targets, np=jnp):
    predicted = params["embedder"]["embedding"][TOKENS] @ params["head"]["kernel"]
    predicted = predicted * params["ln_f"]["scale"] + params["ln_f"]["bias"]
    return np.mean((predicted - targets) ** 2)


def numpy_gradient(table, kernel, scale, bias, targets):
    rows = table[TOKENS]
    hidden = rows @ kernel
    d_out = 2 * (hidden * scale + bias - targets) / targets.size
    d_rows = (d_out * scale) @ kernel.T
    d_table = np.zeros_like(table)
    np.add.at(d_table, TOKENS, d_rows)
    return [d_table, rows.T @ (d_out * scale), (d_out * hidden).sum(0), d_out.sum(0)]


def numpy_rate(recipe: str, step: int) -> float:
    """The schedules of `RECIPES`, case by case."""
    if recipe == "modern":
        if step < 6:
            return 0.05 * (step + 1) / 6
        return 0.05 * (0.1 + 0.9 * (1 + math.cos(math.pi * min((step - 6) / 9, 1))) / 2)
    cosine = 0.05 * (0.1 + 0.9 * (1 + math.cos(math.pi * min(step / 15, 1))) / 2)
    return cosine * step / 6 if step < 6 else cosine


def numpy_run(recipe: str) -> tuple[list, list, list]:
    """Losses, gradient norms and parameters of each step, in float64."""
    tree, targets = problem()
    params = [tree["embedder"]["embedding"], tree["head"]["kernel"], *tree["ln_f"].values()]
    m = [np.zeros_like(p) for p in params]
    v = [np.zeros_like(p) for p in params]
    losses, norms, history = [], [], []
    for step in range(NUM_STEPS):
        grads = numpy_gradient(*params, targets)
        residual = (params[0][TOKENS] @ params[1]) * params[2] + params[3] - targets
        losses.append(np.mean(residual**2))
        norms.append(math.sqrt(sum((g**2).sum() for g in grads)))
        grads = [g * 1.0 / max(norms[-1], 1.0) for g in grads]
        for i in range(4):
            m[i] = 0.9 * m[i] + (1 - 0.9) * grads[i]
            v[i] = 0.95 * v[i] + (1 - 0.95) * grads[i] ** 2
            if recipe == "modern":
                m_hat, v_hat = m[i] / (1 - 0.9 ** (step + 1)), v[i] / (1 - 0.95 ** (step + 1))
            else:
                m_hat, v_hat = m[i], v[i]
            direction = m_hat / (np.sqrt(v_hat) + 1e-8)
            if i < 2:
                direction = direction + 0.1 * params[i]
            params[i] = params[i] - numpy_rate(recipe, step) * direction
        history.append(list(params))
    return losses, norms, history


def jax_run(config: OptimizerConfig, dtype) -> tuple[list, list, list]:
    tree, targets = problem()
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), tree)
    tx = optimizer.build(config, NUM_STEPS)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, jnp.asarray(targets, dtype))
        grad_norm = optimizer.global_norm(grads)
        updates, state = tx.update(grads, state, params, grad_norm=grad_norm)
        return optax.apply_updates(params, updates), state, loss, grad_norm

    losses, norms, history = [], [], []
    for _ in range(NUM_STEPS):
        params, state, loss, grad_norm = step(params, state)
        losses.append(float(loss))
        norms.append(float(grad_norm))
        leaves = [params["embedder"]["embedding"], params["head"]["kernel"]]
        history.append([*leaves, params["ln_f"]["scale"], params["ln_f"]["bias"]])
    return losses, norms, history


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 1e-5)])
def test_twenty_steps_equal_numpy(recipe, dtype, tolerance):
    expected_losses, expected_norms, expected = numpy_run(recipe)
    # The run must see both sides of the clipping, else the test would not test it.
    assert min(expected_norms) < 1 < max(expected_norms)
    with jax.enable_x64(dtype == "float64"):
        losses, norms, history = jax_run(RECIPES[recipe], dtype)
        assert history[-1][0].dtype == dtype
        np.testing.assert_allclose(losses, expected_losses, rtol=tolerance)
        np.testing.assert_allclose(norms, expected_norms, rtol=tolerance)
        for ours, theirs in zip(history, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_modern_equals_torch_adamw():
    torch = pytest.importorskip("torch")
    config, (tree, targets) = RECIPES["modern"], problem()
    parameter = lambda x: torch.nn.Parameter(torch.tensor(x, dtype=torch.float64))  # noqa: E731
    table, kernel = parameter(tree["embedder"]["embedding"]), parameter(tree["head"]["kernel"])
    scale, bias = parameter(tree["ln_f"]["scale"]), parameter(tree["ln_f"]["bias"])
    groups = [
        {"params": [table, kernel], "weight_decay": config.weight_decay},
        {"params": [scale, bias], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(config.b1, config.b2), eps=config.eps)
    with jax.enable_x64(True):
        losses, _, history = jax_run(config, "float64")
    for step in range(NUM_STEPS):
        adam.zero_grad()
        for group in adam.param_groups:
            group["lr"] = numpy_rate("modern", step)
        loss = (((table[TOKENS] @ kernel) * scale + bias - torch.tensor(targets)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([table, kernel, scale, bias], config.clip_norm)
        adam.step()
        # torch divides by norm + 1e-6, so that the two agree to about 1e-6.
        np.testing.assert_allclose(losses[step], loss.item(), rtol=1e-5)
        for ours, theirs in zip(history[step], [table, kernel, scale, bias], strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-5)


# Steps, and the share of the peak at each. Released runs: 125M decays to its end at 572,300
# steps, 1.3B to 300,000 of 400,000.
CHECKED = (0, 1, 2999, 3000, 300_000, 400_000)


def half_cosine(progress: float) -> float:
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


@pytest.mark.parametrize(
    ("peak", "decay_steps", "num_steps"), [(6e-4, None, 572_300), (2e-4, 300_000, 400_000)]
)
@pytest.mark.parametrize("name", ["cosine", "mtf_cosine"])
def test_schedule_of_the_released_runs(name, peak, decay_steps, num_steps):
    config = OptimizerConfig(
        learning_rate=peak, schedule=name, warmup_steps=3000, decay_steps=decay_steps
    )
    end = decay_steps or num_steps
    if name == "cosine":
        tail = [half_cosine(min((s - 3000) / (end - 3000), 1)) for s in (300_000, 400_000)]
        shares = [1 / 3000, 2 / 3000, 1.0, 1.0, *tail]
    else:
        warm = [0.0, half_cosine(1 / end) / 3000, half_cosine(2999 / end) * 2999 / 3000]
        shares = [*warm, *(half_cosine(min(s / end, 1)) for s in (3000, 300_000, 400_000))]
    rate = jax.jit(optimizer.schedule(config, num_steps))
    values = [rate(step) for step in CHECKED]
    assert values[0].dtype == jnp.float32 and values[0].shape == ()
    np.testing.assert_allclose(values, peak * np.array(shares), rtol=1e-6)
    # Flat at a tenth of the peak once the cosine has ended.
    np.testing.assert_allclose(rate(end), 0.1 * peak, rtol=1e-5)
    np.testing.assert_allclose(rate(2 * end), 0.1 * peak, rtol=1e-5)


def test_constant_schedule_stays_at_the_peak():
    rate = optimizer.schedule(OptimizerConfig(schedule="constant", warmup_steps=4), 10)
    np.testing.assert_allclose(
        [rate(s) for s in range(7)], 6e-4 * np.array([0.25, 0.5, 0.75, 1, 1, 1, 1]), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["cosine", "mtf_cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 3, 3000])
def test_a_run_shorter_than_its_warmup_has_finite_rates(name, warmup_steps):
    config = OptimizerConfig(schedule=name, warmup_steps=warmup_steps)
    values = [float(optimizer.schedule(config, 3)(step)) for step in range(6)]
    assert all(0 <= v <= config.learning_rate * (1 + 1e-6) for v in values)
    # Only the original wastes its first update.
    assert (values[0] == 0) == (name == "mtf_cosine" and warmup_steps > 0)


NAMES = {
    "embedder.embedding": True,
    "embedder.positions": True,
    "blocks.ln_1.scale": False,
    "blocks.ln_1.bias": False,
    "blocks.attention.query.kernel": True,
    "blocks.attention.out.bias": False,
    "blocks.mlp.up.kernel": True,
    "blocks.mlp.up.bias": False,
    "ln_f.scale": False,
    "norm_1.g": False,  # the original's name
    "head.kernel": True,
    "kiln.kernel": True,  # holds "ln", but is no LayerNorm
}


@pytest.mark.parametrize("kind", ["dict", "nnx.State"])
def test_decay_mask_by_name(kind):
    tree: dict = {}
    for name in NAMES:
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.ones(2) if kind == "dict" else nnx.Param(jnp.ones(2))
    params = tree if kind == "dict" else nnx.State(tree)
    mask = optimizer.decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    found = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): decays
        for path, decays in jax.tree.leaves_with_path(mask)
    }
    assert found == NAMES
    # And the mask is what the updates follow: no gradient, so only decay moves a weight.
    tx = optimizer.build(OptimizerConfig(warmup_steps=0), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    moved = jax.tree.map(lambda u: bool(jnp.all(u != 0)), updates)
    assert jax.tree.leaves(moved) == jax.tree.leaves(mask)


def test_every_released_parameter_is_masked_as_the_original_does():
    from neo_jax import model as model_lib

    shape = config_lib.preset_model("tiny", tie_embeddings=False)
    abstract = nnx.eval_shape(lambda: model_lib.NeoLM(shape, rngs=nnx.Rngs(0)))
    mask = optimizer.decay_mask(nnx.state(abstract, nnx.Param))
    for path, decays in jax.tree.leaves_with_path(mask):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert decays == (not any(word in name for word in ("ln_", "bias"))), name


def test_state_is_float32_for_bfloat16_parameters():
    params = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    tx = optimizer.build(OptimizerConfig(warmup_steps=0), 10)
    state = tx.init(params)
    grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
    updates, later = tx.update(grads, state, params)
    large = [x for x in jax.tree.leaves((state, later)) if x.ndim]
    assert len(large) == 8
    assert all(x.dtype == jnp.float32 for x in large)
    assert optax.apply_updates(params, updates)["kernel"].dtype == jnp.bfloat16
    # 100,000 squares of 2⁻⁸ in bfloat16 would stop adding up; the norm sums in float32.
    norm = optimizer.global_norm({"x": jnp.full(100_000, 2.0**-8, jnp.bfloat16)})
    np.testing.assert_allclose(norm, math.sqrt(100_000) / 256, rtol=1e-6)


def test_moments_mirror_the_parameters_and_take_their_shardings(mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    params = {"kernel": jax.device_put(jnp.ones((8, 4)), sharding)}
    tx = optimizer.build(OptimizerConfig(), 10)
    state = jax.jit(tx.init)(params)
    (adam,) = [s for s in state if isinstance(s, optax.ScaleByAdamState)]
    assert jax.tree.structure(adam.mu) == jax.tree.structure(adam.nu)
    assert jax.tree.structure(adam.mu) == jax.tree.structure(params)
    placed = jax.device_put(adam.mu, jax.tree.map(lambda p: p.sharding, params))
    assert placed["kernel"].sharding == sharding
    # All other leaves are counters.
    assert [x.shape for x in jax.tree.leaves(state) if x.ndim] == [(8, 4), (8, 4)]


def test_the_norm_given_is_the_norm_used():
    params = {"kernel": jnp.ones(4)}
    grads = {"kernel": jnp.arange(4.0)}
    tx = optimizer.build(OptimizerConfig(warmup_steps=0, bias_correction=False), 10)
    norm = optimizer.global_norm(grads)
    with_norm, _ = tx.update(grads, tx.init(params), params, grad_norm=norm)
    without, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(with_norm["kernel"], without["kernel"])
    _, state = tx.update(grads, tx.init(params), params, grad_norm=100 * norm)
    np.testing.assert_allclose(
        state[1].mu["kernel"], 0.1 * grads["kernel"] / (100 * norm), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"b1": 1.0}, "optimizer.b1"),
        ({"b2": -0.1}, "optimizer.b2"),
        ({"end_fraction": 1.5}, "optimizer.end_fraction"),
        ({"decay_steps": 3000}, "optimizer.warmup_steps"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps"),
    ],
)
def test_contradictions_are_refused_in_one_line(values, key):
    with pytest.raises(ConfigError, match=key) as error:
        OptimizerConfig(**values)
    assert "\n" not in str(error.value)
