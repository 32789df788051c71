"""A small HTTP server that speaks what huggingface_hub asks of the hub: revisions, trees and files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Repositories by id: each has commits (files by path) and branches.

    Attributes:
        requests: (method, path, authorization) of every request, in order.
        token: Without it, `private/*` does not exist.
        down: Whether every request fails with 503.
        broken: Files that fail so.
        moved: What a repository is called by now.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.token = "hf_secret"
        self.down = False
        self.broken: set[str] = set()
        self.moved: dict[str, str] = {}
        self.url = ""

    def push(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commits *files*; returns the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.branches.setdefault(repo, {})[branch] = commit
        return commit

    def answer(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET; errors as the hub gives them, by `X-Error-Code`."""
        if self.down:
            return 503, {}, b""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in self.commits or (repo.startswith("private/") and authorization != f"Bearer {self.token}"):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if repo.startswith("gated/"):
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        kind, revision, rest = (parts[4], parts[5], parts[6:]) if api else (parts[2], parts[3], parts[4:])
        commit = self.branches[repo].get(revision, revision)
        files = self.commits[repo].get(commit)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if kind == "revision":
            return (
                200,
                {},
                json.dumps({"id": self.moved.get(repo, repo), "sha": commit, "private": False, "tags": []}).encode(),
            )
        if kind == "tree":
            tree = [
                {"type": "file", "oid": _oid(data), "size": len(data), "path": name} for name, data in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        name = "/".join(rest)
        if name in self.broken:
            return 503, {}, b""
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(files[name])}"'}
        return 200, headers, files[name]


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


@contextmanager
def serving_hub() -> Iterator[FakeHub]:
    """Serves a hub on a free port of loopback."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            authorization = self.headers.get("authorization")
            hub.requests.append((self.command, self.path, authorization))
            status, headers, body = hub.answer(self.path, authorization)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
