"""A model card from what a run left in its workdir.

Enters: a workdir, and reports of evaluations. Leaves: the text of a README.md in the form of
the Hugging Face hub: data, recipe, scores, intended use and limits. Every number in it is
read from a file of the run; what no file tells is left for the author to say, and marked.
After Mitchell et al. 2018 (arXiv:1810.03993).
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neo_jax import config as config_lib
from neo_jax import state
from neo_jax.config import Config, ConfigError
from neo_jax.evaluate import memorisation, report
from neo_jax.metrics import read_metrics

_BIAS_TASKS = ("crows_pairs", "stereoset", "winobias", "pairs:")
_LIMITS = """\
- It continues text. It does not know what is true, and writes what is plausible in text like
  its training data, whatever that held: mistakes, prejudice, insults, private matters.
- It was not tuned to follow instructions or to refuse any.
- It has read at most {max_seq_len} tokens at a time, and text in other languages or of other
  kinds than its training data's will be worse.
- What it writes should be read by a person before others see it."""


def card(
    workdir: pathlib.Path, reports: Sequence[Mapping[str, Any]], name: str | None = None
) -> str:
    """The model card of a run.

    Args:
      workdir: of training, with config.json.
      reports: as `report.read` gives them; their tables go in.
      name: of the model; left out, the workdir's.

    Raises:
      ConfigError: the workdir holds no run.
    """
    try:
        config = config_lib.from_json((workdir / "config.json").read_text())
    except OSError as error:
        raise ConfigError(
            f"{workdir}/config.json cannot be read: {error.strerror}; a card is made of the "
            f"workdir of a run."
        ) from None
    summary = _summary(workdir)
    sections = [
        *_front_matter(config),
        f"# {name or workdir.resolve().name}",
        "",
        *_what(config, summary),
        *_data(config, summary),
        *_recipe(config, workdir),
        *_scores(summary, reports),
        *_ethics(reports),
        "## Intended use",
        "",
        "Research on language models, and teaching. **To be said by the author:** other uses "
        "that were tested, and those that were not.",
        "",
        "## Limits",
        "",
        _LIMITS.format(max_seq_len=config.data.seq_len),
        "",
        "## Licence",
        "",
        "**To be said by the author**; the data's own terms may bind the weights.",
        "",
    ]
    return "\n".join(sections)


def _summary(workdir: pathlib.Path) -> dict[str, Any]:
    """summary.json; empty for a run that has not ended."""
    try:
        found = json.loads((workdir / "summary.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _front_matter(config: Config) -> Iterator[str]:
    yield "---"
    yield "library_name: neo_jax"
    yield "pipeline_tag: text-generation"
    yield "tags: [gpt-neo, causal-lm, jax]"
    yield "---"
    yield ""


def _what(config: Config, summary: Mapping[str, Any]) -> Iterator[str]:
    model = config.model
    count = state.num_params(model)
    yield (
        f"A GPT-Neo of {count:,} parameters: {model.num_layers} layers "
        f"({', '.join(model.attention_types)}, in turn), {model.embed_dim} wide, "
        f"{model.num_heads} heads, windows of {model.window_size} in local layers, "
        f"{model.vocab_size:,} tokens in the vocabulary, {model.max_seq_len:,} positions."
    )
    yield ""
    if not summary:
        yield "Training has not ended: there is no summary.json."
        yield ""


def _data(config: Config, summary: Mapping[str, Any]) -> Iterator[str]:
    data = config.data
    yield "## Data"
    yield ""
    sources = data.mixture or ((data.source, 1.0),)
    for name, *weights in sources:
        yield f"- `{name}`, weight {', then '.join(f'{weight:g}' for weight in weights)}"
    held_out = (
        f"`{data.eval_source}`"
        if data.eval_source
        else f"every {data.holdout_every}th document, which training did not see"
    )
    yield f"- tokenizer `{data.tokenizer}`; held out: {held_out}"
    if "held_out_bytes" in summary:
        yield f"- {summary['held_out_bytes']:,} bytes are held out"
    for jump in summary.get("jumps") or []:
        yield f"- passed over: {json.dumps(jump)}"
    yield ""


def _recipe(config: Config, workdir: pathlib.Path) -> Iterator[str]:
    data, adam, steps = config.data, config.optimizer, config.train.num_steps
    lines = [line for line in read_metrics(workdir) if line.get("split") == "train"]
    done = lines[-1]["step"] if lines else 0
    yield "## Recipe"
    yield ""
    yield (
        f"- {done:,} of {steps:,} steps of {data.batch_size:,} × {data.seq_len:,} tokens, "
        f"{done * data.batch_size * data.seq_len:,} in all; seed {config.train.seed}"
    )
    yield (
        f"- Adam ({adam.b1:g}, {adam.b2:g}, ε {adam.eps:g}), learning rate "
        f"{adam.learning_rate:g} by `{adam.schedule}` after {adam.warmup_steps:,} steps of "
        f"warm-up, weight decay {adam.weight_decay:g}, gradients clipped at {adam.clip_norm:g}"
    )
    yield f"- z-loss {config.loss.z_loss:g}, initialiser `{config.model.initializer}`"
    yield "- everything else: `config.json` beside the weights"
    yield ""


def _scores(summary: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "## Scores"
    yield ""
    if "loss" in summary:
        yield (
            f"Held-out text: {summary['loss']:.4f} nats a token (perplexity "
            f"{summary['perplexity']:.2f}), {summary['bits_per_byte']:.4f} bits per byte, "
            f"windows with a stride of {summary['stride']} tokens."
        )
        yield ""
    if not reports:
        yield "No benchmark was run; `python -m neo_jax.evaluate` does."
        yield ""
    for each in reports:
        yield from report.table(each)
        yield ""
        yield f"    {each['command']}"
        yield ""


def _ethics(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = {task for each in reports for task in each["tasks"]}
    yield "## Bias and memory"
    yield ""
    if any(task.startswith(_BIAS_TASKS) for task in found):
        yield (
            "The scores above hold likelihood tests of bias. They compare sentences of fixed "
            "lists in American English: an even score is no proof of fairness."
        )
    else:
        yield "Bias was not measured."
    yield ""
    if memorisation.NAME in found:
        yield (
            "The scores above tell how often greedy decoding goes on verbatim; compare the "
            "figure of text that the model never saw."
        )
    else:
        yield "Memorised text was not looked for."
    yield ""
