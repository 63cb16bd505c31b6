"""Attention kernels on this machine: equal to the reference? how fast?

    python benchmarks/kernels.py [--quick] [--kernels=tokamax,cudnn] [--json=FILE]

First every kernel's values and gradients are compared with the float32 einsum on random rows with
packing, several images, padding and grouped heads. Then forward, and forward and backward, are
timed at the sizes of training. Each kernel runs in a process of its own, so that one that fails
is a row of the table with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from kernel_cases import CASES, CHECK, PATCHES, SLOW_CASES, Case, make_inputs

from wings_jax.model import attention, layout
from wings_jax.model.kernels import choice, intervals, tokamax

KERNELS = ("tokamax", "tokamax-float32", "cudnn", "splash", "chunked", "einsum")
NAMES = {layout.MAIN: "main", layout.VISUAL: "visual", layout.TEXTUAL: "textual", None: "tower"}
SECONDS = 120  # of one kernel's process, at most
# What a kernel that does not run raises: RuntimeError from the compiler or where memory runs out
# (JaxRuntimeError), from cuDNN where its library is missing, and as NotImplementedError for shapes
# and dtypes that a kernel does not have; ValueError for shapes that it refuses.
FAILURES = (RuntimeError, ValueError)


def make_attention(
    kernel: str, case: Case, visibility: Mapping
) -> tuple[Callable, jax.Array | None]:
    """Returns a function of q, k, v and probes, and the order of keys that it needs.

    Masks and orders are made once per batch in training, and here before any measurement.
    """
    name = kernel.removesuffix("-float32")
    options: dict[str, Any] = {"kernel": name, **visibility}
    order = None
    if name in choice.ACCELERATED and visibility:
        is_causal = case.which in (layout.MAIN, layout.TEXTUAL)
        options["mask"], order = jax.jit(
            functools.partial(attention.prepare_keys, name, is_causal=is_causal)
        )(visibility["query"], visibility["key"])

    def run(q, k, v, probes):
        return attention.attend(q, k, v, probes=probes if case.probes else None, **options)

    return run, order


def in_order(run: Callable, order: jax.Array | None) -> Callable:
    """Returns `run` of keys, values and probes that are not in its order yet."""
    if order is None:
        return run
    return lambda q, *keys: run(q, *(intervals.take_slots(x, order) for x in keys))


def make_scalar(run: Callable, case: Case) -> Callable:
    """Returns a function of the same arguments to differentiate."""

    def scalar(q, k, v, probes):
        out, probed = run(q, k, v, probes)
        wave = jnp.cos(jnp.arange(case.width, dtype=jnp.float32))
        total = (out.astype(jnp.float32) * wave).sum()
        return total + (0 if probed is None else (probed**2).sum())

    return scalar


def check(kernel: str, which: int, dtype: jnp.dtype) -> dict[str, float]:
    """Returns the largest error of values and gradients, relative to the largest value.

    The reference is the float32 einsum of the same (rounded) inputs.
    """
    case = dataclasses.replace(CHECK, which=which)
    inputs = make_inputs(case, image=60)
    arrays = tuple(x.astype(dtype) for x in inputs.arrays[:3])
    rounded = tuple(x.astype(jnp.float32) for x in arrays)
    probes = inputs.arrays[3]

    def results(name: str, arrays: tuple) -> dict[str, jax.Array]:
        run = in_order(*make_attention(name, case, inputs.visibility))
        out, probed = jax.jit(run)(*arrays, probes)
        scalar = make_scalar(run, case)
        grads = jax.jit(jax.grad(scalar, argnums=(0, 1, 2, 3)))(*arrays, probes)
        named = dict(zip(("d_q", "d_k", "d_v", "d_probes"), grads, strict=True))
        return {"out": out, "probed": probed, **named}

    with jax.default_matmul_precision("highest"):
        expected = results("einsum", rounded)
    errors = {}
    for name, value in results(kernel, arrays).items():
        reference = np.asarray(expected[name], np.float64)
        error = np.abs(np.asarray(value, np.float64) - reference).max() / np.abs(reference).max()
        errors[name] = float(error)

    has_keys = np.asarray(layout.visible(*inputs.visibility.values())).any(-1)
    run = in_order(*make_attention(kernel, case, inputs.visibility))
    out = np.asarray(jax.jit(run)(*arrays, probes)[0], np.float32)
    if out[~has_keys].any():
        raise ValueError("the output of rows without visible keys is not 0")
    return errors


def measure(run: Callable, arrays: tuple, repeat: int) -> float:
    """Returns milliseconds per call: the least mean of 5 groups of calls."""
    jax.block_until_ready(run(*arrays))
    means = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeat):
            result = run(*arrays)
        jax.block_until_ready(result)
        means.append((time.perf_counter() - start) / repeat)
    return 1e3 * min(means)


def time_case(kernel: str, case: Case, dtype: jnp.dtype, repeat: int) -> dict[str, float]:
    """Returns milliseconds and TFLOP/s of a case; visible pairs of query and key count."""
    inputs = make_inputs(case, PATCHES if case.slots > 2 * PATCHES else case.slots // 2)
    arrays = (*(x.astype(dtype) for x in inputs.arrays[:3]), inputs.arrays[3])
    run, order = make_attention(kernel, case, inputs.visibility)
    if order is not None:
        arrays = (arrays[0], *(intervals.take_slots(x, order) for x in arrays[1:]))
    flops = 4 * case.heads * case.width * inputs.pairs

    forward = jax.jit(run).lower(*arrays).compile()
    result = {"forward_ms": measure(forward, arrays, repeat)}
    result["forward_tflops"] = flops / result["forward_ms"] / 1e9
    if case.which is None:  # the tower is frozen
        return result

    argnums = (0, 1, 2, 3) if case.probes else (0, 1, 2)
    both = jax.jit(jax.value_and_grad(make_scalar(run, case), argnums)).lower(*arrays).compile()
    result["both_ms"] = measure(both, arrays, repeat)
    result["both_tflops"] = 3.5 * flops / result["both_ms"] / 1e9
    result["temporary_mb"] = both.memory_analysis().temp_size_in_bytes / 2**20
    return result


def run_kernel(kernel: str, quick: bool, write: Callable[[dict[str, Any]], None]) -> None:
    """Writes the rows of one kernel: checks, then times. A failure is a row with its reason."""
    device = jax.devices()[0]
    is_cpu = device.platform == "cpu"
    dtypes = (jnp.bfloat16, jnp.float32)
    name = kernel.removesuffix("-float32")
    if name in choice.ACCELERATED:
        module = choice.ACCELERATED[name]
        missing = {d: module.requirement(device, jnp.dtype(d)) for d in dtypes}
        dtypes = tuple(d for d in dtypes if missing[d] is None)
        if not dtypes:
            write({"kernel": kernel, "failure": missing[jnp.bfloat16]})
            return
        if kernel == "tokamax-float32":
            module.attend = functools.partial(tokamax.attend, out_dtype=jnp.float32)

    cases = CASES if name in choice.ACCELERATED else SLOW_CASES
    if is_cpu or quick:
        cases = tuple(dataclasses.replace(case, rows=1, heads=4, kv_heads=4) for case in SLOW_CASES)
    dtype = jnp.float32 if is_cpu else jnp.bfloat16
    repeat = 2 if is_cpu else 20
    tasks: list[tuple[dict[str, Any], Callable[[], dict[str, float]]]] = [
        (
            {"check": NAMES[which], "dtype": jnp.dtype(d).name},
            functools.partial(check, kernel, which, d),
        )
        for d in dtypes
        for which in (layout.MAIN, layout.VISUAL, layout.TEXTUAL)
    ]
    tasks += [
        (
            {
                **dataclasses.asdict(case),
                "which": NAMES[case.which],
                "dtype": jnp.dtype(dtype).name,
            },
            functools.partial(time_case, kernel, case, dtype, repeat),
        )
        for case in cases
    ]

    for labels, task in tasks:
        row = {"kernel": kernel, **labels}
        try:
            row |= task()
        except FAILURES as error:
            row["failure"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        write(row)


def ceiling() -> dict[str, Any]:
    """Returns this device, and its rate of large bfloat16 matrix products in TFLOP/s."""
    device = jax.devices()[0]
    size = 512 if device.platform == "cpu" else 8192
    matrix = jnp.ones((size, size), jnp.bfloat16)
    milliseconds = measure(jax.jit(jnp.matmul), (matrix, matrix), 2)
    rate = 2 * size**3 / milliseconds / 1e9
    return {
        "kernel": "matmul",
        "device": device.device_kind,
        "jax": jax.__version__,
        "tflops": rate,
    }


def run_one(kernel: str, quick: bool, path: pathlib.Path) -> None:
    """Runs one kernel in this process; its rows are lines of a file, and of stderr."""
    with path.open("w") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps(row), file=sys.stderr, flush=True)

        if kernel == "matmul":
            write(ceiling())
        else:
            run_kernel(kernel, quick, write)


def run_all(kernels: list[str], quick: bool, rows: list[dict[str, Any]]) -> None:
    """Appends all rows; every kernel in a process of its own."""
    for kernel in ("matmul", *kernels):
        with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
            command = [sys.executable, __file__, "--one", kernel, "--json", file.name]
            failure = ""
            try:
                status = subprocess.run(
                    [*command, *["--quick"] * quick], timeout=SECONDS
                ).returncode
                failure = f"exit status {status}" if status else ""
            except subprocess.TimeoutExpired:
                failure = f"took more than {SECONDS} s"
            finally:
                lines = pathlib.Path(file.name).read_text().splitlines()
                rows += [json.loads(line) for line in lines]
            rows += [{"kernel": kernel, "failure": failure}] if failure else []


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Prints Markdown tables of the checks and the times, and what failed."""
    for row in rows:
        if "tflops" in row:
            print(
                f"{row['device']}, jax {row['jax']}: matrix products {row['tflops']:.1f} TFLOP/s\n"
            )
    columns = ("out", "probed", "d_q", "d_k", "d_v", "d_probes")
    print("| kernel | dtype | attention | " + " | ".join(columns) + " |")
    print("|---|---|---|" + "---|" * len(columns))
    for row in rows:
        if "out" in row:
            errors = " | ".join(f"{row[name]:.1e}" for name in columns)
            print(f"| {row['kernel']} | {row['dtype']} | {row['check']} | {errors} |")

    print("\n| kernel | attention | B x T, N/K, H, probes | forward ms (TFLOP/s) |", end="")
    print(" forward and backward ms (TFLOP/s) | temporary MB |\n|---|---|---|---|---|---|")
    for row in rows:
        if "forward_ms" in row:
            size = f"{row['rows']} x {row['slots']}, {row['heads']}/{row['kv_heads']}"
            size += f", {row['width']}, {row['probes']}" + (", packed" if row["packed"] else "")
            forward = f"{row['forward_ms']:.3f} ({row['forward_tflops']:.0f})"
            both = "- | -"
            if "both_ms" in row:
                both = (
                    f"{row['both_ms']:.3f} ({row['both_tflops']:.0f}) | {row['temporary_mb']:.0f}"
                )
            print(f"| {row['kernel']} | {row['which']} | {size} | {forward} | {both} |")

    print()
    for row in rows:
        if "failure" in row:
            labels = " ".join(str(row.get(x, "")) for x in ("check", "which", "rows", "slots"))
            print(f"not available: {row['kernel']} {labels.strip()}: {row['failure']}")


def main() -> None:
    """Prints the tables, and with --json writes the rows."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/kernels.py", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--json", default="", help="file for the rows")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()

    if flags.one:
        run_one(flags.one, flags.quick, pathlib.Path(flags.json))
        return

    # What was measured is printed also where `timeout` ends the run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[dict[str, Any]] = []
    try:
        run_all(flags.kernels.split(","), flags.quick, rows)
    finally:
        print_tables(rows)
        if flags.json:
            pathlib.Path(flags.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
