"""The layers of a Wings model's LLM: main attention, learners, router, MLP.

Shapes: B rows, T new slots, S cached and new slots, D width, N heads, K key-value heads, H head
width, R rank, M learners, C probed columns.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_wings import WingsConfig
from .layers_wings import LowRank, RMSNorm, attend, lora_linear
from .slots_wings import LEARNERS, Slots, cached, head_width, rotate


class WingsAttention(nn.Module):
    """The main attention of the LLM, with probes of its weights and a trained prefix."""

    def __init__(self, config: WingsConfig, layer: int):
        super().__init__()
        text = config.text_config
        self.layer, self.width = layer, head_width(text)
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        bias = text.model_type == "qwen2" or getattr(text, "attention_bias", False)
        outer, inner = text.hidden_size, self.heads * self.width
        kv_inner = self.kv_heads * self.width
        self.q_proj = lora_linear(config, "q", outer, inner, bias=bias)
        self.k_proj = lora_linear(config, "k", outer, kv_inner, bias=bias)
        self.v_proj = lora_linear(config, "v", outer, kv_inner, bias=bias)
        self.o_proj = lora_linear(config, "o", inner, outer, bias=False)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.width, text.rms_norm_eps) for _ in range(2))
        switches = getattr(text, "no_rope_layers", None)  # SmolLM3: 1 where a layer has rope
        self.has_rope = not switches or bool(switches[layer])
        self.prefix = None
        if config.prefix_length:
            self.prefix = Prefix(config.prefix_length, self.heads, self.kv_heads, self.width)

    def forward(self, h, slots: Slots, columns, cache, eager):
        """Returns [B,T,D], the probes f32[B,T,C] summed over heads or None, weights or None."""
        # [B,T,D] -> [B,N,T,H] and [B,K,T,H]
        shape = (*h.shape[:2], -1, self.width)
        q = self.q_norm(self.q_proj(h).view(shape))
        k = self.k_norm(self.k_proj(h).view(shape))
        v = self.v_proj(h).view(shape).transpose(1, 2)
        both = torch.cat([q, k], dim=2).transpose(1, 2)
        if self.has_rope:
            both = rotate(both, slots.rope)
        q, k = both.split([self.heads, self.kv_heads], dim=1)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        out, probed, weights = attend(q, k, v, slots.main.mask, columns=columns, eager=eager)
        if self.prefix is not None:
            out = out + self.prefix(q)
        out = out.transpose(1, 2).flatten(2)  # [B,N,T,H] -> [B,T,N*H]
        return self.o_proj(out), probed, weights


class Prefix(nn.Module):
    """tanh(gate) * attention over trained keys and values, with a softmax of its own."""

    def __init__(self, length: int, heads: int, kv_heads: int, width: int):
        super().__init__()
        self.key = nn.Parameter(torch.zeros(length, kv_heads, width))
        self.value = nn.Parameter(torch.zeros(length, kv_heads, width))
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        # [S,K,H] -> [B,K,S,H]
        k, v = (
            x.to(q.dtype).transpose(0, 1).expand(len(q), -1, -1, -1) for x in (self.key, self.value)
        )
        out, _, _ = attend(q, k, v, None)
        return torch.tanh(self.gate.float()).to(q.dtype)[:, None, None] * out


class Learner(nn.Module):
    """A visual or textual learner (equation 4): multi-head attention with low-rank matrices.

    Its keys and values are made from the layer-0 features, so they do not depend on other layers.
    """

    def __init__(self, config: WingsConfig):
        super().__init__()
        width, rank = config.text_config.hidden_size, config.learner_rank
        self.q, self.k, self.v, self.o = (LowRank(width, rank, width) for _ in range(4))

    def keys_values(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys before rope and values [B,n,D] of layer-0 features [B,n,D]."""
        return x0 + self.k(x0), x0 + self.v(x0)


class Router(nn.Module):
    """Gates f32[B,T,M] of the learners from the main attention's rows."""

    def __init__(self, config: WingsConfig):
        super().__init__()
        count = len(config.learners)
        self.weight = nn.Parameter(torch.zeros(count, config.router_positions))
        self.bias = nn.Parameter(torch.zeros(count))

    def values(self, positions: torch.Tensor) -> torch.Tensor:
        """Returns f32[B,S,M]: the weights at the keys' positions i64[B,S]."""
        return self.weight[:, positions].float().permute(1, 2, 0)

    def forward(self, summed: torch.Tensor) -> torch.Tensor:
        return F.silu(summed + self.bias.float()).softmax(-1)


class WingsMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: WingsConfig):
        super().__init__()
        width, inner = config.text_config.hidden_size, config.text_config.intermediate_size
        self.gate_proj = lora_linear(config, "gate", width, inner, bias=False)
        self.up_proj = lora_linear(config, "up", width, inner, bias=False)
        self.down_proj = lora_linear(config, "down", inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class WingsDecoderLayer(GradientCheckpointingLayer):
    """One layer of the LLM with its learners and their router."""

    def __init__(self, config: WingsConfig, layer: int):
        super().__init__()
        text = config.text_config
        self.config = config
        self.self_attn = WingsAttention(config, layer)
        self.mlp = WingsMlp(config)
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        # A layer without learners keeps their parameters, as the checkpoint does.
        self.learners = nn.ModuleDict({name: Learner(config) for name in config.learners})
        self.router = Router(config) if config.router else None
        self.active = config.learners_of(layer)

    def forward(self, x, x0, slots: Slots, cache=None, keys_values=None, eager=False):
        """Returns the stream [B,T,D], the attention weights, the masses and the gates.

        Args:
            x, x0: [B,T,D], the stream and the layer-0 features.
            keys_values: learner -> all keys and values [B,N,S,H]; None: computed from `x0`.
            eager: whether the attention weights are computed and returned.
        """
        h = self.input_layernorm(x)

        # The main attention, probed with the router's weights and the classes of keys.
        columns = []
        if self.router is not None and self.active:
            columns.append(self._router_values(slots))
        if slots.classes is not None:
            columns.append(slots.classes.float())
        columns = torch.cat(columns, dim=-1) if len(columns) > 1 else next(iter(columns), None)
        main, probed, weights = self.self_attn(h, slots, columns, cache, eager)
        masses = None
        if slots.classes is not None:
            masses = probed[..., -slots.classes.shape[-1] :] / self.self_attn.heads

        # The learners read the same normed stream (or, as the release does, the stream behind
        # the main attention), and are added beside the main attention.
        gates = self._gates(x, probed, slots)
        query = h if self.config.learner_query == "normed" else x + main
        x = x + main
        names = tuple(name for name in self.active if name in slots.learners)
        if names:
            x = x + self._learner_sum(names, query, x0, gates.to(x.dtype), slots, keys_values)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, weights, masses, gates

    def _router_values(self, slots: Slots) -> torch.Tensor:
        """Returns f32[B,S,M], the router's weights at the keys' positions."""
        if slots.router_values is not None:
            return slots.router_values[self]
        return self.router.values(slots.positions)

    def _gates(self, x, probed, slots: Slots) -> torch.Tensor:
        """Returns f32[B,T,M], with the gain."""
        count = len(self.active)
        if self.router is None or not count:
            gates = x.new_ones((*x.shape[:2], count), dtype=torch.float32)
        else:
            gates = self.router(probed[..., :count])
        if self.config.gain != 1:
            gates = gates * self.config.gain
        if slots.ungated is not None:
            gates = gates.masked_fill(slots.ungated[..., None], 1.0)
        return gates

    def _learner_sum(self, names, query, x0, gates, slots: Slots, keys_values):
        """Returns the sum of the named learners' gated outputs [B,T,D], of queries [B,T,D]."""
        learners = [self.learners[name] for name in names]
        if keys_values is None:
            keys_values = {name: self._keys_values(name, x0, slots) for name in names}
        packed = None if slots.packed is None else slots.packed.learners(self, names)

        # [B,T,D] -> [M,B,N,T,H]
        if packed is None:
            q = torch.stack([learner.q(query) for learner in learners]) + query
        else:
            q = packed.queries(query)
        q = q.unflatten(-1, (-1, self.self_attn.width)).transpose(2, 3)
        q = rotate(q, slots.learner_rope)

        # M x [B,N,T,H] -> M x [B,T,D]; a query without visible keys gets the gate 0.
        outputs, chosen = [], []
        for name, one in zip(names, q.unbind(), strict=True):
            keys, number = slots.learners[name], self.active.index(name)
            out, _, _ = attend(one, *keys_values[name], keys.mask)
            gate = gates[..., number : number + 1]
            if keys.is_alone is not None:
                gate = gate.masked_fill(keys.is_alone[..., None], 0.0)
            outputs.append(out.transpose(1, 2).flatten(2))
            chosen.append(gate)

        # The gates are applied at the rank.
        if packed is not None:
            return packed.outputs(torch.stack(outputs).squeeze(2), torch.stack(chosen).squeeze(2))
        parts = zip(learners, outputs, chosen, strict=True)
        return sum(learner.o(out, gate) for learner, out, gate in parts)

    def _keys_values(self, name: str, x0: torch.Tensor, slots: Slots):
        """Returns a learner's keys and values [B,N,S,H] of the new slots."""
        return learner_keys_values([self], name, x0, slots)


def learner_keys_values(layers, name: str, x0: torch.Tensor, slots: Slots):
    """Returns a learner's keys and values [B,L*N,n,H] of layer-0 features [B,T,D].

    Args:
        layers: the L decoder layers, one behind the other along the heads of the result.
    """
    index, table = slots.learners[name].new, slots.learner_rope
    if index is not None:
        x0 = x0.index_select(1, index)
        table = tuple(part.index_select(2, index) for part in table)

    # L x [B,n,D] -> [B,L*N,n,H]
    width = layers[0].self_attn.width
    if slots.packed is not None:
        k, v = slots.packed.keys(name).keys_values(x0, width)
        return rotate(k, table), v
    pairs = [layer.learners[name].keys_values(x0) for layer in layers]
    k, v = (
        (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])
        .unflatten(-1, (-1, width))
        .transpose(1, 2)
        for parts in zip(*pairs, strict=True)
    )
    return rotate(k, table), v


def cached_keys_values(layers, x0: torch.Tensor, slots: Slots, cache) -> list:
    """Returns per layer: learner -> keys and values [B,N,S,H], cached and new.

    They depend on the layer-0 features alone, so all layers' are appended to the cache at once.
    Without a cache each layer computes its own (None), which gradient checkpointing then does not
    store.
    """
    if cache is None:
        return [None] * len(layers)
    by_layer: list[dict] = [{} for _ in layers]
    active = [number for number, layer in enumerate(layers) if layer.active]
    for name, keys in slots.learners.items() if active else ():
        number = len(layers) + LEARNERS[name] - 1
        if keys.new is None or len(keys.new):
            fresh = learner_keys_values([layers[n] for n in active], name, x0, slots)
            pair = cache.update(*fresh, number)
        else:
            pair = cached(cache, number)

        # [B,L*N,S,H] -> L x [B,N,S,H]
        k, v = (x.unflatten(1, (len(active), -1)).unbind(1) for x in pair)
        for position, n in enumerate(active):
            by_layer[n][name] = (k[position], v[position])
    return by_layer
