"""Memory that the kernels of a compiled GPU program read and write, by kind of kernel.

Read from the program's text, so that no GPU is needed. On an H100 the kernels that are neither
products of matrices nor attention took as long as their bytes at the rate of a copy.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from wings_jax.planning import hlo
from wings_jax.planning.hlo import Instruction

# Instructions that are no kernel.
_NO_KERNEL = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call")
_NO_KERNEL += ("conditional", "after-all", "partition-id", "replica-id")
_SLICES = ("dynamic-slice", "slice", "gather")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')


@dataclasses.dataclass(frozen=True)
class KernelTraffic:
    """Kernels of one kind in one run of a program, on one device.

    kind     "products", "attention" or "others"
    kernels  how often one starts
    bytes    that they read and write
    """

    kind: str
    kernels: int
    bytes: float


def count_traffic(text: str) -> list[KernelTraffic]:
    """Returns the traffic of a program's kernels, of `compiled.as_text()`.

    A kernel reads its operands and writes its result once. Of an array that it only takes a slice
    of, or writes a slice into, only the slice counts.
    """
    computations, entry = hlo.parse_program(text)
    runs = hlo.count_runs(computations, entry)
    # What a fusion or a reduction calls is part of its kernel.
    inlined = {
        called
        for instructions in computations.values()
        for instruction in instructions
        if instruction.opcode not in ("while", "call", "conditional")
        for called in hlo.called_computations(instruction)
    }

    totals = dict.fromkeys(("products", "attention", "others"), (0, 0.0))
    for name, instructions in computations.items():
        if name in inlined or not runs[name]:
            continue
        shapes = {x.name: x.shape for x in instructions}
        for instruction in instructions:
            if instruction.opcode in _NO_KERNEL:
                continue
            kind = _kind(instruction)
            kernels, size = totals[kind]
            per_run = _kernel_bytes(instruction, shapes, computations)
            totals[kind] = kernels + runs[name], size + runs[name] * per_run
    return [KernelTraffic(kind, *total) for kind, total in totals.items()]


def print_table(traffic: list[KernelTraffic]) -> None:
    """Prints how often kernels start, and what they read and write."""
    print("| kernels | started | GB read and written |\n|---|---|---|")
    for kind in traffic:
        print(f"| {kind.kind} | {kind.kernels:,} | {kind.bytes / 1e9:.2f} |")


def _kind(instruction: Instruction) -> str:
    """Returns the kind of a kernel: a library's by the function that is called."""
    target = _TARGET.search(instruction.rest)
    called = target[1] if target else ""
    if "mosaic_gpu" in called or "cudnn" in called:
        return "attention"
    # XLA names the products that Triton computes gemm_fusion_...
    is_product = "cublas" in called or "gemm" in instruction.name or instruction.opcode == "dot"
    return "products" if is_product else "others"


def _kernel_bytes(
    instruction: Instruction,
    shapes: Mapping[str, str],
    computations: Mapping[str, list[Instruction]],
) -> float:
    """Returns the bytes that one run of a kernel reads and writes."""
    if instruction.opcode != "fusion":
        read = sum(hlo.shape_bytes(shapes.get(x, "")) for x in hlo.operands(instruction))
        return read + hlo.shape_bytes(instruction.shape)

    body = computations[hlo.called_computations(instruction)[0]]
    users: dict[str, list[Instruction]] = {}
    for inner in body:
        for operand in hlo.operands(inner):
            users.setdefault(operand, []).append(inner)

    by_name = {inner.name: inner for inner in body}
    parameters = [inner for inner in body if inner.opcode == "parameter"]
    read = sum(hlo.shape_bytes(x.shape) * _read_share(x, users) for x in parameters)
    return read + _written_bytes(body[-1], by_name)


def _read_share(value: Instruction, users: Mapping[str, list[Instruction]]) -> float:
    """Returns the share of a value inside a fusion that its users read, 0 to 1."""
    share = 0.0
    for user in users.get(value.name, []):
        is_target = hlo.operands(user)[:1] == [value.name]
        if user.opcode in _SLICES:
            taken = hlo.shape_bytes(user.shape) / hlo.shape_bytes(value.shape)
            share = max(share, min(1.0, taken))
        elif user.opcode in ("dynamic-update-slice", "scatter") and is_target:
            continue  # what is written over is not read
        elif user.opcode in ("bitcast", "convert") and user.name in users:
            share = max(share, _read_share(user, users))
        else:
            share = 1.0
    return share


def _written_bytes(root: Instruction, by_name: Mapping[str, Instruction]) -> float:
    """Returns the bytes that a fusion writes, of its root."""
    operands = [by_name[name] for name in hlo.operands(root) if name in by_name]
    if root.opcode == "bitcast":
        return _written_bytes(operands[0], by_name)
    if root.opcode == "tuple":
        return sum(_written_bytes(operand, by_name) for operand in operands)
    if root.opcode in ("dynamic-update-slice", "scatter"):
        # The update is the second operand of the one, the third of the other.
        update = operands[1 if root.opcode == "dynamic-update-slice" else 2]
        return hlo.shape_bytes(update.shape)
    return hlo.shape_bytes(root.shape)
