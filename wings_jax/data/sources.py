"""The samples of a data file or directory, by index, whatever its format.

`FORMATS` is the table of the file formats; `records.FORMS` is that of the records in them.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Protocol

from wings_jax import files
from wings_jax.data import bucket, samples, table_source
from wings_jax.data import images as image_files
from wings_jax.data.json_source import JsonSource
from wings_jax.data.prepared import PreparedSource
from wings_jax.data.table_source import ArrowSource
from wings_jax.data.tar_source import TarSource
from wings_jax.errors import UserError


class SampleSource(Protocol):
    """Samples by index. Index i gives the same sample in any thread or process."""

    fingerprint: str
    """Changes when the text of the samples does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> samples.Sample: ...


@dataclasses.dataclass(frozen=True)
class FileFormat:
    """How a data file is read.

    by_line    whether every line is a JSON record; else the file is one list
    delimiter  between the cells of a text table, "" for other files
    is_table   whether it is an arrow or parquet table
    is_tar     whether it is a shard of a WebDataset
    """

    by_line: bool = False
    delimiter: str = ""
    is_table: bool = False
    is_tar: bool = False


# Suffix in lower case -> format; JSON and text tables may be compressed (.jsonl.gz).
FORMATS = {
    ".json": FileFormat(),
    ".jsonl": FileFormat(by_line=True),
    ".ndjson": FileFormat(by_line=True),
    ".csv": FileFormat(delimiter=","),
    ".tsv": FileFormat(delimiter="\t"),
    ".parquet": FileFormat(is_table=True),
    ".arrow": FileFormat(is_table=True),
    ".tar": FileFormat(is_tar=True),
}


def open_source(
    path: str | os.PathLike, *, images: str | os.PathLike | None = None, split: str = "train"
) -> SampleSource:
    """Returns the samples of `path`.

    Args:
      path: a file of one of `FORMATS`, a directory that tensorflow-datasets wrote in array_record,
        or one with arrow, parquet or tar files, local or gs://. Files with another suffix are read
        as JSON lists.
      images: the directory that the records' image paths are relative to; by default the file's.
      split: the split of a directory, e.g. "train" or, for tensorflow-datasets, "train[:10%]".

    Raises:
      UserError: the path is missing, unreadable, malformed (with line and column) or empty.
    """
    path = files.as_path(path, "data file")
    try:
        exists = path.exists()
    except OSError as error:  # such as a name that is too long
        raise UserError(f"data file {path} cannot be read: {error.strerror or error}") from error

    if not exists:
        raise UserError(f"data file {samples.printable(str(path))} does not exist")

    # Image paths are relative to the directory of the data unless another is given.
    base = path if path.is_dir() else path.parent
    image_directory = base if images is None else files.as_path(images, "image directory")
    if not image_directory.is_dir():
        raise UserError(f"image directory {image_directory} of data file {path} does not exist")

    if files.is_url(path):
        source = _open_in_bucket(path, image_directory, split)
    elif path.is_dir():
        source = _open_directory(path, image_directory, split)
    else:
        source = _open_file(path, image_directory)

    if not len(source):
        raise UserError(f"data file {path} has no samples")
    return source


def _open_in_bucket(path: pathlib.Path, images: pathlib.Path, split: str) -> SampleSource:
    """Returns the samples of a file or directory in a bucket, from a temporary local copy.

    The readers of tables, tar files and array_record need local files. Images that records name
    by path are not copied: each is read from the bucket when its sample is.
    """
    copied = bucket.copy_data(path)

    try:
        is_directory = copied.local.is_dir()
        source = (
            _open_directory(copied.local, images, split)
            if is_directory
            else _open_file(copied.local, images)
        )
    except UserError as error:
        # The user knows the file by its place in the bucket.
        raise UserError(str(error).replace(str(copied.local), str(path))) from error

    # Another copy has another path and time, but the same text.
    source.fingerprint = f"{copied.fingerprint} {split}"
    return source


def _open_file(path: pathlib.Path, images: pathlib.Path) -> SampleSource:
    _refuse_lfs_pointer(path)

    # The last suffix may be .gz; the one before it names the format.
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if is_compressed else suffixes)[-1:] or [""]
    file_format = FORMATS.get(suffix[0], FileFormat())

    if file_format.is_table:
        return ArrowSource(path, [path], images)
    if file_format.is_tar:
        return TarSource(path, [path], images)

    # Text tables are converted to JSONL, so that there is one reader of records.
    content = table_source.decompress(path) if is_compressed else path
    if file_format.delimiter:
        content = table_source.csv_to_jsonl(path, content, file_format.delimiter)
    by_line = file_format.by_line or bool(file_format.delimiter)
    return JsonSource(path, images, by_line=by_line, content=content)


def _open_directory(path: pathlib.Path, images: pathlib.Path, split: str) -> SampleSource:
    """Returns the samples of a directory of tables, tar shards or of tensorflow-datasets."""
    if (path / "dataset_dict.json").is_file():  # several data sets, as `datasets` saves them
        path = path / split
        if not path.is_dir():
            raise UserError(f"data directory {path.parent} has no split {split!r}")

    shards = sorted([*path.glob("*.arrow"), *path.glob("*.parquet")])
    # A pointer would be reported as a damaged table.
    for shard in shards:
        _refuse_lfs_pointer(shard)
    if shards:
        return ArrowSource(path, shards, images)

    tar_files = sorted(path.glob("*.tar"))
    return TarSource(path, tar_files, images) if tar_files else PreparedSource(path, split)


def _refuse_lfs_pointer(path: pathlib.Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(len(image_files.LFS_POINTER))
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from error
    if head == image_files.LFS_POINTER:
        raise UserError(f"data file {path} is a git-lfs pointer, not the file: run git lfs pull")
