"""A stand-in for the Hugging Face hub on 127.0.0.1 that serves directories as repositories."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(http.server.ThreadingHTTPServer):
    """Serves `repositories` (id -> directory) and lists the files that were downloaded."""

    def __init__(self, repositories: Mapping[str, pathlib.Path]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = dict(repositories)
        self.downloads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` asks: a repository's files, and their content."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Prints nothing."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/(revision|tree)/.*)?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        match = api or resolve
        directory = match and self.server.repositories.get(match[1])
        if directory is None:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
        elif api:
            files = describe_files(directory)
            listing: object = files
            if api[3] != "tree":
                siblings = [{"rfilename": file["path"]} for file in files]
                listing = {"id": api[1], "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(listing).encode(), {}, with_body=with_body)
        else:
            self.send_file(directory / resolve[2], with_body=with_body)

    def send_file(self, file: pathlib.Path, *, with_body: bool) -> None:
        if not file.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
            return
        content = file.read_bytes()
        if with_body:
            self.server.downloads.append(file.name)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self.send(200, content, headers, with_body=with_body)

    def send(
        self, status: int, content: bytes, headers: Mapping[str, str], *, with_body: bool
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def describe_files(directory: pathlib.Path) -> list[dict[str, object]]:
    """Returns what the hub lists of a repository's files."""
    return [
        {
            "type": "file",
            "path": file.relative_to(directory).as_posix(),
            "size": file.stat().st_size,
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
        }
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    ]


@contextlib.contextmanager
def serve(repositories: Mapping[str, pathlib.Path]) -> Iterator[HubServer]:
    """Runs the server in a thread."""
    server = HubServer(repositories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
