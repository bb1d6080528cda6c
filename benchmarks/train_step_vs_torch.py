"""Our training step beside Hugging Face's torch model: same shape, same machine, in turns.

Both do one whole update of GPT-Neo 125M in float32: forward, backward, gradient clipping,
AdamW. They take turns in one process, so that whatever else the machine does meets both, and
the medians are compared. Both compute on memory that the process keeps, as our training runs
do (neo_jax/host_memory.py).

    pip install 'neo-jax[oracle]'
    python benchmarks/train_step_vs_torch.py --batch 2 --seq 1024 --repeats 5
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch
import transformers

from neo_jax import config as config_lib
from neo_jax import host_memory, optimizer, sharding, state, train
from neo_jax.metrics import flops_per_token

_WARM_UP = 2  # turns that are not timed


def our_steps(ids: np.ndarray) -> dict[str, Callable[[], object]]:
    """A forward pass with loss, and a whole update."""
    tree = config_lib.default_config()
    tree.model = config_lib.preset("neo_125m")
    tree.data.batch_size, tree.data.seq_len = ids.shape[0], ids.shape[1] - 1
    config = config_lib.build(tree)
    mesh = sharding.make_mesh(config.mesh)
    tx = optimizer.build(config.optimizer, config.train.num_steps)
    graph, _ = state.model_graph(config.model)
    current = state.create(config.model, mesh, tx, 0)
    batch = {
        "inputs": jax.numpy.asarray(ids[:, :-1]),
        "targets": jax.numpy.asarray(ids[:, 1:]),
        "weights": jax.numpy.ones(ids[:, 1:].shape, "float32"),
    }
    forward = jax.jit(lambda params: train.batch_loss(params, graph, config, batch).loss)
    update = jax.jit(
        functools.partial(train.train_step, graph=graph, config=config, tx=tx),
        donate_argnums=0,
    )

    def one_update() -> None:
        nonlocal current
        current, metrics = update(current, batch)
        jax.block_until_ready((current, metrics))

    return {
        "forward": lambda: jax.block_until_ready(forward(current.params)),
        "update": one_update,
    }


def torch_steps(ids: np.ndarray) -> dict[str, Callable[[], object]]:
    """The same with transformers' GPTNeoForCausalLM and torch's AdamW."""
    model = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            hidden_size=768,
            num_layers=12,
            attention_types=[[["global", "local"], 6]],
            num_heads=12,
            resid_dropout=0.0,
            embed_dropout=0.0,
            attention_dropout=0.0,
        )
    )
    adam = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    inputs, targets = torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:])

    def loss() -> torch.Tensor:
        logits = model(inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def forward() -> None:
        with torch.no_grad():
            loss()

    def one_update() -> None:
        adam.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    return {"forward": forward, "update": one_update}


def main() -> None:
    """Takes turns, prints medians, and writes them where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--seq", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    parser.add_argument("--json", help="file for the result")
    arguments = parser.parse_args()

    host_memory.keep_freed_memory()  # as neo_jax.main does; it serves torch as well
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50257, (arguments.batch, arguments.seq + 1))
    sides = {"neo_jax": our_steps(ids), "torch": torch_steps(ids)}
    seconds: dict[str, list[float]] = {}
    # The first turn compiles, and until the second one memory is still being fetched.
    for turn in range(arguments.repeats + _WARM_UP):
        for kind in ("forward", "update"):
            for side in sides:
                start = time.perf_counter()
                sides[side][kind]()
                if turn >= _WARM_UP:
                    taken = time.perf_counter() - start
                    seconds.setdefault(f"{side} {kind}", []).append(taken)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    model = config_lib.preset_model("neo_125m")
    flops = flops_per_token(model, arguments.seq)[1] * arguments.batch * arguments.seq
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, float32,")
    print(f"{arguments.batch} × {arguments.seq} tokens, medians of {arguments.repeats}:")
    for kind in ("forward", "update"):
        ours, theirs = medians[f"neo_jax {kind}"], medians[f"torch {kind}"]
        print(
            f"  {kind:8s} neo_jax {ours:7.3f} s   torch {theirs:7.3f} s   {theirs / ours:.2f}×"
        )
    print(f"  neo_jax computes {flops / medians['neo_jax update'] / 1e9:.0f} GFLOP/s")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"medians": medians, "seconds": seconds}, file, indent=2)


if __name__ == "__main__":
    main()
