"""Runs the passes of a benchmark over a model, batch by batch, into a journal.

What is computed together depends on the items alone, never on what an earlier run has done: a
batch whose entries are all in the journal is skipped, every other one is computed whole. So a run
that was stopped and resumed writes the same bytes as one that never was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from wings_jax import errors
from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import judging, passes, prompts, text_likelihood
from wings_jax.evaluation.benchmarks.judging import OptionLikelihood
from wings_jax.evaluation.benchmarks.passes import EvaluationPass, OptionRequest
from wings_jax.evaluation.benchmarks.record import Benchmark, DataSet, Item
from wings_jax.evaluation.models import MEMORY_ADVICE
from wings_jax.inference import likelihood, plain_text, scoring_plan
from wings_jax.inference.answers import Answer
from wings_jax.inference.generator import Generator
from wings_jax.inference.likelihood import ScoredRequest
from wings_jax.inference.sampling import SamplingParams
from wings_jax.inference.shards import WHOLE, Shard
from wings_jax.model.layout import TEXT

BLOCK = 4  # batches of rows whose answers are generated together, as rows end at different times


class EntryStore(Protocol):
    """What a run needs of a journal (`inference.jobs.Journal`)."""

    # Number of an entry -> entry, of this run and of the one it resumes.
    answers: dict[int, dict[str, Any]]

    def add(self, number: int, answer: Mapping[str, Any]) -> None:
        """Appends an entry."""
        ...


@dataclasses.dataclass(frozen=True)
class BenchmarkTask:
    """A benchmark as one run evaluates it."""

    # The declaration.
    benchmark: Benchmark
    # Its items; with --limit some of them.
    data: DataSet
    # Protocols that are computed.
    protocols: tuple[str, ...]
    # Solved examples before each item.
    shots: int

    @property
    def passes(self) -> list[EvaluationPass]:
        """Returns the passes over the model."""
        return passes.plan_passes(self.benchmark, self.protocols)

    def examples(self) -> list[list[Item]]:
        """Returns the solved examples of each item. Raises UserError if there are too few."""
        return [
            prompts.select_shots(self.benchmark, self.data, item, self.shots)
            for item in self.data.items
        ]


def run_task(
    generator: Generator, task: BenchmarkTask, store: EntryStore, title: str, shard: Shard = WHOLE
) -> None:
    """Computes every entry of a task that the journal does not have.

    Raises:
      UserError: an item does not fit the model, or the task cannot be asked.
    """
    examples = task.examples()
    for number, one in enumerate(task.passes):
        pass_title = f"{title} {one.key}"
        run = _run_generation if one.is_generation else _run_likelihood
        with errors.full_memory(MEMORY_ADVICE):
            if one.is_text:
                text_likelihood.run_text(
                    generator, task.data.items, number, store, title=pass_title, shard=shard
                )
            else:
                run(generator, task, (number, one), examples, store, pass_title, shard)


def _run_likelihood(
    generator: Generator,
    task: BenchmarkTask,
    numbered: tuple[int, EvaluationPass],
    examples: Sequence[Sequence[Item]],
    store: EntryStore,
    title: str,
    shard: Shard,
) -> None:
    """Adds an entry per scoring request of a likelihood pass."""
    pass_number, one = numbered
    processor, items = generator.processor, task.data.items
    asked = passes.make_option_requests(processor, one, task.data, examples)

    sizes = passes.option_sizes(asked)
    passes.check_lengths(task.benchmark.name, sizes, len(items), processor.max_slots, task.shots)

    # Batches are planned over all requests, so that every process has the same ones.
    requests = [request.request for request in asked]
    can_pack = likelihood.can_pack(generator.spec)
    planned = scoring_plan.plan_batches(requests, generator.options.rows, can_pack=can_pack)
    numbers = [
        passes.entry_number(pass_number, len(items), request.item, request.options[0])
        for request in asked
    ]

    import tqdm  # not needed for --help

    scorer = likelihood.PromptScorer(generator.spec, generator.weights)
    with tqdm.tqdm(total=len(asked), desc=title, disable=None) as progress:
        for index, batch in enumerate(planned):
            progress.update(len(batch.indices))
            is_done = all(numbers[i] in store.answers for i in batch.indices)
            if is_done or not shard.has_piece(index):
                continue

            # Images are read now, so that only those of one batch are in memory.
            failed, loaded = _load_images(generator, asked, batch.indices, items)
            # An item that cannot be asked has an entry too, and counts as wrong.
            for i, reason in failed.items():
                store.add(numbers[i], {"error": reason})
            if loaded:
                scored = scorer.score_batch(list(loaded.values()), batch)
                for i, found in zip(loaded, scored, strict=True):
                    store.add(numbers[i], _scored_entry(asked[i], found))


def _load_images(
    generator: Generator,
    asked: Sequence[OptionRequest],
    indices: Sequence[int],
    items: Sequence[Item],
) -> tuple[dict[int, str], dict[int, scoring_plan.ScoringRequest]]:
    """Returns the requests that cannot be asked, with the reason, and the others with images."""
    failed, loaded = {}, {}
    for i in indices:
        request, item = asked[i].request, items[asked[i].item]
        try:
            images = passes.load_images(generator.processor, item)
        except UserError as error:
            failed[i] = str(error)
            continue

        prompt = dataclasses.replace(request.prompt, images=images)
        loaded[i] = dataclasses.replace(request, prompt=prompt)
    return failed, loaded


def _scored_entry(asked: OptionRequest, scored: ScoredRequest) -> dict[str, Any]:
    """Returns the entry of one scoring request."""
    # Slots of images are not tokens of the context.
    context_tokens = int((asked.request.prompt.modality == TEXT).sum())

    likelihoods = [
        OptionLikelihood(
            answer.logprob, answer.tokens, scored.prompt.logprob, context_tokens, first
        ).to_list()
        for answer, first in zip(scored.answers, scored.first, strict=True)
    ]
    return {"options": list(asked.options), "likelihoods": likelihoods}


def _run_generation(
    generator: Generator,
    task: BenchmarkTask,
    numbered: tuple[int, EvaluationPass],
    examples: Sequence[Sequence[Item]],
    store: EntryStore,
    title: str,
    shard: Shard,
) -> None:
    """Adds an entry per item of a generation pass."""
    pass_number, one = numbered
    items = task.data.items
    texts = [
        prompts.render_generation(one.prompt, item, shots)
        for item, shots in zip(items, examples, strict=True)
    ]
    sizes = _prompt_sizes(generator, one, items, texts)
    slots = generator.processor.max_slots
    passes.check_lengths(task.benchmark.name, sizes, len(items), slots, task.shots)

    # Prompts of similar length together; the blocks depend on the items alone.
    order = sorted(range(len(items)), key=lambda i: len(texts[i]))
    size = BLOCK * generator.options.rows
    blocks = [order[first : first + size] for first in range(0, len(order), size)]

    import tqdm  # not needed for --help

    with tqdm.tqdm(total=len(items), desc=title, disable=None) as progress:
        for index, block in enumerate(blocks):
            numbers = {i: passes.entry_number(pass_number, len(items), i, 0) for i in block}
            is_done = all(number in store.answers for number in numbers.values())
            if is_done or not shard.has_piece(index):
                progress.update(len(block))
                continue

            part = [(items[i], texts[i]) for i in block]
            for position, answer in _answer_block(generator, one, part):
                progress.update()
                # One item that cannot be asked does not end the run.
                is_error = isinstance(answer, UserError)
                entry = {"error": str(answer)} if is_error else {"text": str(answer)}
                store.add(numbers[block[position]], entry)


def _answer_block(
    generator: Generator, one: EvaluationPass, part: Sequence[tuple[Item, str]]
) -> Iterator[tuple[int, Answer | UserError]]:
    """Yields (position, answer or what is wrong) of items, as they end."""
    sampling = SamplingParams(max_new_tokens=one.prompt.max_new_tokens, stop=one.prompt.stop)

    # Without a chat template and images, a prompt is completed as plain text.
    if not one.prompt.chat and not any(item.images for item, _ in part):
        yield from plain_text.complete_texts(generator, [(text, sampling) for _, text in part])
        return

    requests, positions = [], []
    for position, (item, text) in enumerate(part):
        try:
            request = passes.chat_request(item, text, sampling)
            requests.append(dataclasses.replace(request, images=passes.read_images(item)))
            positions.append(position)
        except UserError as error:
            yield position, error

    for number, answer in generator.answers(requests):
        position = positions[number]
        # The generator does not know which file an image is of.
        problem = isinstance(answer, UserError) and passes.image_problem(
            generator.processor, part[position][0]
        )
        yield position, UserError(problem) if problem else answer


def check_lengths(
    generator: Generator,
    task: BenchmarkTask,
    one: EvaluationPass,
    examples: Sequence[Sequence[Item]],
    *,
    total: int,
) -> None:
    """Raises UserError if items are longer than the model supports, saying how many of `total`."""
    processor, items = generator.processor, task.data.items
    if one.is_generation:
        texts = [
            prompts.render_generation(one.prompt, item, shots)
            for item, shots in zip(items, examples, strict=True)
        ]
        sizes = _prompt_sizes(generator, one, items, texts)
    else:
        sizes = passes.option_sizes(
            passes.make_option_requests(processor, one, task.data, examples)
        )
    passes.check_lengths(task.benchmark.name, sizes, total, processor.max_slots, task.shots)


def _prompt_sizes(
    generator: Generator, one: EvaluationPass, items: Sequence[Item], texts: Sequence[str]
) -> dict[int, int]:
    """Returns position of an item -> slots of its prompt and of the first new token."""
    processor = generator.processor
    sizes = {}
    for index, (item, text) in enumerate(zip(items, texts, strict=True)):
        if one.prompt.chat or item.images:
            sizes[index] = processor.encode_any_length(passes.chat_request(item, text)).count + 1
        else:
            sizes[index] = len(plain_text.encode_context(processor, text)) + 1
    return sizes


def collect_lines(
    task: BenchmarkTask, entries: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the result line of every item, of the entries of a finished journal.

    Raises:
      UserError: an entry is missing, as other processes have not finished.
    """
    items, examples = task.data.items, task.examples()
    lines = []
    for index, (item, shots) in enumerate(zip(items, examples, strict=True)):
        by_pass = {
            one.key: _item_entry(one, item, shots, _entries_of(number, items, index, entries))
            for number, one in enumerate(task.passes)
        }
        lines.append(judging.merge_entries(item, by_pass))
    return lines


def _entries_of(
    pass_number: int, items: Sequence[Item], index: int, entries: Mapping[int, Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Returns the entries of one item in one pass."""
    first = passes.entry_number(pass_number, len(items), index, 0)
    return [entries[n] for n in range(first, first + passes.MAX_OPTIONS) if n in entries]


def _item_entry(
    one: EvaluationPass,
    item: Item,
    shots: Sequence[Item],
    entries: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns what is written about an item of one pass."""
    if not one.is_generation and not one.is_text and not item.options:
        return {"credit": dict.fromkeys(one.protocols)}  # open: there is nothing to compare

    if not entries:
        raise UserError(f"item {item.id} has no entry for {one.key}: a process has not finished")

    # Options can be compared only if all requests of the item were computed.
    failed = [entry["error"] for entry in entries if "error" in entry]
    if failed:
        return judging.failed_entry(one, failed[0])
    if one.is_text:
        return {**entries[0], "credit": {}}
    if one.is_generation:
        return judging.judge_generation(one, item, entries[0]["text"])

    # The options of an item may be in several entries, one per context.
    by_option = {
        option: OptionLikelihood(*values)
        for entry in entries
        for option, values in zip(entry["options"], entry["likelihoods"], strict=True)
    }

    text = prompts.render_choice(one.prompt, item, shots)
    likelihoods = [by_option[option] for option in range(len(item.options))]
    return judging.judge_likelihoods(one, item, likelihoods, text.answers)
