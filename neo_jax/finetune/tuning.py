"""A run that starts from a trained model, whatever it learns.

Enters: `train.init_from`: a workdir, a Hugging Face directory or hub id, or an original
checkpoint. Leaves: a `Run` whose model has that checkpoint's shape, whose tokenizer is the
checkpoint's, and whose first parameters are its own; what a task adds to them starts fresh.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import traverse_util

from neo_jax import hf, lora, pretrained, state, tokenizer, trainable
from neo_jax.checkpoint.restoring import tell
from neo_jax.config import Config, ConfigError
from neo_jax.finetune import rates
from neo_jax.metrics import Writer
from neo_jax.run import Run, keep_tokenizer, load_tokenizer
from neo_jax.state import Params
from neo_jax.watch import Preemption

# What an experiment says of the model; its shape is the checkpoint's.
_OF_THE_RUN = (
    *("param_dtype", "compute_dtype", "attention", "scan_layers"),
    *("remat", "remat_save", "remat_offload"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "kernel_dtype"),
)


def with_shape(config: Config, source: pathlib.Path | None) -> Config:
    """The config with the shape of a checkpoint's model.

    Args:
      config: says how the model is computed, and what is added to it.
      source: where the checkpoint lies; None leaves the config as it is.

    Raises:
      ConfigError: the checkpoint cannot be read, or does not fit the rest of the config.
    """
    if source is None:
        return config
    # The path is kept in full: whoever reads the run may stand elsewhere.
    if source.is_dir() and pathlib.Path(str(config.train.init_from)).exists():
        absolute = dataclasses.replace(config.train, init_from=str(source.resolve()))
        config = dataclasses.replace(config, train=absolute)
    of_the_run = {key: getattr(config.model, key) for key in _OF_THE_RUN}
    shape = dataclasses.replace(pretrained.model_config(source), **of_the_run)
    return dataclasses.replace(config, model=shape)


class Tuning(Run):
    """A run from a trained model; it ends with the best checkpoint, not the last.

    Attributes:
      source: where the checkpoint lies; None where a task allows to start from nothing.
    """

    config: Config
    ends_with_best: ClassVar[bool] = True
    needs_checkpoint: ClassVar[bool] = True

    def __init__(self, config: Config, workdir: pathlib.Path, preemption: Preemption) -> None:
        self.source = self._locate(config)
        super().__init__(self.resolved(config), workdir, preemption)

    def resolved(self, config: Config) -> Config:
        """The config with the checkpoint's shape; a task may settle more of it.

        Raises:
          ConfigError: the checkpoint's model does not fit the rest of the config.
        """
        return rates.settled(with_shape(config, self.source))

    def open_tokenizer(self) -> tokenizer.Tokenizer:
        """The checkpoint's, kept in the workdir; the config's where it has none.

        Raises:
          ConfigError: neither is there.
        """
        if self.source is None or (self.workdir / tokenizer.FILE_NAME).exists():
            return load_tokenizer(self.config, self.workdir)
        words = pretrained.find_tokenizer(self.source)
        if words is None:
            tell(
                f"{self.source} has no tokenizer; data.tokenizer="
                f"{self.config.data.tokenizer!r} is used."
            )
            return load_tokenizer(self.config, self.workdir)
        return keep_tokenizer(words, self.config, self.workdir)

    def conclude(
        self, params: Params, scores: Mapping[str, float], writer: Writer
    ) -> dict[str, Any]:
        """Writes the model that others load, if `finetune.export` asks for it."""
        said = super().conclude(params, scores, writer)
        if self.config.finetune.export != "none" and jax.process_count() == 1:
            writer.say(f"exported to {self.export(params)}")
        return said

    def export(self, params: Params) -> pathlib.Path:
        """The model for transformers, adapters merged; or the adapters alone for peft.

        What an earlier end of this run wrote is replaced.
        """
        kind = self.config.finetune.export
        folder = self.workdir / kind
        aside = self.workdir / f"{kind}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        if kind == "peft":
            base = str(self.config.train.init_from)
            hf.write_adapter(params, self.config.model, base, aside)
        else:
            self.write_model(params, aside)
        hf.write_tokenizer(self.tokenizer, aside, self.config.model.max_seq_len)
        shutil.rmtree(folder, ignore_errors=True)
        return aside.rename(folder)

    def write_model(self, params: Params, folder: pathlib.Path) -> None:
        """Writes a language model for transformers, adapters merged."""
        merged, plain = lora.merge(self.whole(params), self.config.model)
        hf.write(merged, plain, folder, eos_id=self.tokenizer.eos_id)

    def initial_params(self) -> tuple[Params, Params]:
        """The checkpoint's parameters, and fresh ones where it has none."""
        config = self.config
        if self.source is None:
            return super().initial_params()
        learned, frozen = trainable.divide(self._read(), config.finetune)
        if frozen and jax.process_index() == 0:
            noted = {
                "init_from": str(config.train.init_from),
                "fingerprint": pretrained.fingerprint(self.source),
            }
            (self.workdir / pretrained.BASE_FILE).write_text(json.dumps(noted) + "\n")
        wanted, held = (traverse_util.flatten_dict(p) for p in (self.abstract.params, learned))
        missing = [path for path in wanted if path not in held]
        if missing:
            fresh = traverse_util.flatten_dict(
                state.create_params(
                    config.model, self.mesh, config.train.seed, config.finetune
                )
            )
            held |= {path: fresh[path] for path in missing}
        return traverse_util.unflatten_dict(held), frozen

    def frozen_params(self) -> Params:
        """The checkpoint's parameters that are not learned, read again."""
        if self.config.finetune.trainable == "all" or self.source is None:
            return {}
        pretrained.check_base(self.workdir, self.source)
        return trainable.divide(self._read(), self.config.finetune)[1]

    def _read(self) -> Params:
        """All of the checkpoint's parameters, where they will lie."""
        assert self.source is not None
        _, params, head = pretrained.read(
            self.source, dtype=self.config.model.param_dtype, mesh=self.mesh
        )
        if head is not None:
            keeps_head = self.keeps_head(head)
            params = params["model"] | ({"classifier": params["head"]} if keeps_head else {})
        if self.config.model.kernel_dtype == "param":
            return params
        like = state.abstract_params(self.config.model, self.mesh)
        return lora.with_int8_kernels(params, like)

    def keeps_head(self, head: hf.Head) -> bool:
        """Whether the checkpoint's head, which is no language model's, is used."""
        del head
        return False

    def _locate(self, config: Config) -> pathlib.Path | None:
        if config.train.init_from is not None:
            return pretrained.locate(config.train.init_from)
        if self.needs_checkpoint:
            raise ConfigError(
                f"task {config.task!r} starts from a trained model; name it, as in "
                f"--config.train.init_from=EleutherAI/gpt-neo-125m."
            )
        return None
