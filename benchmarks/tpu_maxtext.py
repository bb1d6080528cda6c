"""Is the predictor sane? MaxText's dense 8B on v6e-8, as a GPT-Neo with the same arithmetic.

    python benchmarks/tpu_maxtext.py            # about a minute of two cores, or two
    python benchmarks/tpu_maxtext.py --sequences 3 --remat custom

MaxText publishes 7,139 tokens/s/chip, 45 % of peak, for Llama 3.1 8B with sequences of 8192 on
eight chips of v6e. At 918 TFLOP/s that is 57.9 GFLOP a token: six for each weight that is
multiplied, and attention without regard to causality, which is our `mfu_palm`. A GPT-Neo, all
global, has the same layers, width, heads, vocabulary and length, and the same arithmetic: its
keys and values are not shared, its MLP has two kernels and not three, so that
`mlp_dim` = (2.5 × 4096² + 3 × 4096 × 14336 − 4 × 4096²) / (2 × 4096) = 18432.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from neo_jax import config as config_lib
from neo_jax import metrics
from neo_jax.planning import compiling, show, topologies

PUBLISHED_TOKENS, PUBLISHED_MFU, PUBLISHED_FLOPS = 7139, 0.45, 57.9e9
SHAPE = (
    *("model.num_layers=32", "model.embed_dim=4096", "model.num_heads=32"),
    *("model.mlp_dim=18432", "model.vocab_size=128256", "model.max_seq_len=8192"),
    *("model.attention_types=['global']", "data.seq_len=8192"),
)


def main() -> None:
    """Compiles, and prints both figures side by side."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=2, help="a chip (%(default)s)")
    parser.add_argument("--remat", default="full", choices=("full", "custom"))
    arguments = parser.parse_args()
    topology = topologies.parse("v6e-8")
    remat = [f"model.remat={arguments.remat}", f"data.batch_size={8 * arguments.sequences}"]
    if arguments.remat == "custom":
        remat.append("model.remat_save=['context']")
    config = config_lib.load_experiment("neo_2p7b", [*SHAPE, *remat])
    flops = metrics.flops_per_token(config.model, 8192).palm
    print(f"{flops / 1e9:.1f} GFLOP a token, MaxText's {PUBLISHED_FLOPS / 1e9:.1f}")
    report = compiling.compile_step(config, topology)
    print(show.report_text(report, config))
    if report.predicted_mfu_palm is not None:
        print(
            f"predicted {report.predicted_mfu_palm:.1%} and "
            f"{report.predicted_tokens_per_second_per_chip:,.0f} tokens/s/chip, published "
            f"{PUBLISHED_MFU:.0%} and {PUBLISHED_TOKENS:,}: "
            f"{report.predicted_mfu_palm / PUBLISHED_MFU:.2f} times"
        )


if __name__ == "__main__":
    main()
