"""Random access to the samples of WebDataset shards: tar files whose members share a key.

    shard-000000.tar:   a/000001.jpg  a/000001.json   a/000002.jpg  a/000002.txt   ...

Members with the same name up to the first dot of the file name are one sample. Its record is that
of the `.json` member, if there is one; a `.txt`, `.text` or `.caption` member is its caption, and
image members (`.jpg`, `.0.jpg`, ...) are its images, in the order of the tar file. Shards are
read once to find where the members are; 24 bytes per member stay in memory.
"""

from __future__ import annotations

import array
import json
import os
import pathlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from wings_jax.data import records, samples
from wings_jax.errors import UserError

JSON, TEXT, IMAGE = range(3)
# Last suffix of a member -> what it is; members with another suffix are not read.
MEMBERS = {
    ".json": JSON,
    ".txt": TEXT,
    ".text": TEXT,
    ".caption": TEXT,
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"), IMAGE),
}


class TarSource:
    """Samples of tar shards, in the order of the shards and of their members.

    Args:
      path: the file or directory, named in messages.
      shards: the tar files, not compressed.
      images: directory that image paths in `.json` members are relative to.

    Raises:
      UserError: a shard cannot be read.
    """

    def __init__(self, path: pathlib.Path, shards: Sequence[pathlib.Path], images: pathlib.Path):
        self._path, self._shards, self._images = path, tuple(shards), images
        stamps = [(shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
        self.fingerprint = f"{path.absolute()} {stamps}"

        # Per member: shard, kind, first byte, bytes. Per sample: its first member.
        members, starts = array.array("q"), array.array("q")
        for number, shard in enumerate(self._shards):
            key = None
            for member in _members(path, shard):
                # Adjacent members with the same key are one sample.
                name, suffix = _split_name(member.name)
                kind = MEMBERS.get(suffix)
                if kind is None:
                    continue

                if name != key:
                    starts.append(len(members) // 4)
                    key = name
                members.extend((number, kind, member.offset_data, member.size))

        self._members = np.array(members, np.int64).reshape(-1, 4)
        self._starts = np.array([*starts, len(self._members)], np.int64)
        self._files = self._open_files()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> samples.Sample:
        name = f"{self._path.name}#{index}"
        return records.to_sample(self.record(index), name, self._images)

    def record(self, index: int) -> Mapping[str, Any]:
        """Returns the record of a sample; its images are the members' bytes.

        Raises:
          BadSample: its `.json` or text member is malformed.
        """
        content: dict[str, Any] = {}
        images: list[bytes] = []
        for shard, kind, start, size in self._members[
            self._starts[index] : self._starts[index + 1]
        ]:
            # pread has no position of its own, so threads can share the file.
            raw = os.pread(self._files[shard].fileno(), int(size), int(start))
            if len(raw) != size:
                raise UserError(f"data file {self._shards[shard]} was changed while it was in use")

            if kind == IMAGE:
                images.append(raw)
            elif kind == TEXT:
                content.setdefault("text", _decode(raw, "text"))
            else:
                content = {**content, **_parse(raw)}

        # Images of the tar file take the place of the paths that they were downloaded from.
        if images:
            for key in records.CAPTION_IMAGE_KEYS:
                content.pop(key, None)
            content["images"] = images
        return content

    def _open_files(self) -> list[Any]:
        return [shard.open("rb") for shard in self._shards]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files = self._open_files()


def _members(path: pathlib.Path, shard: pathlib.Path) -> Iterator[tarfile.TarInfo]:
    """Yields the files of a shard; their content is not read."""
    try:
        with tarfile.open(shard, "r:") as file:
            for member in file:
                if member.isfile():
                    yield member
                # tarfile keeps every header in memory; typeshed lacks the attribute.
                file.members = []  # type: ignore[attr-defined]
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = "; decompress it first" if _is_compressed(shard) else ""
        raise UserError(
            f"data file {path}: {shard.name} cannot be read as a tar file: {reason}{hint}"
        ) from error


def _is_compressed(shard: pathlib.Path) -> bool:
    with shard.open("rb") as file:
        # gzip, bzip2, zstd and xz
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd", b"\xfd7zX"))


def _split_name(name: str) -> tuple[str, str]:
    """Returns the key of a member and its last suffix in lower case.

    >>> _split_name("part.1/000001.0.JPG")
    ('part.1/000001', '.jpg')
    """
    directory, slash, file = name.rpartition("/")
    key, _, suffixes = file.partition(".")
    return f"{directory}{slash}{key}", f".{suffixes.rpartition('.')[2].lower()}"


def _decode(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise samples.BadSample(samples.MALFORMED, f"its {what} is not UTF-8") from error


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(_decode(raw, "JSON"))
    except (ValueError, RecursionError) as error:
        raise samples.BadSample(samples.MALFORMED, f"its JSON is malformed: {error}") from error
    if not isinstance(content, dict):
        raise samples.BadSample(samples.MALFORMED, "its JSON is not an object")
    return content
