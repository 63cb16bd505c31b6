"""The model `wings` of lm-eval; skipped without it (`pip install lm_eval`, no torch needed)."""

from __future__ import annotations

import json
import subprocess
import sys

import inference_cases as cases
import numpy as np
import pytest
from language_cases import naive_nats
from PIL import Image

from wings_jax.evaluation.benchmarks import command, journals, runner
from wings_jax.evaluation.benchmarks.options import BenchmarkOptions
from wings_jax.evaluation.benchmarks.readers import read_data_set
from wings_jax.evaluation.benchmarks.records import BENCHMARKS

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from wings_jax.evaluation.lm_eval_model import WingsLM  # noqa: E402

TASK = """
task: local_openbookqa
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question.stem}}"
doc_to_choice: "{{question.choices|map(attribute='text')|list}}"
doc_to_target: "{{['A', 'B', 'C', 'D'].index(answerKey)}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc_bytes, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
QUESTIONS = (
    ("A plant grows where", ("there is light", "it is dark", "no water is", "über all")),
    ("Ice melts when it is", ("warm", "cold and dark", "red", "top left of a star")),
    ("Seven is more than", ("eight", "two", "nine or so", "twenty")),
    ("The cat sleeps", ("on a mat", "under the sea", "in seven stars", "up")),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint):
    return WingsLM(str(checkpoint), batch_size=4)


def instance(kind: str, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


def test_the_same_file_gives_the_same_numbers(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "openbookqa" / "Main" / "test.jsonl"
    file.parent.mkdir(parents=True)
    records = [
        {
            "id": str(number),
            "question": {
                "stem": stem,
                "choices": [
                    {"text": text, "label": label}
                    for text, label in zip(texts, "ABCD", strict=True)
                ],
            },
            "answerKey": "ABCD"[number],
        }
        for number, (stem, texts) in enumerate(QUESTIONS)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.replace("FILE", str(file)))

    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        model=model,
        tasks=["local_openbookqa"],
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(theirs["samples"]["local_openbookqa"], key=lambda one: one["doc_id"])

    benchmark = BENCHMARKS["openbookqa"]
    options = BenchmarkOptions(tmp_path, protocols=("ll", "ll_chars", "ll_bytes"))
    task = command.make_task(benchmark, read_data_set(benchmark, tmp_path), options)
    store = journals.MemoryStore()
    runner.run_task(cases.generator(4), task, store, "ours")
    lines = runner.collect_lines(task, store.answers)

    names = {"acc": "ll", "acc_norm": "ll_chars", "acc_bytes": "ll_bytes"}
    for line, sample in zip(lines, samples, strict=True):
        ours = [option[0] for option in line["ll"]["likelihoods"]]
        np.testing.assert_allclose(
            ours, [float(score) for score, _ in sample["filtered_resps"]], atol=1e-4
        )
        assert [line["credit"][ours] for ours in names.values()] == [sample[n] for n in names]


def test_loglikelihood_rolling_and_generation(model):
    generator = cases.generator(4)
    params = cases.make(cases.with_vocabulary(cases.ARCHS["router"], len(cases.tokenizer())))[2]
    text = "The cat is top left."
    ids = [model.prefix_token_id, *cases.tokenizer()(text).input_ids]
    (found,) = model.loglikelihood_rolling([instance("rolling", text)], disable_tqdm=True)
    assert -found == pytest.approx(naive_nats(generator, params, ids), abs=2e-3)

    (logprob, _), (whole, _) = model.loglikelihood(
        [instance("ll", "The cat ", "is top left."), instance("ll", "", text)], disable_tqdm=True
    )
    assert whole == pytest.approx(found, abs=1e-4)
    assert whole < logprob < 0

    arguments = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    texts = model.generate_until(
        [instance("gen", "The cat", arguments), instance("gen", "Up " * 900, arguments)],
        disable_tqdm=True,
    )
    assert len(texts) == 2  # the long one is cut off on its left
    assert texts[0] == model.generate_until([instance("gen", "The cat", arguments)], True)[0]


def test_images_change_what_is_generated_and_scored(model):
    arguments = {"until": [], "max_gen_toks": 8}
    chat = model.apply_chat_template([{"role": "user", "content": "<image>\nWhat is it?"}])
    assert chat.endswith("<|im_start|>assistant\n")
    pictures = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 30, 3), np.uint8))
        for seed in range(2)
    ]
    scores = model.loglikelihood(
        [instance("ll", chat, "a star", {"visual": [picture]}) for picture in pictures], True
    )
    assert scores[0][0] != scores[1][0]
    texts = model.generate_until(
        [instance("gen", chat, arguments, {"visual": [picture]}) for picture in pictures], True
    )
    assert len(texts) == 2


def test_the_model_needs_no_torch():
    code = (
        "import sys, wings_jax.evaluation.lm_eval_model as m; "
        "from lm_eval.api.registry import get_model; "
        "assert get_model('wings') is m.WingsLM; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
