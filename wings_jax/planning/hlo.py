"""Reads the text of a compiled program: collectives with their bytes, and large temporaries.

A program is computations of instructions; loops, fusions and asynchronous operations call others.
The trip count of a loop, which the compiler writes beside it or in its condition, makes what is in
its body count as often as it runs. (XLA's own `cost_analysis` counts the body of a loop once.)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Operations whose result is not an array of its own.
_NO_BUFFER = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant", "call")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"\b(?:calls|body|condition|to_apply)=%?([\w.$-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"\bcondition=%?([\w.$-]+)")
_BODY = re.compile(r"\bbody=%?([\w.$-]+)")
_INDEX = re.compile(r"\), index=(\d+)")
# The three forms of a collective's groups of devices: {{0,1},{2,3}}, [2,4]<=[8], mesh['a'=8] {'a'}.
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_CHANNEL = re.compile(r"\bchannel_id=\d+")
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    name    of its result
    shape   text of the result's shape, a tuple in parentheses
    opcode  e.g. "fusion"
    rest    operands and attributes
    """

    name: str
    shape: str
    opcode: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in a step, per device.

    kind   one of COLLECTIVES
    count  how often they run
    bytes  that a device sends, by the ring algorithm
    """

    kind: str
    count: int
    bytes: float


@dataclasses.dataclass(frozen=True)
class LargeArray:
    """A result of an instruction.

    shape  e.g. "f32[8,512,151936]"
    bytes  of one device
    source what of the model it comes from, as far as the compiler notes it
    """

    shape: str
    bytes: float
    source: str


def parse_program(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns computation -> instructions, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        # A computation begins with its header; only that of the entry has the word ENTRY.
        header = _COMPUTATION.match(line)
        if header:
            current = header[2]
            computations[current] = []
            entry = current if header[1] else entry
            continue

        # An instruction belongs to the computation whose header came last.
        match = _INSTRUCTION.match(line)
        if match and current:
            computations[current].append(Instruction(*match.groups()))
    return computations, entry


def count_runs(computations: Mapping[str, list[Instruction]], entry: str) -> dict[str, int]:
    """Returns computation -> how often a step runs it; a loop without a trip count counts once."""
    runs = dict.fromkeys(computations, 0)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for instruction in computations[name]:
            # What a loop calls runs as often as the loop.
            is_loop = instruction.opcode == "while"
            trips = _trip_count(computations, instruction) if is_loop else 1
            for called in called_computations(instruction):
                if called in computations:
                    visit(called, times * trips)

    visit(entry, 1)
    return runs


def _trip_count(computations: Mapping[str, list[Instruction]], loop: Instruction) -> int:
    """Returns how often a loop runs: as noted, else from its counter, which starts at 0.

    The counter's bound is the constant that the condition compares with. A loop of which neither
    is known counts once.
    """
    noted = _TRIPS.search(loop.rest)
    if noted:
        return int(noted[1])

    # Without a note, the largest integer that the condition compares with is the counter's bound.
    called = _CONDITION.search(loop.rest)
    condition = computations.get(called[1] if called else "", [])
    bound = max(filter(None, map(_integer, condition)), default=1)
    return -(-bound // _counter_step(computations, loop, condition))


def _counter_step(
    computations: Mapping[str, list[Instruction]], loop: Instruction, condition: list[Instruction]
) -> int:
    """Returns what a loop adds to its counter in each run; 1 where it is not an integer.

    A loop that the compiler unrolled, such as those of a product whose shards are sent around
    while it is computed, adds more than 1.
    """
    # The counter is the element of the loop's tuple that the condition compares.
    compared = {name for x in condition if x.opcode == "compare" for name in operands(x)}
    indices = [_INDEX.search(x.rest) for x in condition if x.name in compared]
    index = next((int(found[1]) for found in indices if found), None)

    called = _BODY.search(loop.rest)
    body = {x.name: x for x in computations.get(called[1] if called else "", [])}
    if index is None or not body:
        return 1

    # The body ends with the tuple of the next run: there the counter is a sum with a constant.
    elements = operands(list(body.values())[-1])
    following = body.get(elements[index]) if index < len(elements) else None
    if following is None or following.opcode != "add":
        return 1
    steps = [_integer(body[name]) for name in operands(following) if name in body]
    return max(filter(None, steps), default=1)


def _integer(instruction: Instruction) -> int | None:
    """Returns the value of an integer constant, None for another instruction."""
    is_scalar = instruction.shape.startswith(("s32[]", "u32[]"))
    digits = re.match(r"\d+", instruction.rest)
    return int(digits[0]) if instruction.opcode == "constant" and is_scalar and digits else None


def operands(instruction: Instruction) -> list[str]:
    """Returns the names of an instruction's operands."""
    return re.findall(r"%([\w.$-]+)", instruction.rest.split(")")[0])


def _group_size(attributes: str, devices: int) -> int:
    """Returns how many devices take part in a collective; `devices` where it names no groups."""
    # {{0,1},{2,3}}: as many devices as the first group lists.
    if explicit := _GROUPS.search(attributes):
        return len(explicit[1].split(","))
    # [2,4]<=[8]: 2 groups of 4.
    if iota := _IOTA_GROUPS.search(attributes):
        return int(iota[1])
    # mesh['a'=2,'b'=4] {'b'}: the product of the sizes of the named axes.
    if mesh := _MESH_GROUPS.search(attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return devices


def shape_bytes(shape: str) -> float:
    """Returns the bytes of all arrays in a shape's text.

    >>> shape_bytes("(f32[2,3]{1,0}, bf16[8]{0})")
    40.0
    """
    return sum(
        _BITS.get(dtype, 32) / 8 * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _SHAPE.findall(shape)
    )


def list_collectives(text: str, devices: int) -> list[Traffic]:
    """Returns the collectives of a program for so many devices, by kind."""
    computations, entry = parse_program(text)
    runs = count_runs(computations, entry)

    # An asynchronous collective is a pair of -start and -done, which counts once.
    found = [
        (instruction.opcode.removesuffix("-start"), name, instruction)
        for name, instructions in computations.items()
        for instruction in instructions
        if runs[name] and instruction.opcode.removesuffix("-start") in COLLECTIVES
    ]

    # The TPU's compiler writes a collective that runs beside fusions as a piece in each of them,
    # all with its channel: it runs as often as its first and last pieces, the fewest.
    times: dict[str, int] = {}
    for _, name, instruction in found:
        identity = _collective_identity(name, instruction)
        times[identity] = min(runs[name], times.get(identity, runs[name]))

    # Kind -> how often a step runs it, and the bytes that a device sends in all.
    totals = dict.fromkeys(COLLECTIVES, (0, 0.0))
    for kind, name, instruction in found:
        # Further pieces count 0 times.
        repeats = times.pop(_collective_identity(name, instruction), 0)
        count, sent = totals[kind]
        per_run = _sent_bytes(kind, instruction, devices)
        totals[kind] = count + repeats, sent + repeats * per_run

    return [Traffic(kind, *total) for kind, total in totals.items() if total[0]]


def _collective_identity(computation: str, instruction: Instruction) -> str:
    """Returns the channel of a collective in pieces, the name and computation of another one."""
    channel = _CHANNEL.search(instruction.rest)
    is_piece = "async_collective_fusion_config" in instruction.rest
    return channel[0] if is_piece and channel else f"{computation}/{instruction.name}"


def _sent_bytes(kind: str, instruction: Instruction, devices: int) -> float:
    """Returns the bytes that a device sends in one collective."""
    # The asynchronous forms have operands, results and scalars in one tuple.
    shapes = re.findall(r"[a-z]\w*\[[\d,]*\]", instruction.shape)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        arrays = [shape for shape in shapes if not shape.endswith("[]")]
        shapes = arrays[len(arrays) // 2 :]
    size = sum(map(shape_bytes, shapes))

    group = _group_size(instruction.rest, devices)
    share = (group - 1) / group

    # Bytes sent by the ring algorithm, as multiples of the size of the result.
    factors = {
        "all-gather": share,
        "all-reduce": 2 * share,
        "reduce-scatter": group - 1,  # `size` is the result's, 1/n of the operand's
        "all-to-all": share,
        "collective-permute": 1.0,
    }
    return size * factors[kind]


def list_large_arrays(text: str, count: int = 5) -> list[LargeArray]:
    """Returns the largest results of instructions outside of fusions, each shape once."""
    computations, entry = parse_program(text)
    largest: dict[str, LargeArray] = {}
    for instruction in _buffers(computations, entry):
        (dtype, dims), *more = _SHAPE.findall(instruction.shape) or [("", "")]
        # Only results that are one array, not tuples or tokens.
        if more or not dtype:
            continue

        # The first instruction with a shape stands for all results of that shape.
        shape = f"{dtype}[{dims}]"
        source = _NAME.search(instruction.rest)
        largest.setdefault(
            shape, LargeArray(shape, shape_bytes(shape), source[1] if source else "")
        )
    return sorted(largest.values(), key=lambda array: -array.bytes)[:count]


def called_computations(instruction: Instruction) -> list[str]:
    """Returns what an instruction calls: fusions, bodies and conditions of loops, branches."""
    called = _CALLS.findall(instruction.rest)
    branches = _BRANCHES.search(instruction.rest)
    return called + (re.findall(r"[\w.$-]+", branches[1].replace("%", "")) if branches else [])


def _buffers(computations: Mapping[str, list[Instruction]], entry: str) -> Iterator[Instruction]:
    """Yields the instructions of the entry and of loop bodies whose results are arrays."""
    pending, seen = [entry], set()
    while pending:
        name = pending.pop()
        if name in seen or name not in computations:
            continue

        seen.add(name)
        for instruction in computations[name]:
            # The body of a fusion has no arrays in memory, so that fusions are not followed.
            if instruction.opcode in ("while", "call", "conditional"):
                pending += called_computations(instruction)
            if instruction.opcode not in _NO_BUFFER:
                yield instruction
