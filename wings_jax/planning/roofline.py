"""The time that a step takes at least on a chip: operations, memory traffic, links.

    compute  executed operations / peak rate
    memory   bytes read and written / bandwidth of the memory
    links    bytes sent in collectives / rate of the links

If all three overlap perfectly the step takes the longest of them; if they do not, their sum. A
real step is between, and matrix products themselves reach 70 to 90 % of the peak.

The memory traffic is an estimate. Per parameter that trains: AdamW reads and writes the parameter
and both moments, and the gradient is written and read, in float32 (the first moment in the dtype of
`config.optimizer.moment_dtype`). Each pass (forward, backward,
with rematerialization once more) reads the weights of its device's share of the batch in the
compute dtype, and activations of 20 x T x D values per layer, 12 more for the visual learner and
19 more for the textual one: the count of unfused reads and writes in a layer at 7B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from wings_jax import config as config_lib
from wings_jax.model.flops import PartFlops
from wings_jax.model.presets import WingsArch
from wings_jax.planning import hlo, sizes
from wings_jax.training.chips import Chip

_VALUES_PER_SLOT = {"layer": 20, "visual": 12, "textual": 19}
_OPTIMIZER_VALUES = 2 + 2 + 2  # float32 per trained parameter: p and v read and written, g twice


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds that a step takes at least on one device, and the MFU that they imply.

    compute     at the peak rate
    memory      at the memory's bandwidth; an estimate
    links       at the links' rate; 0 on one device
    overlapped  the longest of the three
    serial      their sum
    mfu         of `overlapped`: an upper bound
    mfu_serial  of `serial`
    """

    compute: float
    memory: float
    links: float
    overlapped: float
    serial: float
    mfu: float
    mfu_serial: float


def step_memory_traffic(
    config: config_lib.Config,
    arch: WingsArch,
    trained: Mapping[str, Any],
    mesh: Mapping[str, int],
    rows: int,
) -> float:
    """Returns bytes that one device reads and writes in a step of `rows` rows on a mesh.

    Args:
      trained: shapes with shardings of the trained parameters.
    """
    # Parameters that a token is multiplied with: projections, feed-forward network, head.
    decoder = arch.decoder
    layer = decoder.hidden_size * (
        2 * decoder.head_dim * (decoder.num_heads + decoder.num_kv_heads) + 3 * decoder.ffn_size
    )
    weights = decoder.num_layers * layer + decoder.hidden_size * decoder.vocab_size

    # Trained parameters are float32, 4 bytes each. The weights of the LLM are gathered over fsdp
    # before they are multiplied, so that only the tensor axis divides them.
    return estimate_memory_traffic(
        config,
        arch,
        trained=sizes.tree_bytes(trained) // 4,
        weights=weights // mesh["tensor"],
        rows=rows / (mesh["data"] * mesh["fsdp"]),
    )


def estimate_memory_traffic(
    config: config_lib.Config,
    arch: WingsArch,
    *,
    trained: int,
    weights: int,
    rows: float,
) -> float:
    """Returns bytes that one device reads and writes in a step.

    Args:
      trained: trained parameters that the device holds.
      weights: parameters of the LLM that it computes with (not divided by fsdp).
      rows: rows of its share of the batch.
    """
    width = jnp.dtype(config.compute_dtype or "bfloat16").itemsize
    # Forward and backward, and with rematerialization the forward pass again.
    passes = 2 + (config.remat != "none")

    values = _VALUES_PER_SLOT["layer"] + sum(_VALUES_PER_SLOT[name] for name in arch.learners)
    slots = rows * config.data.sequence_length * arch.decoder.num_layers
    activations = slots * arch.decoder.hidden_size * values * width * (passes + 1)
    # A micro-batch reads all weights.
    read = weights * width * passes * config.optimizer.accumulation
    # The first moment is read and written.
    moments = 2 * jnp.dtype(config.optimizer.moment_dtype).itemsize
    return trained * (4 * _OPTIMIZER_VALUES + moments) + read + activations


def estimate_times(
    chip: Chip,
    parts: Mapping[str, PartFlops],
    collectives: Sequence[hlo.Traffic],
    *,
    devices: int,
    memory_traffic: float,
) -> Times:
    """Returns the times of a step whose operations `parts` are shared equally by the devices."""
    # MFU counts the operations of the model alone, time also those that are recomputed.
    executed = sum(part.executed for part in parts.values()) / devices
    needed = sum(part.model for part in parts.values()) / devices

    compute, memory = executed / chip.flops, memory_traffic / chip.bandwidth
    links = sum(traffic.bytes for traffic in collectives) / chip.link
    overlapped, serial = max(compute, memory, links), compute + memory + links
    return Times(
        compute,
        memory,
        links,
        overlapped,
        serial,
        needed / chip.flops / overlapped,
        needed / chip.flops / serial,
    )
