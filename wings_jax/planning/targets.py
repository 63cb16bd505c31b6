"""What a step is compiled for: a TPU topology without its chips, or virtual devices of the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from wings_jax.errors import UserError
from wings_jax.training import chips
from wings_jax.training.chips import GIB, Chip

# Chips of a slice -> its shape; v4 and v5p are three-dimensional.
_SHAPES_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16"}
_SHAPES_2D[256] = "16x16"
_SHAPES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
_SHAPES_3D |= {256: "4x8x8", 512: "8x8x8"}
_GENERATIONS = {"v4": "v4", "v5p": "v5p", "v5e": "v5e", "v5litepod": "v5e", "v6e": "v6e"}


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    name      as the user gave it
    compiler  which compiler makes the program: "TPU" or "CPU"
    devices   of JAX; they need not exist
    chip      its rates; None where no chip was named
    memory    bytes of one device; None where they are not known
    """

    name: str
    compiler: str
    devices: Sequence[Any]
    chip: Chip | None
    memory: float | None


def topology_name(text: str) -> tuple[str, str]:
    """Returns the name that the TPU compiler has for a topology, and the chip's generation.

    >>> topology_name("v5p:2x2x2"), topology_name("v5litepod-16"), topology_name("v6e-8")
    (('v5p:2x2x2', 'v5p'), ('v5e:4x4', 'v5e'), ('v6e:2x4', 'v6e'))
    >>> topology_name("v5p-16")  # v4 and v5p slices are named by cores, two to a chip
    ('v5p:2x2x2', 'v5p')

    Raises:
      UserError: it has another form, or there is no slice of that size.
    """
    match = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+){1,2})|-(\d{1,5}))", text)
    generation = _GENERATIONS.get(match[1]) if match else None
    if match is None or generation is None:
        known = ", ".join(_GENERATIONS)
        raise UserError(
            f"--topology: {text!r} is not GENERATION:SHAPE or GENERATION-NUMBER, such as "
            f"v5p:2x2x2 or v5litepod-16, with one of {known}"
        )

    # A number of chips or cores stands for the slice of that size.
    shape = match[2]
    if not shape:
        # Slices of three dimensions are named by cores, two to a chip.
        is_torus = generation in ("v4", "v5p")
        shapes = _SHAPES_3D if is_torus else _SHAPES_2D
        count = int(match[3]) // 2 if is_torus else int(match[3])
        if count not in shapes:
            sizes = ", ".join(str(n * 2 if is_torus else n) for n in shapes)
            raise UserError(f"--topology: {text!r}: there are slices of {sizes}")
        shape = shapes[count]
    return f"{generation}:{shape}", generation


def open_topology(text: str) -> Target:
    """Returns the devices of a TPU topology; no TPU is needed, but its compiler (libtpu).

    Raises:
      UserError: libtpu is not installed, or has no such topology.
    """
    name, generation = topology_name(text)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology: {text} needs libtpu, the TPU compiler: pip install "
            f"'jax[tpu]=={importlib.metadata.version('jax')}' (no TPU is needed)"
        )

    # Without these, libtpu sends requests to a metadata server that only TPU machines have.
    environment = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_ACCELERATOR_TYPE": "v5p-16" if generation in ("v4", "v5p") else "v5litepod-16",
    }
    # What the user has set stays.
    for key, value in environment.items():
        os.environ.setdefault(key, value)

    # Arrays are made by the CPU's backend: the topology describes chips that need not exist.
    jax.config.update("jax_platforms", "cpu")

    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(name, "tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--topology: {text}: {str(error).splitlines()[0][:200]}") from error
    chip = chips.CHIPS[generation]
    return Target(text, "TPU", devices, chip, chip.memory)


def open_devices(count: int, chip_name: str, hbm: float) -> Target:
    """Returns so many virtual devices of the CPU; JAX must not have been used before.

    Args:
      chip_name: key of `chips.CHIPS`, or ''.
      hbm: GiB of one device; 0 for the chip's.

    Raises:
      UserError: a number is not positive, or the chip is not known.
    """
    if count < 1:
        raise UserError(f"--devices: {count} is less than 1")
    if hbm < 0:
        raise UserError(f"--hbm: {hbm:g} is less than 0")
    if chip_name and chip_name not in chips.CHIPS:
        raise UserError(f"--chip: {chip_name!r} is not one of {', '.join(chips.CHIPS)}")

    # The number of virtual devices is fixed when JAX first uses its CPU backend.
    jax.config.update("jax_platforms", "cpu")
    if jax.config.values["jax_num_cpu_devices"] < count:
        # A program that has used JAX already has the devices that it has.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()[:count]
    if len(devices) < count:
        raise UserError(f"--devices: this process has {len(devices)} devices, not {count}")

    chip = chips.CHIPS[chip_name] if chip_name else None
    # `--hbm` has precedence over the chip's memory.
    memory = hbm * GIB or (chip.memory if chip else None)
    name = f"{count} x {chip.name if chip else 'device'}"
    return Target(name, "CPU", devices, chip, memory)
