"""What a checkpoint's quality costs in bfloat16 and int8: bits per byte of text, by decoding.

    python benchmarks/generate_int8_quality.py --checkpoint RUN [--text FILE …]

Every token is read alone, after those before it, through the caches, as writing reads them:
the figures are those of the weights and of the caches that a text would be written with. A
text is cut into windows of the model's context, each scored from its second token; bits are
per byte of what was scored. Without a file it is the text that the run itself held out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from neo_jax import config as config_lib
from neo_jax import pretrained, state
from neo_jax.data import corpus
from neo_jax.data.records import Document
from neo_jax.generate import Generator, cache

# compute_dtype, weight_dtype, cache_dtype
WAYS = {
    "float32": ("float32", "auto", "auto"),
    "bfloat16": ("bfloat16", "auto", "auto"),
    "int8 weights": ("float32", "int8", "auto"),
    "int8 keys and values": ("float32", "auto", "int8"),
    "int8 weights, keys and values": ("float32", "int8", "int8"),
    "bfloat16, int8 weights, keys and values": ("bfloat16", "int8", "int8"),
}


def held_out(workdir: pathlib.Path) -> dict[str, str]:
    """The documents of each of a run's sources that it did not learn from."""
    config = config_lib.from_json((workdir / "config.json").read_text()).data
    return {
        name: "\n".join(
            record.text
            for _, record in corpus.split_records(name, config, "eval")
            if isinstance(record, Document)
        )
        for name in corpus.source_names(config, "eval")
    }


def nats(
    model: pretrained.LanguageModel, windows: np.ndarray, way: str, *, rows: int
) -> np.ndarray:
    """-log p of each token but the first of each window, [window, seq - 1]."""
    compute_dtype, weight_dtype, cache_dtype = WAYS[way]
    config = dataclasses.replace(model.config, compute_dtype=compute_dtype)
    graph, _ = state.model_graph(config)
    ready = Generator(config, graph, model.params, None, weight_dtype=weight_dtype)

    @jax.jit
    def score(params, ids):  # type: ignore[no-untyped-def]
        decoder = nnx.merge(ready.graph, params)
        caches = cache.empty(
            config, batch_size=rows, capacity=ids.shape[1], chunk=1, dtype=cache_dtype
        )

        def one(caches, at):  # type: ignore[no-untyped-def]
            place = jnp.full((rows, 1), at)
            hidden, caches = decoder.hidden(
                ids[:, at][:, None], place, place[:, 0] + 1, caches
            )
            log_probs = jax.nn.log_softmax(decoder.logits(hidden)[:, 0], axis=-1)
            following = ids[:, at + 1][:, None]
            return caches, jnp.take_along_axis(log_probs, following, axis=1)[:, 0]

        return jax.lax.scan(one, caches, jnp.arange(ids.shape[1] - 1))[1].T

    parts = []
    for start in tqdm.trange(0, len(windows), rows, desc=way, leave=False):
        part = windows[start : start + rows]
        filled = np.concatenate([part, part[:1].repeat(rows - len(part), 0)])
        parts.append(-np.asarray(score(ready.params, filled))[: len(part)])
    return np.concatenate(parts)


def main() -> None:
    """Prints a table, and writes it where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a workdir, directory or hub id")
    parser.add_argument("--text", nargs="+", type=pathlib.Path, default=[])
    parser.add_argument("--windows", type=int, default=256, help="at most, of each file")
    parser.add_argument("--rows", type=int, default=32, help="windows side by side")
    parser.add_argument("--json", help="file for the result")
    arguments = parser.parse_args()
    model = pretrained.load(arguments.checkpoint)
    assert model.tokenizer is not None, "text needs a tokenizer"
    length = model.config.max_seq_len
    result = {}
    texts = {path.name: path.read_text(encoding="utf-8") for path in arguments.text}
    for name, text in (texts or held_out(pathlib.Path(arguments.checkpoint))).items():
        ids = model.tokenizer.encode(text)
        count = min(len(ids) // length, arguments.windows)
        windows = np.asarray(ids[: count * length], np.int32).reshape(count, length)
        scored_bytes = sum(
            len(model.tokenizer.decode(row[1:].tolist()).encode()) for row in windows
        )
        print(f"{name}: {count} windows of {length}, {scored_bytes:,} bytes scored")
        print(f"  {'':40s} perplexity  bits per byte   against float32")
        first = None
        for way in WAYS:
            lost = nats(model, windows, way, rows=arguments.rows).astype(np.float64)
            bits = lost.sum() / math.log(2) / scored_bytes
            first = bits if first is None else first
            result[f"{name}: {way}"] = {
                "perplexity": math.exp(lost.mean()),
                "bits_per_byte": bits,
            }
            row = f"  {way:40s} {math.exp(lost.mean()):10.4f}  {bits:13.5f}"
            print(f"{row}   {bits / first - 1:+.4%}", flush=True)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
