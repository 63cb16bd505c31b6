"""One sample to one example: what a row is put together from, still on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from wings_jax.data import conversation, images, samples, tokenization
from wings_jax.model import layout


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How samples become examples.

    length          most slots of an example
    image_slots     slots of one image (P)
    images_per_row  most images of a sample (I)
    image_size      side of the square in pixels
    image_mean      the processor's mean, each in [0, 1]: the colour of the padding
    prompt_length   None; for the release's semantics, `presets.Semantics.prompt_length`
    """

    tokenizer: tokenization.TextTokenizer
    template: conversation.Template
    length: int
    image_slots: int
    images_per_row: int
    image_size: int
    image_mean: tuple[float, ...]
    prompt_length: int | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation of n slots with its k pictures.

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
    """Returns the sample's ids and labels, uncut.

    Raises:
      BadSample: its turns or their markers are wrong, or it has too many images.
    """
    turns = conversation.normalize_sample(sample)
    if len(sample.images) > recipe.images_per_row:
        detail = f"{len(sample.images)} images, at most {recipe.images_per_row} go into a row"
        raise samples.BadSample(samples.TOO_MANY_IMAGES, detail)
    return conversation.encode(turns, recipe.tokenizer, recipe.template)


def truncate(encoded: conversation.Encoded, recipe: Recipe) -> conversation.Expanded:
    """Returns the slots of an encoded sample, cut to the recipe's length.

    Raises:
      BadSample: nothing that is to be learned is left.
    """
    expanded = conversation.expand(encoded, recipe.image_slots, length=recipe.length)
    if (expanded.targets == layout.IGNORE).all():
        detail = f"no answer within the first {recipe.length} slots"
        raise samples.BadSample(samples.CUT_OFF, detail)
    return expanded


def make_example(sample: samples.Sample, recipe: Recipe) -> Example:
    """Returns the example of a sample, its pictures read and resized.

    Raises:
      BadSample: as `encode` and `fit`, or a picture is missing or unreadable.
    """
    slots = truncate(encode_sample(sample, recipe), recipe)
    pictures = [
        images.prepare_image(images.load_image(picture), recipe.image_size, recipe.image_mean)
        for picture in sample.images[: slots.images]
    ]
    return Example(sample.id, slots.tokens, slots.modality, slots.targets, pictures)
