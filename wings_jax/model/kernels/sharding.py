"""A kernel on every device of a mesh, each with its rows and heads."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from wings_jax import axes
from wings_jax.model.kernels.intervals import KeyMask

# (q, k, v, probes, mask) -> (out, probed)
Kernel = Callable[..., tuple[jax.Array, jax.Array]]


def over_mesh(kernel: Kernel) -> Kernel:
    """Returns the kernel as a `shard_map` over (data, fsdp) for rows and tensor for heads.

    The compiler cannot partition a kernel. Without a mesh in the context, or with one device, it
    is called as it is. Rows that the mesh axes do not divide are computed on every device.
    """

    def run(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        probes: jax.Array,
        mask: KeyMask | None,
    ) -> tuple[jax.Array, jax.Array]:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return kernel(q, k, v, probes, mask)

        rows, heads = axes.spec_of("B")[0], axes.spec_of("N")[0]
        # Rows that do not divide, such as a single one, are not sharded.
        if q.shape[0] % axes.num_shards(mesh.shape, rows or ()):
            rows = None

        # q [B,T,N,H], k and v [B,S,K,H]; probes [B,S,C] and the mask are by row only.
        by_row = PartitionSpec(rows)
        by_head = PartitionSpec(rows, None, heads)

        return jax.shard_map(
            kernel,
            mesh=mesh,
            in_specs=(by_head, by_head, by_head, by_row, by_row),
            out_specs=(by_head, by_head),
            check_vma=False,
        )(q, k, v, probes, mask)

    return run
