"""What differs between the layers of a scan, as numbers that multiply."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from wings_jax.model.presets import WingsArch


class LayerSwitches(NamedTuple):
    """What differs between layers: one value each, or [L] stacked for the scan.

    learners  multiplies the learners' outputs: 1 where a layer has learners, else 0
    rope      1 where the main attention has rope, else 0; None where all layers have it
    """

    learners: jax.Array | float
    rope: jax.Array | float | None = None


def learner_switches(arch: WingsArch) -> jax.Array:
    """Returns f32[L]: 1 where a layer has learners, else 0.

    The layers are scanned, so all have a learner's parameters; the switch multiplies its output.
    """
    num_layers = arch.decoder.num_layers
    carriers = range(num_layers) if arch.learner_layers is None else arch.learner_layers
    return jnp.zeros(num_layers).at[jnp.asarray(list(carriers), jnp.int32)].set(1.0)


def layer_switches(arch: WingsArch) -> LayerSwitches:
    """Returns the switches of all layers, f32[L]."""
    no_rope_layers = arch.decoder.no_rope_layers
    if not no_rope_layers:
        return LayerSwitches(learner_switches(arch))
    rope_switches = jnp.ones(arch.decoder.num_layers).at[jnp.asarray(no_rope_layers)].set(0.0)
    return LayerSwitches(learner_switches(arch), rope_switches)


def layer_switch(arch: WingsArch, layer: int) -> LayerSwitches:
    """Returns the switches of one layer whose learners, if it has any, are used."""
    if not arch.decoder.no_rope_layers:
        return LayerSwitches(1.0)
    return LayerSwitches(1.0, float(layer not in arch.decoder.no_rope_layers))
