"""Writes files of benchmarks in the forms that people have them in, from rows by hand."""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from wings_jax.evaluation.benchmarks import readers, records
from wings_jax.evaluation.benchmarks.record import DataSet, Item

BOM = "\ufeff"
REAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "eval"


@functools.cache
def png(color: str = "red") -> bytes:
    """Returns a PNG of 4 x 4 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


@functools.cache
def png64(color: str = "red") -> str:
    """Returns the PNG as base64, longer than any index or path."""
    text = base64.b64encode(png(color)).decode()
    assert len(text) > 64
    return text


def write(root: pathlib.Path, name: str, text: str) -> pathlib.Path:
    """Writes a text file as it is, without changing line ends."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8"))
    return path


def write_image(root: pathlib.Path, name: str, color: str = "red") -> None:
    """Writes a PNG, whatever its name says."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(color))


def write_lines(
    root: pathlib.Path, name: str, rows: Iterable[Mapping], *, end: str = "\n", mark: str = ""
) -> pathlib.Path:
    """Writes JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    return write(root, name, mark + text)


def write_table(
    root: pathlib.Path, name: str, rows: Sequence[Sequence], *, end: str = "\n", mark: str = ""
) -> pathlib.Path:
    """Writes CSV, or TSV by the name."""
    buffer = io.StringIO()
    delimiter = "\t" if name.endswith(".tsv") else ","
    csv.writer(buffer, delimiter=delimiter, lineterminator=end).writerows(rows)
    return write(root, name, mark + buffer.getvalue())


def write_parquet(root: pathlib.Path, name: str, rows: Sequence[Mapping]) -> pathlib.Path:
    """Writes parquet in row groups of two rows."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


def write_arrow(root: pathlib.Path, name: str, rows: Sequence[Mapping]) -> pathlib.Path:
    """Writes an arrow stream, as `save_to_disk` does."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    return path


def read(name: str, root: pathlib.Path) -> DataSet:
    """Reads a benchmark."""
    return readers.read_data_set(records.BENCHMARKS[name], root)


def facts(item: Item) -> tuple[Any, ...]:
    """Returns what is compared: question, options, answer."""
    return item.question, item.options, item.answer
