"""Bytes of one device of sharded arrays and shapes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def device_bytes(leaf: Any) -> int:
    """Returns the bytes of one device's shard of an array or shape."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * jnp.dtype(leaf.dtype).itemsize


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of one device's shards of all leaves."""
    return sum(map(device_bytes, jax.tree.leaves(tree)))
