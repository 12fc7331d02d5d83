"""A Hugging Face hub on the loopback, as far as `huggingface_hub` and `datasets` ask one; HF_ENDPOINT.

Repositories have branches and commits, may be private or gated, and connections can be made to break.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".gz")  # kept in large file storage, another address
_ASKED = re.compile(
    r"/(?P<api>api/)?(?:(?P<kind>models|datasets)/)?(?P<id>[^/]+/[^/]+)"
    r"(?:/(?P<verb>revision|tree|paths-info|resolve)/(?P<rest>.+))?"
)


@dataclass
class Repository:
    """A model or data set: what every commit holds, and the commits of its branches."""

    kind: str  # "models" or "datasets"
    id: str
    gated: bool = False
    private: bool = False
    readers: set[str] = field(default_factory=set)  # the tokens that have access to it
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Move a branch to a new commit with these files alone; its hash."""
        text = f"{self.kind} {self.id} {len(self.commits)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def found(self, revision: str) -> str | None:
        """The commit of a branch, or of a hash or the beginning of one."""
        if revision in self.branches:
            return self.branches[revision]
        return next((sha for sha in self.commits if sha.startswith(revision)), None)


@dataclass
class Answer:
    """What the server says to one request."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Hub:
    """The server, while it is open; `asked` are the requests so far, as "GET /api/models/..."."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens = {"reader", "stranger"}
        self.asked: list[str] = []
        self.unknown: list[str] = []  # requests that this server has no answer for
        self.broken: set[str] = set()  # names of files of which only the first half is ever sent
        self.betrayed = False  # whether a token was sent to the storage, which is another host
        self.port = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Another host to a client, which must not send its token there."""
        return f"http://localhost:{self.port}"

    def repository(self, kind: str, id: str, **how: Any) -> Repository:
        made = Repository(kind, id, **how)
        self.repositories[kind, id] = made
        return made

    @contextmanager
    def open(self) -> Iterator[None]:
        """Serve at one port for as long as this is entered."""
        self._start()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Refuse connections for a while."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def _start(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- what it answers --------------------------------------------------------------------------

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        self.asked.append(f"{method} {target}")
        parts = urlsplit(target)
        path = unquote(parts.path)
        if path.startswith("/storage/"):
            self.betrayed |= "authorization" in headers
            return self._stored(path.removeprefix("/storage/"))
        if path == "/api/agent-harnesses":  # of which the library's user agent tells
            return _json({"standardEnvVars": [], "harnesses": {}})
        asked = _ASKED.fullmatch(path)
        if asked is None:
            self.unknown.append(f"{method} {target}")
            return _refused(404, None, "no such route")
        token = headers.get("authorization", "").removeprefix("Bearer ") or None
        if token is not None and token not in self.tokens:
            return _refused(401, None, "Invalid credentials in Authorization header")
        repository = self.repositories.get((asked["kind"] or "models", asked["id"]))
        hidden = repository is not None and repository.private and token not in repository.readers
        if repository is None or hidden:
            return _refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        revision, rest = _split(repository, asked["rest"] or "main", asked["verb"])
        sha = repository.found(revision)
        if sha is None:
            return _refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if asked["verb"] == "resolve":
            return self._file(repository, sha, rest, token)
        files = repository.commits[sha]
        if asked["verb"] == "tree":
            deep = parse_qs(parts.query).get("recursive", ["false"])[0].lower() in ("true", "1")
            return _tree(files, rest, deep)
        if asked["verb"] == "paths-info":
            return _json(_paths(files, _wanted(headers, body)))
        return _json(_info(repository, sha))

    def _file(self, repository: Repository, sha: str, name: str, token: str | None) -> Answer:
        if repository.gated and token not in repository.readers:
            what = f"Access to {repository.kind[:-1]} {repository.id} is restricted."
            return _refused(401 if token is None else 403, "GatedRepo", what)
        content = repository.commits[sha].get(name)
        commit = {"X-Repo-Commit": sha}
        if content is None:
            return _refused(404, "EntryNotFound", "Entry not found", commit)
        if name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            where = f"{self.storage}/storage/{repository.kind}/{repository.id}/{sha}/{name}"
            return Answer(302, b"", commit | linked | {"Location": where})
        return Answer(200, content, commit | {"ETag": f'"{_oid(content)}"'})

    def _stored(self, where: str) -> Answer:
        kind, owner, name, sha, path = where.split("/", 4)
        content = self.repositories[kind, f"{owner}/{name}"].commits[sha][path]
        return Answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._respond()

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: `Hub.asked` has the requests."""

    def _respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.hub.answer(self.command, self.path, headers, body)
        content, status, first = answer.body, answer.status, 0
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if wanted and status == 200:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            answer.headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        with suppress(ConnectionError):  # of a client that has read enough
            self._send(answer, status, content, first)

    def _send(self, answer: Answer, status: int, content: bytes, first: int) -> None:
        self.send_response(status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        name = unquote(urlsplit(self.path).path).rpartition("/")[2]
        if name in self.hub.broken and status in (200, 206):
            self.wfile.write(content[: max(0, len(answer.body) // 2 - first)])
            self.close_connection = True
        else:
            self.wfile.write(content)


def _split(repository: Repository, rest: str, verb: str | None) -> tuple[str, str]:
    """The revision, which may hold slashes, and the path behind it."""
    if verb in (None, "revision"):
        return rest, ""
    known = [name for name in repository.branches if f"{rest}/".startswith(f"{name}/")]
    revision = max(known, key=len) if known else rest.partition("/")[0]
    return revision, rest[len(revision) + 1 :]


def _refused(
    status: int, code: str | None, message: str, more: Mapping[str, str] | None = None
) -> Answer:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Answer(status, json.dumps({"error": message}).encode(), headers | dict(more or {}))


def _json(value: Any) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def _info(repository: Repository, sha: str) -> dict[str, Any]:
    return {
        "_id": "0" * 24,
        "id": repository.id,
        "sha": sha,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": name} for name in repository.commits[sha]],
    }


def _entry(name: str, content: bytes) -> dict[str, Any]:
    made = {"type": "file", "oid": _oid(content), "size": len(content), "path": name}
    if name.endswith(LARGE):
        digest = hashlib.sha256(content).hexdigest()
        made["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return made


def _folders(files: Iterable[str]) -> set[str]:
    parts = [name.split("/")[:-1] for name in files]
    return {"/".join(part[: depth + 1]) for part in parts for depth in range(len(part))}


def _tree(files: Mapping[str, bytes], folder: str, deep: bool) -> Answer:
    start = f"{folder}/" if folder else ""
    if folder and folder not in _folders(files):
        return _refused(404, "EntryNotFound", f"{folder} does not exist")
    entries = _paths(files, sorted({*_folders(files), *files}))
    below = [each for each in entries if each["path"].startswith(start) and each["path"] != folder]
    return _json([e for e in below if deep or "/" not in e["path"].removeprefix(start)])


def _paths(files: Mapping[str, bytes], wanted: Iterable[str]) -> list[dict[str, Any]]:
    folders = _folders(files)
    made = []
    for name in wanted:
        if name in files:
            made.append(_entry(name, files[name]))
        elif name in folders:
            oid = hashlib.sha1(name.encode()).hexdigest()
            made.append({"type": "directory", "oid": oid, "size": 0, "path": name})
    return made


def _wanted(headers: Mapping[str, str], body: bytes) -> list[str]:
    if "json" in headers.get("content-type", ""):
        return list(json.loads(body)["paths"])
    return parse_qs(body.decode())["paths"]
