"""A stand-in for the Hugging Face hub on 127.0.0.1 that serves directories as repositories."""

from __future__ import annotations

import base64
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
    """Serves `repositories` (id -> directory), takes uploads, and lists what was asked for.

    downloads   names of the files that were downloaded
    ranges      Range headers of downloads that were resumed
    gated       ids whose files are refused
    revisions   branches and tags that exist; commits are not checked
    cut         name of a file whose first download breaks off in the middle
    commits     repository id -> (message, file -> content) of every commit
    token       the token that may write, in the account `owner`
    """

    owner, token = "me", "hf_write"

    def __init__(self, repositories: Mapping[str, pathlib.Path]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = dict(repositories)
        self.downloads: list[str] = []
        self.ranges: list[str] = []
        self.gated: set[str] = set()
        self.revisions = {"main", COMMIT}
        self.cut = ""
        self.created: dict[str, bool] = {}  # id -> is it private?
        self.blobs: dict[str, bytes] = {}  # SHA-256 -> content of large files
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}

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
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or resolve
        directory = match and self.server.repositories.get(match[1])
        revision = (api[4] or "main") if api else resolve and resolve[2]
        if directory is None:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
        elif revision not in self.server.revisions:
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body=with_body)
        elif resolve and match[1] in self.server.gated:
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, with_body=with_body)
        elif api:
            files = describe_files(directory)
            listing: object = files
            if api[3] != "tree":
                siblings = [{"rfilename": file["path"]} for file in files]
                listing = {"id": api[1], "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(listing).encode(), {}, with_body=with_body)
        else:
            self.send_file(directory / resolve[3], with_body=with_body)

    def send_file(self, file: pathlib.Path, *, with_body: bool) -> None:
        if not file.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body=with_body)
            return
        content = file.read_bytes()
        if with_body:
            self.server.downloads.append(file.name)
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if with_body and file.name == self.server.cut:
            self.server.cut = ""
            self.send(200, content, headers, with_body=True, sent_bytes=len(content) // 2)
            return

        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if with_body else None
        if asked is None:
            self.send(200, content, headers, with_body=with_body)
            return
        self.server.ranges.append(asked[0])
        start, size = int(asked[1]), len(content)
        headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send(206, content[start:], headers, with_body=True)

    def do_PUT(self) -> None:
        """Takes a large file, at the address that the batch request gave out."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self.send(200, b"", {}, with_body=True)

    def do_POST(self) -> None:
        """Creates repositories and takes commits, of the owner of the token only."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.urlsplit(self.path).path
        if path == "/api/validate-yaml":
            self.send_json(200, {"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.send_json(401, {"error": "Invalid credentials"})
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.send_json(200, {"files": files})
        elif re.fullmatch(r"/.+\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
            self.send_json(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self.commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.send_json(404, {})

    def create(self, request: Mapping[str, object]) -> None:
        """Creates an empty repository."""
        repo = f"{request.get('organization') or self.server.owner}/{request['name']}"
        if not repo.startswith(f"{self.server.owner}/"):
            self.send_json(403, {"error": "You don't have the rights to create a model here"})
        elif repo in self.server.created:
            url = f"{self.server.url}/{repo}"
            self.send_json(409, {"error": "You already created this model repo", "url": url})
        else:
            is_private = request.get("private") or request.get("visibility") == "private"
            self.server.created[repo] = bool(is_private)
            self.send_json(200, {"url": f"{self.server.url}/{repo}", "id": repo})

    def commit(self, repo: str, lines: list[dict]) -> None:
        """Takes a commit: a header, then a file a line."""
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.server.blobs[value["oid"]]
        summary = lines[0]["value"]["summary"]
        self.server.commits.setdefault(repo, []).append((summary, files))
        url = f"{self.server.url}/{repo}/commit/{COMMIT}"
        self.send_json(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})

    def send_json(self, status: int, content: object) -> None:
        self.send(status, json.dumps(content).encode(), {}, with_body=True)

    def send(
        self,
        status: int,
        content: bytes,
        headers: Mapping[str, str],
        *,
        with_body: bool,
        sent_bytes: int | None = None,
    ) -> None:
        """Answers; with `sent_bytes` the connection is closed after so many of the content."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content[:sent_bytes])
        if sent_bytes is not None:
            self.close_connection = True


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
