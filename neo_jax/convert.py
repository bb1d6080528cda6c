"""The command `python -m neo_jax.convert`: any checkpoint to any other kind.

Enters: a workdir of ours, a Hugging Face directory or hub id, or an original Mesh-TensorFlow
checkpoint. Leaves: a Hugging Face directory, a workdir to train on from, or the forward
pass as StableHLO for programs without this code. With `--verify` both are read anew, asked
the same, and compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax import export

from neo_jax import checkpoint, hf, pretrained, state
from neo_jax import config as config_lib
from neo_jax.config import ConfigError, ModelConfig
from neo_jax.state import Params

_EXAMPLES = """examples:
  python -m neo_jax.convert --source EleutherAI/gpt-neo-125m --output neo --format orbax
  python -m neo_jax.convert --source runs/mine --output mine_hf --format hf --verify
  python -m neo_jax.convert --source GPT3_XL --output xl_hf --format hf --dtype float32
  python -m neo_jax.convert --source runs/mine --output mine_hlo --format stablehlo
"""

FORMATS = ("hf", "orbax", "stablehlo")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        convert(
            arguments.source,
            pathlib.Path(arguments.output),
            arguments.format,
            dtype=arguments.dtype,
        )
        if arguments.verify:
            return verify(arguments.source, arguments.output, arguments.dtype)
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
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output {output} is not empty; give another directory.")
    if format == "stablehlo" and importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError(
            "--format stablehlo needs flatbuffers; install it with pip install flatbuffers."
        )
    model = pretrained.read(source, dtype=dtype)
    if model.head is not None and format != "hf":
        raise ConfigError(
            f"{source} is a {model.head.architecture}; only --format hf keeps its head."
        )
    output.mkdir(parents=True, exist_ok=True)
    words = pretrained.find_tokenizer(source)
    if format == "hf":
        eos_id = None if words is None else words.eos_id
        hf.write(model.params, model.config, output, head=model.head, eos_id=eos_id)
    elif format == "orbax":
        length = min(model.config.max_seq_len, config_lib.DataConfig.seq_len)
        config = config_lib.Config(
            model=model.config, data=config_lib.DataConfig(seq_len=length)
        )
        checkpoint.save_params(output, model.params, config)
        (output / "config.json").write_text(config_lib.to_json(config))
    else:
        write_stablehlo(model.params, model.config, output)
    folder = pathlib.Path(source)
    if format == "hf" and folder.is_dir() and not pretrained.is_workdir(folder):
        hf.copy_tokenizer(folder, output)
    elif words is not None:
        hf.write_tokenizer(words, output, model.config.max_seq_len)
    print(f"wrote {output}: {state.num_params(model.config):,} parameters as {format}")


# ------------------------------------------------------------------------------- verifying


def verify(source: str, output: str, dtype: str | None) -> int:
    """Compares two models' answers; exit status 1 where they should be equal and are not."""
    before, after = answers(source), answers(output)
    difference = float(np.abs(after - before).max())
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x, axis=-1)) for x in (before, after))
    divergence = float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
    tokens = before.shape[0] * before.shape[1]
    print(
        f"verified on {tokens} tokens: largest difference of logits {difference:.3g} "
        f"(scale {before.std():.3g}), mean KL {divergence:.3g} nats"
    )
    if (dtype is None and difference != 0) or not np.isfinite(difference):
        print("convert: the two models do not answer alike.", file=sys.stderr)
        return 1
    return 0


def answers(source: str) -> np.ndarray:
    """A model's logits on fixed prompts that reach past a local layer's window.

    One model at a time is in memory.
    """
    config, params, head = pretrained.read(source)
    length = min(config.max_seq_len, config.window_size + 64)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, length)))
    graph, _ = state.model_graph(config)

    @jax.jit
    def run(params: Params) -> jax.Array:
        if head is None:
            return nnx.merge(graph, params).logits(ids)
        return hf.head_logits(params["head"], nnx.merge(graph, params["model"]).hidden(ids))

    return np.asarray(run(params))


# ------------------------------------------------------------------------------- StableHLO

PLATFORMS = ("cpu", "cuda", "tpu")


def export_forward(config: ModelConfig, platforms: tuple[str, ...] = PLATFORMS) -> bytes:
    """The forward pass as serialised StableHLO, for any batch size.

    Returns:
      What `jax.export.deserialize` takes; its `.call(params, ids)` has our tree of
      parameters, int32 ids [batch, max_seq_len] and float32 logits.
    """
    graph, _ = state.model_graph(config)

    def forward(params: Params, ids: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).logits(ids)

    (batch,) = export.symbolic_shape("batch")
    ids = jax.ShapeDtypeStruct((batch, config.max_seq_len), jnp.int32)
    exported = export.export(jax.jit(forward), platforms=platforms)
    return bytes(exported(hf.abstract_params(config), ids).serialize())


def write_stablehlo(params: Params, config: ModelConfig, output: pathlib.Path) -> None:
    """Writes `forward.stablehlo` and the parameters that it takes, by dotted names."""
    (output / "forward.stablehlo").write_bytes(export_forward(config))
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    safetensors.numpy.save_file(flat, output / "params.safetensors")
    (output / "config.json").write_text(json.dumps(hf.config_to_hf(config), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
