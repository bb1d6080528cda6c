"""GLUE and SuperGLUE: official files in, official metrics, official files out."""

import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from neo_jax.config import ConfigError
from neo_jax.evaluate.glue import metrics, reading, submission, tasks
from neo_jax.evaluate.glue.tasks import TASKS, Example, Task

# One labelled row of each official file, in its official form, and the label's name.
TSV: dict[str, tuple[str, str, str]] = {
    "cola": ("", "gj04\t0\t*\tHim sleeps.", "unacceptable"),
    "sst2": ("sentence\tlabel", "a fine film \t1", "positive"),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t7\t8\tHe said "yes".\tYes, he said.',
        "equivalent",
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "3\t4\t5\tWhy?\tHow?\t0",
        "not_duplicate",
    ),
    "mnli_matched": (
        "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label",
        "4\t1\tIt rains.\tIt is wet.\tneutral\tentailment",
        "entailment",
    ),
    "mnli_mismatched": (
        "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label",
        "4\t1\tIt rains.\tIt is dry.\tneutral\tcontradiction",
        "contradiction",
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        "2\tWho came?\tShe left.\tnot_entailment",
        "not_entailment",
    ),
    "rte": ("index\tsentence1\tsentence2\tlabel", "9\tA b.\tB.\tentailment", "entailment"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "9\tA b.\tB.\t0", "not_entailment"),
}
JSONL: dict[str, tuple[dict[str, Any], str]] = {
    "boolq": ({"question": "is it", "passage": "It is.", "idx": 3, "label": True}, "True"),
    "cb": (
        {"premise": "p", "hypothesis": "h", "label": "neutral", "idx": 3},
        "neutral",
    ),
    "super_rte": (
        {"premise": "p", "hypothesis": "h", "label": "not_entailment", "idx": 3},
        "not_entailment",
    ),
    "wic": (
        {"word": "bank", "sentence1": "a", "sentence2": "b", "idx": 3, "label": False},
        "False",
    ),
    "wsc": (
        {
            "text": "Ann met Eve when she came.",
            "target": {
                "span1_index": 0,
                "span2_index": 4,
                "span1_text": "Ann",
                "span2_text": "she",
            },
            "idx": 3,
            "label": True,
        },
        "True",
    ),
    "axb": (
        {"sentence1": "a", "sentence2": "b", "idx": 3, "label": "not_entailment"},
        "not_entailment",
    ),
    "axg": (
        {"premise": "a", "hypothesis": "b", "idx": 3, "label": "entailment", "pair_id": 1},
        "entailment",
    ),
}


def write(task: Task, text: str, folder: pathlib.Path, split: str = "validation") -> None:
    split = split if split in task.files else "test"
    name = task.files[split][0].split("+")[0]
    (folder / task.folders[0]).mkdir(exist_ok=True)
    (folder / task.folders[0] / name).write_text(text)


def read(task: Task, folder: pathlib.Path) -> list[Example]:
    return reading.read(task, "validation" if "validation" in task.files else "test", folder)


@pytest.mark.parametrize("name", TSV)
def test_official_tables_are_read_with_their_own_labels(
    name: str, tmp_path: pathlib.Path
) -> None:
    header, row, label = TSV[name]
    write(TASKS[name], "\n".join(filter(None, [header, row])) + "\n", tmp_path)
    (example,) = read(TASKS[name], tmp_path)
    assert TASKS[name].labels[int(example.label or 0)] == label
    assert all(example.fields.values())


@pytest.mark.parametrize("name", JSONL)
def test_official_json_lines_are_read_with_their_own_labels(
    name: str, tmp_path: pathlib.Path
) -> None:
    row, label = JSONL[name]
    unlabelled = {key: value for key, value in row.items() if key != "label"}
    write(TASKS[name], f"{json.dumps(row)}\n{json.dumps(unlabelled)}\n", tmp_path)
    known, unknown = read(TASKS[name], tmp_path)
    assert TASKS[name].labels[int(known.label or 0)] == label
    assert known.index == 3 and unknown.label is None


def test_a_quote_is_a_character_like_any_other(tmp_path: pathlib.Path) -> None:
    write(TASKS["sst2"], 'sentence\tlabel\n" a "b\t1\nc\t0\n', tmp_path)
    first, second = read(TASKS["sst2"], tmp_path)
    assert first.fields["sentence"] == '" a "b' and second.fields["sentence"] == "c"


def test_scores_are_numbers(tmp_path: pathlib.Path) -> None:
    text = "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.800\n"
    write(TASKS["stsb"], text, tmp_path)
    assert read(TASKS["stsb"], tmp_path)[0].label == 3.8
    write(TASKS["stsb"], text.replace("3.800", "7"), tmp_path)
    with pytest.raises(ConfigError, match=r"dev.tsv:2: score '7'"):
        read(TASKS["stsb"], tmp_path)


MULTIRC = {
    "idx": 5,
    "passage": {
        "text": "A cat sat.",
        "questions": [
            {
                "question": "Who sat?",
                "idx": 8,
                "answers": [
                    {"text": "a cat", "idx": 21, "label": 1},
                    {"text": "a dog", "idx": 22, "label": 0},
                ],
            },
            {"question": "When?", "idx": 9, "answers": [{"text": "x", "idx": 23, "label": 0}]},
        ],
    },
}
RECORD = {
    "idx": 2,
    "passage": {
        "text": "Ann met Eve.\n@highlight\nThey spoke.",
        "entities": [{"start": 8, "end": 10}, {"start": 0, "end": 2}],
    },
    "qas": [
        {"query": "It was @placeholder who left.", "idx": 40, "answers": [{"text": "Eve"}]}
    ],
}
COPA = {
    "premise": "It rained.",
    "choice1": "The road got wet.",
    "choice2": "I sang.",
    "question": "effect",
    "label": 0,
    "idx": 6,
}


def test_nested_files_become_an_example_an_answer(tmp_path: pathlib.Path) -> None:
    write(TASKS["multirc"], json.dumps(MULTIRC), tmp_path)
    examples = read(TASKS["multirc"], tmp_path)
    assert [e.index for e in examples] == [(5, 8, 21), (5, 8, 22), (5, 9, 23)]
    assert [e.label for e in examples] == [1, 0, 0]
    assert [e.group for e in examples] == [(5, 8), (5, 8), (5, 9)]


def test_record_chooses_among_the_entities_of_the_passage(tmp_path: pathlib.Path) -> None:
    task = TASKS["record"]
    write(task, json.dumps(RECORD), tmp_path)
    (example,) = read(task, tmp_path)
    assert example.choices == ("Ann", "Eve") and example.label == 1
    assert task.asked(example).endswith("They spoke.\nIt was ")
    assert task.continuations(example) == ("Ann who left.", "Eve who left.")
    assert task.text(example, 0).endswith("answer: It was Ann who left.")


@pytest.mark.parametrize(("kind", "word"), [("effect", "so"), ("cause", "because")])
def test_copa_asks_for_a_cause_or_an_effect(
    kind: str, word: str, tmp_path: pathlib.Path
) -> None:
    task = TASKS["copa"]
    write(task, json.dumps({**COPA, "question": kind}), tmp_path)
    (example,) = read(task, tmp_path)
    assert task.asked(example) == f"It rained {word}"
    assert task.continuations(example) == (" the road got wet.", " I sang.")
    assert example.label == 0


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_label_has_an_answer_and_every_question_its_fields(name: str) -> None:
    task = TASKS[name]
    if task.labels:
        assert len(task.answers) == len(task.labels) == task.num_outputs
        assert len(set(task.answers)) == len(task.answers)
    assert all(answer.startswith(" ") for answer in task.answers)
    assert not task.question.endswith(" ")  # the answers bring their own space
    assert all(metric in metrics.METRICS for metric in task.metrics)


def test_three_way_labels_stand_in_their_official_order() -> None:
    """A head's outputs are numbered by it, and the two suites do not agree."""
    assert TASKS["cb"].labels == ("entailment", "contradiction", "neutral")
    for name in ("mnli_matched", "mnli_mismatched", "ax"):
        assert TASKS[name].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["wnli"].labels == TASKS["rte"].labels[::-1]


# ------------------------------------------------------------------------------- mistakes


def test_mistakes_in_files_are_told_in_one_line(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"SST-2: no validation file found; tried .*dev.tsv"):
        read(TASKS["sst2"], tmp_path)
    write(TASKS["sst2"], "text\tlabel\nx\t1\n", tmp_path)
    with pytest.raises(ConfigError, match=r"dev.tsv:2: no column 'sentence'; there are text"):
        read(TASKS["sst2"], tmp_path)
    write(TASKS["sst2"], "sentence\tlabel\nx\t2\n", tmp_path)
    with pytest.raises(ConfigError, match=r"dev.tsv:2: label '2' is not one of 0 … 1"):
        read(TASKS["sst2"], tmp_path)
    write(TASKS["cb"], '{"premise": "p", "hypothesis": "h", "label": "perhaps"}', tmp_path)
    with pytest.raises(ConfigError, match=r"val.jsonl:1: label 'perhaps' is not one of ent"):
        read(TASKS["cb"], tmp_path)
    write(TASKS["cb"], "{", tmp_path)
    with pytest.raises(ConfigError, match=r"val.jsonl:1: not valid JSON"):
        read(TASKS["cb"], tmp_path)
    write(TASKS["cb"], "", tmp_path)
    with pytest.raises(ConfigError, match=r"CB: the validation split in .* is empty"):
        read(TASKS["cb"], tmp_path)
    with pytest.raises(ConfigError, match="AX-b has no split 'train'; there are test"):
        reading.read(TASKS["axb"], "train", tmp_path)


def test_tasks_are_found_by_any_of_their_names() -> None:
    for name in ("SST-2", "sst2", "glue/sst2", "sst_2"):
        assert tasks.find(name) is TASKS["sst2"]
    assert tasks.find("MNLI") is TASKS["mnli_matched"]
    assert tasks.find("super_glue/rte") is TASKS["super_rte"]
    assert tasks.find("AX-b") is TASKS["axb"] and tasks.find("AX") is TASKS["ax"]
    with pytest.raises(ConfigError, match="'bolq' is unknown; did you mean 'boolq'"):
        tasks.find("bolq")
    assert len(tasks.suite("glue")) == 11 and len(tasks.suite("super_glue")) == 10


# ------------------------------------------------------------------------------- metrics


def examples(labels: Any, **more: Any) -> list[Example]:
    return [
        Example(i, {"a": "b"}, label, **{key: values[i] for key, values in more.items()})
        for i, label in enumerate(labels)
    ]


def test_metrics_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 2, 50).tolist(), rng.integers(0, 2, 50).tolist()
    pairs = list(zip(truth, guess, strict=True))
    tp, tn, fp, fn = (float(pairs.count(p)) for p in ((1, 1), (0, 0), (0, 1), (1, 0)))
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.scores(TASKS["cola"], examples(truth), guess) == pytest.approx(
        {"matthews_correlation": mcc, "score": mcc}
    )
    f1, accuracy = 2 * tp / (2 * tp + fp + fn), (tp + tn) / 50
    assert metrics.scores(TASKS["mrpc"], examples(truth), guess) == pytest.approx(
        {"f1": f1, "accuracy": accuracy, "score": (f1 + accuracy) / 2}
    )


def test_macro_f1_weighs_rare_labels_like_common_ones() -> None:
    # Label 2 is never guessed: its F1 is 0 and still a third of the mean.
    scores = metrics.scores(TASKS["cb"], examples([0, 0, 1, 2]), [0, 0, 1, 1])
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_correlations_are_those_of_their_definitions() -> None:
    truth, guess = [0.0, 1.0, 2.5, 5.0], [0.1, 0.2, 9.0, 0.3]
    scores = metrics.scores(TASKS["stsb"], examples(truth), guess)
    assert scores["pearson"] == pytest.approx(np.corrcoef(truth, guess)[0, 1])
    ranks = np.corrcoef([0, 1, 2, 3], [0, 1, 3, 2])[0, 1]
    assert scores["spearman"] == pytest.approx(ranks)
    assert metrics.scores(TASKS["stsb"], examples(truth), [1.0] * 4)["score"] == 0


def test_multirc_wants_every_answer_of_a_question() -> None:
    asked = examples([1, 0, 1, 1], group=["a", "a", "b", "b"])
    scores = metrics.scores(TASKS["multirc"], asked, [1, 0, 1, 0])
    assert scores["exact_match_by_group"] == 0.5
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 0 + 1))


def test_record_takes_the_best_of_the_accepted_answers() -> None:
    asked = examples(
        [0], choices=[("The White House", "Congress")], accepted=[("white house", "Obama")]
    )
    right = metrics.scores(TASKS["record"], asked, [0])
    assert right["best_f1"] == right["best_exact_match"] == 1
    assert metrics.scores(TASKS["record"], asked, [1])["score"] == 0
    assert metrics.word_f1("house white blue", "white house") == pytest.approx(0.8)


def test_parity_counts_pairs_that_are_labelled_alike() -> None:
    pairs = examples([0, 0, 1, 1], group=[7, 7, 8, 8])
    scores = metrics.scores(TASKS["axg"], pairs, [0, 1, 1, 1])
    assert scores["gender_parity"] == 0.5 and scores["accuracy"] == 0.75


def test_a_suites_score_counts_mnli_once_and_no_diagnostics() -> None:
    by_task = {
        "cola": {"score": 0.2},
        "mnli_matched": {"score": 0.5},
        "mnli_mismatched": {"score": 0.7},
        "ax": {"score": 0.9},
    }
    assert metrics.suite_score(by_task) == pytest.approx((0.2 + 0.6) / 2)


def test_what_has_no_label_is_not_scored() -> None:
    with pytest.raises(ValueError, match="no label"):
        metrics.scores(TASKS["cola"], examples([None]), [0])
    with pytest.raises(ValueError, match="2 predictions for 1 examples"):
        metrics.scores(TASKS["cola"], examples([1]), [0, 1])


# ------------------------------------------------------------------------------- submission


@pytest.mark.parametrize(
    ("name", "prediction", "line"),
    [
        ("cola", 1, "0\t1"),
        ("stsb", 5.2, "0\t5.000"),
        ("rte", 1, "0\tnot_entailment"),
        ("mnli_mismatched", 2, "0\tcontradiction"),
        ("boolq", 1, '{"idx": 0, "label": "true"}'),
        ("wsc", 0, '{"idx": 0, "label": "False"}'),
        ("copa", 1, '{"idx": 0, "label": 1}'),
        ("record", 1, '{"idx": 0, "label": "Eve"}'),
        ("axg", 0, '{"idx": 0, "label": "entailment"}'),
    ],
)
def test_predictions_are_written_as_the_servers_take_them(
    name: str, prediction: Any, line: str, tmp_path: pathlib.Path
) -> None:
    task = TASKS[name]
    asked = examples([None], choices=[("Ann", "Eve")])
    path = submission.write(task, asked, [prediction], tmp_path / "new")
    *head, last = path.read_text().splitlines()
    assert last == line and path.name == task.submission
    assert head == (["index\tprediction"] if task.suite == "glue" else [])


def test_multirc_is_written_a_passage_a_line(tmp_path: pathlib.Path) -> None:
    task = TASKS["multirc"]
    write(task, json.dumps(MULTIRC), tmp_path)
    path = submission.write(task, read(task, tmp_path), [0, 1, 1], tmp_path)
    assert json.loads(path.read_text()) == {
        "idx": 5,
        "passage": {
            "questions": [
                {"idx": 8, "answers": [{"idx": 21, "label": 0}, {"idx": 22, "label": 1}]},
                {"idx": 9, "answers": [{"idx": 23, "label": 1}]},
            ]
        },
    }


# ------------------------------------------------------------------------------- real files

SIZES = {
    ("glue", "cola"): (8551, 1043),
    ("glue", "sst2"): (67349, 872),
    ("glue", "stsb"): (5749, 1500),
    ("glue", "mrpc"): (4076, 1725),
    ("super_glue", "cb"): (250, 56),
    ("super_glue", "copa"): (400, 100),
    ("super_glue", "multirc"): (27243, 4848),
    ("super_glue", "super_rte"): (2490, 277),
    ("super_glue", "wic"): (5428, 638),
    ("super_glue", "wsc"): (554, 104),
}


@pytest.mark.parametrize(("suite", "name"), SIZES)
def test_published_files_have_their_published_sizes(
    suite: str, name: str, data_folder: pathlib.Path
) -> None:
    for split, size in zip(("train", "validation"), SIZES[suite, name], strict=True):
        examples = reading.read(TASKS[name], split, data_folder / suite)
        assert len(examples) == size
        assert all(example.label is not None for example in examples)


def test_tfds_and_the_official_files_agree_on_labels(data_folder: pathlib.Path) -> None:
    for name, suite in (("cola", "glue"), ("cb", "super_glue")):
        task = TASKS[name]
        ours = reading.read(task, "train", data_folder / suite)
        theirs = reading.read_tfds(task, "train", data_folder / "tfds")
        assert {(*e.fields.values(), e.label) for e in ours} == {
            (*e.fields.values(), e.label) for e in theirs
        }
