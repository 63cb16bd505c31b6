"""Architectures of Hugging Face configs: what `config.json` and a processor's file describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wings_jax.errors import UserError
from wings_jax.model import hf_checks, presets
from wings_jax.model.config_fields import ConfigFields

# Deeper models do not exist; a damaged config must not make millions of keys.
_MAX_LAYERS = 10_000


def decoder_from_hf(config: Mapping[str, Any], *, file: str = "config.json") -> presets.DecoderArch:
    """Returns the architecture that the `config.json` of an LLM of `families.FAMILIES` describes.

    Reads both the layout of transformers 4 (`rope_theta`, `rope_scaling`) and that of 5
    (`rope_parameters`).

    Raises:
      UserError: another family, a value of the wrong type, or a feature that is not supported.
        The message begins with `file`.
    """
    ConfigFields(config, file)  # refuses what is not a JSON object
    family = hf_checks.find_family(config, file)
    fields = ConfigFields({**family.defaults, **_without_nulls(config)}, file)
    hf_checks.check_decoder_features(fields, config, family)

    width = fields.size("hidden_size")
    heads = fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", heads)

    # Without a head_dim of its own, a head has an equal part of the width.
    if not fields.has("head_dim") and width % heads:
        raise UserError(f"{file}: hidden_size {width} is not a multiple of the {heads} heads")
    if heads % kv_heads:
        raise UserError(f"{file}: num_attention_heads {heads} is not a multiple of {kv_heads}")

    head_dim = fields.size("head_dim", max(width // heads, 1))
    # Rope rotates pairs of features.
    if head_dim % 2:
        raise UserError(f"{file}: head_dim {head_dim} is odd, which rope does not allow")

    # transformers 5 has all of rope in one entry.
    rope_name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = fields.object(rope_name)
    theta = rope if rope.has("rope_theta") else fields

    layers = fields.size("num_hidden_layers", maximum=_MAX_LAYERS)
    return presets.DecoderArch(
        vocab_size=fields.size("vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=fields.size("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta.number("rope_theta", 1e4),
        rope_scaling=_scaling_from_hf(rope),
        max_positions=fields.size("max_position_embeddings", 2048),
        qkv_bias=family.qkv_bias,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qk_norm=family.qk_norm,
        no_rope_layers=_no_rope_layers(fields, layers) if family.skips_rope else (),
    )


def _without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that have a value: null is the family's default."""
    return {name: value for name, value in config.items() if value is not None}


def _no_rope_layers(fields: ConfigFields, layers: int) -> tuple[int, ...]:
    """Returns the layers without rope: a list of 1 (rope) and 0, or every n-th layer."""
    if not fields.has("no_rope_layers"):
        interval = fields.size("no_rope_layer_interval")
        return tuple(range(interval - 1, layers, interval))

    switches = fields.value("no_rope_layers")
    is_list = isinstance(switches, list) and len(switches) == layers
    if not is_list or any(switch not in (0, 1) for switch in switches):
        raise fields.error("no_rope_layers", f"a list of {layers} numbers, each 0 or 1")
    return tuple(layer for layer, switch in enumerate(switches) if not switch)


def _scaling_from_hf(rope: ConfigFields) -> presets.RopeScaling | None:
    """Returns the rope scaling of `rope_parameters` or `rope_scaling`; None for none."""
    kind = rope.text("rope_type", "") or rope.text("type", "default")
    if kind == "default":
        return None
    if kind == "linear":
        return presets.RopeScaling("linear", rope.number("factor"))
    if kind != "llama3":
        raise UserError(f"{rope.file}: rope type {kind!r} is not one of default, linear, llama3")

    # Equal factors would divide by zero.
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise UserError(f"{rope.file}: low_freq_factor {low} is not below high_freq_factor {high}")
    original = rope.size("original_max_position_embeddings")

    return presets.RopeScaling("llama3", rope.number("factor"), low, high, original)


def vision_from_hf(
    config: Mapping[str, Any],
    processor: Mapping[str, Any] | None = None,
    *,
    feature_layer: int | None = None,
    file: str = "config.json",
) -> presets.VisionArch:
    """Returns the tower that a SigLIP or CLIP `config.json` (vision or full model) describes.

    `processor` is the content of the `preprocessor_config.json` beside it; its mean and std
    override the family's. Without `feature_layer`, the config's `vision_feature_layer` or -2 is
    used.

    Raises:
      UserError: another family, a value of the wrong type, or a feature that is not supported.
    """
    whole = ConfigFields(config, file)
    fields = whole.object("vision_config") if whole.has("vision_config") else whole
    is_clip = hf_checks.is_clip_tower(fields.value("model_type", "missing"), file)
    hf_checks.check_not_quantized(config, file)

    # The tower here does not compute other values of these.
    fields.refuse("num_channels", [3])
    fields.refuse("hidden_act", ["gelu_pytorch_tanh", "quick_gelu", "gelu"])
    whole.refuse("vision_feature_select_strategy", ["default", "full"])

    layers = fields.size("num_hidden_layers", 12, maximum=_MAX_LAYERS)
    if feature_layer is None:
        feature_layer = _feature_layer(whole, fields, layers)

    width, heads = fields.size("hidden_size", 768), fields.size("num_attention_heads", 12)
    if width % heads:
        raise UserError(f"{file}: hidden_size {width} is not a multiple of the {heads} heads")

    # The image, and how its pixels are normalized.
    image_size = fields.size("image_size", 224, maximum=100_000)
    patch_size = fields.size("patch_size", 32 if is_clip else 16, maximum=image_size)
    steps = ConfigFields(processor or {}, "preprocessor_config.json")
    hf_checks.check_image_steps(steps, image_size)

    # The processor's own values, or else those that the family was trained with.
    default_mean = presets.CLIP_MEAN if is_clip else presets.HALF
    default_std = presets.CLIP_STD if is_clip else presets.HALF
    mean, std = hf_checks.image_normalization(steps, default_mean, default_std)

    return presets.VisionArch(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        ffn_size=fields.size("intermediate_size", 3072),
        image_size=image_size,
        patch_size=patch_size,
        activation=fields.text("hidden_act", "quick_gelu" if is_clip else "gelu_pytorch_tanh"),
        norm_eps=fields.number("layer_norm_eps", 1e-5 if is_clip else 1e-6),
        class_token=is_clip,
        pre_norm=is_clip,
        post_norm=True,
        patch_bias=not is_clip,
        mean=mean,
        std=std,
        feature_layer=feature_layer,
        dropped_tokens=_dropped_tokens(whole, is_clip=is_clip),
        resample=hf_checks.resample_name(steps),
    )


def _dropped_tokens(whole: ConfigFields, *, is_clip: bool) -> int | None:
    """Returns what llava-hf's `vision_feature_select_strategy` drops; None for the class token."""
    strategy = whole.text("vision_feature_select_strategy", "")
    # What a tower does by itself: CLIP drops its class token, SigLIP has none.
    if not strategy or strategy == ("default" if is_clip else "full"):
        return None
    return 1 if strategy == "default" else 0


def _feature_layer(whole: ConfigFields, tower: ConfigFields, layers: int) -> int:
    """Returns the hidden state that a multimodal config, or else the tower's, selects."""
    owner = whole if whole.has("vision_feature_layer") else tower
    layer = owner.integer("vision_feature_layer", -2)
    # There are layers + 1 hidden states: the embeddings, and the output of each layer.
    if not -(layers + 1) <= layer <= layers:
        raise UserError(f"{owner.file}: vision_feature_layer {layer} of {layers} layers")
    return layer
