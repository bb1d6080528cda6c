"""A second GPT-Neo, in NumPy and float64, that shares no code with the first.

Enters: a Hugging Face state dict and token ids of one sequence. Leaves: logits [seq, vocab].
Written from the description of the network, for plainness: one query at a time, with the
keys that it may see picked out by a slice, so that no mask can be off by one in both.
"""

import math
from collections.abc import Mapping

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / 2**0.5)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def logits(
    state: Mapping[str, np.ndarray],
    ids: np.ndarray,
    *,
    layer_types: tuple[str, ...],
    num_heads: int,
    window: int,
    activation: str,
    eps: float,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Logits [seq, vocab] in float64 of one sequence of ids [seq].

    Each weight is fetched from `state` where it is used and no earlier, so that a `state`
    which reads files may describe a model larger than memory.
    """
    w = _Weights(state)
    positions = np.arange(len(ids)) if positions is None else positions
    x = w["wte.weight"][ids] + w["wpe.weight"][positions]
    for i, kind in enumerate(layer_types):
        layer = _Weights(state, f"h.{i}.")
        x = x + _attention(layer, _norm(layer, "ln_1", x, eps), kind, num_heads, window)
        h = _norm(layer, "ln_2", x, eps) @ layer["mlp.c_fc.weight"].T + layer["mlp.c_fc.bias"]
        x = x + ACTIVATIONS[activation](h) @ layer["mlp.c_proj.weight"].T
        x = x + layer["mlp.c_proj.bias"]
    x = _norm(w, "ln_f", x, eps)
    return x @ w["lm_head.weight" if "lm_head.weight" in state else "wte.weight"].T


class _Weights:
    """A part of a state dict, in float64, by the rest of the names."""

    def __init__(self, state: Mapping[str, np.ndarray], prefix: str = ""):
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        for full in (f"transformer.{self.prefix}{name}", f"{self.prefix}{name}"):
            if full in self.state:
                return np.asarray(self.state[full], np.float64)
        raise KeyError(name)


def cross_entropy(
    logits: np.ndarray, targets: np.ndarray, weights: np.ndarray, z_loss: float
) -> tuple[float, float]:
    """Weighted sums over all positions of the loss with its z-loss, and of -log p alone."""
    top = logits.max(axis=-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
    nll = log_z - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return float(((nll + z_loss * log_z**2) * weights).sum()), float((nll * weights).sum())


def _norm(w: _Weights, name: str, x: np.ndarray, eps: float) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attention(
    w: _Weights, x: np.ndarray, kind: str, num_heads: int, window: int
) -> np.ndarray:
    seq, embed = x.shape
    prefix = "attn.attention."
    q, k, v = (
        (x @ w[f"{prefix}{name}_proj.weight"].T).reshape(seq, num_heads, -1) for name in "qkv"
    )
    context = np.empty_like(q)
    for p in range(seq):
        first = max(0, p - window + 1) if kind == "local" else 0
        for n in range(num_heads):
            scores = k[first : p + 1, n] @ q[p, n]
            probs = np.exp(scores - scores.max())
            context[p, n] = probs @ v[first : p + 1, n] / probs.sum()
    out = context.reshape(seq, embed) @ w[f"{prefix}out_proj.weight"].T
    return out + w[f"{prefix}out_proj.bias"]
