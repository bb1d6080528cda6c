"""From one row of a file to one document.

Enters: a row of a file: a text, or a mapping from field names to values. Leaves: a
`Document`, or a `RowError` that says in one line why there is none.

Text is one field. Instruction data comes in three forms, told apart by their fields:

    {"prompt": …, "completion": …}
    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"instruction": …, "input": …, "output": …}                                   (Alpaca)

of which only the answers, and the eos after the last, are learned. Pairs of answers are

    {"prompt": …, "chosen": …, "rejected": …}

each text, or messages; without a prompt, what two lists of messages begin with is the prompt.
Such a document has three parts, and is no text of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from neo_jax.config import DataConfig

Part: TypeAlias = tuple[str | np.ndarray, bool]


@dataclasses.dataclass(frozen=True)
class Document:
    """One document, in parts: text or token ids, each to be learned (true) or only read."""

    parts: tuple[Part, ...]
    group: str  # the name it is counted under in reports

    @property
    def text(self) -> str:
        """All parts that are text, joined."""
        return "".join(part for part, _ in self.parts if isinstance(part, str))


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A record that holds no document: where it stands and what is wrong with it."""

    where: str
    reason: str
    kind: str = "invalid"  # the column of the report: "invalid" or "undecodable"


Record: TypeAlias = Document | Unreadable


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file."""

    index: int  # of the line, row or record, as the format counts them
    value: str | Mapping[str, Any]  # bare text, or fields


class RowError(ValueError):
    """A row that is not of the form asked for."""

    def __init__(self, reason: str, kind: str = "invalid") -> None:
        super().__init__(reason)
        self.kind = kind


def to_document(row: Row, group: str, config: DataConfig) -> Document:
    """The document of a row, as `data.record_format` reads it.

    Raises:
      RowError: a field is missing or of the wrong type, or its text has no UTF-8 form.
    """
    fields = {config.text_field: row.value} if isinstance(row.value, str) else row.value
    parts: tuple[Part, ...]
    if config.record_format == "instruction":
        parts = _instruction_parts(fields)
    elif config.record_format == "preference":
        parts = _preference_parts(fields)
    else:
        parts = ((_text(fields, config.text_field), True),)
    for part, _ in parts:
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
                reason = f"character {error.start} is a lone surrogate"
                raise RowError(reason, "undecodable") from None
    return Document(parts, group)


def _text(fields: Mapping[str, Any], name: str) -> str | np.ndarray:
    if name not in fields:
        names = ", ".join(map(repr, fields)) or "none"
        raise RowError(f"there is no field {name!r}; there are {names}: name data.text_field")
    value = fields[name]
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return value
    return _ids(value, name)


def _ids(value: Any, name: str) -> np.ndarray:
    """Token ids that a data set brings along instead of text."""
    try:
        ids = np.asarray(value)
    except ValueError:  # a ragged list
        ids = np.zeros((0, 0))
    if ids.ndim == 1 and ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        kind = type(value).__name__
        kind += f" of {ids.dtype}" if isinstance(value, (list, np.ndarray)) else ""
        raise RowError(
            f"field {name!r} is {kind}; it must be text, or a list of whole token ids"
        )
    return ids.astype(np.int64)


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise RowError(
            f"there is no field {name!r}; there are {', '.join(map(repr, fields)) or 'none'}"
        )
    return fields[name]


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = _field(fields, name)
    if not isinstance(value, str):
        raise RowError(f"field {name!r} is {type(value).__name__}; it must be text")
    return value


# --------------------------------------------------------------------------- instructions


def _instruction_parts(fields: Mapping[str, Any]) -> tuple[Part, ...]:
    if "messages" in fields:
        return _chat_parts(fields["messages"])
    if "prompt" in fields:
        return (_string(fields, "prompt"), False), (_string(fields, "completion"), True)
    if "instruction" in fields:
        return (_alpaca_prompt(fields), False), (_string(fields, "output"), True)
    raise RowError(
        "there is neither 'prompt' and 'completion', 'messages', nor 'instruction' and "
        f"'output'; there are {', '.join(map(repr, fields)) or 'none'}"
    )


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """The prompt that Alpaca's models are asked with.

    Source: github.com/tatsu-lab/stanford_alpaca, README, "Data Release".
    """
    if context:
        return (
            "Below is an instruction that describes a task, paired with an input that "
            "provides further context. Write a response that appropriately completes the "
            "request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    )


def _alpaca_prompt(fields: Mapping[str, Any]) -> str:
    context = fields.get("input") or ""
    if not isinstance(context, str):
        raise RowError(f"field 'input' is {type(context).__name__}; it must be text")
    return alpaca_prompt(_string(fields, "instruction"), context)


# GPT-2's vocabulary has no tokens for roles, so they are words, and a turn ends with a line.
_ROLES = {"system": "System: ", "user": "User: ", "assistant": "Assistant: "}


def _chat_parts(messages: Any) -> tuple[Part, ...]:
    """Turns as lines; what the assistant says is learned, and where it stops."""
    if not isinstance(messages, (list, tuple, np.ndarray)) or len(messages) == 0:
        raise RowError("field 'messages' must be a list of one message or more")
    parts: list[Part] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RowError(f"messages[{i}] must hold 'role' and 'content'")
        role, content = _string(message, "role"), _string(message, "content")
        if role not in _ROLES:
            raise RowError(f"messages[{i}]: role {role!r} is not one of {', '.join(_ROLES)}")
        last = i + 1 == len(messages)
        end = "" if last else "\n"  # after the last turn stands eos
        if role == "assistant":
            parts += [(_ROLES[role].rstrip(), False), (f" {content}{end}", True)]
        else:
            parts.append((f"{_ROLES[role]}{content}{end}", False))
    if not any(learned for _, learned in parts):
        raise RowError("no message is the assistant's, so there is nothing to learn")
    return tuple(parts)


# ---------------------------------------------------------------------------- preferences


def _preference_parts(fields: Mapping[str, Any]) -> tuple[Part, ...]:
    """Prompt, chosen and rejected answer."""
    needed = ["chosen", "rejected"]
    if isinstance(fields.get("chosen"), str):
        needed.insert(0, "prompt")  # messages may begin with it
    missing = [name for name in needed if name not in fields]
    if missing:
        raise RowError(
            f"there is no field {', '.join(map(repr, missing))}; there are "
            f"{', '.join(map(repr, fields)) or 'none'}"
        )
    sides = [fields["chosen"], fields["rejected"]]
    are_messages = [isinstance(side, _MESSAGES) for side in sides]
    if are_messages[0] != are_messages[1]:
        raise RowError("'chosen' and 'rejected' must both be text or both messages")
    if all(are_messages):
        shown, answers = _conversations(fields)
    else:
        answers = [_string(fields, name) for name in ("chosen", "rejected")]
        shown = fields["prompt"]
        if isinstance(shown, _MESSAGES):
            shown = _turns(shown) + _ASKED
            answers = [f" {answer}" for answer in answers if answer]
        else:
            shown = _string(fields, "prompt")
    if len(answers) < 2 or not all(answers):
        raise RowError("an answer is empty, so there is nothing to prefer")
    return (shown, False), (answers[0], True), (answers[1], True)


_MESSAGES = (list, tuple, np.ndarray)
_ASKED = _ROLES["assistant"].rstrip()  # what an answer follows


def _conversations(fields: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The prompt's turns, and the two that answer them."""
    chosen, rejected = list(fields["chosen"]), list(fields["rejected"])
    prompt = fields.get("prompt", ())
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    shared = []
    while len(chosen) > 1 and len(rejected) > 1 and chosen[0] == rejected[0]:
        shared.append(chosen.pop(0))
        del rejected[0]
    before = list(prompt) or shared
    if shared and shared != before:
        raise RowError("the answers begin with other messages than those of 'prompt'")
    answers = []
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        is_answer = len(messages) == 1 and isinstance(messages[0], Mapping)
        if not is_answer or messages[0].get("role") != "assistant":
            raise RowError(f"field {name!r} must end with one answer of the assistant")
        content = _string(messages[0], "content")
        answers.append(f" {content}" if content else "")
    return _turns(before) + _ASKED, answers


def _turns(messages: Any) -> str:
    """A conversation's lines."""
    lines = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RowError(f"prompt[{i}] must hold 'role' and 'content'")
        role, content = _string(message, "role"), _string(message, "content")
        if role not in _ROLES:
            raise RowError(f"prompt[{i}]: role {role!r} is not one of {', '.join(_ROLES)}")
        lines.append(f"{_ROLES[role]}{content}\n")
    return "".join(lines)
