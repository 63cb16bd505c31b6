"""What a Hugging Face config may ask for and the models here do not compute: refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from wings_jax.errors import UserError
from wings_jax.model import families
from wings_jax.model.config_fields import ConfigFields

Vector = tuple[float, ...]  # one value per color


# model_type of a multimodal model -> what to do with it in place of `--llm`.
MULTIMODAL = {
    "llava": "import the whole model with --llava",
    "llava_next": "images in several tiles (anyres) are not supported",
    "wings": "import the whole model with --transformers",
    "wings_qwen2": "import the whole model with --wings",
    "wings_llama": "import the whole model with --wings",
    "llava_qwen2": "import the whole model with --wings",
    "llava_llama": "import the whole model with --wings",
}


def find_family(config: Mapping[str, Any], file: str) -> families.Family:
    """Returns the family of an LLM's `config.json`.

    Raises:
      UserError: it is of another family; for a multimodal model the message names its flag.
    """
    name = config.get("model_type")
    if isinstance(name, str) and name in families.FAMILIES:
        return families.FAMILIES[name]

    if isinstance(name, str) and (name in MULTIMODAL or "vision_config" in config):
        advice = MULTIMODAL.get(name, "give the directory of its LLM alone")
        raise UserError(f"{file}: model_type {name!r} is a multimodal model, not an LLM: {advice}")

    known = ", ".join(families.FAMILIES)
    raise UserError(f"{file}: model_type {name!r} is not one of {known}")


def check_decoder_features(
    fields: ConfigFields, config: Mapping[str, Any], family: families.Family
) -> None:
    """Raises UserError naming an entry that the decoder here does not compute."""
    check_not_quantized(config, fields.file)

    # The feed-forward network is gated by SiLU, and rope rotates whole heads.
    fields.refuse("hidden_act", ["silu"])
    fields.refuse("partial_rotary_factor", [1])
    for name, value in family.required.items():
        if name == "sliding_window":
            _check_window(fields)
        else:
            fields.refuse(name, [value])

    # transformers 5 lists the kind of attention per layer.
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise fields.error("layer_types", "a list")
    others = [kind for kind in layer_types if kind != "full_attention"]
    if others:
        raise UserError(f"{fields.file}: layer_types {others[0]!r} is not supported")


def _check_window(fields: ConfigFields) -> None:
    """Raises UserError for a sliding window (Mistral 7B v0.1) that cuts the context."""
    if not fields.has("sliding_window"):
        return

    window = fields.size("sliding_window")
    positions = fields.size("max_position_embeddings", 2048)
    if window < positions:
        raise UserError(
            f"{fields.file}: sliding_window {window} is not supported, only null or at least "
            f"max_position_embeddings, {positions}: up to {window} tokens the model computes the "
            f"same without it, so set max_position_embeddings to {window}"
        )


def check_not_quantized(config: Mapping[str, Any], file: str) -> None:
    """Raises UserError naming the method if a `config.json` is that of a quantized model."""
    # `compression_config` is what older llm-compressor files have.
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        return

    method = "an unknown method"
    if isinstance(quantization, Mapping):
        method = str(quantization.get("quant_method") or method)
        if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
            method = "bitsandbytes"

    raise UserError(
        f"{file}: quantization_config: the model is quantized with {method[:40]!r}; import the "
        "model that it was made from"
    )


def is_clip_tower(model_type: str, file: str) -> bool:
    """Returns whether a tower is a CLIP, else it is a SigLIP.

    Raises:
      UserError: it is neither; a SigLIP2 of any resolution (NaFlex) has its own message.
    """
    if model_type in ("siglip2_vision_model", "siglip2"):
        raise UserError(
            f"{file}: model_type {model_type!r} reads images of any shape (NaFlex), which is not "
            "supported; give a SigLIP2 of fixed resolution, such as siglip2-so400m-patch14-384"
        )
    if model_type not in ("siglip_vision_model", "clip_vision_model"):
        raise UserError(f"{file}: model_type {model_type!r} is not a SigLIP or CLIP vision model")
    return model_type == "clip_vision_model"


# How images are resized -> PIL's number.
RESAMPLE = {"bicubic": 3, "bilinear": 2}


def resample_name(steps: ConfigFields) -> str:
    """Returns how a processor resizes, bicubic by default."""
    number = steps.integer("resample", RESAMPLE["bicubic"])
    return next(name for name, known in RESAMPLE.items() if known == number)


def check_image_steps(steps: ConfigFields, image_size: int) -> None:
    """Raises UserError if a processor does more, or less, than a resize to the tower's side."""
    # Images are padded to squares and resized to the tower's side.
    steps.refuse("do_resize", [True])
    steps.refuse("resample", list(RESAMPLE.values()))
    for name in ("size", "crop_size"):
        if not steps.has(name):
            continue
        size = steps.value(name)
        sides = list(size.values()) if isinstance(size, Mapping) else [size]
        # With the crop turned off its size has no effect.
        if name == "crop_size" and steps.value("do_center_crop", True) is False:
            continue

        if not sides or any(side != image_size for side in sides):
            raise UserError(
                f"{steps.file}: {name} {size!r} is not the tower's image_size, {image_size}"
            )


def image_normalization(
    steps: ConfigFields, default_mean: Vector, default_std: Vector
) -> tuple[Vector, Vector]:
    """Returns the mean and std that a processor subtracts and divides by, of pixels from 0 to 1.

    A processor that does not rescale, rescales by another factor, or does not normalize is
    expressed by other values: (f p - m) / s = (p / 255 - m / (255 f)) / (s / (255 f)).
    """
    mean = steps.numbers("image_mean", 3, default_mean)
    std = steps.numbers("image_std", 3, default_std)
    if any(value <= 0 for value in std):
        raise steps.error("image_std", "a list of 3 numbers above 0")

    # Without normalization: subtract 0 and divide by 1.
    if not steps.flag("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    factor = steps.number("rescale_factor", 1 / 255) if steps.flag("do_rescale", True) else 1.0
    if math.isclose(factor, 1 / 255, rel_tol=1e-6):
        return mean, std
    scale = 255 * factor
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)
