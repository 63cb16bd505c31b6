"""The keys that a query attends to, as an interval of key slots.

Among keys in the order of their slots, without the keys that are never visible, what a query
attends to is an interval [start, stop): the keys of its conversation up to its own position.
So kernels need no mask of [T,S], and skip the blocks outside of the intervals.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from wings_jax.model import layout
from wings_jax.model.layout import Array, Visibility


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Intervals:
    """The visible keys of each query: start <= key slot < stop.

    start  i32[B,T]
    stop   i32[B,T]  equals `start` for a query without visible keys
    """

    start: Array
    stop: Array

    @property
    def has_keys(self) -> Array:
        """bool[B,T], whether a query has visible keys."""
        return self.start < self.stop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyMask:
    """Which keys a query attends to, in the forms that kernels read.

    query          Visibility [B,T]  query side of the attention mask
    key            Visibility [B,S]  key side
    intervals      of the same mask; its `start` and `stop` hold for packed keys (`pack_order`)
    is_causal      whether the keys are the slots of the queries, and none is visible to an earlier
                   one
    is_triangular  whether no query attends to a key slot after its own, as with causal keys, or
                   with those that are left of them (`pack_order`), which move to smaller slots only
    """

    query: Visibility
    key: Visibility
    intervals: Intervals
    is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
    is_triangular: bool = dataclasses.field(default=False, metadata={"static": True})


def pack_order(key: Visibility) -> jax.Array:
    """Returns i32[B,S]: the key slots, with those that are never visible moved to the end."""
    is_never = (jnp.asarray(key.visible_from) >= layout.NEVER).astype(jnp.int32)
    return jnp.argsort(is_never, axis=1, stable=True)


def take_slots(x: Array, order: jax.Array) -> jax.Array:
    """Returns x [B,S,...] with its slots in this order i32[B,S']."""
    return jnp.take_along_axis(
        jnp.asarray(x), order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1
    )


def key_intervals(query: Visibility, key: Visibility) -> Intervals:
    """Returns the intervals of visible keys, whose slots are in the order of `pack_order`.

    The mask of [B,T,S] is reduced as it is computed, and never in memory.

    >>> rows = layout.make_layout([[5, 6, 7, 8]], [[layout.TEXT] * 4], [[1, 1, 2, 2]])
    >>> both = layout.query_visibility(rows), layout.key_visibility(rows, layout.MAIN)
    >>> intervals = key_intervals(*both)
    >>> intervals.start.tolist(), intervals.stop.tolist()
    ([[0, 0, 2, 2]], [[1, 2, 3, 4]])
    """
    mask = layout.visible(query, key)
    num_keys = mask.shape[2]
    slots = jnp.arange(num_keys, dtype=jnp.int32)
    # [B, T, S] -> [B, T]; a query without visible keys gets S and 0, an empty interval.
    first = jnp.where(mask, slots, num_keys).min(2)
    stop = jnp.where(mask, slots + 1, 0).max(2)
    return Intervals(jnp.minimum(first, stop), stop)


def without_empty(intervals: Intervals) -> Intervals:
    """Returns intervals of at least one key: an empty one becomes the key after its place.

    A kernel whose row has no key computes infinities. Such a row's result is replaced by 0
    afterwards, and its gradient is 0; the key is near those of its neighbors, so that their
    blocks are the only ones that are read.
    """
    start = jnp.where(intervals.has_keys, intervals.start, 0)
    start = jax.lax.cummax(start, axis=1)
    start = jnp.where(intervals.has_keys, intervals.start, start)
    return Intervals(start, jnp.maximum(intervals.stop, start + 1))
