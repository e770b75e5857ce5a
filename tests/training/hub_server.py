"""A Hugging Face Hub on this machine: the part of its interface that huggingface_hub reads a repository through."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT, LATER = "a" * 40, "b" * 40


class HubServer(ThreadingHTTPServer):
    """Repositories by "models/owner/name" or "datasets/owner/name": their branches, and files by commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.branches: dict[str, dict[str, str]] = {}
        self.files: dict[tuple[str, str], Path] = {}
        self.gated: set[str] = set()
        self.served: Counter[str] = Counter()
        """How often each file's content was sent."""
        self.begun = threading.Event()
        """Set when a file is asked for."""
        self.release = threading.Event()
        """Files are sent once it is set."""
        self.release.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, repo: str, directory: Path, commit: str = COMMIT, branch: str = "main") -> None:
        self.branches.setdefault(repo, {})[branch] = commit
        self.files[repo, commit] = directory


class _Handler(BaseHTTPRequestHandler):
    server: HubServer  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":  # /api/models/OWNER/NAME/tree/REVISION; without the last two, /revision/main is meant
            parts = [*parts[1:], "revision", "main"][:5]
        elif parts[0] != "datasets":  # /OWNER/NAME/resolve/REVISION/FILE
            parts = ["models", *parts]
        kind, owner, name, what, revision, *rest = [*parts, "", "", "", ""]
        repo = f"{kind}/{owner}/{name}"
        if repo not in self.server.branches:
            return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"", with_body=with_body)
        if repo in self.server.gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"}, b"", with_body=with_body)
        commit = self.server.branches[repo].get(revision, revision)
        if (repo, commit) not in self.server.files:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", with_body=with_body)
        root = self.server.files[repo, commit]
        files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
        if what == "resolve":
            file = "/".join(rest).rstrip("/")
            content = (root / file).read_bytes()
            if with_body:
                self.server.served[file] += 1
                self.server.begun.set()
                self.server.release.wait(600)
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            return self._send(200, headers, content, with_body=with_body)
        answer: Any = {"id": f"{owner}/{name}", "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        if what == "tree":
            answer = [
                {"type": "file", "path": file, "size": (root / file).stat().st_size, "oid": "0" * 40} for file in files
            ]
        return self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode(), with_body=with_body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, with_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: what was asked is counted."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """In a thread of this process."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
