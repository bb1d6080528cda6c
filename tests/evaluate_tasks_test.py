"""Rows become questions in the harness's words; answers become figures by definition."""

import json
import math
import pathlib

import pyarrow
import pytest

from neo_jax import tokenizer
from neo_jax.config import ConfigError
from neo_jax.evaluate import tasks
from neo_jax.evaluate.asking import Asker
from neo_jax.evaluate.batching import Request
from neo_jax.evaluate.scoring import Score
from neo_jax.evaluate.tasks import Item, prompts

# One row of each task as its authors publish it, of our own making, and what it asks.
ROWS = {
    "lambada_openai": {"text": "The dog ran home, and we followed the dog"},
    "lambada_standard": {"text": "he gave her the ring , and she took the ring"},
    "piqa": {"goal": "Open a jar.", "sol1": "Turn the lid.", "sol2": "Eat it.", "label": 0},
    "winogrande": {
        "sentence": "The cup did not fit the box since _ was too big.",
        "option1": "the cup",
        "option2": "the box",
        "answer": "1",
    },
    "hellaswag": {
        "ctx_a": "A man [title] holds a rope.",
        "ctx_b": "he",
        "activity_label": "Climbing",
        "endings": ["pulls  it.", "sings [step] a song.", "sleeps.", "melts."],
        "label": "0",
    },
    "arc_easy": {
        "question": "What falls?",
        "choices": {"text": ["rain", "hills"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "arc_challenge": {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "steam", "snow"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "mathqa": {
        "Problem": "two and two ?",
        "options": "a ) 3 , b ) 4 , c ) 5 , d ) 6 , e ) none of these",
        "correct": "b",
    },
    "pubmedqa": {
        "CONTEXTS": ["Mice ate.", "They grew."],
        "QUESTION": "Does food help?",
        "final_decision": "yes",
    },
    "wikitext": {"page": " = Tea = \n\n Tea , a drink ( hot ) , costs 1 @.@ 5 . \n"},
}
FILES = {
    "lambada_openai": "lambada/lambada_test.openai.jsonl",
    "lambada_standard": "lambada/lambada_test_plain_text.txt",
    "piqa": "piqa.validation.jsonl",
    "winogrande": "winogrande/winogrande_xl/validation/data-00000-of-00001.arrow",
    "hellaswag": "HellaSwag/val.jsonl",
    "arc_easy": "ARC-Easy/test.jsonl",
    "arc_challenge": "ARC-Challenge/validation.jsonl",
    "mathqa": "math_qa.jsonl",
    "pubmedqa": "pubmed_qa_labeled.jsonl",
    "wikitext": "wikitext/wiki.test.raw",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Every task's file by a name that is in use, with its one row."""
    root = tmp_path_factory.mktemp("benchmarks")
    for task, name in FILES.items():
        path, row = root / name, ROWS[task]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".arrow":
            (path.parent / "dataset_info.json").write_text("{}")  # as `datasets` leaves it
            table = pyarrow.Table.from_pylist([row])
            with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)
        elif path.suffix in (".txt", ".raw"):
            path.write_text("".join(row.values()))  # type: ignore[arg-type]
        else:
            path.write_text(json.dumps(row) + "\n")
    return root


@pytest.mark.parametrize("name", FILES)
def test_each_task_finds_its_file_and_asks(folder: pathlib.Path, name: str) -> None:
    items, data = tasks.load(tasks.find(name), folder)
    assert data == str(folder / FILES[name])
    assert items == [tasks.find(name).parse(ROWS[name])]


def test_questions_are_worded_so() -> None:
    parse = {name: tasks.find(name).parse(row) for name, row in ROWS.items()}
    assert parse["lambada_openai"].pairs == (
        ("The dog ran home, and we followed the", " dog"),
    )
    assert parse["piqa"] == Item(
        (
            ("Question: Open a jar.\nAnswer:", " Turn the lid."),
            ("Question: Open a jar.\nAnswer:", " Eat it."),
        ),
        0,
        ("Turn the lid.", "Eat it."),
    )
    assert parse["winogrande"].pairs[1] == (
        "The cup did not fit the box since the box",
        " was too big.",
    )
    assert parse["hellaswag"].pairs[1] == (
        "Climbing: A man. holds a rope. He",
        " sings a song.",
    )
    assert parse["mathqa"].answers == ("3", "4", "5", "6", "none of these")
    assert parse["mathqa"].gold == 1 and parse["arc_challenge"].gold == 1
    assert parse["wikitext"].pairs[0][1] == " = Tea =\n\nTea, a drink (hot), costs 1.5.\n"


def test_the_gauntlet_s_forms_are_read_too() -> None:
    item = prompts.pubmedqa({"context": "Context: x\nAnswer: ", "continuation": "maybe"})
    assert item.gold == 2 and item.pairs[2] == ("Context: x\nAnswer:", " maybe")
    item = prompts.mathqa({"query": "Q\nAnswer: ", "choices": ["A", "B"], "gold": 1})
    assert item.pairs == (("Q\nAnswer:", " A"), ("Q\nAnswer:", " B"))


def test_pages_begin_at_their_titles() -> None:
    lines = ["", " = One = ", "", " text = more ", " = = Part = = ", " = Two = ", " end "]
    pages = prompts.wikitext_pages(lines)
    assert [page.split("\n")[0] for page in pages] == [" = One = ", " = Two = "]


# ---------------------------------------------------------------------------------- figures


WORDS = tokenizer.load("gpt2")


def asker(nats_of: dict[str, float]) -> Asker:
    """A model that gives each continuation what the table says; 0 is greedy."""

    def score(requests: list[Request]) -> list[Score]:
        texts = [WORDS.decode(r.tokens[-r.num_scored :]) for r in requests]
        return [Score(nats_of[t], nats_of[t] == 0, 0) for t in texts]

    return Asker(score, WORDS, max_seq_len=64)  # type: ignore[arg-type]


def test_choices_are_judged_by_sum_by_character_and_by_byte() -> None:
    nats = {" aa": -3.0, " éé": -2.8, " bbbbbb": -4.5}
    item = prompts.choices("Q", ["aa", "éé", "bbbbbb"], 1)
    # Sums: éé. Per character: −1.5, −1.4, −0.75. Per byte: −1.5, −0.7, −0.75.
    outcome = tasks.run(tasks.find("piqa"), [item], asker(nats), "here")
    assert {name: figure.value for name, figure in outcome.metrics.items()} == {
        "acc": 1.0,
        "acc_norm": 0.0,
        "acc_bytes": 1.0,
    }
    three = [prompts.choices("Q", ["aa", "éé", "bbbbbb"], gold) for gold in (1, 1, 2)]
    acc = tasks.run(tasks.find("piqa"), three, asker(nats), "here").metrics["acc"]
    assert acc.value == pytest.approx(2 / 3)
    assert acc.stderr == pytest.approx(math.sqrt(2 / 9 * 3 / 2) / math.sqrt(3))


def test_last_words() -> None:
    items = [prompts.lambada({"text": text}) for text in ("a b", "a c", "a d")]
    nats = {" b": 0.0, " c": -1.0, " d": -2.0}
    outcome = tasks.run(tasks.find("lambada_openai"), items, asker(nats), "here")
    assert outcome.metrics["acc"].value == pytest.approx(1 / 3)
    assert outcome.metrics["perplexity"].value == pytest.approx(math.e)
    assert outcome.metrics["perplexity"].stderr == pytest.approx(math.e / math.sqrt(3))


def test_sentences_are_compared_whole_and_by_group() -> None:
    rows = [
        {"sent_more": "one", "sent_less": "two", "bias_type": "age"},
        {"stereotype": "three", "anti_stereotype": "four", "group": "gender"},
    ]
    nats = {"one": -1.0, "two": -4.0, "three": -5.0, "four": -4.0}
    items = [prompts.sentence_pair(row) for row in rows]
    outcome = tasks.run(tasks.find("crows_pairs_english"), items, asker(nats), "here")
    assert outcome.metrics["pct_stereotype"].value == 0.5
    assert outcome.metrics["likelihood_diff"].value == 2.0
    assert outcome.groups["age"]["pct_stereotype"].value == 1.0
    assert outcome.groups["gender"]["likelihood_diff"].value == 1.0


def test_stereoset_weighs_sense_and_fairness() -> None:
    def row(context: str, *sentences: str) -> dict[str, object]:
        labels = ("stereotype", "anti-stereotype", "unrelated")
        each = [
            {"sentence": s, "gold_label": label}
            for s, label in zip(sentences, labels, strict=True)
        ]
        return {"context": context, "bias_type": "race", "sentences": each}

    items = [
        prompts.stereoset(row("A BLANK.", "one", "two", "three")),
        prompts.stereoset(row("Context.", "four", "five", "six")),
    ]
    assert items[0].pairs[0] == ("", "one") and items[1].pairs[0] == ("Context.", " four")
    nats = {
        "one": -1.0,
        "two": -2.0,
        "three": -3.0,
        " four": -3.0,
        " five": -1.0,
        " six": -2.0,
    }
    outcome = tasks.run(tasks.find("stereoset"), items, asker(nats), "here")
    values = {name: figure.value for name, figure in outcome.metrics.items()}
    assert values == {"stereotype_score": 0.5, "language_score": 0.75, "icat": 0.75}


def test_lists_of_bias_are_read_as_their_authors_publish_them(tmp_path: pathlib.Path) -> None:
    labels = ("unrelated", "stereotype", "anti-stereotype")
    sentences = [{"sentence": f"It is {label}.", "gold_label": label} for label in labels]
    row = {"context": "It is BLANK.", "bias_type": "race", "sentences": sentences}
    lists = {"intersentence": [{**row, "context": "So."}], "intrasentence": [row]}
    whole = {"version": "1", "data": lists}
    (tmp_path / "stereoset_dev.json").write_text(json.dumps(whole, indent=4))
    items, _ = tasks.load(tasks.find("stereoset"), tmp_path)
    assert [item.pairs[0] for item in items] == [
        ("So.", " It is stereotype."),
        ("", "It is stereotype."),
    ]
    head = ",sent_more,sent_less,stereo_antistereo,bias_type"
    line = '0,"He said, ""no"".",She agreed.,stereo,gender'
    (tmp_path / "crows_pairs_anonymized.csv").write_text(f"{head}\n{line}\n")
    (item,), _ = tasks.load(tasks.find("crows_pairs_english"), tmp_path)
    assert item.pairs == (("", 'He said, "no".'), ("", "She agreed."))
    assert item.group == "gender"


def test_without_a_folder_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, config: str | None, *, split: str) -> list[dict[str, object]]:
        asked.append((path, config, split))
        return [ROWS["piqa"]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    items, data = tasks.load(tasks.find("piqa"), None)
    assert asked == [("baber/piqa", None, "validation")] and data == "hub baber/piqa"
    assert items == [prompts.piqa(ROWS["piqa"])]
    with pytest.raises(ConfigError, match="'winobias' is on no hub; name a folder"):
        tasks.load(tasks.find("winobias"), None)

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match=r"cannot be had \(Couldn't reach the Hub\)"):
        tasks.load(tasks.find("piqa"), None)


# --------------------------------------------------------------------------------- mistakes


def test_an_unknown_task_is_told_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="'lambada_opnai' is unknown; did you mean lambada_"):
        tasks.find("lambada_opnai")


def test_missing_data_is_told_with_what_was_looked_for(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"none of 1 data files under .*: piqa \+ val"):
        tasks.load(tasks.find("piqa"), tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        tasks.load(tasks.find("piqa"), tmp_path / "gone")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"goal": "x"}, "no field 'sol1'"),
        ({"goal": "x", "sol1": "a", "sol2": "b", "label": 2}, "number 2 of 2"),
    ],
)
def test_a_row_of_another_form_is_told(
    tmp_path: pathlib.Path, row: dict[str, object], reason: str
) -> None:
    path = tmp_path / "piqa.validation.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=rf"row 0: not of the form of 'piqa': .*{reason}"):
        tasks.load(tasks.find("piqa"), tmp_path)


def test_an_own_file_is_asked_by_its_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"query": "Q: ", "choices": ["a", "b"], "gold": 1}) + "\n")
    items, data = tasks.load(tasks.find(f"mc:{path}"), None)
    assert items[0].pairs[1] == ("Q:", " b") and data == str(path)
    path.write_text("")
    with pytest.raises(ConfigError, match="holds no rows"):
        tasks.load(tasks.find(f"mc:{path}"), None)
