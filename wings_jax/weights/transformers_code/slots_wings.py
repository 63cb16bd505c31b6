"""What every slot of a Wings model's rows is, which keys a query may attend to, and the KV cache.

Shapes: B rows, T new slots, S cached and new slots, H head width, C classes of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .packing_wings import PackedWeights

TEXT, IMAGE, PADDING = 0, 1, 2
NEVER = 2**30  # `visible_from` of a slot that no query may attend to
MAIN, VISUAL, TEXTUAL = 0, 1, 2
LEARNERS = {"visual": VISUAL, "textual": TEXTUAL}


@dataclass
class Keys:
    """The keys of one attention.

    new: i64[n] the new slots that are keys; None: all of them.
    mask: f[B,1,T,S], added to the scores: 0 where a query attends to a key, else the least number
        of the dtype; None where every query attends to every key.
    is_alone: bool[B,T], the queries that have no visible key; None where all have one.
    """

    new: torch.Tensor | None
    mask: torch.Tensor | None
    is_alone: torch.Tensor | None


@dataclass
class Slots:
    """What every layer reads besides the residual stream.

    positions: i64[B,S] of the main attention's keys, for the router's weights.
    main: the keys of the main attention.
    learners: learner -> its keys; without the learners that have no key in any row.
    rope, learner_rope: tables for the new slots, see `rope_table`.
    ungated: bool[B,T] where gate x gain is 1, or None.
    classes: f32[B,S,C] to measure the attention masses of, or None.
    packed: the learners' matrices for a step of one token, or None.
    router_values: layer -> f32[B,S,M], the router's weights at the keys, or None.
    """

    positions: torch.Tensor
    main: Keys
    learners: dict[str, Keys]
    rope: tuple[torch.Tensor, torch.Tensor]
    learner_rope: tuple[torch.Tensor, torch.Tensor]
    ungated: torch.Tensor | None
    classes: torch.Tensor | None
    packed: PackedWeights | None = None
    router_values: dict | None = None


class GrowingLayer(DynamicLayer):
    """Keys and values at the start of larger buffers: a new slot copies no earlier one.

    Without gradients only: autograd needs a new tensor at every step.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.buffers: list[torch.Tensor] = []

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends keys and values [B,N,n,H]; returns all of them [B,N,S,H]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        elif torch.is_grad_enabled():
            self.keys = torch.cat([self.keys, key_states], dim=-2)
            self.values = torch.cat([self.values, value_states], dim=-2)
        else:
            self._append(key_states, value_states)
        return self.keys, self.values

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        length, new = self.keys.shape[-2], key_states.shape[-2]
        total = length + new

        # A buffer is full, or transformers has replaced the tensors (beam search, cropping).
        is_usable = bool(self.buffers) and self.buffers[0].shape[-2] >= total
        if not is_usable or self.keys is not self.views[0] or self.values is not self.views[1]:
            slack = max(64, total // 4)
            self.buffers = [
                old.new_empty((*old.shape[:-2], total + slack, old.shape[-1]))
                for old in (self.keys, self.values)
            ]
            for buffer, old in zip(self.buffers, (self.keys, self.values), strict=True):
                buffer.narrow(-2, 0, length).copy_(old)

        keys, values = self.buffers
        keys.narrow(-2, length, new).copy_(key_states)
        values.narrow(-2, length, new).copy_(value_states)
        self.keys, self.values = (buffer.narrow(-2, 0, total) for buffer in self.buffers)
        self.views = (self.keys, self.values)


class WingsCache(DynamicCache):
    """Keys and values of `WingsModel`, the learners' too.

    With L layers, its layers 0 to L-1 are the main attention's; L, L+1 hold the visual and textual
    learners' keys and values of all layers, one behind the other along the heads [B,L*N,S,H];
    L+2, L+3, L+4 hold `visible_from` and the positions of the three attentions' keys [B,1,S,1].
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.layer_class_to_replicate = GrowingLayer


def cached(cache: DynamicCache, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the keys and values of one layer of a cache, or None if it has none."""
    layers = cache.layers
    is_filled = layer < len(layers) and layers[layer].get_seq_length() > 0
    return (layers[layer].keys, layers[layer].values) if is_filled else None


def make_slots(
    config, input_ids, attention_mask, position_ids, cache, classes, dtype: torch.dtype
) -> Slots:
    """Returns what the layers read of new slots i64[B,T]; the cache gets `visible_from`."""
    new = input_ids.shape[1]
    past = 0 if cache is None else cache.get_seq_length()
    has_padding = attention_mask is not None and not bool(attention_mask.all())
    positions = slot_positions(input_ids, attention_mask, position_ids, past, has_padding)
    if config.router and int(positions.max()) >= config.router_positions:
        raise ValueError(
            f"the router reads {config.router_positions} positions, "
            f"the conversation has {int(positions.max()) + 1}"
        )

    # The new slots' part of every attention's keys.
    is_image = input_ids == config.image_token_id
    if has_padding or bool(is_image.any()):
        modality = torch.where(is_image, IMAGE, TEXT)
        if has_padding:
            modality = modality.masked_fill(attention_mask[:, -new:] == 0, PADDING)
        if config.prompt_length is None:
            visible_from = paper_visible_from(positions, modality)
        else:
            visible_from = release_visible_from(positions, modality, config.prompt_length)
        fresh = {name: visible_from[number] for name, number in LEARNERS.items()}
        fresh["main"] = visible_from[MAIN]
    else:
        fresh = {"main": positions, "textual": positions}  # text alone, with either semantics

    # The masks, over cached and new keys.
    first_layer = config.text_config.num_hidden_layers + len(LEARNERS)
    keys, key_positions = make_keys("main", fresh, positions, cache, first_layer, dtype)
    learners = {}
    for name in config.learners:
        layer = first_layer + LEARNERS[name]
        learner, _ = make_keys(name, fresh, positions, cache, layer, dtype)
        if learner is not None:
            learners[name] = learner

    tables = rope_tables(config, positions)
    return Slots(
        positions=key_positions,
        main=keys,
        learners=learners,
        rope=tables[0],
        learner_rope=tables[1],
        ungated=ungated_queries(learners, positions) if config.ungated_when_alone else None,
        classes=classes,
    )


def slot_positions(
    input_ids, attention_mask, position_ids, past: int, has_padding: bool
) -> torch.Tensor:
    """Returns i64[B,T], the positions of the new slots in their conversations."""
    rows, new = input_ids.shape
    if position_ids is not None:
        return position_ids.expand(rows, -1)
    if has_padding:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]
    return torch.arange(past, past + new, device=input_ids.device).expand(rows, -1)


def make_keys(
    name: str, fresh: dict, positions: torch.Tensor, cache, layer: int, dtype: torch.dtype
) -> tuple[Keys | None, torch.Tensor | None]:
    """Returns an attention's keys and their positions i64[B,S]; None where there are no keys.

    Args:
        fresh: attention -> `visible_from` i64[B,T] of the new slots, as far as there are keys.
        positions: i64[B,T] of the new slots, which are the queries.
        layer: of the cache, for `visible_from` and positions.
    """
    # A learner's keys are the slots of its modality in any row. [B,T] -> [B,n]
    visible_from, key_positions, index = fresh.get(name), positions, None
    if visible_from is None:
        index = positions.new_zeros(0)
    elif name != "main":
        is_key = (visible_from < NEVER).any(0)
        if not bool(is_key.all()):
            index = is_key.nonzero()[:, 0]
            visible_from = visible_from.index_select(1, index)
            key_positions = positions.index_select(1, index)
    has_new = index is None or len(index) > 0

    # [B,n] -> [B,S]
    if cache is not None and has_new:
        pair = (visible_from[:, None, :, None], key_positions[:, None, :, None])
        visible_from, key_positions = (x[:, 0, :, 0] for x in cache.update(*pair, layer))
    elif cache is not None:
        pair = cached(cache, layer)
        visible_from = None if pair is None else pair[0][:, 0, :, 0]
    elif not has_new:
        visible_from = None
    if visible_from is None:
        return None, None

    is_visible = visible_from[:, None, None, :] <= positions[:, None, :, None]
    if bool(is_visible.all()):
        return Keys(index, None, None), key_positions

    # A query without keys attends to all of them; its result is not used.
    is_alone = ~is_visible.any(-1)
    mask = torch.zeros(is_visible.shape, dtype=dtype, device=positions.device)
    mask = mask.masked_fill(~(is_visible | is_alone[..., None]), torch.finfo(dtype).min)
    return Keys(index, mask, is_alone[:, 0] if bool(is_alone.any()) else None), key_positions


def ungated_queries(learners: dict[str, Keys], positions: torch.Tensor) -> torch.Tensor:
    """Returns bool[B,T], the queries for which exactly one learner has visible keys."""
    count = torch.zeros_like(positions)
    for keys in learners.values():
        count = count + (1 if keys.is_alone is None else (~keys.is_alone).long())
    return count == 1


def paper_visible_from(positions: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
    """Returns i64[3,B,T]: from which position on main, visual and textual attention read a key."""
    readable = (modality != PADDING, modality == IMAGE, modality == TEXT)
    return torch.stack([torch.where(keep, positions, NEVER) for keep in readable])


def release_visible_from(
    positions: torch.Tensor, modality: torch.Tensor, prompt_length: int
) -> torch.Tensor:
    """Returns i64[3,B,T] as the authors' release masks: not causal where there is an image.

    Every slot attends to all image slots. The textual keys are the text slots behind the first
    `prompt_length`, re-counted: the n-th is read from position n on, before its own. Without an
    image, or with one at position 0, they are all slots and nothing is re-counted.
    """
    visible_from = paper_visible_from(positions, modality)
    visible_from[VISUAL] = torch.where(modality == IMAGE, 0, NEVER)
    used = modality != PADDING
    first = torch.where(modality == IMAGE, positions, NEVER).amin(1, keepdim=True)
    recounts = (first > 0) & (first < NEVER)
    is_key = (modality == TEXT) & ((positions >= prompt_length) | (positions > first))
    is_key = torch.where(recounts, is_key, used)
    order = is_key.cumsum(1) - 1
    visible_from[TEXTUAL] = torch.where(is_key, order, NEVER)
    return visible_from


def rope_tables(config, positions: torch.Tensor) -> tuple:
    """Returns the tables of the LLM and of the learners for positions i64[B,T]."""
    text = config.text_config
    width = head_width(text)
    parameters = dict(getattr(text, "rope_parameters", None) or {})
    parameters.setdefault("rope_theta", getattr(text, "rope_theta", 10000.0))
    table = rope_table(positions, width, parameters)
    if config.learner_scaled_rope:
        return table, table
    return table, rope_table(positions, width, parameters, scaled=False)


def head_width(text) -> int:
    """Returns the width of a head of the LLM."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def rope_table(
    positions: torch.Tensor, width: int, parameters: dict, *, scaled: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and signed sin f32[B,1,T,H] for `rotate`; the halves of a head are paired."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    frequencies = float(parameters["rope_theta"]) ** -exponents
    kind = parameters.get("rope_type", "default") if scaled else "default"
    if kind == "linear":
        frequencies = frequencies / parameters["factor"]
    elif kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        wavelengths = 2 * math.pi / frequencies
        original = parameters["original_max_position_embeddings"]
        smooth = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
        frequencies = (1 - smooth) * frequencies / parameters["factor"] + smooth * frequencies
    elif kind != "default":
        raise ValueError(f"rope_type {kind!r} is not supported")

    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Returns x [...,B,N,T,H] rotated by the table; computed in float32."""
    cos, signed_sin = table
    wide = x.float()
    swapped = wide.roll(wide.shape[-1] // 2, -1)  # the second half, then the first
    return torch.addcmul(wide * cos, swapped, signed_sin).to(x.dtype)
