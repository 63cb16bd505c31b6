"""One conversation, turn by turn, with a KV cache that is reused from turn to turn.

The conversation in the cache is compared with the conversation of the new prompt: the common
start is kept, the rest truncated, and only what is new is computed. So an answer may have been
stopped half-way, and the tokens of its text as part of a prompt may differ from those that were
generated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from wings_jax import distributed, errors
from wings_jax.errors import UserError
from wings_jax.inference import (
    chunks,
    decode,
    device_memory,
    image_features,
    kv_cache,
    sampling,
    uncached,
)
from wings_jax.inference.chunks import PromptSlots
from wings_jax.inference.engine import ModelSpec, Weights
from wings_jax.inference.kv_cache import KVCache
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model.layout import IMAGE

STEPS = 4  # tokens per device call: few enough to stream, and to stop at once


@dataclasses.dataclass(frozen=True)
class OutputPiece:
    """Tokens that were just generated.

    tokens    ids, a stop token included
    logprobs  the log-probability of each
    is_last   whether they end the answer
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_last: bool


class Dialogue:
    """The KV cache of one conversation.

    Args:
      stops: token ids that end an answer.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, stops: Sequence[int]):
        self.spec, self.weights = spec, weights
        self.stops = np.asarray(stops or (-1,), np.int32)
        self.reset()

    def reset(self) -> None:
        """Drops the cache."""
        self.cached: PromptSlots = chunks.EMPTY  # the conversation that the cache holds
        self.cache: KVCache | None = None
        self.computed_slots = 0  # prompt slots that the last `answer` had to compute

    def answer(self, prompt: PromptSlots, params: SamplingParams) -> Iterator[OutputPiece]:
        """Yields the answer to a prompt, which is the whole conversation so far.

        Raises:
          UserError: the conversation does not fit the devices' memory; the cache is dropped.
        """
        try:
            with errors.full_memory(device_memory.ADVICE):
                if uncached.is_causal(self.spec, len(prompt.images)):
                    yield from self._answer(prompt, params)
                else:
                    yield from self._answer_uncached(prompt, params)
        except UserError:
            self.reset()
            raise

    def _answer_uncached(
        self, prompt: PromptSlots, params: SamplingParams
    ) -> Iterator[OutputPiece]:
        # Nothing is cached: every slot of the prompt is computed.
        self.computed_slots = prompt.count
        features = image_features.encode_all(self.spec, self.weights, prompt)
        for token, logprob, is_last in uncached.recompute(
            self.spec, self.weights, prompt, features, params, self.stops.tolist()
        ):
            yield OutputPiece((token,), (logprob,), is_last)

    def _answer(self, prompt: PromptSlots, params: SamplingParams) -> Iterator[OutputPiece]:
        logits = self._enter(prompt, params.max_new_tokens)

        # A batch of one row: the same compiled loop as in `scheduler`.
        arch = self.spec.arch
        batch_params = sampling.stack_params([params], arch.decoder.vocab_size)
        seen = None if batch_params.penalty is None else chunks.seen_tokens([prompt], arch)
        state = decode.begin(logits, batch_params, self.stops, seen)
        pending, logprob, count, is_done = _fetch_state(state)
        yield OutputPiece((pending,), (logprob,), is_done)

        while not is_done:
            assert self.cache is not None  # as `_enter` and the end of this block leave it
            # `decode` donates the cache. Ctrl-C before the end of this block leaves None, never a
            # cache whose content is not that of `cached`.
            cache, self.cache = make_room(self.cache, STEPS), None
            cache, state, generated = decode.decode(
                self.spec, self.weights, cache, state, batch_params, self.stops, steps=STEPS
            )

            # The newest token is sampled but not in the cache yet; the one before it now is.
            generated = distributed.fetch(generated)
            newest, _, new_count, is_done = _fetch_state(state)
            more = new_count - count
            tokens = generated["tokens"][:more, 0].tolist()
            logprobs = generated["logprobs"][:more, 0].tolist()
            self._append([pending, *tokens][:more])
            self.cache = cache
            pending, count = newest, new_count
            yield OutputPiece(tuple(tokens), tuple(logprobs), is_done)

    def _append(self, tokens: Sequence[int]) -> None:
        """Records text tokens that have been written into the cache."""
        self.cached = chunks.join(self.cached, chunks.from_ids(tokens, (), 1))

    def _enter(self, prompt: PromptSlots, max_new_tokens: int) -> np.ndarray:
        """Makes the cache hold the prompt; returns the logits f32[1,V] after it."""
        arch = self.spec.arch
        patches = arch.vision.num_patches

        # At least the prompt's last slot is computed, since its logits are needed.
        reused = min(common_prefix(self.cached, prompt), prompt.count - 1)
        reused = start_of_image(prompt, reused, patches)
        rest = chunks.tail(prompt, reused, patches)
        if self.cache is None or (rest.images and "visual" not in self.cache.visibility):
            reused, rest = 0, prompt
        self.computed_slots = rest.count

        length, images = chunks.bucket(rest.count), chunks.power(len(rest.images))
        starts = np.array([reused], np.int32)
        chunk = chunks.make_chunk([rest], starts, arch, length=length, images=images)
        features = image_features.encode_all(self.spec, self.weights, rest)

        # As in `_answer`: no cache until it is whole, in case of Ctrl-C.
        old_cache, self.cache = self.cache, None
        if reused == 0:
            del old_cache
            capacity = length + chunks.bucket(max_new_tokens + STEPS)
            slots = device_memory.cache_slots(self.spec, chunk, capacity)
            cache, logits = decode.prefill(self.spec, self.weights, chunk, features, slots=slots)
        else:
            cache = decode.truncate(old_cache, starts)
            cache = make_room(cache, length, images * patches)
            cache, logits = decode.extend(self.spec, self.weights, cache, chunk, features)

        self.cached = prompt
        self.cache = cache
        return logits


def _fetch_state(state: decode.DecodeState) -> tuple[int, float, int, bool]:
    """Returns newest token, its log-probability, count and whether it is the last, of one row."""
    columns = distributed.fetch((state.tokens, state.logprobs, state.count, state.done))
    token, logprob, count, is_done = (column[0].item() for column in columns)
    return token, logprob, count, is_done


def make_room(cache: KVCache, slots: int, visual: int = 0) -> KVCache:
    """Returns the cache with so many free slots; when it grows, half of it becomes free.

    Args:
      slots: of the main and the textual cache; `visual` of the visual one.
    """
    new_slots = {"main": slots, "textual": slots, "visual": visual}

    def needed(cache: KVCache) -> dict[str, int]:
        return {
            name: int(cache.used[name]) + new_slots[name]
            for name in kv_cache.capacities(cache)
            if new_slots[name]
        }

    def fits(cache: KVCache) -> bool:
        capacities = kv_cache.capacities(cache)
        return all(size <= capacities[name] for name, size in needed(cache).items())

    # Usually the slots that were allocated in advance suffice.
    if fits(cache):
        return cache

    # Slots that were truncated are freed first; a longer buffer is the last resort.
    cache = decode.compact(cache)
    if not fits(cache):
        sizes = {name: chunks.bucket(2 * size) for name, size in needed(cache).items()}
        cache = decode.grow(cache, tuple(sorted(sizes.items())))
    return cache


def common_prefix(one: PromptSlots, other: PromptSlots) -> int:
    """Returns how many slots at the start of two conversations are equal, images included.

    >>> first = chunks.from_ids([5, 6, 7, 8], (), image_slots=2)
    >>> second = chunks.from_ids([5, 6, 9], (), image_slots=2)
    >>> common_prefix(first, second)
    2
    """
    count = min(one.count, other.count)
    is_equal = one.tokens[:count] == other.tokens[:count]
    is_equal &= one.modality[:count] == other.modality[:count]
    end = count if is_equal.all() else int(np.argmin(is_equal))

    # Image slots all look alike: the prefix ends where the first image differs.
    pairs = zip(one.images, other.images, strict=False)
    same_image = [np.array_equal(first, second) for first, second in pairs]
    equal_images = same_image.index(False) if False in same_image else len(same_image)
    if equal_images == max(len(one.images), len(other.images)):
        return end

    # The first slot of the first image that differs.
    is_image = other.modality[:end] == IMAGE
    slots_per_image = int((other.modality == IMAGE).sum()) // max(1, len(other.images))
    ordinal = np.cumsum(is_image) - 1
    differing = np.flatnonzero(is_image & (ordinal >= equal_images * slots_per_image))
    return int(differing[0]) if len(differing) else end


def start_of_image(slots: PromptSlots, index: int, patches: int) -> int:
    """Returns `index`, or the first slot of the image of `patches` slots that it lies within."""
    if index >= slots.count or slots.modality[index] != IMAGE:
        return index
    return index - int((slots.modality[:index] == IMAGE).sum()) % patches
