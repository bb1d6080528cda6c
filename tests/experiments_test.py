"""Every experiment loads, holds what its header says, and the released recipes are exact."""

import ast
import pathlib
import re
import shlex
from typing import Any

import jax
import pytest
from flax import nnx

from neo_jax import config as config_lib
from neo_jax import main, optimizer, prepare, sharding, state
from neo_jax.config import Config, ConfigError, MeshConfig
from neo_jax.finetune import __main__ as finetune

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "base")
RELEASED = ("neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b")


def header(name: str) -> str:
    return ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""


def commands(text: str) -> list[list[str]]:
    """Arguments of every `python -m neo_jax.…` in a text, the module's name first."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"python -m neo_jax\.(.*)", joined)
    return [shlex.split(line) for line in found]


# ------------------------------------------------------------------------- all of them


def test_all_are_known_by_name() -> None:
    assert config_lib.experiment_names() == NAMES
    assert {*RELEASED, "cpu_smoke"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_by_name_and_by_path_and_its_parts_fit(name: str) -> None:
    config = config_lib.load_experiment(name)
    assert config_lib.load_experiment(str(FOLDER / f"{name}.py")) == config
    # What training would build, without its memory.
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    abstract = state.abstract(config.model, mesh, tx)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(abstract.params))


@pytest.mark.parametrize("name", NAMES)
def test_the_header_tells_a_command_and_every_command_in_it_parses(name: str) -> None:
    found = commands(header(name))
    ours = 0
    for module, *arguments in found:
        if module == "prepare":
            prepare._parser().parse_args(arguments)
            continue
        command = {"main": main, "finetune": finetune}[module]
        known, overrides = command._parse(arguments)
        assert known.config == name and name in str(known.workdir)
        config = config_lib.load_experiment(known.config, overrides)
        assert (config == config_lib.load_experiment(name)) == (not overrides)
        ours += 1
    assert ours > 0, f"experiments/{name}.py names no command that runs it."


def test_the_test_of_headers_sees_a_wrong_override() -> None:
    text = "Command: python -m neo_jax.main --config x \\\n  --workdir y --config.train.a=3"
    ((_, *arguments),) = commands(text)
    _, overrides = main._parse(arguments)
    with pytest.raises(ConfigError, match=r"train\.a"):
        config_lib.load_experiment("base", overrides)


# ------------------------------------------------------------------ the released models

# Name of each parameter: its logical axes.
PARAMETERS = {
    "blocks.attention.key.kernel": "layers embed heads head_dim",
    "blocks.attention.out.bias": "layers embed",
    "blocks.attention.out.kernel": "layers heads head_dim embed",
    "blocks.attention.query.kernel": "layers embed heads head_dim",
    "blocks.attention.value.kernel": "layers embed heads head_dim",
    "blocks.ln_1.bias": "layers embed",
    "blocks.ln_1.scale": "layers embed",
    "blocks.ln_2.bias": "layers embed",
    "blocks.ln_2.scale": "layers embed",
    "blocks.mlp.down.bias": "layers embed",
    "blocks.mlp.down.kernel": "layers mlp embed",
    "blocks.mlp.up.bias": "layers mlp",
    "blocks.mlp.up.kernel": "layers embed mlp",
    "embedder.embedding": "vocab embed",
    "embedder.positions": "positions embed",
    "ln_f.bias": "embed",
    "ln_f.scale": "embed",
}


@pytest.mark.parametrize(
    ("name", "layers", "embed", "heads", "head_dim", "count"),
    [
        ("neo_125m", 12, 768, 12, 64, 125_198_592),
        ("neo_350m", 24, 1024, 16, 64, 355_798_016),
        ("neo_1p3b", 24, 2048, 16, 128, 1_315_575_808),
        ("neo_2p7b", 32, 2560, 20, 128, 2_651_307_520),
    ],
)
def test_every_parameter_of_a_released_model(
    name: str, layers: int, embed: int, heads: int, head_dim: int, count: int
) -> None:
    sizes = {
        "layers": layers,
        "embed": embed,
        "heads": heads,
        "head_dim": head_dim,
        "mlp": 4 * embed,
        "vocab": 50304,  # 50257, padded
        "positions": 2048,
    }
    model = config_lib.load_experiment(name).model
    _, params = state.model_graph(model)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): param
        for path, param in jax.tree_util.tree_leaves_with_path(
            params, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
    }
    axes = {path: " ".join(p.get_metadata()["out_sharding"]) for path, p in found.items()}
    assert axes == PARAMETERS
    expected = {path: tuple(sizes[a] for a in PARAMETERS[path].split()) for path in axes}
    assert {path: param.shape for path, param in found.items()} == expected
    # Twelve embed² and ten embed a layer, two tables and the last LayerNorm.
    by_hand = layers * (12 * embed**2 + 10 * embed) + (50257 + 2048 + 2) * embed
    assert state.num_params(model) == by_hand == count


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("neo_125m", {"rate": 6e-4, "batch": 256, "steps": 572_300, "decay": 0.1}),
        ("neo_350m", {"rate": 3e-4, "batch": 256, "steps": 572_300, "decay": 0.1}),
        ("neo_1p3b", {"rate": 2e-4, "batch": 512, "steps": 400_000, "decay": 0.0}),
        ("neo_2p7b", {"rate": 1.6e-4, "batch": 512, "steps": 400_000, "decay": 0.0}),
    ],
)
def test_a_released_recipe(name: str, expected: dict[str, Any]) -> None:
    config = config_lib.load_experiment(name)
    assert {
        "rate": config.optimizer.learning_rate,
        "batch": config.data.batch_size,
        "steps": config.train.num_steps,
        "decay": config.optimizer.weight_decay,
    } == expected
    assert (config.data.seq_len, config.model.max_seq_len) == (2048, 2048)
    # The network.
    model = config.model
    assert model.attention_types == ("global", "local") and model.window_size == 256
    assert (model.vocab_size, model.padded_vocab_size) == (50257, 50304)
    assert (model.activation, model.layer_norm_eps) == ("gelu_new", 1e-5)
    assert model.tie_embeddings and model.initializer == "mtf"
    # The arithmetic of the original.
    recipe = config.optimizer
    assert (recipe.b1, recipe.b2, recipe.eps, recipe.clip_norm) == (0.9, 0.95, 1e-8, 1.0)
    assert not recipe.bias_correction and config.loss.z_loss == 1e-4
    # The text.
    assert config.data.source.startswith("pile:") and config.data.tokenizer == "gpt2"
    assert config.data.eval_source == f"{config.data.source}?split=val"


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("neo_125m", 572_300),
        ("neo_350m", 572_300),
        ("neo_1p3b", 300_000),
        ("neo_2p7b", 300_000),
    ],
)
def test_a_released_rate_falls_to_a_tenth_at_its_step_and_stays(name: str, end: int) -> None:
    config = config_lib.load_experiment(name)
    rate = optimizer.schedule(config.optimizer, config.train.num_steps)
    peak = config.optimizer.learning_rate
    assert float(rate(0)) == 0
    assert 0.99 * peak < float(rate(3000)) < peak
    assert float(rate(2999)) < float(rate(3000))
    assert float(rate(end // 2)) == pytest.approx(0.55 * peak, rel=1e-3)
    assert float(rate(end - 40_000)) > 1.01 * float(rate(end))
    assert float(rate(end)) == pytest.approx(0.1 * peak, rel=1e-5)
    assert float(rate(end + 100_000)) == float(rate(end))


@pytest.mark.parametrize("name", RELEASED)
def test_the_header_tells_source_recipe_and_memory(name: str) -> None:
    text, config = header(name), config_lib.load_experiment(name)
    assert "EleutherAI/gpt-neo" in text and "`mtf`" in text
    (gib,) = re.findall(r"Memory: ([\d.]+) GiB for parameters, moments and gradients", text)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    abstract = state.abstract(config.model, mesh, tx)
    needed = state.num_bytes(abstract) + state.num_bytes(abstract.params)
    assert float(gib) == pytest.approx(needed / 2**30, abs=0.05)


# ------------------------------------------------------------------------- the recipes


def test_base_is_every_default_and_mtf_differs_in_three_keys() -> None:
    config_lib.load_experiment("base")  # makes neo_jax.experiments known in a checkout
    from neo_jax.experiments import base

    assert config_lib.build(base.get_config()) == Config()
    tree = base.get_config()
    base.mtf_recipe(tree)
    before, after = base.get_config().to_dict(), tree.to_dict()
    changed = {
        f"{section}.{key}": value
        for section, keys in after.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if value != before[section][key]
    }
    assert changed == {
        "optimizer.bias_correction": False,
        "optimizer.schedule": "mtf_cosine",
        "loss.z_loss": 1e-4,
    }
