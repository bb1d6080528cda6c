"""The tasks of GLUE and SuperGLUE: what is asked, in which files, and how it is answered.

Enters: the name of a task. Leaves: a `Task`, the one place that knows its files, columns,
labels in official order, official metrics, and how to put its question to a language model.

Two ways of answering share these texts. With a head, the model reads `Task.text` and a
classifier on its last token gives the label. By likelihood, it reads `Task.question`, and the
label whose `answer` it finds likelier wins. The words of the questions are our own.

Where the choices differ from example to example (COPA, ReCoRD), each choice is a text of its
own that is right or wrong, and the one that looks most right wins.

Sources: Wang et al. 2018, GLUE (arXiv:1804.07461); Wang et al. 2019, SuperGLUE
(arXiv:1905.00537); label orders as in tensorflow-datasets' glue and super_glue, which
tests/glue_tasks_test.py holds against the official files.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Literal

from neo_jax.config import ConfigError

Suite = Literal["glue", "super_glue"]
# How an official file writes a label: its place in `labels`, its name, or a number.
Written = Literal["index", "name", "number"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One question of a task.

    Attributes:
      index: the official number, which submissions repeat; for MultiRC (passage, question,
        answer), for ReCoRD the query's.
      fields: the texts by name, as `Task.fields` lists them.
      label: place in `Task.labels`, in `choices` where there are some, a score for STS-B;
        None where the answer is not published.
      choices: candidates of this example alone (COPA, ReCoRD).
      group: examples that are scored together: MultiRC's questions, AX-g's pairs.
      accepted: all right answers as text (ReCoRD); F1 and exact match are taken over them.
    """

    index: int | tuple[int, int, int]
    fields: Mapping[str, str]
    label: int | float | None
    choices: tuple[str, ...] = ()
    group: str | int | tuple[int, int] | None = None
    accepted: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """What there is to know of one task.

    Attributes:
      name: as TFDS calls it, and as the command line does.
      title: as the papers' tables call it.
      labels: names in official order; empty where the answer is a number or a choice.
      columns: field → names that the official files give it, in order of preference.
      files: split → names of official files below the task's folder.
      folders: names of that folder.
      written: how the official files write labels.
      metrics: names of metrics.py; the suite's own score is their mean.
      submission: the official file of predictions.
      question: a template over `columns`; ends where the answer begins.
      answers: for each label, what follows the question.
    """

    name: str
    title: str
    suite: Suite
    labels: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    files: Mapping[str, tuple[str, ...]]
    folders: tuple[str, ...]
    written: Written
    metrics: tuple[str, ...]
    submission: str
    question: str
    answers: tuple[str, ...]

    @property
    def has_choices(self) -> bool:
        """Whether the candidates differ from example to example."""
        return self.name in ("copa", "record")

    @property
    def is_regression(self) -> bool:
        """Whether the answer is a number."""
        return self.name == "stsb"

    @property
    def num_outputs(self) -> int:
        """Size of a head: a label each, 1 for a number, 2 for choices: wrong and right."""
        return 1 if self.is_regression else 2 if self.has_choices else len(self.labels)

    def text(self, example: Example, choice: int | None = None) -> str:
        """What a head reads: the fields by name, a line each.

        Args:
          example: of this task.
          choice: which of its choices stands there, where it has some.
        """
        lines = [f"{name}: {value}" for name, value in example.fields.items()]
        if choice is not None:
            lines.append(f"answer: {self._chosen(example, choice)}")
        return "\n".join(lines)

    def asked(self, example: Example) -> str:
        """The question put to a language model, up to where the answer begins."""
        return self.question.format(**example.fields, **_connective(self, example))

    def continuations(self, example: Example) -> tuple[str, ...]:
        """What the model may answer, a text for each label or choice, with its space."""
        if self.name == "record":
            # The rest of the sentence is part of the answer, since the gap is inside it.
            _, after = example.fields["query"].split(PLACEHOLDER, 1)
            return tuple(choice + after for choice in example.choices)
        if self.has_choices:
            return tuple(" " + _lower_first(choice) for choice in example.choices)
        return self.answers

    def _chosen(self, example: Example, choice: int) -> str:
        text = example.choices[choice]
        if self.name == "record":
            return example.fields["query"].replace(PLACEHOLDER, text)
        return text


PLACEHOLDER = "@placeholder"  # where ReCoRD's query has its gap


def find(name: str) -> Task:
    """The task called `name`, also by its title: "sst2" and "SST-2" are one.

    Raises:
      ConfigError: there is none; names the nearest.
    """
    of_suite, _, bare = name.lower().rpartition("/")
    key = bare.replace("-", "").replace("_", "")
    key = "superrte" if (of_suite, key) == ("super_glue", "rte") else _ALIASES.get(key, key)
    by_key = {task.name.replace("_", ""): task for task in TASKS.values()}
    if key in by_key:
        return by_key[key]
    near = difflib.get_close_matches(key, by_key, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TASKS)}."
    raise ConfigError(f"classification task {name!r} is unknown; {hint}")


def suite(name: Suite) -> tuple[Task, ...]:
    """All tasks of a suite, in the order of its table."""
    return tuple(task for task in TASKS.values() if task.suite == name)


def _connective(task: Task, example: Example) -> dict[str, str]:
    """COPA asks for a cause or an effect; ReCoRD's question ends at its gap."""
    if task.name == "copa":
        word = "because" if example.fields["question"] == "cause" else "so"
        return {"sentence": example.fields["premise"].rstrip(" .") + " " + word}
    if task.name == "record":
        return {"before": example.fields["query"].split(PLACEHOLDER, 1)[0]}
    return {}


def _lower_first(text: str) -> str:
    # "I" and names stay as they are wherever a second capital or a lone I shows them.
    first = text.split(" ", 1)[0]
    return text if first == "I" or first.startswith("I'") else text[:1].lower() + text[1:]


def _tsv(train: str, validation: str, test: str) -> Mapping[str, tuple[str, ...]]:
    return {"train": (train,), "validation": (validation,), "test": (test,)}


_TSV = _tsv("train.tsv", "dev.tsv", "test.tsv")
_JSONL: Mapping[str, tuple[str, ...]] = {
    "train": ("train.jsonl",),
    "validation": ("val.jsonl", "dev.jsonl", "validation.jsonl"),
    "test": ("test.jsonl",),
}
_ENTAILMENT = ("entailment", "not_entailment")
_THREE_WAY_ANSWERS = (" yes", " maybe", " no")
_YES_NO = (" yes", " no")
_NO_YES = (" no", " yes")
_PREMISE = {
    "premise": ("premise", "sentence1"),
    "hypothesis": ("hypothesis", "sentence2"),
}
_PAIR = {"sentence1": ("sentence1",), "sentence2": ("sentence2",)}
_FOLLOWS = "{premise}\nQuestion: does it follow that {hypothesis}\nAnswer (yes or no):"
_FOLLOWS_OR_NOT = (
    "{premise}\nQuestion: does it follow that {hypothesis}\nAnswer (yes, no or maybe):"
)
_FOLLOWS_PAIR = "{sentence1}\nQuestion: does it follow that {sentence2}\nAnswer (yes or no):"
_MNLI_COLUMNS = {
    "premise": ("sentence1", "premise"),
    "hypothesis": ("sentence2", "hypothesis"),
}


_GLUE = (
    Task(
        "cola", "CoLA", "glue", ("unacceptable", "acceptable"),
        {"sentence": ("sentence",)},
        {
            "train": ("train.tsv", "in_domain_train.tsv"),
            "validation": ("dev.tsv", "in_domain_dev.tsv+out_of_domain_dev.tsv"),
            "test": ("test.tsv",),
        },
        ("CoLA",), "index", ("matthews_correlation",), "CoLA.tsv",
        "Sentence: {sentence}\nQuestion: is this grammatical English?\n"
        "Answer (yes or no):",
        _NO_YES,
    ),
    Task(
        "sst2", "SST-2", "glue", ("negative", "positive"),
        {"sentence": ("sentence",)}, _TSV, ("SST-2", "SST2"), "index", ("accuracy",),
        "SST-2.tsv", "Review: {sentence}\nThe reviewer found it", (" bad", " good"),
    ),
    Task(
        "mrpc", "MRPC", "glue", ("not_equivalent", "equivalent"),
        {"sentence1": ("#1 String", "sentence1"), "sentence2": ("#2 String", "sentence2")},
        {
            "train": ("train.tsv", "msr_paraphrase_train.txt"),
            "validation": ("dev.tsv", "msr_paraphrase_test.txt"),
            "test": ("test.tsv",),
        },
        ("MRPC",), "index", ("f1", "accuracy"), "MRPC.tsv",
        "First: {sentence1}\nSecond: {sentence2}\nQuestion: do both say the same?\n"
        "Answer (yes or no):", _NO_YES,
    ),
    Task(
        "qqp", "QQP", "glue", ("not_duplicate", "duplicate"),
        {"question1": ("question1",), "question2": ("question2",)}, _TSV, ("QQP",),
        "index", ("f1", "accuracy"), "QQP.tsv",
        "First: {question1}\nSecond: {question2}\nQuestion: do both ask the same?\n"
        "Answer (yes or no):", _NO_YES,
    ),
    Task(
        "stsb", "STS-B", "glue", (), _PAIR, _TSV, ("STS-B", "STSB"), "number",
        ("pearson", "spearman"), "STS-B.tsv",
        "First: {sentence1}\nSecond: {sentence2}\n"
        "How alike are they, from 0 to 5?\nAnswer:",
        (" 0", " 1", " 2", " 3", " 4", " 5"),
    ),
    Task(
        "mnli_matched", "MNLI-m", "glue", ("entailment", "neutral", "contradiction"),
        _MNLI_COLUMNS, _tsv("train.tsv", "dev_matched.tsv", "test_matched.tsv"), ("MNLI",),
        "name", ("accuracy",), "MNLI-m.tsv",
        _FOLLOWS_OR_NOT, _THREE_WAY_ANSWERS,
    ),
    Task(
        "mnli_mismatched", "MNLI-mm", "glue", ("entailment", "neutral", "contradiction"),
        _MNLI_COLUMNS, _tsv("train.tsv", "dev_mismatched.tsv", "test_mismatched.tsv"),
        ("MNLI",), "name", ("accuracy",), "MNLI-mm.tsv",
        _FOLLOWS_OR_NOT, _THREE_WAY_ANSWERS,
    ),
    Task(
        "qnli", "QNLI", "glue", _ENTAILMENT,
        {"question": ("question",), "sentence": ("sentence",)}, _TSV, ("QNLI",), "name",
        ("accuracy",), "QNLI.tsv",
        "{sentence}\nQuestion: does this answer “{question}”?\nAnswer (yes or no):",
        _YES_NO,
    ),
    Task(
        "rte", "RTE", "glue", _ENTAILMENT, _PAIR, _TSV, ("RTE",), "name", ("accuracy",),
        "RTE.tsv", _FOLLOWS_PAIR, _YES_NO,
    ),
    Task(
        "wnli", "WNLI", "glue", ("not_entailment", "entailment"), _PAIR, _TSV, ("WNLI",),
        "index", ("accuracy",), "WNLI.tsv", _FOLLOWS_PAIR, _NO_YES,
    ),
    Task(
        "ax", "AX", "glue", ("entailment", "neutral", "contradiction"), _MNLI_COLUMNS,
        {"test": ("diagnostic.tsv", "diagnostic-full.tsv", "test.tsv")},
        ("AX", "diagnostic"), "name", ("matthews_correlation",), "AX.tsv",
        _FOLLOWS_OR_NOT, _THREE_WAY_ANSWERS,
    ),
)  # fmt: skip
_SUPER_GLUE = (
    Task(
        "boolq", "BoolQ", "super_glue", ("False", "True"),
        {"passage": ("passage",), "question": ("question",)}, _JSONL, ("BoolQ",), "name",
        ("accuracy",), "BoolQ.jsonl",
        "{passage}\nQuestion: {question}?\nAnswer (yes or no):", _NO_YES,
    ),
    Task(
        "cb", "CB", "super_glue", ("entailment", "contradiction", "neutral"), _PREMISE,
        _JSONL, ("CB",), "name", ("macro_f1", "accuracy"), "CB.jsonl",
        _FOLLOWS_OR_NOT, (" yes", " no", " maybe"),
    ),
    Task(
        "copa", "COPA", "super_glue", (),
        {"premise": ("premise",), "question": ("question",)}, _JSONL, ("COPA",), "index",
        ("accuracy",), "COPA.jsonl", "{sentence}", (),
    ),
    Task(
        "multirc", "MultiRC", "super_glue", ("False", "True"),
        {"paragraph": (), "question": (), "answer": ()}, _JSONL, ("MultiRC",), "index",
        ("f1", "exact_match_by_group"), "MultiRC.jsonl",
        "{paragraph}\nQuestion: {question}\nProposed: {answer}\nIs that right?\n"
        "Answer (yes or no):", _NO_YES,
    ),
    Task(
        "record", "ReCoRD", "super_glue", (), {"passage": (), "query": ()}, _JSONL,
        ("ReCoRD",), "index", ("best_f1", "best_exact_match"), "ReCoRD.jsonl",
        "{passage}\n{before}", (),
    ),
    Task(
        "super_rte", "RTE", "super_glue", _ENTAILMENT, _PREMISE, _JSONL, ("RTE",), "name",
        ("accuracy",), "RTE.jsonl", _FOLLOWS, _YES_NO,
    ),
    Task(
        "wic", "WiC", "super_glue", ("False", "True"),
        {
            "word": ("word",),
            "sentence1": ("sentence1",),
            "sentence2": ("sentence2",),
        },
        _JSONL, ("WiC",), "name", ("accuracy",), "WiC.jsonl",
        "{sentence1}\n{sentence2}\nQuestion: does “{word}” mean the same in both?\n"
        "Answer (yes or no):", _NO_YES,
    ),
    Task(
        "wsc", "WSC", "super_glue", ("False", "True"),
        {"text": (), "pronoun": (), "noun": ()}, _JSONL, ("WSC",), "name", ("accuracy",),
        "WSC.jsonl",
        "{text}\nQuestion: does “{pronoun}” stand for “{noun}”?\nAnswer (yes or no):",
        _NO_YES,
    ),
    Task(
        "axb", "AX-b", "super_glue", _ENTAILMENT, _PAIR,
        {"test": ("AX-b.jsonl", "test.jsonl")}, ("AX-b",), "name",
        ("matthews_correlation",), "AX-b.jsonl", _FOLLOWS_PAIR, _YES_NO,
    ),
    Task(
        "axg", "AX-g", "super_glue", _ENTAILMENT, _PREMISE,
        {"test": ("AX-g.jsonl", "test.jsonl")}, ("AX-g",), "name",
        ("accuracy", "gender_parity"), "AX-g.jsonl", _FOLLOWS, _YES_NO,
    ),
)  # fmt: skip
TASKS: Mapping[str, Task] = types.MappingProxyType(
    {task.name: task for task in (*_GLUE, *_SUPER_GLUE)}
)
# Titles that are not their task's name once "-", "_" and case are put aside.
_ALIASES: Mapping[str, str] = types.MappingProxyType(
    {"mnli": "mnlimatched", "mnlim": "mnlimatched", "mnlimm": "mnlimismatched"}
)
