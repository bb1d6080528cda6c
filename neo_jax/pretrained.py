"""Any checkpoint as a model to ask: a workdir of ours, Hugging Face's, or the original's.

Enters: a path or the id of a model on the hub. Leaves: a `LanguageModel`, which gives logits,
continues texts, scores them and turns them into vectors. What kind of checkpoint it is shows
in its files, so that nobody has to say.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from neo_jax import (
    checkpoint,
    hf,
    lora,
    mtf,
    sharding,
    state,
    tokenizer,
    trainable,
    xla_flags,
)
from neo_jax import config as config_lib
from neo_jax.checkpoint import digests
from neo_jax.config import Config, ConfigError, FinetuneConfig, MeshConfig, ModelConfig
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


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    weight_dtype: str = "auto",
) -> LanguageModel:
    """A language model from a workdir, a directory of any kind, or a hub id.

    Args:
      source: a workdir of ours, a Hugging Face directory or hub id, or an original
        checkpoint with its config.json.
      dtype: of the parameters, such as "bfloat16"; left out, as they are stored.
      mesh: over which the parameters are spread; left out, all on the default device.
      weight_dtype: "int8" keeps the weights in int8 only, which texts are then written and
        scored with.

    Raises:
      ConfigError: nothing is there that could be read, or an unknown weight_dtype; one line.
      ValueError: weights that do not fit their config.
    """
    if weight_dtype not in ("auto", "int8"):
        raise ConfigError(f"weight_dtype={weight_dtype!r} must be 'auto' or 'int8'.")
    folder = locate(source)
    model = read(folder, dtype=dtype, mesh=mesh)
    if model.head is not None:
        raise ConfigError(
            f"{source} is a {model.head.architecture}, which has no language model's head; "
            f"read it with neo_jax.hf.read."
        )
    graph, _ = state.model_graph(model.config)
    words = find_tokenizer(folder)
    return LanguageModel(
        model.config, model.params, words, graph, mesh, weight_dtype=weight_dtype
    )


def locate(source: str | os.PathLike[str]) -> pathlib.Path:
    """Where a checkpoint lies; what only the hub has is fetched first.

    Raises:
      ConfigError: nothing of that name is there, nor within reach.
    """
    if is_workdir(source) or mtf.is_checkpoint(source) or hf.is_adapter(source):
        return pathlib.Path(source)
    return hf.resolve(source)


def read(
    source: str | os.PathLike[str], *, dtype: str | None = None, mesh: Mesh | None = None
) -> hf.Pretrained:
    """Config and parameters of any checkpoint. Args and errors as `load`."""
    if is_workdir(source):
        return _read_workdir(pathlib.Path(source), dtype, mesh)
    if hf.is_adapter(source):
        return _read_adapter(pathlib.Path(source), dtype, mesh)
    if mtf.is_checkpoint(source):
        return mtf.read(source, dtype=dtype, mesh=mesh)
    return hf.read(source, dtype=dtype, mesh=mesh)


def model_config(source: str | os.PathLike[str]) -> ModelConfig:
    """The shape of any checkpoint's model, without reading its weights. Errors as `load`."""
    folder = locate(source)
    if is_workdir(folder):
        return _plain(_config_of_workdir(folder).model)
    if hf.is_adapter(folder):
        return model_config(hf.adapter_base(folder))
    if mtf.is_checkpoint(folder):
        prefix = mtf.checkpoint_prefix(folder)
        return mtf.config_from_mtf(hf.read_json(prefix.parent / "config.json"))
    return hf.config_from_hf(hf.read_json(folder / "config.json"))


def is_workdir(source: str | os.PathLike[str]) -> bool:
    """Whether a directory is one that training or `convert` wrote."""
    return (pathlib.Path(source) / "checkpoints").is_dir()


def head_of(source: str | os.PathLike[str]) -> hf.Head | None:
    """The head of any checkpoint, without reading its weights; None: a language model's.

    Errors as `load`.
    """
    folder = locate(source)
    if is_workdir(folder):
        return _head_of(_config_of_workdir(folder), find_tokenizer(folder))
    if mtf.is_checkpoint(folder) or hf.is_adapter(folder):
        return None
    return hf.head_from_hf(hf.read_json(folder / "config.json"))


def find_tokenizer(checkpoint: pathlib.Path) -> Tokenizer | None:
    """The tokenizer beside a checkpoint; None where there are no tokenizer's files."""
    try:
        return tokenizer.load(checkpoint if checkpoint.is_dir() else checkpoint.parent)
    except ConfigError:
        return None


def fingerprint(folder: pathlib.Path) -> str:
    """What tells a checkpoint from others: a digest of its files' names, sizes and ends."""
    if is_workdir(folder):
        newest = max((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        files = [newest / digests.FILE_NAME]
    else:
        kinds = ("*.safetensors", "*.bin", "*.index", "*.data-*")
        files = sorted(path for kind in kinds for path in folder.glob(kind))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()[:16]


_ENDS = 1 << 16  # bytes
BASE_FILE = "base.json"  # of a workdir: which checkpoint its frozen parameters are from


def check_base(workdir: pathlib.Path, base: pathlib.Path) -> None:
    """Refuses another checkpoint than the one whose frozen parameters a run was made beside.

    Raises:
      ConfigError: it is another one, or has changed.
    """
    path = workdir / BASE_FILE
    if not path.exists():
        return
    noted = json.loads(path.read_text())
    if noted["fingerprint"] != fingerprint(base):
        raise ConfigError(
            f"{workdir} was tuned beside {noted['init_from']}, and {base} is another "
            f"checkpoint, or has changed since; give the one that it belongs to."
        )


def _read_workdir(
    workdir: pathlib.Path, dtype: str | None, mesh: Mesh | None
) -> hf.Pretrained:
    """The newest checkpoint; where a run ended with its best, that one."""
    whole = _config_of_workdir(workdir)
    model, finetune = whole.model, whole.finetune
    head = _head_of(whole, find_tokenizer(workdir))
    if dtype is not None:
        model = dataclasses.replace(model, param_dtype=dtype)  # type: ignore[arg-type]
    if mesh is None:
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = hf.abstract_params(model, mesh=mesh)
    learned, _ = trainable.divide(abstract, finetune)
    params = checkpoint.restore_params(workdir, learned, step=_best_step(workdir))
    if finetune.trainable != "all" and whole.train.init_from is not None:
        base = locate(whole.train.init_from)
        check_base(workdir, base)
        _, held, old_head = read(base, dtype=model.param_dtype, mesh=mesh)
        held = held if old_head is None else held["model"]
        if model.kernel_dtype == "int8":
            held = lora.with_int8_kernels(held, abstract)
        params = trainable.join(params, trainable.divide(held, finetune)[1])
    merged, plain = lora.merge(params, model)
    if head is None:
        return hf.Pretrained(plain, merged, None)
    return hf.Pretrained(*hf.with_head(plain, merged), head)


def _head_of(config: Config, words: Tokenizer | None) -> hf.Head | None:
    count = config.model.num_labels
    if not count:
        return None
    names = config.classify.labels or tuple(f"LABEL_{label}" for label in range(count))
    pad = config.model.vocab_size - 1 if words is None else words.eos_id
    kind = "regression" if count == 1 else "single_label_classification"
    return hf.Head(hf.TEXT_HEAD, names, pad_token_id=pad, problem_type=kind)


def read_learned_adapters(workdir: pathlib.Path) -> tuple[Params, ModelConfig, str]:
    """What a LoRA run learned, its model's config, and the checkpoint that it belongs to.

    Raises:
      ConfigError: the workdir is of another kind of run.
    """
    if not is_workdir(workdir):
        raise ConfigError(f"{workdir} is no workdir of a run; only those have adapters.")
    whole = _config_of_workdir(workdir)
    if whole.finetune.trainable != "lora":
        raise ConfigError(
            f"{workdir} is no LoRA run (finetune.trainable={whole.finetune.trainable!r}); "
            f"use --format hf."
        )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = hf.abstract_params(whole.model, mesh=mesh)
    learned, _ = trainable.divide(abstract, whole.finetune)
    params = checkpoint.restore_params(workdir, learned, step=_best_step(workdir))
    return params, whole.model, str(whole.train.init_from)


def _read_adapter(folder: pathlib.Path, dtype: str | None, mesh: Mesh | None) -> hf.Pretrained:
    """A model with peft's adapter merged into it."""
    base = read(locate(hf.adapter_base(folder)), dtype=dtype, mesh=mesh)
    config, learned = hf.read_adapter(folder, base.config)
    if mesh is not None:
        wanted, _ = trainable.divide(
            hf.abstract_params(config, mesh=mesh), FinetuneConfig(trainable="lora")
        )
        learned = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), learned, wanted
        )
    merged, plain = lora.merge(trainable.join(learned, base.params), config)
    return hf.Pretrained(plain, merged, base.head)


def _best_step(workdir: pathlib.Path) -> int | None:
    """The step that a finished run ended with; None where it is the newest."""
    try:
        return json.loads((workdir / "summary.json").read_text()).get("best_step")
    except (OSError, json.JSONDecodeError):
        return None


def _plain(model: ModelConfig) -> ModelConfig:
    """The same without what reading merges."""
    return dataclasses.replace(model, lora_rank=0, kernel_dtype="param", num_labels=0)


def _config_of_workdir(workdir: pathlib.Path) -> Config:
    try:
        return config_lib.from_json((workdir / "config.json").read_text())
    except OSError as error:
        raise ConfigError(f"{workdir}/config.json cannot be read: {error.strerror}.") from None
