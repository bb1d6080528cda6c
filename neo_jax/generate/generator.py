"""Many requests through few compiled programs.

Enters: prompts as token ids, and checked options. Leaves: a `Written` for each text. Prompts
of like length are written side by side; the number of rows and the length of the caches are
rounded up to buckets (powers of two), so that requests of any size share programs.

On a mesh the rows lie over `data`, `fsdp` and `context` (there is no long sequence to split
here, so the devices of that axis take rows) and the heads over `tensor`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neo_jax import sharding
from neo_jax.config import ConfigError, MeshConfig, ModelConfig
from neo_jax.generate import beams, cache, decode, network, requests, speculate
from neo_jax.generate.decode import LogProbs, State
from neo_jax.generate.options import Options
from neo_jax.generate.requests import Request, eos_id, power_of_two, require_words
from neo_jax.generate.sampling import Rules
from neo_jax.generate.text import Draft
from neo_jax.state import Params
from neo_jax.tokenizer import Tokenizer

_CHUNKS = (16, 64, 256)  # tokens of a prompt that are read in one pass
_MOST_TOKENS_READ = 2048  # rows × chunk
_SMALLEST_CAPACITY = 64  # places of a text
_STEPS_BETWEEN_LOOKS = 16  # tokens written before stop strings are looked for
_ALL = 2**30  # more than any text has


@dataclasses.dataclass(frozen=True)
class Written:
    """A text that was written."""

    token_ids: list[int]  # new ones; a token that ended the text is among them
    text: str | None  # None without a tokenizer
    finish_reason: str  # "stop" (a token or string ended it) or "length"
    log_probs: list[float] | None = None  # of each new token by the model itself, nats
    top_log_probs: list[dict[int, float]] | None = None  # of its likeliest alternatives
    score: float | None = None  # of beam search: log-probability / length ** length_penalty


# Told of each new piece of a text: the text's index, and the piece.
Stream = Callable[[int, str], None]


class Generator:
    """A model that is ready to write."""

    def __init__(
        self,
        config: ModelConfig,
        graph: nnx.GraphDef[Any],
        params: Params,
        words: Tokenizer | None,
        *,
        weight_dtype: str = "auto",
        keep_params: bool = True,
    ):
        """Makes the parameters ready; see `network.prepare`.

        Args:
          config: the model's.
          graph: its structure, or another generator's.
          params: its parameters, or the other generator's; emptied unless `keep_params`.
          words: its tokenizer.
          weight_dtype: "auto" or "int8".
          keep_params: False where nobody else needs them, which saves their memory.
        """
        self.config, self.words = config, words
        self.eos_id = eos_id(config, words)
        self.mesh = _decoding_mesh(params)
        with jax.set_mesh(self.mesh):
            params = _move(params, self.mesh, keep=keep_params)
            self.graph, self.params = network.prepare(
                graph, params, config, weight_dtype, keep=keep_params
            )
        self._params_by_stretch = {1: self.params}
        self.rows_multiple = math.prod(
            self.mesh.shape[axis] for axis in sharding.TABLE["batch"] or ()
        )
        self._empty = jax.jit(
            cache.empty,
            static_argnums=0,
            static_argnames=("batch_size", "capacity", "chunk", "dtype"),
        )
        self._fit = jax.jit(cache.fit, static_argnums=2)
        self._repeat = jax.jit(_take_rows)
        self.num_programs = 0  # compiled so far
        self._prefill = self._program(decode.prefill)
        self._search = self._program(beams.search, static_argnums=(5, 6))
        self._advance_by: dict[tuple[int, int | None], Callable[..., Any]] = {}

    def _program(
        self, function: Callable[..., Any], static_argnums: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """A function of graph, parameters and a state that it consumes, compiled, counted."""

        def traced(*arguments: Any) -> Any:
            self.num_programs += 1
            return function(self.graph, *arguments)

        return jax.jit(traced, donate_argnums=1, static_argnums=static_argnums)

    def _advance(self, options: Options, assistant: Generator | None) -> Callable[..., Any]:
        """`decode.advance` with the kind of guesses that the options ask for."""
        key = (options.guesses, None if assistant is None else id(assistant))
        if key not in self._advance_by:
            guess: decode.Guess | None = None
            if assistant is not None:
                guess = functools.partial(
                    speculate.ask_assistant, graph=assistant.graph, count=options.guesses
                )
            elif options.guesses:
                guess = functools.partial(speculate.look_up, count=options.guesses)
            self._advance_by[key] = self._program(
                functools.partial(decode.advance, guess=guess)
            )
        return self._advance_by[key]

    def write(
        self,
        prompts: Sequence[list[int]],
        options: Options,
        stream: Stream | None = None,
        assistant: Generator | None = None,
    ) -> list[Written]:
        """Continues prompts.

        Args:
          prompts: token ids; an empty one starts from the end-of-text token.
          options: for all of them.
          stream: told of each piece of text as it comes.
          assistant: a smaller model of the same tokens on the same devices, which guesses
            `num_assistant_tokens` of them before each pass.

        Returns:
          `num_return_sequences` texts of the first prompt, then those of the second …

        Raises:
          ConfigError: a prompt that is too long, or empty where there is nothing to start
            from; an option that the model does not allow.
          NotFiniteError: the model's logits are not finite.
        """
        self._check(options, stream, assistant)
        asked = requests.requests(prompts, options, self.config, self.words)
        results: dict[int, list[Written]] = {}
        with jax.set_mesh(self.mesh):
            for group in self._groups(asked, options):
                if options.max_new_tokens == 0:
                    nothing = Written([], self._text([]), "length")
                    written = [[nothing] * options.num_return_sequences for _ in group]
                elif options.num_beams > 1:
                    written = self._search_group(group, options)
                else:
                    written = self._write_group(group, options, stream, assistant)
                results.update(zip((r.index for r in group), written, strict=True))
        return [text for index in range(len(prompts)) for text in results[index]]

    def _check(
        self, options: Options, stream: Stream | None, assistant: Generator | None
    ) -> None:
        """Refuses what the options alone do not tell."""
        if stream and (options.num_beams > 1 or options.best_of is not None):
            raise ConfigError(
                "a stream shows texts as they come; leave out beams and best_of."
            )
        if (assistant is None) != (options.num_assistant_tokens == 0):
            raise ConfigError("assistant_model and num_assistant_tokens need each other.")
        if assistant is not None:
            ours, theirs = self.config, assistant.config
            for key in ("vocab_size", "max_seq_len"):
                if getattr(ours, key) > getattr(theirs, key):
                    raise ConfigError(
                        f"assistant_model has {key}={getattr(theirs, key)}, less than the "
                        f"model's {getattr(ours, key)}."
                    )
            if options.overflow == "interpolate":
                raise ConfigError("overflow='interpolate' does not go with assistant_model.")

    def _groups(self, asked: list[Request], options: Options) -> Iterator[list[Request]]:
        """Requests of like length, as many as may be written side by side."""
        size = max(1, options.batch_size // options.rows_per_prompt)
        ordered = sorted(asked, key=lambda r: (r.stretch, len(r.prompt)))
        for _, alike in itertools.groupby(ordered, key=lambda r: r.stretch):
            rows = list(alike)
            yield from (rows[at : at + size] for at in range(0, len(rows), size))

    # -------------------------------------------------------------------------- writing

    def _write_group(
        self,
        group: list[Request],
        options: Options,
        stream: Stream | None,
        assistant: Generator | None,
    ) -> list[list[Written]]:
        params = self._stretched(group[0].stretch)
        advance = self._advance(options, assistant)
        state, rules = self._start(params, group, options, assistant)
        helper = None if assistant is None else assistant._stretched(1)
        drafts = self._drafts(len(group) * options.rows_per_prompt, options, stream)
        steps = 1 if stream else _STEPS_BETWEEN_LOOKS if options.stop_strings else _ALL
        halted = np.zeros(state.done.shape, bool)
        while True:
            state = advance(params, state, rules, np.int32(steps), halted, helper)
            ended = bool(state.done.all())
            if drafts:
                self._look(state, drafts, halted, group, options, stream)
            if ended or (drafts and halted[: len(drafts)].all()):
                break
        texts = state.texts
        self._refuse_not_finite(
            state.not_finite, texts.length - texts.prompt_length, group, options
        )
        return self._results(state, drafts, group, options)

    def _search_group(self, group: list[Request], options: Options) -> list[list[Written]]:
        params = self._stretched(group[0].stretch)
        state, rules = self._start(params, group, options, None)
        stops = requests.stop_ids(options, self.config, self.words)
        is_asked = np.arange(len(state.done) // options.num_beams) < len(group)
        found = self._search(
            params,
            beams.start(
                state.texts, state.caches, is_asked, options.num_beams, options.max_new_tokens
            ),
            rules,
            is_asked,
            np.float32(options.length_penalty),
            len(set(stops)),
            options.early_stopping,
        )
        steps = np.full(len(is_asked), found.step)
        self._refuse_not_finite(found.not_finite, steps, group, options)
        ids, scores, length = jax.device_get(
            (found.ended, found.ended_scores, found.ended_length)
        )

        def written(request: int, rank: int) -> Written:
            new = ids[request, rank, : length[request, rank]].tolist()
            reason = "stop" if new and new[-1] in stops else "length"
            return Written(new, self._text(new), reason, score=float(scores[request, rank]))

        count = options.num_return_sequences
        return [[written(r, rank) for rank in range(count)] for r in range(len(group))]

    def _start(
        self,
        params: Params,
        group: list[Request],
        options: Options,
        assistant: Generator | None,
    ) -> tuple[State, Rules]:
        """Prompts read but for their last tokens, nothing written; and the rules of each row.

        Rows that fill up a bucket have ended before they start.
        """
        prompt_rows, each = self._row_bucket(len(group)), options.rows_per_prompt
        ids = np.zeros((prompt_rows, self._capacity(group, options)), np.int32)
        length = np.ones(prompt_rows, np.int32)
        for row, request in enumerate(group):
            ids[row, : len(request.prompt)] = request.prompt
            length[row] = len(request.prompt)

        def read(model: Generator, params: Params) -> cache.Caches:
            caches = model._read_prompts(params, ids, length - 1, options)
            return caches if each == 1 else self._repeat(caches, source)

        rows = prompt_rows * each
        source = np.arange(rows) // each
        caches = read(self, params)
        drafts = None if assistant is None else read(assistant, assistant._stretched(1))
        ids, length = ids[source], length[source]
        state = State(
            texts=requests.texts(ids, length, options, self.config.vocab_size),
            caches=caches,
            assistant_caches=drafts,
            limit=length + np.int32(options.max_new_tokens),
            done=np.arange(rows) >= len(group) * each,
            not_finite=np.zeros(rows, bool),
            log_probs=_no_log_probs(ids.shape, options),
            passes=np.int32(0),
        )
        rules = requests.rules(group, options, self.config, self.words, rows)
        # All lie on the devices in one way, so that a later call meets the same program.
        everywhere = NamedSharding(self.mesh, PartitionSpec())

        def place(leaf: Any) -> jax.Array:
            return (
                jax.device_put(leaf, everywhere)
                if isinstance(leaf, np.ndarray | np.generic)
                else leaf
            )

        return jax.tree.map(place, (state, rules))

    def _read_prompts(
        self, params: Params, ids: np.ndarray, count: np.ndarray, options: Options
    ) -> cache.Caches:
        rows, longest = ids.shape[0], int(count.max())
        allowed = [c for c in _CHUNKS if rows * c <= _MOST_TOKENS_READ] or [_CHUNKS[0]]
        chunks: list[int] = []
        while sum(chunks) < longest:
            left = longest - sum(chunks)
            chunks.append(next((c for c in allowed if c >= left), allowed[-1]))
        step = options.guesses + 1
        caches = self._empty(
            self.config,
            batch_size=rows,
            capacity=ids.shape[1],
            chunk=max([step, *chunks]),
            dtype=options.cache_dtype,
        )
        if self.mesh.size == 1:
            caches = jax.device_put(caches, NamedSharding(self.mesh, PartitionSpec()))
        start = 0
        for chunk in chunks:
            part = np.zeros((rows, chunk), np.int32)
            held = ids[:, start : start + chunk]
            part[:, : held.shape[1]] = held
            caches = self._prefill(params, caches, part, np.int32(start), count)
            start += chunk
        return self._fit(caches, count, step)

    def _capacity(self, group: list[Request], options: Options) -> int:
        needed = max(request.total for request in group)
        most = self.config.max_seq_len * group[0].stretch
        return min(max(power_of_two(needed), _SMALLEST_CAPACITY), most)

    def _row_bucket(self, count: int) -> int:
        return self.rows_multiple * power_of_two(-(-count // self.rows_multiple))

    def _stretched(self, stretch: int) -> Params:
        if stretch not in self._params_by_stretch:
            self._params_by_stretch[stretch] = network.stretch_positions(
                self._params_by_stretch[1], stretch
            )
        return self._params_by_stretch[stretch]

    # -------------------------------------------------------------------------- results

    def _drafts(self, count: int, options: Options, stream: Stream | None) -> list[Draft]:
        if not (stream or options.stop_strings):
            return []
        words = require_words(
            self.words, "stop_strings" if options.stop_strings else "streaming"
        )
        return [
            Draft(words, options.stop_strings, options.min_new_tokens) for _ in range(count)
        ]

    def _look(
        self,
        state: State,
        drafts: list[Draft],
        halted: np.ndarray,
        group: list[Request],
        options: Options,
        stream: Stream | None,
    ) -> None:
        """Takes what was written into the drafts, shows it, and halts those that ended."""
        texts = state.texts
        ids, length, first, done = jax.device_get(
            (texts.ids, texts.length, texts.prompt_length, state.done)
        )
        each = options.rows_per_prompt
        for row, draft in enumerate(drafts):
            if halted[row]:
                continue
            new = ids[row, first[row] : length[row]].tolist()
            piece = draft.extend(new, done=bool(done[row]))
            halted[row] = draft.stopped or done[row]
            if stream and piece:
                stream(group[row // each].index * each + row % each, piece)

    def _refuse_not_finite(
        self, not_finite: jax.Array, written: Any, group: list[Request], options: Options
    ) -> None:
        """Raises where a row's logits were not finite after `written` tokens."""
        bad = np.flatnonzero(jax.device_get(not_finite))
        if bad.size:
            rows_each = len(not_finite) // self._row_bucket(len(group))
            raise NotFiniteError(
                f"the logits of new token {int(written[bad[0]])} of prompt "
                f"{group[bad[0] // rows_each].index} are not finite; look for NaN among the "
                f"parameters."
            )

    def _results(
        self, state: State, drafts: list[Draft], group: list[Request], options: Options
    ) -> list[list[Written]]:
        texts = state.texts
        stops = requests.stop_ids(options, self.config, self.words)
        ids, length, first, log_probs = jax.device_get(
            (texts.ids, texts.length, texts.prompt_length, state.log_probs)
        )
        each = options.rows_per_prompt
        results = []
        for row in range(len(group) * each):
            new = ids[row, first[row] : length[row]].tolist()
            ended = bool(new) and new[-1] in stops
            if drafts:
                new, ended = drafts[row].token_ids, ended or drafts[row].stopped
            text = drafts[row].text if drafts else self._text(new)
            results.append(
                Written(
                    new,
                    text,
                    "stop" if ended else "length",
                    *_log_probs_of(log_probs, row, int(first[row]), len(new)),
                )
            )
        grouped = [results[at : at + each] for at in range(0, len(results), each)]
        if options.best_of is None:
            return grouped
        return [
            sorted(texts, key=_mean_log_prob, reverse=True)[: options.num_return_sequences]
            for texts in grouped
        ]

    def _text(self, token_ids: list[int]) -> str | None:
        if self.words is None:
            return None
        return self.words.decode(token_ids, skip_special_tokens=True)


class NotFiniteError(ValueError):
    """The model's logits are NaN or infinite; the message names the text and the token."""


def _no_log_probs(shape: tuple[int, ...], options: Options) -> LogProbs | None:
    if options.logprobs is None and options.best_of is None:
        return None
    alternatives = (*shape, options.logprobs or 0)
    return LogProbs(
        np.zeros(shape, np.float32),
        np.zeros(alternatives, np.float32),
        np.zeros(alternatives, np.int32),
    )


def _log_probs_of(
    log_probs: LogProbs | None, row: int, first: int, count: int
) -> tuple[list[float] | None, list[dict[int, float]] | None]:
    if log_probs is None:
        return None, None
    span = slice(first, first + count)
    best = [
        dict(zip(ids.tolist(), values.tolist(), strict=True))
        for ids, values in zip(
            log_probs.best_ids[row, span], log_probs.best[row, span], strict=True
        )
    ]
    return log_probs.chosen[row, span].tolist(), best


def _mean_log_prob(text: Written) -> float:
    return float(np.mean(text.log_probs)) if text.log_probs else -math.inf


def _take_rows(caches: cache.Caches, source: jax.Array) -> cache.Caches:
    return jax.tree.map(lambda x: x[source], caches)


def _decoding_mesh(params: Params) -> Mesh:
    """The devices of the parameters, those of the context axis among those of the batch."""
    placed = jax.tree.leaves(params)[0].sharding
    if not isinstance(placed, NamedSharding):
        return sharding.make_mesh(MeshConfig(), list(placed.device_set))
    mesh = placed.mesh
    assert isinstance(mesh, Mesh)  # of real devices, since the parameters lie on them
    if mesh.shape["context"] == 1:
        return mesh
    data, fsdp, tensor, context = mesh.devices.shape
    devices = mesh.devices.transpose(0, 3, 1, 2).reshape(data * context, fsdp, tensor, 1)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def _move(params: Params, mesh: Mesh, *, keep: bool) -> Params:
    """The parameters on a mesh of the same devices, split as they are.

    The tree is the same one, and changed, unless it is to be kept.
    """
    moved: Params = {} if keep else params
    for name, leaf in list(params.items()):
        if isinstance(leaf, dict):
            moved[name] = _move(leaf, mesh, keep=keep)
        elif isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh != mesh:
            moved[name] = jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))
        else:
            moved[name] = leaf
    return moved
