"""From prompts and options to requests, and from requests to the rules of a batch.

Enters: prompts as token ids, `Options`, and what the model allows. Leaves: a `Request` for
each prompt, refused in one line where it does not fit; and `Rules` with values for each row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from neo_jax.config import ConfigError, ModelConfig
from neo_jax.generate.options import Options
from neo_jax.generate.sampling import Rules, Texts
from neo_jax.tokenizer import Tokenizer

_GPT2_END = 50256


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, its place among the results, and what is its own."""

    index: int
    prompt: list[int]
    max_new_tokens: int
    seed: int
    stretch: int  # positions are pressed together so many times

    @property
    def total(self) -> int:
        """Tokens of the whole text at most."""
        return len(self.prompt) + self.max_new_tokens


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()


def eos_id(config: ModelConfig, words: Tokenizer | None) -> int | None:
    """The end-of-text token: the tokenizer's, or GPT-2's where there are as many ids."""
    if words is not None:
        return words.eos_id
    return _GPT2_END if config.vocab_size > _GPT2_END else None


def stop_ids(
    options: Options, config: ModelConfig, words: Tokenizer | None
) -> tuple[int, ...]:
    """Tokens that end a text."""
    if options.eos_token_id is not None:
        return tuple(options.eos_token_id)  # type: ignore[arg-type]
    end = eos_id(config, words)
    return () if end is None else (end,)


def requests(
    prompts: Sequence[Sequence[int]],
    options: Options,
    config: ModelConfig,
    words: Tokenizer | None,
) -> list[Request]:
    """One request a prompt.

    Raises:
      ConfigError: a prompt that is too long, empty where there is nothing to start from, or
        holds an unknown id; another number of seeds than of prompts.
    """
    seeds = options.seed
    if isinstance(seeds, int):
        seeds = [seeds] * len(prompts)
    if len(seeds) != len(prompts):
        raise ConfigError(f"{len(seeds)} seeds for {len(prompts)} prompts.")
    return [
        _request(i, list(prompt), seed, options, config, eos_id(config, words))
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def _request(
    index: int,
    prompt: list[int],
    seed: int,
    options: Options,
    config: ModelConfig,
    end: int | None,
) -> Request:
    vocab, most = config.vocab_size, config.max_seq_len
    if not prompt:
        if end is None:
            raise ConfigError(
                f"prompt {index} is empty, and there is no tokenizer to name the end-of-text "
                f"token that it would start from; give a token id."
            )
        prompt = [end]
    if not all(0 <= token < vocab for token in prompt):
        raise ConfigError(
            f"prompt {index} holds token ids from {min(prompt)} to {max(prompt)}; the "
            f"vocabulary has 0 … {vocab - 1}."
        )
    count, stretch = options.max_new_tokens, 1
    total = len(prompt) + count
    if total > most and options.overflow == "refuse":
        raise ConfigError(
            f"prompt {index} has {len(prompt)} tokens and with max_new_tokens={count} the "
            f"text would have {total}, more than the model's {most} positions; shorten it, or "
            f"set overflow='truncate_left' (its oldest tokens are dropped) or 'interpolate' "
            f"(positions are pressed together, which costs quality)."
        )
    if total > most and options.overflow == "truncate_left":
        if count >= most:
            raise ConfigError(
                f"max_new_tokens={count} leaves no place for a prompt among the model's "
                f"{most} positions; lower it."
            )
        prompt = prompt[-(most - count) :]
    while options.overflow == "interpolate" and total > most * stretch:
        stretch *= 2
    return Request(index, prompt, count, seed, stretch)


def texts(ids: np.ndarray, length: np.ndarray, options: Options, vocab: int) -> Texts:
    """Texts that hold their prompts only, with the counts that the rules ask for."""
    seen = np.zeros((len(ids), vocab), bool) if options.repetition_penalty != 1 else None
    if seen is not None:
        for row, count in enumerate(length):
            seen[row, ids[row, :count]] = True
    is_counted = options.frequency_penalty or options.presence_penalty
    count = np.zeros((len(ids), vocab), np.int32) if is_counted else None
    return Texts(ids, length, length, seen, count)


def rules(
    group: list[Request],
    options: Options,
    config: ModelConfig,
    words: Tokenizer | None,
    rows: int,
) -> Rules:
    """The rules of a batch of `rows`; a request has `options.rows_per_prompt` of them."""
    each = options.rows_per_prompt
    seed = np.zeros(rows, np.uint32)
    seed[: len(group) * each] = np.repeat([request.seed for request in group], each)

    def rule(value: float, off: float, kind: type, is_on: bool = True) -> np.ndarray | None:
        return np.full(rows, value, kind) if is_on and value != off else None

    stops = stop_ids(options, config, words)
    width = power_of_two(len(stops))
    number, chance = np.float32, options.is_sampled
    return Rules(
        stop_ids=np.tile([*stops, *[-1] * (width - len(stops))], (rows, 1)).astype(np.int32),
        seed=seed,
        stream=(np.arange(rows) % each).astype(np.uint32),
        temperature=rule(options.chance, 0, number),
        top_k=rule(options.top_k, 0, np.int32, chance),
        top_p=rule(options.top_p, 1, number, chance),
        min_p=rule(options.min_p, 0, number, chance),
        typical_p=rule(options.typical_p, 1, number, chance),
        repetition_penalty=rule(options.repetition_penalty, 1, number),
        frequency_penalty=rule(options.frequency_penalty, 0, number),
        presence_penalty=rule(options.presence_penalty, 0, number),
        min_new_tokens=rule(options.min_new_tokens, 0, np.int32),
        **_biases(options, stops, config, words, rows),
        num_candidates=power_of_two(options.top_k) if chance and options.top_k else None,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
    )


def _biases(
    options: Options,
    stops: tuple[int, ...],
    config: ModelConfig,
    words: Tokenizer | None,
    rows: int,
) -> dict[str, np.ndarray | None]:
    forbidden = [tuple(word) for word in options.bad_words_ids]
    for word in options.bad_words:
        encode = require_words(words, "bad_words").encode
        forbidden += [tuple(encode(word)), tuple(encode(f" {word}"))]
    # As in transformers, forbidding the end of text by a word has no effect.
    forbidden = [word for word in forbidden if word not in [(stop,) for stop in stops]]
    entries = [(word, -math.inf) for word in forbidden]
    entries += [((token,), value) for token, value in options.logit_bias.items()]
    entries += list(options.sequence_bias.items())
    if not entries:
        return {"bias_prefix": None, "bias_last": None, "bias": None}
    highest = max(max(sequence) for sequence, _ in entries)
    if highest >= config.vocab_size:
        raise ConfigError(
            f"token id {highest} of a bias or forbidden word is not in the vocabulary, "
            f"0 … {config.vocab_size - 1}."
        )
    count = power_of_two(len(entries))
    longest = power_of_two(max(len(sequence) for sequence, _ in entries))
    prefix = np.full((count, longest), -1, np.int32)
    last, bias = np.zeros(count, np.int32), np.zeros(count, np.float32)
    for i, (sequence, value) in enumerate(entries):
        prefix[i, longest - len(sequence) + 1 :] = sequence[:-1]
        last[i], bias[i] = sequence[-1], value
    arrays = {"bias_prefix": prefix, "bias_last": last, "bias": bias}
    return {name: np.tile(a, (rows, *[1] * a.ndim)) for name, a in arrays.items()}


def require_words(words: Tokenizer | None, option: str) -> Tokenizer:
    """The tokenizer, or an error that names the option that needs it."""
    if words is None:
        raise ConfigError(f"{option} needs a tokenizer, and the model came without one.")
    return words
