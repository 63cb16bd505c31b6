"""Rows of the files that benchmarks come in: CSV, TSV, JSON, JSON lines, parquet, arrow, text.

Each reader yields `Row`s one by one. Columns that hold images are not kept: a `Blob` has the place
of the bytes, and reads them when an item is evaluated, so that a TSV of several gigabytes needs
little memory.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from wings_jax.errors import UserError
from wings_jax.weights import text_files

csv.field_size_limit(sys.maxsize)  # base64 images exceed the default of 131,072 characters
IMAGE_COLUMNS = ("image", *(f"image_{number}" for number in range(1, 8)))
SHORT_TEXT = 64  # an image column up to this length is a path or the index of another row
ARROW_FILE_START = b"ARROW1"


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file."""

    # The file.
    path: pathlib.Path
    # Line of a text file, from 1 (the first line of a field with line breaks); else row, from 1.
    number: int
    # Column -> value; columns of a file without a header are "0", "1", ...
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Returns file and row, for messages."""
        return f"{self.path} row {self.number}"


@dataclasses.dataclass(frozen=True)
class Blob:
    """The value of an image column, which is still in its file."""

    # Returns what the column holds: base64 text, or bytes of an encoded image.
    read: Callable[[], Any]
    # Path that Hugging Face stores with the bytes, or "".
    name: str = ""
    # Number of images, where the column is a list of base64 as a string; 0 for a single image.
    count: int = 0


Reader = Callable[[pathlib.Path, Mapping[str, Any]], Iterator[Row]]


def read_csv(path: pathlib.Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the rows of a CSV or TSV file; `options`: header, delimiter, quotes.

    Raises:
      UserError: the file cannot be read, is not UTF-8, or a row has more fields than the header.
    """
    delimiter = options.get("delimiter", ",")
    parse = functools.partial(csv.reader, delimiter=delimiter)
    if not options.get("quotes", True):
        parse = functools.partial(parse, quoting=csv.QUOTE_NONE)

    # Offsets of rows are recorded, so that an image can be read later.
    lines = _LineReader(path)
    rows = parse(lines)
    header = None

    while True:
        # A field with line breaks spans several lines: the row's position is that of the first.
        offset, number = lines.offset, lines.number + 1
        try:
            fields = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{path} row {number}: not a row of CSV: {error}") from error

        if fields is None:
            return
        if not any(fields):
            continue

        if header is None and options.get("header", True):
            header = fields
            continue

        names = header or [str(column) for column in range(len(fields))]
        if len(fields) > len(names):
            raise UserError(
                f"{path} row {number} has {len(fields)} fields, the header {len(names)}"
            )

        # A row with fewer fields than the header lacks its last columns.
        values: dict[str, Any] = dict(zip(names, fields, strict=False))

        # An image in base64 stays in the file: the row has its offset only.
        for name in IMAGE_COLUMNS:
            text = values.get(name) or ""
            if len(text) > SHORT_TEXT:
                read = functools.partial(_read_field, path, offset, parse, names.index(name))
                values[name] = Blob(read, count=text.count("'") // 2 if text[0] == "[" else 0)

        yield Row(path, number, values)


class _LineReader:
    """Lines of a UTF-8 file with the offset of the next one. Raises UserError as `next` does."""

    def __init__(self, path: pathlib.Path):
        text_files.check_not_pointer(path)
        self.path, self.number = path, 0
        self._file = open(path, "rb")  # noqa: SIM115  # closed at its end

        # The text begins after a UTF-8 byte order mark, and so do the offsets.
        has_mark = self._file.read(3) == b"\xef\xbb\xbf"
        self.offset = 3 if has_mark else 0
        self._file.seek(self.offset)

    def __iter__(self) -> _LineReader:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            self._file.close()
            raise StopIteration

        self.offset += len(line)
        self.number += 1
        return _decode(line, f"{self.path} row {self.number}")


def _read_field(path: pathlib.Path, offset: int, parse: Callable, column: int) -> str:
    """Returns one field of the row that begins at an offset."""
    with open(path, "rb") as file:
        file.seek(offset)
        # The parser reads further lines where a field has line breaks.
        lines = (line.decode("utf-8") for line in file)
        return next(parse(lines))[column]


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text; convert the file to UTF-8") from error


def read_json(path: pathlib.Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the rows of a JSON file: lines, a list, or the values of an object.

    `options`: "rows" is the key of the list; without it an object is key -> row, and a row gets
    its key as "@key".

    Raises:
      UserError: the file cannot be read or is not JSON; the message has the line.
    """
    text = text_files.read_text(path)

    # JSON lines are not one document: parsing fails where the second line begins.
    try:
        content = json.loads(text)
    except ValueError:
        yield from _read_json_lines(path, text)
        return

    # Rows are a list under a key, a list, or the values of an object.
    key = options.get("rows", "")
    if key:
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{path} has no list {key!r}")
        content = content[key]
    elif isinstance(content, dict) and content and _are_objects(content.values()):
        content = [{**row, "@key": name} for name, row in content.items()]
    elif isinstance(content, dict):
        content = [content]  # a file of one line, or one article of RACE

    if not isinstance(content, list) or not _are_objects(content):
        raise UserError(f"{path} is not a list of JSON objects")

    for number, values in enumerate(content, start=1):
        yield Row(path, number, values)


def _are_objects(rows: Any) -> bool:
    return all(isinstance(row, dict) for row in rows)


def _read_json_lines(path: pathlib.Path, text: str) -> Iterator[Row]:
    # Only "\n" ends a line: `splitlines` would split at U+2028 in a text too.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} row {number} is not JSON: {reason}") from error

        if not isinstance(values, dict):
            raise UserError(f"{path} row {number} is not a JSON object")
        yield Row(path, number, values)


def read_lines(path: pathlib.Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the lines of a text file that are not empty, as column "line"; `options`: none.

    Raises:
      UserError: the file cannot be read or is not UTF-8.
    """
    for number, line in enumerate(text_files.read_text(path).split("\n"), start=1):
        if line.strip():
            yield Row(path, number, {"line": line.rstrip("\r")})


def read_parquet(path: pathlib.Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the rows of a parquet file, group by group; `options`: none.

    Raises:
      UserError: the file is not parquet.
    """
    text_files.check_not_pointer(path)
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        images = [name for name in names if name in IMAGE_COLUMNS]

        # Images stay Arrow arrays; the other columns become Python values, one group at a time.
        for group in range(file.num_row_groups):
            columns = [name for name in names if name not in IMAGE_COLUMNS]
            paths = {column: _image_paths(path, group, column) for column in images}
            for index, values in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                number += 1
                for column in images:
                    values[column] = _parquet_blob(path, group, column, index, paths[column])
                yield Row(path, number, values)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file: {_first_line(error)}") from error


@functools.lru_cache(maxsize=8)  # items are asked in the order of the file, with up to 7 images
def _parquet_column(path: pathlib.Path, group: int, column: str) -> pyarrow.Array:
    file = pyarrow.parquet.ParquetFile(path)
    return file.read_row_group(group, columns=[column]).column(0).combine_chunks()


def _image_paths(path: pathlib.Path, group: int, column: str) -> list[str | None]:
    """Returns the path stored with each image, "" where there is none; None for no image."""
    values = _parquet_column(path, group, column)

    # Hugging Face stores a struct of bytes and path; other files have the bytes alone.
    is_struct = pyarrow.types.is_struct(values.type)
    stored = values.field("path").to_pylist() if is_struct else [""] * len(values)

    has_image = values.is_valid().to_pylist()
    return [(name or "") if valid else None for name, valid in zip(stored, has_image, strict=True)]


def _parquet_blob(
    path: pathlib.Path, group: int, column: str, index: int, names: list[str | None]
) -> Blob | None:
    name = names[index]
    if name is None:
        return None

    # Read on demand: the row itself does not hold the image.
    return Blob(lambda: _unwrap_image(_parquet_column(path, group, column)[index]), name)


def _unwrap_image(scalar: pyarrow.Scalar) -> Any:
    """Returns the bytes of Hugging Face's struct of bytes and path, or the value itself."""
    value = scalar.as_py()
    return value.get("bytes") if isinstance(value, dict) else value


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def read_arrow(path: pathlib.Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the rows of an arrow file or stream, as `save_to_disk` writes it; `options`: none.

    Raises:
      UserError: the file is not arrow.
    """
    text_files.check_not_pointer(path)
    table = _open_arrow(path)
    kept = [name for name in table.column_names if name not in IMAGE_COLUMNS]

    # Images stay in the memory-mapped table until they are read.
    for index in range(table.num_rows):
        values = table.select(kept).slice(index, 1).to_pylist()[0]
        for column in IMAGE_COLUMNS:
            if column in table.column_names and table.column(column)[index].is_valid:
                values[column] = _arrow_blob(table.column(column), index)
        yield Row(path, index + 1, values)


@functools.lru_cache(maxsize=4)
def _open_arrow(path: pathlib.Path) -> pyarrow.Table:
    """Returns the table of an arrow file, which stays on disk (memory mapping)."""
    try:
        source = pyarrow.memory_map(str(path))
        # An Arrow file begins with a magic word, a stream does not.
        is_file = source.read(len(ARROW_FILE_START)) == ARROW_FILE_START
        source.seek(0)
        opened = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        return opened.read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not an arrow file: {_first_line(error)}") from error


def _arrow_blob(column: pyarrow.ChunkedArray, index: int) -> Blob:
    return Blob(lambda: _unwrap_image(column[index]))


# By the name in `FilePattern.reader`; `rewrites` adds those that change the rows.
ROW_READERS: Mapping[str, Reader] = {
    "csv": read_csv,
    "json": read_json,
    "lines": read_lines,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
