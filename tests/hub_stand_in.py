"""A stand-in for the hub on the loopback interface: it serves a folder as a repository, and counts what it sends."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/model"


class HubStandIn:
    """A hub with one repository.

    Attributes:
        endpoint: its address, for ``HF_ENDPOINT``.
        sent: bytes that were sent of each file.
    """

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        self.endpoint = endpoint
        self.sent: Counter[str] = Counter()

    def entries(self) -> list[dict[str, Any]]:
        """The files as the hub's API lists them."""
        return [
            {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": name.replace("/", "-")}
            for name in sorted(path.relative_to(self.folder).as_posix() for path in self._files())
        ]

    def _files(self) -> Iterator[Path]:
        return (path for path in self.folder.rglob("*") if path.is_file())


@contextmanager
def hub_stand_in(folder: Path) -> Iterator[HubStandIn]:
    """Serves a folder as ``owner/model``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = HubStandIn(folder, f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]  # the handler finds it there
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """The requests that huggingface_hub makes to list and to download files."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: HubStandIn = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/{REPOSITORY}/resolve/"):
            self._send_file(hub, path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")[2])
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self._send_json(hub.entries())
        elif path in (
            f"/api/models/{REPOSITORY}",
            *(f"/api/models/{REPOSITORY}/revision/{r}" for r in ("main", COMMIT)),
        ):
            siblings = [{"rfilename": entry["path"]} for entry in hub.entries()]
            self._send_json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self._send(404, b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        hub: HubStandIn = self.server.hub  # type: ignore[attr-defined]
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._send_json([entry for entry in hub.entries() if entry["path"] in unquote(asked)])

    def _send_file(self, hub: HubStandIn, name: str) -> None:
        file = hub.folder / name
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, part = 200, content
        if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is not None:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            status, part = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(status, part, headers)
        if self.command == "GET":
            hub.sent[name] += len(part)

    def _send_json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the test's output is pytest's."""
