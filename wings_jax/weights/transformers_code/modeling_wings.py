"""Wings (arXiv 2406.03496) for `transformers`: a multimodal LLM with visual and textual learners.

One layer, with h = RMSNorm(x) and layer-0 features x0 (image features and token embeddings):

    main   = O(attend(rope(Q h), rope(K h), V h))                       all slots
    wing_m = O_m(attend(rope(h(1+Q_m)), rope(x0(1+K_m)), x0(1+V_m)))    slots of modality m
    gate   = softmax_m(silu(sum_heads a W_m + b_m))                     a: main attention weights
    x      = x + main + gain * sum_m gate_m wing_m
    x      = x + mlp(RMSNorm(x))

The router's input `sum_heads a W` and the masses of the main attention on classes of keys are
linear in the attention weights: W and the classes are appended to the values as extra columns,
so that the weights themselves need not exist (`attn_implementation="sdpa"`).

Shapes: B rows, T new slots, S cached and new slots, D width, N heads, K key-value heads, H head
width, R rank, P slots of an image.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_wings import WingsConfig

TEXT, IMAGE, PADDING = 0, 1, 2
NEVER = 2**30  # `visible_from` of a slot that no query may attend to
MAIN, VISUAL, TEXTUAL = 0, 1, 2
LEARNERS = {"visual": VISUAL, "textual": TEXTUAL}
COLUMNS_MULTIPLE = 8  # head widths that the fused kernels take


@dataclass
class WingsOutput(CausalLMOutputWithPast):
    """Output of `WingsModel` and `WingsForConditionalGeneration`.

    `loss`, `logits` f32[B,T,V], `hidden_states` (L+1 states [B,T,D]), `attentions` (eager only: L
    main attention weights [B,N,T,S]) and the cache are those of `CausalLMOutputWithPast`.

    Args:
        last_hidden_state: [B,T,D], after the final norm.
        attention_masses: with `key_classes`, L tensors f32[B,T,C]: the main attention's mass on
            each class of keys, mean over heads.
        gates: with `output_gates`, L tensors f32[B,T,M] of the router, times the gain.
    """

    last_hidden_state: torch.FloatTensor | None = None
    attention_masses: tuple | None = None
    gates: tuple | None = None


# The cache's name in outputs and arguments; transformers renamed it within version 5.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class Slots:
    """What every layer reads besides the residual stream.

    query_positions: i64[B,T] position of each new slot in its conversation.
    positions: i64[B,S] of all slots of the main attention, for the router's weights.
    visible: attention -> bool[B,1,T,S_m], which keys a query may attend to.
    has_keys: learner -> bool[B,T], whether a query has any visible key.
    keys_from: learner -> i64[n], the new slots that go into a learner's cache.
    rope, learner_rope: cos and sin f32[B,T,H] at the new slots.
    ungated: bool[B,T] where gate x gain is 1, or None.
    classes: f32[B,S,C] to measure the attention masses of, or None.
    """

    query_positions: torch.Tensor
    positions: torch.Tensor
    visible: dict
    has_keys: dict
    keys_from: dict
    rope: tuple
    learner_rope: tuple
    ungated: torch.Tensor | None
    classes: torch.Tensor | None


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


def rope_table(
    positions: torch.Tensor, width: int, parameters: dict, *, scaled: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin f32[B,T,H] for positions i64[B,T]; halves are paired (`rotate_half`)."""
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

    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Returns x [B,N,T,H] rotated by the table; computed in float32."""
    cos, sin = (part[:, None] for part in table)
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class LoraLinear(nn.Linear):
    """A linear layer with a LoRA pair beside its weight; rank 0 is a plain linear layer."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rank: int, alpha: float):
        super().__init__(inputs, outputs, bias=bias)
        self.rank, self.scale = rank, alpha / max(rank, 1)
        if rank:
            self.lora_a = nn.Linear(inputs, rank, bias=False)
            self.lora_b = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + self.lora_b(self.lora_a(x)) * self.scale if self.rank else y


def lora_linear(
    config: WingsConfig, name: str, inputs: int, outputs: int, *, bias: bool
) -> LoraLinear:
    """Returns a projection of the LLM, with LoRA where the configuration has it."""
    rank = config.lora_rank if name in config.lora_targets else 0
    return LoraLinear(inputs, outputs, bias=bias, rank=rank, alpha=config.lora_alpha)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    columns: torch.Tensor | None = None,
    eager: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Scaled dot-product attention, with products of the weights and extra columns.

    Args:
        q: [B,N,T,H].
        k, v: [B,K,S,H].
        visible: bool[B,1,T,S]; every query has at least one key. None: all keys.
        columns: f32[B,S,C], the same for all heads.
        eager: compute the weights [B,N,T,S] and return them.

    Returns:
        out [B,N,T,H]; the weights times the columns f32[B,N,T,C], or None; the weights or None.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5

    # For a few queries the weights are smaller than padded keys and values.
    if eager or (columns is not None and q.shape[2] <= columns.shape[-1] + 2):
        scores = (q @ k.transpose(2, 3)).float() * scale
        if visible is not None:
            scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        probed = None if columns is None else weights @ columns[:, None]
        return weights.to(v.dtype) @ v, probed, weights if eager else None

    if columns is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        return out, None, None

    # Keys get zero columns, values the probes; all three keep the same width.
    width = q.shape[-1]
    extra = -(-columns.shape[-1] // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE
    columns = F.pad(columns, (0, extra - columns.shape[-1])).to(v.dtype)
    columns = columns[:, None].expand(-1, v.shape[1], -1, -1)
    q, k = F.pad(q, (0, extra)), F.pad(k, (0, extra))
    v = torch.cat([v, columns], dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    return out[..., :width], out[..., width:].float(), None


class WingsAttention(nn.Module):
    """The main attention of the LLM, with probes of its weights and a trained prefix."""

    def __init__(self, config: WingsConfig, layer: int):
        super().__init__()
        text = config.text_config
        self.layer = layer
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.width = getattr(text, "head_dim", None) or text.hidden_size // self.heads
        bias = text.model_type == "qwen2" or getattr(text, "attention_bias", False)
        self.q_proj = lora_linear(config, "q", text.hidden_size, self.heads * self.width, bias=bias)
        self.k_proj = lora_linear(
            config, "k", text.hidden_size, self.kv_heads * self.width, bias=bias
        )
        self.v_proj = lora_linear(
            config, "v", text.hidden_size, self.kv_heads * self.width, bias=bias
        )
        self.o_proj = lora_linear(
            config, "o", self.heads * self.width, text.hidden_size, bias=False
        )
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.width, text.rms_norm_eps) for _ in range(2))
        switches = getattr(text, "no_rope_layers", None)  # SmolLM3: 1 where a layer has rope
        self.has_rope = not switches or bool(switches[layer])
        self.prefix = None
        if config.prefix_length:
            self.prefix = Prefix(config.prefix_length, self.heads, self.kv_heads, self.width)

    def forward(self, h, slots: Slots, columns, cache, eager):
        """Returns [B,T,D], the probes f32[B,T,N,C] or None, the weights or None."""
        shape = (*h.shape[:2], -1, self.width)
        # [B,T,D] -> [B,N,T,H] and [B,K,T,H]
        q = self.q_norm(self.q_proj(h).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(h).view(shape)).transpose(1, 2)
        if self.has_rope:
            q, k = rotate(q, slots.rope), rotate(k, slots.rope)
        v = self.v_proj(h).view(shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        out, probed, weights = attend(q, k, v, slots.visible["main"], columns=columns, eager=eager)
        if self.prefix is not None:
            out = out + self.prefix(q)
        out = out.transpose(1, 2).flatten(2)  # [B,N,T,H] -> [B,T,N*H]
        probed = None if probed is None else probed.transpose(1, 2)
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


class LowRank(nn.Module):
    """x -> b(a(x)): a low-rank matrix."""

    def __init__(self, inputs: int, rank: int, outputs: int):
        super().__init__()
        self.a = nn.Linear(inputs, rank, bias=False)
        self.b = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Learner(nn.Module):
    """A visual or textual learner (equation 4): multi-head attention with low-rank matrices.

    Its keys and values are made from the layer-0 features. A query without visible keys gets 0.
    """

    def __init__(self, config: WingsConfig, layer: int, name: str):
        super().__init__()
        text = config.text_config
        self.name = name
        self.cache_layer = LEARNERS[name] * text.num_hidden_layers + layer
        self.width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width, rank = text.hidden_size, config.learner_rank
        self.q, self.k, self.v = (LowRank(width, rank, width) for _ in range(3))
        self.o = LowRank(width, rank, width)

    def forward(self, query, x0, slots: Slots, cache):
        """Returns [B,T,D] of queries and layer-0 features [B,T,D]."""

        def heads(x, matrix):  # [B,T,D] -> [B,N,T,H]
            x = x + matrix(x)
            return x.view(*x.shape[:2], -1, self.width).transpose(1, 2)

        q = rotate(heads(query, self.q), slots.learner_rope)
        index = slots.keys_from[self.name]
        k = v = None
        if index.numel():
            x0 = x0.index_select(1, index)
            table = tuple(part.index_select(1, index) for part in slots.learner_rope)
            k, v = rotate(heads(x0, self.k), table), heads(x0, self.v)
        if cache is not None:
            if k is None:
                k = q.new_zeros(q.shape[0], q.shape[1], 0, q.shape[3])
                v = k
            k, v = cache.update(k, v, self.cache_layer)

        has_keys = slots.has_keys[self.name]
        if k is None or k.shape[2] == 0:
            return torch.zeros_like(query)
        visible = slots.visible[self.name] | ~has_keys[:, None, :, None]
        out, _, _ = attend(q, k, v, visible)
        out = out.transpose(1, 2).flatten(2)  # [B,N,T,H] -> [B,T,D]
        return self.o(out * has_keys[..., None])


class Router(nn.Module):
    """Gates f32[B,T,M] of the learners from the main attention's rows."""

    def __init__(self, config: WingsConfig):
        super().__init__()
        count = len(config.learners)
        self.weight = nn.Parameter(torch.zeros(count, config.router_positions))
        self.bias = nn.Parameter(torch.zeros(count))

    def values(self, positions: torch.Tensor) -> torch.Tensor:
        """Returns f32[B,S,M]: the weights at the keys' positions."""
        return self.weight.float().t()[positions]

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
        self.learners = nn.ModuleDict(
            {name: Learner(config, layer, name) for name in config.learners}
        )
        self.router = Router(config) if config.router else None
        self.active = config.learners_of(layer)

    def forward(self, x, x0, slots: Slots, cache=None, eager=False):
        """Returns the stream [B,T,D], the attention weights, the masses and the gates."""
        h = self.input_layernorm(x)

        # The main attention, probed with the router's weights and the classes of keys.
        is_routed = self.router is not None and bool(self.active)
        columns = [self.router.values(slots.positions)] if is_routed else []
        columns += [] if slots.classes is None else [slots.classes.float()]
        columns = torch.cat(columns, dim=-1) if columns else None
        main, probed, weights = self.self_attn(h, slots, columns, cache, eager)
        masses = None
        if slots.classes is not None:
            masses = probed[..., -slots.classes.shape[-1] :].mean(2)

        # The learners read the same normed stream (or, as the release does, the stream behind
        # the main attention), and are added beside the main attention.
        query = h if self.config.learner_query == "normed" else x + main
        gates = self._gates(x, probed, slots)
        update = main
        for number, name in enumerate(self.active):
            output = self.learners[name](query, x0, slots, cache)
            update = update + gates[..., number : number + 1].to(x.dtype) * output

        x = x + update
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, weights, masses, gates

    def _gates(self, x, probed, slots: Slots) -> torch.Tensor:
        """Returns f32[B,T,M], with the gain."""
        count = len(self.active)
        if self.router is None or not count:
            gates = x.new_ones((*x.shape[:2], count), dtype=torch.float32)
        else:
            gates = self.router(probed[..., :count].sum(2))
        gates = gates * self.config.gain
        if slots.ungated is not None:
            gates = gates.masked_fill(slots.ungated[..., None], 1.0)
        return gates


class VisionLayer(nn.Module):
    """A pre-norm encoder layer of SigLIP or CLIP, [B,P,E] -> [B,P,E]."""

    def __init__(self, vision):
        super().__init__()
        width = vision.hidden_size
        self.heads = vision.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.layer_norm2 = nn.LayerNorm(width, eps=vision.layer_norm_eps)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, vision.intermediate_size),
                "fc2": nn.Linear(vision.intermediate_size, width),
            }
        )
        self.activation = ACT2FN[vision.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.self_attn["out_proj"](out)
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class VisionTower(nn.Module):
    """SigLIP or CLIP: f32[n,3,h,w] -> patch features [n,P,E], the last layer's before any norm."""

    def __init__(self, vision):
        super().__init__()
        self.has_class_token = vision.model_type == "clip_vision_model"
        strategy = getattr(vision, "vision_feature_select_strategy", None)
        self.first_feature = {"default": 1, "full": 0}.get(strategy, int(self.has_class_token))
        width, side = vision.hidden_size, vision.image_size // vision.patch_size
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(
            vision.num_channels,
            width,
            kernel_size=vision.patch_size,
            stride=vision.patch_size,
            bias=not self.has_class_token,
        )
        self.embeddings.position_embedding = nn.Embedding(side**2 + self.has_class_token, width)
        if self.has_class_token:
            self.embeddings.class_embedding = nn.Parameter(torch.zeros(width))
            self.pre_layrnorm = nn.LayerNorm(width, eps=vision.layer_norm_eps)  # sic, as CLIP's
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(
            VisionLayer(vision) for _ in range(vision.num_hidden_layers)
        )
        # Part of the tower, never applied to patch features: kept so that nothing is lost.
        self.post_layernorm = nn.LayerNorm(width, eps=vision.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.embeddings.patch_embedding
        x = patches(pixel_values.to(patches.weight.dtype)).flatten(2).transpose(1, 2)
        if self.has_class_token:
            token = self.embeddings.class_embedding.expand(len(x), 1, -1)
            x = torch.cat([token, x], dim=1)
        x = x + self.embeddings.position_embedding.weight
        if self.has_class_token:
            x = self.pre_layrnorm(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return x[:, self.first_feature :]


class Projector(nn.Module):
    """Image features [n,P,E] -> [n,P,D]: no, one, two or three linear layers with GELU between."""

    def __init__(self, config: WingsConfig):
        super().__init__()
        depth = {"identity": 0, "linear": 1, "mlp2x_gelu": 2, "mlp3x_gelu": 3}[config.projector]
        width = config.text_config.hidden_size
        sizes = [config.vision_config.hidden_size] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if number else x)
        return x


class WingsPreTrainedModel(PreTrainedModel):
    """What all Wings models share with `PreTrainedModel`."""

    config_class = WingsConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["WingsDecoderLayer", "VisionLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Gaussian matrices; everything that is added to a base LLM starts at exactly 0."""
        super()._init_weights(module)
        if isinstance(module, LowRank):
            nn.init.zeros_(module.b.weight)
        elif isinstance(module, LoraLinear) and module.rank:
            nn.init.zeros_(module.lora_b.weight)
        elif isinstance(module, Router):
            bound = module.weight.shape[1] ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, Prefix):
            nn.init.normal_(module.key)
            nn.init.normal_(module.value)
            nn.init.zeros_(module.gate)


class LanguageModel(nn.Module):
    """The LLM's parts, with Wings layers."""

    def __init__(self, config: WingsConfig):
        super().__init__()
        text = config.text_config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(
            WingsDecoderLayer(config, layer) for layer in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)


class WingsModel(WingsPreTrainedModel):
    """Vision tower, projector and LLM with wings; returns states without a head."""

    def __init__(self, config: WingsConfig):
        super().__init__(config)
        self.vision_tower = VisionTower(config.vision_config)
        self.projector = Projector(config)
        self.language_model = LanguageModel(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the projected features [n,P,D] of images [n,3,h,w]."""
        return self.projector(self.vision_tower(pixel_values))

    def embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Returns layer-0 features [B,T,D]: image features in image slots, else embeddings."""
        is_image = input_ids == self.config.image_token_id
        x0 = self.language_model.embed_tokens(input_ids.masked_fill(is_image, 0))
        count = int(is_image.sum())
        images = 0 if pixel_values is None else len(pixel_values)
        if count != images * self.config.image_seq_length:
            raise ValueError(
                f"input_ids hold {count} image slots, but {images} images in pixel_values take "
                f"{images * self.config.image_seq_length}"
            )
        if not images:
            return x0
        features = self.get_image_features(pixel_values).to(x0.dtype)
        return x0.masked_scatter(is_image[..., None], features.flatten(0, 1))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        key_classes: torch.FloatTensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_gates: bool = False,
        **kwargs,
    ) -> WingsOutput:
        """Returns states [B,T,D].

        Args:
            input_ids: i64[B,T]; every slot of an image is `config.image_token_id`.
            pixel_values: f32[n,3,h,w], the images in the order of their slots, row by row.
            attention_mask: [B,S], 0 where padding (left or right) stands; with a cache it covers
                the cached slots too.
            position_ids: i64[B,T]; by default counted from the attention mask.
            cache: keys and values of earlier slots (`past_key_values` is its older name).
            key_classes: f32[B,S,C]: the main attention's masses on these classes are returned.
        """
        cache = past_key_values if cache is None else cache
        if inputs_embeds is not None:
            raise ValueError("pass input_ids: without them the image slots are unknown")
        eager = self.config._attn_implementation == "eager"
        if output_attentions and not eager:
            raise ValueError('output_attentions needs attn_implementation="eager"')
        is_checkpointing = self.gradient_checkpointing and self.training
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = use_cache and not is_checkpointing and self.config.prompt_length is None
        if use_cache and cache is None:
            cache = DynamicCache()
        if not use_cache:
            cache = None

        x0 = self.embed(input_ids, pixel_values)
        slots = self._slots(input_ids, attention_mask, position_ids, cache, key_classes)
        x = x0
        states, attentions, masses, gates = [x], [], [], []
        for layer in self.language_model.layers:
            x, weights, mass, gate = layer(x, x0, slots, cache, eager)
            states.append(x)
            attentions.append(weights)
            masses.append(mass)
            gates.append(gate)
        x = self.language_model.norm(x)
        states[-1] = x
        return WingsOutput(
            last_hidden_state=x,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            attention_masses=None if key_classes is None else tuple(masses),
            gates=tuple(gates) if output_gates else None,
            **{CACHE: cache},
        )

    def _slots(self, input_ids, attention_mask, position_ids, cache, key_classes) -> Slots:
        """Returns positions, visibility and rope of the new slots; the cache gets the first two."""
        config, text = self.config, self.config.text_config
        rows, new = input_ids.shape
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones((rows, past + new))
        used = attention_mask.bool()[:, -new:]
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -new:]
        positions = position_ids.expand(rows, -1)
        if config.router and int(positions.max()) >= config.router_positions:
            raise ValueError(
                f"the router reads {config.router_positions} positions, "
                f"the conversation has {int(positions.max()) + 1}"
            )

        modality = torch.where(input_ids == config.image_token_id, IMAGE, TEXT)
        modality = modality.masked_fill(~used, PADDING)
        if config.prompt_length is None:
            visible_from = paper_visible_from(positions, modality)
        else:
            visible_from = release_visible_from(positions, modality, config.prompt_length)

        # Per attention: the new slots that become keys, and all keys' `visible_from`.
        everything = torch.arange(new, device=input_ids.device)
        keys_from, all_from, key_positions = {}, {}, positions
        for name, number in [("main", MAIN), *((name, LEARNERS[name]) for name in config.learners)]:
            fresh = visible_from[number]
            index = everything if name == "main" else (fresh < NEVER).any(0).nonzero()[:, 0]
            fresh = fresh.index_select(1, index)
            fresh_positions = positions.index_select(1, index)
            if cache is not None:
                layer = 3 * text.num_hidden_layers + number
                pair = (fresh[:, None, :, None], fresh_positions[:, None, :, None])
                fresh, fresh_positions = (x[:, 0, :, 0] for x in cache.update(*pair, layer))
            keys_from[name], all_from[name] = index, fresh
            if name == "main":
                key_positions = fresh_positions

        visible = {
            name: key_from[:, None, None, :] <= positions[:, None, :, None]
            for name, key_from in all_from.items()
        }
        has_keys = {name: mask[:, 0].any(-1) for name, mask in visible.items()}
        # A padded query has no key in the main attention; its result is never read.
        visible["main"] = visible["main"] | ~has_keys["main"][:, None, :, None]
        ungated = None
        if config.ungated_when_alone and config.learners:
            ungated = sum(has_keys[name].long() for name in config.learners) == 1

        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        table = rope_table(positions, width, _rope_parameters(text))
        learner_table = table
        if not config.learner_scaled_rope:
            learner_table = rope_table(positions, width, _rope_parameters(text), scaled=False)
        return Slots(
            query_positions=positions,
            positions=key_positions,
            visible=visible,
            has_keys=has_keys,
            keys_from=keys_from,
            rope=table,
            learner_rope=learner_table,
            ungated=ungated,
            classes=key_classes,
        )


def _rope_parameters(text) -> dict:
    """Returns rope's parameters from a configuration of transformers 4 or 5."""
    parameters = dict(getattr(text, "rope_parameters", None) or {})
    parameters.setdefault("rope_theta", getattr(text, "rope_theta", 10000.0))
    return parameters


class WingsForConditionalGeneration(WingsPreTrainedModel, GenerationMixin):
    """A Wings model with its language-modeling head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: WingsConfig):
        super().__init__(config)
        self.model = WingsModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the projected features [n,P,D] of images [n,3,h,w]."""
        return self.model.get_image_features(pixel_values)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: DynamicCache | None = None,
        past_key_values: DynamicCache | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> WingsOutput:
        """Returns logits, and the loss where `labels` i64[B,T] are given (-100: not learned).

        The other arguments are those of `WingsModel.forward`.
        """
        count = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        outputs.logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        if labels is not None:
            outputs.loss = self.loss_function(
                logits=outputs.logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=count,
            )
        return outputs

    def _supports_default_dynamic_cache(self) -> bool:
        """The forward pass makes its own cache: it has layers for the learners too."""
        return False

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, is_first_iteration=False, **kwargs
    ):
        """Sends images with the prompt only, or at every step where nothing is cached."""
        if self.config.prompt_length is not None:
            next_sequence_length = None  # the release's masks are not causal: no cache is exact
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        is_cached = kwargs.get("cache") is not None or kwargs.get("past_key_values") is not None
        if not is_cached:
            inputs["pixel_values"] = kwargs.get("pixel_values")
        return inputs
