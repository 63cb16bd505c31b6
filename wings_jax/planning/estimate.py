"""What a training step needs on any mesh, from shapes alone: neither devices nor a compiler.

The state is exact. Of the temporaries, gradients and layer boundaries follow from shapes; the rest
is an estimate, of which each part is what was found in programs compiled for TPUs and GPUs (docs,
performance). It is the larger one of two phases:

    backward pass of a layer: its weights and those of the next one over `fsdp`, in the compute
      dtype; gradients of a layer before they are scattered, on TPUs one in the compute dtype, on
      GPUs two in float32; the gradient of the head in the compute dtype; per row, one layer
      computed again: 8 T D + 4 T F values
    loss: the head, and its gradient, in the compute dtype; per row, one chunk of logits (float32 on
      TPUs, else the compute dtype), its gradient in the compute dtype, and twice the values of a
      layer; on TPUs gaps between the temporaries, 1.5 times these values for each row after the
      first; gradients of the layers do not exist yet

Both have what the remat policy saves of all layers and rows (`residuals.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from wings_jax import config as config_lib
from wings_jax.axes import MESH_AXES, MeshError
from wings_jax.model import flops, parameters
from wings_jax.model.presets import WingsArch
from wings_jax.planning import hlo, memory, residuals, roofline, sizes
from wings_jax.training import meshes, program
from wings_jax.training.chips import Chip
from wings_jax.training.step import TrainState

_LAYERS = "decoder/layers/"
_HEAD, _EMBEDDING = "decoder/head/kernel", "decoder/embed/embedding"


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """A step of `rows` rows on a mesh.

    mesh     devices per axis
    rows     of the batch: the given ones, or the largest batch that fits if that is smaller
    state    bytes of a device that follow from the shardings, with `rows`
    working  estimated bytes of the other temporaries, with `rows`
    largest  rows of the largest batch that fits without gradient accumulation; 0 if none does
    times    by the chip's roofline, with collectives of a step that overlaps nothing twice
    """

    mesh: Mapping[str, int]
    rows: int
    state: memory.StateBytes
    working: float
    largest: int
    times: roofline.Times

    @property
    def needed(self) -> float:
        """Bytes that a device needs."""
        return self.state.total + self.working


def abstract_state(config: config_lib.Config, arch: WingsArch) -> TrainState:
    """Returns the training state as shapes, with the axes of a mesh but of no size yet."""
    state, _ = program.abstract_state(config, arch, abstract_mesh({}), max(config.steps, 1))
    return state


def abstract_mesh(shape: Mapping[str, int]) -> Mesh:
    """Returns a mesh without devices; an axis without a size has one device.

    It is typed as the mesh in whose place it stands where only shapes are computed.
    """
    axis_sizes = tuple(shape.get(axis, 1) for axis in MESH_AXES)
    types = (AxisType.Auto,) * len(MESH_AXES)
    return cast(Mesh, AbstractMesh(axis_sizes, MESH_AXES, axis_types=types))


def on_mesh(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns the shapes of a state, sharded over another mesh."""

    def moved(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(moved, state)


def estimate_step(
    config: config_lib.Config, arch: WingsArch, state: TrainState, chip: Chip, devices: int
) -> StepEstimate:
    """Returns the estimate for a resolved config on so many chips.

    Args:
      state: of `abstract_state`, which does not depend on the number of devices.

    Raises:
      UserError: the mesh of the config does not divide the model or the devices.
    """
    shape = meshes.mesh_shape(config.mesh, arch, devices)
    if shape["data"] * shape["fsdp"] * shape["tensor"] != devices:
        raise MeshError(f"--config.mesh: {shape} does not fit {devices} devices")

    mesh = abstract_mesh(shape)
    parameters.check_mesh(arch, mesh, flag="--config.mesh")
    state = on_mesh(state, mesh)

    # A batch that does not fit is computed in parts.
    shares = shape["data"] * shape["fsdp"]
    largest = largest_batch(config, arch, state, mesh, chip.memory, is_tpu=chip.is_tpu)
    changed = _with_rows(config, min(config.batch_size, largest or shares))
    batch = program.abstract_batch(changed, arch, mesh)
    rows = batch.targets.shape[0]
    return StepEstimate(
        mesh=shape,
        rows=rows,
        state=memory.count_state(state, batch, changed, arch),
        working=count_working(changed, arch, state, shape, rows / shares, is_tpu=chip.is_tpu),
        largest=largest,
        times=_estimate_times(changed, arch, state, chip, shape, rows),
    )


def largest_batch(
    config: config_lib.Config,
    arch: WingsArch,
    state: TrainState,
    mesh: Mesh,
    limit: float,
    *,
    is_tpu: bool,
) -> int:
    """Returns the rows of the largest batch without accumulation; 0 if no row per device fits.

    Args:
      mesh: of devices or abstract, with the axes of `MESH_AXES`.
      limit: bytes of one device.
      is_tpu: whether the program is the TPU's compiler's.
    """
    shares = mesh.shape["data"] * mesh.shape["fsdp"]

    def needed(count: int) -> float:
        changed = _with_rows(config, shares * count)
        return count_needed(changed, arch, state, mesh, is_tpu=is_tpu)

    # Bytes are the larger one of two lines over the rows of a device: that of few, that of many.
    largest = memory.MAX_ROWS
    for count in (1, memory.MAX_ROWS - 1):
        one, two = needed(count), needed(count + 1)
        largest = min(largest, count + int((limit * memory.USABLE - one) // (two - one)))
    return shares * max(0, largest)


def _with_rows(config: config_lib.Config, rows: int) -> config_lib.Config:
    """Returns the config with a batch of `rows` in one part."""
    optimizer = dataclasses.replace(config.optimizer, accumulation=1)
    return dataclasses.replace(config, batch_size=rows, optimizer=optimizer)


def count_needed(
    config: config_lib.Config, arch: WingsArch, state: TrainState, mesh: Mesh, *, is_tpu: bool
) -> float:
    """Returns the estimated bytes that a device needs for a step of the config's batch."""
    batch = program.abstract_batch(config, arch, mesh)
    shares = mesh.shape["data"] * mesh.shape["fsdp"] * config.optimizer.accumulation
    rows = batch.targets.shape[0] / shares
    held = memory.count_state(state, batch, config, arch).total
    return held + count_working(config, arch, state, mesh.shape, rows, is_tpu=is_tpu)


def count_working(
    config: config_lib.Config,
    arch: WingsArch,
    state: TrainState,
    mesh: Mapping[str, int],
    rows: float,
    *,
    is_tpu: bool,
) -> float:
    """Returns the estimated bytes of temporaries beside gradients and layer boundaries.

    Args:
      rows: of a micro-batch on one device.
      is_tpu: whether the program is the TPU's compiler's.
    """
    decoder, tensor = arch.decoder, mesh["tensor"]
    width = jnp.dtype(config.compute_dtype).itemsize
    slots = config.data.sequence_length

    # Bytes of one layer's weights and of the head, gathered over `fsdp`, and of their gradients.
    layer = _layer_size(_params(state)) / decoder.num_layers / tensor * width
    layer_gradient = _layer_size(state.trained) / decoder.num_layers / tensor
    layer_gradient *= width if is_tpu else 2 * 4
    head = decoder.vocab_size * decoder.hidden_size / tensor * width
    head_path = _HEAD if _HEAD in _params(state) else _EMBEDDING
    head_gradient = head if head_path in state.trained else 0.0

    # Bytes of a row: a chunk of logits, and a layer that is computed again.
    logits = min(config.loss_chunk, slots) * decoder.vocab_size / tensor
    logits *= width + (4 if is_tpu else width)
    values = slots * (8 * decoder.hidden_size + 4 * decoder.ffn_size / tensor) * width

    # During the loss the gradients of layers, which are counted beside this, do not exist.
    later = sum(
        sizes.device_bytes(leaf) for path, leaf in state.trained.items() if path != head_path
    )
    backward = 2 * layer + layer_gradient + head_gradient + rows * values
    gaps = 1.5 * max(0.0, rows - 1) * values if is_tpu else 0.0
    loss = head + head_gradient + rows * (logits + 2 * values) + gaps - later

    saved = residuals.saved_bytes(
        arch,
        frozenset(state.trained),
        remat=config.remat,
        slots=slots,
        images=config.data.images_per_row,
        dtype=config.compute_dtype,
        tensor=tensor,
        is_tpu=is_tpu,
    )
    return max(backward, loss) + rows * saved


def _layer_size(params: Mapping[str, Any]) -> int:
    """Returns the number of values of all layers' parameters."""
    return sum(leaf.size for path, leaf in params.items() if path.startswith(_LAYERS))


def _params(state: TrainState) -> dict[str, jax.ShapeDtypeStruct]:
    return {**state.trained, **state.frozen}  # type: ignore[dict-item]


def estimate_collectives(
    config: config_lib.Config, arch: WingsArch, state: TrainState, mesh: Mapping[str, int]
) -> list[hlo.Traffic]:
    """Returns what a device sends at least in a step, by the ring algorithm.

    A layer's weights are gathered over `fsdp` in the compute dtype, once for the forward and once
    for the backward pass, which computes the layer again from the same weights; those of the head
    once. Of the embeddings only the rows of tokens are sent, which are left out. Gradients
    (float32) are scattered over `fsdp`, and added over `data`. A row's stream is added over
    `tensor` twice per layer and pass.
    """
    data, fsdp, tensor = (mesh[axis] for axis in MESH_AXES)
    width = jnp.dtype(config.compute_dtype).itemsize
    passes = 2 + (config.remat != "none")
    accumulation = config.optimizer.accumulation

    layers = sum(
        leaf.size
        for path, leaf in _params(state).items()
        if path.startswith(_LAYERS) and "fsdp" in leaf.sharding.spec
    )
    gathered = 2 * layers + arch.decoder.vocab_size * arch.decoder.hidden_size
    trained = sum(leaf.size for leaf in state.trained.values())
    rows = config.batch_size / (data * fsdp)
    stream = rows * config.data.sequence_length * arch.decoder.hidden_size * width
    sent = {
        "all-gather": gathered / tensor * width * accumulation * (fsdp - 1) / fsdp,
        "reduce-scatter": trained / tensor * 4 * accumulation * (fsdp - 1) / fsdp,
        "all-reduce": 2 * 4 * trained / (tensor * fsdp) * (data - 1) / data
        + 2 * 2 * stream * arch.decoder.num_layers * passes * (tensor - 1) / tensor,
    }
    return [hlo.Traffic(kind, 0, size) for kind, size in sent.items() if size]


def _estimate_times(
    config: config_lib.Config,
    arch: WingsArch,
    state: TrainState,
    chip: Chip,
    mesh: Mapping[str, int],
    rows: int,
) -> roofline.Times:
    """Returns the roofline's times of a step of `rows` rows."""
    work = flops.full_rows(arch, rows, config.data.sequence_length, config.data.images_per_row)
    return roofline.estimate_times(
        chip,
        flops.count_flops(arch, work, state.trained, config.remat),
        estimate_collectives(config, arch, state, mesh),
        devices=mesh["data"] * mesh["fsdp"] * mesh["tensor"],
        memory_traffic=roofline.step_memory_traffic(config, arch, state.trained, mesh, rows),
    )
