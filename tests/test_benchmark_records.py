"""The declarations of benchmarks: complete, consistent, with the prompts of the publications."""

from __future__ import annotations

import pytest

from wings_jax.evaluation.benchmarks import extraction, image_rewrites, metrics, readers, rewrites
from wings_jax.evaluation.benchmarks.prompts import render_choice, render_generation
from wings_jax.evaluation.benchmarks.record import PROMPT_KEYS, Item
from wings_jax.evaluation.benchmarks.records import BENCHMARKS
from wings_jax.evaluation.benchmarks.subjects import CMMLU_SUBJECTS
from wings_jax.evaluation.benchmarks.worked_examples import GSM8K


def test_all_of_the_papers_benchmarks_are_there():
    paper = [benchmark for benchmark in BENCHMARKS.values() if benchmark.in_paper]
    assert [one.modality for one in paper] == ["text"] * 16 + ["image"] * 8
    assert {"pope", "textvqa", "gqa", "vqav2"} <= BENCHMARKS.keys()
    assert len({one.title for one in BENCHMARKS.values()}) == len(BENCHMARKS)
    assert len(CMMLU_SUBJECTS) == 67
    assert GSM8K.count("Question: ") == 4


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS)
def test_record_names_what_exists(benchmark):
    known = {**rewrites.REWRITES, **image_rewrites.REWRITES}
    for pattern in benchmark.files:
        assert pattern.reader in readers.READERS
        for options in (pattern.options, pattern.options.get("labels", {})):
            assert options.get("rewrite", "hellaswag") in known
            assert options.get("reader", "json") in readers.READERS
    assert benchmark.split in {pattern.split for pattern in benchmark.files}
    if benchmark.shots.count:
        assert benchmark.shots.split in {pattern.split for pattern in benchmark.files}

    assert benchmark.metric in metrics.METRICS
    assert set(benchmark.prompts) <= set(PROMPT_KEYS)
    assert benchmark.headline in benchmark.protocols
    if "generate" in benchmark.prompts:
        assert benchmark.prompts["generate"].extraction in extraction.EXTRACTIONS
    assert benchmark.source
    assert benchmark.license


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS)
def test_prompts_use_fields_that_the_files_give(benchmark):
    for pattern in benchmark.files:
        extra = dict.fromkeys(pattern.fields, "x")
        extra |= {"hint_line": ""} if "images" in extra else {}
        options = () if benchmark.kind in ("generate", "code") else ("one", "two")
        item = Item("1", "A _ b #idiom# c", options, 0 if options else "4", extra=extra)
        for key, prompt in benchmark.prompts.items():
            if key == "generate":
                assert render_generation(prompt, item, [item])
            else:
                text = render_choice(prompt, item, [item])
                assert len(text.continuations) == 2


def test_prompts_of_the_publications():
    """A few whole prompts, as OpenCompass and lm-eval write them."""
    item = Item("1", "Why?", ("tired", "sad"), 1, group="high_school_physics")
    item_extra = Item("1", "Why?", ("tired", "sad"), 1, extra={"context": "Ann left."})
    mmlu = BENCHMARKS["mmlu"].prompts
    text = render_choice(mmlu["ppl"], item, [item])
    assert text.beginning + text.contexts[0] + text.continuations[0] == (
        "The following are multiple choice questions (with answers) about  high school physics."
        "\n\nWhy?\nA. tired\nB. sad\nAnswer: B\n\nWhy?\nA. tired\nB. sad\nAnswer: A"
    )
    text = render_choice(BENCHMARKS["piqa"].prompts["ppl"], item, [])
    assert text.contexts[0] + text.continuations[0] == (
        "The following makes sense: \nQ: Why?\nA: tired\n"
    )
    text = render_choice(BENCHMARKS["siqa"].prompts["ll"], item_extra, [])
    assert text.contexts[0] + text.continuations[1] == "Q: Ann left. Why?\nA: sad"
    gap = Item("1", "The _ is hot.", ("sun", "ice"), 0, extra={"tail": "is hot."})
    text = render_choice(BENCHMARKS["winogrande"].prompts["ll"], gap, [])
    assert [one + two for one, two in zip(text.contexts, text.continuations, strict=True)] == [
        "The sun is hot.",
        "The ice is hot.",
    ]
    idiom = Item("1", "他#idiom#。", ("一心一意", "三心二意"), 0)
    text = render_choice(BENCHMARKS["chid"].prompts["ppl"], idiom, [])
    assert text.contexts[0] + text.continuations[0] == (
        "以下句子是否通顺？\n他一心一意。\n这个句子是通顺的。"
    )
    twice = Item("1", "他#idiom#，她#idiom#。", ("一心一意", "三心二意"), 0)
    text = render_choice(BENCHMARKS["chid"].prompts["ll"], twice, [])
    assert text.contexts[1] + text.continuations[1] == "他三心二意，她三心二意。"
