"""Rope of a GGUF file as entries of a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from wings_jax.errors import UserError
from wings_jax.model.config_fields import ConfigFields
from wings_jax.weights.tensors import WeightsError

# Llama 3.1 and 3.2 differ in `factor` only (8 and 32).
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rope_entries(
    fields: ConfigFields,
    family: str,
    config: Mapping[str, Any],
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """Returns `rope_theta`, and `rope_scaling` where the file scales its rope.

    Args:
      config: the entries that are known already.
      rope_factors: f32[H/2], the tensor `rope_freqs.weight`, which divides the frequencies.

    Raises:
      UserError: naming a scaling that is not linear, nor Llama 3's.
    """
    head_dim = config["head_dim"]
    dimensions = fields.size(f"{family}.rope.dimension_count", head_dim)
    if dimensions != head_dim:
        raise UserError(
            f"{fields.file}: {family}.rope.dimension_count {dimensions} is not the head width "
            f"{head_dim}: partial rope is not supported"
        )

    theta = fields.number(f"{family}.rope.freq_base", 1e4)
    entries: dict[str, Any] = {"rope_theta": theta}

    # Files of 2023 have the factor alone.
    kind = fields.text(f"{family}.rope.scaling.type", "none")
    factor = fields.number(f"{family}.rope.scaling.factor", 1.0)
    if fields.has(f"{family}.rope.scale_linear"):
        kind, factor = "linear", fields.number(f"{family}.rope.scale_linear")

    # One of two scalings: factors per frequency (Llama 3), or one factor (linear).
    if kind not in ("none", "linear"):
        raise UserError(f"{fields.file}: {family}.rope.scaling.type {kind!r} is not supported")
    if kind == "none" and factor != 1.0:
        kind = "linear"  # llama.cpp's default of a file with a factor
    if rope_factors is not None and not np.all(rope_factors == 1.0):
        if kind == "linear" and factor != 1.0:
            raise UserError(f"{fields.file}: both rope.scaling and rope_freqs.weight")
        entries["rope_scaling"] = _llama3_scaling(rope_factors, theta, head_dim, fields.file)
    elif kind == "linear" and factor != 1.0:
        entries["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    return entries


def _llama3_scaling(factors: np.ndarray, theta: float, head_dim: int, file: str) -> dict[str, Any]:
    """Returns Llama 3's scaling, if it gives these factors.

    The longest wavelengths are divided by `factor` itself, so it is the largest of the factors.
    """
    scaling = {"rope_type": "llama3", "factor": round(float(factors.max()), 4), **LLAMA3}
    expected = llama3_factors(scaling, theta, head_dim)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise WeightsError(
            f"{file}: rope_freqs.weight is not the rope scaling of Llama 3.1 or 3.2: not supported"
        )
    return scaling


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Returns f64[H/2]: what Llama 3's rope divides each frequency by.

    Short wavelengths stay, long ones are divided by `factor`, and those between are interpolated
    (transformers `modeling_rope_utils`).
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)

    # Wavelengths per original context.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
