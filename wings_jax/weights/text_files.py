"""Text and JSON files of model directories, read with one clear line for whatever is wrong."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from wings_jax.weights.tensors import WeightsError

MAX_TEXT_BYTES = 256 * 2**20
_POINTER_START = b"version https://git-lfs.github.com/spec/"


def check_not_pointer(path: str | os.PathLike) -> None:
    """Raises WeightsError if a file is a git-lfs pointer: its real content was never downloaded."""
    # Only as many bytes as the pointer's first line begins with.
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER_START))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    if start == _POINTER_START:
        raise WeightsError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in "
            f"{pathlib.Path(path).parent}, or download the file"
        )


def read_text(path: str | os.PathLike) -> str:
    """Returns the content of a UTF-8 file, without a byte order mark.

    Raises:
      WeightsError: the file cannot be read, is not UTF-8, too large, or a git-lfs pointer.
    """
    # A byte order mark is dropped; anything else that is not UTF-8 would be guessing.
    check_not_pointer(path)
    content = pathlib.Path(path).read_bytes()
    if len(content) > MAX_TEXT_BYTES:
        raise WeightsError(f"{path} has {len(content):,} bytes: too large for a text file")

    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WeightsError(
            f"{path} is not UTF-8 text (byte {content[error.start]:#04x} at position "
            f"{error.start}): convert it to UTF-8"
        ) from error


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the JSON object of a file.

    Raises:
      WeightsError: the file cannot be read, or does not hold one JSON object.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(f"{path} is not JSON: {reason}") from error

    if not isinstance(content, dict):
        raise WeightsError(f"{path} does not hold a JSON object")
    return content
