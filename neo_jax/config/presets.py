"""The released shapes, and meshes, by name."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

# Sources: EleutherAI/gpt-neo, branch sampling_etc, configs/GPT3_XL_pretrained.json and
# GPT3_2-7B_pretrained.json; configs/gpt3_small_256.json and gpt3_medium_256.json at 23485e3.
PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "tiny": {
            "num_layers": 4,
            "embed_dim": 128,
            "num_heads": 4,
            "window_size": 64,
            "vocab_size": 4096,
            "max_seq_len": 256,
        },
        "neo_125m": {"num_layers": 12, "embed_dim": 768, "num_heads": 12},
        "neo_350m": {"num_layers": 24, "embed_dim": 1024, "num_heads": 16},
        "neo_1p3b": {"num_layers": 24, "embed_dim": 2048, "num_heads": 16},
        "neo_2p7b": {"num_layers": 32, "embed_dim": 2560, "num_heads": 20},
    }
)


# Meshes by name: `--config.mesh=fsdp_tensor`, with `--config.mesh.tensor=2` after it.
MESH_PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        # Small models: every device holds all parameters.
        "data": {"data": -1, "fsdp": 1},
        # The default. Every device holds a part of every parameter.
        "fsdp": {"fsdp": -1},
        # Fewer sequences than devices: four devices share one. 4 divides every released
        # model's heads; 8 does not divide 2.7B's 20.
        "fsdp_tensor": {"fsdp": -1, "tensor": 4},
        # Long sequences: four devices share one, each a part of it.
        "fsdp_context": {"fsdp": -1, "context": 4},
        # Several slices: `fsdp` inside each, copies over the network between them.
        "hybrid": {"slices": -1, "fsdp": -1},
    }
)
