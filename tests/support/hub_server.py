"""A local server that answers as the Hugging Face hub does: repositories, commits, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

SHA = "a" * 40


class Hub:
    """What the server has been given.

    Attributes:
        files: repository -> path -> content.
        private: repository -> whether it was made private.
        tokens: authorisation headers of all requests.
        messages: summaries of the commits.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.tokens: list[str | None] = []
        self.messages: list[str] = []
        self.address = ""


class Handler(BaseHTTPRequestHandler):
    """Answers of the hub."""

    hub: Hub

    def do_POST(self) -> None:
        body = self._body()
        self.hub.tokens.append(self.headers.get("Authorization"))
        path = urlsplit(self.path).path
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name'].rpartition('/')[2]}"
            self.hub.files.setdefault(name, {})
            self.hub.private[name] = bool(request.get("private") or request.get("visibility") == "private")
            self._json({"url": f"{self.hub.address}/{name}", "name": name})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
                    ]
                }
            )
        elif "/commit/" in path:
            self._commit(path, body)
        else:  # /api/validate-yaml and the like
            self._json({"errors": [], "warnings": []})

    def _commit(self, path: str, body: bytes) -> None:
        name = "/".join(path.split("/")[3:5])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "header":
                self.hub.messages.append(entry["value"]["summary"])
        url = f"{self.hub.address}/{name}/commit/{SHA}"
        self._json({"success": True, "commitUrl": url, "commitOid": SHA, "hookOutput": ""})

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            self._api(parts)
        else:
            self._file("/".join(parts[:2]), "/".join(parts[4:]))

    do_HEAD = do_GET

    def _api(self, parts: list[str]) -> None:
        name = "/".join(parts[2:4])
        if name not in self.hub.files:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "tree" in parts:
            files = self.hub.files[name].items()
            self._json([{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files])
        else:
            siblings = [{"rfilename": path} for path in self.hub.files[name]]
            self._json({"id": name, "sha": SHA, "siblings": siblings, "tags": [], "private": True})

    def _file(self, name: str, path: str) -> None:
        content = self.hub.files.get(name, {}).get(path)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": SHA})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Print nothing."""


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub on this machine until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
