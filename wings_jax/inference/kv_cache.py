"""The KV cache: keys and values of B conversations, and which queries may attend to them.

A `KVCache` has one buffer for the main attention and one for each learner. A learner's buffer
holds only the slots of its modality: an image is written once, and text-only rows take no visual
slots. All rows write at the same slot, so that a write is one contiguous update. Where a row has
nothing to write, its slot stays empty, which is a value like everything else about visibility.
Two rows, prompts "a b c" and "d", right-padded, then one token each:

    slot                   0  1      2      3
    row 0                  a  b      c      e
    row 1                  d  (empty)(empty)f
    visible_from of row 1  0  NEVER  NEVER  1
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
    """The keys and values of B rows. Mappings are by attention: main, and learners with slots.

    layers      per layer, attention -> (keys, values), each [B*K,S,H] in the compute dtype
    visibility  attention -> Visibility i32[B,S]; an empty slot has visible_from NEVER
    positions   i32[B,S] of the main attention's slots
    used        attention -> i32[], the slot that is written next
    lengths     i32[B], the position of each row's next token
    """

    layers: tuple[Cache, ...]
    visibility: Mapping[str, Visibility]
    positions: jax.Array
    used: Mapping[str, jax.Array]
    lengths: jax.Array


def capacities(cache: KVCache) -> dict[str, int]:
    """Returns how many slots each attention has."""
    return {name: keys.visible_from.shape[1] for name, keys in cache.visibility.items()}


def shard_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Returns the cache with sharding constraints by `axes.RULES`: rows as B, heads as K."""
    return dataclasses.replace(
        cache,
        layers=axes.shard_leading_axis(cache.layers, mesh, "BK"),
        visibility=axes.shard_leading_axis(cache.visibility, mesh),
        positions=axes.shard_leading_axis(cache.positions, mesh),
        lengths=axes.shard_leading_axis(cache.lengths, mesh),
    )


def pad_visibility(visibility: Visibility, slots: int) -> Visibility:
    """Returns the visibility [B,slots], with empty slots appended."""
    padding = [(0, 0), (0, slots - visibility.visible_from.shape[1])]
    return Visibility(
        jnp.pad(visibility.segments, padding),
        jnp.pad(visibility.visible_from, padding, constant_values=NEVER),
    )


def pad_slots(array: jax.Array, slots: int) -> jax.Array:
    """Returns keys or values [B*K,slots,H], with zeros appended to [B*K,S,H]."""
    return jnp.pad(array, [(0, 0), (0, slots - array.shape[1]), (0, 0)])


def write_visibility(visibility: Visibility, new: Visibility, start: jax.Array) -> Visibility:
    """Returns the visibility [B,S] with the new one [B,F] written in from slot `start` on."""

    def write(old: jax.Array, values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, values, start, axis=1)

    return jax.tree.map(write, visibility, new)


def grow(cache: KVCache, slots: Mapping[str, int]) -> KVCache:
    """Returns the cache with at least `slots[attention]` slots for each attention."""
    sizes = {name: max(size, slots.get(name, 0)) for name, size in capacities(cache).items()}

    # [B*K, S, H] -> [B*K, sizes[name], H]
    layers = tuple(
        {
            name: (pad_slots(k, sizes[name]), pad_slots(v, sizes[name]))
            for name, (k, v) in layer.items()
        }
        for layer in cache.layers
    )
    # [B, S] -> [B, sizes[name]], with empty slots
    visibility = {
        name: pad_visibility(keys, sizes[name]) for name, keys in cache.visibility.items()
    }
    more = sizes["main"] - cache.positions.shape[1]
    positions = jnp.pad(cache.positions, [(0, 0), (0, more)])

    return dataclasses.replace(cache, layers=layers, visibility=visibility, positions=positions)


def repeat_row(cache: KVCache, rows: int) -> KVCache:
    """Returns the cache of one row, `rows` times."""

    def repeat(array: jax.Array) -> jax.Array:
        # [1, ...] -> [rows, ...], and [K, S, H] -> [rows*K, S, H]
        return jnp.tile(array, (rows,) + (1,) * (array.ndim - 1))

    return dataclasses.replace(
        cache,
        layers=jax.tree.map(repeat, cache.layers),
        visibility=jax.tree.map(repeat, cache.visibility),
        positions=repeat(cache.positions),
        lengths=repeat(cache.lengths),
    )


def find_used(cache: KVCache) -> tuple[KVCache, dict[str, jax.Array]]:
    """Returns the cache without layers, every row's used slots moved to the front in their order.

    Visibility does not change. The next slot to write is the one after the fullest row. Also
    returned is, by attention, i32[B,S]: where the keys and values of each slot were (`move_slots`).
    """
    positions, visibility, used, sources = cache.positions, {}, {}, {}
    for name, keys in cache.visibility.items():
        # A stable sort by "is empty" puts the used slots in front.
        is_used = keys.visible_from < NEVER
        order = jnp.argsort(~is_used, axis=1, stable=True)

        visibility[name] = Visibility(
            jnp.take_along_axis(keys.segments, order, axis=1),
            jnp.take_along_axis(keys.visible_from, order, axis=1),
        )
        used[name] = is_used.sum(1).max().astype(jnp.int32)
        if name == "main":
            positions = jnp.take_along_axis(positions, order, axis=1)
        sources[name] = order
    return KVCache((), visibility, positions, used, cache.lengths), sources


def move_slots(layer: Cache, sources: Mapping[str, jax.Array]) -> Cache:
    """Returns keys and values [B*K,S,H] of a layer from the sources i32[B,S] of each attention."""
    return {
        name: (_take_slots(k, sources[name]), _take_slots(v, sources[name]))
        for name, (k, v) in layer.items()
    }


def _take_slots(array: jax.Array, slots: jax.Array) -> jax.Array:
    """Returns keys or values [B*K,S,H] at slots i32[B,S]."""
    # [B, S] -> [B*K, S]: the heads of a row move together.
    per_head = jnp.repeat(slots, array.shape[0] // slots.shape[0], axis=0)
    return jnp.take_along_axis(array, per_head[..., None], axis=1)


def truncate(cache: KVCache, lengths: jax.Array) -> KVCache:
    """Returns the cache with only the first `lengths` i32[B] positions of each row."""
    visibility = {}
    for name, keys in cache.visibility.items():
        is_cut = keys.visible_from >= lengths[:, None]
        visible_from = jnp.where(is_cut, NEVER, keys.visible_from)
        visibility[name] = Visibility(keys.segments, visible_from)

    # Slots are not moved: `used` stays, and `compact` removes the empty ones when needed.
    shorter = jnp.minimum(cache.lengths, lengths)
    return dataclasses.replace(cache, visibility=visibility, lengths=shorter)


def insert(cache: KVCache, new_rows: KVCache, rows: jax.Array) -> KVCache:
    """Returns the cache with row `rows[i]` replaced by row i of `new_rows`.

    Both have the same attentions; those of `new_rows` have no more slots. An index past the last
    row inserts nothing.

    Args:
      rows: i32[n], the rows to replace.
    """
    new_rows = grow(new_rows, capacities(cache))
    row_count = cache.lengths.shape[0]

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows].set(new, mode="drop")

    def put_heads(old: jax.Array, new: jax.Array) -> jax.Array:
        # [B*K, S, H] -> [B, S, K, H] and back
        old_rows = attention.split_heads(old, row_count)
        return attention.merge_heads(put(old_rows, attention.split_heads(new, rows.shape[0])))

    return KVCache(
        layers=jax.tree.map(put_heads, cache.layers, new_rows.layers),
        visibility=jax.tree.map(put, cache.visibility, new_rows.visibility),
        positions=put(cache.positions, new_rows.positions),
        used={name: jnp.maximum(slot, new_rows.used[name]) for name, slot in cache.used.items()},
        lengths=put(cache.lengths, new_rows.lengths),
    )
