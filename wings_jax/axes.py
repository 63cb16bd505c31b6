"""The alphabet of dimensions, the device mesh, and the logical axis rules that join them.

Einsums, docstrings, sharding rules and weight patterns all use this alphabet:

    B batch         T query slots    S key slots      D model width    N query heads
    K kv heads      G = N / K        H head width     F ffn width      V vocabulary
    R rank          L layers         E vision width   P patches/image  I images/row
    M learners      C probe channels

Capitals are sizes; lower-case nouns are arrays. A parameter's dimensions are its logical axes;
RULES map them to mesh axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wings_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

Tree = TypeVar("Tree")

# Logical axis -> mesh axes over which it is sharded. An axis that is not listed is replicated.
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
    """The mesh does not fit the devices, the model or the batch."""


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with axes `MESH_AXES`; one size may be -1 (all remaining devices).

    Raises:
      MeshError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [int(shape.get(axis, 1)) for axis in MESH_AXES]
    shown = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise MeshError(f"mesh {shown}: sizes are positive, and at most one is -1")

    known = int(np.prod([size for size in sizes if size > 0]))
    # The size -1 becomes what the others leave of the devices.
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known

    if int(np.prod(sizes)) != len(devices):
        raise MeshError(f"mesh {shown} does not fit {len(devices)} device(s)")

    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parse_mesh(text: str, *, flag: str = "--mesh") -> dict[str, int]:
    """Returns the size of each mesh axis in a flag's value.

    >>> parse_mesh("fsdp=4,tensor=2")
    {'fsdp': 4, 'tensor': 2}

    Raises:
      MeshError: naming the flag, where the text has another form.
    """
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not size.removeprefix("-").isdecimal():
            raise MeshError(f"{flag}: {part!r} is not AXIS=SIZE with one of {MESH_AXES}")
        sizes[axis] = int(size)
    return sizes


def spec_of(dims: Sequence[str | None]) -> PartitionSpec:
    """Returns the partition spec of an array with these logical axes.

    >>> tuple(spec_of(["L", "D", "N", "H"]))
    (None, 'fsdp', 'tensor', None)
    """
    return PartitionSpec(*(nn.logical_to_mesh_axes(tuple(dims), RULES) or ()))


def sharding_of(mesh: Mesh, dims: Sequence[str | None]) -> NamedSharding:
    """Returns the sharding of an array with these logical axes (None: replicated)."""
    return NamedSharding(mesh, spec_of(dims))


def constrain(array: jax.Array, dims: Sequence[str | None]) -> jax.Array:
    """Returns `array` with a sharding constraint for these logical axes, e.g. "BTD".

    Without a mesh in the context it is returned as it is.
    """
    # Code without a mesh, such as tests and inference on one device, has no shardings.
    if jax.sharding.get_abstract_mesh().empty:
        return array
    return jax.lax.with_sharding_constraint(array, spec_of(tuple(dims)))


def shard_leading_axis(tree: Tree, mesh: Mesh | None, letters: str = "B") -> Tree:
    """Returns arrays with a sharding constraint for the logical axes of their first dimension.

    Several letters are axes merged into one dimension, e.g. "BK" for [B*K,S,H]. Where the mesh
    axes do not divide a size, the first of them are left out: a single row is replicated over
    `data`. Without a mesh the arrays are returned as they are.
    """
    if mesh is None:
        return tree

    # All mesh axes of the letters, then without the first, without the first two, ...
    mesh_axes = tuple(axis for letter in letters for axis in _axes_of(letter))
    candidates = [mesh_axes[first:] for first in range(len(mesh_axes) + 1)]

    def constrain_array(array: jax.Array) -> jax.Array:
        fits = next(c for c in candidates if array.shape[0] % num_shards(mesh.shape, c) == 0)
        sharding = NamedSharding(mesh, PartitionSpec(fits or None))
        return jax.lax.with_sharding_constraint(array, sharding)

    return jax.tree.map(constrain_array, tree)


def check_hosts(mesh: Mesh, rows: int) -> None:
    """Checks that every host holds an equal and disjoint part of a batch of `rows` rows.

    Raises:
      MeshError: naming how many rows each host would hold.
    """
    slices = sharding_of(mesh, ("B",)).devices_indices_map((rows,))
    # The rows of each host; devices along the tensor axis hold the same ones.
    rows_by_host: dict[int, set[int]] = {}
    for device, (span,) in slices.items():
        host = cast("jax.Device", device).process_index
        rows_by_host.setdefault(host, set()).update(range(*span.indices(rows)))

    if any(len(held) * len(rows_by_host) != rows for held in rows_by_host.values()):
        counts = ", ".join(str(len(held)) for _, held in sorted(rows_by_host.items()))
        raise MeshError(
            f"mesh: of a batch of {rows} rows the hosts would hold {counts}, some of them twice: "
            "the tensor axis must not span hosts, and every host needs the same number of devices"
        )


def check_divides(mesh_shape: Mapping[str, int], dims: Mapping[str, int]) -> None:
    """Checks that the mesh axes of every dimension (letter -> size) divide its size.

    Raises:
      MeshError: naming every dimension for which they do not.
    """
    wrong = []
    for letter, size in dims.items():
        mesh_axes = _axes_of(letter)
        shards = num_shards(mesh_shape, mesh_axes)
        if size % shards:
            wrong.append(f"{letter}={size} over {' x '.join(mesh_axes)}={shards}")
    if wrong:
        raise MeshError("the mesh does not divide " + ", ".join(wrong))


def _axes_of(letter: str) -> tuple[str, ...]:
    """Returns the mesh axes over which a logical axis is sharded."""
    mesh_axes = dict(RULES).get(letter, ())
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes


def num_shards(mesh_shape: Mapping[str, int], mesh_axes: Sequence[str]) -> int:
    """Returns into how many parts a dimension over these mesh axes is divided.

    >>> num_shards({"data": 2, "fsdp": 4, "tensor": 1}, ("data", "fsdp"))
    8
    """
    return int(np.prod([mesh_shape.get(axis, 1) for axis in mesh_axes]))
