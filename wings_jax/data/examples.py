"""One sample to one example: the slots and images that a row is assembled from, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from wings_jax.data import (
    chat_template,
    conversation,
    images,
    samples,
    settings,
    tokenization,
    turns,
)
from wings_jax.errors import UserError
from wings_jax.model import layout


class VisionFormat(Protocol):
    """What the data needs of a vision tower; `model.presets.VisionArch` has it."""

    @property
    def image_size(self) -> int:
        """Side of the square that the tower reads, in pixels."""
        ...

    @property
    def mean(self) -> Sequence[float]:
        """The image processor's mean of each channel, in [0, 1]: the color of the padding."""
        ...

    @property
    def resample(self) -> str:
        """How images are resized: bicubic or bilinear."""
        ...

    @property
    def num_patches(self) -> int:
        """Slots of one image (P)."""
        ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How samples become examples; `make_recipe` builds it from a config.

    tokenizer       text to ids
    template        how conversations are written, with the system text
    vision          size, padding color and slots of an image
    length          most slots of an example
    images_per_row  most images of a sample (I)
    prompt_length   None; for the release's semantics, `presets.Semantics.prompt_length`
    """

    tokenizer: tokenization.TextTokenizer
    template: conversation.Template
    vision: VisionFormat
    length: int
    images_per_row: int
    prompt_length: int | None = None


def make_recipe(
    data: settings.DataConfig,
    tokenizer: tokenization.AnyTokenizer,
    vision: VisionFormat,
    *,
    prompt_length: int | None = None,
) -> Recipe:
    """Returns how the samples of a config become examples for a model.

    Raises:
      UserError: the template is unknown or does not fit the tokenizer, or a number is out of
        range.
    """
    # Errors of the settings come before those of the template.
    for name, least in (("sequence_length", 1), ("images_per_row", 0)):
        if getattr(data, name) < least:
            raise UserError(f"data: {name} must be at least {least}, not {getattr(data, name)}")

    if min(vision.image_size, vision.num_patches) < 1 or len(vision.mean) != 3:
        raise UserError(
            "data: an image needs a size, slots and 3 mean values, not "
            f"{vision.image_size}, {vision.num_patches} and {vision.mean}"
        )

    # The template's control tokens must be tokens of the tokenizer.
    template = chat_template.template_from_settings(data, tokenizer)
    text_tokenizer = tokenization.as_text_tokenizer(tokenizer)
    text_tokenizer.controls(template.controls)

    return Recipe(
        text_tokenizer,
        template,
        vision,
        length=data.sequence_length,
        images_per_row=data.images_per_row,
        prompt_length=prompt_length,
    )


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation of n slots with its k images.

    id        the sample's
    tokens    i32[n]  0 in image slots
    modality  i32[n]  TEXT or IMAGE
    targets   i32[n]  the next token where it is to be learned, else IGNORE
    images    k of u8[h,w,3]
    """

    id: str
    tokens: np.ndarray
    modality: np.ndarray
    targets: np.ndarray
    images: Sequence[np.ndarray]


def encode_sample(sample: samples.Sample, recipe: Recipe) -> conversation.Encoded:
    """Returns the sample's ids and labels, not truncated.

    Raises:
      BadSample: its turns or their markers are wrong, or it has too many images.
    """
    conversations = turns.normalize_sample(sample)
    if len(sample.images) > recipe.images_per_row:
        detail = f"{len(sample.images)} images, at most {recipe.images_per_row} go into a row"
        raise samples.BadSample(samples.TOO_MANY_IMAGES, detail)
    return conversation.encode(conversations, recipe.tokenizer, recipe.template)


def truncate(encoded: conversation.Encoded, recipe: Recipe) -> conversation.Expanded:
    """Returns the slots of an encoded sample, cut to the recipe's length.

    Raises:
      BadSample: no target is left.
    """
    slots = conversation.expand(encoded, recipe.vision.num_patches, length=recipe.length)

    if (slots.targets == layout.IGNORE).all():
        detail = f"no answer within the first {recipe.length} slots"
        raise samples.BadSample(samples.CUT_OFF, detail)
    return slots


def make_example(sample: samples.Sample, recipe: Recipe) -> Example:
    """Returns the example of a sample, its images read and resized.

    Raises:
      BadSample: as `encode_sample` and `truncate`, or an image is missing or unreadable.
    """
    slots = truncate(encode_sample(sample, recipe), recipe)

    # Truncation may have removed the last images.
    squares = [load_square(image, recipe.vision) for image in sample.images[: slots.images]]
    return Example(sample.id, slots.tokens, slots.modality, slots.targets, squares)


def load_square(source: images.ImageSource, vision: VisionFormat) -> np.ndarray:
    """Returns u8[h,w,3], an image as the vision tower reads it.

    Raises:
      BadSample: as `images.load_image`.
    """
    image = images.load_image(source)
    return images.prepare_image(image, vision.image_size, vision.mean, resample=vision.resample)
