"""The command `python -m neo_jax.convert`: any checkpoint to any other kind.

Enters: a workdir of ours, a Hugging Face directory or hub id, or an original Mesh-TensorFlow
checkpoint. Leaves: a Hugging Face directory, a workdir to train on from, or the forward
pass as StableHLO for programs without this code. With `--verify` both are read anew, asked
the same, and compared.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from neo_jax import checkpoint, hf, mtf, pretrained, sharding, stablehlo, state, xla_flags
from neo_jax import config as config_lib
from neo_jax.config import ConfigError, ModelConfig
from neo_jax.state import Params

_EXAMPLES = """examples:
  python -m neo_jax.convert --source EleutherAI/gpt-neo-125m --output neo --format orbax
  python -m neo_jax.convert --source runs/mine --output mine_hf --format hf --verify
  python -m neo_jax.convert --source GPT3_XL --output xl_hf --format hf --dtype float32
  python -m neo_jax.convert --source runs/mine --output mine_hlo --format stablehlo
  python -m neo_jax.convert --source runs/lora --output adapter --format peft
"""

FORMATS = ("hf", "orbax", "stablehlo", "peft")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.push_to_hub and arguments.format != "hf":
            raise ConfigError(f"--push_to_hub needs --format hf, not {arguments.format}.")
        convert(
            arguments.source,
            pathlib.Path(arguments.output),
            arguments.format,
            dtype=arguments.dtype,
        )
        if arguments.verify and verify(arguments.source, arguments.output, arguments.dtype):
            return 1
        if arguments.push_to_hub:
            address = hf.push_to_hub(pathlib.Path(arguments.output), arguments.push_to_hub)
            print(f"uploaded to {address}")
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m neo_jax.convert",
        description="Convert a checkpoint of one kind to another.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", required=True, help="a workdir, a directory, a checkpoint or a hub id"
    )
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--format", choices=FORMATS, default="hf", help="(%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="type of the parameters written; left out, as they are stored",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read both again and compare their logits"
    )
    parser.add_argument("--push_to_hub", metavar="ID", help="upload the directory written")
    return parser


def convert(
    source: str | os.PathLike[str],
    output: pathlib.Path,
    format: str,
    *,
    dtype: str | None = None,
) -> None:
    """Reads `source`, whatever it is, and writes `output` as `format`.

    Raises:
      ConfigError: the source cannot be read, or the output holds something already.
      ValueError: weights that do not fit their config.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; give a directory.")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output {output} is not empty; give another directory.")
    if format == "stablehlo":
        stablehlo.require_exporter()
    folder = pretrained.locate(source)
    if format == "peft":
        learned, shape, base = pretrained.read_learned_adapters(folder)
        hf.write_adapter(learned, shape, base, output)
        print(f"wrote {output}: adapters of rank {shape.lora_rank} for {base}")
        return
    model = pretrained.read(folder, dtype=dtype)
    if model.head is not None and format != "hf":
        raise ConfigError(
            f"{source} is a {model.head.architecture}; only --format hf keeps its head."
        )
    output.mkdir(parents=True, exist_ok=True)
    words = pretrained.find_tokenizer(folder)
    is_hf = not pretrained.is_workdir(folder) and not mtf.is_checkpoint(folder)
    if format == "hf":
        eos_id = None if words is None else words.eos_id
        if is_hf:
            eos_id = hf.eos_id(folder, eos_id)
        hf.write(model.params, model.config, output, head=model.head, eos_id=eos_id)
    elif format == "orbax":
        length = min(model.config.max_seq_len, config_lib.DataConfig.seq_len)
        config = config_lib.Config(
            model=model.config, data=config_lib.DataConfig(seq_len=length)
        )
        checkpoint.save_params(output, model.params, config)
        (output / "config.json").write_text(config_lib.to_json(config))
    else:
        stablehlo.write(model.params, model.config, output)
    if format == "hf" and is_hf:
        hf.copy_tokenizer(folder, output)
    elif words is not None:
        hf.write_tokenizer(words, output, model.config.max_seq_len)
    print(f"wrote {output}: {state.num_params(model.config):,} parameters as {format}")


# ------------------------------------------------------------------------------- verifying


# Of the largest logit: what another order of sums may change, where bits cannot be asked for.
_TOLERANCE = 1e-4


def verify(source: str, output: str, dtype: str | None) -> int:
    """Compares two models' answers; exit status 1 where they should be equal and are not."""
    before, after = answers(source), answers(output)
    difference = float(np.abs(after - before).max())
    # In float64: two near distributions differ by less than float32 rounds.
    log_p, log_q = (
        x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        for x in (before.astype(np.float64), after.astype(np.float64))
    )
    divergence = float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
    tokens = before.shape[0] * before.shape[1]
    print(
        f"verified on {tokens} tokens: largest difference of logits {difference:.3g} "
        f"(scale {before.std():.3g}), mean KL {divergence:.3g} nats"
    )
    exported = stablehlo.is_written(pathlib.Path(output))
    allowed = _TOLERANCE * float(np.abs(before).max()) if exported else 0.0
    if (dtype is None and difference > allowed) or not np.isfinite(difference):
        print("convert: the two models do not answer alike.", file=sys.stderr)
        return 1
    return 0


def answers(source: str) -> np.ndarray:
    """A model's logits on fixed prompts that reach past a local layer's window.

    One model at a time is in memory.
    """
    if stablehlo.is_written(folder := pathlib.Path(source)):
        config = hf.config_from_hf(hf.read_json(folder / "config.json"))
        return stablehlo.logits(folder, _prompts(config))
    config, params, head = pretrained.read(source)
    ids = jnp.asarray(_prompts(config))
    graph, _ = state.model_graph(config)

    def run(params: Params) -> jax.Array:
        if head is None:
            return nnx.merge(graph, params).logits(ids)
        return hf.head_logits(params["head"], nnx.merge(graph, params["model"]).hidden(ids))

    options = xla_flags.forward_options(config, sharding.target())
    return np.asarray(jax.jit(run, compiler_options=options)(params))


def _prompts(config: ModelConfig) -> np.ndarray:
    length = min(config.max_seq_len, config.window_size + 64)
    return np.random.default_rng(0).integers(0, config.vocab_size, (2, length))


if __name__ == "__main__":
    sys.exit(main())
