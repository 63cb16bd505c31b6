"""Writing files so that nobody ever finds half of one.

Everything is written under a temporary name in the same directory and renamed when it is whole:
a reader finds the old file or the new one, also after a crash or on a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from wings_jax.errors import UserError


def check_writable(directory: str | os.PathLike, flag: str) -> None:
    """Raises UserError naming `flag` if nothing can be written below a present or new directory."""
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
    path = pathlib.Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> pathlib.Path:
    """Writes UTF-8 text atomically and returns the path. Raises UserError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return pathlib.Path(path)


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
    path = pathlib.Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; give another output or remove it")

    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        if shutil.disk_usage(temporary).free < need_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield temporary
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
