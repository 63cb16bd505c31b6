"""All benchmarks by name."""

from __future__ import annotations

from collections.abc import Mapping

from wings_jax.evaluation.benchmarks import chinese, image, short_answers, text, text_tasks, yes_no
from wings_jax.evaluation.benchmarks.record import Benchmark

# In the order of the paper's table 1, then the others.
BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        text.MMLU,
        chinese.CMMLU,
        text.ARC_EASY,
        text.ARC_CHALLENGE,
        text.WINOGRANDE,
        text.OPENBOOKQA,
        text.RACE_MIDDLE,
        text.RACE_HIGH,
        text.WSC,
        chinese.CHID,
        text_tasks.HELLASWAG,
        text_tasks.SIQA,
        text_tasks.PIQA,
        chinese.OCNLI,
        text_tasks.GSM8K,
        text_tasks.MBPP,
        image.MMMU,
        yes_no.MME,
        image.MMBENCH_EN,
        image.MMBENCH_CN,
        image.SCIENCE_QA,
        image.SEED_BENCH,
        image.AI2D,
        yes_no.HALLUSION_BENCH,
        yes_no.POPE,
        short_answers.TEXT_VQA,
        short_answers.GQA,
        short_answers.VQA_V2,
        text.OPENBOOKQA_FACT,
        chinese.CLUEWSC,
        image.MMMU_TEST,
        yes_no.NLVR,
    )
}
