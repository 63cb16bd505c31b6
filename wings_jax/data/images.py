"""Images from files to the square of bytes that the vision tower reads.

The steps are those of LLaVA's "pad" mode followed by Hugging Face's SigLIP or CLIP processor:
RGB, padding to a square with the processor's mean color, bicubic resize. Division by 255 and
normalization happen on the device, so that pixels are transferred as bytes.
"""

from __future__ import annotations

import io
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from wings_jax.data import samples

# What PIL's decoders raise on broken files, beyond OSError.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def load_image(source: str | os.PathLike | bytes | np.ndarray) -> Image.Image:
    """Returns the whole image in RGB, turned upright by its EXIF orientation.

    Args:
      source: a path, an encoded file's bytes, or u8[h,w,3].

    Raises:
      BadSample: the file is missing, cannot be read or is not an image; the message names it.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source).convert("RGB")

    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    content = image_bytes(source)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except _DECODING_ERRORS as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise samples.BadSample(samples.UNREADABLE_IMAGE, f"{name}: {reason}") from error


def image_bytes(source: str | os.PathLike | bytes) -> bytes:
    """Returns the image's file, unchanged.

    Raises:
      BadSample: the file is missing or cannot be read; the message names it.
    """
    if isinstance(source, bytes):
        return source

    try:
        return pathlib.Path(source).read_bytes()
    except FileNotFoundError as error:
        raise samples.BadSample(samples.MISSING_IMAGE, str(source)) from error
    except OSError as error:
        detail = f"{source}: {error.strerror}"
        raise samples.BadSample(samples.UNREADABLE_IMAGE, detail) from error


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Returns the RGB image centered on a square of the color int(255 * mean)."""
    width, height = image.size
    if width == height:
        return image

    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * part) for part in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def prepare_image(image: Image.Image, size: int, mean: Sequence[float]) -> np.ndarray:
    """Returns u8[size,size,3]: padded to a square with the mean color, resized bicubically."""
    square = pad_to_square(image, mean)
    if square.size != (size, size):
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square, np.uint8)
