"""What prompts have in common at their beginning: computed once, continued by every row."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from wings_jax.inference import chunks, decode, device_memory, engine, kv_cache
from wings_jax.inference.chunks import PromptSlots
from wings_jax.inference.engine import ModelSpec, Weights
from wings_jax.inference.kv_cache import KVCache
from wings_jax.model.layout import IMAGE

MIN_SHARED = 48  # slots of a common beginning that are worth a computation of their own


def shared_slots(prompts: Sequence[PromptSlots]) -> int:
    """Returns how many slots all prompts share at their beginning, 0 if it is not worth it.

    Prompts with images share nothing: with the release's semantics they cannot be extended.
    """
    if len(prompts) < 2 or any((prompt.modality == IMAGE).any() for prompt in prompts):
        return 0

    # The last slot of a prompt is its own, as its state predicts the answer.
    count = common_length([prompt.tokens.tolist() for prompt in prompts])
    return count if count >= MIN_SHARED else 0


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Returns how many ids all sequences have in common at their start, with one left of each.

    >>> common_length([[1, 2, 3], [1, 2, 4, 5]]), common_length([[1, 2], [1, 2, 3]])
    (2, 1)
    """
    # What the smallest and the largest have in common, all others have too.
    pairs = zip(min(map(list, sequences)), max(map(list, sequences)), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(min(common, min(map(len, sequences)) - 1), 0)


def compute_prefix(spec: ModelSpec, weights: Weights, prefix: PromptSlots) -> KVCache:
    """Returns the KV cache of one row of text, whose next slot is the one after the prefix.

    Raises:
      UserError: the cache does not fit the devices' memory.
    """
    length = chunks.bucket(prefix.count)
    chunk = chunks.make_chunk([prefix], np.zeros(1, np.int32), spec.arch, length=length, images=0)
    slots = device_memory.cache_slots(spec, chunk, length)

    # Not in one program: it runs once, and would take longer to compile.
    cache, _ = engine.prefill(spec, weights, chunk, None, dict(slots))
    return decode.compact(cache)


def repeat_prefix(
    spec: ModelSpec, cache: KVCache, rows: int, slots: tuple[tuple[str, int], ...]
) -> KVCache:
    """Returns the cache of one row `rows` times, with at least as many slots."""
    # Layer by layer, as the intermediate arrays of all would be as large as the cache.
    repeated = [
        _repeat_layer(spec, dataclasses.replace(cache, layers=(layer,)), rows, slots)
        for layer in cache.layers
    ]
    return dataclasses.replace(repeated[0], layers=tuple(one.layers[0] for one in repeated))


@functools.partial(jax.jit, static_argnames=("spec", "rows", "slots"))
def _repeat_layer(
    spec: ModelSpec, cache: KVCache, rows: int, slots: tuple[tuple[str, int], ...]
) -> KVCache:
    """Returns the cache of one row and one layer `rows` times."""
    grown = kv_cache.grow(kv_cache.repeat_row(cache, rows), dict(slots))
    return kv_cache.shard_cache(grown, spec.mesh)
