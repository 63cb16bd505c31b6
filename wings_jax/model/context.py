"""The inputs that all layers share: which keys and values each attention reads, and visibility.

A layer reads its residual stream [B,T,D] and one `LayerContext`. In training and prefill the keys
are computed from the same slots as the queries; in cached decoding they are written into a KV
cache of S slots, all of which are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from wings_jax.model import attention, layout
from wings_jax.model.kernels.intervals import KeyMask, key_intervals, take_slots
from wings_jax.model.layers import RopeTable, rope_table
from wings_jax.model.layout import Array, Layout, Visibility
from wings_jax.model.presets import WingsArch

# Keys and values of one attention: [B,S,K,H] each, or [B*K,S,H] where they are a KV cache.
KeysValues = tuple[jax.Array, jax.Array]

# KV cache of one layer: attention ("main", "visual", "textual") -> keys and values [B*K,S,H].
Cache = Mapping[str, KeysValues]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVInputs:
    """The inputs of one attention's keys and values, and the key side of its attention mask.

    S is the number of keys: the T new slots, or those of the KV cache, into which the F new ones
    are written from slot `start` on. A learner may leave out the slots of other modalities.

    visibility  Visibility [B,S]  key side of the attention mask
    start       i32[]             first cache slot of the new keys; None without a KV cache
    x0          f32[B,F,D]        layer-0 features of a learner's new keys; None where there are
                                  none, and for the main attention, which reads the stream
    rope_table  f32[B,F,H/2] x 2  cos and sin at the positions of x0
    mask        KeyMask [B,S]     the attention mask as an accelerator's kernel reads it; None:
                                  attend() makes it where it is needed
    """

    visibility: Visibility
    start: jax.Array | None = None
    x0: jax.Array | None = None
    rope_table: RopeTable | None = None
    mask: KeyMask | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerContext:
    """What every layer reads besides the residual stream of its T slots.

    rope_table          f32[B,T,H/2] x 2  cos and sin at the slots' positions
    query               Visibility [B,T]  query side of the attention mask, for every attention
    main                KVInputs of the main attention
    positions           i32[B,S]    positions of the main attention's keys, for the router's weights
    learners            learner -> its KVInputs; a learner without visible keys may be left out
    classes             f32[B,S,C]  probes of the main attention (LAWS: one-hot classes of the keys)
    learner_rope_table  as `rope_table`, for the learners' queries; None where it is the same
    ungated             bool[B,T]   where learners count 1 instead of gate x gain; None: nowhere
    """

    rope_table: RopeTable
    query: Visibility
    main: KVInputs
    positions: Array
    learners: Mapping[str, KVInputs]
    classes: jax.Array | None = None
    learner_rope_table: RopeTable | None = None
    ungated: jax.Array | None = None


def make_context(
    arch: WingsArch,
    x0: jax.Array,
    rows: Layout,
    classes: jax.Array | None = None,
    *,
    image_slots: int | None = None,
    kernel: str = "einsum",
) -> LayerContext:
    """Returns the context of whole rows [B,T], whose keys are the same slots as the queries.

    Args:
      x0: f32[B,T,D], layer-0 features.
      classes: f32[B,T,C], see `LayerContext`.
      image_slots: an upper bound of the image slots in a row. The visual learner then has so many
        keys instead of T, and with 0 it is left out; the layers' results are the same.
      kernel: what will run (`attention.choose_kernel`). The masks of an accelerator's kernels are
        made here, once for all layers, and learners' keys are put into the order it needs.
    """
    llm_table, learner_table = rope_tables(arch, rows.positions)

    learners = {
        name: KVInputs(
            layout.key_visibility(rows, layout.LEARNERS[name]),
            x0=x0,
            rope_table=learner_table or llm_table,
        )
        for name in arch.learners
    }

    if image_slots == 0:
        learners.pop("visual", None)
    elif "visual" in learners and image_slots is not None and image_slots < x0.shape[1]:
        learners["visual"] = _pack_images(learners["visual"], rows, image_slots)

    query = layout.query_visibility(rows)
    main = KVInputs(layout.key_visibility(rows, layout.MAIN))
    if kernel in attention.ACCELERATED:
        # The slots of a conversation are adjacent, so the main attention needs no order.
        intervals = key_intervals(query, main.visibility)
        mask = KeyMask(query, main.visibility, intervals, is_causal=True, is_triangular=True)
        main = dataclasses.replace(main, mask=mask)
        learners = {
            name: _with_mask(arch, kernel, query, kv_inputs) for name, kv_inputs in learners.items()
        }

    return LayerContext(
        rope_table=llm_table,
        query=query,
        main=main,
        positions=rows.positions,
        learners=learners,
        classes=classes,
        learner_rope_table=learner_table,
        ungated=ungated_tokens(arch, query, learners),
    )


def rope_tables(arch: WingsArch, positions: Array) -> tuple[RopeTable, RopeTable | None]:
    """Returns the rope table of the LLM, and that of the learners where it differs.

    The learners of the authors' release ignore the LLM's rope scaling.
    """
    llm = arch.decoder
    table = rope_table(positions, llm.head_dim, llm.rope_theta, llm.rope_scaling)

    if arch.semantics.scaled_rope or llm.rope_scaling is None:
        return table, None

    return table, rope_table(positions, llm.head_dim, llm.rope_theta)


def ungated_tokens(
    arch: WingsArch, query: Visibility, learners: Mapping[str, KVInputs]
) -> jax.Array | None:
    """Returns bool[B,T]: which queries have visible keys in exactly one learner.

    None with the paper's semantics, where such queries are gated as all others.
    """
    if not (arch.semantics.ungated_when_alone and learners):
        return None

    # [B,T,S] -> [B,T], by learner
    has_keys = [
        layout.visible(query, kv_inputs.visibility).any(-1) for kv_inputs in learners.values()
    ]
    # [M,B,T] -> [B,T]
    return jnp.stack(has_keys).sum(0) == 1


def update_cache(
    cached: KeysValues | None, fresh: KeysValues, start: jax.Array | None
) -> KeysValues:
    """Returns all keys and values: a KV cache [B*K,S,H] with the new [B,F,K,H] written into it.

    Without a cache they are the new ones, [B,F,K,H].
    """
    if cached is None:
        return fresh
    if start is None:
        raise ValueError("a KV cache needs the first slot of the new keys (KVInputs.start)")

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        # [B,F,K,H] -> [B*K,F,H], the layout of the cache
        merged = attention.merge_heads(new.astype(old.dtype))
        return jax.lax.dynamic_update_slice_in_dim(old, merged, start, axis=1)

    return write(cached[0], fresh[0]), write(cached[1], fresh[1])


def _with_mask(arch: WingsArch, kernel: str, query: Visibility, kv_inputs: KVInputs) -> KVInputs:
    """Returns a learner's inputs with the kernel's mask, their keys in the kernel's order."""
    # Packed images are no longer the slots of the rows, and the release's keys are not causal.
    is_triangular = arch.semantics.prompt_length is None
    has_all_slots = kv_inputs.visibility.segments.shape == query.segments.shape
    mask, order = attention.prepare_keys(
        kernel,
        query,
        kv_inputs.visibility,
        is_causal=is_triangular and has_all_slots,
        is_triangular=is_triangular,
    )

    if order is not None:
        kv_inputs = jax.tree.map(lambda x: take_slots(x, order), kv_inputs)
    return dataclasses.replace(kv_inputs, mask=mask)


def _pack_images(visual: KVInputs, rows: Layout, count: int) -> KVInputs:
    """Returns the visual learner's keys without text slots: its first `count` image slots."""
    # A stable sort puts the image slots first and keeps their order.
    is_other = (rows.modality != layout.IMAGE).astype(jnp.int32)
    index = jnp.argsort(is_other, axis=1, stable=True)[:, :count]

    # [B, T, ...] -> [B, count, ...]
    return jax.tree.map(lambda x: take_slots(x, index), visual)
