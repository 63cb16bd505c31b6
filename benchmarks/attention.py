"""Time and temporary memory of one attention with router probes, by kernel.

    python benchmarks/attention.py [--slots=1024,2048,4096] [--heads=8] [--width=64] [--repeat=3]

A row per length: seconds for value and gradient, and the temporary memory that XLA reports.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

from wings_jax.model import attention, layout


def measure(kernel: str, slots: int, heads: int, width: int, repeat: int) -> tuple[float, float]:
    """Returns seconds and temporary MiB of the value and gradient of a causal row of `slots`."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (1, slots, heads, width)) for key in keys[:3])
    probes = jax.random.normal(keys[3], (1, slots, 2))

    modality = np.full((1, slots), layout.TEXT)
    rows = layout.make_layout(modality, modality)
    visibility = {
        "query": layout.query_visibility(rows),
        "key": layout.key_visibility(rows, layout.MAIN),
    }

    def scalar(q, k, v, probes):
        out, probed = attention.attend(q, k, v, probes=probes, kernel=kernel, **visibility)
        return (out**2).sum() + probed.sum()

    run = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3))).lower(q, k, v, probes).compile()

    temporary = run.memory_analysis().temp_size_in_bytes / 2**20

    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(run(q, k, v, probes))
        times.append(time.perf_counter() - start)
    return min(times), temporary


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/attention.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--slots", default="1024,2048,4096")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    flags = parser.parse_args()
    print("| slots | kernel | s | temporary MiB |\n|---:|---|---:|---:|")
    for slots in map(int, flags.slots.split(",")):
        for kernel in ("einsum", "chunked"):
            seconds, memory = measure(kernel, slots, flags.heads, flags.width, flags.repeat)
            print(f"| {slots} | {kernel} | {seconds:.3f} | {memory:.1f} |", flush=True)


if __name__ == "__main__":
    main()
