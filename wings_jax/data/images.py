"""Images from files to the square of bytes that the vision tower reads.

The steps are those of LLaVA's "pad" mode followed by Hugging Face's SigLIP or CLIP processor:
RGB, padding to a square with the processor's mean color, resize. Division by 255 and
normalization happen on the device, so that pixels are transferred as bytes.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from wings_jax import files
from wings_jax.data import samples

MAX_SQUARE_PIXELS = 1 << 24  # of a padded square in memory; larger ones are resized in strips
STRIP_PIXELS = 1 << 22  # of one strip
# Name of a filter -> PIL's; the pixels of the output that one pixel contributes to, per side.
_FILTERS = {"bicubic": (Image.Resampling.BICUBIC, 2), "bilinear": (Image.Resampling.BILINEAR, 1)}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # how a pointer file begins

ImageSource = str | os.PathLike | bytes | np.ndarray | Image.Image

# What PIL's decoders raise on broken files, beyond OSError.
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def load_image(source: ImageSource) -> Image.Image:
    """Returns the whole image in RGB, turned upright by its EXIF orientation.

    Gray images of more than 8 bits are scaled to 8 bits as `to_8_bit` describes.

    Args:
      source: a path, an encoded file's bytes, an array [h,w] or [h,w,3], or a PIL image.

    Raises:
      BadSample: the file is missing, cannot be read or is not an image; the message names it.
    """
    return to_rgb(open_image(source))


def open_image(source: ImageSource) -> Image.Image:
    """Returns the decoded image in the mode of its file, turned upright by its EXIF orientation.

    Raises:
      BadSample: as `load_image`.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _upright(source, "PIL image")
    if not isinstance(source, (str, os.PathLike, bytes)):
        detail = f"{samples.shorten(source)} is not a path, bytes, an array or a PIL image"
        raise samples.BadSample(samples.UNREADABLE_IMAGE, detail)

    # The file is read whole, so that decoders cannot keep it open.
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    content = image_bytes(source)
    if not content or content.startswith(LFS_POINTER):
        reason = "a git-lfs pointer, run git lfs pull" if content else "an empty file"
        raise samples.BadSample(samples.UNREADABLE_IMAGE, f"{name}: {reason}")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _upright(image, name)
    except samples.BadSample:  # of `_upright`; a ValueError too
        raise
    except Image.UnidentifiedImageError as error:
        raise samples.BadSample(samples.UNREADABLE_IMAGE, f"{name}: not an image") from error
    except _DECODING_ERRORS as error:
        raise _unreadable(name, error) from error


def image_bytes(source: str | os.PathLike | bytes) -> bytes:
    """Returns the image's file, unchanged.

    Raises:
      BadSample: the file is missing or cannot be read; the message names it.
    """
    if isinstance(source, bytes):
        return source

    try:
        return files.as_path(source).read_bytes()
    except FileNotFoundError as error:
        raise samples.BadSample(samples.MISSING_IMAGE, str(source)) from error
    except (OSError, ValueError) as error:  # ValueError: a null character or a lone surrogate
        raise _unreadable(str(source), error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image in RGB; see `to_8_bit` for modes of more than 8 bits.

    Raises:
      BadSample: the pixels cannot be converted.
    """
    try:
        # PIL would cut values above 255 off instead of scaling them.
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(to_8_bit(np.asarray(image)))
        return image.convert("RGB")
    except _DECODING_ERRORS as error:
        raise _unreadable(f"image of mode {image.mode}", error) from error


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Returns pixel values scaled to u8, black to 0 and white to 255.

    16-bit values are scaled by their range 0..65535. Wider integers and floats have no white of
    their own, so it is the end of the smallest of these ranges that holds all values: 0..1
    (floats only), 0..255, 0..65535, and else from the least to the greatest value.

    >>> to_8_bit(np.array([0, 257, 65535], np.uint16)).tolist()
    [0, 1, 255]
    >>> to_8_bit(np.array([0.0, 0.5, 1.0])).tolist()
    [0, 128, 255]
    >>> to_8_bit(np.array([-100.0, -50.0, 100.0])).tolist()
    [0, 64, 255]

    Raises:
      ValueError: a value is not finite.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)

    # Black is 0 and white 255; rounding is to the nearest value.
    floats = values.astype(np.float64)
    if not np.isfinite(floats).all():
        raise ValueError("pixel values are not finite")

    low, high = _value_range(values)
    scaled = (floats - low) * (255 / (high - low)) if high > low else floats - low
    return np.floor(scaled + 0.5).clip(0, 255).astype(np.uint8)


def _value_range(values: np.ndarray) -> tuple[float, float]:
    """Returns the values of black and white."""
    if values.dtype.itemsize == 2 and values.dtype.kind == "u":
        return 0.0, 65535.0

    # Wider values that fit a narrower range are of that range.
    least, most = float(values.min(initial=0)), float(values.max(initial=0))
    limits = (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    for limit in limits:
        if least >= 0 and most <= limit:
            return 0.0, limit

    # No range from 0 holds them all.
    return float(values.min()), float(values.max())


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Returns the RGB image centered on a square of the color int(255 * mean)."""
    width, height = image.size
    if width == height:
        return image

    side = max(width, height)
    square = Image.new("RGB", (side, side), _padding_color(mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def prepare_image(
    image: Image.Image, size: int, mean: Sequence[float], *, resample: str = "bicubic"
) -> np.ndarray:
    """Returns u8[size,size,3]: padded to a square with the mean color, resized.

    `resample` is bicubic or bilinear.
    """
    side = max(image.size)
    # The square of a long and narrow image may not fit in memory.
    if side * side > MAX_SQUARE_PIXELS:
        square = _resize_in_strips(image, size, mean, resample)
    else:
        square = pad_to_square(image, mean)
        if side != size:
            square = square.resize((size, size), _FILTERS[resample][0])
    return np.asarray(square, np.uint8)


def _resize_in_strips(
    image: Image.Image, size: int, mean: Sequence[float], resample: str
) -> Image.Image:
    """Returns the resized square of `pad_to_square`, without that square in memory.

    PIL resizes the rows first and then the columns. Rows do not depend on each other, so they are
    padded and resized in strips, and only the part of each row that the image reaches: padding
    has one color before and after.
    """
    pil_filter, support = _FILTERS[resample]
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2

    # Output columns that any pixel of the image contributes to, and the pixels that they need.
    scale = side / size
    reach = support * scale
    first_column = max(0, math.floor((left - reach) / scale) - 1)
    last_column = min(size, math.ceil((left + width + reach) / scale) + 1)
    start = max(0, math.floor(first_column * scale - reach))
    stop = min(side, math.ceil(last_column * scale + reach))
    box_end = side if last_column == size else last_column * scale

    # Horizontally resized rows; those of padding have the padding's color.
    columns = Image.new("RGB", (size, side), _padding_color(mean))
    rows = max(1, STRIP_PIXELS // (stop - start))
    for first in range(0, height, rows):
        count = min(rows, height - first)
        strip = Image.new("RGB", (stop - start, count), _padding_color(mean))
        strip.paste(image.crop((0, first, width, first + count)), (left - start, 0))
        resized = strip.resize(
            (last_column - first_column, count),
            pil_filter,
            box=(first_column * scale - start, 0, box_end - start, count),
        )
        columns.paste(resized, (first_column, top + first))
    return columns.resize((size, size), pil_filter)


def _padding_color(mean: Sequence[float]) -> tuple[int, ...]:
    return tuple(int(255 * part) for part in mean)


def _from_array(values: np.ndarray) -> Image.Image:
    """Returns the image of an array; more than 8 bits are kept only for gray, as PIL has it."""
    name = f"array {values.dtype}{list(values.shape)}"
    is_gray = values.ndim == 2
    is_color = values.ndim == 3 and values.shape[2] in (3, 4)
    if not (is_gray or is_color) or not values.size:
        raise samples.BadSample(samples.UNREADABLE_IMAGE, f"{name}: expected [h,w] or [h,w,3]")

    # A gray image of more than 8 bits keeps its values until `to_rgb` scales them.
    try:
        return Image.fromarray(
            values if is_gray and values.dtype.itemsize > 1 else to_8_bit(values)
        )
    except _DECODING_ERRORS as error:
        raise _unreadable(name, error) from error


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Returns a decoded copy, turned by its EXIF orientation."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODING_ERRORS as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: BaseException) -> samples.BadSample:
    """Returns the reason with the first line of an error."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return samples.BadSample(samples.UNREADABLE_IMAGE, f"{name}: {text.splitlines()[0]}")
