"""A model to ask: logits, texts that go on, scores, vectors.

Enters: a config, its parameters and perhaps a tokenizer; `pretrained.py` reads them from any
checkpoint. Leaves: a `LanguageModel`, which gives logits, continues texts, scores them and
turns them into vectors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from neo_jax import hf, sharding, xla_flags
from neo_jax.config import ConfigError, ModelConfig
from neo_jax.generate import (
    Generator,
    Options,
    Stream,
    Written,
    eos_id,
    from_keywords,
    network,
    power_of_two,
    scoring,
)
from neo_jax.model import NeoLM
from neo_jax.state import Params
from neo_jax.tokenizer import Tokenizer

_SCORED_AT_ONCE = 8  # texts that one pass reads
_SHORTEST_SCORED = 64  # tokens that a pass reads at least

# Texts, or their token ids; an array's rows may be filled up, as an attention mask tells.
Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Sequence[int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Scored:
    """A text's tokens and the model's log-probability of each, in nats.

    The first entry is None where nothing stood before the first token; `total` is the sum of
    the others.
    """

    token_ids: list[int]
    log_probs: list[float | None]

    @property
    def total(self) -> float:
        """Log p of the text."""
        return float(sum(value for value in self.log_probs if value is not None))


class LanguageModel:
    """A model with its parameters, and the tokenizer that it came with, if any.

    The parameters are there once: stacked over the layers, or, as soon as a text is written,
    layer by layer, as writing reads them; logits, scores and vectors come from either.
    `weight_dtype` is the one that texts are written with where nothing else is asked;
    "int8" keeps no other weights, and answers everything with those.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None,
        graph: nnx.GraphDef[NeoLM],
        mesh: Mesh | None,
        *,
        weight_dtype: str = "auto",
    ):
        """Takes the parameters over.

        Args:
          config: the model's.
          params: stacked; the tree is emptied when the first text is written.
          tokenizer: None where there is none.
          graph: the model's structure.
          mesh: over which the parameters are spread; None: they lie on one device.
          weight_dtype: "auto" or "int8".
        """
        self.config, self.tokenizer, self.graph, self.mesh = config, tokenizer, graph, mesh
        self.weight_dtype = weight_dtype
        self._stacked: Params | None = params
        self._generators: dict[str, Generator] = {}
        self._compiled: dict[tuple[Any, ...], Callable[..., jax.Array]] = {}
        if weight_dtype != "auto":
            self._generators[weight_dtype] = self._make(weight_dtype)

    @property
    def params(self) -> Params:
        """The parameters, stacked over the layers; put together anew once a text is written.

        Raises:
          ConfigError: the model was loaded in int8.
        """
        if self._stacked is not None:
            return jax.tree.map(lambda leaf: leaf, self._stacked)  # another tree, same arrays
        if self.weight_dtype != "auto":
            raise ConfigError(f"weight_dtype={self.weight_dtype!r} keeps no other parameters.")
        places = jax.tree.map(
            lambda leaf: leaf.sharding, hf.abstract_params(self.config, mesh=self.mesh)
        )
        stack = jax.jit(network.stacked, out_shardings=None if self.mesh is None else places)
        return stack(self._generators["auto"].params)

    def logits(self, ids: np.typing.ArrayLike) -> Float[Array, "batch seq vocab"]:
        """Scores of the token after each one, float32.

        Args:
          ids: token ids, integers [batch, seq] below `config.vocab_size`, at most
            `config.max_seq_len` in a row.

        Raises:
          ValueError: another shape or type, too long a sequence, or an unknown id.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"ids must be integers [batch, seq], not {ids.dtype} {list(ids.shape)}."
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.config.vocab_size:
            raise ValueError(
                f"ids reach from {ids.min()} to {ids.max()}; the vocabulary has "
                f"0 … {self.config.vocab_size - 1}."
            )
        return self._run(scoring.logits, ids.astype(np.int32))[:, : ids.shape[1]]

    def generate(
        self,
        prompts: Prompts,
        *,
        attention_mask: np.typing.ArrayLike | None = None,
        stream: Stream | None = None,
        assistant_model: LanguageModel | None = None,
        **options: Any,
    ) -> list[Written]:
        """Continues texts.

        Args:
          prompts: strings or lists of token ids, or one of either; an empty one starts from
            the end-of-text token. An int array [batch, seq] may be padded on either side.
          attention_mask: [batch, seq], 0 where an array of prompts is padding.
          stream: called with a text's index and each new piece of it.
          assistant_model: a smaller model of the same tokens, whose guesses (greedily,
            `num_assistant_tokens` at a time) this one checks in one pass.
          options: see `neo_jax.generate.Options`; names are transformers'.

        Returns:
          For each prompt `num_return_sequences` texts, each with `.text` (None without a
          tokenizer) and `.token_ids`, new tokens only.

        Raises:
          ConfigError: an unknown option, a value out of range, or a prompt that does not fit.
          NotFiniteError: the model's logits are not finite.
        """
        asked = from_keywords(options)
        ids = self.token_ids(prompts, attention_mask)
        assistant = None if assistant_model is None else assistant_model.generator(asked)
        written = self.generator(asked).write(ids, asked, stream, assistant)
        if not asked.echo or self.tokenizer is None:
            return written
        each = asked.num_return_sequences
        before = [self.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in ids]
        return [
            dataclasses.replace(one, text=before[i // each] + (one.text or ""))
            for i, one in enumerate(written)
        ]

    def generator(self, options: Options) -> Generator:
        """The model made ready to write, once for each `weight_dtype`."""
        kind = self.weight_dtype if options.weight_dtype == "auto" else options.weight_dtype
        if kind not in self._generators:
            self._generators[kind] = self._make(kind)
        return self._generators[kind]

    def _make(self, kind: str) -> Generator:
        """Makes a generator of the parameters, in place of them if it is the model's own."""
        if self._stacked is None:
            ready = self._generators["auto"]
            return Generator(
                self.config, ready.graph, ready.params, self.tokenizer, weight_dtype=kind
            )
        is_last = kind == self.weight_dtype
        params = self._stacked
        if is_last:
            self._stacked = None
        return Generator(
            self.config,
            self.graph,
            params,
            self.tokenizer,
            weight_dtype=kind,
            keep_params=not is_last,
        )

    def score(self, texts: Prompts, *, from_start: bool = False) -> list[Scored]:
        """The model's log-probability of every token of each text.

        Args:
          texts: as `generate`'s prompts.
          from_start: the end-of-text token stands before each text, as in training, so that
            its first token is scored as well.

        Raises:
          ConfigError: a text longer than the model's positions, or an unknown token id.
        """
        ids = self.token_ids(texts, None)
        before = [self._end_of_text()] if from_start else []
        read = [before + one for one in ids]
        log_probs = self._in_batches(
            read, lambda rows, _: self._run(scoring.token_log_probs, rows)
        )
        first: list[float | None] = [] if from_start else [None]
        return [
            Scored(one, (first + row[: len(all_) - 1].tolist())[: len(one)])
            for one, all_, row in zip(ids, read, log_probs, strict=True)
        ]

    def embed(
        self, texts: Prompts, *, pooling: str = "mean"
    ) -> Float[np.ndarray, "batch embed"]:
        """A vector for each text, from the final hidden states.

        Args:
          texts: as `generate`'s prompts, none empty.
          pooling: "mean" over a text's tokens, or "last", the state of its last token.

        Raises:
          ConfigError: an empty or too long text, or another pooling.
        """
        if pooling not in ("mean", "last"):
            raise ConfigError(f"pooling={pooling!r} must be 'mean' or 'last'.")
        ids = self.token_ids(texts, None)
        if not all(ids):
            raise ConfigError(f"text {ids.index([])} is empty; there is nothing to embed.")
        vectors = self._in_batches(
            ids, lambda *arrays: self._run(scoring.pooled, *arrays, pooling=pooling)
        )
        return np.stack(vectors)

    def token_ids(
        self, prompts: Prompts, attention_mask: np.typing.ArrayLike | None
    ) -> list[list[int]]:
        """Prompts as lists of token ids. Args and errors as `generate`."""
        if isinstance(prompts, str):
            return [self._ids_of(prompts, 0)]
        if attention_mask is not None:
            array, mask = np.asarray(prompts), np.asarray(attention_mask)
            if array.ndim != 2 or array.shape != mask.shape:
                raise ConfigError(
                    f"attention_mask {list(mask.shape)} needs prompts as an array of that "
                    f"shape, [batch, seq], not {list(array.shape)}."
                )
            return [
                row[keep.astype(bool)].tolist() for row, keep in zip(array, mask, strict=True)
            ]
        if len(prompts) and isinstance(prompts[0], int | np.integer):
            return [self._ids_of(prompts, 0)]
        return [self._ids_of(prompt, i) for i, prompt in enumerate(prompts)]

    def _ids_of(self, prompt: Any, index: int) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ConfigError(
                    f"prompt {index} is text, and the model came without a tokenizer; give "
                    f"token ids."
                )
            return self.tokenizer.encode(prompt)
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ConfigError(f"prompt {index} must be text or a list of token ids.")
        return [int(token) for token in ids]

    def _end_of_text(self) -> int:
        end = eos_id(self.config, self.tokenizer)
        if end is None:
            raise ConfigError("from_start needs a tokenizer, which names the end of text.")
        return end

    def _run(
        self, function: Callable[..., jax.Array], *arrays: np.ndarray, **options: str
    ) -> jax.Array:
        """A function of graph, parameters and of arrays with as many rows, on their mesh.

        The last row is repeated until the mesh's devices can share the rows evenly, and the
        first array's rows are filled up until those of the context axis can share them.

        Raises:
          ConfigError: the context axis does not divide the model's positions.
        """
        graph: nnx.GraphDef[Any] = self.graph
        params, mesh = self._stacked, self.mesh
        if params is None:
            ready = self._generators[self.weight_dtype]
            graph, params, mesh = ready.graph, ready.params, ready.mesh
        key = (function, self._stacked is None, *options.values())
        if key not in self._compiled:
            self._compiled[key] = jax.jit(
                functools.partial(function, graph, **options),
                compiler_options=xla_flags.forward_options(self.config, sharding.target()),
            )
        run = functools.partial(self._compiled[key], params)
        if mesh is None:
            return run(*arrays)
        count, length = arrays[0].shape
        split = mesh.shape["context"]
        if length % split:
            if self.config.max_seq_len % split:
                raise ConfigError(
                    f"mesh.context={split} does not divide the model's "
                    f"{self.config.max_seq_len} positions; load it with another mesh."
                )
            longer = np.pad(arrays[0], [(0, 0), (0, -length % split)])
            arrays = (longer, *arrays[1:])
        rows = math.prod(mesh.shape[axis] for axis in sharding.TABLE["batch"] or ())
        with jax.set_mesh(mesh):
            return run(
                *(np.concatenate([a, a[-1:].repeat(-count % rows, 0)]) for a in arrays)
            )[:count]

    def _in_batches(
        self,
        texts: Sequence[list[int]],
        run: Callable[[np.ndarray, np.ndarray], jax.Array],
    ) -> list[np.ndarray]:
        """What `run` gives for each text, from few shapes of batches.

        `run` takes ids [batch, seq], filled up with 0, and lengths [batch].
        """
        most = self.config.max_seq_len
        for index, ids in enumerate(texts):
            if len(ids) > most:
                raise ConfigError(
                    f"text {index} has {len(ids)} tokens, more than the model's {most} "
                    f"positions; cut it, or score it in windows."
                )
            if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
                raise ConfigError(
                    f"text {index} holds token ids from {min(ids)} to {max(ids)}; the "
                    f"vocabulary has 0 … {self.config.vocab_size - 1}."
                )
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        results: dict[int, np.ndarray] = {}
        for at in range(0, len(order), _SCORED_AT_ONCE):
            some = order[at : at + _SCORED_AT_ONCE]
            longest = max(len(texts[some[-1]]), _SHORTEST_SCORED)
            rows = np.zeros((_SCORED_AT_ONCE, min(most, power_of_two(longest))), np.int32)
            length = np.ones(_SCORED_AT_ONCE, np.int32)
            for row, index in enumerate(some):
                rows[row, : len(texts[index])] = texts[index]
                length[row] = max(1, len(texts[index]))
            results.update(zip(some, np.asarray(run(rows, length)), strict=False))
        return [results[index] for index in range(len(texts))]
