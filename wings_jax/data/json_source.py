"""Random access to the records of JSON lists and of JSONL files.

The file is parsed once, to find mistakes and where each record begins and ends; after that 16
bytes per record stay in memory, and a record is read from the file when its sample is needed.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from wings_jax.data import records, samples
from wings_jax.errors import UserError

_SPACE = " \t\r\n"


class JsonSource:
    """Records of a JSON list, or of a file with one JSON record per line.

    Args:
      path: the data file, named in messages.
      images: directory that the records' image paths are relative to.
      by_line: whether every line is a record; else the file is one list.
      content: the file with the JSON text, where that is not `path` (decompressed, converted).

    Raises:
      UserError: the file cannot be read or has a mistake, named with line and column.
    """

    def __init__(
        self,
        path: pathlib.Path,
        images: pathlib.Path,
        *,
        by_line: bool,
        content: pathlib.Path | None = None,
    ):
        self._path, self._images, self._content = path, images, content or path
        # The size and time of change stand for the content.
        status = path.stat()
        self.fingerprint = f"{path.absolute()} {status.st_size} {status.st_mtime_ns}"

        spans = _find_spans(path, self._content, by_line=by_line)
        self._spans = np.array(list(spans), np.int64).reshape(-1, 2)
        self._file = self._content.open("rb")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> samples.Sample:
        return records.to_sample(self.record(index), f"{self._path.name}#{index}", self._images)

    def record(self, index: int) -> Mapping[str, Any]:
        """Returns the record as it is in the file."""
        start, end = (int(byte) for byte in self._spans[index])
        # pread: threads would share the position of read.
        content = os.pread(self._file.fileno(), end - start, start)
        try:
            record = json.loads(content) if len(content) == end - start else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"data file {self._path} was changed while it was in use")
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _file=state["_content"].open("rb"))


def _find_spans(
    path: pathlib.Path, content: pathlib.Path, *, by_line: bool
) -> Iterator[tuple[int, int]]:
    """Yields the first and the last+1 byte of every record, each of them parsed.

    Raises:
      UserError: with file, line and column of the first mistake.
    """
    try:
        raw = content.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"data file {path}, line {line}: not UTF-8 ({error.reason})") from error

    is_ascii = len(raw) == len(text)
    del raw  # the file may be as large as the memory that is left
    find_records = _line_records if by_line else _list_records
    byte, last = 0, 0  # of the end of the record before: its byte, its character
    try:
        for start, end, record in find_records(text):
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
    except (RecursionError, ValueError) as error:  # nested too deeply, or an endless number
        detail = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"data file {path}: {detail}") from error


def _list_records(text: str) -> Iterator[tuple[int, int, Any]]:
    """Yields the first and the last+1 character of every record of a list, and the record."""
    decode = json.JSONDecoder().raw_decode
    start = _skip_space(text, 1 if text.startswith("\ufeff") else 0)
    if text[start : start + 1] != "[":
        raise json.JSONDecodeError(
            "expected a list of records, '[' (a file of one record per line is named .jsonl)",
            text,
            start,
        )

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

    # Nothing may follow the list.
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

        # A record must end on its line, and no other may follow it there.
        record, end = decode(text, start)
        if end > line_end or text[end:line_end].strip():
            raise json.JSONDecodeError("expected one record per line", text, min(end, line_end))
        yield start, end, record
        start = _skip_space(text, line_end)


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in _SPACE:
        start += 1
    return start
