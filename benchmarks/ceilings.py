"""What a device reaches at most: bfloat16 matrix products, and copying its memory.

    python benchmarks/ceilings.py [--size=8192] [--gib=2]

The products are of square matrices of random numbers (zeros are faster, and no model has them);
the copy counts bytes read and written. Peak rates of data sheets are not reached by either.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

from wings_jax.training import chips


def best_seconds(run: Callable[[], jax.Array], repeat: int = 5) -> float:
    """Returns the shortest time of a call, after one to warm up."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(size: int, chain: int = 16) -> float:
    """Returns operations per second of bf16 products [size,size] x [size,size]."""

    @jax.jit
    def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
        def step(_: jax.Array, x: jax.Array) -> jax.Array:
            # The scale keeps the values of a chain of products near 1.
            return (x @ y) * jnp.bfloat16(size**-0.5)

        return jax.lax.fori_loop(0, chain, step, x)

    keys = jax.random.split(jax.random.key(0), 2)
    x, y = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    return chain * 2 * size**3 / best_seconds(lambda: multiply(x, y))


def copy_rate(gib: float) -> float:
    """Returns bytes per second, read and written, of copying so many GiB."""
    x = jnp.ones((int(gib * 2**30) // 4,), jnp.float32)
    negate = jax.jit(jnp.negative)
    return 2 * x.nbytes / best_seconds(lambda: negate(x))


def main() -> None:
    """Prints both rates, and the share of the data sheet's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--gib", type=float, default=2.0)
    flags = parser.parse_args()

    kind = jax.devices()[0].device_kind
    chip = chips.find_chip(kind)
    flops, bandwidth = matmul_rate(flags.size), copy_rate(flags.gib)
    shares = ("-", "-")
    if chip:
        shares = (f"{flops / chip.flops:.0%}", f"{bandwidth / chip.bandwidth:.0%}")
    print(f"| {kind} | measured | of the data sheet |\n|---|---|---|")
    print(f"| bf16 matrix product, {flags.size} | {flops / 1e12:.1f} TFLOP/s | {shares[0]} |")
    print(f"| copy, {flags.gib:g} GiB | {bandwidth / 1e9:.0f} GB/s | {shares[1]} |")


if __name__ == "__main__":
    main()
