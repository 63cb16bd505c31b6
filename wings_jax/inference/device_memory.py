"""How many slots a KV cache gets, checked against the free memory of the devices."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import psutil

from wings_jax.errors import UserError
from wings_jax.inference.engine import Chunk, ModelSpec

ADVICE = "lower --batch-size (rows), --max-new-tokens, or the length of the prompts"
GB = 10**9
LARGE = 2**28  # bytes of a cache whose memory is worth returning to the system at once


def cache_slots(spec: ModelSpec, chunk: Chunk, capacity: int) -> tuple[tuple[str, int], ...]:
    """Returns how many slots each attention's cache gets, for rows that start with this chunk.

    The main and the textual cache get `capacity` slots; the visual one those of the chunk, since
    answers are text.

    Raises:
      UserError: the caches need more memory than is free.
    """
    # A chunk's picks are the slots that it writes into a learner's cache.
    slots = {name: picks.shape[1] for name, picks in chunk.picks.items()}
    slots["main"] = capacity
    if "textual" in slots:
        slots["textual"] = capacity

    check_memory(spec, chunk.tokens.shape[0], slots)
    return tuple(sorted(slots.items()))


def check_memory(spec: ModelSpec, rows: int, slots: Mapping[str, int]) -> None:
    """Raises UserError if the caches of `rows` conversations alone need more than is free.

    A machine that overcommits memory kills a process which needs too much, without a message;
    this check comes first.
    """
    needed = cache_bytes(spec, rows, slots)
    # Without a mesh everything is on one device.
    devices = jax.devices()[:1] if spec.mesh is None else spec.mesh.devices.flatten().tolist()
    free = free_bytes(devices)
    if free is not None and needed > free:
        raise UserError(
            f"{rows} conversation(s) of {slots['main']} slots need {needed / GB:.1f} GB for their "
            f"caches, {free / GB:.1f} GB are free: {ADVICE}"
        )


def cache_bytes(spec: ModelSpec, rows: int, slots: Mapping[str, int]) -> int:
    """Returns the bytes of the keys and values of `rows` conversations, `slots` by attention."""
    llm = spec.arch.decoder

    # Learners have a key head for each of their query heads; the main attention has K of them.
    head_slots = 0
    for layer in range(llm.num_layers):
        head_slots += llm.num_kv_heads * slots["main"]
        for learner in spec.learners_of(layer):
            head_slots += llm.learner_heads * slots.get(learner, 0)

    keys_and_values = 2 * rows * head_slots * llm.head_dim
    return keys_and_values * jnp.dtype(spec.dtype).itemsize


def free_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Returns the free bytes of these devices together; None where a device does not report it."""
    # Of another process's device it is not known, and all processes have to decide the same.
    if any(device.process_index != jax.process_index() for device in devices):
        return None

    total = 0
    for device in devices:
        if device.platform == "cpu":
            return psutil.virtual_memory().available

        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        total += stats["bytes_limit"] - stats["bytes_in_use"]
    return total


def trim_host_memory() -> None:
    """Returns the memory of deleted arrays to the system, where arrays are in host memory.

    glibc keeps what was freed, and often takes new memory for the next large array; without glibc
    nothing happens.
    """
    if jax.default_backend() != "cpu":
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return
    trim(0)
