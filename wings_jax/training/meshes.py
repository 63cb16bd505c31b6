"""The mesh of a run, and its batches on it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from wings_jax import axes
from wings_jax import config as config_lib
from wings_jax.model import parameters
from wings_jax.model.layout import IGNORE, Batch, make_layout
from wings_jax.model.presets import WingsArch


def make_run_mesh(
    config: config_lib.Config, arch: WingsArch, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns the mesh of all devices, or of the given ones.

    Raises:
      MeshError: naming the flag; the mesh does not fit the devices, the model or the hosts.
    """
    flag = "--config.mesh"
    shape = mesh_shape(config.mesh, arch, len(devices) if devices else jax.device_count())
    try:
        mesh = axes.make_mesh(shape, devices) if devices else axes.make_mesh(shape)
        rows = padded_batch_size(mesh, config.batch_size, config.optimizer.accumulation)
        axes.check_hosts(mesh, rows)
    except axes.MeshError as error:
        raise axes.MeshError(f"{flag}: {error}") from None

    parameters.check_mesh(arch, mesh, rows // config.optimizer.accumulation, flag=flag)

    # Rows that do not divide evenly over the devices are filled up.
    added = rows - config.batch_size
    if added and jax.process_index() == 0:
        print(
            f"config.batch_size {config.batch_size} on {mesh.shape['data'] * mesh.shape['fsdp']} "
            f"shares of the batch: {added} rows of padding are added, which change no number",
            flush=True,
        )
    return mesh


def mesh_shape(mesh: config_lib.MeshConfig, arch: WingsArch, devices: int) -> dict[str, int]:
    """Returns devices per axis; `fsdp` = -1 becomes what divides the model, the rest is `data`.

    On 6 devices a width D of 4096 is shared by 2, and there are 3 replicas:

    >>> from wings_jax.model import presets
    >>> arch = presets.WingsArch(presets.DECODERS["qwen1_5_7b"], presets.VISION["clip_large_336"])
    >>> mesh_shape(config_lib.MeshConfig(data=1, fsdp=-1), arch, devices=6)
    {'data': 3, 'fsdp': 2, 'tensor': 1}
    """
    shape = dataclasses.asdict(mesh)
    given = mesh.data * mesh.tensor
    if mesh.fsdp != -1 or given < 1 or devices % given:
        return shape  # `axes.make_mesh` completes it, or names what is wrong

    remaining = devices // given
    # The largest number of shards that divides both widths (D and E) and the devices.
    fsdp = math.gcd(remaining, arch.decoder.hidden_size, arch.vision.hidden_size)
    return {**shape, "data": mesh.data * remaining // fsdp, "fsdp": fsdp}


def padded_batch_size(mesh: Mesh, batch_size: int, accumulation: int) -> int:
    """Returns the rows of a batch with those of padding, so that each device has as many."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"] * accumulation
    # -(-a // b) rounds up.
    return -(-batch_size // shares) * shares


def place_batch(batch: Batch, mesh: Mesh, *, batch_size: int, accumulation: int) -> Batch:
    """Returns the global batch on the mesh, from this host's rows, padded where necessary."""
    padded = padded_batch_size(mesh, batch_size, accumulation)
    # Each host adds its part of the padding.
    batch = pad_rows(batch, (padded - batch_size) // jax.process_count())

    sharding = axes.sharding_of(mesh, ("B",))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def pad_rows(batch: Batch, count: int) -> Batch:
    """Returns the batch with `count` more rows, which hold padding only and no target."""
    if not count:
        return batch
    # Slots of modality PADDING (0), so the rows have no key, no loss and no gradient.
    slots = np.zeros((count, batch.targets.shape[1]), np.int32)
    padding = Batch(
        make_layout(slots, slots),
        np.full_like(slots, IGNORE),
        np.zeros((count, *batch.images.shape[1:]), np.uint8),
    )

    return jax.tree.map(lambda *parts: np.concatenate(parts), batch, padding)
