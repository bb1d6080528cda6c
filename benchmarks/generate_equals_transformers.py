"""Whole texts of a real checkpoint, ours beside transformers' `generate`: greedy, and beams.

    pip install 'neo-jax[oracle]'
    python benchmarks/generate_equals_transformers.py --checkpoint HF_DIRECTORY --text FILE

Prompts of 1 to 300 tokens are pieces of the file, or random ids without one. Where two greedy
texts part, the logits at that place are computed anew in float64 by transformers, and the gap
between the two tokens is printed beside the largest difference between the float32 logits of
the two programs: a smaller gap is a tie that rounding decides. Of beams that part it prints
what each found is worth. With `--float64` both programs compute in float64, where rounding
parts nothing: transformers' beam search, which adds up in float32 whatever the model's type,
runs with that one type replaced in its source. `--random` draws the weights anew, of the
checkpoint's shape, three times as large as at birth.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import pathlib
import re
import tempfile
import textwrap
from typing import Any

import jax
import numpy as np
import torch
import transformers

from neo_jax import pretrained, state

LENGTHS = (1, 5, 17, 40, 100, 180, 255, 300)


def load(source: str, dtype: str) -> pretrained.LanguageModel:
    """Our model, with parameters and activations of a type."""
    jax.config.update("jax_enable_x64", dtype == "float64")
    read = pretrained.read(source, dtype=dtype)
    config = dataclasses.replace(read.config, compute_dtype=dtype)
    graph, _ = state.model_graph(config)
    words = pretrained.find_tokenizer(pathlib.Path(source))
    return pretrained.LanguageModel(config, read.params, words, graph, None)


def prompts(model: pretrained.LanguageModel, text: str | None, room: int) -> list[list[int]]:
    """A prompt of each length that leaves room for the new tokens."""
    rng = np.random.default_rng(0)
    lengths = [n for n in LENGTHS if n + room <= model.config.max_seq_len]
    if text is None:
        return [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]
    ids = model.token_ids(text[:200_000], None)[0]
    starts = rng.integers(0, len(ids) - max(lengths), len(lengths))
    return [ids[at : at + n] for at, n in zip(starts, lengths, strict=True)]


def their_texts(
    theirs: transformers.GPTNeoForCausalLM, asked: list[list[int]], **options: int
) -> list[list[int]]:
    """New tokens of each prompt, all side by side, padded on the left."""
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked])
    with torch.no_grad():
        out = theirs.generate(
            ids, attention_mask=mask, pad_token_id=0, do_sample=False, **options
        )
    return out[:, longest:].tolist()


def exact_logits(theirs: transformers.GPTNeoForCausalLM, ids: list[int]) -> np.ndarray:
    """By transformers in float64, [place, vocab]."""
    with torch.no_grad():
        logits = theirs.double()(torch.tensor([ids])).logits[0].numpy()
    theirs.float()
    return logits


def tokens_part(
    model: pretrained.LanguageModel,
    theirs: transformers.GPTNeoForCausalLM,
    prompt: list[int],
    ours: list[int],
    other: list[int],
) -> str:
    """What the logits say where two greedy texts part."""
    at = next(i for i, (a, b) in enumerate(zip(ours, other, strict=True)) if a != b)
    ids = prompt + ours[:at]
    exact = exact_logits(theirs, ids)[-1]
    with torch.no_grad():
        single = theirs(torch.tensor([ids])).logits[0, -1].numpy()
    noise = np.abs(np.asarray(model.logits([ids]))[0, -1] - single).max()
    gap = abs(exact[ours[at]] - exact[other[at]])
    return (
        f"part at new token {at}: {ours[at]} or {other[at]}, {gap:.1e} apart in float64; the "
        f"programs' logits differ by up to {noise:.1e} there"
    )


def beams_part(
    theirs: transformers.GPTNeoForCausalLM,
    prompt: list[int],
    ours: list[int],
    other: list[int],
) -> str:
    """Log-probabilities, in float64, of two texts that beam search found."""
    totals = []
    for new in (ours, other):
        logits = exact_logits(theirs, prompt + new)[len(prompt) - 1 : -1]
        log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        totals.append(log_probs[np.arange(len(new)), new].sum())
    return f"log p of ours {totals[0]:.6f}, of theirs {totals[1]:.6f}"


def add_up_in_float64() -> None:
    """Makes transformers' beam search keep its scores in float64."""
    kind, utils = transformers.GenerationMixin, transformers.generation.utils
    source = textwrap.dedent(inspect.getsource(kind._beam_search))
    source, count = re.subn(r"torch\.float(32)?\b", "torch.float64", source)
    assert count == 3, f"{count} places, not 3: transformers is another version"
    found: dict[str, Any] = {}
    exec(compile(source, utils.__file__, "exec"), vars(utils), found)
    kind._beam_search = found["_beam_search"]


def main() -> None:
    """Prints a line for each prompt and way of writing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a Hugging Face directory")
    parser.add_argument("--text", type=pathlib.Path, help="file that prompts are taken from")
    parser.add_argument("--tokens", type=int, default=200, help="new tokens of each text")
    parser.add_argument("--beams", type=int, default=4, help="beams of the second round")
    parser.add_argument("--float64", action="store_true", help="both in float64")
    parser.add_argument("--random", action="store_true", help="weights drawn anew")
    arguments = parser.parse_args()
    theirs = transformers.GPTNeoForCausalLM.from_pretrained(
        arguments.checkpoint, attn_implementation="eager"
    ).eval()
    source = arguments.checkpoint
    scratch = tempfile.TemporaryDirectory()
    if arguments.random:
        torch.manual_seed(0)
        for name, weight in theirs.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.06)
            elif "bias" in name:
                torch.nn.init.normal_(weight, std=0.02)
        theirs.save_pretrained(scratch.name)
        source = scratch.name
    model = load(source, "float64" if arguments.float64 else "float32")
    if arguments.float64:
        theirs = theirs.double()
        add_up_in_float64()
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else None
    asked = prompts(model, text, arguments.tokens)
    for name, options in {
        "greedy": {},
        f"{arguments.beams} beams": {"num_beams": arguments.beams},
    }.items():
        options |= {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens}
        ours = [one.token_ids for one in model.generate(asked, **options)]
        other = their_texts(theirs, asked, **options)
        same = 0
        for prompt, a, b in zip(asked, ours, other, strict=True):
            same += a == b
            if a != b:
                why = (
                    beams_part(theirs, prompt, a, b)
                    if "num_beams" in options
                    else tokens_part(model, theirs, prompt, a, b)
                )
                print(f"  prompt of {len(prompt)}: {why}")
        distinct = len({token for one in ours for token in one})
        print(
            f"{name}: {same} of {len(asked)} texts of {arguments.tokens} tokens are equal "
            f"({distinct} different tokens)"
        )


if __name__ == "__main__":
    main()
