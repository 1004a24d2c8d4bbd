# SPDX-License-Identifier: Apache-2.0
"""A model hub on loopback that serves folders under ids, as huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOST = "127.0.0.1"
_COMMIT = "0" * 40
_API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)(?P<rest>/.*)?")
_FILE = re.compile(r"/(?P<id>[^/]+/[^/]+)/resolve/[^/]+/(?P<name>.+)")


@contextmanager
def loopback_hub(folders: Mapping[str, Path], home: Path) -> Iterator[dict[str, str]]:
    """Serve `folders` by id; yields the variables that send huggingface_hub here, and nowhere else.

    home: where what is downloaded is kept.
    """
    server = ThreadingHTTPServer((HOST, 0), _handler(folders))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield {
            "HF_ENDPOINT": f"http://{HOST}:{server.server_address[1]}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@cache
def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


def _handler(folders: Mapping[str, Path]) -> type[BaseHTTPRequestHandler]:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            if match := _API.fullmatch(path):
                self._describe(match["id"], match["rest"] or "")
            elif match := _FILE.fullmatch(path):
                self._file(match["id"], match["name"], body)
            else:
                self._send(404, b"")

        def _describe(self, model: str, rest: str) -> None:
            if model not in folders:
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
                return
            files = sorted(file for file in folders[model].iterdir() if file.is_file())
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]
            whole = {
                "id": model, "modelId": model, "sha": _COMMIT, "private": False, "gated": False, "disabled": False,
                "tags": [], "downloads": 0, "likes": 0, "siblings": [{"rfilename": f.name} for f in files],
            }  # fmt: skip
            self._send(200, json.dumps(entries if rest.startswith("/tree/") else whole).encode())

        def _file(self, model: str, name: str, body: bool) -> None:
            file = folders.get(model, Path("/nowhere")) / name
            if not file.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT})
                return
            headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": _COMMIT, "Accept-Ranges": "bytes"}
            self._send(200, file.read_bytes(), headers, body)

        def _send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None, body: bool = True) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

    return Hub
