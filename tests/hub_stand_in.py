"""A stand-in for the hub on the loopback interface: it serves a folder as a repository, and takes uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "owner/model"
TOKEN = "hf_tokenOfTheStandInThatMayWrite"
_SMALL = 1000  # bytes of files that are part of a commit; larger ones are uploaded before, as in Git LFS


class HubStandIn:
    """A hub with one repository to download, and any to upload to.

    Attributes:
        endpoint: its address, for ``HF_ENDPOINT``.
        sent: bytes that were sent of each file.
        cut: bytes after which the connection breaks, once for each file named.
        revisions: names beside ``main`` and the commit.
        uploaded: contents of the uploaded files, by repository and path.
        private: whether each repository that was made is private.
    """

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        self.endpoint = endpoint
        self.sent: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        self.revisions: set[str] = set()
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}  # by SHA-256

    def entries(self) -> list[dict[str, Any]]:
        """The files as the hub's API lists them."""
        return [
            {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": name.replace("/", "-")}
            for name in sorted(path.relative_to(self.folder).as_posix() for path in self._files())
        ]

    def environment(self, cache: Path, **further: str) -> dict[str, str]:
        """The environment of a new process that knows this hub and no other; it reads that on import."""
        hidden = ("HF_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HUGGINGFACE")
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
        return kept | {"HF_HOME": str(cache), "HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1"} | further

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
    """The requests that huggingface_hub makes to list, to download and to upload files."""

    protocol_version = "HTTP/1.1"

    @property
    def _hub(self) -> HubStandIn:
        hub: HubStandIn = self.server.hub  # type: ignore[attr-defined]
        return hub

    def do_GET(self) -> None:
        hub, path = self._hub, unquote(urlsplit(self.path).path)
        revisions = ("main", COMMIT, *hub.revisions)
        if path.startswith(f"/{REPOSITORY}/resolve/"):
            self._send_file(path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")[2])
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            self._send_json(hub.entries())
        elif path in (f"/api/models/{REPOSITORY}", *(f"/api/models/{REPOSITORY}/revision/{r}" for r in revisions)):
            siblings = [{"rfilename": entry["path"]} for entry in hub.entries()]
            self._send_json({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif path.startswith(f"/api/models/{REPOSITORY}/revision/"):
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path == "/api/whoami-v2":
            self._send_json({"name": "owner", "type": "user"}) if self._may_write() else self._send(401, b"{}")
        elif (name := path.removeprefix("/api/models/").partition("/revision/")[0]) in hub.uploaded:
            siblings = [{"rfilename": file} for file in hub.uploaded[name]]
            self._send_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": True, "tags": []})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self._content()
        self._hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._send(200, b"")

    def do_POST(self) -> None:
        hub, path, content = self._hub, urlsplit(self.path).path, self._content()
        if path.startswith(f"/api/models/{REPOSITORY}/paths-info/"):
            asked = unquote(content.decode())
            self._send_json([entry for entry in hub.entries() if entry["path"] in asked])
        elif path == "/api/validate-yaml":
            self._send_json({"warnings": [], "errors": []})
        elif not self._may_write():
            self._send(401, b"{}")
        elif path == "/api/repos/create":
            self._create(json.loads(content))
        elif (preupload := re.fullmatch(r"/api/models/(.+)/preupload/main", path)) is not None:
            self._send_json({"files": [_upload_mode(file) for file in json.loads(content)["files"]]})
        elif (batch := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path)) is not None:
            self._send_json(
                {"transfer": "basic", "objects": [self._place(one) for one in json.loads(content)["objects"]]}
            )
        elif (commit := re.fullmatch(r"/api/models/(.+)/commit/main", path)) is not None:
            self._commit(commit[1], [json.loads(line) for line in content.splitlines()])
        else:
            raise AssertionError(f"an unknown request: {path} {preupload} {batch}")

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _content(self) -> bytes:
        """The body, which may come in chunks of unknown number."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _create(self, wanted: Mapping[str, Any]) -> None:
        hub, name = self._hub, f"{wanted.get('organization') or 'owner'}/{wanted['name']}"
        if name in hub.uploaded:
            self._send(409, json.dumps({"error": "exists", "url": f"{hub.endpoint}/{name}"}).encode())
            return
        hub.uploaded[name] = {}
        hub.private[name] = bool(wanted.get("private") or wanted.get("visibility") == "private")
        self._send_json({"url": f"{hub.endpoint}/{name}", "name": name, "id": name})

    def _place(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self._hub.endpoint}/objects/{wanted['oid']}"}}
        return {"oid": wanted["oid"], "size": wanted["size"], "actions": upload}

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        files = self._hub.uploaded[repository]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._hub.objects[value["oid"]]
        self._send_json({"commitUrl": f"{self._hub.endpoint}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

    def _send_file(self, name: str) -> None:
        file = self._hub.folder / name
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
        sent = len(part)
        if self.command == "GET":
            sent = self._hub.cut.pop(name, sent)
            self._hub.sent[name] += sent
        self._send(status, part, headers, sent)

    def _send_json(self, data: Any) -> None:
        self._send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        """Sends an answer; with ``sent`` the connection ends after so many bytes of it."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        self.close_connection = sent is not None and sent < len(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the test's output is pytest's."""


def _upload_mode(file: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": file["path"],
        "uploadMode": "regular" if file["size"] <= _SMALL else "lfs",
        "shouldIgnore": False,
        "oid": None,
    }
