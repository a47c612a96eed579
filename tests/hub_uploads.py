"""The upload side of the stand-in for the Hub (`hub_server.py`): repos, refs, files under LFS, commits.

What a real Hub answers was read from what huggingface_hub 2.4.0 and 1.33.0 send and expect, file by file:

    hf_api.py        create_repo: POST /api/repos/create with name, organization, visibility (or `private`, before 1.0); the "url" of
                     the answer is read after a 409 too. create_branch: startingPoint. create_tag: tag, message. create_commit:
                     /api/validate-yaml for a README.md at the root, then preupload, LFS, commit; parentCommit is a whole sha.
    _commit_api.py   _fetch_upload_modes: preupload gets path, size and the first 512 bytes; answers uploadMode, shouldIgnore and the oid
                     that the branch has under that path (a file's sha1 in git, or the sha256 of one under LFS), by which files that
                     have not changed are left out. _prepare_commit_payload: ndjson of header, file, lfsFile, deletedFile, deletedFolder.
                     _send_commit: commitUrl, commitOid, pullRequestUrl (".../discussions/N" is read out of it).
    lfs.py           post_lfs_batch_info: an object without actions is there already. _upload_single_part: PUT to a signed address,
                     without the token. _upload_multi_part: chunk_size and numbered addresses in the header; each part's ETag goes into
                     the completing POST to href. verify: oid and size.

From the Hub itself: 412 where parentCommit is no longer the head; 409 for a repo, branch or tag that is there; 403 for a namespace
that is not one's own. Not here: Xet (HF_HUB_DISABLE_XET=1, which `Hub.environment` sets), quotas, and storage that is shared between repos.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from math import ceil
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from hub_server import Blob, Refused, Repo, allowed_commit, allowed_repo, is_lfs, page_of, yaml_head
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    from hub_server import Hub

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


async def create_repo(hub: Hub, request: Request) -> Response:
    user = _writer(hub, request)
    asked = await request.json()
    namespace = asked.get("organization") or user
    kind = f"{asked.get('type') or 'model'}s"
    repo_id = f"{namespace}/{asked['name']}"
    url = f"{hub.url}/{page_of(kind, repo_id)}"
    if not _may_write(hub, user, namespace):
        raise Refused(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {namespace!r}")
    if page_of(kind, repo_id) in hub.repos:
        answer = {"error": f"You already created this {kind[:-1]} repo: {repo_id}", "url": url}
        return JSONResponse(answer, 409, {"X-Error-Message": answer["error"]})
    private = asked["visibility"] == "private" if "visibility" in asked else bool(asked.get("private"))
    hub.add(repo_id, {".gitattributes": GITATTRIBUTES}, kind=kind, private=private, title="initial commit")  # type: ignore[arg-type]
    return JSONResponse({"url": url, "name": repo_id, "id": repo_id})


async def validate_yaml(hub: Hub, request: Request) -> Response:
    """The Hub's rules are its own; here: a head that is YAML, its model-index and base_model as ModelCardData spells them."""
    asked = await request.json()
    errors = []
    try:
        head = yaml_head(asked["content"])
    except Exception as error:  # noqa: BLE001  ruamel's many
        head, errors = {}, [str(error)]
    if not isinstance(head.get("license", ""), str):
        errors.append('"license" must be a string')
    if head.get("base_model_relation") not in (None, "quantized", "finetune", "adapter", "merge"):
        errors.append(f'"base_model_relation" must be one of the known, not {head["base_model_relation"]!r}')
    for model in head.get("model-index", []):
        for result in model["results"]:
            if not result.get("dataset", {}).get("type") or not result.get("metrics"):
                errors.append('"model-index" needs a dataset type and metrics')
    warnings = [] if head else [{"message": "empty or missing yaml metadata in repo card"}]
    return JSONResponse({"errors": [{"message": text} for text in errors], "warnings": warnings}, 400 if errors else 200)


async def create_branch(hub: Hub, request: Request) -> Response:
    repo = _writable(hub, request)
    branch = unquote(request.path_params["branch"])
    asked = await request.json()
    if branch in repo.branches:
        raise Refused(409, f"Reference already exists: {branch}")
    repo.branches[branch] = allowed_commit(repo, asked.get("startingPoint", "main")).sha
    return JSONResponse({})


async def create_tag(hub: Hub, request: Request) -> Response:
    repo = _writable(hub, request)
    asked = await request.json()
    if asked["tag"] in repo.tags:
        raise Refused(409, f"Tag reference exists already: {asked['tag']}")
    repo.tags[asked["tag"]] = allowed_commit(repo, unquote(request.path_params["revision"])).sha
    return JSONResponse({})


async def preupload(hub: Hub, request: Request) -> Response:
    repo = _writable(hub, request, reading="create_pr" in request.query_params)
    held = allowed_commit(repo, unquote(request.path_params["revision"])).files
    answers = []
    for file in (await request.json())["files"]:
        assert len(base64.b64decode(file["sample"])) == min(file["size"], 512)
        blob = held.get(file["path"])
        known = {"oid": blob.etag} if blob is not None else {}
        mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
    return JSONResponse({"files": answers})


async def lfs_batch(hub: Hub, request: Request) -> Response:
    repo = _writable(hub, request, reading=True)
    asked = await request.json()
    assert asked["operation"] == "upload"
    assert "basic" in asked["transfers"]
    stored = hub.stored.setdefault(page_of(repo.kind, repo.id), _committed(repo))
    objects = []
    for item in asked["objects"]:
        oid, size = item["oid"], item["size"]
        entry: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in stored:
            place = f"{hub.cdn_url}/upload/{page_of(repo.kind, repo.id).replace('/', '%2F')}/{oid}"
            signed = f"signature={hub.cdn_signature}"
            upload = {"href": f"{place}?{signed}", "header": {}}
            if size > hub.part_bytes:
                parts = {f"{number:05}": f"{place}/{number}?{signed}" for number in range(1, ceil(size / hub.part_bytes) + 1)}
                upload = {"href": f"{hub.url}/complete/{page_of(repo.kind, repo.id).replace('/', '%2F')}/{oid}"}
                upload["header"] = {"chunk_size": str(hub.part_bytes), **parts}
            verify = {"href": f"{hub.url}/{page_of(repo.kind, repo.id)}.git/info/lfs/objects/verify"}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    return JSONResponse({"transfer": "basic", "objects": objects})


async def put_whole(hub: Hub, request: Request) -> Response:
    content = await _signed_body(hub, request)
    oid = request.path_params["oid"]
    if hashlib.sha256(content).hexdigest() != oid:
        return Response("XAmzContentSHA256Mismatch", 400)
    hub.stored[unquote(request.path_params["repo"])][oid] = content
    return Response("", 200, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})


async def put_part(hub: Hub, request: Request) -> Response:
    content = await _signed_body(hub, request)
    etag = f'"{hashlib.md5(content).hexdigest()}"'
    hub.parts.setdefault(request.path_params["oid"], {})[int(request.path_params["part"])] = (etag, content)
    return Response("", 200, {"ETag": etag})


async def complete(hub: Hub, request: Request) -> Response:
    """Joins the parts of an upload whose ETags are named in order."""
    asked = await request.json()
    parts = hub.parts.pop(asked["oid"], {})
    if [(part["partNumber"], part["etag"]) for part in asked["parts"]] != [(number, parts[number][0]) for number in sorted(parts)]:
        raise Refused(400, "One or more of the specified parts could not be found")
    content = b"".join(parts[number][1] for number in sorted(parts))
    if hashlib.sha256(content).hexdigest() != asked["oid"]:
        raise Refused(400, "The content is not what its oid says")
    hub.stored[unquote(request.path_params["repo"])][asked["oid"]] = content
    return JSONResponse({})


async def lfs_verify(hub: Hub, request: Request) -> Response:
    repo = _writable(hub, request, reading=True)
    asked = await request.json()
    if len(hub.stored[page_of(repo.kind, repo.id)].get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, "Object not found")
    return JSONResponse({})


async def commit(hub: Hub, request: Request) -> Response:
    opens = "create_pr" in request.query_params
    repo = _writable(hub, request, reading=opens)
    revision = unquote(request.path_params["revision"])
    if revision in repo.tags or re.fullmatch("[0-9a-f]{40}", revision):
        raise Refused(400, f"{revision} is not a branch")
    head = allowed_commit(repo, revision)
    lines = [json.loads(line) for line in (await request.body()).splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    if header.get("parentCommit") not in (None, head.sha):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    stored = hub.stored.setdefault(page_of(repo.kind, repo.id), _committed(repo))
    added: dict[str, bytes] = {}
    dropped: list[str] = []
    for line in lines:
        value = line["value"]
        match line["key"]:
            case "file":
                added[value["path"]] = base64.b64decode(value["content"])
            case "lfsFile":
                if value["oid"] not in stored:
                    raise Refused(400, f"The LFS object {value['oid']} of {value['path']} was not uploaded")
                added[value["path"]] = stored[value["oid"]]
            case "deletedFile":
                if value["path"] not in head.files:
                    raise Refused(404, "A file with this name doesn't exist", code="EntryNotFound")
                dropped.append(value["path"])
            case "deletedFolder":
                dropped += [path for path in head.files if path.startswith(f"{value['path'].rstrip('/')}/")]
    for path, content in added.items():
        assert is_lfs(path, len(content)) == any(line["key"] == "lfsFile" and line["value"]["path"] == path for line in lines), path
    ref = revision.removeprefix("refs/heads/")
    if opens:
        number = sum(name.startswith("refs/pr/") for name in repo.branches) + 1
        ref = f"refs/pr/{number}"
        repo.branches[ref] = head.sha
    made = repo.commit(added, delete=dropped, branch=ref, title=header["summary"])
    answer = {"commitUrl": f"{hub.url}/{page_of(repo.kind, repo.id)}/commit/{made.sha}", "commitOid": made.sha, "success": True}
    if opens:
        answer["pullRequestUrl"] = f"{hub.url}/{page_of(repo.kind, repo.id)}/discussions/{number}"
    return JSONResponse(answer)


ROUTES: list[tuple[str, str, Callable[[Any, Request], Awaitable[Response]]]] = [
    ("POST", "/api/repos/create", create_repo),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/{kind}/{repo:path}/branch/{branch}", create_branch),
    ("POST", "/api/{kind}/{repo:path}/tag/{revision}", create_tag),
    ("POST", "/api/{kind}/{repo:path}/preupload/{revision}", preupload),
    ("POST", "/api/{kind}/{repo:path}/commit/{revision}", commit),
    ("POST", "/{repo:path}.git/info/lfs/objects/batch", lfs_batch),
    ("POST", "/{repo:path}.git/info/lfs/objects/verify", lfs_verify),
    ("POST", "/complete/{repo}/{oid}", complete),
    ("PUT", "/upload/{repo}/{oid}", put_whole),
    ("PUT", "/upload/{repo}/{oid}/{part}", put_part),
]


def _writer(hub: Hub, request: Request) -> str:
    user = hub.user(request)
    if user is None:
        raise Refused(401, "Invalid username or password.")
    return user


def _may_write(hub: Hub, user: str, namespace: str) -> bool:
    return user == namespace or namespace in hub.orgs.get(user, ())


def _writable(hub: Hub, request: Request, *, reading: bool = False) -> Repo:
    """The repo that the path names, if the sender may write to it; or only read it, which is enough for a pull request."""
    user = _writer(hub, request)
    repo = allowed_repo(hub, request)
    if not reading and not _may_write(hub, user, repo.id.partition("/")[0]):
        raise Refused(403, f"Authorization error: {user} has no right to write to {repo.id}")
    return repo


async def _signed_body(hub: Hub, request: Request) -> bytes:
    """Raises Refused for an address that was not signed here, and for a token, which has leaked."""
    if "authorization" in request.headers:
        raise Refused(400, "Only one auth mechanism allowed")
    if request.query_params.get("signature") != hub.cdn_signature:
        raise Refused(403, "Access denied")
    return await request.body()


def _committed(repo: Repo) -> dict[str, bytes]:
    """What the repo's commits hold under LFS already."""
    blobs: list[Mapping[str, Blob]] = [commit.files for commit in repo.commits]
    return {blob.sha256: b"".join(blob.read()) for files in blobs for blob in files.values() if blob.lfs}
