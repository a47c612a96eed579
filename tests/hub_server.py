"""The Hugging Face Hub, in miniature, on loopback: for tests that go through the real client, nothing patched.

    hub = Hub()
    hub.add("octo/tiny", {"config.json": b"{}", "model.safetensors": Path("big.safetensors")})
    with serve(hub) as url:
        hf_hub_download("octo/tiny", "config.json", endpoint=url, cache_dir=tmp_path, token=False)

What a real Hub answers was read from what huggingface_hub 2.4.0 and 1.33.0 expect, file by file:

    file_download.py      hf_hub_url: /{repo}/resolve/{revision}/{file}, the revision quoted whole, the file but for "/".
                          get_hf_file_metadata: HEAD; X-Repo-Commit; ETag, and X-Linked-Etag and X-Linked-Size before it and
                          Content-Length; Location only off the Hub. http_get: Range "bytes=n-" after a broken body.
                          _get_metadata_or_catch_error: X-Repo-Commit on a 404 too, it names the `.no_exist` folder.
    utils/_http.py        hf_raise_for_status: X-Error-Code decides the exception, X-Error-Message its text; a bare 401 says
                          RepositoryNotFound on https only. Redirects are followed by HEAD on the same host (1.33) or
                          origin (2.4): hence files under LFS live on another host name, as on a CDN. Retry-After in seconds.
    hf_api.py             ModelInfo, RepoSibling, RepoFile, RepoFolder, GitRefs, list_repo_commits: the JSON. get_paths_info
                          posts a form. parse_safetensors_file_metadata: Range "bytes=0-100000". auth_check. whoami.
    utils/_headers.py     with telemetry on, the first request of a process asks /api/agent-harnesses of HF_ENDPOINT (of
                          huggingface.co, whatever `endpoint=` says) in order to name itself.
    utils/_pagination.py  no Link header: the list ends here.
    hf_file_system.py     HfFileSystemFile._fetch_range: a plain GET with a Range, redirects followed. 416 past the end.
    utils/_xet.py         without X-Xet-Hash the plain HTTP path is taken; this Hub has no Xet.
    _snapshot_download.py the commit from /api/models/{repo}/revision/{revision}, then its tree, then every file.

From the Hub itself: 307 with a relative Location for a renamed repo; 302 with an absolute one for a file under LFS; the CDN's
own ETag is not the file's hash; metadata of a gated repo is public and only its files are not; a missing or private repo is 401
to nobody and 404 to somebody. What writes is in
`hub_uploads.py`. Not here: gzip, pagination, git itself, Xet, and 307 to /api/resolve-cache for small files.
"""

import asyncio
import functools
import hashlib
import os
import re
import secrets
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote

import pytest
import uvicorn
from ruamel.yaml import YAML
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

LFS_PATTERNS = (
    *("*.arrow", "*.bin", "*.ckpt", "*.gguf", "*.gz", "*.h5", "*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx"),
    *("*.onnx_data", "*.parquet", "*.pickle", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.tar", "*.zip", "*.zst"),
)  # of the .gitattributes that the Hub puts into a new repo; gguf and onnx_data are there too, so that small ones are LFS
LFS_FROM_BYTES = 10 * 1024 * 1024  # the Hub refuses larger files outside LFS
CHUNK_BYTES = 1024 * 1024
FIRST_COMMIT = datetime(2024, 1, 1, tzinfo=UTC)  # a commit's date and sha depend on nothing but what came before it


@dataclass(frozen=True, eq=False)
class Blob:
    """Bytes of a file, in memory or on disk. A file on disk is hashed when its hash is first asked for, and then streamed."""

    content: bytes | Path
    lfs: bool

    @property
    def size_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @functools.cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.read():
            digest.update(chunk)
        return digest.hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git holds in place of a file under LFS (git-lfs docs/spec.md, version 1)."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size_bytes}\n".encode()

    @functools.cached_property
    def oid(self) -> str:
        """The sha1 that git gives to what it holds: the file, or its pointer."""
        held = self.pointer if self.lfs else b"".join(self.read())
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        stop = self.size_bytes if stop is None else stop
        if isinstance(self.content, bytes):
            yield from (self.content[at : min(at + CHUNK_BYTES, stop)] for at in range(start, stop, CHUNK_BYTES))
            return
        with self.content.open("rb") as file:
            file.seek(start)
            while chunk := file.read(min(CHUNK_BYTES, stop - file.tell())):
                yield chunk


@dataclass(frozen=True)
class Commit:
    """A state of a repo: all its files by path, and the sha of the commit it was made from (None for the first)."""

    sha: str
    files: Mapping[str, Blob]
    parent: str | None
    title: str
    date: str


@dataclass
class Repo:
    """A repo of the Hub: its commits, oldest first, and the branches and tags that point to them.

    `readers` and whoever has the name of the repo's namespace may read it when it is private or gated.
    """

    id: str
    kind: Literal["models", "datasets", "spaces"] = "models"
    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    readers: set[str] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(
        self,
        files: Mapping[str, bytes | Path],
        *,
        delete: Iterable[str] = (),
        branch: str = "main",
        title: str = "Upload files",
    ) -> Commit:
        """Add or replace `files`, drop those in `delete`, and let `branch` point to the result. A new branch starts empty."""
        parent = self.branches.get(branch)
        held = dict(self.commit_at(parent).files) if parent else {}
        held |= {path: Blob(content, is_lfs(path, _size_bytes(content))) for path, content in files.items()}
        for path in delete:
            del held[path]
        number = len(self.commits)
        sha = hashlib.sha1(f"{self.kind}/{self.id} {number} {parent} {title}".encode()).hexdigest()
        date = (FIRST_COMMIT + timedelta(minutes=number)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits.append(Commit(sha, held, parent, title, date))
        self.branches[branch] = sha
        return self.commits[-1]

    def commit_at(self, revision: str) -> Commit:
        """The commit that a branch, a tag, "refs/heads/...", "refs/tags/...", "refs/pr/..." or a sha of 7 digits or more names.

        Raises KeyError when none does.
        """
        refs = {f"refs/heads/{name}": sha for name, sha in self.branches.items()}
        refs |= {f"refs/tags/{name}": sha for name, sha in self.tags.items()}
        sha = (refs | self.tags | self.branches).get(revision, revision)
        named = [commit for commit in self.commits if commit.sha.startswith(sha)]
        if len(named) != 1 or len(sha) < 7:
            raise KeyError(revision)
        return named[0]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """`commit` and its parents, newest first."""
        yield commit
        while commit.parent is not None:
            commit = self.commit_at(commit.parent)
            yield commit

    def allows(self, user: str | None, orgs: Iterable[str] = ()) -> bool:
        return user is not None and (user in self.readers or self.id.partition("/")[0] in (user, *orgs))


@dataclass
class Fault:
    """What shall go wrong with the next `times` requests whose path (decoded, without query) `match` is found in.

    status   a number: that answer, with `headers`, and nothing else happens
             "slow": the answer comes `delay_s` late
             "cut": the body ends after `after_bytes` (None: half of it) and the connection closes in good order
             "reset": the same, but the connection is torn down (RST); the client may not even see the bytes before
             "lost": what was asked for is done, and the connection closes instead of an answer
    method   only requests of this method; a "cut" or a "reset" is for a GET answered 200 or 206, or for the body of a PUT
    """

    match: str
    times: int = 1
    status: int | Literal["slow", "cut", "reset", "lost"] = 500
    method: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.5
    after_bytes: int | None = None


@dataclass
class Exchange:
    """One request and its answer. `path` is decoded, without query; `size_bytes` is what was sent of the body."""

    method: str
    path: str
    range: str | None
    status: int
    user: str | None
    size_bytes: int = 0


class Refused(Exception):  # noqa: N818 - it is an answer, not an error
    """An answer other than 2xx, from anywhere in a handler. `code` is the Hub's X-Error-Code."""

    def __init__(self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        if status >= 400:
            self.headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})

    def response(self) -> Response:
        return JSONResponse({"error": str(self)}, self.status, self.headers)


def _refuse(_request: Request, refused: Exception) -> Response:
    assert isinstance(refused, Refused)
    return refused.response()


class Hub:
    """All that the stand-in holds, and the ASGI application that serves it. Change anything while it is served.

    repos     by the path of their page: "octo/tiny", "datasets/octo/calibration"
    moved     old path of a renamed repo -> new path
    tokens    token -> user name; any other token is refused
    orgs      user name -> the organisations that the user may write to, besides their own name
    stored    page of a repo -> sha256 -> content of what was uploaded under LFS, committed or not
    parts     sha256 -> number -> (ETag, content) of an upload in several parts that is not complete
    part_bytes  what is larger is uploaded in parts of this size
    faults    what shall go wrong, see `Fault`; the first that matches is taken
    requests  what was asked and answered so far, oldest first
    errors    what the stand-in itself failed with (the client saw a 500); `serve` raises them at its end
    url       where it is served, "http://127.0.0.1:PORT"; `serve` sets it, with the address of the CDN
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        self.tokens: dict[str, str] = {}
        self.orgs: dict[str, set[str]] = {}
        self.stored: dict[str, dict[str, bytes]] = {}
        self.parts: dict[str, dict[int, tuple[str, bytes]]] = {}
        self.part_bytes = 5 * 1024 * 1024
        self.faults: list[Fault] = []
        self.requests: list[Exchange] = []
        self.errors: list[Exception] = []
        self.url = ""
        self.cdn_url = ""
        self.cdn_signature = secrets.token_hex(8)
        self.connections: dict[tuple[str, int], socket.socket] = {}
        from hub_uploads import ROUTES as UPLOADS  # it needs what is defined here

        self._app = Starlette(
            routes=[Route(path, functools.partial(handler, self), methods=[method]) for method, path, handler in (*UPLOADS, *ROUTES)],
            exception_handlers={Refused: _refuse},
        )
        self._app.router.redirect_slashes = False

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        kind: Literal["models", "datasets", "spaces"] = "models",
        private: bool = False,
        gated: Literal[False, "auto", "manual"] = False,
        readers: Iterable[str] = (),
        title: str = "Upload files",
    ) -> Repo:
        """Add a repo with one commit on `main`."""
        repo = Repo(repo_id, kind=kind, private=private, gated=gated, readers=set(readers))
        repo.commit(files, title=title)
        self.repos[page_of(kind, repo_id)] = repo
        return repo

    def asked(self, match: str = "", *, method: str | None = None) -> list[Exchange]:
        """The requests so far whose path `match` is found in."""
        return [seen for seen in self.requests if re.search(match, seen.path) and method in (None, seen.method)]

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process whose client shall know this Hub, the cache in `home`, and no token of this machine."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    def user(self, request: Request) -> str | None:
        """Who sends the request: a name, or None without a token. Raises Refused (401) for an unknown token."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not token:
            return None
        if scheme.lower() != "bearer" or token not in self.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        observed = _Observed(self, scope, send)
        fault = self._fault(scope, lambda status: status == "slow" or isinstance(status, int))
        if fault is not None and fault.status == "slow":
            await asyncio.sleep(fault.delay_s)
        elif fault is not None:
            refused = Refused(int(fault.status), f"{fault.status} on request", headers=fault.headers)
            await refused.response()(scope, receive, observed)
            return
        if scope["method"] == "PUT" and (fault := self._fault(scope, lambda status: status in ("cut", "reset"))):
            await self._hang_up(scope, receive, fault.after_bytes)
            return
        lost = self._fault(scope, lambda status: status == "lost")
        try:
            # Routed undecoded: a revision may hold "%2F", and then it is one segment of the path.
            await self._app(dict(scope, path=scope["raw_path"].decode("ascii")), receive, observed if lost is None else _ignore)
            if lost is not None:
                await self._hang_up(scope, receive, 0)
        except ClientDisconnect:
            pass  # a client that was killed while it sent a body
        except Exception as error:
            self.errors.append(error)
            raise

    async def _hang_up(self, scope: Scope, receive: Receive, after_bytes: int | None) -> None:
        """Read that much of the body (None: half of it), then close the connection without a word."""
        length = int(dict(scope["headers"]).get(b"content-length", 0))
        due = length // 2 if after_bytes is None else after_bytes
        while due > 0:
            due -= len((await receive()).get("body", b""))
        self.requests.append(Exchange(scope["method"], scope["path"], None, 0, None))
        self.connections[scope["client"]].shutdown(socket.SHUT_RDWR)

    def _fault(self, scope: Scope, wanted: Callable[[int | str], bool]) -> Fault | None:
        for fault in self.faults:
            meant = fault.method in (None, scope["method"]) and re.search(fault.match, scope["path"])
            if fault.times > 0 and wanted(fault.status) and meant:
                fault.times -= 1
                return fault
        return None


async def _ignore(_message: Message) -> None:
    """ASGI `send` of an answer that gets lost."""


class _Observed:
    """ASGI `send` that writes the request log and breaks bodies."""

    def __init__(self, hub: Hub, scope: Scope, send: Send) -> None:
        self.hub = hub
        self.scope = scope
        self.send = send
        self.exchange = Exchange("", "", None, 0, None)
        self.fault: Fault | None = None
        self.left_bytes = 0  # until the fault

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start(message)
        elif self.scope["method"] == "HEAD":
            message["body"] = b""
        elif self.fault is None:
            self.exchange.size_bytes += len(message.get("body", b""))
        else:
            await self._send_broken(message)
            return
        await self.send(message)

    def _start(self, message: Message) -> None:
        sent = {name.decode().lower(): value.decode() for name, value in self.scope["headers"]}
        method, status = self.scope["method"], message["status"]
        user = self.hub.tokens.get(sent.get("authorization", "").partition(" ")[2])
        self.exchange = Exchange(method, self.scope["path"], sent.get("range"), status, user)
        self.hub.requests.append(self.exchange)
        if method == "GET" and status in (200, 206):
            self.fault = self.hub._fault(self.scope, lambda status: status in ("cut", "reset"))
        if self.fault is not None:
            length = int(dict(message["headers"])[b"content-length"])
            self.left_bytes = length // 2 if self.fault.after_bytes is None else self.fault.after_bytes
        if self.fault is not None and self.fault.status == "reset":
            # Closing then sends RST and throws away what the kernel still holds.
            self.hub.connections[self.scope["client"]].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async def _send_broken(self, message: Message) -> None:
        """Send what is due before the fault and drop the rest; uvicorn then closes, as the application owes it bytes."""
        due = message.get("body", b"")[: self.left_bytes]
        self.left_bytes -= len(due)
        self.exchange.size_bytes += len(due)
        if due:
            await self.send({"type": "http.response.body", "body": due, "more_body": True})


async def agent_harnesses(_hub: Hub, _request: Request) -> Response:
    return JSONResponse({"standardEnvVars": [], "harnesses": {}})


async def whoami(hub: Hub, request: Request) -> Response:
    user = hub.user(request)
    if user is None:
        raise Refused(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in sorted(hub.orgs.get(user, ()))]
    return JSONResponse({"type": "user", "id": user, "name": user, "fullname": user, "orgs": orgs, "auth": {"type": "access_token"}})


async def auth_check(hub: Hub, request: Request) -> Response:
    _check_gate(hub, request, allowed_repo(hub, request))
    return JSONResponse({})


async def repo_info(hub: Hub, request: Request) -> Response:
    repo = allowed_repo(hub, request)
    commit = _commit(request, repo)
    asked = request.query_params
    card = _card(commit)
    base_models = card.get("base_model") or []
    info: dict[str, Any] = {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": commit.sha,
        "createdAt": repo.commits[0].date,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [
            *card.get("tags", []),
            *(f"base_model:{name}" for name in ([base_models] if isinstance(base_models, str) else base_models)),
            *([f"license:{card['license']}"] if "license" in card else []),
        ],
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card or None,
        "siblings": [
            {"rfilename": path} | (_sibling(blob) if asked.get("blobs") == "true" else {}) for path, blob in sorted(commit.files.items())
        ],
        "usedStorage": sum(blob.size_bytes for blob in commit.files.values() if blob.lfs),
    }
    if repo.kind == "models":
        info["modelId"] = repo.id
    if asked.get("securityStatus") == "true":
        info["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
    if expand := asked.getlist("expand"):
        info = {name: value for name, value in info.items() if name in {"_id", "id", *expand}}
    return JSONResponse(info)


async def tree(hub: Hub, request: Request) -> Response:
    repo = allowed_repo(hub, request)
    commit = _commit(request, repo)
    folder = unquote(request.path_params.get("path", "")).strip("/")
    expand = request.query_params.get("expand") == "true"
    if folder in commit.files:
        return JSONResponse([_entry(repo, commit, folder, expand=expand)])
    prefix = f"{folder}/" if folder else ""
    paths = {path for path in commit.files if path.startswith(prefix)}
    if folder and not paths:
        revision = unquote(request.path_params["revision"])
        raise Refused(404, f'{folder} does not exist on "{revision}"', code="EntryNotFound", headers={"X-Repo-Commit": commit.sha})
    paths |= {str(parent) for path in paths for parent in Path(path).parents if str(parent).startswith(prefix)} - {"."}
    if request.query_params.get("recursive") != "true":
        paths = {path for path in paths if "/" not in path.removeprefix(prefix)}
    return JSONResponse([_entry(repo, commit, path, expand=expand) for path in sorted(paths)])


async def paths_info(hub: Hub, request: Request) -> Response:
    repo = allowed_repo(hub, request)
    commit = _commit(request, repo)
    form = parse_qs((await request.body()).decode())
    folders = {str(parent) for path in commit.files for parent in Path(path).parents} - {"."}
    known = [path.strip("/") for path in form.get("paths", []) if path.strip("/") in folders | set(commit.files)]
    return JSONResponse([_entry(repo, commit, path, expand=form.get("expand") == ["true"]) for path in known])


async def refs(hub: Hub, request: Request) -> Response:
    repo = allowed_repo(hub, request)
    pulls = {name: sha for name, sha in repo.branches.items() if name.startswith("refs/")}
    branches = {name: sha for name, sha in repo.branches.items() if name not in pulls}
    return JSONResponse(
        {
            "branches": [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches.items()],
            "converts": [],
            "tags": [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": sha} for name, sha in repo.tags.items()],
            "pullRequests": [{"name": name.removeprefix("refs/"), "ref": name, "targetCommit": sha} for name, sha in pulls.items()],
        }
    )


async def commits(hub: Hub, request: Request) -> Response:
    repo = allowed_repo(hub, request)
    author = {"user": repo.id.partition("/")[0]}
    return JSONResponse(
        [
            {"id": commit.sha, "title": commit.title, "message": "", "authors": [author], "date": commit.date}
            for commit in repo.history(_commit(request, repo))
        ]
    )


async def resolve(hub: Hub, request: Request) -> Response:
    repo = allowed_repo(hub, request)
    _check_gate(hub, request, repo)
    commit = _commit(request, repo)
    path = unquote(request.path_params["path"])
    blob = commit.files.get(path)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if blob is None:
        raise Refused(404, "Entry not found", code="EntryNotFound", headers=headers)
    headers["ETag"] = f'"{blob.etag}"'
    if not blob.lfs:
        return _content(request, blob, path, headers)
    page = quote(page_of(repo.kind, repo.id), safe="")
    location = f"{hub.cdn_url}/cdn/{page}/{blob.sha256}/{quote(path)}?signature={hub.cdn_signature}"
    headers |= {"Location": location, "X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size_bytes)}
    return Response(f"Found. Redirecting to {location}", 302, headers, "text/plain")


async def cdn(hub: Hub, request: Request) -> Response:
    """A file under LFS, for whoever has the signed address; a token here is one that leaked."""
    if "authorization" in request.headers:
        return Response("Only one auth mechanism allowed", 400)
    if request.query_params.get("signature") != hub.cdn_signature:
        return Response("Access denied", 403)
    repo = hub.repos[unquote(request.path_params["repo"])]
    path, sha256 = unquote(request.path_params["path"]), request.path_params["sha256"]
    held = (commit.files[path] for commit in reversed(repo.commits) if path in commit.files)
    blob = next((blob for blob in held if blob.sha256 == sha256), None)
    if blob is None:
        return Response("No such key", 404)
    etag = hashlib.sha256(f"cdn {sha256}".encode()).hexdigest()
    return _content(request, blob, path, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"})


ROUTES: list[tuple[str, str, Callable[[Hub, Request], Awaitable[Response]]]] = [
    ("GET", "/api/agent-harnesses", agent_harnesses),
    ("GET", "/api/whoami-v2", whoami),
    ("GET", "/api/{kind}/{repo:path}/auth-check", auth_check),
    ("GET", "/api/{kind}/{repo:path}/revision/{revision}", repo_info),
    ("GET", "/api/{kind}/{repo:path}/tree/{revision}", tree),
    ("GET", "/api/{kind}/{repo:path}/tree/{revision}/{path:path}", tree),
    ("POST", "/api/{kind}/{repo:path}/paths-info/{revision}", paths_info),
    ("GET", "/api/{kind}/{repo:path}/refs", refs),
    ("GET", "/api/{kind}/{repo:path}/commits/{revision}", commits),
    ("GET", "/api/{kind}/{repo:path}", repo_info),
    ("GET", "/cdn/{repo}/{sha256}/{path:path}", cdn),
    ("GET", "/{repo:path}/resolve/{revision}/{path:path}", resolve),
]  # the first that fits; GET answers HEAD too


def page_of(kind: str, repo_id: str) -> str:
    return repo_id if kind == "models" else f"{kind}/{repo_id}"


def _size_bytes(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def is_lfs(path: str, size_bytes: int) -> bool:
    return size_bytes > LFS_FROM_BYTES or any(fnmatch(path.rpartition("/")[2], pattern) for pattern in LFS_PATTERNS)


def allowed_repo(hub: Hub, request: Request) -> Repo:
    """The repo that the path names, if the sender may know of it. Raises Refused: 307 moved, 401 or 404 RepoNotFound."""
    name = unquote(request.path_params["repo"])
    kind = request.path_params.get("kind", "models")
    page = page_of(kind, name)
    user = hub.user(request)
    if page in hub.moved:
        new = hub.moved[page] if kind == "models" else hub.moved[page].removeprefix(f"{kind}/")
        query = f"?{request.url.query}" if request.url.query else ""
        location = request.scope["path"].replace(f"/{name}", f"/{new}", 1) + query
        raise Refused(307, f"Temporary Redirect. Redirecting to {location}", headers={"Location": location})
    repo = hub.repos.get(page)
    if repo is not None and (not repo.private or repo.allows(user, hub.orgs.get(user or "", ()))):
        return repo
    if user is None:
        raise Refused(401, "Invalid username or password.", code="RepoNotFound")
    raise Refused(404, "Repository not found", code="RepoNotFound")


def _check_gate(hub: Hub, request: Request, repo: Repo) -> None:
    """Raises Refused (401 for nobody, 403 for somebody; GatedRepo) when the repo is gated and the sender not let in."""
    user = hub.user(request)
    if not repo.gated or repo.allows(user, hub.orgs.get(user or "", ())):
        return
    what = f"Access to {repo.kind.removesuffix('s')} {repo.id} is restricted"
    if user is None:
        raise Refused(401, f"{what}. You must have access to it and be authenticated to access it. Please log in.", code="GatedRepo")
    raise Refused(403, f"{what} and you are not in the authorized list. Visit {hub.url}/{repo.id} to ask for access.", code="GatedRepo")


def _commit(request: Request, repo: Repo) -> Commit:
    return allowed_commit(repo, unquote(request.path_params.get("revision", "main")))


def allowed_commit(repo: Repo, revision: str) -> Commit:
    try:
        return repo.commit_at(revision)
    except KeyError:
        raise Refused(404, f"Invalid rev id: {revision}", code="RevisionNotFound") from None


def _content(request: Request, blob: Blob, path: str, headers: Mapping[str, str]) -> Response:
    """The file or the one range that was asked for (RFC 9110, 14): 200, 206 or 416."""
    size = blob.size_bytes
    start, stop, status = 0, size, 200
    name = quote(path.rpartition("/")[2], safe="")
    headers = {**headers, "Content-Type": "application/octet-stream", "Content-Disposition": f"inline; filename*=UTF-8''{name}"}
    asked = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", request.headers.get("range", ""))
    if asked and not (asked[2] and int(asked[2]) < int(asked[1])):
        start = max(size - int(asked[3]), 0) if asked[3] else int(asked[1])
        stop = min(int(asked[2]) + 1, size) if asked[2] else size
        if start >= size:
            return Response("", 416, {**headers, "Content-Range": f"bytes */{size}"})
        status = 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    if request.method == "HEAD":
        return Response(b"", status, headers)
    return StreamingResponse(blob.read(start, stop), status, headers)


def _sibling(blob: Blob) -> dict[str, Any]:
    lfs = {"sha256": blob.sha256, "size": blob.size_bytes, "pointerSize": len(blob.pointer)} if blob.lfs else None
    return {"size": blob.size_bytes, "blobId": blob.oid} | ({"lfs": lfs} if lfs else {})


def _entry(repo: Repo, commit: Commit, path: str, *, expand: bool) -> dict[str, Any]:
    """A file or a folder of a tree. `expand` adds the commit that last changed it and what the scanners think of it."""
    blob = commit.files.get(path)
    entry: dict[str, Any]
    if blob is None:
        entry = {"type": "directory", "oid": _folder_oid(commit, path), "size": 0, "path": path}
    else:
        entry = {"type": "file", "oid": blob.oid, "size": blob.size_bytes, "path": path}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size_bytes, "pointerSize": len(blob.pointer)}
    if expand:
        last = commit
        for older in repo.history(commit):
            if _folder_oid(older, path) != _folder_oid(commit, path):
                break
            last = older
        entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
        if blob is not None:
            entry["securityFileStatus"] = {"status": "safe", "avScan": None, "pickleImportScan": None}
    return entry


def _folder_oid(commit: Commit, path: str) -> str:
    """A hash of what is at or under `path`; git's own hashes trees otherwise, and no client computes it."""
    held = sorted((name, blob.oid) for name, blob in commit.files.items() if f"{name}/".startswith(f"{path}/"))
    return hashlib.sha1(repr(held).encode()).hexdigest()


def _card(commit: Commit) -> dict[str, Any]:
    """The YAML at the head of the README, as the Hub shows it in `cardData`."""
    if "README.md" not in commit.files:
        return {}
    return yaml_head(b"".join(commit.files["README.md"].read()).decode())


def yaml_head(text: str) -> dict[str, Any]:
    """The YAML between two lines of dashes at the head of a card."""
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    return dict(YAML(typ="safe").load(head[1]) or {}) if head else {}


class _Listener(socket.socket):
    """A listening socket that tells `hub` of its connections, by the client's address, so that a fault can reset them."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self.hub = hub

    def accept(self) -> tuple[socket.socket, Any]:
        connection, client = super().accept()
        self.hub.connections[client] = connection
        return connection, client


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serve `hub` on a free port of loopback from a thread of its own; yields the address to use as HF_ENDPOINT.

    The CDN is the same port under another name: the client keeps its token from another host, whatever the port (1.33).
    """
    with _Listener(hub) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        hub.url, hub.cdn_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        # A broken body is an error to uvicorn's log and a test's purpose here; no log configuration is touched.
        quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}
        config = uvicorn.Config(hub, http="h11", ws="none", loop="asyncio", lifespan="off", timeout_graceful_shutdown=1, **quiet)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="hub", daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError(f"the stand-in for the Hub did not start on {hub.url}")
                time.sleep(0.005)
            yield hub.url
        finally:
            server.should_exit = True
            thread.join()
        if hub.errors:
            raise ExceptionGroup("the stand-in for the Hub failed", hub.errors)


@pytest.fixture(name="hub")
def hub_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, served for one test. A module that wants it imports `hub_fixture` and takes `hub`."""
    # What HF_HUB_DISABLE_TELEMETRY=1 says, for a client imported before anybody could: it would ask huggingface.co.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    hub = Hub()
    with serve(hub):
        yield hub
