"""Writing whole files or none, on a disk or in a bucket.

On a disk, everything is written under a temporary name in the same directory and renamed when it
is whole: a reader finds the old file or the new one, also after a crash or on a full disk. In a
bucket (`gs://`) an object appears when it is whole, so a file is written locally and uploaded.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from wings_jax.errors import UserError


def is_url(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket.

    >>> is_url("gs://bucket/runs/stage1"), is_url("runs/stage1")
    (True, False)
    """
    return "://" in str(path)


def as_path(path: str | os.PathLike, flag: str = "") -> pathlib.Path:
    """Returns a local path, or the `etils.epath` of a bucket, which has its methods.

    Raises:
      UserError: naming `flag`, for a bucket that cannot be reached or is of an unknown kind.
    """
    if not is_url(path):
        return pathlib.Path(path)

    prefix = f"{flag}: " if flag else ""

    if not str(path).startswith("gs://"):
        raise UserError(f"{prefix}{path}: only local paths and gs:// are supported")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{prefix}{path}: gs:// needs gcsfs: pip install 'wings_jax[gcs]'")

    from etils import epath  # slow to import, and only needed here

    remote: Any = epath.Path(str(path))
    return remote


def size_of(path: pathlib.Path) -> int:
    """Returns the bytes of a file, of `as_path`."""
    stat: Any = path.stat()  # that of etils has other names
    return stat.length if is_url(path) else stat.st_size


def list_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns all files below a directory, of `as_path`, sorted."""
    if not is_url(directory):
        return sorted(path for path in directory.rglob("*") if path.is_file())

    # Paths in a bucket have no rglob, and `walk` has them without gs://.
    remote: Any = directory
    listed = []
    for root, _, names in remote.walk():
        parent = as_path(root if is_url(root) else f"gs://{root}")
        listed += [parent / name for name in names]
    return sorted(listed)


def absolute_path(path: str | os.PathLike) -> pathlib.Path:
    """Returns `as_path(path)`, absolute if it is local."""
    return as_path(path) if is_url(path) else pathlib.Path(path).absolute()


def check_bucket(path: str | os.PathLike, flag: str) -> None:
    """Raises UserError naming `flag` if a bucket cannot be read; local paths pass."""
    if not is_url(path):
        return

    as_path(path, flag)  # a URL of another kind is refused as a whole

    # gs://NAME of gs://NAME/runs/stage1.
    bucket = as_path("/".join(str(path).split("/")[:3]), flag)

    import aiohttp  # gcsfs needs them; local paths do not
    import gcsfs.retry
    import google.auth.exceptions as auth

    failures = (OSError, aiohttp.ClientError, gcsfs.retry.HttpError, auth.GoogleAuthError)
    try:
        is_there = bucket.exists()
    except failures as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag}: {bucket} cannot be reached: {reason[:200]}") from error

    if not is_there:
        raise UserError(f"{flag}: the bucket {bucket} does not exist, or it may not be read")


def check_writable(directory: str | os.PathLike, flag: str) -> None:
    """Raises UserError naming `flag` if nothing can be written below a present or new directory.

    In a bucket only its existence is checked: there are no directories.
    """
    if is_url(directory):
        check_bucket(directory, flag)
        return

    # The nearest directory that exists: those below it would be created.
    existing = pathlib.Path(directory).absolute()
    while not existing.exists():
        existing = existing.parent

    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{flag}: cannot write to {existing}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path; what was written there replaces `path` if the block succeeds.

    Missing parent directories are created. If the block raises, `path` stays as it was.

    Raises:
      UserError: the file cannot be written; the message names `path`.
    """
    if is_url(path):
        with tempfile.TemporaryDirectory(prefix="wings-") as directory:
            local = pathlib.Path(directory) / str(path).rpartition("/")[2]
            yield local

            # Not reached if the block raises: the object stays as it was.
            upload(local, path)
        return

    path = pathlib.Path(path)

    # In the same directory, because a rename across file systems is not atomic.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        # After a successful rename it does not exist any more.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def upload(local: pathlib.Path, path: str | os.PathLike) -> None:
    """Copies a local file into a bucket. Raises UserError naming `path` if that fails."""
    try:
        as_path(path).write_bytes(local.read_bytes())
    except OSError as error:  # gcsfs's errors are OSErrors
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: str | os.PathLike, text: str) -> pathlib.Path:
    """Writes UTF-8 text atomically and returns the path. Raises UserError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return as_path(path) if is_url(path) else pathlib.Path(path)


def write_json(path: str | os.PathLike, content: Any) -> pathlib.Path:
    """Writes indented JSON atomically, else as `write_text`."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, *, need_bytes: int = 0) -> Iterator[pathlib.Path]:
    """Yields a temporary directory beside `path`, renamed to `path` if the block succeeds.

    Raises:
      UserError: `path` exists and is not empty, cannot be written, or the disk has less than
        `need_bytes` free.
    """
    if is_url(path):
        raise UserError(f"{path}: a local directory is needed; copy it to the bucket afterwards")

    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; give another output or remove it")

    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        # disk_usage needs a directory that exists.
        if shutil.disk_usage(temporary).free < need_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        yield temporary

        # An empty directory was allowed above.
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            needed = f" ({need_bytes / 1e9:.1f} GB needed)" if need_bytes else ""
            raise UserError(f"no space left to write {path}{needed}") from error
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
