"""From a row of a benchmark to what a model is asked.

Enters: a row as its authors (or lm-evaluation-harness, or MosaicML's gauntlet) publish it.
Leaves: an `Item`: pairs of context and continuation, and which of them is right. The words
are those of lm-evaluation-harness's task of the same name, to the space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Row: TypeAlias = Mapping[str, Any]


class Item(NamedTuple):
    """One question.

    `answers` are the choices without what joins them to the context: their lengths in
    characters and bytes normalise `acc_norm` and `acc_bytes`. A last word has one pair.
    Sentences that are compared with each other have empty contexts, the stereotyped one
    first. `group` is the part of the data that it is counted under.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int = 0
    answers: tuple[str, ...] = ()
    group: str = ""


Parse: TypeAlias = Callable[[Row], Item]


def choices(query: str, answers: list[str], gold: int) -> Item:
    """A question whose answers follow it after a space."""
    if not 0 <= gold < len(answers):
        raise ValueError(f"the right answer is number {gold} of {len(answers)}")
    return Item(tuple((query, f" {answer}") for answer in answers), gold, tuple(answers))


def lambada(row: Row) -> Item:
    """All but the last word, then the last word."""
    context, _, word = str(row["text"]).rpartition(" ")
    return Item(((context, f" {word}"),))


def generic(row: Row) -> Item:
    """The form {query, choices, gold}, in which any multiple choice can be written."""
    return choices(str(row["query"]).rstrip(), list(row["choices"]), int(row["gold"]))


def piqa(row: Row) -> Item:
    """Two ways to reach a goal."""
    query = f"Question: {row['goal']}\nAnswer:"
    return choices(query, [row["sol1"], row["sol2"]], int(row["label"]))


def winogrande(row: Row) -> Item:
    """The same ending after either name: what differs is the context."""
    before, _, after = row["sentence"].partition("_")
    options = (before + row["option1"], before + row["option2"])
    ending = f" {after.strip()}"
    return Item(tuple((o, ending) for o in options), int(row["answer"]) - 1, options)


def hellaswag(row: Row) -> Item:
    """Four endings of a scene; marks of the WikiHow part are taken out."""
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    query = _hellaswag_text(f"{row['activity_label']}: {context}")
    return choices(query, [_hellaswag_text(e) for e in row["endings"]], int(row["label"]))


def _hellaswag_text(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def arc(row: Row) -> Item:
    """A question of a school exam; also OpenBookQA's form, where the question is a stem."""
    labels, answers = list(row["choices"]["label"]), list(row["choices"]["text"])
    query = f"Question: {row['question']}\nAnswer:"
    return choices(query, answers, labels.index(row["answerKey"]))


def mathqa(row: Row) -> Item:
    """The authors' form, or {query, choices, gold} with the options in the question."""
    if "query" in row:
        return generic(row)
    found = re.findall(r"[abcd] \) .*?, |e \) .*?$", row["options"])
    answers = [option[4:].rstrip(" ,") for option in found]
    query = f"Question: {row['Problem']}\nAnswer:"
    return choices(query, answers, "abcde".index(row["correct"]))


def pubmedqa(row: Row) -> Item:
    """The authors' form, or {context, continuation} with the options in the context."""
    answers = ["yes", "no", "maybe"]
    if "continuation" in row:
        return choices(row["context"].rstrip(), answers, answers.index(row["continuation"]))
    abstract = "\n".join(row["CONTEXTS"])
    query = f"Abstract: {abstract}\nQuestion: {row['QUESTION']}\nAnswer:"
    return choices(query, answers, answers.index(row["final_decision"]))


# -------------------------------------------------------------------------------- sentences


def sentence_pair(row: Row) -> Item:
    """Two sentences that differ in whom they speak of, as CrowS-Pairs has them.

    Forms: {sent_more, sent_less, bias_type} (Nangia et al. 2020, arXiv:2010.00133), whose
    first sentence is the more stereotyped, and {stereotype, anti_stereotype, group}, into
    which WinoBias's pro- and anti-stereotypical lines go.
    """
    if "sent_more" in row:
        both, group = (row["sent_more"], row["sent_less"]), row.get("bias_type", "")
    else:
        both, group = (row["stereotype"], row["anti_stereotype"]), row.get("group", "")
    return Item(tuple(("", str(sentence)) for sentence in both), group=str(group))


def stereoset(row: Row) -> Item:
    """A stereotype, its opposite and nonsense, in this order.

    Form: {context, bias_type, sentences: [{sentence, gold_label}, …]} of StereoSet (Nadeem et
    al. 2020, arXiv:2004.09456). Where a sentence fills the context's BLANK it is scored
    alone; else it follows the context.
    """
    by_label = {entry["gold_label"]: entry["sentence"] for entry in row["sentences"]}
    context = str(row["context"])
    fills = "BLANK" in context
    pairs = tuple(
        ("", by_label[label]) if fills else (context, f" {by_label[label]}")
        for label in ("stereotype", "anti-stereotype", "unrelated")
    )
    return Item(pairs, group=str(row.get("bias_type", "")))


def stereoset_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of StereoSet's own file too: one object, `data`, with two lists of them."""
    found: list[dict[str, Any]] = []
    for row in rows:
        lists = row["data"].values() if isinstance(row.get("data"), dict) else [[row]]
        found += [dict(one) for each in lists for one in each]
    return found


# ------------------------------------------------------------------------------- WikiText


def wikitext_pages(lines: list[str]) -> list[str]:
    """The articles of a raw WikiText file; a line ` = Title = ` begins one.

    Source: the builder of the data set EleutherAI/wikitext_document_level.
    """
    pages: list[list[str]] = [[]]
    for line in lines:
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    joined = ["\n".join(page) for page in pages]
    return [page for page in joined if page.strip()]


_PLAIN = (
    ("s '", "s'"),
    (r"/' [0-9]/", r"/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_BRACKETS = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def wikitext_detokenized(page: str) -> str:
    """The page as people write: WikiText sets spaces around marks, and `@` into numbers.

    Source: lm-evaluation-harness, lm_eval/tasks/wikitext; order and details are its own.
    """
    for old, new in _PLAIN:
        page = page.replace(old, new) if "/" not in old else re.sub(old, new, page)
    for pattern, new in _BRACKETS:
        page = re.sub(pattern, new, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page
