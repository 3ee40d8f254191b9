"""A hub on this machine: what of its protocol fetching a checkpoint needs, and its cache as it lies on disk."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/?]+))?(?:\?.*)?")
FILE = re.compile(rf"/(?P<name>[^/]+/[^/]+)/resolve/{COMMIT}/(?P<file>.+)")


class Hub:
    """`repositories`: files by name; `gated`: names that ask for a login; `fetched`: files that were sent."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.fetched: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Code, headers, body."""
        match = API.fullmatch(path) or FILE.fullmatch(path)
        if match is None or (files := self.repositories.get(match["name"])) is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if match["name"] in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        parts = match.groupdict()
        if "file" in parts:
            return self._file(files, parts["file"])
        if parts["revision"] not in (None, "main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        found: Any = {"id": match["name"], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if parts["what"] == "tree":
            found = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def _file(self, files: dict[str, bytes], name: str) -> tuple[int, dict[str, str], bytes]:
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        tag = hashlib.sha1(files[name]).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, files[name]


@contextmanager
def serving() -> Iterator[Hub]:
    """The hub, ended at the end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, headers, body = hub.answer(self.path)
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                if (match := FILE.fullmatch(self.path)) is not None:
                    hub.fetched.append(match["file"])

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def cached(cache: Path, name: str, files: dict[str, bytes], revision: str = "main") -> Path:
    """The folder of a snapshot in the published layout of the hub's cache."""
    root = cache / f"models--{name.replace('/', '--')}"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
    for file, data in files.items():
        blob = root / "blobs" / hashlib.sha1(data).hexdigest()
        blob.write_bytes(data)
        (root / "snapshots" / COMMIT / file).symlink_to(Path("../../blobs") / blob.name)
    return root / "snapshots" / COMMIT
