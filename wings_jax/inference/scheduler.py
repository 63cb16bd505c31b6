"""Continuous batching: many requests in few rows, where a finished row is given to the next one.

Requests are sorted by length, so that those which are padded together have similar lengths. All
rows write at the same slot of the KV cache (`kv_cache`), so a row that is replaced has empty
slots; when the caches are full, `compact` removes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import jax
import numpy as np

from wings_jax import distributed, errors
from wings_jax.errors import UserError
from wings_jax.inference import chunks, decode, device_memory, prefixes, sampling, uncached
from wings_jax.inference import image_features as features_lib
from wings_jax.inference.chunks import PromptSlots
from wings_jax.inference.decode import DecodeState
from wings_jax.inference.engine import ModelSpec, Weights
from wings_jax.inference.kv_cache import KVCache
from wings_jax.inference.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class GenerationTask:
    """A request that waits for a row.

    index     which request it is
    slots     its prompt, without images
    images    how many images it has
    load      returns the images, or raises UserError
    sampling  how it is answered
    is_ended  returns whether the answer's tokens contain a stop string; None without stop strings
    """

    index: int
    slots: PromptSlots
    images: int
    load: Callable[[], Sequence[np.ndarray]]
    sampling: SamplingParams
    is_ended: Callable[[Sequence[int]], bool] | None = None

    def load_prompt(self) -> PromptSlots:
        """Returns the prompt with its images. Raises UserError if one cannot be read."""
        return dataclasses.replace(self.slots, images=tuple(self.load()))


@dataclasses.dataclass
class PartialOutput:
    """The answer to a task so far.

    task      the task
    tokens    ids, a stop token included
    logprobs  the log-probability of each
    """

    task: GenerationTask
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)

    def append(self, generated: Mapping[str, np.ndarray], row: int, count: int) -> None:
        """Adds the first `count` tokens of a row of what `decode.decode` generated."""
        self.tokens += generated["tokens"][:count, row].tolist()
        self.logprobs += generated["logprobs"][:count, row].tolist()

    @property
    def has_stop_string(self) -> bool:
        """Returns whether a stop string ends the answer."""
        return self.task.is_ended is not None and self.task.is_ended(self.tokens)


# What becomes of a task: its answer, or why there is none.
Outcome = tuple[GenerationTask, PartialOutput | UserError]


@dataclasses.dataclass(frozen=True)
class SchedulerOptions:
    """Rows and shapes of a batch.

    rows    B, the requests that are answered at once
    steps   tokens per device call; rows are replaced in between
    stops   token ids that end an answer
    """

    rows: int = 16
    steps: int = 16
    stops: tuple[int, ...] = ()


def group_by_length(tasks: Sequence[GenerationTask], rows: int) -> list[list[GenerationTask]]:
    """Returns the tasks by length bucket, shortest first; a small group joins the next one."""
    ordered = sorted(tasks, key=lambda t: (t.slots.count, t.images, t.index))
    groups: list[list[GenerationTask]] = []
    for task in ordered:
        size = chunks.bucket(task.slots.count)
        is_same = groups and chunks.bucket(groups[-1][-1].slots.count) == size
        is_small = groups and len(groups[-1]) < 4 * rows
        # A group of few rows would leave most of a batch empty.
        if is_same or is_small:
            groups[-1].append(task)
        else:
            groups.append([task])
    return groups


def run(
    spec: ModelSpec, weights: Weights, tasks: Sequence[GenerationTask], options: SchedulerOptions
) -> Iterator[Outcome]:
    """Yields every task with its answer, or with the error why there is none, as they end.

    Raises:
      UserError: the rows do not fit the devices' memory.
    """
    with errors.full_memory(device_memory.ADVICE):
        cached = [task for task in tasks if uncached.is_causal(spec, task.images)]
        for group in group_by_length(cached, options.rows):
            yield from _Batch(spec, weights, group, options).run()

        # With the release's semantics an image makes the states depend on later slots: no KV cache.
        for task in tasks:
            if not uncached.is_causal(spec, task.images):
                yield task, _answer_uncached(spec, weights, task, options)


def _answer_uncached(
    spec: ModelSpec, weights: Weights, task: GenerationTask, options: SchedulerOptions
) -> PartialOutput | UserError:
    """Returns the whole answer to one task by `uncached.recompute`."""
    try:
        prompt = task.load_prompt()
    except UserError as error:
        return error

    features = features_lib.encode_all(spec, weights, prompt)
    output = PartialOutput(task)
    # One token at a time; a stop string is found in the decoded text.
    for token, logprob, _ in uncached.recompute(
        spec, weights, prompt, features, task.sampling, options.stops
    ):
        output.tokens.append(token)
        output.logprobs.append(logprob)
        if output.has_stop_string:
            break
    return output


class _Batch:
    """The rows for one group of tasks: one KV cache, one set of compiled shapes."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        tasks: Sequence[GenerationTask],
        options: SchedulerOptions,
    ):
        self.spec, self.weights = spec, weights
        self.stops = np.asarray(options.stops or (-1,), np.int32)

        # What all prompts begin with is computed once, unless later slots would change its states.
        prompts = [task.slots for task in tasks]
        is_causal = spec.arch.semantics.prompt_length is None
        self.shared = prefixes.shared_slots(prompts) if is_causal else 0
        self.prefix: KVCache | None = None

        # Shapes: rows, steps per call, images per row, prompt slots after it and cache slots.
        max_new_tokens = max(task.sampling.max_new_tokens for task in tasks)
        self.rows = min(options.rows, chunks.power(len(tasks)))
        self.steps = min(options.steps, chunks.bucket(max_new_tokens))
        self.images = chunks.power(max(task.images for task in tasks))
        self.length = chunks.bucket(max(prompt.count for prompt in prompts) - self.shared)
        self.filled = self.shared + self.length
        self.capacity = self.filled + chunks.bucket(max_new_tokens + self.steps)

        # The parameters of all tasks are stacked once; `index` finds a task's row in them.
        self.params = sampling.stack_params(
            [task.sampling for task in tasks], spec.arch.decoder.vocab_size
        )
        self.index = {task.index: index for index, task in enumerate(tasks)}

        self.waiting = list(reversed(tasks))
        self.outputs: list[PartialOutput | None] = [None] * self.rows
        self.refused: list[tuple[GenerationTask, UserError]] = []
        self.cache: KVCache | None = None
        self.state: DecodeState | None = None

    def run(self) -> Iterator[Outcome]:
        """Yields tasks as they end."""
        while self.waiting or any(self.outputs):
            self.fill_rows()
            yield from self.pop_finished()
            if any(self.outputs):
                self.decode()
                yield from self.pop_finished()

    def fill_rows(self) -> None:
        """Gives free rows to waiting tasks, once a quarter is free, so that a prefill pays off."""
        # A prefill has a fixed number of rows, which are worth it only if enough of them are used.
        free_rows = [row for row, output in enumerate(self.outputs) if output is None]
        if not self.waiting or 4 * len(free_rows) < self.rows:
            return

        is_new_batch = len(free_rows) == self.rows
        size = self.rows if is_new_batch else max(1, self.rows // 4)
        admitted = self.next_prompts(size)
        if not admitted:
            return

        if is_new_batch:
            self.cache = self.state = None  # the old cache is freed before there is a new one
            self.cache, self.state = self.prefill(admitted, size, self.capacity)
        else:
            new_cache, new_state = self.prefill(admitted, size, self.filled)
            # A row index past the end inserts nothing: the padding of a short prefill.
            rows = np.full(size, self.rows, np.int32)
            rows[: len(admitted)] = free_rows[: len(admitted)]
            self.cache = decode.insert(self.cache, new_cache, rows)
            self.state = decode.insert_rows(self.state, new_state, rows)

        # The first token of an answer comes from the prefill, the others from `decode`.
        first_tokens = {
            name: distributed.fetch(getattr(self.state, name))[None]
            for name in ("tokens", "logprobs")
        }
        for row, (task, _) in zip(free_rows, admitted, strict=False):
            output = PartialOutput(task)
            output.append(first_tokens, row, 1)
            self.outputs[row] = output

    def next_prompts(self, size: int) -> list[tuple[GenerationTask, PromptSlots]]:
        """Returns up to `size` waiting tasks with their prompts; those that fail are refused."""
        loaded: list[tuple[GenerationTask, PromptSlots]] = []
        while self.waiting and len(loaded) < size:
            task = self.waiting.pop()
            try:
                loaded.append((task, task.load_prompt()))
            except UserError as error:
                self.refused.append((task, error))
        return loaded

    def prefill(
        self, admitted: Sequence[tuple[GenerationTask, PromptSlots]], size: int, capacity: int
    ) -> tuple[KVCache, DecodeState]:
        """Returns a KV cache of `size` rows and `capacity` slots, and the first tokens."""
        # Empty prompts fill up the batch: every prefill has the same shape.
        spec, arch = self.spec, self.spec.arch
        rows = [prompt for _, prompt in admitted]
        rows += [chunks.EMPTY] * (size - len(rows))
        starts = np.full(size, self.shared, np.int32)
        rests = [chunks.tail(row, self.shared, arch.vision.num_patches) for row in rows]
        chunk = chunks.make_chunk(rests, starts, arch, length=self.length, images=self.images)

        features = features_lib.encode(
            spec,
            self.weights,
            [image for row in rows for image in row.images],
            batch_size=self.rows,
            count=size * self.images,
        )
        slots = device_memory.cache_slots(spec, chunk, capacity)

        # What all prompts begin with is one row of a cache, which each of these rows continues.
        if self.shared:
            if self.prefix is None:
                start = chunks.head(rows[0], self.shared)
                self.prefix = prefixes.compute_prefix(spec, self.weights, start)
            cache = prefixes.repeat_prefix(spec, self.prefix, size, slots)
            cache, logits = decode.extend(spec, self.weights, cache, chunk, features)
        else:
            cache, logits = decode.prefill(spec, self.weights, chunk, features, slots=slots)

        # Sample the first token of every answer from the prompt's last logits.
        params = self.params_of([task for task, _ in admitted], size)
        seen = None if params.penalty is None else chunks.seen_tokens(rows, arch)
        return cache, decode.begin(logits, params, self.stops, seen)

    def params_of(
        self, tasks: Sequence[GenerationTask | None], size: int
    ) -> sampling.BatchSamplingParams:
        """Returns the parameters of tasks in `size` rows; rows after them are done at once."""
        # Rows without a task take the parameters of the first one, with a limit of 0 tokens.
        index = np.zeros(size, np.int32)
        index[: len(tasks)] = [self.index[task.index] if task else 0 for task in tasks]
        params = jax.tree.map(lambda column: column[index], self.params)
        params.limits[len(tasks) :] = 0
        return params

    def decode(self) -> None:
        """Generates up to `steps` tokens in every row that is not done."""
        if self.cache is None or self.state is None:  # no row was ever filled
            return

        # Replaced rows have empty slots; moving them to the end makes room again.
        if int(self.cache.used["main"]) + self.steps > self.capacity:
            self.cache = decode.compact(self.cache)

        params = self.params_of([out.task if out else None for out in self.outputs], self.rows)
        count_before = distributed.fetch(self.state.count)
        self.cache, self.state, generated = decode.decode(
            self.spec,
            self.weights,
            self.cache,
            self.state,
            params,
            self.stops,
            steps=self.steps,
        )

        # One transfer for all rows; a row's tokens are its first `new_counts` entries.
        generated, counts = distributed.fetch((generated, self.state.count))
        new_counts = counts - count_before
        for row, output in enumerate(self.outputs):
            if output is not None:
                output.append(generated, row, int(new_counts[row]))

    def pop_finished(self) -> Iterator[Outcome]:
        """Yields what is finished or was refused, and frees its rows."""
        yield from self.refused
        self.refused.clear()
        if self.state is None:
            return

        # Stop strings are found on the host, so their rows are marked done here.
        done = np.array(distributed.fetch(self.state.done))
        for row, output in enumerate(self.outputs):
            if output is None:
                continue
            done[row] = done[row] or output.has_stop_string
            if done[row]:
                self.outputs[row] = None
                yield output.task, output
        # As a host array it is an input of the next program on every process of a job.
        self.state = dataclasses.replace(self.state, done=cast("jax.Array", done))
