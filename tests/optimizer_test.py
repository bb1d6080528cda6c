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
        ({"learning_rate": -1e-3}, "optimizer.learning_rate"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps"),
    ],
)
def test_contradictions_are_refused_in_one_line(values, key):
    with pytest.raises(ConfigError, match=key) as error:
        OptimizerConfig(**values)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------- spikes

WINDOW = optimizer.SPIKE_WINDOW
SKIPPING = OptimizerConfig()


def judge_all(losses, norms, config=SKIPPING):
    """Of each step whether it was left out; and what is remembered in the end."""

    def step(spikes, values):
        skip, spikes = optimizer.judge(spikes, *values, config)
        return spikes, skip

    values = jnp.asarray(losses, jnp.float32), jnp.asarray(norms, jnp.float32)
    spikes, skips = jax.jit(lambda: jax.lax.scan(step, optimizer.no_spikes(), values))()
    return np.asarray(skips), jax.device_get(spikes)


def numpy_judge(losses, norms):
    """The rule once more, with lists: 128 finite values, 6 standard deviations."""
    seen: tuple[list, list] = ([], [])
    skips = []
    for values in zip(np.float32(losses), np.float32(norms), strict=True):
        skip = not np.isfinite(values).all()
        for recent, value in zip(seen, values, strict=True):
            last = np.float64(recent[-WINDOW:])
            if len(last) == WINDOW and value > last.mean() + 6 * last.std():
                skip = True
        for recent, value in zip(seen, values, strict=True):
            if np.isfinite(value):
                recent.append(value)
        skips.append(skip)
    return np.array(skips), seen


def test_spikes_are_those_of_the_rule_with_lists():
    rng = np.random.default_rng(0)
    losses, norms = 3 + 0.1 * rng.normal(size=(2, 600))
    for series in (losses, norms):
        at = rng.choice(600, 40, replace=False)
        series[at[:15]] += rng.uniform(0.3, 5, 15)
        series[at[15:30]] = rng.choice([np.nan, np.inf, -np.inf], 15)
        series[at[30:]] -= 5  # a fall is no spike
    losses[400:] += 2  # a new level, which has to become the usual one
    skips, spikes = judge_all(losses, norms)
    expected, seen = numpy_judge(losses, norms)
    np.testing.assert_array_equal(skips, expected)
    finite = np.isfinite(losses) & np.isfinite(norms)
    assert expected[finite].any() and not expected[finite].all()
    assert (spikes.skipped, spikes.non_finite) == (expected.sum(), (~finite).sum())
    for recent, values in zip((spikes.loss, spikes.grad_norm), seen, strict=True):
        assert recent.seen == len(values)
        np.testing.assert_array_equal(sorted(recent.values), sorted(values[-WINDOW:]))


@pytest.mark.parametrize(("before", "is_one"), [(WINDOW - 1, False), (WINDOW, True)])
def test_no_finite_value_is_a_spike_before_128_are_in(before, is_one):
    usual = 3 + 0.1 * np.sin(np.arange(before))
    high = np.append(usual, 1e9)
    assert judge_all(high, np.ones(before + 1))[0].tolist() == [False] * before + [is_one]
    low = np.append(usual, np.nan)
    assert judge_all(low, np.ones(before + 1))[0].tolist() == [False] * before + [True]


def test_a_value_counts_where_the_deviation_says():
    """Of ±0.1 around 3 the deviation is 0.1: 3.59 passes, 3.61 does not."""
    usual = 3 + 0.1 * (-1.0) ** np.arange(WINDOW)
    for value, is_one in ((3.59, False), (3.61, True)):
        assert judge_all([*usual, value], np.ones(WINDOW + 1))[0][-1] == is_one
        assert judge_all(np.ones(WINDOW + 1), [*usual, value])[0][-1] == is_one


def test_a_new_level_is_a_spike_four_times():
    """What `train.rollback_after` counts on: left out, but recorded."""
    usual = 3 + 0.01 * (-1.0) ** np.arange(WINDOW)
    skips, spikes = judge_all([*usual, *[9.0] * 20], np.ones(WINDOW + 20))
    assert skips[WINDOW:].tolist() == [True] * 4 + [False] * 16
    assert (spikes.skipped, spikes.skipped_in_a_row) == (4, 0)


def test_counters_in_a_row_start_anew_after_a_good_step():
    losses = [1, np.nan, np.nan, 1, np.inf, np.nan, np.nan]
    _, spikes = judge_all(losses, np.ones(7))
    assert (spikes.skipped, spikes.non_finite, spikes.skipped_in_a_row) == (5, 5, 3)
    # Non-finite values are only counted: the ring holds the others.
    assert spikes.loss.seen == 2 and spikes.loss.values[:3].tolist() == [1, 1, 0]


def test_with_skipping_off_everything_after_the_first_nan_is_left_out():
    """So that the state is still the one that led to it when somebody looks."""
    usual = 3 + 0.01 * (-1.0) ** np.arange(WINDOW)
    config = OptimizerConfig(skip_spikes=False)
    losses = [*usual, 9.0, np.nan, 3.0, 3.0]
    skips, _ = judge_all(losses, np.ones(WINDOW + 4), config)
    assert skips[WINDOW:].tolist() == [False, True, True, True]
