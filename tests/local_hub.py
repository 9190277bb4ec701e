"""A server on this machine that speaks the part of the Hugging Face Hub's API which push and pull use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".png")  # the endings that the Hub stores as large files, named by their SHA-256


@dataclass
class Repository:
    """The files of one branch, and what goes wrong with them."""

    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    branches: set[str] = field(default_factory=lambda: {"main"})  # all show the same files
    commit: str = "0" * 40
    wrong_content: bool = False  # the server sends other bytes than it has announced
    breaks: int = 0  # so many transfers of safetensors break off half way


class LocalHub(ThreadingHTTPServer):
    """Holds repositories by name. Requests with this token see private ones and may write."""

    daemon_threads = True
    TOKEN = "hf_test"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.is_out_of_order = False
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    hub = LocalHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def describe_files(repository: Repository) -> list[dict]:
    """Return what the Hub lists of a repository's files."""
    entries = []
    for file, content in repository.files.items():
        entry: dict = {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if file.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return entries


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Write nothing."""

    def do_POST(self) -> None:
        body = self._body()
        path = self._path()
        if path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {self.server.TOKEN}":
            self._refuse(401, "", "Invalid username or password.")
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.server.repositories.setdefault(name, Repository(private=private))
            self._answer({"url": f"{self.server.url}/{name}", "name": name})
        elif match := re.fullmatch(r"/api/models/(.+)/branch/(.+)", path):
            self.server.repositories[match[1]].branches.add(match[2])
            self._answer({})
        elif match := re.fullmatch(r"/api/models/(.+)/paths-info/.+", path):
            repository = self.server.repositories[match[1]]
            self._answer([entry for entry in describe_files(repository) if entry["path"] in body.decode()])
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            if match[2] not in self.server.repositories[match[1]].branches:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {match[2]}")
                return
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": file, "uploadMode": "lfs" if file.endswith(LARGE) else "regular", "shouldIgnore": False}
                for file in files
            ]
            self._answer({"files": modes})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {"objects": [self._upload_action(each) for each in objects], "transfer": "basic"}
            self._answer(upload, "application/vnd.git-lfs+json")
        elif match := re.fullmatch(r"/api/models/(.+)/commit/.+", path):
            self._commit(match[1], body)
        else:
            self._refuse(404, "", path)

    def do_PUT(self) -> None:
        content = self._body()
        self.server.uploads[hashlib.sha256(content).hexdigest()] = content
        self._answer({})

    def do_GET(self) -> None:
        path = self._path()
        if self.server.is_out_of_order:
            self._refuse(500, "", "Internal Server Error")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+)|/tree/([^/]+))?", path):
            self._describe(match[1], match[2] or match[3] or "main", is_tree=bool(match[3]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_file(match[1], match[2], match[3])
        else:
            self._refuse(404, "", path)

    do_HEAD = do_GET  # noqa: N815

    # ------------------------------------------------------------ requests

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _find(self, name: str, revision: str) -> Repository | None:
        """Return a repository; None after the Hub's answer to a request that may not see it."""
        repository = self.server.repositories.get(name)
        is_member = self.headers.get("Authorization") == f"Bearer {self.server.TOKEN}"
        if repository is None or (repository.private and not is_member):
            self._refuse(401, "RepoNotFound", "Repository not found")
            return None
        if repository.gated:
            self._refuse(403, "GatedRepo", "Access to this repository is restricted")
            return None
        if revision not in {*repository.branches, repository.commit}:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repository

    def _upload_action(self, wanted: dict) -> dict:
        href = f"{self.server.url}/upload/{wanted['oid']}"
        return {**wanted, "authenticated": True, "actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, name: str, body: bytes) -> None:
        repository = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                repository.files.pop(value["path"], None)
        repository.commit = hashlib.sha1(body).hexdigest()
        url = f"{self.server.url}/{name}/commit/{repository.commit}"
        self._answer({"success": True, "commitOid": repository.commit, "commitUrl": url, "pullRequestUrl": None})

    def _describe(self, name: str, revision: str, is_tree: bool) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        if not is_tree:
            siblings = [{"rfilename": file} for file in repository.files]
            self._answer({"id": name, "sha": repository.commit, "private": repository.private, "siblings": siblings})
            return
        self._answer(describe_files(repository))

    def _send_file(self, name: str, revision: str, file: str) -> None:
        repository = self._find(name, revision)
        if repository is None:
            return
        if file not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content, is_large = repository.files[file], file.endswith(LARGE)
        etag = (hashlib.sha256 if is_large else hashlib.sha1)(content).hexdigest()
        if is_large and repository.wrong_content:
            content = bytes(len(content))
        start = int(re.findall(r"\d+", self.headers.get("Range") or "0")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if file.endswith(".safetensors") and repository.breaks:
            repository.breaks -= 1
            self.wfile.write(content[start : len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    # ------------------------------------------------------------ answers

    def _answer(self, content: object, kind: str = "application/json") -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": kind})

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._send(status, body, {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
