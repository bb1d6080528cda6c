"""What any model of a task should be held against: the commonest label, and words alone.

Enters: a task with its training and validation examples. Leaves: predictions as
evaluate/glue/metrics.py takes them. The second is scikit-learn's TF-IDF over words and pairs
of words with a logistic regression, or a ridge regression for STS-B, at their defaults; it
reads what a head reads, a choice at a time where choices differ.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Sequence

import numpy as np

from neo_jax.evaluate.glue.metrics import Prediction
from neo_jax.evaluate.glue.tasks import Example, Task


def majority(
    task: Task, training: Sequence[Example], asked: Sequence[Example]
) -> list[Prediction]:
    """The commonest label of the training split for all; its mean where it is a number."""
    known = [example.label for example in training if example.label is not None]
    if task.is_regression:
        return [statistics.fmean(known)] * len(asked)
    ((label, _),) = collections.Counter(known).most_common(1)
    return [min(int(label), len(one.choices) - 1) if one.choices else label for one in asked]


def words_alone(
    task: Task, training: Sequence[Example], asked: Sequence[Example], seed: int = 0
) -> list[Prediction]:
    """TF-IDF and a linear model."""
    from sklearn import linear_model
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, labels = _rows(task, [one for one in training if one.label is not None])
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    features = vectors.fit_transform(texts)
    if task.is_regression:
        numbers = linear_model.Ridge().fit(features, labels)
        return [float(x) for x in numbers.predict(vectors.transform(_rows(task, asked)[0]))]
    model = linear_model.LogisticRegression(max_iter=1000, random_state=seed)
    model.fit(features, labels)
    probabilities = model.predict_proba(vectors.transform(_rows(task, asked)[0]))
    if not task.has_choices:
        return [int(model.classes_[best]) for best in probabilities.argmax(-1)]
    ends = np.cumsum([len(one.choices) for one in asked])[:-1]
    return [int(part.argmax()) for part in np.split(probabilities[:, -1], ends)]


def _rows(task: Task, examples: Sequence[Example]) -> tuple[list[str], list[int | float]]:
    """Texts, and their labels (0 where none is known)."""
    if not task.has_choices:
        return [task.text(one) for one in examples], [one.label or 0 for one in examples]
    pairs = [(one, choice) for one in examples for choice in range(len(one.choices))]
    return (
        [task.text(one, choice) for one, choice in pairs],
        [int(choice == one.label) for one, choice in pairs],
    )
