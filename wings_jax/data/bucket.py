"""Local copies of data files in a bucket, for readers that need local files."""

from __future__ import annotations

import atexit
import dataclasses
import pathlib
import shutil
import sys
import tempfile
from typing import Any

from wings_jax.errors import UserError

# Files of a directory that are data, by suffix; the images beside them are not copied.
_TABLE_SUFFIXES = (".arrow", ".parquet", ".tar")
_NOTE_SUFFIXES = (".json", ".txt")  # what the directory says about itself
_SHARD_PART = ".array_record-"  # in the names of prepared shards
_BLOCK = 16 << 20  # bytes that are copied at a time


@dataclasses.dataclass(frozen=True)
class CopiedData:
    """A copy that is removed when the process ends.

    local        the file or directory
    fingerprint  changes when a file in the bucket does
    """

    local: pathlib.Path
    fingerprint: str


def copy_data(path: pathlib.Path) -> CopiedData:
    """Returns a local copy of a data file in a bucket, or of the data files of a directory.

    Raises:
      UserError: a file cannot be read, there is none, or there is no space for them.
    """
    import tqdm  # not needed for --help

    temporary = pathlib.Path(tempfile.mkdtemp(prefix="wings-data-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    local = temporary / path.name

    try:
        found = _data_files(path) if path.is_dir() else [path]
        # Those of etils, not of os.stat.
        stats: list[Any] = [file.stat() for file in found]
        sizes = [stat.length for stat in stats]
        times = [stat.mtime for stat in stats]
        _check_space(path, temporary, sum(sizes))

        with tqdm.tqdm(
            total=sum(sizes), desc=f"copying {path}", unit="B", unit_scale=True, disable=None
        ) as progress:
            for file in found:
                target = local / file.relative_to(path) if path.is_dir() else local
                target.parent.mkdir(parents=True, exist_ok=True)
                _copy(file, target, progress)
    except OSError as error:
        raise UserError(f"data file {path} cannot be copied: {error.strerror or error}") from error

    names = [str(file) for file in found]
    return CopiedData(local, f"{path} {[*zip(names, sizes, times, strict=True)]}")


def _data_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the data files of a directory, or of its splits. Raises UserError without one."""
    found: list[pathlib.Path] = []
    # Below the directory: a split of `datasets`, or the version of a tensorflow-datasets' data set.
    for pattern in ("*", "*/*", "*/*/*"):
        entries = sorted(path.glob(pattern))
        tables = [entry for entry in entries if _is_table(entry)]
        found += tables + [entry for entry in entries if entry.suffix in _NOTE_SUFFIXES]
        if tables:
            return found

    raise UserError(f"data directory {path}: no tables, tar files or prepared shards")


def _is_table(path: pathlib.Path) -> bool:
    return path.suffix.lower() in _TABLE_SUFFIXES or _SHARD_PART in path.name


def _check_space(path: pathlib.Path, directory: pathlib.Path, size: int) -> None:
    free = shutil.disk_usage(directory).free
    if size > free:
        raise UserError(
            f"data file {path}: its copy of {size / 1e9:.1f} GB does not fit into "
            f"{directory.parent} ({free / 1e9:.1f} GB free); set TMPDIR to a larger disk"
        )

    # One line, so that nobody wonders what a start waits for.
    if size > _BLOCK:
        print(f"copying {size / 1e9:.2f} GB of {path} to {directory}", file=sys.stderr, flush=True)


def _copy(file: pathlib.Path, target: pathlib.Path, progress: Any) -> None:
    """Copies a file; `progress` is a bar of tqdm that counts bytes."""
    with file.open("rb") as source, target.open("wb") as copy:
        while block := source.read(_BLOCK):
            copy.write(block)
            progress.update(len(block))
