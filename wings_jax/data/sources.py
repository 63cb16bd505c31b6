"""Random access to the samples of a data file: LLaVA JSON, JSONL, or a tensorflow-datasets folder.

A JSON file is read through once, to find mistakes and where each record begins and ends; after
that 16 bytes a record stay in memory, and a record is read from the file when it is asked for.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from wings_jax.data import samples
from wings_jax.errors import UserError

_IMAGE_KEYS = ("image", "images")
_SPACE = " \t\r\n"


class SampleSource(Protocol):
    """Samples by index. Reading index i gives the same sample from any thread or process."""

    @property
    def fingerprint(self) -> str: ...  # differs when the text does

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> samples.Sample: ...


def open_source(
    path: str | os.PathLike, *, images: str | os.PathLike | None = None, split: str = "train"
) -> SampleSource:
    """Returns the samples of `path`.

    Args:
      path: a .json file (a list of records), a .jsonl file (a record a line), or a folder that
        tensorflow-datasets wrote in array_record.
      images: the folder that the records' image paths start from; by default the file's own.
      split: which split of a tensorflow-datasets folder, e.g. "train" or "train[:10%]".

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
        raise UserError(f"data file {path} holds no samples")
    return source


class JsonSource:
    """Records of a LLaVA JSON or JSONL file: `id`, `image` (path or list), `conversations`."""

    def __init__(self, path: pathlib.Path, images: pathlib.Path):
        if not images.is_dir():
            raise UserError(f"image folder {images} of data file {path} does not exist")
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
        """Returns the record as it stands in the file."""
        start, end = (int(byte) for byte in self._spans[index])
        found = os.pread(
            self._file.fileno(), end - start, start
        )  # no position for threads to share
        if len(found) != end - start:
            raise UserError(f"data file {self._path} became shorter while it was in use")
        return json.loads(found)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _file=state["_path"].open("rb"))


def to_sample(record: Mapping[str, Any], name: str, images: pathlib.Path) -> samples.Sample:
    """Returns the sample of a LLaVA record; `name` is its id where it has none.

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
    """Yields first and last+1 byte of every record, having parsed it.

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
    del raw
    find = _line_records if path.suffix == ".jsonl" else _list_records
    byte, last = 0, 0
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
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 1 if text.startswith("\ufeff") else 0)
    if text[at : at + 1] != "[":
        raise json.JSONDecodeError("expected a list of records, '['", text, at)
    at = _skip(text, at + 1)
    if text[at : at + 1] != "]":
        record, end = decode(text, at)
        yield at, end, record
        at = _skip(text, end)
    while text[at : at + 1] == ",":
        at = _skip(text, at + 1)
        record, end = decode(text, at)
        yield at, end, record
        at = _skip(text, end)
    if text[at : at + 1] != "]":
        raise json.JSONDecodeError("expected ',' or ']' after a record", text, at)
    rest = _skip(text, at + 1)
    if rest < len(text):
        raise json.JSONDecodeError("the list has ended, but text follows", text, rest)


def _line_records(text: str) -> Iterator[tuple[int, int, Any]]:
    decode = json.JSONDecoder().raw_decode
    at = _skip(text, 1 if text.startswith("\ufeff") else 0)
    while at < len(text):
        line_end = text.find("\n", at)
        line_end = len(text) if line_end < 0 else line_end
        record, end = decode(text, at)
        if end > line_end or text[end:line_end].strip():
            raise json.JSONDecodeError("expected one record a line", text, min(end, line_end))
        yield at, end, record
        at = _skip(text, line_end)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


class PreparedSource:
    """Samples that tensorflow-datasets wrote as array_record, read without TensorFlow.

    Features: `conversations` (sequence of {"from", "value"}), and as wanted `id` and `image` or
    `images`: encoded files as bytes (what `wings_jax.data.prepare` writes) or decoded Image
    features, one or a sequence.
    """

    def __init__(self, path: pathlib.Path, split: str):
        import tensorflow_datasets as tfds  # slow to import, and only needed here

        found = sorted(path.glob("dataset_info.json")) or sorted(path.rglob("dataset_info.json"))
        if len(found) != 1:
            what = "no dataset_info.json" if not found else f"{len(found)} data sets, name one"
            raise UserError(f"data folder {path}: {what}")
        self._name = f"{path.name}[{split}]"
        status = found[0].stat()
        self.fingerprint = f"{found[0].absolute()} {split} {status.st_mtime_ns}"
        try:
            builder = tfds.builder_from_directory(str(found[0].parent))
            self._records = builder.as_data_source(split=split)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"data folder {path}, split {split!r}: {detail}") from error
        if "conversations" not in builder.info.features:
            raise UserError(f"data folder {path} has no feature 'conversations'")

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
        conversations = [{"from": _text(who), "value": _text(what)} for who, what in pairs]
        name = f"{self._name}#{index}"
        identity = _text(record["id"]) if "id" in record else name
        return samples.Sample(identity, _pictures(record), conversations)


def _pictures(record: Mapping[str, Any]) -> tuple[Any, ...]:
    found = next((record[key] for key in _IMAGE_KEYS if key in record), ())
    is_single = isinstance(found, bytes) or (isinstance(found, np.ndarray) and found.ndim == 3)
    pictures: Sequence[Any] = [found] if is_single else list(found)
    return tuple(part for part in pictures if len(part))


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
