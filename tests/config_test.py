"""A config is complete, typed and free of contradictions, or refused in one telling line."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_jax import config as config_lib
from neo_jax.config import Config, ConfigError, ModelConfig


def load(*overrides: str, experiment: str = "base") -> Config:
    return config_lib.load_experiment(experiment, overrides)


def refusal(*overrides: str, experiment: str = "base") -> str:
    """The one line that refuses some overrides."""
    with pytest.raises(ConfigError) as error:
        load(*overrides, experiment=experiment)
    line = str(error.value)
    assert line and "\n" not in line
    return line


# ------------------------------------------------------------------------- wrong keys


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "optimizer.learning_rat=3e-4",
            "config has no key 'optimizer.learning_rat', "
            "did you mean 'optimizer.learning_rate'?",
        ),
        (
            "optimiser.learning_rate=3e-4",
            "config has no key 'optimiser', did you mean 'optimizer'?",
        ),
        # A key of another section, or without its section; also where a neighbour is close.
        (
            "optimizer.num_steps=3",
            "config has no key 'optimizer.num_steps', did you mean 'train.num_steps'?",
        ),
        (
            "model.seq_len=64",
            "config has no key 'model.seq_len', did you mean 'data.seq_len'?",
        ),
        (
            "learning_rate=3e-4",
            "config has no key 'learning_rate', did you mean 'optimizer.learning_rate'?",
        ),
        ("loss.xyz=1", "config has no key 'loss.xyz'; there are z_loss, block_size."),
        ("model.embed_dim.x=1", "config has no key 'model.embed_dim', did you mean"),
        ("=3", "config has no key ''; there are task, model, data,"),
        (
            "train.num_steps",
            "override 'train.num_steps' has no value; write --config.train.num_steps=VALUE.",
        ),
        (
            "model=neo_125n",
            "model preset 'neo_125n' is unknown, did you mean 'neo_125m'?; there are tiny,",
        ),
        ("optimizer=adam", "optimizer='adam' must be a section of keys."),
    ],
)
def test_a_wrong_key_is_told_with_the_nearest_right_one(override: str, line: str) -> None:
    assert refusal(override).startswith(line)


def test_every_misspelt_key_is_answered_with_itself() -> None:
    """One letter missing, in every key of every section that is long enough to tell."""
    for section in dataclasses.fields(Config):
        if section.name == "task":
            continue
        keys = {field.name for field in dataclasses.fields(section.default_factory)}
        for key in keys:
            slip = key[:-2] + key[-1]
            if len(key) > 4 and slip not in keys:
                line = refusal(f"{section.name}.{slip}=1")
                assert f"did you mean '{section.name}.{key}'?" in line, (slip, line)


# ------------------------------------------------------------------------ wrong values


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.num_steps=3.5", "train.num_steps=3.5 must be of type int."),
        ("train.num_steps=true", "train.num_steps=True must be of type int."),
        ("train.num_steps=none", "train.num_steps=None must be of type int."),
        ("train.num_steps=many", "train.num_steps='many' must be of type int."),
        ("train.num_steps=", "train.num_steps='' must be of type int."),
        ("train.num_steps=(1, 2)", "train.num_steps=(1, 2) must be of type int."),
        ("data.batch_size='8'", "data.batch_size='8' must be of type int."),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast' must be of type flo"),
        ("optimizer.learning_rate=true", "optimizer.learning_rate=True must be of type float"),
        ("optimizer.learning_rate=1e999", "optimizer.learning_rate=inf must be a finite num"),
        ("optimizer.bias_correction=1", "optimizer.bias_correction=1 must be of type bool."),
        (
            "optimizer.bias_correction=yes",
            "optimizer.bias_correction='yes' must be of type bo",
        ),
        (
            "model.activation=gelu_nw",
            "model.activation='gelu_nw' is not one of gelu_new, gelu, gelu_10, quick_gelu, "
            "relu, relu2, relu6, leaky_relu, silu, hardswish, mish, laplace, sigmoid, "
            "sqrtsoftplus, tanh, linear, did you mean 'gelu_new'?",
        ),
        (
            "model.compute_dtype=bf16",
            "model.compute_dtype='bf16' is not one of auto, float32,",
        ),
        ("model.remat=7", "model.remat=7 is not one of none, full, minimal, custom."),
        ("model.remat=custom", "model.remat='custom' with model.remat_save=[]"),
        ("model.remat_save=['query']", "model.remat='none' with model.remat_save=['query']"),
        ("model.remat_save=['quary']", "model.remat_save or model.remat_offload: 'quary' is"),
        (
            "mesh=fsdp_tensr",
            "mesh preset 'fsdp_tensr' is unknown, did you mean 'fsdp_tensor'?",
        ),
        (
            "task=pretrian",
            "task='pretrian' is not one of pretrain, finetune, classify, preference, "
            "did you mean 'pretrain'?",
        ),
        ("eval.references=3", "eval.references=3 must be a list"),
        ("eval.references=[['gzip']]", "eval.references: ('gzip',) must be a name and its bi"),
        ("data.mixture=[['a']", "data.mixture=\"[['a']\" must be a list"),
        (
            "data.mixture=[['a', 'b']]",
            "data.mixture: ('a', 'b') must be a source and 1 weight",
        ),
        ("data.mixture=[['a', 0]]", "data.mixture: the weights of stage 0 are all 0."),
        ("data.mixture=[['a', 1], ['a', 2]]", "data.mixture names a source twice: a, a."),
        ("data.mixture_changes=[3, 2]", "data.mixture_changes=[3, 2] must be sequences after"),
        ("data.mixture_changes_in=epochs", "data.mixture_changes_in"),
    ],
)
def test_a_wrong_type_or_choice_is_told_with_the_value(override: str, line: str) -> None:
    assert refusal(override).startswith(line)


@pytest.mark.parametrize(
    "override",
    [
        *("model.num_layers=0", "model.window_size=-1", "model.vocab_size=0"),
        *("data.batch_size=0", "data.num_workers=-1", "data.holdout_every=-1"),
        *("optimizer.b1=1.0", "optimizer.weight_decay=-0.1", "optimizer.decay_steps=0"),
        *("optimizer.end_fraction=1.5", "loss.z_loss=-1.0", "loss.block_size=0"),
        *("train.log_every=0", "train.accumulation_steps=0", "train.seed=-1"),
        *("train.seed=2147483648", "eval.stride=0", "eval.top_k=-1", "eval.batch_size=0"),
        *("checkpoint.every=0", "checkpoint.keep=0", "mesh.fsdp=0", "mesh.tensor=-2"),
    ],
)
def test_a_value_out_of_range_is_told_by_its_key(override: str) -> None:
    # The line begins as the command line has it: section.key=value.
    assert refusal(override).startswith(override + " must ")


def test_a_number_that_is_not_finite_is_refused() -> None:
    tree = config_lib.default_config()
    tree.optimizer.learning_rate = float("nan")
    with pytest.raises(ConfigError, match=r"^optimizer.learning_rate=nan must be a finite"):
        config_lib.build(tree)


# ---------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.embed_dim=192", "model.num_heads=5"],
            ["model.num_heads=5 does not divide model.embed_dim=192", "2, 3, 4, 6."],
        ),
        (["model.num_layers=3"], ["('global', 'local')", "2 layers", "model.num_layers=3"]),
        (
            ["model.max_seq_len=256", "data.seq_len=512"],
            ["data.seq_len=512 exceeds model.max_seq_len=256", "data.seq_len to 256"],
        ),
        (
            ["data.batch_size=8", "train.accumulation_steps=3"],
            ["train.accumulation_steps=3 does not divide data.batch_size=8."],
        ),
        (
            ["data.seq_len=256", "eval.stride=257"],
            ["eval.stride=257 exceeds data.seq_len=256"],
        ),
        (["mesh.data=-1"], ["mesh: only one axis may be -1, not data, fsdp."]),
        (
            ["optimizer.warmup_steps=50", "optimizer.decay_steps=50"],
            ["optimizer.decay_steps=50 must exceed optimizer.warmup_steps=50"],
        ),
        (
            ["data.holdout_every=20", "data.holdout_offset=20"],
            ["data.holdout_offset=20 must lie in 0 … data.holdout_every-1=19."],
        ),
    ],
)
def test_a_contradiction_names_both_sides_and_what_would_do(
    overrides: list[str], words: list[str]
) -> None:
    line = refusal(*overrides)
    for word in words:
        assert word in line


def test_the_nearest_numbers_of_heads_do_divide() -> None:
    near = re.findall(
        r"\d+", refusal("model.embed_dim=192", "model.num_heads=5").split("nearest")[1]
    )
    for heads in near:
        config = load("model.embed_dim=192", f"model.num_heads={heads}")
        assert config.model.head_dim == 192 // int(heads)


def test_a_released_recipe_cut_shorter_than_its_warm_up_is_allowed() -> None:
    """Three steps of a run whose warm-up takes 3000: only a written decay contradicts."""
    assert load("train.num_steps=3", experiment="neo_125m").optimizer.decay_steps is None


# ------------------------------------------------------------------- attention patterns

NAMES = st.sampled_from(["global", "local"])


@given(pattern=st.lists(NAMES, min_size=1, max_size=12), repeats=st.integers(1, 4))
def test_layers_are_the_pattern_given_and_kept_as_the_smallest_period(
    pattern: list[str], repeats: int
) -> None:
    num_layers = len(pattern) * repeats
    model = ModelConfig(num_layers=num_layers, attention_types=tuple(pattern))
    assert model.layer_types == tuple(pattern) * repeats
    period = len(model.attention_types)
    layers = model.layer_types
    for shorter in range(1, num_layers):
        if num_layers % shorter == 0 and layers == layers[:shorter] * (num_layers // shorter):
            assert period == shorter
            break
    else:
        assert period == num_layers
    # All layers spelled out, and Hugging Face's nested form, say the same.
    hugging_face = (((*pattern,), repeats),)
    for same in (layers, hugging_face):
        assert ModelConfig(num_layers=num_layers, attention_types=same) == model


@given(parts=st.lists(st.tuples(st.lists(NAMES, max_size=3), st.integers(0, 3)), max_size=3))
def test_the_nested_form_counts_every_layer(parts: list[tuple[list[str], int]]) -> None:
    flat = [name for names, repeats in parts for name in names * repeats]
    nested: Any = [[names, repeats] for names, repeats in parts]
    if flat:
        model = ModelConfig(num_layers=len(flat), attention_types=nested)
        assert model.layer_types == tuple(flat)
    # It is a total, not a period: twice the layers contradict it.
    with pytest.raises(ConfigError, match=f"describes {len(flat)} layers"):
        ModelConfig(num_layers=2 * len(flat) or 4, attention_types=nested)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("['globl', 'local']", "'globl' is unknown; use 'global' or 'local'."),
        ("global", "'global' must be a list"),
        ("[global,local]", "must be a list, as in \"['one', 'two']\"."),
        ("[]", "describes 0 layers"),
        ("[[['global', 'local'], 3]]", "describes 6 layers, but model.num_layers=4"),
        ("[['global', 4]]", "('global', 4) is not of the form [['global', 'local'], 12]."),
        ("[[['global'], '4']]", "is not of the form"),
        ("[[['global'], 4, 4]]", "is not of the form"),
        ("[1, 2]", "is not of the form"),
        ("[[[1], 4]]", "1 is unknown"),
    ],
)
def test_a_wrong_pattern_is_told(value: str, words: str) -> None:
    line = refusal("model.num_layers=4", f"model.attention_types={value}")
    assert line.startswith("model.attention_types") and words in line


# ---------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("optimizer.learning_rate=1", 1.0),  # an int is a float, too
        ("finetune.export=none", "none"),  # a name, not nothing
        ("train.num_steps=1e3", 1000),  # and a whole float an int
        ("train.num_steps=1_000", 1000),
        ("optimizer.bias_correction=false", False),
        ("optimizer.bias_correction=True", True),
        ("optimizer.decay_steps=none", None),
        ("optimizer.decay_steps=None", None),
        ("optimizer.decay_steps=null", None),
        ("optimizer.decay_steps=7000", 7000),
        # Text stays text, whatever it looks like.
        ("data.source=2020", "2020"),
        ("data.source=none", "none"),
        ("data.source=[1]", "[1]"),
        ("data.source=pile:d?split=val", "pile:d?split=val"),
        ("data.eval_source=2020", "2020"),
        ("data.eval_source=none", None),
        ("train.wandb_project=1.5", "1.5"),
        ('eval.prompt= It\'s "so" = true\n', ' It\'s "so" = true\n'),
        ("eval.prompt=", ""),
        ("model.attention_types=['local']", ("local",)),
        ("model.attention_types=('local', 'global')", ("local", "global")),
        ("model.attention_types=[[['local', 'global'], 6]]", ("local", "global")),
        ("data.mixture_changes=[100, 200]", (100, 200)),
        ("data.mixture=[['a', 1], ['b', 0.5]]", (("a", 1.0), ("b", 0.5))),
        ("eval.references=()", ()),
    ],
)
def test_an_override_arrives_with_its_type(override: str, value: Any) -> None:
    section, key = override.partition("=")[0].split(".")
    found = getattr(getattr(load(override), section), key)
    assert found == value and type(found) is type(value)


def test_of_two_overrides_the_last_one_counts_and_others_keep_what_the_experiment_says():
    plain, changed = load(), load("train.num_steps=5", "train.num_steps=6")
    assert changed.train == dataclasses.replace(plain.train, num_steps=6)
    assert dataclasses.replace(changed, train=plain.train) == plain


def test_a_preset_by_name_and_a_key_of_it() -> None:
    config = load("model=neo_2p7b", "model.num_layers=2", "model.mlp_dim=100")
    expected = config_lib.preset_model("neo_2p7b", num_layers=2, mlp_dim=100)
    assert config.model == expected
    assert (expected.embed_dim, expected.num_heads, expected.vocab_size) == (2560, 20, 50257)


# ------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", config_lib.PRESETS)
def test_a_preset_is_complete_and_follows_from_its_few_numbers(name: str) -> None:
    model = config_lib.preset_model(name)
    assert set(config_lib.preset(name)) == {f.name for f in dataclasses.fields(model)}
    assert model.mlp_dim == 4 * model.embed_dim
    assert model.head_dim * model.num_heads == model.embed_dim
    assert model.layer_types[:2] == ("global", "local")
    assert model.padded_vocab_size % 128 == 0
    assert 0 <= model.padded_vocab_size - model.vocab_size < 128
    assert config_lib.build({"model": name, "data": {"seq_len": 64}}).model == model


@pytest.mark.parametrize(
    ("vocab_size", "padded"), [(50257, 50304), (50304, 50304), (50305, 50432), (1, 128)]
)
def test_the_vocabulary_is_padded_up_to_a_multiple(vocab_size: int, padded: int) -> None:
    assert ModelConfig(vocab_size=vocab_size).padded_vocab_size == padded


def test_an_unknown_key_of_a_preset_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'model.num_layer', did you mean 'model.num_layers"
    ):
        config_lib.preset_model("tiny", num_layer=2)


# --------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        *map(config_lib.load_experiment, config_lib.experiment_names()),
        load("data.mixture=[['a', 1, 2], ['b', 2, 0]]", "data.mixture_changes=[9]"),
        load("model.num_layers=3", "model.attention_types=['global', 'local', 'local']"),
    ],
)
def test_json_there_and_back_is_the_same_config(config: Config) -> None:
    text = config_lib.to_json(config)
    assert config_lib.from_json(text) == config
    assert config_lib.to_json(config_lib.from_json(text)) == text
    assert json.loads(text)["train"]["num_steps"] == config.train.num_steps


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train": ', "not valid JSON"),
        ("", "not valid JSON"),
        ("[1]", r"must be a ConfigDict, not \[1\]"),
        ('{"train": {"num_step": 3}}', "did you mean 'train.num_steps'"),
        ('{"train": 3}', "train=3 must be a section of keys"),
    ],
)
def test_json_that_is_no_config_is_told_in_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        config_lib.from_json(text)
    assert "\n" not in str(error.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.num_steps = 3  # type: ignore[misc]


# ------------------------------------------------------------------- a user's own file

HEAD = """\
from neo_jax import config as config_lib
from neo_jax.experiments import base

def get_config():
    config = base.get_config()
"""


@pytest.fixture
def write(tmp_path: pathlib.Path):
    """Writes an experiment and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(text)
        return str(path)

    return write


def test_a_file_of_ones_own_builds_on_base(write) -> None:
    path = write(
        HEAD
        + "    base.mtf_recipe(config)\n"
        + "    config.model = config_lib.preset('neo_125m')\n"
        + "    config.model.num_layers = 6\n"
        + "    config.train.num_steps = 7\n"
        + "    return config\n"
    )
    config = load("train.seed=3", experiment=path)
    assert config.model == config_lib.preset_model("neo_125m", num_layers=6)
    assert (config.train.num_steps, config.train.seed) == (7, 3)
    assert config.optimizer.schedule == "mtf_cosine" and not config.optimizer.bias_correction
    # What it does not mention is at its default.
    assert config.data == Config().data and config.mesh == Config().mesh


@pytest.mark.parametrize("model", ["'neo_350m'", "config_lib.preset('neo_350m')"])
def test_a_preset_may_be_named_and_changed_from_outside(write, model: str) -> None:
    path = write(HEAD + f"    config.model = {model}\n    return config\n")
    assert load(experiment=path).model == config_lib.preset_model("neo_350m")
    assert load("model.num_layers=2", experiment=path).model.num_layers == 2


def test_a_plain_dict_of_the_few_keys_that_differ_will_do(write) -> None:
    path = write("def get_config():\n    return {'train': {'num_steps': 7}}\n")
    config = load("optimizer.learning_rate=1e-2", "train.seed=5", experiment=path)
    assert config == dataclasses.replace(
        Config(),
        train=dataclasses.replace(Config().train, num_steps=7, seed=5),
        optimizer=dataclasses.replace(Config().optimizer, learning_rate=1e-2),
    )


def test_one_file_leaves_nothing_behind_for_the_next(write) -> None:
    before = load()
    load("train.num_steps=1", experiment=write(HEAD + "    return config\n"))
    assert load() == before


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    config.train.num_step = 3\n    return config\n", "'train.num_steps'?"),
        ("    config.trian.num_steps = 3\n    return config\n", 'Did you mean "train"'),
        ("    config.model = 'neo_125'\n    return config\n", "did you mean 'neo_125m'?"),
        ("    config.model = config_lib.preset('x')\n    return config\n", "there are tiny"),
        ("    pass\n", "must be a ConfigDict, not None"),
        ("    return (\n", "SyntaxError: '(' was never closed (mine.py, line 6)"),
        ("    return confg\n", "NameError: name 'confg' is not defined"),
        ("    raise ValueError('one\\ntwo')\n", "ValueError: one two"),
        ("    import nothing_like_it\n", "No module named 'nothing_like_it'"),
    ],
)
def test_a_mistake_in_the_file_is_told_in_one_line(write, body: str, words: str) -> None:
    assert words in refusal(experiment=write(HEAD + body))


def test_a_file_without_get_config_and_no_file_at_all(write, tmp_path: pathlib.Path) -> None:
    assert "defines no get_config()" in refusal(experiment=write("config = {}\n"))
    line = refusal(experiment=str(tmp_path / "cpu_smoek.py"))
    assert "there is no such file or experiment, did you mean 'cpu_smoke'?" in line
    assert "there are cpu_hour, cpu_smoke," in refusal(experiment="zzz")
    assert "no such file" in refusal(experiment=str(tmp_path))


def test_a_mesh_preset_by_name_and_what_differs_from_it():
    mesh = config_lib.load_experiment(
        "neo_125m", ["mesh=fsdp_tensor", "mesh.tensor=2", "mesh.slices=-1"]
    ).mesh
    assert mesh == config_lib.MeshConfig(slices=-1, fsdp=-1, tensor=2)
    for name in config_lib.MESH_PRESETS:
        assert config_lib.build({"mesh": name}).mesh.data
