"""What a caller may ask of a text that is to be written, under transformers' names.

Enters: keyword options. Leaves: checked `Options`; whatever is wrong with them is told in one
line, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from neo_jax.config import ConfigError

_BEAM_ONLY = {"length_penalty": 1.0, "early_stopping": False}


@dataclasses.dataclass(frozen=True)
class Options:
    """How texts are written. Names and meanings are transformers' where it has them."""

    max_new_tokens: int = 64
    min_new_tokens: int = 0  # no text ends before
    # Chance. `do_sample` left out: as `temperature` says. Temperature left out: 1 where
    # do_sample, top_k, top_p, min_p or typical_p asks for chance, else 0, the best token.
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int = 0  # only so many best tokens may be drawn; 0: all
    top_p: float = 1.0  # only the best tokens that together are this likely
    min_p: float = 0.0  # only tokens at least this likely, relative to the best
    typical_p: float = 1.0  # only the most typical tokens that together are this likely
    repetition_penalty: float = 1.0  # > 1 makes tokens of the text so far less likely
    frequency_penalty: float = 0.0  # off a new token's score for each time that it was written
    presence_penalty: float = 0.0  # off a new token's score once it was written
    no_repeat_ngram_size: int = 0  # no n tokens occur twice in a text; 0: they may
    bad_words_ids: Sequence[Sequence[int]] = ()  # sequences of tokens never to be written
    bad_words: Sequence[str] = ()  # the same as text, at a word's start and within
    sequence_bias: Mapping[tuple[int, ...], float] = dataclasses.field(default_factory=dict)
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    # Tokens that end a text, and are its last; left out: the tokenizer's end of text.
    eos_token_id: int | Sequence[int] | None = None
    stop_strings: str | Sequence[str] = ()  # end a text, and are cut off it
    num_return_sequences: int = 1  # texts of each prompt
    best_of: int | None = None  # write so many of each prompt, return the likeliest
    num_beams: int = 1  # beam search, where above 1
    length_penalty: float = 1.0  # beams: score / length ** this
    early_stopping: bool | Literal["never"] = False  # beams: end with as many texts as beams
    logprobs: int | None = None  # report log-probabilities, and those of so many alternatives
    echo: bool = False  # the prompt stands before the text
    seed: int | Sequence[int] = 0  # of each prompt; the same seed gives the same text
    # A text longer than the position table is refused, loses its oldest tokens before
    # writing starts, or has its positions pressed together to fit.
    overflow: Literal["refuse", "truncate_left", "interpolate"] = "refuse"
    # Speculation: greedy text is the same, in fewer passes of the network.
    prompt_lookup_num_tokens: int = 0  # guess so many tokens from the text itself
    num_assistant_tokens: int = 0  # guess so many with `assistant_model`
    cache_dtype: Literal["auto", "float32", "bfloat16", "float64", "int8"] = "auto"
    weight_dtype: Literal["auto", "int8"] = "auto"
    batch_size: int = 32  # texts that are written side by side, at most

    def __post_init__(self) -> None:
        _require_wanted(dataclasses.asdict(self))
        object.__setattr__(self, "stop_strings", _as_tuple(self.stop_strings, str))
        if self.eos_token_id is not None:
            object.__setattr__(self, "eos_token_id", _as_tuple(self.eos_token_id, int))
        if "" in self.stop_strings:
            raise ConfigError("stop_strings holds an empty string, which ends any text.")
        if self.min_new_tokens > self.max_new_tokens:
            raise ConfigError(
                f"min_new_tokens={self.min_new_tokens} exceeds "
                f"max_new_tokens={self.max_new_tokens}."
            )
        if self.do_sample and self.temperature == 0:
            raise ConfigError("do_sample=True needs a temperature above 0; 0 is greedy.")
        self._check_ways()

    def _check_ways(self) -> None:
        """Refuses ways of writing that exclude each other."""
        count = self.num_return_sequences
        if self.num_beams > 1:
            if self.is_sampled:
                raise ConfigError("num_beams > 1 takes no chance; set do_sample=False.")
            if count > self.num_beams:
                raise ConfigError(
                    f"num_return_sequences={count} exceeds num_beams={self.num_beams}."
                )
            for key in ("best_of", "logprobs", "stop_strings"):
                if getattr(self, key):
                    raise ConfigError(f"{key} does not go with num_beams={self.num_beams}.")
        else:
            for key, default in _BEAM_ONLY.items():
                if getattr(self, key) != default:
                    raise ConfigError(f"{key} needs num_beams above 1.")
            if count > 1 and not self.is_sampled:
                raise ConfigError(
                    f"num_return_sequences={count} would be one text {count} times; sample, "
                    f"or set num_beams."
                )
        if self.best_of is not None and self.best_of < count:
            raise ConfigError(f"best_of={self.best_of} is below num_return_sequences={count}.")
        if self.guesses and (
            self.is_sampled or self.num_beams > 1 or self.logprobs is not None
        ):
            raise ConfigError(
                "prompt_lookup_num_tokens and num_assistant_tokens write greedily; leave out "
                "chance, beams and logprobs."
            )
        if self.prompt_lookup_num_tokens and self.num_assistant_tokens:
            raise ConfigError(
                "prompt_lookup_num_tokens and num_assistant_tokens both guess; set one."
            )

    @property
    def guesses(self) -> int:
        """Tokens guessed before each pass of the network; 0 without speculation."""
        return self.prompt_lookup_num_tokens or self.num_assistant_tokens

    @property
    def chance(self) -> float:
        """The temperature in effect; 0 takes the best token."""
        if self.do_sample is False:
            return 0.0
        if self.temperature is not None:
            return self.temperature
        filtered = self.top_k or self.top_p < 1 or self.min_p or self.typical_p < 1
        return 1.0 if self.do_sample or filtered else 0.0

    @property
    def is_sampled(self) -> bool:
        """Whether chance decides."""
        return self.chance > 0

    @property
    def rows_per_prompt(self) -> int:
        """Texts that are written of each prompt."""
        if self.num_beams > 1:
            return self.num_beams
        return self.best_of or self.num_return_sequences


def from_keywords(options: Mapping[str, Any]) -> Options:
    """Checked options.

    Raises:
      ConfigError: an unknown name, a value of the wrong type or out of range, or two options
        that exclude each other; one line.
    """
    names = [field.name for field in dataclasses.fields(Options)]
    for key in options:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}."
            raise ConfigError(f"generate has no option {key!r}; {hint}")
    _require_wanted(options)
    return Options(**options)


def _require_wanted(options: Mapping[str, Any]) -> None:
    for key, value in options.items():
        holds, wanted = _WANTED[key]
        if value is not None and not holds(value):
            raise ConfigError(f"{key}={value!r} must be {wanted}.")


def _as_tuple(value: Any, kind: type) -> tuple[Any, ...]:
    return (value,) if isinstance(value, kind) else tuple(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _within(low: float, high: float, *, open_below: bool = False) -> Callable[[Any], bool]:
    return lambda x: _is_number(x) and (low < x if open_below else low <= x) and x <= high


def _at_least(low: int) -> Callable[[Any], bool]:
    return lambda x: _is_int(x) and x >= low


def _is_list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda x: (
        isinstance(x, Sequence) and not isinstance(x, str) and all(holds(y) for y in x)
    )


_is_id = _at_least(0)
_is_word = _is_list_of(_is_id)
_is_text = lambda x: isinstance(x, str)  # noqa: E731
_is_bool = lambda x: isinstance(x, bool)  # noqa: E731

# What each option must be, and the words for it.
_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_at_least(0), "a whole number, 0 or more"),
    "min_new_tokens": (_at_least(0), "a whole number, 0 or more"),
    "do_sample": (_is_bool, "True or False"),
    "temperature": (_within(0, math.inf), "a finite number, 0 (greedy) or more"),
    "top_k": (_at_least(0), "a whole number, 0 (all tokens) or more"),
    "top_p": (_within(0, 1, open_below=True), "above 0 and at most 1"),
    "min_p": (_within(0, 1), "from 0 to 1"),
    "typical_p": (_within(0, 1, open_below=True), "above 0 and at most 1"),
    "repetition_penalty": (_within(0, math.inf, open_below=True), "a number above 0"),
    "frequency_penalty": (_is_number, "a finite number"),
    "presence_penalty": (_is_number, "a finite number"),
    "no_repeat_ngram_size": (_at_least(0), "a whole number, 0 (off) or more"),
    "bad_words_ids": (
        _is_list_of(lambda word: _is_word(word) and len(word) > 0),
        "a list of lists of token ids, none empty",
    ),
    "bad_words": (_is_list_of(lambda w: _is_text(w) and w != ""), "a list of strings"),
    "sequence_bias": (
        lambda x: (
            isinstance(x, Mapping)
            and all(isinstance(k, tuple) and k and _is_word(k) for k in x)
            and all(_is_number(v) for v in x.values())
        ),
        "a mapping from tuples of token ids to numbers",
    ),
    "logit_bias": (
        lambda x: (
            isinstance(x, Mapping)
            and all(_is_id(k) for k in x)
            and all(_is_number(v) for v in x.values())
        ),
        "a mapping from token ids to numbers",
    ),
    "eos_token_id": (lambda x: _is_id(x) or _is_word(x), "a token id or a list of them"),
    "stop_strings": (lambda x: _is_text(x) or _is_list_of(_is_text)(x), "a string or a list"),
    "num_return_sequences": (_at_least(1), "a whole number, 1 or more"),
    "best_of": (_at_least(1), "a whole number, 1 or more"),
    "num_beams": (_at_least(1), "a whole number, 1 or more"),
    "length_penalty": (_is_number, "a finite number"),
    "early_stopping": (lambda x: _is_bool(x) or x == "never", "True, False or 'never'"),
    "logprobs": (_at_least(0), "a whole number of alternatives, 0 or more"),
    "echo": (_is_bool, "True or False"),
    "seed": (
        lambda x: _within(0, 2**32 - 1)(x) if _is_int(x) else _is_word(x),
        "a whole number from 0 to 2**32 - 1, or one for each prompt",
    ),
    "overflow": (
        lambda x: x in ("refuse", "truncate_left", "interpolate"),
        "'refuse', 'truncate_left' or 'interpolate'",
    ),
    "prompt_lookup_num_tokens": (_at_least(0), "a whole number, 0 (off) or more"),
    "num_assistant_tokens": (_at_least(0), "a whole number, 0 (off) or more"),
    "cache_dtype": (
        lambda x: x in ("auto", "float32", "bfloat16", "float64", "int8"),
        "'auto', 'float32', 'bfloat16', 'float64' or 'int8'",
    ),
    "weight_dtype": (lambda x: x in ("auto", "int8"), "'auto' or 'int8'"),
    "batch_size": (_at_least(1), "a whole number, 1 or more"),
}
