"""Pairs of answers: the loss is its papers', and devices, slices and kills change nothing."""

import dataclasses
import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neo_jax import lora, sharding, state, train, trainable
from neo_jax import tokenizer as tokenizers
from neo_jax.config import Config, ConfigError, DataConfig, PreferenceConfig, build
from neo_jax.data import records
from neo_jax.data.records import Row, RowError
from neo_jax.finetune import preference
from neo_jax.finetune.preference import REFERENCE
from neo_jax.state import Params
from tests.lora_test import CONFIG, some_params
from tests.pretrain_test import _one_device as _one_device
from tests.pretrain_test import experiment as experiment
from tests.pretrain_test import finished as finished
from tests.pretrain_test import lines, run, summary
from tests.stopping import stopped_after
from tests.train_test import BATCH, SEQ, VOCAB, assert_close

READ = DataConfig(record_format="preference")
SETTINGS = (
    PreferenceConfig(beta=0.3),
    PreferenceConfig(label_smoothing=0.2),
    PreferenceConfig(beta=2.5, reference_free=True, target_margin=1.4),
)


def some_log_probs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    both = rng.normal(size=(2, 6, 2)).astype(np.float32)
    return -20 + 4 * both[0], -20 + 4 * both[1]


# -------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_is_the_formula_of_its_paper(settings: PreferenceConfig) -> None:
    log_probs, reference = some_log_probs()
    losses, rewards = preference.preference_terms(
        jnp.asarray(log_probs), jnp.asarray(reference), settings
    )
    ratio = log_probs.astype(float) - (0 if settings.reference_free else reference)
    logits = settings.beta * (ratio[:, 0] - ratio[:, 1]) - settings.target_margin
    right, wrong = np.log1p(np.exp(-logits)), np.log1p(np.exp(logits))
    mixed = (1 - settings.label_smoothing) * right + settings.label_smoothing * wrong
    np.testing.assert_allclose(losses, mixed, rtol=1e-5)
    np.testing.assert_allclose(rewards, settings.beta * ratio, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_loss_and_its_gradients_are_trls(settings: PreferenceConfig) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("trl")
    log_probs, reference = some_log_probs()
    ours, gradient = jax.value_and_grad(
        lambda x: preference.preference_terms(x, jnp.asarray(reference), settings)[0].sum()
    )(jnp.asarray(log_probs))
    theirs = torch.tensor(log_probs, requires_grad=True)
    if settings.reference_free:
        from trl.experimental.cpo.cpo_trainer import CPOTrainer

        trainer = types.SimpleNamespace(
            alpha=0.0,
            loss_type="simpo",
            simpo_gamma=settings.target_margin,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            accelerator=types.SimpleNamespace(device="cpu"),
        )
        loss = CPOTrainer.cpo_loss(trainer, theirs[:, 0], theirs[:, 1])[0].sum()
    else:
        # One pair at a time: "aot" sorts the pairs of a batch, and is DPO with smoothing.
        loss = sum(trl_dpo(theirs[i], torch.tensor(reference[i]), settings) for i in range(6))
    loss.backward()
    assert float(ours) == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-5, atol=1e-7)


def trl_dpo(log_probs: Any, reference: Any, settings: PreferenceConfig) -> Any:
    """The loss of trl's DPOTrainer, of one pair whose answers have one token each."""
    import collections

    import torch
    from trl import DPOTrainer

    def same(x: Any) -> Any:
        return x

    def model(**_: Any) -> Any:
        flat = log_probs[:, None]
        return types.SimpleNamespace(
            log_probs=flat,
            entropy=torch.zeros_like(flat),
            mean_logits=torch.zeros_like(flat),
            is_top1=torch.zeros_like(flat, dtype=torch.bool),
        )

    model.training = False  # type: ignore[attr-defined]
    trainer = types.SimpleNamespace(
        model=model,
        accelerator=types.SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        use_weighting=False,
        loss_types=["aot" if settings.label_smoothing else "sigmoid"],
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
    )
    inputs = {
        "input_ids": torch.zeros(2, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1], [0, 1]]),
        "ref_chosen_logps": reference[:1],
        "ref_rejected_logps": reference[1:],
    }
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


# -------------------------------------------------------------------------------- gradients


def some_pairs(longer: int = 0) -> dict[str, np.ndarray]:
    """Pairs with prompts and answers of different lengths; `longer`: more padding."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, VOCAB, (BATCH, 2, SEQ + 1)).astype(np.int32)
    starts, ends = rng.integers(0, 4, (BATCH, 1, 1)), rng.integers(5, SEQ, (BATCH, 2, 1))
    places = np.arange(SEQ)
    batch = {
        "inputs": ids[..., :-1],
        "targets": ids[..., 1:],
        "learned": (places >= starts) & (places < ends),
        "weights": np.ones(BATCH, np.float32),
        REFERENCE: rng.normal(-60, 3, (BATCH, 2)).astype(np.float32),
    }
    if longer:
        for name in ("inputs", "targets", "learned"):
            batch[name] = batch[name][..., : SEQ - longer]
        batch["learned"][..., SEQ - 2 * longer :] = False
        padded = dict(batch)
        for name in ("inputs", "targets", "learned"):
            padded[name] = np.pad(batch[name], ((0, 0), (0, 0), (0, longer)))
        return padded
    return batch


def changed(**sections: dict[str, Any]) -> Config:
    tree = dataclasses.asdict(CONFIG)
    tree |= {"task": "preference"}
    tree["data"]["record_format"] = "preference"
    for name, changes in sections.items():
        tree[name] |= changes
    return build(tree)


FULL = {"finetune": {"trainable": "all"}, "model": {"lora_rank": 0}}


def gradients(config: Config, devices: int) -> tuple[Params, Any]:
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    graph, _ = state.model_graph(config.model)
    whole = some_params()
    if not config.model.lora_rank:
        whole, _ = lora.merge(whole, CONFIG.model)
    with jax.set_mesh(mesh):
        places = jax.tree.map(
            lambda leaf: leaf.sharding, state.abstract_params(config.model, mesh)
        )
        learned, frozen = trainable.divide(jax.device_put(whole, places), config.finetune)
        batch = train.place_batch(some_pairs(), mesh, BATCH)
        if config.model.lora_dropout:
            batch = {**batch, train.DROPOUT: lora.row_keys(0, jnp.asarray(3), BATCH)}
        return jax.jit(
            lambda learned, frozen, batch: train.gradients(
                learned, graph, config, batch, preference.preference_loss, frozen
            )
        )(learned, frozen, batch)


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param(FULL, id="full"), pytest.param({}, id="lora")])
def test_devices_and_slices_change_neither_losses_nor_gradients(how: Any) -> None:
    dropout = {} if how else {"lora_dropout": 0.3}
    model = how.get("model", {}) | dropout
    base = {**how, "model": model}
    grads, losses = gradients(changed(**base), 1)
    sliced = {"train": {"accumulation_steps": 2}, "model": {**model, "remat": "full"}}
    mesh = {"mesh": {"fsdp": 2, "tensor": 2, "data": 2}}
    for other, devices in ((sliced, 1), (mesh, 8)):
        ours, sums = gradients(changed(**{**base, **other}), devices)
        assert_close(ours, grads, 1e-5)
        np.testing.assert_allclose(sums.nll, losses.nll, rtol=1e-5)
        for name, value in sums.extras.items():
            np.testing.assert_allclose(value, losses.extras[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "length_normalised", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_log_probs_are_those_of_the_logits_whatever_the_padding(
    length_normalised: bool,
) -> None:
    config = changed(**FULL, preference={"length_normalised": length_normalised})
    graph, _ = state.model_graph(config.model)
    params, _ = lora.merge(some_params(), CONFIG.model)
    model = nnx.merge(graph, params)
    batch = jax.tree.map(jnp.asarray, some_pairs(longer=3))
    ours = preference.answer_log_probs(model, config, batch)
    short = {k: v[..., :-3] if v.ndim == 3 else v for k, v in batch.items()}
    shorter = preference.answer_log_probs(model, config, short)
    np.testing.assert_allclose(ours, shorter, rtol=1e-5)
    for side in range(2):
        log_p = jax.nn.log_softmax(model.logits(batch["inputs"][:, side]), axis=-1)
        each = jnp.take_along_axis(log_p, batch["targets"][:, side, :, None], -1)[..., 0]
        mask = batch["learned"][:, side]
        expected = (each * mask).sum(1) / (mask.sum(1) if length_normalised else 1)
        np.testing.assert_allclose(ours[:, side], expected, rtol=1e-5)


# ------------------------------------------------------------------------------- the records


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"prompt": "Q:", "chosen": " a", "rejected": " b"}, ("Q:", " a", " b")),
        (
            {
                "prompt": [turn("user", "Hi")],
                "chosen": [turn("assistant", "a")],
                "rejected": [turn("assistant", "b")],
            },
            ("User: Hi\nAssistant:", " a", " b"),
        ),
        (
            {
                "chosen": [turn("user", "Hi"), turn("assistant", "a")],
                "rejected": [turn("user", "Hi"), turn("assistant", "b")],
            },
            ("User: Hi\nAssistant:", " a", " b"),
        ),
        (
            {"prompt": [turn("user", "Hi")], "chosen": "a", "rejected": "b"},
            ("User: Hi\nAssistant:", " a", " b"),
        ),
    ],
)
def test_pairs_are_texts_or_messages(fields: Any, parts: tuple[str, ...]) -> None:
    read = records.to_document(Row(0, fields), "group", READ).parts
    assert read == tuple(zip(parts, (False, True, True), strict=True))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"question": "a", "answer": "b"}, "there is no field 'chosen', 'rejected'; there "),
        ({"chosen": "a", "rejected": "b"}, "there is no field 'prompt'; there are 'chosen', "),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "field 'rejected' is int; it must"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "an answer is empty"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "field 'prompt' is int; it must be "),
        ({"chosen": 1, "rejected": 2, "prompt": "a"}, "field 'chosen' is int; it must be"),
        ({"prompt": ["a"], "chosen": "b", "rejected": "c"}, "prompt[0] must hold 'role'"),
        (
            {"prompt": "a", "chosen": [turn("assistant", "b")], "rejected": "c"},
            "'chosen' and 'rejected' must both be text or both messages",
        ),
        (
            {"prompt": [], "chosen": [turn("user", "b")], "rejected": [turn("user", "c")]},
            "field 'chosen' must end with one answer of the assistant",
        ),
    ],
)
def test_what_is_no_pair_is_told_in_one_line(fields: Any, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        records.to_document(Row(0, fields), "group", READ)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def write_pairs(path: pathlib.Path) -> pathlib.Path:
    with path.open("w") as file:
        for n in range(24):
            good, bad = f" It says {n}.", f" Sy {n}"
            pair = {"prompt": f"Line {n}?", "chosen": good, "rejected": bad}
            file.write(json.dumps(pair) + "\n")
    return path


def test_answers_are_learned_with_their_ends_and_prompts_are_not(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = tokenizers.load(str(finished))
    path = write_pairs(tmp_path / "pairs.jsonl")
    with path.open("a") as file:
        long = {"prompt": "Line " * 40, "chosen": " It says 1.", "rejected": " says" * 40}
        file.write(json.dumps(long) + "\n")

    def pairs(**changes: Any) -> preference.Pairs:
        config = changed(
            data={"source": str(path), "holdout_every": 5, "holdout_offset": 1, **changes}
        )
        return preference.read_pairs(config, words, "train")

    whole = pairs(seq_len=SEQ)
    inputs, targets = whole.arrays["inputs"], whole.arrays["targets"]
    for side, answer in enumerate((" It says 0.", " Sy 0")):
        mask = whole.arrays["learned"][0, side]
        assert words.decode(targets[0, side][mask][:-1].tolist()) == answer
        assert targets[0, side][mask][-1] == words.eos_id
        assert inputs[0, side, 0] == words.eos_id
        shown = inputs[0, side][: int(np.argmax(mask)) + 1]
        assert words.decode(shown[1:].tolist()) == "Line 0?"
    # The long record: its prompt gave way to the answers, and one of them was too long.
    assert (whole.cut_prompts, whole.cut_answers) == (1, 1)
    assert whole.arrays["learned"][-1].any(axis=1).all()
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ConfigError, match=r"jsonl line 1: there is no field 'chosen', 'rej"):
        pairs()


# ----------------------------------------------------------------------------------- the run


def tune(experiment: str, base: pathlib.Path, workdir: pathlib.Path, *arguments: str) -> int:
    pairs = workdir.parent / "pairs.jsonl"
    if not pairs.exists():
        write_pairs(pairs)
    start = ("--config.task=preference", "--config.data.record_format=preference")
    start += (f"--config.train.init_from={base}", f"--config.data.source={pairs}")
    return run(experiment, workdir, *start, "--config.eval.sample_tokens=0", *arguments)


LORA = ("--config.finetune.trainable=lora", "--config.model.lora_rank=2")


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), LORA])
def test_a_killed_run_goes_on_to_the_digit(
    experiment, finished, tmp_path, monkeypatch, how: tuple[str, ...]
) -> None:
    assert tune(experiment, finished, tmp_path / "whole", *how) == 0
    with stopped_after(7):
        tune(experiment, finished, tmp_path / "killed", *how)
    # The checkpoint was asked before the kill, and is not asked again.
    monkeypatch.setattr(preference.PreferenceTuning, "_ask_reference", None)
    assert tune(experiment, finished, tmp_path / "killed", *how) == 0
    told, whole = lines(tmp_path / "killed"), lines(tmp_path / "whole")
    assert told == whole
    assert whole[0]["loss"] == pytest.approx(np.log(2), abs=1e-5), "the model is its reference"
    assert {"accuracy", "margin", "chosen_reward", "rejected_reward"} <= whole[-1].keys()
    assert "perplexity" not in whole[-1]
    evaluated = [line for line in whole if line["split"] == "eval"]
    assert evaluated[-1]["accuracy"] == 1 and evaluated[-1]["loss"] < 0.69
    assert summary(tmp_path / "whole")["accuracy"] == 1


@pytest.mark.slow
def test_the_batch_that_is_judged_changes_no_figure(experiment, finished, tmp_path) -> None:
    short = ("--config.train.num_steps=1", "--config.checkpoint.every=100")
    figures = []
    for size in (2, 5):
        workdir = tmp_path / f"by_{size}"
        assert (
            tune(experiment, finished, workdir, *short, f"--config.eval.batch_size={size}")
            == 0
        )
        (line,) = [line for line in lines(workdir) if line["split"] == "eval"]
        figures.append([line[name] for name in ("loss", "accuracy", "margin")])
    np.testing.assert_allclose(*figures, rtol=1e-4, atol=1e-6)
