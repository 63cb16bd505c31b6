"""A bucket on this machine: the emulator of PyPI, with what tensorstore needs beside it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest


def free_port() -> int:
    """Returns a port without a listener."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def serve_bucket(name: str) -> Iterator[dict[str, str]]:
    """Serves an empty bucket; yields the environment in which gcsfs and tensorstore use it.

    Skips the test where the emulator or gcsfs is not installed.
    """
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="needs the emulator")
    write_file = emulator.Response.write_file

    # tensorstore reads the generation of an object from this header; the emulator has one for all.
    def write_with_generation(response, *arguments, **options):
        response["x-goog-generation"] = "1"
        write_file(response, *arguments, **options)

    emulator.Response.write_file = write_with_generation
    port = free_port()
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket=name)
    server.start()
    url = f"http://localhost:{port}"
    try:
        yield {
            **os.environ,
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            # gcsfs would request the kind of the bucket from another service of Google.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.stop()
        emulator.Response.write_file = write_file
