"""What a tuning run keeps in memory before the first activation, by model and method.

    python benchmarks/finetune_memory.py

Enters: the released shapes. Leaves: a Markdown table of GiB: parameters, Adam's moments and
gradients, counted from the very state that a run would make, as shapes only. Activations come
on top, and depend on batch, length and `model.remat`: `neo-jax plan` compiles them.
"""

from __future__ import annotations

import jax

from neo_jax import config as config_lib
from neo_jax import optimizer, sharding, state, trainable
from neo_jax.config import MeshConfig

_NAMES = ("neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b")
_LORA = {"finetune": {"trainable": "lora"}}
_TARGETS = ("query", "key", "value", "out", "up", "down")
_METHODS: dict[str, dict[str, dict[str, object]]] = {
    "all": {},
    "last 2 layers": {"finetune": {"trainable": "last_layers"}},
    "LoRA 16, float32": {**_LORA, "model": {"lora_rank": 16}},
    "LoRA 16, bfloat16": {**_LORA, "model": {"lora_rank": 16, "param_dtype": "bfloat16"}},
    "LoRA 16, int8": {
        **_LORA,
        "model": {"lora_rank": 16, "param_dtype": "bfloat16", "kernel_dtype": "int8"},
    },
}


def gib(name: str, method: str) -> tuple[float, int]:
    """GiB of parameters, moments and gradients, and the number of learned parameters."""
    tree = config_lib.default_config()
    tree.task = "finetune"
    tree.model.update(config_lib.preset(name))
    tree.model.lora_targets = _TARGETS
    for section, changes in _METHODS[method].items():
        tree[section].update(changes)
    config = config_lib.build(tree)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    tx = optimizer.build(config.optimizer, 1)
    learned = state.abstract(config.model, mesh, tx, config.finetune)
    whole = state.abstract_params(config.model, mesh)
    _, frozen = trainable.divide(whole, config.finetune)
    # Gradients have the types of the parameters that they move.
    total = sum(map(state.num_bytes, (learned, learned.params, frozen)))
    return total / 2**30, sum(leaf.size for leaf in jax.tree.leaves(learned.params))


def main() -> None:
    """Prints the table."""
    print("| | " + " | ".join(_METHODS) + " |")
    print("|---" * (len(_METHODS) + 1) + "|")
    for name in _NAMES:
        cells = []
        for method in _METHODS:
            size, learned = gib(name, method)
            cells.append(f"{size:.2f} ({learned / 1e6:,.1f} M)")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
