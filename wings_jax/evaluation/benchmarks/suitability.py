"""Whether a model can be asked the items of a task, found before the first answer is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import passes, runner
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask
from wings_jax.inference.generator import Generator


def check_task(name: str, task: BenchmarkTask, generator: Generator) -> None:
    """Raises UserError if a task does not fit the model `name`, or none of its images is there."""
    check_vision(name, task, generator)
    check_images(task, generator)
    check_positions(task, generator)


def check_vision(name: str, task: BenchmarkTask, generator: Generator) -> None:
    """Raises UserError if a task has questions about images and the model has no vision tower."""
    missing = generator.processor.missing_parts
    asked = sum(bool(item.images) for item in task.data.items)
    if missing and asked:
        raise UserError(
            f"{task.benchmark.name}: {asked} items have images, and the model {name} is text-only: "
            f"it has no {' and no '.join(missing)}"
        )


def check_images(task: BenchmarkTask, generator: Generator) -> None:
    """Raises UserError if none of the images of a task can be read.

    A few such images are counted in the report. Without any, the score would say nothing about the
    model: usually their directory is missing.
    """
    with_images = [item for item in task.data.items if item.images]
    reasons = []
    for item in with_images:
        reason = passes.image_problem(generator.processor, item)
        if not reason:
            return
        reasons.append(reason)

    if reasons:
        raise UserError(
            f"{task.benchmark.name}: none of the images of {len(reasons)} items can be read: "
            f"{reasons[0]}"
        )


def find_repaired(
    task: BenchmarkTask, generator: Generator, indices: Iterable[int]
) -> frozenset[int]:
    """Returns which of the items that an earlier run could not ask can be asked now."""
    items, processor = task.data.items, generator.processor
    return frozenset(i for i in indices if not passes.image_problem(processor, items[i]))


def check_positions(task: BenchmarkTask, generator: Generator) -> None:
    """Raises UserError if items are longer than the model supports, saying how many."""
    examples = task.examples()
    for one in task.passes:
        # The passages of a text are cut to the model's positions.
        if one.is_text:
            continue

        # Tokenizing is slow: texts with few bytes have no more tokens than bytes.
        sizes = passes.byte_sizes(one, task.data.items, examples)
        long = [i for i, size in sizes.items() if size > generator.processor.max_slots]
        data = dataclasses.replace(task.data, items=[task.data.items[i] for i in long])
        runner.check_lengths(
            generator,
            dataclasses.replace(task, data=data),
            one,
            [examples[i] for i in long],
            total=len(task.data.items),
        )
