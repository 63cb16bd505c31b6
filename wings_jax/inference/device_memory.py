"""What the memory of the devices holds, said before it is full or, at the latest, when it is."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from wings_jax.errors import UserError
from wings_jax.inference.engine import ModelSpec

ADVICE = "lower --batch-size (rows), --max-new-tokens, or the length of the prompts"
GB = 10**9


def check(spec: ModelSpec, rows: int, slots: Mapping[str, int]) -> None:
    """Raises UserError if the caches of `rows` conversations alone are more than is free.

    `slots` are those of each attention. On a machine that lends more memory than it has, asking
    for too much ends the process without a word; this is the word.
    """
    need = cache_bytes(spec, rows, slots)
    free = free_bytes(jax.devices()[:1] if spec.mesh is None else spec.mesh.devices.flat)
    if free is not None and need > free:
        raise UserError(
            f"{rows} conversation(s) of {slots['main']} slots need {need / GB:.1f} GB for their "
            f"caches, {free / GB:.1f} GB are free: {ADVICE}"
        )


def cache_bytes(spec: ModelSpec, rows: int, slots: Mapping[str, int]) -> int:
    """Returns the bytes of the keys and values of `rows` conversations, `slots` by attention."""
    llm = spec.arch.decoder
    heads = 0
    for layer in range(llm.num_layers):
        heads += llm.num_kv_heads * slots["main"]
        heads += sum(llm.num_heads * slots.get(name, 0) for name in spec.learners_of(layer))
    return 2 * rows * heads * llm.head_dim * jnp.dtype(spec.dtype).itemsize


def free_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Returns the bytes that are free on these devices together; None where nobody says."""
    total = 0
    for device in devices:
        if device.platform == "cpu":
            return _free_on_host()
        is_here = device.process_index == jax.process_index()
        stats = (device.memory_stats() if is_here else None) or {}
        if "bytes_limit" not in stats:
            return None
        total += stats["bytes_limit"] - stats["bytes_in_use"]
    return total


def _free_on_host() -> int | None:
    """Returns what Linux says is available; None elsewhere."""
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None
