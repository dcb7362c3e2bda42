"""A server on this machine that speaks the Hugging Face Hub's protocol as far as models need it, faults included."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_checksum(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Repository:
    """Files by name; everything is of one commit. `access`: "open", "gated" or "private"."""

    files: dict[str, bytes] = field(default_factory=dict)
    access: str = "open"
    commit: str = COMMIT


@dataclass
class Hub:
    """What the server holds, what it was asked, and what it does wrong.

    requests: method and path of each; ranges: the Range header of each request for content.
    break_once, break_always: by file name, after how many bytes the connection is dropped.
    garbled: files whose content arrives with a byte changed.
    """

    address: str = ""
    token: str = "hf_secret"
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    break_once: dict[str, int] = field(default_factory=dict)
    break_always: dict[str, int] = field(default_factory=dict)
    garbled: set[str] = field(default_factory=set)
    status: int = 200
    uploads: dict[str, bytes] = field(default_factory=dict)

    @property
    def content_address(self) -> str:
        """Where large files are: another host, as far as a client can tell, to which no token may go."""
        return self.address.replace("127.0.0.1", "localhost")

    def add(self, repo_id: str, folder: Path | None = None, **files: bytes) -> Repository:
        read = {path.name: path.read_bytes() for path in folder.iterdir()} if folder else {}
        self.repositories[repo_id] = Repository({**read, **files})
        return self.repositories[repo_id]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer_file(with_content=False)

    def do_GET(self) -> None:
        if self.path.startswith("/content/"):
            self._send_content()
        else:
            self._answer_file(with_content=True)

    # Downloading

    def _answer_file(self, with_content: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path).lstrip("/")
        repo_id, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        repository = self.hub.repositories.get(repo_id)
        if self.hub.status != 200:
            return self._fail(self.hub.status)
        if repository is None or (repository.access == "private" and not self._is_known()):
            return self._fail(401 if not self._is_known() else 404, "RepoNotFound")
        if repository.access == "gated" and not self._is_known():
            return self._fail(401, "GatedRepo")
        if revision not in ("main", repository.commit):
            return self._fail(404, "RevisionNotFound")
        content = repository.files.get(name)
        if content is None:
            return self._fail(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
        headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if name.endswith(LARGE):  # as Git LFS: elsewhere, under its SHA-256
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                "ETag": '"of-the-pointer"',
                "Location": f"{self.hub.content_address}/content/{repo_id}/{name}",
            }
            return self._send(302, headers, b"")
        headers["ETag"] = f'"{git_checksum(content)}"'
        if not with_content:
            return self._send(200, {**headers, "Content-Length": str(len(content))}, None)
        return self._send_bytes(name, content, headers)

    def _send_content(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        assert "Authorization" not in self.headers
        organisation, repository, name = unquote(self.path).removeprefix("/content/").split("/")
        content = self.hub.repositories[f"{organisation}/{repository}"].files[name]
        self._send_bytes(name, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def _send_bytes(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        if name in self.hub.garbled:
            content = bytes([content[0] ^ 1]) + content[1:]
        asked = self.headers.get("Range")
        self.hub.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        part = content[start:]
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        limit = self.hub.break_once.pop(name, None)
        if limit is None and name in self.hub.break_always:
            limit = max(0, self.hub.break_always[name] - start)
        self.send_response(206 if asked else 200)
        for key, value in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(part if limit is None else part[:limit])
        if limit is not None and limit < len(part):
            self.wfile.flush()
            self.close_connection = True

    # Uploading

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        self.hub.uploads[self.path.rsplit("/", 1)[1]] = self._body()
        self._send(200, {}, b"")

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"POST {path}")
        body = self._body()
        if path == "/api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if not self._is_known():
            return self._fail(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}"
            self.hub.repositories.setdefault(repo_id, Repository(access=asked.get("visibility") or "open"))
            return self._send_json({"url": f"{self.hub.address}/{repo_id}"})
        if path.endswith("/objects/batch"):
            objects = [self._upload_action(part["oid"]) | part for part in json.loads(body)["objects"]]
            return self._send_json({"transfer": "basic", "objects": objects})
        repo_id = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send_json({"files": files})
        if "/commit/" in path:
            self._commit(self.hub.repositories[repo_id], body)
            return self._send_json({"commitUrl": f"{self.hub.address}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT})
        return self._fail(404)

    def _upload_action(self, oid: str) -> dict:
        return {"actions": {"upload": {"href": f"{self.hub.address}/upload/{oid}"}}}

    def _commit(self, repository: Repository, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploads[value["oid"]]

    # What all share

    def _is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send_json(self, content: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _fail(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(status, {**named, **(headers or {})}, b"")

    def _send(self, status: int, headers: dict[str, str], content: bytes | None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if content is not None:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if content and self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers for as long as the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
