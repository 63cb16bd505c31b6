"""Random access to the samples of LLaVA JSON, JSONL, or a tensorflow-datasets directory.

A JSON file is parsed once, to find mistakes and where each record begins and ends; after that 16
bytes per record stay in memory, and a record is read from the file when its sample is needed.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from wings_jax.data import samples
from wings_jax.errors import UserError

_IMAGE_KEYS = ("image", "images")
_SPACE = " \t\r\n"


class SampleSource(Protocol):
    """Samples by index. Index i gives the same sample in any thread or process."""

    @property
    def fingerprint(self) -> str:
        """A string that changes when the text of the samples does."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> samples.Sample: ...


def open_source(
    path: str | os.PathLike, *, images: str | os.PathLike | None = None, split: str = "train"
) -> SampleSource:
    """Returns the samples of `path`.

    Args:
      path: a .json file (a list of records), a .jsonl file (one record per line), or a directory
        that tensorflow-datasets wrote in array_record.
      images: the directory that the records' image paths are relative to; by default the file's.
      split: the split of a tensorflow-datasets directory, e.g. "train" or "train[:10%]".

    Raises:
      UserError: the path is missing, unreadable, malformed (with line and column) or empty.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"data file {path} does not exist")

    if path.is_dir():
        source: SampleSource = PreparedSource(path, split)
    else:
        source = JsonSource(path, path.parent if images is None else pathlib.Path(images))

    if not len(source):
        raise UserError(f"data file {path} has no samples")
    return source


class JsonSource:
    """Records of a LLaVA JSON or JSONL file: `id`, `image` (path or list), `conversations`."""

    def __init__(self, path: pathlib.Path, images: pathlib.Path):
        if not images.is_dir():
            raise UserError(f"image directory {images} of data file {path} does not exist")
        self._path, self._images = path, images

        status = path.stat()
        self.fingerprint = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"
        self._spans = np.array(list(_spans(path)), np.int64).reshape(-1, 2)
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> samples.Sample:
        return to_sample(self.record(index), f"{self._path.name}#{index}", self._images)

    def record(self, index: int) -> Mapping[str, Any]:
        """Returns the record as it is in the file."""
        start, end = (int(byte) for byte in self._spans[index])
        # pread: threads would share the position of read.
        content = os.pread(self._file.fileno(), end - start, start)
        if len(content) != end - start:
            raise UserError(f"data file {self._path} became shorter while it was in use")
        return json.loads(content)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _file=state["_path"].open("rb"))


def to_sample(record: Mapping[str, Any], name: str, images: pathlib.Path) -> samples.Sample:
    """Returns the sample of a LLaVA record; `name` is its id if it has none.

    Raises:
      BadSample: `image` is neither a path nor a list of paths.
    """
    listed = next((record[key] for key in _IMAGE_KEYS if record.get(key)), [])
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list) or not all(isinstance(part, str) for part in listed):
        raise samples.BadSample(samples.MALFORMED, f"image is {samples.shorten(listed)}")

    paths = tuple(images / part for part in listed)
    extra = {k: v for k, v in record.items() if k not in (*_IMAGE_KEYS, "id", "conversations")}
    identity = str(record["id"]) if record.get("id") is not None else name
    return samples.Sample(identity, paths, record.get("conversations", ()), extra)


def _spans(path: pathlib.Path) -> Iterator[tuple[int, int]]:
    """Yields the first and the last+1 byte of every record, each of them parsed.

    Raises:
      UserError: with file, line and column of the first mistake.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"data file {path}, line {line}: not UTF-8 ({error.reason})") from error

    is_ascii = len(raw) == len(text)
    del raw  # the file may be as large as the memory that is left
    find = _line_records if path.suffix == ".jsonl" else _list_records
    byte, last = 0, 0  # of the end of the record before: its byte, its character
    try:
        for start, end, record in find(text):
            if not isinstance(record, dict):
                message = f"a record must be an object, this is {samples.shorten(record)}"
                raise json.JSONDecodeError(message, text, start)
            if is_ascii:
                yield start, end
                continue

            byte += len(text[last:start].encode())
            size = len(text[start:end].encode())
            yield byte, byte + size
            byte, last = byte + size, end
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"data file {path}, {where}: {error.msg}") from error


def _list_records(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yields the first and the last+1 character of every record of a list, and the record."""
    decode = json.JSONDecoder().raw_decode
    start = _skip_space(text, 1 if text.startswith("\ufeff") else 0)
    if text[start : start + 1] != "[":
        raise json.JSONDecodeError("expected a list of records, '['", text, start)

    start = _skip_space(text, start + 1)
    while text[start : start + 1] != "]":
        record, end = decode(text, start)
        yield start, end, record

        start = _skip_space(text, end)
        if text[start : start + 1] == ",":
            start = _skip_space(text, start + 1)
            if text[start : start + 1] == "]":
                raise json.JSONDecodeError("Expecting value", text, start)
        elif text[start : start + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']' after a record", text, start)

    rest = _skip_space(text, start + 1)
    if rest < len(text):
        raise json.JSONDecodeError("the list has ended, but text follows", text, rest)


def _line_records(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yields the same of every record of a JSONL file."""
    decode = json.JSONDecoder().raw_decode
    start = _skip_space(text, 1 if text.startswith("\ufeff") else 0)
    while start < len(text):
        line_end = text.find("\n", start)
        line_end = len(text) if line_end < 0 else line_end

        record, end = decode(text, start)
        if end > line_end or text[end:line_end].strip():
            raise json.JSONDecodeError("expected one record per line", text, min(end, line_end))
        yield start, end, record
        start = _skip_space(text, line_end)


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in _SPACE:
        start += 1
    return start


class PreparedSource:
    """Samples that tensorflow-datasets wrote as array_record, read without TensorFlow.

    Features: `conversations` (sequence of {"from", "value"}), and optionally `id` and `image` or
    `images`: encoded files as bytes (what `wings_jax.data.prepare` writes) or decoded Image
    features, one or a sequence.
    """

    def __init__(self, path: pathlib.Path, split: str):
        import tensorflow_datasets as tfds  # slow to import, and only needed here

        notes = sorted(path.glob("dataset_info.json")) or sorted(path.rglob("dataset_info.json"))
        if len(notes) != 1:
            what = "no dataset_info.json" if not notes else f"{len(notes)} data sets, name one"
            raise UserError(f"data directory {path}: {what}")

        self._name = f"{path.name}[{split}]"
        status = notes[0].stat()
        self.fingerprint = f"{notes[0].absolute()} {split} {status.st_mtime_ns}"
        try:
            builder = tfds.builder_from_directory(str(notes[0].parent))
            self._records = builder.as_data_source(split=split)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"data directory {path}, split {split!r}: {detail}") from error
        if "conversations" not in builder.info.features:
            raise UserError(f"data directory {path} has no feature 'conversations'")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> samples.Sample:
        try:
            record = self._records[index]
        except (OSError, SyntaxError) as error:  # an Image feature that PIL cannot decode
            detail = f"record {index}: {error}"
            raise samples.BadSample(samples.UNREADABLE_IMAGE, detail) from error

        turns = record["conversations"]
        pairs = zip(turns["from"], turns["value"], strict=True)
        conversations = [{"from": _as_text(who), "value": _as_text(what)} for who, what in pairs]
        identity = _as_text(record["id"]) if "id" in record else f"{self._name}#{index}"
        return samples.Sample(identity, _prepared_images(record), conversations)


def _prepared_images(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the images of a prepared record; an empty one stands for no image."""
    feature = next((record[key] for key in _IMAGE_KEYS if key in record), ())
    is_array = isinstance(feature, np.ndarray) and feature.ndim == 3
    images = [feature] if is_array or isinstance(feature, bytes) else list(feature)
    return tuple(image for image in images if len(image))


def _as_text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
