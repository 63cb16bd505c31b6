"""Attention shift as a metric of training, measured on a fixed set of probes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wings_jax import tree
from wings_jax.analysis import laws, probes
from wings_jax.analysis.probes import Variant
from wings_jax.analysis.slot_classes import CLASSES, ROWS
from wings_jax.config import Config
from wings_jax.model import parameters
from wings_jax.model.presets import WingsArch
from wings_jax.model.wings import Wings

NUM_PROBES = 16
BATCH_SIZE = 8  # probes; rounded up to a multiple of the devices that share the batch dimension
MAX_SLOTS = 2048  # of a probe

Scalars = dict[str, float]
FetchScalars = Callable[[], Scalars]


def make_metric(
    config: Config, arch: WingsArch, tokenizer: Any, mesh: Mesh
) -> Callable[[Mapping[str, jax.Array]], FetchScalars]:
    """Returns start(flat params), which starts a measurement and returns a function for its result.

    The parameters are only read: training continues as if nothing had been measured. The probes
    are the first of the embedded set in the default variant, the same for every run.

    Raises:
      UserError: the model has too few layers, or no probe fits it.
    """
    laws.check_layers(arch.decoder.num_layers, "config.laws_every")
    recipe = probes.make_recipe(config, arch, tokenizer, MAX_SLOTS)
    probe_list, tally = probes.read_probes(probes.embedded_samples(NUM_PROBES), recipe, Variant())
    probes.check_any(len(probe_list), tally, "config.laws_every: embedded probes")

    batch_size = probes.sharded_batch_size(BATCH_SIZE, mesh)
    # Placed on the mesh once: every measurement reads the same probes.
    batches = [
        (len(numbers), probes.shard_rows(rows, mesh))
        for numbers, rows in probes.batch_probes(probe_list, recipe, batch_size)
    ]

    compute_dtype = jnp.dtype(config.compute_dtype or parameters.default_dtype())
    model = Wings(arch, compute_dtype, config.attention)
    replicated = NamedSharding(mesh, PartitionSpec())
    measure = jax.jit(functools.partial(laws.measure_masses, model), out_shardings=replicated)

    def start(flat: Mapping[str, jax.Array]) -> FetchScalars:
        params = tree.nest(flat)
        # Dispatched, not awaited: training continues, and the caller fetches the result later.
        measured = [(count, measure(params, rows)) for count, rows in batches]
        # Rows after the first `count` are padding of the last batch.
        return lambda: summarize_masses([np.asarray(masses)[:count] for count, masses in measured])

    return start


def summarize_masses(masses: Sequence[np.ndarray]) -> Scalars:
    """Returns the scalars of a step, from the masses f32[B,L,Q,C] of each batch.

    laws/before, laws/image, laws/after  share of attention, mean over probes and layers
    laws/shift                           mean attention shift of the default variant
    laws/shift_after                     the same over queries after the image only

    A shift is left out where the curves of every probe are flat.
    """
    whole = np.concatenate(masses)

    # [B,L,Q,C] -> [B,L,C] -> [C]
    curves = whole[:, :, ROWS.index(Variant().rows)]
    shares = curves.mean((0, 1))

    scalars = {
        f"laws/{class_name}": float(shares[CLASSES.index(class_name)])
        for class_name in ("before", "image", "after")
    }

    for metric, query_rows in (("laws/shift", Variant().rows), ("laws/shift_after", "after")):
        # [B], NaN where a curve is flat.
        shifts = laws.attention_shift(whole[:, :, ROWS.index(query_rows)])
        finite = shifts[np.isfinite(shifts)]
        if len(finite):
            scalars[metric] = float(finite.mean())

    return scalars
