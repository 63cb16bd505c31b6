"""What conversations leave behind: keys and values, and how each of them may be seen.

A `Memory` holds B rows. The caches of the main attention and of the learners have slots of their
own: a learner's hold only what is of its modality, an image is written once and text-only rows
take no visual slots. All rows write at the same slot, so that a write is one contiguous update;
where a row has nothing to write, its slot stays empty, which is a value like everything else
about visibility. Two rows, prompts "a b c" and "d", right-padded, then one token each:

    slot            0  1      2      3
    row 0           a  b      c      e
    row 1           d  (empty)(empty)f
    order, row 1    0  NEVER  NEVER  1
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from wings_jax import axes
from wings_jax.model import attention
from wings_jax.model.decoder import Cache
from wings_jax.model.layout import NEVER, Visibility


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The caches of B rows. Keys of the mappings: main, and the learners that have slots.

    layers     per layer, attention -> keys and values, each [B*K,S,H]
    visibility     attention -> Sight [B,S]; an empty slot has the order NEVER
    positions  i32[B,S] of the main attention's slots
    used       attention -> i32[], the slot that is written next
    lengths    i32[B], the position of each row's next slot
    """

    layers: tuple[Cache, ...]
    visibility: Mapping[str, Visibility]
    positions: jax.Array
    used: Mapping[str, jax.Array]
    lengths: jax.Array


def capacities(memory: KVCache) -> dict[str, int]:
    """Returns how many slots each attention's cache has."""
    return {
        name: visibility.visible_from.shape[1] for name, visibility in memory.visibility.items()
    }


def shard_cache(memory: KVCache, mesh: Mesh | None) -> KVCache:
    """Returns the memory, asked to lie on the mesh as `axes.RULES` say: rows as B, heads as K."""
    return dataclasses.replace(
        memory,
        layers=axes.shard_leading_axis(memory.layers, mesh, "BK"),
        visibility=axes.shard_leading_axis(memory.visibility, mesh),
        positions=axes.shard_leading_axis(memory.positions, mesh),
        lengths=axes.shard_leading_axis(memory.lengths, mesh),
    )


def pad_visibility(visibility: Visibility, slots: int) -> Visibility:
    """Returns the visibility with empty slots behind it, `slots` in all."""
    more = [(0, 0), (0, slots - visibility.visible_from.shape[1])]
    return Visibility(
        jnp.pad(visibility.segments, more),
        jnp.pad(visibility.visible_from, more, constant_values=NEVER),
    )


def pad_slots(array: jax.Array, slots: int) -> jax.Array:
    """Returns keys or values [B*K,S,H] with zeros behind them, `slots` in all."""
    return jnp.pad(array, [(0, 0), (0, slots - array.shape[1]), (0, 0)])


def write_visibility(visibility: Visibility, fresh: Visibility, start: jax.Array) -> Visibility:
    """Returns the visibility [B,S] with the fresh one [B,F] entered from slot `start` on."""

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)

    return jax.tree.map(write, visibility, fresh)


def grow(memory: KVCache, slots: Mapping[str, int]) -> KVCache:
    """Returns the memory with at least `slots[attention]` slots in each cache."""
    wanted = {name: max(have, slots.get(name, 0)) for name, have in capacities(memory).items()}
    return dataclasses.replace(
        memory,
        layers=tuple(
            {name: tuple(pad_slots(x, wanted[name]) for x in pair) for name, pair in old.items()}
            for old in memory.layers
        ),
        visibility={name: pad_visibility(s, wanted[name]) for name, s in memory.visibility.items()},
        positions=jnp.pad(
            memory.positions, [(0, 0), (0, wanted["main"] - memory.positions.shape[1])]
        ),
    )


def compact(memory: KVCache) -> KVCache:
    """Returns the memory with every row's used slots moved to the front, in their order.

    What is seen does not change. The slot that is written next is the one behind the fullest row.
    """
    moved, positions, layers = {}, memory.positions, [dict(layer) for layer in memory.layers]
    used = {}
    rows = memory.lengths.shape[0]
    for name, visibility in memory.visibility.items():
        is_used = visibility.visible_from < NEVER
        index = jnp.argsort(~is_used, axis=1, stable=True)
        moved[name] = jax.tree.map(lambda x, i=index: jnp.take_along_axis(x, i, axis=1), visibility)
        used[name] = is_used.sum(1).max().astype(jnp.int32)
        if name == "main":
            positions = jnp.take_along_axis(positions, index, axis=1)
        for layer in [layer for layer in layers if name in layer]:
            layer[name] = tuple(_take(x, index, rows) for x in layer[name])
    return KVCache(tuple(layers), moved, positions, used, memory.lengths)


def _take(array: jax.Array, index: jax.Array, rows: int) -> jax.Array:
    """Returns the slots [B,S] of keys or values [B*K,S,H]."""
    index = jnp.repeat(index, array.shape[0] // rows, axis=0)
    return jnp.take_along_axis(array, index[..., None], axis=1)


def truncate(memory: KVCache, lengths: jax.Array) -> KVCache:
    """Returns the memory cut back: each row keeps its first `lengths` i32[B] positions."""
    visibility = {
        name: Visibility(
            s.segments, jnp.where(s.visible_from >= lengths[:, None], NEVER, s.visible_from)
        )
        for name, s in memory.visibility.items()
    }
    return dataclasses.replace(
        memory, visibility=visibility, lengths=jnp.minimum(memory.lengths, lengths)
    )


def insert(memory: KVCache, guests: KVCache, rows: jax.Array) -> KVCache:
    """Returns the memory with row g of `guests` in place of row `rows[g]`; past the end: nowhere.

    Both hold caches of the same attentions; those of `guests` have no more slots.
    """
    guests = grow(guests, capacities(memory))
    count = memory.lengths.shape[0]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new, mode="drop")

    def put_heads(old: jax.Array, new: jax.Array) -> jax.Array:
        apart = (attention.split_heads(x, n) for x, n in ((old, count), (new, rows.shape[0])))
        return attention.merge_heads(put(*apart))

    layers = jax.tree.map(put_heads, memory.layers, guests.layers)
    used = {name: jnp.maximum(used, guests.used[name]) for name, used in memory.used.items()}
    return KVCache(
        layers,
        jax.tree.map(put, memory.visibility, guests.visibility),
        put(memory.positions, guests.positions),
        used,
        put(memory.lengths, guests.lengths),
    )
