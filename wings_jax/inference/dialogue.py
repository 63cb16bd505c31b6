"""One conversation, turn by turn, whose past is never read twice.

What is in the memory is compared with what the conversation is now: the common part is kept, the
rest forgotten, and only what is new is read. So it makes no difference whether an answer was
stopped half-way, or is spelt with other tokens when it is read than when it was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from wings_jax import errors
from wings_jax.errors import UserError
from wings_jax.inference import decode, device_memory, kv_cache, prompts, sampling, scheduler
from wings_jax.inference.engine import ModelSpec, Weights
from wings_jax.inference.kv_cache import KVCache
from wings_jax.inference.prompts import PromptSlots
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model.layout import IMAGE

STEPS = 4  # tokens between two looks: few enough to stream, and to stop at once


@dataclasses.dataclass(frozen=True)
class OutputPiece:
    """Tokens that were just written, their log-probabilities, and whether they end the answer."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_last: bool


class Dialogue:
    """The memory of one conversation.

    Args:
      stops: token ids that end an answer.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, stops: Sequence[int]):
        self.spec, self.weights = spec, weights
        self.stops = np.asarray(stops or (-1,), np.int32)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.known: PromptSlots = prompts.EMPTY
        self.memory: KVCache | None = None
        self.read = 0  # slots that the last `answer` had to read

    def answer(self, prompt: PromptSlots, wish: SamplingParams) -> Iterator[OutputPiece]:
        """Yields the tokens of the answer to a prompt, which is the whole conversation so far.

        Raises:
          UserError: the conversation does not fit the devices' memory; nothing of it is known then.
        """
        try:
            with errors.full_memory(device_memory.ADVICE):
                yield from self._answer(prompt, wish)
        except UserError:
            self.reset()
            raise

    def _answer(self, prompt: PromptSlots, wish: SamplingParams) -> Iterator[OutputPiece]:
        if not scheduler.is_causal(self.spec, len(prompt.images)):
            self.read = prompt.count
            features = scheduler.encode_all(self.spec, self.weights, prompt)
            for token, logprob, is_last in scheduler.recompute(
                self.spec, self.weights, prompt, features, wish, self.stops.tolist()
            ):
                yield OutputPiece((token,), (logprob,), is_last)
            return
        logits = self._enter(prompt, wish.max_new_tokens)
        arch = self.spec.arch
        choice = sampling.stack_params([wish], arch.decoder.vocab_size)
        seen = None if choice.penalty is None else prompts.seen([prompt], arch)
        running = decode.begin(logits, choice, self.stops, seen)
        done = bool(running.done[0])
        yield OutputPiece((int(running.tokens[0]),), (float(running.logprobs[0]),), done)
        while not done:
            before = int(running.count[0])
            pending = int(running.tokens[0])
            self.memory = self._make_room(STEPS)
            # While this runs the old memory is gone: what is known is noted as soon as it ends.
            state, self.memory = self.memory, None
            state, running, said = decode.decode(
                self.spec, self.weights, state, running, choice, self.stops, steps=STEPS
            )
            self.memory = state
            count = int(running.count[0]) - before
            tokens = said["tokens"][:count, 0].tolist()
            self._note([pending, *tokens][:count])
            done = bool(running.done[0])
            yield OutputPiece(tuple(tokens), tuple(said["logprobs"][:count, 0].tolist()), done)

    def _note(self, tokens: Sequence[int]) -> None:
        """Adds text that has been entered into the memory to what is known."""
        fresh = prompts.from_ids(tokens, (), 1)
        self.known = prompts.join(self.known, fresh)

    def _enter(self, prompt: PromptSlots, answer: int) -> np.ndarray:
        """Brings the memory up to the prompt; returns f32[1,V] behind it."""
        kept = min(common(self.known, prompt), prompt.count - 1)
        patches = self.spec.arch.vision.num_patches
        kept = not_within_image(prompt, kept, patches)
        rest = prompts.tail(prompt, kept, patches)
        if self.memory is None or (rest.images and "visual" not in self.memory.visibility):
            kept, rest = 0, prompt
        self.read = rest.count
        length, images = prompts.bucket(rest.count), prompts.power(len(rest.images))
        starts = np.array([kept], np.int32)
        arch = self.spec.arch
        chunk = prompts.make_chunk([rest], starts, arch, length=length, images=images)
        features = scheduler.encode_all(self.spec, self.weights, rest)
        if kept == 0:
            slots = self._capacity(chunk, length + prompts.bucket(answer + STEPS))
            self.memory, logits = decode.prefill(
                self.spec, self.weights, chunk, features, slots=slots
            )
        else:
            self.memory = decode.truncate(self.memory, starts)
            state, self.memory = self._make_room(length, images * patches), None
            self.memory, logits = decode.extend(self.spec, self.weights, state, chunk, features)
        self.known = prompt
        return logits

    def _capacity(self, chunk: prompts.Chunk, room: int) -> tuple[tuple[str, int], ...]:
        slots = {name: picks.shape[1] for name, picks in chunk.picks.items()}
        slots |= {"main": room} | ({"textual": room} if "textual" in slots else {})
        device_memory.check(self.spec, 1, slots)
        return tuple(sorted(slots.items()))

    def _make_room(self, slots: int, visual: int = 0) -> KVCache:
        """Returns the memory with room for so many more slots; half of it stays free."""
        needs = {"main": slots, "textual": slots, "visual": visual}

        def lacks(state: KVCache) -> dict[str, int]:
            have = kv_cache.capacities(state)
            return {n: int(state.used[n]) + needs[n] for n in have if needs[n]}

        def fits(state: KVCache) -> bool:
            have = kv_cache.capacities(state)
            return all(size <= have[name] for name, size in lacks(state).items())

        if fits(self.memory):
            return self.memory
        state = decode.compact(self.memory)
        if not fits(state):
            wanted = {name: prompts.bucket(2 * size) for name, size in lacks(state).items()}
            state = decode.grow(state, tuple(sorted(wanted.items())))
        return state


def common(known: PromptSlots, now: PromptSlots) -> int:
    """Returns how many slots two conversations share from the start."""
    count = min(known.count, now.count)
    same = known.tokens[:count] == now.tokens[:count]
    same &= known.modality[:count] == now.modality[:count]
    end = int(np.argmin(same)) if not same.all() else count
    pictures = zip(known.images, now.images, strict=False)
    equal = [np.array_equal(one, other) for one, other in pictures]
    alike = equal.index(False) if False in equal else len(equal)
    if alike < len(now.images) or alike < len(known.images):
        is_image = now.modality[:end] == IMAGE
        ordinal = np.cumsum(is_image) - 1
        per_image = int((now.modality == IMAGE).sum()) // max(1, len(now.images))
        later = np.flatnonzero(is_image & (ordinal >= alike * per_image))
        end = int(later[0]) if len(later) else end
    return end


def not_within_image(slots: PromptSlots, at: int, patches: int) -> int:
    """Returns `at`, or where the image begins that it would cut through."""
    if at >= slots.count or slots.modality[at] != IMAGE:
        return at
    return at - int((slots.modality[:at] == IMAGE).sum()) % patches
