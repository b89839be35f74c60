"""A small HTTP server that speaks the hub's file protocol, serving local model folders.

Enough for `model_info` and `snapshot_download`: repository information, the tree of a revision, and files by commit with the
headers that the client checks. Start it with `serve({"org/name": folder})` and point HF_ENDPOINT at its `url`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

INFO = re.compile(r"/api/models/([\w.-]+(?:/[\w.-]+)?)(?:/revision/([^/]+))?")
TREE = re.compile(r"/api/models/([\w.-]+(?:/[\w.-]+)?)/tree/([^/]+)")
FILE = re.compile(r"/([\w.-]+(?:/[\w.-]+)?)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """A running server: its address, and what it was asked for."""

    repositories: dict[str, Path]
    url: str = ""
    requests: list[str] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)
    # Repositories that are there for whoever shows a token, and the tokens that were shown.
    tokens: dict[str, str] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)

    def commit(self, repo: str) -> str:
        """Return the commit of a repository: a hash of its files."""
        digest = hashlib.sha1()
        for path in self.files(repo):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    def files(self, repo: str) -> list[Path]:
        """Return the files of a repository."""
        return sorted(path for path in self.repositories[repo].rglob("*") if path.is_file())

    def names(self, repo: str) -> list[str]:
        """Return the relative names of its files."""
        return [path.relative_to(self.repositories[repo]).as_posix() for path in self.files(repo)]

    def downloads(self) -> list[str]:
        """Return the names of the files that were fetched whole."""
        return [unquote(match[3]) for line in self.requests if line.startswith("GET") and (match := FILE.fullmatch(line[4:]))]


@contextmanager
def serve(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve on a free port of the loopback address until the block ends."""
    hub = Hub(dict(repositories))

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, answer in ((TREE, self._tree), (INFO, self._info), (FILE, self._file)):
            match = pattern.fullmatch(path)
            if match:
                repo, revision = match[1], match[2]
                shown = self.headers.get("Authorization", "").removeprefix("Bearer ")
                self.hub.shown.append(shown)
                if repo not in self.hub.repositories or self.hub.tokens.get(repo, shown) != shown:
                    self._error(404, "RepoNotFound", "Repository not found")
                elif repo in self.hub.gated:
                    self._error(403, "GatedRepo", "Access to this model is restricted")
                elif revision not in (None, "main", self.hub.commit(repo)):
                    self._error(404, "RevisionNotFound", "Revision not found")
                else:
                    answer(repo, *match.groups()[2:])
                return
        self._error(404, "", "Not found")

    def _info(self, repo: str) -> None:
        siblings = [{"rfilename": name} for name in self.hub.names(repo)]
        self._json(
            {"_id": "1", "id": repo, "modelId": repo, "sha": self.hub.commit(repo), "private": False, "siblings": siblings}
        )

    def _tree(self, repo: str) -> None:
        root = self.hub.repositories[repo]
        self._json(
            [
                {"type": "file", "path": path.relative_to(root).as_posix(), "size": path.stat().st_size, "oid": _etag(path)}
                for path in self.hub.files(repo)
            ]
        )

    def _file(self, repo: str, name: str) -> None:
        if name not in self.hub.names(repo):
            self._error(404, "EntryNotFound", "Entry not found")
            return
        path = self.hub.repositories[repo] / name
        data = path.read_bytes()
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", ""))) else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{_etag(path)}"')
        self.send_header("X-Repo-Commit", self.hub.commit(repo))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:])

    def _json(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _error(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(path: Path) -> str:
    """The id of a git blob, as the hub gives it for files outside of LFS."""
    data = path.read_bytes()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
