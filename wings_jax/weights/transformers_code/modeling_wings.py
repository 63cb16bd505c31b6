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

The layers are in `decoder_wings.py` and `layers_wings.py`, masks and the cache in `slots_wings.py`,
the vision tower in `vision_wings.py`.

Shapes: B rows, T new slots, S cached and new slots, D width, N heads, H head width, V vocabulary,
M learners, C classes of keys, n images, P slots of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_wings import WingsConfig
from .decoder_wings import Prefix, Router, WingsDecoderLayer, cached_keys_values
from .layers_wings import LoraLinear, LowRank, RMSNorm
from .packing_wings import PackedWeights
from .slots_wings import Slots, WingsCache, make_slots
from .vision_wings import Projector, VisionTower


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
    _is_stateful = True  # the cached keys of the learners cannot be cut to a length of slots

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
        count = int(is_image.sum())
        images = 0 if pixel_values is None else len(pixel_values)
        if count != images * self.config.image_seq_length:
            raise ValueError(
                f"input_ids hold {count} image slots, but {images} images in pixel_values take "
                f"{images * self.config.image_seq_length}"
            )
        if not images:
            return self.language_model.embed_tokens(input_ids)
        x0 = self.language_model.embed_tokens(input_ids.masked_fill(is_image, 0))
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
        if inputs_embeds is not None:
            raise ValueError("pass input_ids: without them the image slots are unknown")
        eager = self.config._attn_implementation == "eager"
        if output_attentions and not eager:
            raise ValueError('output_attentions needs attn_implementation="eager"')

        # Layer-0 features [B,T,D], and what every layer uses of the slots.
        cache = self._cache_to_use(past_key_values if cache is None else cache, use_cache)
        x0 = self.embed(input_ids, pixel_values)
        slots = self._make_slots(input_ids, attention_mask, position_ids, cache, key_classes, x0)

        keys_values = cached_keys_values(self.language_model.layers, x0, slots, cache)
        x = x0
        states, attentions, masses, gates = [x], [], [], []
        for layer, layer_keys in zip(self.language_model.layers, keys_values, strict=True):
            x, weights, mass, gate = layer(x, x0, slots, cache, layer_keys, eager)
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

    def _cache_to_use(self, cache, use_cache: bool | None) -> DynamicCache | None:
        """Returns the given cache or a new one; None where keys and values are not cached.

        They are not with gradient checkpointing, nor with the release's mask, which is not causal.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        is_checkpointing = self.gradient_checkpointing and self.training
        if not use_cache or is_checkpointing or self.config.prompt_length is not None:
            return None
        return WingsCache() if cache is None else cache

    def _make_slots(self, input_ids, attention_mask, position_ids, cache, key_classes, x0) -> Slots:
        """Returns what every layer uses of the slots, with the packed weights where they apply."""
        slots = make_slots(
            self.config, input_ids, attention_mask, position_ids, cache, key_classes, x0.dtype
        )
        slots.packed = self._packed_weights(x0, cache)
        if slots.packed is not None and self.config.router:
            slots.router_values = slots.packed.router_values(slots.positions)
        return slots

    def _packed_weights(self, x0, cache) -> PackedWeights | None:
        """Returns the learners' matrices for a step of one token without gradients, else None.

        They are joined once for a cache.
        """
        if cache is None or x0.shape[1] > 1 or torch.is_grad_enabled():
            return None
        packed = getattr(cache, "packed", None)
        if packed is None:
            layers = [layer for layer in self.language_model.layers if layer.active]
            packed = cache.packed = PackedWeights(layers)
        return packed if packed.is_usable else None


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

        Labels are token ids at their own slots, as `input_ids`; those of image slots, of padding
        and of a row's first token have no loss. The other arguments are those of
        `WingsModel.forward`.
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
                labels=self._learned(labels, input_ids, attention_mask),
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=count,
            )
        return outputs

    def _learned(self, labels, input_ids, attention_mask) -> torch.Tensor:
        """Returns labels with -100 where a slot is no text, or no slot stands before it."""
        is_learned = input_ids != self.config.image_token_id
        if attention_mask is not None:
            used = attention_mask.bool()
            is_learned = is_learned & used
            is_learned[:, 1:] &= used[:, :-1]
        return labels.masked_fill(~is_learned, -100)

    def _supports_default_dynamic_cache(self) -> bool:
        """The forward pass makes its own cache: it has layers for the learners too."""
        return False

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, is_first_iteration=False, **kwargs
    ):
        """Sends the images of the slots that are not cached yet."""
        if self.config.prompt_length is not None:
            next_sequence_length = None  # the release's masks are not causal: no cache is exact
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is not None:
            pixel_values = self._last_images(pixel_values, input_ids, inputs["input_ids"])
        inputs["pixel_values"] = pixel_values
        return inputs

    def _last_images(self, pixel_values, input_ids, new_ids) -> torch.Tensor | None:
        """Returns the images of the last slots `new_ids` [B,T] of rows `input_ids` [B,S]."""
        if new_ids.shape == input_ids.shape:
            return pixel_values
        counts, new = (
            ((ids == self.config.image_token_id).sum(1) // self.config.image_seq_length).tolist()
            for ids in (input_ids, new_ids)
        )
        if not any(new):
            return None
        rows = zip(pixel_values.split(counts), counts, new, strict=True)
        return torch.cat([images[count - last :] for images, count, last in rows])

    def _expand_inputs_for_generation(self, expand_size=1, input_ids=None, **kwargs):
        """Repeats the rows for beams and several answers, each with all of its images."""
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            is_image = input_ids == self.config.image_token_id
            counts = (is_image.sum(1) // self.config.image_seq_length).tolist()
            rows = pixel_values.split(counts)
            pixel_values = torch.cat([row for row in rows for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, input_ids=input_ids, **kwargs
        )
        return input_ids, {**kwargs, "pixel_values": pixel_values}
