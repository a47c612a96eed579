"""One commit on the Hub: files that are not there yet go up several at once, and become visible together or not at all."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event, Lock
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub import errors as hub
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, httpx  # type: ignore[attr-defined]

from convert.admission import Sealed
from convert.hub import retried
from convert.progress import Progress
from formats.errors import FormatError, HubError, InputError, RefusedError
from formats.manifest import MANIFEST

#: Files that go up at once.
FILES_AT_ONCE = 4
#: What a reader might take for weights of the model.
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".onnx_data")


@dataclass(frozen=True)
class Parcel:
    """One commit. ``files`` by path in the repo; ``folders``: where in it artifacts lie (``""`` is the root), each as a whole.

    ``private``: whether the repo shall be, None for private if it must be created. ``public_allowed``: it may be public at all.
    """

    repo: str
    revision: str
    files: Mapping[str, Sealed]
    folders: tuple[str, ...]
    title: str
    private: bool | None
    public_allowed: bool
    create_pr: bool = False
    tag: str | None = None


@dataclass(frozen=True)
class Pushed:
    """What became of it. ``sent``, ``deleted``: paths. ``commit`` is None for a dry run, ``changed`` False where all was there."""

    repo: str
    revision: str
    commit: str | None
    url: str
    sent: tuple[tuple[str, int], ...]
    deleted: tuple[str, ...]
    unchanged: int
    changed: bool
    created: bool


@dataclass(frozen=True)
class _Held:
    """What a branch of the repo holds; ``head`` is None where there is no repo; ``new``: there is no such branch, main stands in."""

    head: str | None
    private: bool
    files: Mapping[str, RepoFile]
    new: bool


def send(parcel: Parcel, progress: Progress, *, dry_run: bool = False) -> Pushed:
    """Publishes a parcel, or with ``dry_run`` says what would be sent.

    Files whose content is there under the same name are not sent; of a push that was interrupted, no file that is there already. The commit
    names the head that all this was decided on, so that whoever commits in between is not overwritten.

    Raises :class:`HubError` when the Hub refuses, cannot be reached, or the branch has moved; :class:`InputError` when the repo holds
    other weights, or is public and must not be; :class:`RefusedError` when a file changed since it was admitted.
    """
    api = HfApi()
    with _errors(parcel.repo):
        if not dry_run and get_token() is None:
            raise HubError(f"{parcel.repo}: nobody is logged in to {constants.ENDPOINT}; run: hf auth login, or set HF_TOKEN")
        held = _look(api, parcel)
        todo = _compare(api, parcel, held)
        if dry_run or (not todo.additions and not todo.stale and held.head and not held.new):
            there = _answer(parcel, todo, None if dry_run else held.head, changed=False, created=held.head is None)
            return there if dry_run else _tagged(api, parcel, there)
        created = held.head is None
        if created:
            retried(lambda: api.create_repo(parcel.repo, private=parcel.private is not False, exist_ok=True))
            held = _look(api, parcel)
            todo = _compare(api, parcel, held)
        operations = _upload(api, parcel, todo, progress, held)
        return _publish(api, parcel, todo, held, operations, created=created)


@dataclass(frozen=True)
class _Todo:
    additions: Mapping[str, Sealed]
    stale: tuple[str, ...]
    unchanged: int


def _look(api: HfApi, parcel: Parcel) -> _Held:
    """Raises :class:`InputError` when the repo is public and must not be."""
    try:
        info = retried(lambda: api.model_info(parcel.repo))
    except hub.RepositoryNotFoundError:
        return _Held(None, False, {}, new=parcel.revision != "main")
    private = bool(info.private)
    if not private and not parcel.public_allowed:
        raise InputError(
            f"{parcel.repo} is public, and a private source does not go to a public repo by itself; choose another, or say "
            "accept: [private] in the push section of the recipe"
        )
    if not private and parcel.private:
        raise InputError(f"{parcel.repo} is public, and the push says private; make it private on the Hub, or leave that out")
    new = False
    head: str | None = info.sha
    if parcel.revision != "main":
        try:
            head = retried(lambda: api.model_info(parcel.repo, revision=parcel.revision)).sha
        except hub.RevisionNotFoundError:
            new = True
    entries = retried(lambda: list(api.list_repo_tree(parcel.repo, recursive=True, revision=head)))
    return _Held(head, private, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}, new)


def _compare(api: HfApi, parcel: Parcel, held: _Held) -> _Todo:
    """What must go up, and what an earlier artifact left that this one does not have. Raises :class:`InputError` for foreign weights."""
    additions = {path: file for path, file in parcel.files.items() if not _is_there(file, held.files.get(path))}
    stale: list[str] = []
    for folder in parcel.folders:
        place = f"{folder}/" if folder else ""
        before = _manifest_there(api, parcel.repo, held, f"{place}{MANIFEST}")
        stale += [path for name in before if (path := f"{place}{name}") in held.files and path not in parcel.files]
        foreign = [
            path
            for path in held.files
            if path.endswith(WEIGHTS)
            and path.startswith(place)
            and path not in parcel.files
            and path not in stale
            and _is_beside(path, parcel, place)
        ]
        if foreign:
            raise InputError(
                f"{parcel.repo} at {parcel.revision} holds {', '.join(foreign[:3])}, which is not of this artifact, and a reader may "
                "load it instead; delete it there, or choose another repo or branch"
            )
    return _Todo(additions, tuple(sorted(stale)), len(parcel.files) - len(additions))


def _is_beside(path: str, parcel: Parcel, place: str) -> bool:
    """Whether weights lie where this artifact has some: in the root with folders below it, those below are other artifacts."""
    folder = str(PurePosixPath(path).parent)
    return any(str(PurePosixPath(name).parent) == folder for name in parcel.files if name.startswith(place) and name.endswith(WEIGHTS))


def _is_there(file: Sealed, there: RepoFile | None) -> bool:
    if there is None or there.size != file.size_bytes:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == file.sha256)
    content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _manifest_there(api: HfApi, repo: str, held: _Held, path: str) -> list[str]:
    """The files of the artifact that lies there already, by its own manifest."""
    if path not in held.files:
        return []
    from tempfile import TemporaryDirectory

    from formats.manifest import read_manifest

    with TemporaryDirectory() as scratch:
        local = Path(retried(lambda: api.hf_hub_download(repo, path, revision=held.head, local_dir=scratch)))
        try:
            return [file.name for file in read_manifest(local.parent).files]
        except FormatError as error:
            raise InputError(f"{repo} holds an {MANIFEST} that cannot be read ({error}); look at it, or choose another repo") from None


class _Counted(io.FileIO):
    """A file on its way up: counts what is read for the first time (a retry starts over), and ends when ``stopped``."""

    def __init__(self, path: Path, advance: Callable[[int], None], stopped: Event) -> None:
        super().__init__(path)
        self._advance, self._stopped, self._furthest = advance, stopped, 0

    def read(self, size: int | None = -1, /) -> bytes:
        if self._stopped.is_set():
            raise InterruptedError("another file failed, or the push was interrupted")
        data = super().read(-1 if size is None else size) or b""
        if (here := self.tell()) > self._furthest:
            self._advance(here - self._furthest)
            self._furthest = here
        return data


class _Addition(CommitOperationAdd):
    """huggingface_hub's own, whose hash is the admitted one, and which shows what is read of it."""

    def __init__(self, path: str, file: Sealed, advance: Callable[[int], None], stopped: Event) -> None:
        super().__init__(path_in_repo=path, path_or_fileobj=file.content)
        if not hasattr(self.upload_info, "is_hashed") and self.upload_info.sha256.hex() != file.sha256:
            raise RefusedError(f"{file.content!s} changed after it was admitted; nothing was published")
        self.upload_info.sha256 = bytes.fromhex(file.sha256)
        self.counted = 0
        self._file, self._show, self._stopped = file, advance, stopped

    def count(self, size_bytes: int) -> None:
        """Counts bytes that went up, or need not."""
        self.counted += size_bytes
        self._show(size_bytes)

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        if with_tqdm and isinstance(self._file.content, Path):
            with _Counted(self._file.content, self.count, self._stopped) as stream:
                yield stream
        else:
            with super().as_file() as whole:
                yield whole


def _upload(api: HfApi, parcel: Parcel, todo: _Todo, progress: Progress, held: _Held) -> list[_Addition]:
    """Sends what is not there; nothing of it is visible yet. What was sent whole is not sent again, by the Hub's own account."""
    stopped, lock = Event(), Lock()
    total = sum(file.size_bytes for file in todo.additions.values())
    if todo.additions:
        progress.say(f"{parcel.repo}: {len(todo.additions)} files, {total / 1e6:,.1f} MB to send; {todo.unchanged} are there")
    with progress.stage(f"uploading to {parcel.repo}", total) as advance, _no_bars():

        def count(size_bytes: int) -> None:
            with lock:
                advance(size_bytes)

        made = [_Addition(path, file, count, stopped) for path, file in todo.additions.items()]
        large = [[item] for item in made if not isinstance(todo.additions[item.path_in_repo].content, bytes)]
        groups = [*sorted(large, key=lambda group: -group[0].upload_info.size), [item for item in made if [item] not in large]]

        def one(group: list[_Addition]) -> None:
            retried(
                lambda: _unwrapped(
                    lambda: api.preupload_lfs_files(
                        parcel.repo,
                        group,
                        revision="main" if held.new else parcel.revision,
                        create_pr=parcel.create_pr,
                        num_threads=FILES_AT_ONCE,
                        free_memory=False,
                    )
                )
            )
            for item in group:
                item.count(item.upload_info.size - item.counted)

        pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="upload")
        try:
            running = [pool.submit(one, group) for group in groups if group]
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    return made


def _publish(api: HfApi, parcel: Parcel, todo: _Todo, held: _Held, additions: list[_Addition], *, created: bool) -> Pushed:
    """The one commit. A retry cannot make it twice: it names its parent."""
    touched = [path for path, file in parcel.files.items() if not file.still_holds()]
    if touched:
        raise RefusedError(f"{', '.join(touched[:3])} changed after it was admitted; nothing was published")
    if held.new:
        retried(lambda: api.create_branch(parcel.repo, branch=parcel.revision, revision=held.head, exist_ok=True))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *additions,
        *(CommitOperationDelete(path, is_folder=False) for path in todo.stale),
    ]

    def commit() -> Any:
        return api.create_commit(
            parcel.repo,
            operations,
            commit_message=parcel.title,
            revision=parcel.revision,
            create_pr=parcel.create_pr,
            parent_commit=held.head,
        )

    try:
        # A pull request has no parent that a second one would trip over, so it is asked for once.
        made = commit() if parcel.create_pr else retried(commit)
    except hub.HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        now = _look(api, parcel)
        left = _compare(api, parcel, now)
        if not left.additions and not left.stale:
            # The answer to this very commit was lost, or somebody else pushed the same.
            return _tagged(api, parcel, _answer(parcel, todo, now.head, changed=True, created=created))
        raise HubError(
            f"{parcel.repo}: somebody committed to {parcel.revision} meanwhile: it is at {str(now.head)[:12]}, this push was prepared for "
            f"{str(held.head)[:12]}. Nothing was overwritten; look at the commit, and push again"
        ) from None
    pushed = _answer(parcel, todo, made.oid, changed=True, created=created, url=made.pr_url)
    return _tagged(api, parcel, pushed)


def _tagged(api: HfApi, parcel: Parcel, pushed: Pushed) -> Pushed:
    if parcel.tag:
        tag = parcel.tag
        refs = retried(lambda: api.list_repo_refs(parcel.repo))
        there = {ref.name: ref.target_commit for ref in refs.tags}
        if there.get(tag) == pushed.commit:
            return pushed
        if tag in there:
            raise HubError(
                f"{parcel.repo}: the commit {str(pushed.commit)[:12]} is published, but the tag {tag} is at {there[tag][:12]} already; "
                "delete it, or choose another"
            )
        retried(lambda: api.create_tag(parcel.repo, tag=tag, revision=pushed.commit))
    return pushed


def _answer(parcel: Parcel, todo: _Todo, commit: str | None, *, changed: bool, created: bool, url: str | None = None) -> Pushed:
    at = "" if parcel.revision == "main" else f"/tree/{parcel.revision}"
    return Pushed(
        repo=parcel.repo,
        revision=parcel.revision,
        commit=commit,
        url=url or f"{constants.ENDPOINT}/{parcel.repo}{at}",
        sent=tuple((path, file.size_bytes) for path, file in todo.additions.items()),
        deleted=todo.stale,
        unchanged=todo.unchanged,
        changed=changed,
        created=created,
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """huggingface_hub's own bars are off meanwhile: there is one already."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _unwrapped(request: Callable[[], None]) -> None:
    """Raises what huggingface_hub's upload of several files wraps into a RuntimeError."""
    try:
        request()
    except RuntimeError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        raise


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence. Addresses are left out: those of LFS are signed."""
    try:
        yield
    except hub.HfHubHTTPError as error:
        raise HubError(_sentence(repo, error)) from None
    except hub.LocalEntryNotFoundError:
        raise HubError(f"{repo}: {constants.ENDPOINT} cannot be reached any more; push again, and what is there already stays") from None
    except (hub.LocalTokenNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise HubError(f"{repo}: {str(error).splitlines()[0]}") from None
    except hub.HFValidationError as error:
        raise InputError(f"{repo}: not a name that the Hub takes ({error})") from None
    except httpx.TransportError as error:
        raise HubError(
            f"{repo}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}); push again, and what is there already stays"
        ) from None
    except (ConnectionError, TimeoutError) as error:  # hf_xet's, which name no address that is signed
        raise HubError(
            f"{repo}: the line to Xet's storage failed ({error}); push again, or set HF_HUB_DISABLE_XET=1 to send by LFS"
        ) from None
    except (ValueError, RuntimeError) as error:
        # create_commit's own checks, the Hub's of a card's metadata, and what hf_xet raises.
        raise HubError(f"{repo}: {str(error).strip()}") from None


def _sentence(repo: str, error: hub.HfHubHTTPError) -> str:
    status = error.response.status_code
    endpoint = constants.ENDPOINT
    said = error.server_message or ""
    match status:
        case 401:
            return f"{repo}: {endpoint} does not know this token; log in again with: hf auth login"
        case 403:
            return f"{repo}: this token may not write there ({said or 'forbidden'}); ask for the right, or choose another namespace"
        case 404:
            return f"{repo}: {said or 'not found'} on {endpoint}; was it deleted or renamed meanwhile? push again"
        case 409:
            return f"{repo}: {said or 'in conflict with what is there'}; push again, or choose another name"
        case 429:
            return f"{repo}: {endpoint} limits how often it is asked; push again later, and what is there already stays"
        case _ if status >= 500:
            return f"{repo}: {endpoint} answered {status} again and again; push again later, and what is there already stays"
    return f"{repo}: {endpoint} answered {status} ({said or 'no reason given'})"
