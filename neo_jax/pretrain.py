"""Pre-training: text in, a language model out.

Enters: `task = "pretrain"`. Leaves: a trained checkpoint, held-out scores and a sample of
text. What it shares with every other task is in run.py.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from neo_jax import lora, sharding, state, tokenizer, train, trainable
from neo_jax import run as run_lib
from neo_jax.config import Config, ConfigError
from neo_jax.data import pipeline, sources
from neo_jax.data.pipeline import Pipeline
from neo_jax.evaluate import in_loop, perplexity
from neo_jax.generate import Generator, Options
from neo_jax.metrics import Writer
from neo_jax.run import Run
from neo_jax.state import Params
from neo_jax.train import Batch
from neo_jax.watch import Preemption


def run(config: Config, workdir: pathlib.Path) -> None:
    """Trains, evaluates and samples, from the workdir's newest checkpoint if it has one.

    Raises as `run.start`.
    """
    run_lib.start(Pretraining, config, workdir)


class Pretraining(Run):
    """A run that learns the next token of text, and is judged by text that it never saw."""

    config: Config

    def __init__(self, config: Config, workdir: pathlib.Path, preemption: Preemption) -> None:
        super().__init__(config, workdir, preemption)
        self.held_out = _held_out(config, self.tokenizer, self.eval_batch_size)
        self.benchmarks = in_loop.Benchmarks(
            config.eval, config.model, self.mesh, self.tokenizer
        )
        self._sum_losses = jax.jit(self._batch_sums)

    def missing_data(self) -> list[str]:
        """See `Run`."""
        try:
            sources.preflight(self.config.data)
        except ConfigError as error:
            return [str(error)]
        return []

    def open_data(self) -> Pipeline:
        """See `Run`."""
        config = self.config
        index, count = sharding.host_share(self.mesh, config.data.batch_size)
        return pipeline.build(
            config.data,
            self.tokenizer,
            seed=config.train.seed,
            split="train",
            process_index=index,
            process_count=count,
        )

    def evaluate(self, params: Params, *, final: bool) -> dict[str, float]:
        """Loss (nats) and bits per byte of the held-out text, and the benchmarks' figures.

        The last evaluation may give each token a longer context (`eval.stride`).
        """
        stride = (self.config.eval.stride if final else None) or self.config.data.seq_len
        return {
            **self.score(params, stride),
            **self.benchmarks.score(self.whole(params)),
        }

    def conclude(
        self, params: Params, scores: Mapping[str, float], writer: Writer
    ) -> dict[str, Any]:
        """Writes a sample, and the final figure beside those that the experiment names."""
        sample = self.sample(params)
        if sample:
            writer.say(f"\n{'— a sample ':—<72}\n{sample}\n{'':—<72}")
        for line in _beside_references(self.config, scores["bits_per_byte"]):
            writer.say(line)
        return {
            **scores,
            "perplexity": math.exp(scores["loss"]),
            "held_out_bytes": self.held_out.num_bytes,
            "stride": self.config.eval.stride or self.config.data.seq_len,
            "sample": sample,
        }

    def describe_data(self) -> str:
        """See `Run`."""
        data = self.data
        return (
            f"{data.num_documents:,} documents, {data.num_bytes:,} bytes, "
            f"{data.num_tokens:,} tokens to learn from, {self.held_out.num_bytes:,} bytes "
            f"held out"
        )

    def score(self, params: Params, stride: int) -> dict[str, float]:
        """Loss (nats) and bits per byte of the held-out text; see evaluate/perplexity.py.

        Raises:
          Preempted: told to leave in its midst.
        """

        def sum_losses(batch: Mapping[str, np.ndarray]) -> tuple[float, float]:
            self.preemption.leave_if_told()
            nll, weight = self._sum_losses(params, self.frozen, self.place(batch))
            return float(nll), float(weight)

        most = self.config.eval.max_batches
        if isinstance(self.held_out, perplexity.HeldOutRows):
            return self.held_out.evaluate(sum_losses, max_batches=most)
        return perplexity.evaluate(
            self.held_out,
            sum_losses,
            seq_len=self.config.data.seq_len,
            stride=stride,
            batch_size=self.eval_batch_size,
            max_batches=most,
        )

    def sample(self, params: Params) -> str:
        """`eval.sample_tokens` of text, the prompt before them, within `data.seq_len`."""
        settings, context = self.config.eval, self.config.data.seq_len
        count = min(settings.sample_tokens, context - 1)
        if count == 0:
            return ""
        prompt = [self.tokenizer.eos_id, *self.tokenizer.encode(settings.prompt)]
        prompt = prompt[-(context - count) :]
        options = Options(
            max_new_tokens=count,
            temperature=settings.temperature,
            top_k=settings.top_k,
            eos_token_id=(),  # a document's end is shown, and does not end the sample
            seed=self.config.train.seed,
        )
        merged, plain = lora.merge(self.whole(params), self.config.model)
        graph, _ = state.model_graph(plain)
        generator = Generator(plain, graph, merged, self.tokenizer)
        (written,) = generator.write([prompt], options)
        return self.tokenizer.decode(prompt[1:] + written.token_ids)

    def _batch_sums(
        self, params: Params, frozen: Params, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        whole = trainable.join(params, frozen)
        sums = train.batch_loss(whole, self.graph, self.config, batch)
        return sums.nll, batch["weights"].sum()


def _held_out(
    config: Config, words: tokenizer.Tokenizer, batch_size: int
) -> perplexity.HeldOut | perplexity.HeldOutRows:
    # It is read once, here: workers would take longer to start than to read it.
    data = dataclasses.replace(config.data, num_workers=0)
    if data.record_format == "instruction":
        # Each answer follows its own prompt and nothing else, however training packs them.
        data = dataclasses.replace(
            data, packing="best_fit", isolate_documents=True, batch_size=batch_size
        )
    source = pipeline.build(data, words, seed=config.train.seed, split="eval")
    batches: Iterator[Mapping[str, np.ndarray]] = source
    held_out = (
        perplexity.HeldOutRows.collect(batches, words.decode, words.eos_id)
        if data.record_format == "instruction"
        else perplexity.HeldOut.collect(batches, source.num_bytes)
    )
    source.close()
    return held_out


def _beside_references(config: Config, bits_per_byte: float) -> Iterator[str]:
    """The final figure in its place among those that the experiment names."""
    if not config.eval.references:
        return
    yield "held-out text, bits per byte:"
    rows = [*config.eval.references, ("this model", bits_per_byte)]
    for name, value in sorted(rows, key=lambda row: -row[1]):
        mark = "→" if name == "this model" else " "
        yield f"  {mark} {value:.3f}  {name}"
