"""How fast a run is, and how fast its chips could be.

Enters: the model's shape, a device's name, the times of steps. Leaves: FLOPs per token and
MFU, both counted in two ways, tokens per second, and the run's seconds by use.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

from neo_jax.config import FinetuneConfig, ModelConfig
from neo_jax.state import EVERYTHING


class FlopsPerToken(NamedTuple):
    """Forward and backward, per token of a full sequence."""

    palm: float  # every query counted with every key, as others publish it
    exact: float  # only the keys that causality and the window let a query see


def flops_per_token(
    model: ModelConfig, seq_len: int, finetune: FinetuneConfig = EVERYTHING
) -> FlopsPerToken:
    """Arithmetic that the model itself needs; recomputation does not count.

    Both are 6 per weight of a matrix product (the unpadded output head among them; biases,
    LayerNorm and the tables that are only looked up do no products), plus 12 × embed per key
    and layer for the scores and the mixing of values; a third of each is the forward pass.
    Frozen weights have no gradients, which spares 2 of the 6, and nothing goes backward below
    the lowest layer that learns.
    Source of the first: Chowdhery et al., PaLM (arXiv 2204.02311), appendix B.

    Args:
      model: the shape.
      seq_len: tokens.
      finetune: which weights are learned.
    """
    L, D, S = model.num_layers, model.embed_dim, seq_len
    widths = {"up": D + model.mlp_dim, "down": D + model.mlp_dim}
    layer, head = 4 * D * D + 2 * D * model.mlp_dim, model.vocab_size * D
    is_all, is_part = (finetune.trainable == kind for kind in ("all", "last_layers"))
    passed = min(finetune.last_layers, L) if is_part else L  # layers with a backward pass
    learned = 0 if finetune.trainable == "lora" else passed
    products = (2 * L + 2 * passed + 2 * learned) * layer + (6 if is_all else 4) * head
    products += 6 * L * model.lora_rank * sum(widths.get(t, 2 * D) for t in model.lora_targets)

    def mean_keys(kind: str) -> float:
        window = min(model.window_size, S) if kind == "local" else S
        return (window * (window + 1) / 2 + (S - window) * window) / S

    seen = [mean_keys(kind) for kind in model.layer_types]
    return FlopsPerToken(
        palm=products + 4 * D * S * (L + 2 * passed),
        exact=products + 4 * D * (sum(seen) + 2 * sum(seen[L - passed :])),
    )


# Name of a JAX device, peak TFLOP/s of dense bfloat16 products a chip, JAX devices a chip.
# TPU: docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}, "Peak compute per chip"; that
#   of v2 names none: Jouppi et al., CACM 63(7), 2020, doi 10.1145/3360307, table 1.
# NVIDIA, nvidia.com/en-us/data-center/{h100,h200,a100,l4,tesla-t4}: where the page counts
#   structured sparsity, half its figure. T4 has float16 products only.
_PEAK_TFLOPS = (
    (r"TPU v2", 46, 2),
    (r"TPU v3", 123, 2),
    (r"TPU v4", 275, 1),
    (r"TPU v5 ?(lite|e)", 197, 1),
    (r"TPU v5p?", 459, 1),
    (r"TPU v6 ?(lite|e)", 918, 1),
    (r"TPU ?v?7x", 2307, 2),
    (r"NVIDIA (H100 80GB HBM3|H200)", 989.4, 1),
    (r"NVIDIA H[12]00 NVL", 835.5, 1),
    (r"NVIDIA H100 PCIe", 756.5, 1),
    (r"NVIDIA A100[- ](SXM4|PCIE|80GB)[-\w ]*", 312, 1),
    (r"NVIDIA L4", 121, 1),
    (r"Tesla T4", 65, 1),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOP/s of one JAX device in bfloat16; None where unknown, as for a CPU.

    Args:
      device_kind: `jax.devices()[0].device_kind`. A device is half a chip on TPU v2, v3 and
        7x, whose two cores JAX shows apart.
    """
    for pattern, tflops, devices in _PEAK_TFLOPS:
        if re.fullmatch(pattern, device_kind):
            return tflops * 1e12 / devices
    return None


class Throughput:
    """Times the steps between two log lines, without what is not training.

    Args:
      flops_per_token: see the function of that name.
      peak_flops: of one device, see `peak_flops`; None leaves MFU out.
      num_devices: that train together.
      clock: seconds.
    """

    def __init__(
        self,
        *,
        flops_per_token: FlopsPerToken,
        peak_flops: float | None,
        num_devices: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops, self._clock = flops_per_token, clock
        self._peak = peak_flops * num_devices if peak_flops else None
        self._paused = {"compile": 0.0, "eval": 0.0, "save": 0.0, "restart": 0.0}
        self._data = 0.0
        self._earlier: dict[str, float] = {}
        self._lost = 0.0
        self._started = clock()
        self._open_window()

    def resume(self, earlier: Mapping[str, float], lost_seconds: float) -> None:
        """Adds what earlier starts of the run took.

        Args:
          earlier: `totals` at the checkpoint that the run goes on from.
          lost_seconds: that passed after it, and will have to be spent again.
        """
        self._earlier, self._lost = dict(earlier), lost_seconds

    def _open_window(self) -> None:
        self._steps = self._tokens = 0
        self._window_started, self._window_paused = self._clock(), sum(self._paused.values())

    def step(self, tokens: int) -> None:
        """Counts a finished step; `tokens` of all hosts together."""
        self._steps += 1
        self._tokens += tokens

    @contextlib.contextmanager
    def pause(self, kind: Literal["compile", "eval", "save", "restart"]) -> Iterator[None]:
        """The time inside is not training's; one at a time.

        Steps run asynchronously: wait for the last one before entering.
        """
        began = self._clock()
        try:
            yield
        finally:
            self._paused[kind] += self._clock() - began

    def waited_for_data(self, seconds: float) -> None:
        """Counts time in which the device had nothing to do for want of a batch."""
        self._data += seconds

    def elapsed(self) -> float:
        """Seconds of the run so far, all its starts together; while nothing ran none pass."""
        earlier = (v for key, v in self._earlier.items() if key.endswith("_seconds"))
        return self._clock() - self._started + self._lost + sum(earlier)

    def rates(self) -> dict[str, float]:
        """Since the last call: tokens_per_second, step_seconds, and MFU if the peak is known.

        Empty if no step was counted.
        """
        now, paused = self._clock(), sum(self._paused.values())
        seconds = now - self._window_started - (paused - self._window_paused)
        steps, tokens = self._steps, self._tokens
        self._open_window()
        if not steps or seconds <= 0:
            return {}
        rates = {"tokens_per_second": tokens / seconds, "step_seconds": seconds / steps}
        if self._peak:
            rates["mfu_palm"] = tokens / seconds * self._flops.palm / self._peak
            rates["mfu_exact"] = tokens / seconds * self._flops.exact / self._peak
        return rates

    def totals(self) -> dict[str, float]:
        """Seconds of the run by use, all its starts together.

        `restart` is restoring, and what was done after a checkpoint and had to be done again;
        the time in which nothing ran is not counted. `goodput` is training's share.
        """
        own = {**self._paused, "data": self._data}
        train = self._clock() - self._started - sum(own.values())
        own["restart"] += self._lost
        seconds = {
            f"{kind}_seconds": value + self._earlier.get(f"{kind}_seconds", 0.0)
            for kind, value in {"train": train, **own}.items()
        }
        total = sum(seconds.values())
        goodput = seconds["train_seconds"] / total if total > 0 else 0.0
        return {**seconds, "goodput": goodput}
