"""The command, with the TPU's real compiler where it is installed (the extra `plan`).

What compiles a whole step is marked slow. HBM figures of small cases stand in
hbm_figures.json with the version of the compiler that gave them; more than that is a
regression. A better figure is written there by hand, from the test's own message.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from neo_jax import config as config_lib
from neo_jax import hf, plan
from neo_jax.config import ConfigError
from neo_jax.planning import compiling, topologies

FIGURES = json.loads((pathlib.Path(__file__).parent / "hbm_figures.json").read_text())
ROOT = pathlib.Path(__file__).parents[1]

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'neo_jax[plan]'",
)


@pytest.fixture
def output(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "plan.json"


def arguments(output: pathlib.Path, *more: str) -> list[str]:
    cache = output.parent / "cache"
    return [f"--json={output}", f"--cache={cache}", *more]


# ------------------------------------------------------------------------------ mistakes


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that the command ends with, after exit status 2."""
    assert plan.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("plan: ") and error.count("\n") == 1
    return error


def test_an_unknown_topology_lists_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    error = complaint(capsys, "--config=neo_125m", "--topology=v9-8")
    for name in ("v9-8", "v4-8", "v5e-256", "v5p-8", "v6e-1", "tpu7x-8"):
        assert name in error


def test_without_the_compiler_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: pathlib.Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = complaint(
        capsys, "--config=neo_125m", "--topology=v5e-4", f"--cache={output.parent}"
    )
    assert "neo_jax[plan]" in error and "libtpu" in error


def test_a_plan_replaces_a_plan_and_nothing_else(
    capsys: pytest.CaptureFixture[str], output: pathlib.Path
) -> None:
    output.write_text('{"notes": "dear diary"}')
    error = complaint(capsys, "--config=neo_125m", "--topology=v5e-4", *arguments(output))
    assert "plan.json exists" in error
    assert "dear diary" in output.read_text()


def test_an_unknown_setting_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    error = complaint(
        capsys, "--config=neo_125m", "--topology=v5e-4", "--config.model.num_layer=2"
    )
    assert "num_layers" in error


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.42G of 15.75G "
         "hbm. Exceeded hbm capacity by 1.67G.", 17.42),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (300.00G) exceeds available HBM (15.75G).", 300.0),
        ("RESOURCE_EXHAUSTED: Used 512.0M of 100.0M hbm", 0.5),
        ("INTERNAL: something else", None),
    ],
)  # fmt: skip
def test_the_compilers_refusal_says_how_much_it_wanted(
    message: str, gib: float | None
) -> None:
    needed = compiling.out_of_memory(message)
    assert needed == (None if gib is None else pytest.approx(gib * 2**30))


def test_what_does_not_fit_says_by_how_much_and_what_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: pathlib.Path
) -> None:
    class Refused(jax.stages.Lowered):
        def __init__(self) -> None:
            pass

        def compile(self, **_: object) -> jax.stages.Compiled:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. "
                "Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G."
            )

    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices()[:4])
    monkeypatch.setattr(topologies, "libtpu_version", lambda: "0.0")
    monkeypatch.setattr(compiling, "lower", lambda config, mesh: Refused())
    argv = ("--config=neo_125m", "--topology=v5e-4", *arguments(output))
    assert plan.main(argv) == 1
    error = capsys.readouterr().err
    assert "20.00 GiB of 15.75 a device, 4.25 too many" in error
    assert "train.accumulation_steps=" in error
    report = json.loads(output.read_text())
    assert report["fits"] is False and report["over_by_gib"] == pytest.approx(4.25)
    assert report["predicted_step_seconds"] is None


def test_where_tensors_lie_is_printed_without_compiling(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices()[:4])
    monkeypatch.setattr(topologies, "libtpu_version", lambda: "0.0")
    argv = ["--config=neo_125m", "--topology=v5e-4", "--show_sharding"]
    assert plan.main(argv) == 0
    text = capsys.readouterr().out
    assert "4 chips" in text and "fsdp 4" in text
    assert "embed 768 ÷ fsdp 4" in text


def test_tuning_is_planned_in_the_checkpoints_shape(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices()[:4])
    monkeypatch.setattr(topologies, "libtpu_version", lambda: "0.0")
    shape = config_lib.preset_model("neo_1p3b", num_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(hf.config_to_hf(shape)))
    argv = ["--config=finetune_text", f"--config.train.init_from={tmp_path}"]
    assert plan.main([*argv, "--topology=v5e-4", "--show_sharding"]) == 0
    assert "embed 2048 ÷ fsdp 4" in capsys.readouterr().out


# ------------------------------------------------------------------------- real compiler


@needs_compiler
def test_a_machine_without_a_tpu_starts_quietly_with_the_compiler_installed() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "TPU_"))}
    done = subprocess.run(
        [sys.executable, "-c", "import neo_jax, jax; print(jax.devices()[0].platform)"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "cpu\n"
    assert done.stderr == ""


@needs_compiler
@pytest.mark.parametrize(
    "name", ["v2-8", "v3-8", "v4-8", "v5e-1", "v5p-16", "v6e-8", "tpu7x-8"]
)
def test_the_compiler_knows_every_generation(name: str) -> None:
    topology = topologies.parse(name)
    devices = topologies.devices(topology)
    assert len(devices) == topology.devices
    spread = {tuple(device.coords) for device in devices}  # type: ignore[attr-defined]
    assert len(spread) == topology.chips


@needs_compiler
def test_a_grid_that_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match="v5e:3x5"):
        topologies.devices(topologies.parse("v5e:3x5"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("v5e-1", 0.876), ("v6e-1", 0.704)])
def test_a_bare_product_takes_the_share_of_peak_that_it_always_took(
    name: str, share: float
) -> None:
    """The yardstick: 8192³ in bfloat16, by the compiler's own cycles."""
    measured = compiling.bare_product_share(topologies.parse(name))
    assert measured == pytest.approx(share, abs=0.01)


# Four sequences a chip, whole training state.
CASES = {
    "neo_125m v5e:2x2": ("data.batch_size=16", "model.remat=full"),
}


@pytest.fixture(scope="module", params=CASES)
def planned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """The report of a case, written by the command, and its name."""
    output = tmp_path_factory.mktemp("plan") / "plan.json"
    name, topology = request.param.split()
    settings = [f"--config.{setting}" for setting in CASES[request.param]]
    argv = [f"--config={name}", f"--topology={topology}", *settings, *arguments(output)]
    assert plan.main(argv) == 0
    report = json.loads(output.read_text())
    # Once more: from the cache, the same.
    assert plan.main(argv) == 0
    assert json.loads(output.read_text()) == report
    return {**report, "case": request.param}


@needs_compiler
@pytest.mark.slow
def test_a_real_step_is_predicted_within_what_is_possible(planned: dict[str, object]) -> None:
    assert planned["fits"] is True
    chips = planned["chips"]
    assert planned["mesh"] == {"data": 1, "fsdp": chips, "tensor": 1, "context": 1}
    assert planned["gather_weights"] == "layer"
    assert planned["libtpu"] == importlib.metadata.version("libtpu")
    seconds = planned["predicted_step_seconds"]
    assert 0 < seconds <= planned["predicted_step_seconds_without_overlap"]
    # Never above the bare product's share of peak; and a step that wastes most is a mistake.
    assert 0.15 < planned["predicted_mfu_exact"] < 0.876
    assert planned["predicted_mfu_palm"] > planned["predicted_mfu_exact"]
    tokens = planned["batch_size"] * 2048 / seconds / chips
    assert planned["predicted_tokens_per_second_per_chip"] == pytest.approx(tokens)
    assert planned["seconds_by_part"]["kernels"] > 0
    assert planned["ici_gib"] > 0 and planned["dcn_gib"] == 0


@needs_compiler
@pytest.mark.slow
def test_no_more_hbm_than_before(planned: dict[str, object]) -> None:
    case = planned["case"]
    stored = FIGURES.get(case)
    if stored is None:
        pytest.skip(f"no figure is stored yet; here it is {planned['hbm_gib']:.4f} GiB")
    if stored["libtpu"] != planned["libtpu"]:
        pytest.skip(f"the figure is of libtpu {stored['libtpu']}, not {planned['libtpu']}")
    assert planned["hbm_gib"] <= stored["hbm_gib"] * 1.01, (
        f"{case} needs {planned['hbm_gib']:.4f} GiB a device, {stored['hbm_gib']} before; "
        "worry unless the change is meant to buy speed with memory."
    )


@needs_compiler
@pytest.mark.slow
def test_adapters_of_the_largest_model_fit_one_chip_of_16_gb(output: pathlib.Path) -> None:
    argv = [
        "--config=finetune_text",
        "--topology=v5e-1",
        "--config.model=neo_2p7b",
        "--config.model.param_dtype=bfloat16",
        "--config.model.remat=full",
        "--config.model.lora_rank=8",
        "--config.finetune.trainable=lora",
        "--config.data.batch_size=4",
        "--config.data.seq_len=2048",
    ]
    assert plan.main([*argv, *arguments(output)]) == 0
    report = json.loads(output.read_text())
    assert report["fits"] is True and report["hbm_gib"] < report["hbm_limit_gib"] < 16


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "more"),
    [
        ("v5e-1", []),
        ("v5e-1", ["--weight_dtype=int8", "--cache_dtype=int8"]),
        ("v5e:2x2", ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]),
    ],
)
def test_writing_text_is_planned_against_its_roofline(
    topology: str, more: list[str], output: pathlib.Path
) -> None:
    argv = ["--config=neo_125m", "--config.model.num_layers=2", f"--topology={topology}"]
    argv += ["--decode", "--batch_size=2", "--context=256", *more, *arguments(output)]
    assert plan.main(argv) == 0
    report = json.loads(output.read_text())
    assert report["fits"] is True and report["hbm_gib"] < 1
    assert report["hbm_gib"] > report["cache_gib"]
    assert 0 < report["predicted_share_of_roofline"] <= 1
    rate = report["batch_size"] / report["predicted_seconds_per_pass"]
    assert report["predicted_tokens_per_second"] == pytest.approx(rate)
    # The head, tied, is read as a product; two layers of 768 beside it.
    bytes_each = 1 if "--weight_dtype=int8" in more else 2
    weights = bytes_each * (50304 * 768 + 2 * 12 * 768**2) / (2 if "2x2" in topology else 1)
    assert report["weights_gib"] * 2**30 == pytest.approx(weights, rel=0.02)


@needs_compiler
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--context=4096"], "--context 4096 exceeds model.max_seq_len=2048"),
        (["--batch_size=3", "--context=128"], "--batch_size 3"),
    ],
)
def test_text_that_cannot_be_written_is_told(
    more: list[str], words: str, capsys: pytest.CaptureFixture[str], output: pathlib.Path
) -> None:
    argv = ["--config=neo_125m", "--config.model.num_layers=2", "--topology=v5e:2x2"]
    error = complaint(capsys, *argv, "--decode", *more, f"--cache={output.parent}")
    assert words in error


def test_the_resolved_config_names_what_a_step_depends_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(topologies, "libtpu_version", lambda: "0.0")
    topology = topologies.parse("v5e-16")
    config = config_lib.load_experiment("neo_125m")
    same = config_lib.load_experiment("neo_125m", ["data.source=other", "train.seed=3"])
    assert compiling.key(config, topology) == compiling.key(same, topology)
    for change in ("data.batch_size=8", "finetune.trainable=last_layers"):
        other = config_lib.load_experiment("neo_125m", [change])
        assert compiling.key(config, topology) != compiling.key(other, topology)
    assert compiling.key(config, topology) != compiling.key(config, topologies.parse("v5e-32"))
