"""The images of a record: paths, encoded files, base64, data URLs."""

from __future__ import annotations

import base64
import binascii
import pathlib
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from wings_jax.data import samples
from wings_jax.data.samples import BadSample

# How base64 of JPEG, PNG, GIF and WebP files begins.
_BASE64_IMAGE = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]*={0,2}\s*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def image_source(value: Any, directory: pathlib.Path) -> pathlib.Path | bytes:
    """Returns the path of an image, or its encoded file.

    Raises:
      BadSample: it is a URL, its base64 is damaged, or it is something else.
    """
    # {"url": ...} of chat messages; {"bytes": ..., "path": ...} of Hugging Face datasets.
    if isinstance(value, Mapping) and isinstance(value.get("url"), str):
        value = value["url"]
    elif isinstance(value, Mapping) and "bytes" in value:
        value = value["bytes"] or value.get("path")
        if isinstance(value, str) and value == value.strip() and _BASE64_IMAGE.fullmatch(value):
            return _decode_base64(value)

    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str) or not value:
        raise BadSample(samples.MALFORMED, f"image is {samples.shorten(value)}")

    # A text is a data URL, base64, a URL, or a path.
    if value.startswith("data:"):
        header, _, content = value.partition(",")
        if not header.endswith(";base64"):
            raise BadSample(samples.UNREADABLE_IMAGE, f"{samples.shorten(value)}: not base64")
        return _decode_base64(content)

    if _BASE64_IMAGE.fullmatch(value):
        return _decode_base64(value)

    if value.startswith("file://"):
        value = urllib.parse.unquote(urllib.parse.urlsplit(value).path)
    elif _URL.match(value):
        raise BadSample(samples.URL, f"{samples.shorten(value)}: download it and give its path")
    return directory / value


def _decode_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(samples.UNREADABLE_IMAGE, f"damaged base64: {error}") from error
