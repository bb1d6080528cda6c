"""Seconds for LAMBADA's requests at the 125M shape: ours beside lm-evaluation-harness's own.

Command: python benchmarks/evaluate_speed.py --data DIR --scratch DIR [--requests 100] \
    [--who ours,1,8,32] [--json OUT]
`--scratch` gets random weights of the shape of GPT-Neo 125M with GPT-2's tokenizer, once.
Every who is timed from requests in words to answers, in this one process, one after another,
each after one warm-up request: `ours` with the compilation of its programs, whose cache on
the disk is off; a number is the batch size of the harness's HFLM with transformers' model.
Requests are spread evenly over the test set. A second round repeats the first in reverse
order.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import time
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from neo_jax import host_memory, tokenizer
from neo_jax.evaluate import tasks
from neo_jax.evaluate.harness import NeoJaxLM


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--scratch", required=True, type=pathlib.Path)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--who", default="ours,1,8,32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    host_memory.keep_freed_memory()
    checkpoint = arguments.scratch / "random_125m"
    make(checkpoint)
    items, _ = tasks.load(tasks.find("lambada_openai"), arguments.data)
    step = len(items) // arguments.requests
    pairs = [item.pairs[0] for item in items[::step][: arguments.requests]]
    found: dict[str, Any] = {"requests": len(pairs), "seconds": {}}
    answers = {}
    order = arguments.who.split(",")
    for turn in range(arguments.rounds):
        for who in order if turn % 2 == 0 else order[::-1]:
            model = build(who, checkpoint)
            ask(model, [("A", " b")])
            started = time.monotonic()
            answers[who] = ask(model, pairs)
            seconds = time.monotonic() - started
            found["seconds"].setdefault(who, []).append(round(seconds, 2))
            print(f"{who}: {seconds:.1f} s, {len(pairs) / seconds:.2f} requests/s", flush=True)
            del model
    ours = answers.get("ours", [])
    for who, theirs in answers.items():
        gap = max((abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=False)), default=0)
        found.setdefault("largest_difference_nats", {})[who] = gap
    print(json.dumps(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def make(folder: pathlib.Path) -> None:
    """Random weights of the 125M shape, unless they are there."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        attention_types=[[["global", "local"], 6]],
    )
    transformers.GPTNeoForCausalLM(config).save_pretrained(folder)
    tokenizer.load("gpt2").save(folder)


def build(who: str, checkpoint: pathlib.Path) -> Any:
    """A model of the harness's: ours, or transformers' with that batch size."""
    if who == "ours":
        return NeoJaxLM(str(checkpoint))
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    model = transformers.GPTNeoForCausalLM.from_pretrained(checkpoint)
    return HFLM(pretrained=model, tokenizer=words, batch_size=int(who), max_length=2048)


def ask(model: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Log-likelihoods through the harness's door."""
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return model.loglikelihood(requests, disable_tqdm=True)


if __name__ == "__main__":
    main()
