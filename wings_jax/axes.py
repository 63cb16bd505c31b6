"""The alphabet of dimensions, the mesh, and the one table that joins them.

Einsums, docstrings, sharding rules and weight patterns all speak this alphabet:

    B batch         T query slots    S key slots      D model width    N query heads
    K kv heads      G = N / K        H head width     F ffn width      V vocabulary
    R rank          L layers         E vision width   P patches/image  I images/row
    M learners      C probe channels

Capitals are sizes; lower-case nouns are arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wings_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

Tree = TypeVar("Tree")

# Logical dimension -> mesh axes. A dimension that is not listed is replicated.
RULES: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("B", ("data", "fsdp")),
    ("D", "fsdp"),
    ("E", "fsdp"),
    ("N", "tensor"),
    ("K", "tensor"),
    ("F", "tensor"),
    ("V", "tensor"),
)


class MeshError(UserError):
    """A mesh that does not fit the devices or the model."""


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with axes `MESH_AXES`; one size may be -1 (all remaining devices).

    Raises:
      MeshError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    asked = " x ".join(f"{a}={s}" for a, s in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise MeshError(f"mesh {asked}: sizes are positive, and at most one is -1")
    known = int(np.prod([s for s in sizes if s > 0]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise MeshError(f"mesh {asked} does not fit {len(devices)} device(s)")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parse_mesh(text: str, *, flag: str = "--mesh") -> dict[str, int]:
    """Returns the sizes that a flag says, e.g. of `fsdp=4,tensor=2`. Raises MeshError naming it."""
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.removeprefix("-").isdecimal():
            raise MeshError(f"{flag}: {part!r} is not AXIS=SIZE with one of {MESH_AXES}")
        sizes[axis] = int(size)
    return sizes


def spec_of(dims: Sequence[str | None]) -> PartitionSpec:
    """Returns the mesh axes of an array whose dimensions carry these letters."""
    return nn.logical_to_mesh_axes(tuple(dims), RULES)


def sharding_of(mesh: Mesh, dims: Sequence[str | None]) -> NamedSharding:
    """Returns the sharding of an array whose dimensions carry these letters."""
    return NamedSharding(mesh, spec_of(dims))


def constrain(array: jax.Array, dims: str) -> jax.Array:
    """Returns `array`, asked to lie as the letters say; unchanged where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, spec_of(tuple(dims)))


def shard_leading_axis(tree: Tree, mesh: Mesh | None, letters: str = "B") -> Tree:
    """Returns arrays whose first dimension carries these letters, asked to lie on the mesh so.

    Several letters are dimensions merged into one, e.g. "BK" for [B*K,S,H]. Where the mesh does
    not divide a size, its first axes are left out: a single row lies on every device of `data`.
    Without a mesh nothing is asked.
    """
    if mesh is None:
        return tree
    over = tuple(axis for letter in letters for axis in _axes_of(letter))
    fewer = [over[first:] for first in range(len(over) + 1)]

    def put(array: jax.Array) -> jax.Array:
        fits = next(some for some in fewer if array.shape[0] % _parts(mesh.shape, some) == 0)
        sharding = NamedSharding(mesh, PartitionSpec(fits or None))
        return jax.lax.with_sharding_constraint(array, sharding)

    return jax.tree.map(put, tree)


def check_hosts(mesh: Mesh, rows: int) -> None:
    """Raises MeshError unless each host holds a part of its own of a batch of so many rows."""
    places = sharding_of(mesh, ("B",)).devices_indices_map((rows,))
    by_host: dict[int, set[int]] = {}
    for device, (span,) in places.items():
        by_host.setdefault(device.process_index, set()).update(range(*span.indices(rows)))
    if any(len(mine) * len(by_host) != rows for mine in by_host.values()):
        counts = ", ".join(str(len(mine)) for _, mine in sorted(by_host.items()))
        raise MeshError(
            f"mesh: of a batch of {rows} the hosts would hold {counts} rows, some the same ones: "
            "tensor must not reach over hosts, and each needs as many devices"
        )


def _axes_of(letter: str) -> tuple[str, ...]:
    found = dict(RULES).get(letter, ())
    return (found,) if isinstance(found, str) else found


def _parts(mesh_shape: Mapping[str, int], over: Sequence[str]) -> int:
    return int(np.prod([mesh_shape.get(axis, 1) for axis in over]))


def check_divides(mesh_shape: Mapping[str, int], dims: Mapping[str, int]) -> None:
    """Raises MeshError naming every dimension (letter -> size) its mesh axes do not divide."""
    wrong = []
    for letter, size in dims.items():
        over = _axes_of(letter)
        parts = _parts(mesh_shape, over)
        if size % parts:
            wrong.append(f"{letter}={size} over {' x '.join(over)}={parts}")
    if wrong:
        raise MeshError("the mesh does not divide " + ", ".join(wrong))
