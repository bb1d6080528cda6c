"""The official metrics of GLUE and SuperGLUE.

Enters: examples with their labels, and predictions: a place in the task's labels, a number
for STS-B, a choice's place for COPA and ReCoRD. Leaves: figures by name, from 0 to 1
(correlations from -1), as the two benchmarks define them; the arithmetic is scikit-learn's and
scipy's.

    matthews_correlation  CoLA, AX, AX-b
    accuracy              the share of right labels
    f1                    of the positive class, label 1; MultiRC's F1a, over all answers
    macro_f1              CB: the mean of the classes' F1, each alike
    pearson, spearman     STS-B
    exact_match_by_group  MultiRC's EM: questions of which every answer is judged right
    best_f1, best_exact_match  ReCoRD: the best over the accepted answers, word by word, after
                          SQuAD's normalisation
    gender_parity         AX-g: pairs that differ in gender only and are labelled alike

Sources: Wang et al. 2018 (arXiv:1804.07461) section 3; Wang et al. 2019 (arXiv:1905.00537)
section 3 and appendix B; Khashabi et al. 2018, MultiRC; Rajpurkar et al. 2016 (SQuAD),
evaluate-v1.1 for the normalisation; Rudinger et al. 2018 for parity.
"""

from __future__ import annotations

import collections
import re
import statistics
import string
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from neo_jax.evaluate.glue.tasks import Example, Task

Prediction = int | float
_Metric = Callable[[Sequence[Example], Sequence[Prediction]], float]


def scores(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction]
) -> dict[str, float]:
    """The task's metrics, and `score`, their mean, which enters the suite's average.

    Raises:
      ValueError: another number of predictions than of examples, or an example without label.
    """
    if len(examples) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(examples)} examples.")
    if any(e.label is None and not e.accepted for e in examples):
        raise ValueError(f"{task.title}: some examples have no label; nothing to score.")
    figures = {name: float(METRICS[name](examples, predictions)) for name in task.metrics}
    return {**figures, "score": statistics.fmean(figures.values())}


def suite_score(by_task: Mapping[str, Mapping[str, float]]) -> float:
    """The mean of tasks' scores: MNLI's halves are one task, diagnostics do not count."""
    scores_of = {name: figures["score"] for name, figures in by_task.items()}
    mnli = [scores_of.pop(name) for name in list(scores_of) if name.startswith("mnli_")]
    if mnli:
        scores_of["mnli"] = statistics.fmean(mnli)
    counted = [score for name, score in scores_of.items() if name not in ("ax", "axb", "axg")]
    return statistics.fmean(counted)


def _labels(examples: Sequence[Example]) -> np.ndarray:
    return np.asarray([example.label for example in examples])


def _sklearn(name: str, **settings: object) -> _Metric:
    def metric(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
        from sklearn import metrics  # a second to import, and only here it is wanted

        return getattr(metrics, name)(_labels(examples), np.asarray(predictions), **settings)

    return metric


def _scipy(name: str) -> _Metric:
    def metric(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
        from scipy import stats

        if len(set(predictions)) == 1:
            return 0.0  # a constant says nothing; scipy would give NaN
        return getattr(stats, name)(_labels(examples), np.asarray(predictions)).statistic

    return metric


def _exact_match_by_group(
    examples: Sequence[Example], predictions: Sequence[Prediction]
) -> float:
    right: dict[object, bool] = collections.defaultdict(lambda: True)
    for example, prediction in zip(examples, predictions, strict=True):
        right[example.group] &= example.label == prediction
    return statistics.fmean(right.values())


def _gender_parity(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
    of_pair: dict[object, set[Prediction]] = collections.defaultdict(set)
    for example, prediction in zip(examples, predictions, strict=True):
        of_pair[example.group].add(prediction)
    return statistics.fmean(len(labels) == 1 for labels in of_pair.values())


def _best(compare: Callable[[str, str], float]) -> _Metric:
    def metric(examples: Sequence[Example], predictions: Sequence[Prediction]) -> float:
        return statistics.fmean(
            max(compare(example.choices[int(choice)], answer) for answer in example.accepted)
            for example, choice in zip(examples, predictions, strict=True)
        )

    return metric


def words_of(answer: str) -> list[str]:
    """An answer's words after SQuAD's normalisation: no case, punctuation or articles."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def word_f1(answer: str, accepted: str) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetition."""
    ours, theirs = words_of(answer), words_of(accepted)
    common = sum((collections.Counter(ours) & collections.Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def _same_words(answer: str, accepted: str) -> float:
    return float(words_of(answer) == words_of(accepted))


METRICS: Mapping[str, _Metric] = {
    "matthews_correlation": _sklearn("matthews_corrcoef"),
    "accuracy": _sklearn("accuracy_score"),
    "f1": _sklearn("f1_score", zero_division=0.0),
    "macro_f1": _sklearn("f1_score", average="macro", zero_division=0.0),
    "pearson": _scipy("pearsonr"),
    "spearman": _scipy("spearmanr"),
    "exact_match_by_group": _exact_match_by_group,
    "best_f1": _best(word_f1),
    "best_exact_match": _best(_same_words),
    "gender_parity": _gender_parity,
}


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) over seeds; 0 for a single one."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
