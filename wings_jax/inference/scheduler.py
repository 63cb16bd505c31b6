"""Many requests through few rows: a finished row is taken over by the next request.

Requests are sorted by length, so that what is padded together belongs together. All rows write
at the same slot (`memory`), so a row that was taken over leaves empty slots behind; when the
caches are full, `compact` moves them out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from wings_jax import errors
from wings_jax.errors import UserError
from wings_jax.inference import decode, device_memory, prompts, sampling
from wings_jax.inference.decode import DecodeState
from wings_jax.inference.engine import ModelSpec, Weights
from wings_jax.inference.kv_cache import KVCache
from wings_jax.inference.prompts import PromptSlots
from wings_jax.inference.sampling import SamplingParams


@dataclasses.dataclass(frozen=True)
class GenerationTask:
    """A request that waits for its row.

    index     which request it is
    slots     its prompt, without pictures
    images    how many it has
    load      returns the pictures, or raises UserError
    sampling  how it is answered
    ended     says whether text that ends an answer has been written, given its tokens
    """

    index: int
    slots: PromptSlots
    images: int
    load: Callable[[], Sequence[np.ndarray]]
    sampling: SamplingParams
    ended: Callable[[Sequence[int]], bool] | None = None


@dataclasses.dataclass
class PartialOutput:
    """The answer of a task so far."""

    task: GenerationTask
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)

    def take(self, said: Mapping[str, np.ndarray], row: int, count: int) -> None:
        """Adds the first `count` tokens of a row of what was said."""
        self.tokens += said["tokens"][:count, row].tolist()
        self.logprobs += said["logprobs"][:count, row].tolist()


@dataclasses.dataclass(frozen=True)
class SchedulerOptions:
    """Rows and shapes of a batch.

    rows    B
    steps   tokens between two looks at the rows
    stops   token ids that end an answer
    """

    rows: int = 16
    steps: int = 16
    stops: tuple[int, ...] = ()


def groups(tasks: Sequence[GenerationTask], rows: int) -> list[list[GenerationTask]]:
    """Returns the tasks by bucket of length, shortest first; a small group joins the next one."""
    ordered = sorted(tasks, key=lambda t: (t.slots.count, t.images, t.index))
    found: list[list[GenerationTask]] = []
    for task in ordered:
        size = prompts.bucket(task.slots.count)
        is_same = found and prompts.bucket(found[-1][-1].slots.count) == size
        if is_same or (found and len(found[-1]) < 4 * rows):
            found[-1].append(task)
        else:
            found.append([task])
    return found


def run(
    spec: ModelSpec, weights: Weights, tasks: Sequence[GenerationTask], plan: SchedulerOptions
) -> Iterator[tuple[GenerationTask, PartialOutput | UserError]]:
    """Yields every task with its answer, or with the reason why there is none, as they end.

    Raises:
      UserError: the rows do not fit the devices' memory.
    """
    with errors.full_memory(device_memory.ADVICE):
        cached = [task for task in tasks if is_causal(spec, task.images)]
        for group in groups(cached, plan.rows):
            yield from _Rows(spec, weights, group, plan).run()
        for task in tasks:
            if not is_causal(spec, task.images):
                yield task, _recomputed(spec, weights, task, plan)


def is_causal(spec: ModelSpec, images: int) -> bool:
    """Returns whether what was read stays valid when tokens follow: not in the release's images."""
    return spec.arch.semantics.prompt_length is None or not images


def recompute(
    spec: ModelSpec,
    weights: Weights,
    prompt: PromptSlots,
    features: jax.Array | None,
    wish: SamplingParams,
    stops: Sequence[int],
) -> Iterator[tuple[int, float, bool]]:
    """Yields token, log-probability and whether it is the last; all is read again for each token.

    The way of models that are not causal: a token costs as much as its whole conversation.
    `features` are those of the prompt's images, which are encoded once.
    """
    arch, said = spec.arch, []
    choice = sampling.stack_params([wish], arch.decoder.vocab_size)
    images = prompts.power(len(prompt.images))
    stops = np.asarray(stops or (-1,), np.int32)
    while True:
        whole = prompts.join(prompt, prompts.from_ids(said, (), 1))
        length = prompts.bucket(whole.count)
        starts = np.zeros(1, np.int32)
        chunk = prompts.make_chunk([whole], starts, arch, length=length, images=images)
        logits = decode.forward(spec, weights, chunk, features)
        seen = None if choice.penalty is None else prompts.seen([whole], arch)
        count = np.array([len(said)], np.int32)
        running = decode.resume(logits, choice, stops, count, seen)
        said.append(int(running.tokens[0]))
        yield said[-1], float(running.logprobs[0]), bool(running.done[0])
        if running.done[0]:
            return


def _recomputed(
    spec: ModelSpec, weights: Weights, task: GenerationTask, plan: SchedulerOptions
) -> PartialOutput | UserError:
    """Returns the whole answer of one task."""
    try:
        prompt = dataclasses.replace(task.slots, images=tuple(task.load()))
    except UserError as error:
        return error
    draft, features = PartialOutput(task), encode_all(spec, weights, prompt)
    for token, logprob, _ in recompute(spec, weights, prompt, features, task.sampling, plan.stops):
        draft.tokens.append(token)
        draft.logprobs.append(logprob)
        if task.ended is not None and task.ended(draft.tokens):
            break
    return draft


class _Rows:
    """The rows of one group, whose caches and compiled shapes they share."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        tasks: Sequence[GenerationTask],
        plan: SchedulerOptions,
    ):
        self.spec, self.weights = spec, weights
        self.waiting = list(reversed(tasks))
        self.count = min(plan.rows, prompts.power(len(tasks)))
        self.stops = np.asarray(plan.stops or (-1,), np.int32)
        most = max(task.sampling.max_new_tokens for task in tasks)
        self.steps = min(plan.steps, prompts.bucket(most))
        self.images = prompts.power(max(task.images for task in tasks))
        self.length = prompts.bucket(max(task.slots.count for task in tasks))
        self.capacity = self.length + prompts.bucket(most + self.steps)
        wishes = [task.sampling for task in tasks]
        self.wishes = sampling.stack_params(wishes, spec.arch.decoder.vocab_size)
        self.place = {task.index: place for place, task in enumerate(tasks)}
        self.drafts: list[PartialOutput | None] = [None] * self.count
        self.refused: list[tuple[GenerationTask, UserError]] = []
        self.memory: KVCache | None = None
        self.running: DecodeState | None = None

    def run(self) -> Iterator[tuple[GenerationTask, PartialOutput | UserError]]:
        """Yields tasks as they end."""
        while self.waiting or any(self.drafts):
            self.admit()
            yield from self.leave()
            if any(self.drafts):
                self.go_on()
                yield from self.leave()

    def admit(self) -> None:
        """Gives free rows to those who wait, once it is worth a prefill."""
        free = [row for row, draft in enumerate(self.drafts) if draft is None]
        if not self.waiting or 4 * len(free) < self.count:
            return
        is_whole = len(free) == self.count
        guests = self.take(self.count if is_whole else max(1, self.count // 4))
        if not guests:
            return
        if is_whole:
            self.memory, self.running = self.prefill(guests, self.count, self.capacity)
        else:
            size = max(1, self.count // 4)
            grown, running = self.prefill(guests, size, self.length)
            rows = np.full(size, self.count, np.int32)
            rows[: len(guests)] = free[: len(guests)]
            self.memory = decode.insert(self.memory, grown, rows)
            self.running = decode.put(self.running, running, rows)
        chosen = {
            "tokens": np.asarray(self.running.tokens)[None],
            "logprobs": np.asarray(self.running.logprobs)[None],
        }
        for row, (task, _) in zip(free, guests, strict=False):
            self.drafts[row] = PartialOutput(task)
            self.drafts[row].take(chosen, row, 1)

    def take(self, size: int) -> list[tuple[GenerationTask, PromptSlots]]:
        """Returns up to `size` tasks that wait, with their pictures; bad ones are refused."""
        taken: list[tuple[GenerationTask, PromptSlots]] = []
        while self.waiting and len(taken) < size:
            task = self.waiting.pop()
            try:
                taken.append((task, dataclasses.replace(task.slots, images=tuple(task.load()))))
            except UserError as error:
                self.refused.append((task, error))
        return taken

    def prefill(
        self, guests: Sequence[tuple[GenerationTask, PromptSlots]], size: int, room: int
    ) -> tuple[KVCache, DecodeState]:
        """Returns the memory, of `size` rows and `room` slots, and first tokens of new tasks."""
        arch = self.spec.arch
        rows = [slots for _, slots in guests] + [prompts.EMPTY] * (size - len(guests))
        starts = np.zeros(size, np.int32)
        chunk = prompts.make_chunk(rows, starts, arch, length=self.length, images=self.images)
        features = encode(
            self.spec,
            self.weights,
            [picture for row in rows for picture in row.images],
            at_once=self.count,
            room=size * self.images,
        )
        slots = {name: picks.shape[1] for name, picks in chunk.picks.items()} | {"main": room}
        slots |= {"textual": room} if "textual" in slots else {}
        device_memory.check(self.spec, size, slots)
        slots = tuple(sorted(slots.items()))
        grown, logits = decode.prefill(self.spec, self.weights, chunk, features, slots=slots)
        choice = self.choice([self.place[task.index] for task, _ in guests], size)
        seen = prompts.seen(rows, arch) if choice.penalty is not None else None
        return grown, decode.begin(logits, choice, self.stops, seen)

    def choice(self, places: Sequence[int], size: int) -> sampling.BatchSamplingParams:
        """Returns the wishes of tasks by place, in `size` rows; a row without a task is done."""
        index = np.zeros(size, np.int32)
        index[: len(places)] = places
        chosen = jax.tree.map(lambda wish: wish[index], self.wishes)
        chosen.limits[len(places) :] = 0
        return chosen

    def go_on(self) -> None:
        """Writes up to `steps` tokens into every row that is not done."""
        if int(self.memory.used["main"]) + self.steps > self.capacity:
            self.memory = decode.compact(self.memory)
        places = [self.place[draft.task.index] if draft else 0 for draft in self.drafts]
        choice = self.choice(places, self.count)
        before = np.asarray(self.running.count)
        self.memory, self.running, said = decode.decode(
            self.spec,
            self.weights,
            self.memory,
            self.running,
            choice,
            self.stops,
            steps=self.steps,
        )
        said = jax.device_get(said)
        fresh = np.asarray(self.running.count) - before
        for row, draft in enumerate(self.drafts):
            if draft is not None:
                draft.take(said, row, int(fresh[row]))

    def leave(self) -> Iterator[tuple[GenerationTask, PartialOutput | UserError]]:
        """Yields what has ended or was refused, and frees its rows."""
        yield from self.refused
        self.refused.clear()
        if self.running is None:
            return
        done = np.array(self.running.done)
        for row, draft in enumerate(self.drafts):
            if draft is None:
                continue
            if not done[row] and draft.task.ended is not None:
                done[row] = draft.task.ended(draft.tokens)
            if done[row]:
                self.drafts[row] = None
                yield draft.task, draft
        self.running = dataclasses.replace(self.running, done=done)


def encode_all(spec: ModelSpec, weights: Weights, prompt: PromptSlots) -> jax.Array | None:
    """Returns the features of one conversation's pictures."""
    count = prompts.power(len(prompt.images))
    return encode(spec, weights, prompt.images, at_once=max(count, 1), room=count)


def encode(
    spec: ModelSpec, weights: Weights, pictures: Sequence[np.ndarray], *, at_once: int, room: int
) -> jax.Array | None:
    """Returns features f32[room*P,D], first those of the u8[h,w,3] pictures; None without room.

    The tower reads `at_once` pictures at a time: one shape, one compilation.
    """
    if not room:
        return None
    size = spec.arch.vision.image_size
    found = []
    for first in range(0, len(pictures), at_once):
        some = np.zeros((at_once, size, size, 3), np.uint8)
        some[: len(pictures) - first] = np.stack(pictures[first : first + at_once])
        found.append(decode.encode(spec, weights, some))
    rows = room * spec.arch.vision.num_patches
    return decode.stack(tuple(found), spec.arch.decoder.hidden_size, rows)
