"""What a run leaves to read: counts, speeds with a clock we hold, files, resuming."""

import dataclasses
import io
import json
import math
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax import config as config_lib
from neo_jax import metrics
from neo_jax.config import ConfigError, FinetuneConfig
from neo_jax.metrics import plotting


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_config(**train):
    return config_lib.build({"train": {"num_steps": 40, **train}})


def open_writer(workdir, start_step=0, **kwargs):
    kwargs.setdefault("stream", io.StringIO())
    return metrics.Writer(workdir, make_config(), start_step, **kwargs)


def raw_lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


# ---------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("preset", "palm", "exact"),
    [
        ("neo_125m", 0.968, 0.811),
        ("neo_350m", 2.725, 2.307),
        ("neo_1p3b", 9.073, 8.238),
        ("neo_2p7b", 17.885, 16.493),
    ],
)
def test_flops_of_the_released_shapes(preset, palm, exact):
    counted = metrics.flops_per_token(config_lib.preset_model(preset), 2048)
    assert f"{counted.palm / 1e9:.3f}" == f"{palm:.3f}"
    assert f"{counted.exact / 1e9:.3f}" == f"{exact:.3f}"


@pytest.mark.parametrize("seq_len", [1, 5, 7, 8, 33])
def test_exact_flops_count_the_keys_that_the_masks_let_through(seq_len):
    model = config_lib.preset_model(
        "tiny", num_layers=3, window_size=7, attention_types=["global", "local", "local"]
    )
    query, key = np.mgrid[:seq_len, :seq_len]
    causal = key <= query
    local = causal & (query - key < 7)
    keys = (causal.sum() + 2 * local.sum()) / seq_len
    counted = metrics.flops_per_token(model, seq_len)
    weights = (counted.palm - 12 * 3 * model.embed_dim * seq_len) / 6
    assert weights == 3 * 12 * model.embed_dim**2 + model.vocab_size * model.embed_dim
    np.testing.assert_allclose(counted.exact, 6 * weights + 12 * model.embed_dim * keys)


def test_frozen_weights_spare_their_gradients():
    model = config_lib.preset_model("tiny", num_layers=2, attention_types=["global"])
    adapted = dataclasses.replace(model, lora_rank=3, lora_targets=("key", "up"))
    D, S = model.embed_dim, 10
    layer, head, keys = 12 * D**2, model.vocab_size * D, (S + 1) / 2

    def spared(shape, trainable, last_layers=1):
        how = FinetuneConfig(trainable=trainable, last_layers=last_layers)
        counted = metrics.flops_per_token(shape, S, how)
        return metrics.flops_per_token(model, S).exact - counted.exact

    assert spared(model, "last_layers", 2) == 2 * head
    assert spared(model, "last_layers", 1) == 2 * head + 4 * layer + 8 * D * keys
    adapters = 2 * 3 * (2 * D + 5 * D)
    assert spared(adapted, "lora") == 2 * head + 4 * layer - 6 * adapters


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v2", 23),  # a device is one of the chip's two cores
        ("TPU v3", 61.5),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
    ],
)
def test_peak_of_one_device(kind, tflops):
    assert metrics.peak_flops(kind) == tflops * 1e12


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v4 lite", "NVIDIA L40S", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", ""]
)
def test_peak_of_an_unknown_device_is_none(kind):
    assert metrics.peak_flops(kind) is None


# ----------------------------------------------------------------------------------- speed


def make_throughput(clock, peak_flops=1e12):
    return metrics.Throughput(
        flops_per_token=metrics.FlopsPerToken(palm=2e9, exact=1e9),
        peak_flops=peak_flops,
        num_devices=4,
        clock=clock,
    )


def test_rates_leave_out_what_is_not_training():
    clock = Clock()
    timer = make_throughput(clock)
    with timer.pause("compile"):
        clock.now += 50
    assert timer.rates() == {}
    for _ in range(4):
        clock.now += 2
        timer.step(1000)
    with timer.pause("eval"):
        clock.now += 30
    with timer.pause("save"):
        clock.now += 7
    rates = timer.rates()
    assert rates == {
        "tokens_per_second": 500,
        "step_seconds": 2,
        "mfu_palm": 500 * 2e9 / 4e12,
        "mfu_exact": 500 * 1e9 / 4e12,
    }
    # A new window starts: neither the old steps nor the old pauses count again.
    clock.now += 4
    timer.step(1000)
    assert timer.rates()["tokens_per_second"] == 250
    totals = timer.totals()
    assert totals == {
        "compile_seconds": 50,
        "train_seconds": 12,
        "eval_seconds": 30,
        "save_seconds": 7,
        "restart_seconds": 0,
        "data_seconds": 0,
        "goodput": 12 / 99,
    }


def test_without_a_known_peak_there_is_no_mfu():
    clock = Clock()
    timer = make_throughput(clock, peak_flops=None)
    clock.now += 1
    timer.step(10)
    assert timer.rates() == {"tokens_per_second": 10, "step_seconds": 1}


def test_a_pause_that_fails_is_still_counted():
    clock = Clock()
    timer = make_throughput(clock)

    def save():
        with timer.pause("save"):
            clock.now += 3
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        save()
    assert timer.totals()["save_seconds"] == 3


# ------------------------------------------------------------------------------------ files


def test_a_line_has_the_contracts_keys_in_order(tmp_path):
    with open_writer(tmp_path / "new" / "run") as writer:
        values = {"skipped": 0, "extra": 1, "tokens": np.int64(64), "loss": jnp.float32(2.0)}
        writer.write(5, "train", {**values, "learning_rate": jnp.float32(0.5)})
        writer.write(5, "eval", {"loss": 1.0, "bits_per_byte": 0.5})
    train, held_out = metrics.read_metrics(tmp_path / "new" / "run")
    assert list(train) == (
        ["step", "split", "loss", "perplexity", "learning_rate", "tokens", "skipped", "extra"]
    )
    assert train["step"] == 5
    assert train["split"] == "train"
    assert type(train["tokens"]) is int
    assert train["perplexity"] == pytest.approx(math.exp(2))
    assert held_out == {
        "step": 5,
        "split": "eval",
        "loss": 1.0,
        "perplexity": math.e,
        "bits_per_byte": 0.5,
    }


def test_lines_are_on_disk_before_the_writer_closes(tmp_path):
    writer = open_writer(tmp_path)
    writer.write(1, "train", {"loss": 1.0})
    assert len(raw_lines(tmp_path)) == 1
    writer.close()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_valid_json(tmp_path, loss):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    with open_writer(tmp_path) as writer:
        writer.write(1, "train", {"loss": jnp.float32(loss), "grad_norm": loss})
        writer.write(2, "train", {"loss": 1000.0})  # whose perplexity overflows
        writer.plot()
        writer.summary({"loss": loss, "nested": [{"x": np.float32(loss)}]})
    lines = [json.loads(line, parse_constant=refuse) for line in raw_lines(tmp_path)]
    assert lines[0]["loss"] is lines[0]["grad_norm"] is lines[0]["perplexity"] is None
    assert lines[1]["perplexity"] is None
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert summary == {"loss": None, "nested": [{"x": None}]}


def test_a_resumed_run_reads_as_if_unbroken(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"

    def log(writer, steps):
        for step in steps:
            writer.write(step, "train", {"loss": 1 / step})
            if step % 3 == 0:
                writer.write(step, "eval", {"loss": 2 / step})

    with open_writer(straight) as writer:
        log(writer, range(1, 11))
    with open_writer(broken) as writer:
        log(writer, range(1, 9))
    # Killed in the middle of a line; the last checkpoint is that of step 6.
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "spl')
    assert metrics.read_metrics(broken)[-1]["step"] == 8
    with open_writer(broken, start_step=6) as writer:
        assert metrics.read_metrics(broken)[-1] == metrics.read_metrics(straight)[7]
        log(writer, range(7, 11))
    assert raw_lines(broken) == raw_lines(straight)
    assert not list(broken.glob("*.partial")) + list(broken.glob(".*"))


def test_a_torn_line_never_joins_the_next(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": 1.0}\n'
        '{"step": 2, "split": "train", "loss": 2.0}'  # whole, but for the newline
    )
    with open_writer(tmp_path, start_step=2) as writer:
        writer.write(3, "train", {"loss": 3.0})
    assert [line["loss"] for line in map(json.loads, raw_lines(tmp_path))] == [1.0, 2.0, 3.0]


def test_a_fresh_run_drops_all_that_lay_there(tmp_path):
    for _ in range(2):
        with open_writer(tmp_path) as writer:
            writer.write(0, "eval", {"loss": 9.0})
            writer.write(1, "train", {"loss": 8.0})
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [0, 1]


def test_no_file_reads_as_no_lines(tmp_path):
    assert metrics.read_metrics(tmp_path) == []


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stream = io.StringIO()
    with open_writer(tmp_path / "run", stream=stream) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.advance(1)
        writer.say("hello")
        writer.plot()
        writer.summary({})
    assert not (tmp_path / "run").exists()
    assert stream.getvalue() == ""


# ------------------------------------------------------------------------------ TensorBoard


def tensorboard_events(folder):
    """Events of all files in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def tensorboard_scalars(folder):
    """(tag, step) → value as TensorBoard shows them: a session's start hides later steps."""
    shown = {}
    for event in tensorboard_events(folder):
        if event.session_log.status == event.session_log.START:
            shown = {(tag, step): v for (tag, step), v in shown.items() if step < event.step}
        for value in event.summary.value:
            shown[value.tag, event.step] = value.simple_value
    return shown


def test_tensorboard_gets_every_number_and_purges_on_resume(tmp_path):
    with open_writer(tmp_path) as writer:
        for step in range(1, 9):
            writer.write(step, "train", {"loss": step, "grad_norm": math.nan})
        writer.write(8, "eval", {"loss": 0.5})
    with open_writer(tmp_path, start_step=6) as writer:
        writer.write(7, "train", {"loss": 70.0})
    shown = tensorboard_scalars(tmp_path / "tensorboard")
    losses = {step: v for (tag, step), v in shown.items() if tag == "train/loss"}
    assert losses == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 70}
    assert ("train/perplexity", 6) in shown
    assert ("train/grad_norm", 6) not in shown
    assert ("eval/loss", 8) not in shown


def test_tensorboard_can_be_left_out(tmp_path):
    with metrics.Writer(tmp_path, make_config(tensorboard=False), 0, stream=io.StringIO()):
        pass
    assert not (tmp_path / "tensorboard").exists()


# ------------------------------------------------------------------------- Weights & Biases


def test_wandb_missing_is_told_in_one_line_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = make_config(wandb_project="neo")
    with pytest.raises(ConfigError, match="pip install wandb") as error:
        metrics.Writer(tmp_path / "run", config, 0, stream=io.StringIO())
    assert "train.wandb_project='neo'" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_wandb_gets_lines_with_their_step(tmp_path, monkeypatch):
    calls = []

    class Run:
        def define_metric(self, *args, **kwargs):
            calls.append(("define", args, kwargs))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    def init(**kwargs):
        calls.append(("init", kwargs["project"], kwargs["config"]["train"]["num_steps"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = make_config(wandb_project="neo")
    with metrics.Writer(tmp_path, config, 0, stream=io.StringIO()) as writer:
        writer.write(3, "train", {"loss": 0.0})
    assert calls == [
        ("init", "neo", 40),
        ("define", ("*",), {"step_metric": "step"}),
        ("log", {"step": 3, "train/loss": 0.0, "train/perplexity": 1.0}),
        ("finish",),
    ]


# --------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_file_gets_a_line_now_and_then(tmp_path):
    clock, stream = Clock(), io.StringIO()
    with open_writer(tmp_path, stream=stream, clock=clock) as writer:
        for step in range(1, 41):
            clock.now += 2
            writer.advance(step)
            rates = {"tokens_per_second": 1234.5, "step_seconds": 2.0}
            writer.write(step, "train", {"loss": 10.0 / step, **rates})
        writer.write(40, "eval", {"loss": 0.25, "bits_per_byte": 0.125})
        writer.say("Once upon a time")
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "step 1/40: loss 10.0000, 1,234 tokens/s, 01:18 left"
    # One line at the start, one every 16 s = 8 steps, the last step, and all that is rare.
    assert [line.split(":")[0] for line in lines[:-2]] == [
        f"step {step}/40" for step in (1, 9, 17, 25, 33, 40)
    ]
    assert lines[-2] == "eval at step 40: loss 0.2500, 0.1250 bits per byte"
    assert lines[-1] == "Once upon a time"


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumes(tmp_path):
    stream = Terminal()
    with open_writer(tmp_path, start_step=10, stream=stream) as writer:
        writer.write(11, "train", {"loss": math.nan, "tokens_per_second": 99.0})
        writer.advance(20)
        writer.say("Once upon a time")
    text = stream.getvalue()
    assert "10/40" in text
    assert "20/40" in text
    assert "loss not finite, 99 tokens/s" in text
    assert "Once upon a time\n" in text


# ------------------------------------------------------------------------------------- plot


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_the_plot_grows_with_what_there_is_to_show(tmp_path):
    heights = []
    for name, extra, held_out in [
        ("loss", {}, {}),
        ("rate", {"learning_rate": 1e-3}, {}),
        ("all", {"learning_rate": 1e-3}, {"bits_per_byte": 1.5}),
    ]:
        with open_writer(tmp_path / name) as writer:
            for step in range(1, 201):
                loss = math.nan if step == 100 else 5 / step
                writer.write(step, "train", {"loss": loss, **extra})
            writer.write(200, "eval", {"loss": 1.0, **held_out})
            writer.plot()
        heights.append(png_size(tmp_path / name / "loss.png")[1])
    assert heights == sorted(set(heights))


def test_the_plot_of_one_line_and_of_none(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.plot()
        assert not (tmp_path / "loss.png").exists()
        writer.write(0, "eval", {"loss": math.nan})
        writer.plot()
        assert not (tmp_path / "loss.png").exists()
        writer.write(1, "train", {"loss": 1.0, "learning_rate": 0.0})
        writer.plot()
    png_size(tmp_path / "loss.png")


def test_smoothing_keeps_a_constant_and_passes_over_gaps():
    values = np.array([3.0, 3.0, np.nan, 3.0, 3.0, 3.0])
    np.testing.assert_allclose(plotting._smooth(values, 3), 3.0)
    assert np.isnan(plotting._smooth(np.array([1.0, np.nan, 1.0]), 1)[1])
