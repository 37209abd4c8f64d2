"""A small server of the Hub on this machine: repositories are folders, each with one commit."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """repositories: "models/NAME" or "datasets/NAME" -> folder. Branches are `main` and those of `branches`."""

    repositories: dict[str, Path]
    branches: tuple[str, ...] = ("main",)
    url: str = ""
    asked: list[str] = field(default_factory=list)
    """Files whose contents were fetched, as NAME/FILE."""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(\w[\w-]*)(?:/([^/]+))?(?:/.*)?)?", path):
            kind, name, action, revision = found.groups()
            folder = self.repositories.get(f"{kind}/{name}")
            if folder is None:
                return self._error("RepoNotFound")
            if revision is not None and revision not in (*self.branches, COMMIT):
                return self._error("RevisionNotFound")
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            if action in (None, "revision"):
                siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
                return self._json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            return self._json([self._entry(file, folder) for file in files])
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file_name = found.groups()
            folder = self.repositories.get(f"{'datasets' if kind else 'models'}/{name}")
            if folder is None:
                return self._error("RepoNotFound")
            if revision not in (*self.branches, COMMIT):
                return self._error("RevisionNotFound")
            if not (folder / file_name).is_file():
                return self._error("EntryNotFound")
            contents = (folder / file_name).read_bytes()
            self.asked.append(f"{name}/{file_name}")
            return 200, {"ETag": f'"{_digest(contents)}"', "X-Repo-Commit": COMMIT}, contents
        return self._error("EntryNotFound")

    @staticmethod
    def _entry(file: Path, folder: Path) -> dict[str, Any]:
        contents = file.read_bytes()
        return {
            "type": "file",
            "path": str(file.relative_to(folder)),
            "size": len(contents),
            "oid": _digest(contents),
        }

    @staticmethod
    def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    @staticmethod
    def _error(code: str) -> tuple[int, dict[str, str], bytes]:
        return 404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b"{}"


def _digest(contents: bytes) -> str:
    return hashlib.sha1(contents, usedforsecurity=False).hexdigest()


@contextmanager
def served(hub: Hub) -> Iterator[Hub]:
    """Serve until the end of the block; sets hub.url."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(unquote(urlsplit(self.path).path))
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            self.do_GET()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
