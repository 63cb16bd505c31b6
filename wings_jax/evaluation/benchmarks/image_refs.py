"""Images of benchmark items: files, bytes, base64, lists of base64, or another row's image."""

from __future__ import annotations

import ast
import base64
import binascii
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks.record import ImageRef
from wings_jax.evaluation.benchmarks.row_files import SHORT_TEXT, Blob, Row
from wings_jax.weights import text_files

_FILE_NAME = re.compile(r"\.(jpe?g|png|webp|bmp|gif|tiff?)$", re.IGNORECASE)
_DATA_URL = re.compile(r"^data:image/[\w.+-]+;base64,")

# Index of a row -> its image column, for rows that name another row.
ImageIndex = Mapping[str, Any]


def find_images(
    value: Any, row: Row, directories: Sequence[str], index: ImageIndex
) -> tuple[ImageRef, ...]:
    """Returns the images of one column of a row; nothing is read yet, except lists of base64.

    `value` is a path, a `Blob`, base64, a list of these (also as a string), or the index of the
    row that has the image. Paths are looked for in `directories`, relative to the file's.
    """
    if value is None or value == "":
        return ()

    # A value that is not text.
    if isinstance(value, Blob):
        return _expand_blob(value, row)
    if isinstance(value, Mapping):  # Hugging Face's struct in JSON
        return find_images(value.get("bytes") or value.get("path"), row, directories, index)
    if isinstance(value, bytes):
        return (ImageRef(row.place, lambda: value),)
    if isinstance(value, list | tuple):
        found = [find_images(entry, row, directories, index) for entry in value]
        return tuple(image for images in found for image in images)

    # Text: a short one is a path or an index.
    text = str(value)
    if text.startswith("["):
        return find_images(_parse_list(text, row), row, directories, index)
    if _FILE_NAME.search(text) and len(text) < 1000:
        return (_file_ref(text, row, directories),)
    # One step only: the row that is named must have the image itself.
    if len(text) <= SHORT_TEXT and text in index:
        return find_images(index[text], row, directories, {})
    if len(text) <= SHORT_TEXT and directories:  # SEED-Bench's files have no suffix
        return (_file_ref(text, row, directories),)
    if len(text) <= SHORT_TEXT:
        raise UserError(f"{row.place}: the image is {text!r}: neither a file nor another row")
    return (ImageRef(row.place, lambda: decode_base64(text, row.place)),)


def _expand_blob(blob: Blob, row: Row) -> tuple[ImageRef, ...]:
    """Returns the images of a column that is still in its file."""
    name = f"{row.place} ({blob.name})" if blob.name else row.place

    if blob.count:
        return tuple(
            ImageRef(f"{name} image {number + 1}", _read_entry(blob, row, number))
            for number in range(blob.count)
        )
    return (ImageRef(name, lambda: as_bytes(blob.read(), name)),)


def _read_entry(blob: Blob, row: Row, number: int) -> Callable[[], bytes]:
    return lambda: decode_base64(_parse_list(blob.read(), row)[number], row.place)


def _parse_list(text: str, row: Row) -> list[str]:
    try:
        parsed = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{row.place}: the image is not a list of base64") from error
    return [str(entry) for entry in parsed]


def missing_image(row: Row) -> ImageRef:
    """Returns an image that cannot be read: the row has none."""

    def read() -> bytes:
        raise UserError(f"{row.place}: no image")

    return ImageRef(row.place, read)


def as_bytes(value: Any, name: str) -> bytes:
    """Returns the bytes of an image column. Raises UserError naming the image."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return decode_base64(value, name)

    raise UserError(f"{name}: the image has no bytes")


def decode_base64(text: str, name: str) -> bytes:
    """Returns the bytes that base64 stands for. Raises UserError naming the image."""
    try:
        return base64.b64decode(_DATA_URL.sub("", text.strip()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{name}: the image is not base64: {error}") from error


def _file_ref(text: str, row: Row, directories: Sequence[str]) -> ImageRef:
    """Returns an image file: the first that exists, relative to the file's directory."""
    # A missing file is an error only when the image is read.
    base = row.path.parent
    candidates = [base / directory / text for directory in (*directories, ".")]
    found = next((path for path in candidates if path.is_file()), candidates[0])

    def read() -> bytes:
        if not found.is_file():
            places = ", ".join(dict.fromkeys(str(path.parent) for path in candidates))
            raise UserError(f"{row.place}: no image {pathlib.Path(text).name} in {places}")

        text_files.check_not_pointer(found)
        try:
            return found.read_bytes()
        except OSError as error:
            raise UserError(f"{found}: cannot be read: {error.strerror}") from error

    return ImageRef(str(found), read)
