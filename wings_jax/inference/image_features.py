"""Encoded images, in batches of one shape."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from wings_jax.inference import chunks, decode
from wings_jax.inference.chunks import PromptSlots
from wings_jax.inference.engine import ModelSpec, Weights


def encode_all(spec: ModelSpec, weights: Weights, prompt: PromptSlots) -> jax.Array | None:
    """Returns the features of one conversation's images, as `encode`."""
    count = chunks.power(len(prompt.images))
    return encode(spec, weights, prompt.images, batch_size=max(count, 1), count=count)


def encode(
    spec: ModelSpec,
    weights: Weights,
    images: Sequence[np.ndarray],
    *,
    batch_size: int,
    count: int,
) -> jax.Array | None:
    """Returns features f32[count*P,D] of u8[h,w,3] images, then zeros; None if `count` is 0.

    The tower encodes `batch_size` images at a time: one shape, one compilation.
    """
    if not count:
        return None

    # The last batch is filled up with black images, whose features are cut off.
    size = spec.arch.vision.image_size
    features = []
    for first in range(0, len(images), batch_size):
        batch = np.zeros((batch_size, size, size, 3), np.uint8)
        batch[: len(images) - first] = np.stack(images[first : first + batch_size])
        features.append(decode.encode(spec, weights, batch))

    # count P rows of width D, whatever the number of batches.
    rows = count * spec.arch.vision.num_patches
    return decode.stack_features(tuple(features), spec.arch.decoder.hidden_size, rows)
