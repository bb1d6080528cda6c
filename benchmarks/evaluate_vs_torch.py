"""Our answers beside transformers', both asked by lm-evaluation-harness on the same weights.

Command: python benchmarks/evaluate_vs_torch.py --checkpoint HF_DIR --data DIR \
    [--tasks piqa,wikitext] [--limit N] [--batch_size 16] [--json OUT]
Prints for each task: requests, the largest difference of their log-likelihoods, how many
greedy flags differ, every aggregate of both, and the seconds that each took. Transformers'
backend adds the tokens of a long page up in float32, unless told `--float64`. Data: the files
that `neo_jax.evaluate --data` reads; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import lm_eval
import numpy as np
import transformers
from lm_eval.models.huggingface import HFLM

from neo_jax import host_memory, tokenizer
from neo_jax.evaluate import harness
from neo_jax.evaluate.harness import NeoJaxLM

TASKS = "lambada_openai,piqa,winogrande,mathqa,pubmedqa,wikitext"


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch_size", type=int, default=16, help="of transformers' model")
    parser.add_argument("--float64", action="store_true", help="transformers' sums of tokens")
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    host_memory.keep_freed_memory()
    words = tokenizer.load(arguments.checkpoint)
    theirs = HFLM(
        pretrained=transformers.GPTNeoForCausalLM.from_pretrained(arguments.checkpoint),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_file=f"{arguments.checkpoint}/tokenizer.json",
            eos_token=words.eos_token,
            bos_token=words.eos_token,
            pad_token=words.eos_token,
        ),
        batch_size=arguments.batch_size,
        max_length=2048,
        softmax_dtype="float64" if arguments.float64 else None,
    )
    ours = NeoJaxLM(arguments.checkpoint)
    found = {}
    for name in arguments.tasks.split(","):
        answers, seconds = [], []
        for model in (ours, theirs):
            started = time.monotonic()
            answers.append(run(model, name, arguments.data, arguments.limit))
            seconds.append(round(time.monotonic() - started, 1))
        found[name] = {**compare(name, *answers), "seconds": seconds}
        print(name, json.dumps(found[name]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def run(model: Any, name: str, folder: pathlib.Path, limit: int | None) -> Any:
    """The harness's results of one task, with every answer."""
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=harness.manager_for([name], folder),
        limit=limit,
        bootstrap_iters=0,
    )


def compare(name: str, ours: Any, theirs: Any) -> dict[str, Any]:
    """How far two runs' answers are apart."""
    (a, b) = (
        [answer for sample in each["samples"][name] for answer in flat(sample["resps"])]
        for each in (ours, theirs)
    )
    nats = np.abs(np.asarray([x[0] for x in a]) - np.asarray([x[0] for x in b]))
    metrics = {
        key: [ours["results"][name][key], value]
        for key, value in theirs["results"][name].items()
        if isinstance(value, float)
    }
    return {
        "requests": len(a),
        "largest_difference_nats": float(nats.max()),
        "greedy_flags_that_differ": sum(x[1:] != y[1:] for x, y in zip(a, b, strict=True)),
        "greedy": sum(all(y[1:]) for y in b),
        "metrics": metrics,
    }


def flat(responses: Any) -> list[tuple[Any, ...]]:
    """Answers to the requests of one sample, as tuples; rolling ones have no flag."""
    answers = [one for each in responses for one in each]
    return [answer if isinstance(answer, tuple) else (answer,) for answer in answers]


if __name__ == "__main__":
    main()
