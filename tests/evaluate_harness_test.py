"""Inside lm-evaluation-harness the model answers as transformers' does; asks are its own."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

import datasets  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from evaluate_tasks_test import FILES, ROWS, folder  # noqa: E402, F401
from neo_jax import tokenizer  # noqa: E402
from neo_jax.config import ConfigError  # noqa: E402
from neo_jax.evaluate import harness  # noqa: E402
from neo_jax.evaluate.harness import NeoJaxLM  # noqa: E402

CONTEXT = 64
REAL_TASKS = ("lambada_openai", "piqa", "winogrande", "mathqa", "pubmedqa", "wikitext")
# The harness's own files; its index of all of them takes long to read.
THEIRS = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "lambada_standard": "lambada/lambada_standard.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "mathqa": "mathqa/mathqa.yaml",
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return random_model(tmp_path_factory.mktemp("neo"), CONTEXT)


def random_model(path: pathlib.Path, context: int) -> pathlib.Path:
    """transformers' own random GPT-Neo, with a tokenizer trained on the rows themselves."""
    words = tokenizer.train_bpe([json.dumps(row) for row in ROWS.values()] * 2, 320)
    words.save(path)
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=words.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=context,
        bos_token_id=words.eos_id,
        eos_token_id=words.eos_id,
        initializer_range=0.2,
    )
    transformers.GPTNeoForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def both(checkpoint: pathlib.Path) -> tuple[NeoJaxLM, HFLM]:
    return pair_of(checkpoint, CONTEXT)


def pair_of(checkpoint: pathlib.Path, context: int) -> tuple[NeoJaxLM, HFLM]:
    """Our model of the harness's, and its own, on the same weights."""
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoint / "tokenizer.json"),
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    model = transformers.GPTNeoForCausalLM.from_pretrained(checkpoint)
    theirs = HFLM(pretrained=model, tokenizer=words, batch_size=4, max_length=context)
    return NeoJaxLM(str(checkpoint)), theirs


@pytest.fixture(scope="module")
def results(
    both: tuple[NeoJaxLM, HFLM],
    folder: pathlib.Path,  # noqa: F811
) -> list[dict[str, Any]]:
    """Every local task, run by the same harness with either model."""
    return [
        lm_eval.simple_evaluate(
            model=model,
            tasks=list(FILES),
            task_manager=harness.manager_for(list(FILES), folder),
            bootstrap_iters=0,
        )
        for model in both
    ]


@pytest.mark.parametrize("name", FILES)
def test_answers_are_those_of_transformers(results: list[dict[str, Any]], name: str) -> None:
    ours, theirs = (
        [np.ravel(sample["resps"]).astype(float) for sample in each["samples"][name]]
        for each in results
    )
    assert len(ours) == 1
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=0)
    for metric, value in results[1]["results"][name].items():
        if isinstance(value, float):
            assert results[0]["results"][name][metric] == pytest.approx(value, rel=1e-5)


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> tuple[NeoJaxLM, HFLM]:
    """Models that can read the longest answer of the benchmarks, though not all questions."""
    return pair_of(random_model(tmp_path_factory.mktemp("longer"), 512), 512)


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_TASKS)
def test_answers_to_the_benchmarks_are_those_of_transformers(
    longer: tuple[NeoJaxLM, HFLM], data_folder: pathlib.Path, name: str
) -> None:
    """Real questions; some are longer than these models read, and lose their front alike."""
    results = [
        lm_eval.simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=harness.manager_for([name], data_folder),
            limit=1 if name == "wikitext" else 5,
            bootstrap_iters=0,
        )
        for model in longer
    ]
    ours, theirs = (
        [np.ravel(sample["resps"]).astype(float) for sample in each["samples"][name]]
        for each in results
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-6)
    for metric, value in results[1]["results"][name].items():
        if isinstance(value, float):
            assert results[0]["results"][name][metric] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_local_tasks_ask_what_the_harness_asks(
    folder: pathlib.Path,  # noqa: F811
    name: str,
) -> None:
    config = load_yaml(pathlib.Path(lm_eval.__file__).parent / "tasks" / THEIRS[name])
    for key in ("tag", "dataset_path", "dataset_name"):
        config.pop(key, None)
    split = config.get("test_split") or config["validation_split"]
    rows = datasets.Dataset.from_list([ROWS[name]])
    config |= {"custom_dataset": lambda **_: {split: rows, "train": rows, "validation": rows}}
    theirs = ConfigurableTask(config=config)
    ours = harness.manager_for([name], folder).load([name])["tasks"][name]
    for task in (ours, theirs):
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests()
    assert [i.args for i in ours.instances] == [i.args for i in theirs.instances]


def ask(model: Any, kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    requests = [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]
    return getattr(model, kind)(requests)


def test_texts_longer_than_the_model_reads(both: tuple[NeoJaxLM, HFLM]) -> None:
    long = "two and two make four, " * 30
    ours = both[0]
    cut = ours.asker.truncated
    pairs = [(long, " dog"), ("", "dog"), (long, " a"), ("A ", "b")]
    answers = [ask(model, "loglikelihood", *pairs) for model in both]
    np.testing.assert_allclose(*answers, atol=1e-3)  # type: ignore[call-overload]
    assert ours.asker.truncated == cut + 2
    texts = [(long,), ("short",), ("",)]
    rolled = [ask(model, "loglikelihood_rolling", *texts) for model in both]
    np.testing.assert_allclose(*rolled, atol=1e-3)  # type: ignore[call-overload]


def test_greedy_texts_end_where_they_are_told(both: tuple[NeoJaxLM, HFLM]) -> None:
    settings = {"until": [" "], "max_gen_toks": 6, "do_sample": False}
    wanted = [("The dog ran", dict(settings)), ("Open a", {**settings, "until": []})]
    ours, theirs = (ask(model, "generate_until", *wanted) for model in both)
    assert ours == theirs


def test_answers_are_kept_for_another_run(
    checkpoint: pathlib.Path, both: tuple[NeoJaxLM, HFLM], tmp_path: pathlib.Path
) -> None:
    cached = lm_eval.api.model.CachingLM(both[0], str(tmp_path / "answers.db"))
    first = ask(cached, "loglikelihood", ("a", " b"), ("c", " d"))
    asked: list[Any] = []
    both[0].asker.score, score = lambda r: asked.append(r) or score(r), both[0].asker.score
    try:
        assert ask(cached, "loglikelihood", ("a", " b"), ("c", " d")) == first
        assert not asked
    finally:
        both[0].asker.score = score


def test_it_is_found_by_its_name(checkpoint: pathlib.Path) -> None:
    found = lm_eval.api.registry.get_model("neo_jax")
    assert found is NeoJaxLM
    model = found.create_from_arg_string(f"checkpoint={checkpoint}", {"batch_size": 2})
    assert model.max_length == CONTEXT


@pytest.mark.slow
def test_an_unknown_task_is_told_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="'hellaswagg' is unknown; did you mean hellaswag"):
        harness.manager_for(["hellaswagg"], None)
