"""Peak rates of accelerators, for MFU and rooflines.

Dense bfloat16 without sparsity, from the vendors' data sheets. A device kind that is not in the
table has no MFU; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them (`jax.devices()`).

    name       short name, as `--topology` and reports have it
    flops      peak bfloat16 operations per second
    bandwidth  of its memory, bytes per second
    memory     bytes
    link       bytes per second that it sends to its neighbors together, each way counted once
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU: those are named by generation."""
        return self.name.startswith("v")


GIB = 2**30

CHIPS: Mapping[str, Chip] = {
    "a100-40": Chip("A100-40", 312e12, 1.555e12, 40 * GIB, 300e9),
    "a100-80": Chip("A100-80", 312e12, 2.039e12, 80 * GIB, 300e9),
    "h100-pcie": Chip("H100-PCIe", 756e12, 2.0e12, 80 * GIB, 300e9),
    "h100": Chip("H100-80", 989e12, 3.35e12, 80 * GIB, 450e9),
    "h200": Chip("H200-141", 989e12, 4.8e12, 141 * GIB, 450e9),
    "v4": Chip("v4", 275e12, 1.2e12, 32 * GIB, 300e9),
    "v5e": Chip("v5e", 197e12, 0.82e12, 16 * GIB, 200e9),
    "v5p": Chip("v5p", 459e12, 2.765e12, 95 * GIB, 600e9),
    "v6e": Chip("v6e", 918e12, 1.64e12, 32 * GIB, 448e9),
}

# Part of a lower-case `device_kind` -> key of CHIPS; the first match counts.
_KINDS: tuple[tuple[str, str], ...] = (
    ("h200", "h200"),
    ("h100 pcie", "h100-pcie"),
    ("h100", "h100"),
    ("a100-sxm4-40gb", "a100-40"),
    ("a100-pcie-40gb", "a100-40"),
    ("a100", "a100-80"),
    ("v6 lite", "v6e"),
    ("v6e", "v6e"),
    ("v5 lite", "v5e"),
    ("v5e", "v5e"),
    ("v5p", "v5p"),
    ("tpu v5", "v5p"),
    ("v4", "v4"),
)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a `device_kind`; None where it is not known.

    >>> find_chip("NVIDIA H100 80GB HBM3").name, find_chip("TPU v5 lite").name
    ('H100-80', 'v5e')
    >>> find_chip("TPU v5").name
    'v5p'
    >>> find_chip("cpu") is None
    True
    """
    kind = device_kind.lower()
    key = next((key for part, key in _KINDS if part in kind), None)
    return CHIPS[key] if key else None


def unknown_chip(device_kind: str) -> str:
    """Returns the line that a run prints where MFU cannot be computed."""
    return f"MFU is not shown: the peak rate of device kind {device_kind!r} is not known"
