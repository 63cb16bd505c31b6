"""Writes files of benchmarks in their published forms, from rows by hand."""

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
    """Writes a PNG, whatever the suffix of its name is."""
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


def image_bytes(item: Item) -> list[bytes]:
    """Returns the images of an item."""
    return [image.read() for image in item.images]


IIT_WORDS = ("jar", "door", "shoe", "lamp", "rope", "cake", "wall", "boat")


def write_iit_data(root: pathlib.Path) -> pathlib.Path:
    """Writes PIQA, OpenBookQA, GSM8K and NLVR, as `iit-mini` has them."""
    rows = [
        {"goal": f"Open the {word}", "sol1": f"turn the {word}", "sol2": f"eat the {word}"}
        for word in IIT_WORDS
    ]
    write_lines(root, "piqa/valid.jsonl", rows)
    write(root, "piqa/valid-labels.lst", "0\n" * len(rows))
    questions = [
        {
            "id": f"q{number}",
            "question": {
                "stem": f"What is the {word} made of?",
                "choices": [
                    {"text": text, "label": label}
                    for label, text in zip("ABC", ("wood", "iron", "milk"), strict=True)
                ],
            },
            "answerKey": "B",
        }
        for number, word in enumerate(IIT_WORDS)
    ]
    write_lines(root, "openbookqa/Main/test.jsonl", questions)
    sums = [
        {"question": f"How many {word}s are two and {n}?", "answer": f"2 + {n}\n#### {n + 2}"}
        for n, word in enumerate(IIT_WORDS)
    ]
    write_lines(root, "gsm8k/test.jsonl", sums)
    sentences = [
        {"sentence": f"There is a {word}.", "label": "true", "identifier": f"{n}-0", "directory": 0}
        for n, word in enumerate(IIT_WORDS)
    ]
    write_lines(root, "nlvr/dev/dev.json", sentences)
    for number in range(len(IIT_WORDS)):
        write_image(root, f"nlvr/dev/images/0/dev-{number}-0-0.png", ("red", "blue")[number % 2])
    return root
