"""Attention shift as a metric of training: a fixed set of probes, read with the state at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wings_jax import axes, tree
from wings_jax.analysis import laws, probes
from wings_jax.analysis.probes import CLASSES, ROWS, ProbeRows, Variant
from wings_jax.config import Config
from wings_jax.model import parameters
from wings_jax.model.presets import WingsArch
from wings_jax.model.wings import Wings

COUNT = 16  # probes
AT_ONCE = 8  # probes, or more where a mesh shares the batch out among more
LONGEST = 2048  # slots of a probe

Scalars = dict[str, float]


def make_metric(
    config: Config, arch: WingsArch, tokenizer: Any, mesh: Mesh
) -> Callable[[Mapping[str, jax.Array]], Callable[[], Scalars]]:
    """Returns start(flat params), which starts a measurement; its result fetches the scalars.

    The parameters are only read, so training goes on as if nothing had been measured. The probes are
    the first of the embedded set and their variant is the default one, the same for every run.

    Raises:
      UserError: the model has too few layers, or the probes do not fit it.
    """
    laws.check_layers(arch.decoder.num_layers, "config.laws_every")
    recipe = probes.make_recipe(config, arch, tokenizer, LONGEST)
    found, tally = probes.read_probes(probes.embedded(COUNT), recipe, Variant())
    probes.check_any(len(found), tally, "config.laws_every: embedded probes")
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    batches = [
        (len(numbers), _place(rows, mesh))
        for numbers, rows in probes.in_batches(found, recipe, -(-AT_ONCE // shares) * shares)
    ]
    model = Wings(
        arch, jnp.dtype(config.compute_dtype or parameters.default_dtype()), config.attention
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    measure = jax.jit(functools.partial(laws.measure_masses, model), out_shardings=everywhere)

    def start(flat: Mapping[str, jax.Array]) -> Callable[[], Scalars]:
        params = tree.nest(flat)
        measured = [(count, measure(params, rows)) for count, rows in batches]
        return lambda: scalars([np.asarray(masses)[:count] for count, masses in measured])

    return start


def _place(rows: ProbeRows, mesh: Mesh) -> ProbeRows:
    """Returns the rows on the mesh; every host holds all of them and gives its part."""
    sharding = axes.sharding_of(mesh, ("B",))
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), rows
    )


def scalars(masses: Sequence[np.ndarray]) -> Scalars:
    """Returns laws/before, laws/image, laws/after (means over probes and layers) and laws/shift,
    all of the default variant, and laws/shift_after, of the queries behind the image alone.

    A shift is left out where every probe's curves are flat. `masses` are of f32[B,L,Q,C].
    """
    whole = np.concatenate(masses)
    curves = whole[:, :, ROWS.index(Variant().rows)]
    shares = curves.mean((0, 1))
    told = {
        f"laws/{name}": float(shares[CLASSES.index(name)]) for name in ("before", "image", "after")
    }
    for name, rows in (("laws/shift", Variant().rows), ("laws/shift_after", "after")):
        shifts = laws.shifts(whole[:, :, ROWS.index(rows)])
        finite = shifts[np.isfinite(shifts)]
        told |= {name: float(finite.mean())} if len(finite) else {}
    return told
