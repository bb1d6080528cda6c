"""WikiText's perplexity beside transformers' model, rolling and with overlapping windows.

Command: python benchmarks/evaluate_wikitext_vs_torch.py --checkpoint HF_DIR --data DIR \
    [--strides 2048,1024] [--limit N] [--json OUT]
The torch side shares nothing with ours but the weights, the tokenizer and the pages: windows
are lm_eval.utils.get_rolling_token_windows, log-probabilities torch's log_softmax.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import time

import jax
import torch
import transformers
from lm_eval.utils import get_rolling_token_windows

from neo_jax import pretrained, sharding
from neo_jax.config import MeshConfig
from neo_jax.evaluate import documents, tasks
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.documents import Text
from neo_jax.evaluate.scoring import Scorer


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--strides", default="2048,1024")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    items, _ = tasks.load(tasks.find("wikitext"), arguments.data)
    texts = [Text(i.pairs[0][1], i.answers[0]) for i in items[: arguments.limit]]
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = pretrained.load(arguments.checkpoint, mesh=mesh)
    assert model.tokenizer is not None
    score = functools.partial(Scorer(model.config, mesh).score, model.params)
    asker = Asker(score, model.tokenizer, model.config.max_seq_len)
    theirs = transformers.GPTNeoForCausalLM.from_pretrained(arguments.checkpoint).eval()
    ids = model.tokenizer.encode_batch([text.scored for text in texts])
    longest = model.config.max_seq_len
    words = sum(documents.count_words(text.counted) for text in texts)
    print(
        f"{len(ids)} pages, {sum(map(len, ids))} tokens, {words} words, "
        f"{sum(len(each) > longest for each in ids)} pages longer than {longest}",
        flush=True,
    )
    found = {}
    for stride in map(int, arguments.strides.split(",")):
        started = time.monotonic()
        figures = documents.perplexities(texts, asker, stride)[documents.ALL]
        middle = time.monotonic()
        nats = sum(torch_nats(theirs, each, model.tokenizer.eos_id, stride) for each in ids)
        found[stride] = {
            "ours": [figures[m].value for m in ("token_perplexity", "word_perplexity")],
            "torch": [math.exp(-nats / n) for n in (sum(map(len, ids)), words)],
            "seconds": [round(middle - started, 1), round(time.monotonic() - middle, 1)],
        }
        print(f"stride {stride}: {json.dumps(found[stride])}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")


@torch.no_grad()
def torch_nats(
    model: transformers.GPTNeoForCausalLM, ids: list[int], prefix: int, stride: int
) -> float:
    """Log-likelihood of a page; logits of scored tokens alone."""
    longest = model.config.max_position_embeddings
    total = 0.0
    for inputs, targets in get_rolling_token_windows(
        ids, prefix, longest, longest - stride + 1
    ):
        hidden = model.transformer(torch.tensor([inputs])).last_hidden_state[0]
        for start in range(0, len(targets), 256):
            rows = hidden[len(inputs) - len(targets) + start :][:256]
            right = torch.tensor(targets[start : start + 256])
            log_probs = torch.log_softmax(model.lm_head(rows[: len(right)]), dim=-1)
            total += float(log_probs.gather(1, right[:, None]).double().sum())
    return total


if __name__ == "__main__":
    main()
