"""Random access to the records of JSON lists and of JSONL files.

The file is parsed once, block by block, to find mistakes and where each record begins and ends;
after that 16 bytes per record stay in memory, and a record is read from the file when its sample
is needed.
"""

from __future__ import annotations

import array
import codecs
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from wings_jax.data import records, samples
from wings_jax.errors import UserError

_BLOCK = 1 << 22  # bytes that are read at a time
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


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

        self._spans = _find_spans(path, self._content, by_line=by_line)
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


class _Window:
    """The part of a text file that is being parsed; what was parsed is dropped, the rest read on.

    text  the characters in memory, from the current record on

    Raises:
      UserError: the file cannot be read or is not UTF-8, with the line.
    """

    def __init__(self, path: pathlib.Path, file: IO[bytes]):
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""
        self.is_complete = False  # whether the text reaches the end of the file
        # Of the first character of `text`: its byte, its line, and the characters before it there.
        self._byte, self._line, self._column = 0, 1, 0

    def read_on(self) -> None:
        """Appends as much as there is already, and at least a block."""
        content = self._file.read(max(_BLOCK, len(self.text)))
        self.is_complete = not content

        # Bytes of a character that was cut by the end of the last block.
        pending = self._decoder.getstate()[0]
        try:
            self.text += self._decoder.decode(content, final=self.is_complete)
        except UnicodeDecodeError as error:
            # The line in the whole file: lines dropped, lines held, lines of these bytes.
            lines = (pending + content).count(b"\n", 0, error.start)
            line = self._line + self.text.count("\n") + lines
            raise UserError(
                f"data file {self._path}, line {line}: not UTF-8 ({error.reason})"
            ) from error

    def drop(self, end: int) -> None:
        """Drops the characters before `end`."""
        self._byte = self.byte(end)
        self._line, self._column = self.line_and_column(end)
        self._column -= 1
        self.text = self.text[end:]

    def byte(self, position: int) -> int:
        """Returns where in the file the byte of a character is."""
        if self.text.isascii():
            return self._byte + position
        return self._byte + len(self.text[:position].encode())

    def line_and_column(self, position: int) -> tuple[int, int]:
        """Returns line and column of a character, both from 1."""
        newline = self.text.rfind("\n", 0, position)
        column = position - newline if newline >= 0 else self._column + position + 1
        return self._line + self.text.count("\n", 0, position), column

    def skip_space(self, position: int) -> int:
        """Returns the position of the next character that is not white space, or of the end."""
        while True:
            match = _SPACE.match(self.text, position)
            position = match.end() if match else position
            if position < len(self.text) or self.is_complete:
                return position
            self.read_on()

    def find_line_end(self, position: int) -> int:
        """Returns the position of the next newline, or of the end of the file."""
        while (end := self.text.find("\n", position)) < 0 and not self.is_complete:
            self.read_on()
        return end if end >= 0 else len(self.text)

    def parse(self, position: int) -> tuple[Any, int]:
        """Returns the JSON value at a position, and the position after it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, position)
                # A value that ends where the text ends may go on: 12 of 123.
                if end < len(self.text) or self.is_complete:
                    return value, end
            except json.JSONDecodeError as error:
                # A mistake at the end of what was read may only be its end.
                is_string = error.msg.startswith("Unterminated string")
                if self.is_complete or not (is_string or error.pos > len(self.text) - 16):
                    raise
            self.read_on()


def _find_spans(path: pathlib.Path, content: pathlib.Path, *, by_line: bool) -> np.ndarray:
    """Returns i64[n,2]: the first and the last+1 byte of every record, each of them parsed.

    Memory: the spans, and the longest record or a block.

    Raises:
      UserError: with file, line and column of the first mistake.
    """
    find_records = _line_records if by_line else _list_records
    spans = array.array("q")

    try:
        with content.open("rb") as file:
            window = _Window(path, file)
            try:
                # Positions are characters of the text in the window; spans are bytes of the file.
                for start, end in find_records(window):
                    spans.extend((window.byte(start), window.byte(end)))
            except json.JSONDecodeError as error:
                line, column = window.line_and_column(error.pos)
                where = f"line {line}, column {column}"
                raise UserError(f"data file {path}, {where}: {error.msg}") from error
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (RecursionError, ValueError) as error:  # nested too deeply, or an endless number
        detail = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"data file {path}: {detail}") from error
    return np.array(spans, np.int64).reshape(-1, 2)


def _parse_record(window: _Window, start: int) -> int:
    """Returns the position after the record at `start`. Raises JSONDecodeError."""
    record, end = window.parse(start)
    if not isinstance(record, dict):
        message = f"a record must be an object, this is {samples.shorten(record)}"
        raise json.JSONDecodeError(message, window.text, start)
    return end


def _first_character(window: _Window) -> int:
    """Returns the position of the first character after a byte order mark and white space."""
    window.skip_space(0)
    return window.skip_space(1 if window.text.startswith("\ufeff") else 0)


def _list_records(window: _Window) -> Iterator[tuple[int, int]]:
    """Yields the first and the last+1 character of every record of a list."""
    start = _first_character(window)
    if window.text[start : start + 1] != "[":
        raise json.JSONDecodeError(
            "expected a list of records, '[' (a file of one record per line is named .jsonl)",
            window.text,
            start,
        )

    start = window.skip_space(start + 1)
    while window.text[start : start + 1] != "]":
        # What has been passed is dropped, so memory does not grow with the file.
        if start > _BLOCK:
            window.drop(start)
            start = 0

        end = _parse_record(window, start)
        yield start, end

        start = window.skip_space(end)
        # JSON allows no comma after the last record.
        if window.text[start : start + 1] == ",":
            start = window.skip_space(start + 1)
            if window.text[start : start + 1] == "]":
                raise json.JSONDecodeError("Expecting value", window.text, start)
        elif window.text[start : start + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']' after a record", window.text, start)

    # Nothing may follow the list.
    rest = window.skip_space(start + 1)
    if rest < len(window.text):
        raise json.JSONDecodeError("the list has ended, but text follows", window.text, rest)


def _line_records(window: _Window) -> Iterator[tuple[int, int]]:
    """Yields the same of every record of a JSONL file."""
    start = _first_character(window)
    while start < len(window.text):
        if start > _BLOCK:
            window.drop(start)
            start = 0

        # A record must end on its line, and no other may follow it there.
        line_end = window.find_line_end(start)
        end = _parse_record(window, start)
        if end > line_end or window.text[end:line_end].strip():
            position = min(end, line_end)
            raise json.JSONDecodeError("expected one record per line", window.text, position)
        yield start, end
        start = window.skip_space(line_end)
