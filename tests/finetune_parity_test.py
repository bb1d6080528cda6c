"""One update of tuning, beside transformers', torch's and peft's on the same texts.

Instructions go through our own data: masked prompts, rows filled with the end-of-text token
that is also learned. The other side has them as its users would write them. Errors are in
units of each tensor's scale.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax import hf, optimizer, sharding, state, train, trainable
from neo_jax.config import Config, MeshConfig
from neo_jax.data import pipeline
from neo_jax.state import Params
from tests.finetune_text_test import EXAMPLES, experiment, params_of, words
from tests.finetune_text_test import path as path
from tests.parity_test import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = 1e-5
TARGETS = {
    "query": ("attention", "attn.attention.q_proj"),
    "value": ("attention", "attn.attention.v_proj"),
    "out": ("attention", "attn.attention.out_proj"),
    "up": ("mlp", "mlp.c_fc"),
    "down": ("mlp", "mlp.c_proj"),
}
LORA = {
    "model": {"lora_rank": 4, "lora_alpha": 6.0, "lora_targets": tuple(TARGETS)},
    "finetune": {"trainable": "lora"},
}


def our_step(config: Config) -> tuple[float, Params, Params]:
    """Loss, gradients and updated parameters of what is learned."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.build(config.optimizer, 1)
    graph, _ = state.model_graph(config.model)
    rows = pipeline.build(config.data, words(), seed=0, split="train")
    batch = {key: jnp.asarray(array) for key, array in next(rows).items()}
    rows.close()
    whole = jax.tree.map(jnp.asarray, params_of(config.model))
    learned, frozen = trainable.divide(whole, config.finetune)
    like = state.abstract(config.model, mesh, tx, config.finetune)

    @jax.jit
    def run(learned: Params, frozen: Params) -> Any:
        grads, sums = train.gradients(learned, graph, config, batch, frozen=frozen)
        begun = state.TrainState(
            step=jnp.zeros((), jnp.int32),
            params=learned,
            opt_state=tx.init(learned),
            spikes=optimizer.no_spikes(),
        )
        after, _ = train.train_step(begun, batch, frozen, graph=graph, config=config, tx=tx)
        return sums.nll, grads, after.params

    assert jax.tree.map(jnp.shape, learned) == jax.tree.map(jnp.shape, like.params)
    loss, grads, after = jax.device_get(run(learned, frozen))
    return float(loss), grads, after


def their_model(config: Config, params: Params) -> Any:
    with_out = {**hf.config_to_hf(config.model), "attn_implementation": "eager"}
    model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**with_out))
    load(model, hf.to_hf(params, config.model))
    return model.eval()


def their_step(model: Any, config: Config) -> float:
    """Loss; gradients and updated parameters stay in the model."""
    eos, rows = words().eos_id, []
    for example in EXAMPLES:
        prompt, answer = (words().encode(example[key]) for key in ("prompt", "completion"))
        rows.append(([eos, *prompt, *answer, eos], 1 + len(prompt)))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), eos)  # padding is the end-of-text token, too
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for number, (row, start) in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        labels[number, start : len(row)] = torch.tensor(row[start:])
        mask[number, : len(row)] = 1
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in learned if "bias" in name or "ln_" in name]
    decayed = [p for name, p in learned if not ("bias" in name or "ln_" in name)]
    gradients = {name: p.grad.clone() for name, p in learned}
    torch.nn.utils.clip_grad_norm_([p for _, p in learned], config.optimizer.clip_norm)
    adam = config.optimizer
    torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": adam.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=adam.learning_rate,
        betas=(adam.b1, adam.b2),
        eps=adam.eps,
    ).step()
    for name, p in learned:
        p.grad = gradients[name]
    return loss.item()


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, Any]) -> None:
    assert set(ours) == set(theirs)
    for name, theirs_ in theirs.items():
        expected = theirs_.detach().numpy()
        error = np.abs(ours[name] - expected).max() / np.abs(expected).max()
        assert error < TOLERANCE, (name, error)


@pytest.mark.parametrize("packing", [pytest.param("none", marks=pytest.mark.slow), "best_fit"])
def test_an_update_on_masked_instructions_is_torchs(path: pathlib.Path, packing: str) -> None:
    config = experiment(path, packing)
    loss, grads, after = our_step(config)
    model = their_model(config, params_of(config.model))
    assert their_step(model, config) == pytest.approx(loss, rel=TOLERANCE)
    named = dict(model.named_parameters())
    assert_equal(hf.to_hf(grads, config.model), {name: p.grad for name, p in named.items()})
    assert_equal(hf.to_hf(after, config.model), named)


def in_pefts_names(adapters: Params, rank: int) -> dict[str, np.ndarray]:
    named = {}
    for name, (module, theirs) in TARGETS.items():
        adapter = adapters["blocks"][module][name]["adapter"]
        for layer in range(len(adapter["a"])):
            at = f"base_model.model.transformer.h.{layer}.{theirs}"
            named[f"{at}.lora_A.default.weight"] = adapter["a"][layer].reshape(-1, rank).T
            named[f"{at}.lora_B.default.weight"] = adapter["b"][layer].reshape(rank, -1).T
    return named


@pytest.mark.slow
def test_an_update_of_adapters_is_pefts(path: pathlib.Path) -> None:
    config = experiment(path, **LORA)
    loss, grads, after = our_step(config)
    params, rank = params_of(config.model), config.model.lora_rank
    learned, frozen = trainable.divide(params, config.finetune)
    model = peft.get_peft_model(
        their_model(config, frozen),
        peft.LoraConfig(
            r=rank,
            lora_alpha=config.model.lora_alpha,
            target_modules=[theirs.split(".")[-1] for _, theirs in TARGETS.values()],
        ),
    )
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, array in in_pefts_names(learned, rank).items():
            adapters.pop(name).copy_(torch.from_numpy(np.array(array)))
    assert not adapters
    assert their_step(model, config) == pytest.approx(loss, rel=TOLERANCE)
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert_equal(in_pefts_names(grads, rank), {n: p.grad for n, p in adapters.items()})
    assert_equal(in_pefts_names(after, rank), adapters)
