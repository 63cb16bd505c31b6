"""Random access to the rows of parquet, arrow, CSV and TSV files, each row a record."""

from __future__ import annotations

import atexit
import csv
import gzip
import json
import pathlib
import shutil
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from wings_jax.data import records, samples
from wings_jax.errors import UserError

# Columns whose cells are lists; CSV has them as JSON text.
_LIST_COLUMNS = ("conversations", "messages", "conversation", "images", "image", "history")


class ArrowSource:
    """Rows of arrow or parquet files, memory-mapped.

    Parquet files are first decompressed into temporary arrow files.

    Args:
      path: the file or directory, named in messages.
      shards: its files, in order.
      images: directory that the records' image paths are relative to.

    Raises:
      UserError: a file cannot be read.
    """

    def __init__(self, path: pathlib.Path, shards: Sequence[pathlib.Path], images: pathlib.Path):
        self._path, self._images = path, images
        # Sizes and times of change stand for the content.
        stamps = [(shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards]
        self.fingerprint = f"{path.absolute()} {stamps}"

        self._shards = [_as_arrow_file(shard) for shard in shards]
        self._table = self._open_table()

    def _open_table(self) -> Any:
        import pyarrow as pa  # slow to import, and only needed here

        try:
            return pa.concat_tables([_map_table(shard) for shard in self._shards])
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"data file {self._path} cannot be read: {_first_line(error)}"
            ) from error

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> samples.Sample:
        return records.to_sample(self.record(index), f"{self._path.name}#{index}", self._images)

    def record(self, index: int) -> Mapping[str, Any]:
        """Returns a row as column -> value."""
        return self._table.slice(index, 1).to_pylist()[0]

    def __getstate__(self) -> dict[str, Any]:
        # A memory map cannot be pickled: the other process opens the files again.
        return {**self.__dict__, "_table": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._table = self._open_table()


def _map_table(path: pathlib.Path) -> Any:
    """Returns the table of an arrow file, of either of its two formats."""
    import pyarrow as pa

    # The file format, or the stream format that `datasets` writes.
    mapped = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all()


def _as_arrow_file(path: pathlib.Path) -> pathlib.Path:
    """Returns an arrow file of the same rows."""
    if path.suffix.lower() != ".parquet":
        return path
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Batch by batch, so that memory does not grow with the file.
    try:
        with pq.ParquetFile(path) as file:
            target = temporary_file(".arrow")
            with (
                pa.OSFile(str(target), "wb") as sink,
                pa.ipc.new_file(sink, file.schema_arrow) as out,
            ):
                for batch in file.iter_batches(batch_size=256):
                    out.write_batch(batch)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"data file {path} cannot be read: {_first_line(error)}") from error
    return target


def decompress(path: pathlib.Path) -> pathlib.Path:
    """Returns a temporary file with the content of a gzip file.

    Raises:
      UserError: it is damaged or cannot be read.
    """
    target = temporary_file(path.stem)
    try:
        with gzip.open(path, "rb") as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {path} cannot be decompressed: {_first_line(error)}") from error
    return target


def csv_to_jsonl(path: pathlib.Path, content: pathlib.Path, delimiter: str) -> pathlib.Path:
    """Returns a temporary JSONL file with the rows of a CSV or TSV file.

    Args:
      path: the data file, named in messages.
      content: the file with its text.

    Raises:
      UserError: it cannot be read, or a row has more cells than the header.
    """
    csv.field_size_limit(sys.maxsize)  # cells may be images
    target = temporary_file(".jsonl")
    line = 1

    try:
        with (
            content.open(encoding="utf-8-sig", newline="") as text,
            target.open("w", encoding="utf-8") as file,
        ):
            reader = csv.DictReader(text, delimiter=delimiter, strict=True)
            # Cells beyond the header are under the key None.
            for row in reader:
                line = reader.line_num
                if None in row:
                    raise csv.Error(f"more cells than the header's {len(reader.fieldnames or ())}")
                record = {key: _read_cell(key, cell) for key, cell in row.items()}
                file.write(json.dumps(record) + "\n")
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        detail = _first_line(error)
        raise UserError(f"data file {path}, after line {line}: {detail}") from error
    return target


def _read_cell(column: str, cell: str | None) -> Any:
    """Returns a cell's text, or what its JSON stands for in a column of lists."""
    if column not in _LIST_COLUMNS or not cell or cell[0] not in "[{":
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def temporary_file(suffix: str) -> pathlib.Path:
    """Returns a new file that is removed when the process ends."""
    with tempfile.NamedTemporaryFile(prefix="wings-", suffix=suffix, delete=False) as file:
        path = pathlib.Path(file.name)
    atexit.register(path.unlink, missing_ok=True)
    return path


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
