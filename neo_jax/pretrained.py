"""Any checkpoint as a model to ask: a workdir of ours, Hugging Face's, or the original's.

Enters: a path or the id of a model on the hub. Leaves: a `LanguageModel`, or its config and
parameters alone. What kind of checkpoint it is shows in its files, so that nobody has to say.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib

import jax
from jax.sharding import Mesh

from neo_jax import checkpoint, hf, lora, mtf, sharding, state, tokenizer, trainable
from neo_jax import config as config_lib
from neo_jax.checkpoint import digests
from neo_jax.config import Config, ConfigError, FinetuneConfig, MeshConfig, ModelConfig
from neo_jax.language_model import LanguageModel
from neo_jax.state import Params
from neo_jax.tokenizer import Tokenizer


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
