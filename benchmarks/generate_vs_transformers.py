"""Our decoding beside transformers' `generate`: same weights, same machine, in turns.

GPT-Neo 125M with random weights in float32 writes greedily after random prompts. Both take
turns in one process, so that whatever else the machine does meets both; the time of a token is
the difference between a long and a short text, divided by their difference in tokens, so that
reading the prompt does not count. The bandwidth is that of summing 256 MiB, in the same run.
With `--filled` nobody reads prompts, which takes minutes where they are many and long: both
caches are filled with random numbers, and transformers' model is called step by step, which
leaves out what its `generate` does besides.

    pip install 'neo-jax[oracle]'
    python benchmarks/generate_vs_transformers.py --batch 1 --prompt 64
    python benchmarks/generate_vs_transformers.py --batch 32 --prompt 1500 --tokens 8 --filled
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from neo_jax import config as config_lib
from neo_jax import hf, host_memory, state
from neo_jax.generate import Generator, cache, from_keywords

Write = Callable[[int], list[list[int]]]  # new tokens → the texts


class Filled(Generator):
    """A generator whose caches are full of random numbers instead of prompts."""

    def _read_prompts(self, params, ids, count, options):  # type: ignore[no-untyped-def]
        if not hasattr(self, "kept"):
            caches = cache.empty(
                self.config, batch_size=len(ids), capacity=ids.shape[1], chunk=1, dtype="auto"
            )
            noise = np.random.default_rng(0).normal(size=2**16).astype(np.float32)
            self.kept = jax.tree.map(lambda x: jnp.asarray(np.resize(noise, x.shape)), caches)
        return jax.block_until_ready(jax.tree.map(jnp.copy, self.kept))


def sides(prompts: list[list[int]], int8: bool, filled: bool) -> dict[str, Write]:
    """What writes so many tokens after each prompt."""
    config = config_lib.preset_model("neo_125m")
    torch.manual_seed(0)
    theirs = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(**hf.config_to_hf(config))
    ).eval()
    weights = {name: t.detach().numpy() for name, t in theirs.state_dict().items()}
    graph, _ = state.model_graph(config)
    params = jax.tree.map(jnp.asarray, hf.from_hf(weights, config))
    theirs.generation_config.eos_token_id = None  # no text ends early
    ids = torch.tensor(prompts)

    def ours(weight_dtype: str) -> Write:
        kind = Filled if filled else Generator
        generator = kind(config, graph, params, None, weight_dtype=weight_dtype)

        def write(count: int) -> list[list[int]]:
            options = from_keywords(
                {"max_new_tokens": count, "eos_token_id": (), "batch_size": len(prompts)}
            )
            return [text.token_ids for text in generator.write(prompts, options)]

        return write

    def transformers_write(count: int) -> list[list[int]]:
        with torch.no_grad():
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=50256,
            )
        return out[:, ids.shape[1] :].tolist()

    heads = [torch.randn(len(prompts), 12, ids.shape[1] - 1, 64) for _ in range(2)]

    def transformers_steps(count: int) -> list[list[int]]:
        past, token, texts = transformers.DynamicCache(), ids[:, -1:], []
        for layer in range(config.num_layers):
            past.update(*heads, layer)
        with torch.no_grad():
            for _ in range(count):
                out = theirs(token, past_key_values=past, use_cache=True)
                token = out.logits[:, -1:].argmax(dim=-1)
                texts.append(token[:, 0].tolist())
        return np.transpose(texts).tolist()

    both = {
        "neo_jax": ours("auto"),
        "transformers": transformers_steps if filled else transformers_write,
    }
    return {**both, "neo_jax int8": ours("int8")} if int8 else both


def bandwidth() -> float:
    """Bytes a second that a sum over 256 MiB reads."""
    array = jnp.ones(64 * 2**20, jnp.float32)
    total = jax.jit(jnp.sum)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return array.nbytes / min(times)


def main() -> None:
    """Takes turns, prints medians, and writes them where --json says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1, help="texts")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens that are timed")
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    parser.add_argument("--int8", action="store_true", help="also with weights in int8")
    parser.add_argument("--filled", action="store_true", help="caches of random numbers")
    parser.add_argument("--json", help="file for the result")
    arguments = parser.parse_args()

    host_memory.keep_freed_memory()
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 50257, (arguments.batch, arguments.prompt)).tolist()
    writers = sides(prompts, arguments.int8, arguments.filled)
    short, long = 2, 2 + arguments.tokens
    texts = {name: write(long) for name, write in writers.items()}  # compiles and warms up
    for write in writers.values():
        write(short)
    same = sum(a == b for a, b in zip(texts["neo_jax"], texts["transformers"], strict=True))
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    rates = []
    for _ in range(arguments.repeats):
        rates.append(bandwidth())
        for name, write in writers.items():
            taken = []
            for count in (short, long):
                start = time.perf_counter()
                write(count)
                taken.append(time.perf_counter() - start)
            seconds[name].append((taken[1] - taken[0]) / arguments.tokens)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{platform.machine()}, {os.cpu_count()} cores, 125M float32, {arguments.batch} × ")
    print(f"{arguments.prompt}-token prompts, medians of {arguments.repeats}:")
    for name, median in medians.items():
        ratio = medians["transformers"] / median
        print(f"  {name:13s} {median * 1e3:7.2f} ms a step   {ratio:.2f}×")
    weights = 4 * state.num_params(config_lib.preset_model("neo_125m"))
    rate = max(rates)
    floor = weights / rate
    print(f"  bandwidth {rate / 1e9:.1f} GB/s: the weights alone take {floor * 1e3:.1f} ms,")
    print(f"  {floor / medians['neo_jax']:.0%} of our step")
    if not arguments.filled:
        print(f"  {same} of {len(prompts)} texts are equal, of {long} tokens each")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"medians": medians, "seconds": seconds, "bandwidth": rates}, file)


if __name__ == "__main__":
    main()
