"""Random models, made-up likelihoods and prose for the tests of `evaluate language`."""

from __future__ import annotations

import inference_cases as cases
import jax
import numpy as np

from wings_jax.evaluation import language
from wings_jax.evaluation.benchmarks import journals, runner
from wings_jax.evaluation.benchmarks.text_likelihood import TextLikelihood
from wings_jax.evaluation.everyday import ChoiceQuestion
from wings_jax.evaluation.language import Decision
from wings_jax.evaluation.prose import Text
from wings_jax.inference.generator import Generator
from wings_jax.inference.likelihood import Likelihood

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
SENTENCE = f"It is said that {WORDS} sixteen and so on are numbers that people count with."
PASSAGES = (
    "What colour is the sky?",
    "The cat is top left, the digit 7 is below it.",
    "A star.",
    "Two plus three is five; über 9 — no.",
    "There is a red car beside the house.",
)


def naive_nats(generator: Generator, params, ids) -> float:
    """Returns the nats of ids behind the first one, by the forward of training."""
    (logits,) = cases.uncached_logits(generator.spec, params, [cases.text(ids)])
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    return -sum(float(logprobs[at, token]) for at, token in enumerate(ids[1:]))


def make(case: str, rows: int, change=lambda arch, params: (arch, params)):
    """Returns a generator of a random model, and its parameters."""
    arch = cases.with_vocabulary(cases.ARCHS[case], len(cases.tokenizer()))
    arch, params = change(arch, cases.make(arch)[2])
    return Generator(arch, params, cases.tokenizer(), "chatml", rows=rows), params


def reading(nats, tokens) -> TextLikelihood:
    return TextLikelihood(np.array(nats, float), np.array(tokens), 4 * np.array(tokens))


def measure(generator: Generator, passages) -> TextLikelihood:
    """Returns the likelihood of passages, by a run of the task."""
    task, _ = language.make_tasks(Text("", tuple(passages)), [], None, None)
    return TextLikelihood.from_lines(run(generator, task))


def choose(generator: Generator, questions: list[ChoiceQuestion]) -> list[Decision]:
    """Returns a model's decisions, by a run of the task."""
    _, task = language.make_tasks(Text("", ()), questions, None, None)
    return [
        Decision(question, [Likelihood(one[0], one[1], False) for one in line["ll"]["likelihoods"]])
        for question, line in zip(questions, run(generator, task), strict=True)
    ]


def run(generator: Generator, task: runner.BenchmarkTask) -> list[dict]:
    store = journals.MemoryStore()
    runner.run_task(generator, task, store, "")
    return runner.collect_lines(task, store.answers)
