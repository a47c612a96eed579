"""Whether an artifact on the Hub is what its manifest promises, without fetching its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from convert.hub import hub_errors, retried
from convert.report import read_report
from convert.source import remote_header
from formats.errors import FormatError, SourceError
from formats.lint import Finding
from formats.manifest import CARD, MANIFEST, REPORT, FileRecord, hash_file, read_manifest
from formats.onnx_graph import join_graphs, read_graph
from formats.provenance import PROVENANCE, statement
from formats.safetensors import INDEX_FILE, SINGLE_FILE, Located, join_shards, read_json, shard_files
from formats.verify import Verdict, check_config, check_ledger, check_promises

REMEDY = "do not use this copy; publish the artifact again"
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/\s]+(?:/pr/\d+)?)(?:/(?P<folder>[\w./-]+))?)?")


@dataclass(frozen=True)
class Remote:
    """An artifact on the Hub: ``org/name``, ``org/name@revision`` or ``org/name@revision/folder``."""

    repo: str
    revision: str | None
    folder: str


def parse_remote(name: str) -> Remote | None:
    """What a name says, or None where it is no name of the Hub."""
    found = _NAME.fullmatch(name)
    return Remote(found["repo"], found["revision"], (found["folder"] or "").strip("/")) if found else None


def fetch_manifest(remote: Remote, into: Path) -> str:
    """Puts ``octavo.json`` into a folder and returns the commit it is of. Raises :class:`SourceError` where there is none."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    place = f"{remote.folder}/" if remote.folder else ""
    with hub_errors(remote.repo, remote.revision):
        commit = str(retried(lambda: HfApi().model_info(remote.repo, revision=remote.revision)).sha)
        try:
            path = retried(lambda: hf_hub_download(remote.repo, f"{place}{MANIFEST}", revision=commit))
        except EntryNotFoundError:
            raise SourceError(
                f"{remote.repo} has no {place}{MANIFEST} in revision {commit[:12]}: nothing vouches for its bytes. Give a folder of it as "
                f"{remote.repo}@{remote.revision or 'main'}/FOLDER, or fetch it and verify the folder"
            ) from None
    (into / MANIFEST).write_bytes(Path(path).read_bytes())
    return commit


def verify_remote(remote: Remote) -> tuple[Verdict, str, int]:
    """The verdict on an artifact, the commit it is of, and how many bytes were fetched for it.

    Of files under LFS the Hub's sha256 is held against the manifest, and of weights the headers are read by range; graphs, which have none
    in them, and whatever git holds itself are fetched and hashed. Raises :class:`SourceError` when there is no such artifact,
    :class:`FormatError` for a broken manifest.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.hf_api import RepoFile

    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        commit = fetch_manifest(remote, folder)
        manifest = read_manifest(folder)
        place = f"{remote.folder}/" if remote.folder else ""
        with hub_errors(remote.repo, remote.revision):
            entries = retried(lambda: list(HfApi().list_repo_tree(remote.repo, recursive=True, revision=commit)))
            there = {
                entry.path.removeprefix(place): entry for entry in entries if isinstance(entry, RepoFile) and entry.path.startswith(place)
            }
            promised = {file.name for file in manifest.files}
            strange = [name for name in {*there, *promised} if not _stays_inside(name)]
            if strange:
                raise FormatError(f"{remote.repo}: {strange[0]!r} is not a file of a folder; do not use this copy")
            graphs = sorted(name for name in promised & there.keys() if name.endswith(".onnx"))
            held_by_git = promised & {name for name, entry in there.items() if entry.lfs is None}
            small = sorted({*held_by_git, *graphs, "config.json", INDEX_FILE, REPORT, PROVENANCE} & there.keys())

            def fetch(name: str) -> int:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                path = retried(lambda: hf_hub_download(remote.repo, f"{place}{name}", revision=commit))
                target.write_bytes(Path(path).read_bytes())
                return target.stat().st_size

            with ThreadPoolExecutor(8) as pool:
                fetched = sum(pool.map(fetch, small)) + (folder / MANIFEST).stat().st_size
            findings = [found for file in manifest.files for found in _compare(folder, file, there.get(file.name))]
            findings += [
                Finding(name, "not in the manifest", "remove it: nothing vouches for it")
                for name in sorted(there)
                if name not in {MANIFEST, CARD, REPORT, PROVENANCE, ".gitattributes", *promised}
            ]
            findings += check_ledger(manifest) + check_config(folder, manifest)
            weights = [file for file in manifest.files if file.name.endswith(".safetensors") and file.name in there]

            def header(file: FileRecord) -> dict[str, Located]:
                return retried(lambda: remote_header(remote.repo, commit, f"{place}{file.name}", file.size_bytes))

            with ThreadPoolExecutor(8) as pool:
                headers = dict(zip((file.name for file in weights), pool.map(header, weights), strict=True))
        fetched += sum(min((item.start for item in found.values()), default=0) for found in headers.values())
        tensors: dict[str, Located] = {}
        try:
            if headers:
                tensors = _join(folder, headers)
            if graphs:
                tensors = _read_graphs(folder, graphs, manifest.files)
            if headers or graphs:
                findings += check_promises(manifest, tensors)
        except FormatError as error:
            findings.append(Finding(remote.repo, str(error).replace(f"{folder}/", ""), REMEDY))
        findings += _check_beside(folder, manifest.to_bytes(), statement(manifest))
    hashed = sum(file.size_bytes for file in manifest.files if file.name in there)
    return Verdict(tuple(findings), len(manifest.files), len(tensors), hashed), commit, fetched


def _join(folder: Path, headers: Mapping[str, Mapping[str, Located]]) -> dict[str, Located]:
    """The tensors of one file, or of those that the index names."""
    if not (folder / INDEX_FILE).exists() and SINGLE_FILE in headers:
        index = dict.fromkeys(headers[SINGLE_FILE], SINGLE_FILE)
    else:
        index = shard_files(read_json(folder / INDEX_FILE), INDEX_FILE)
    return join_shards(index, headers, INDEX_FILE)


def _read_graphs(folder: Path, names: Sequence[str], files: Sequence[FileRecord]) -> dict[str, Located]:
    """The tensors of graphs that were fetched, where the files beside them were not."""
    models = {}
    for name in names:
        prefix = name.rpartition("/")[0]
        data = {file.name.rpartition("/")[2]: file.size_bytes for file in files if file.name.rpartition("/")[0] == prefix}
        models[name] = read_graph(folder / name, data=data)
    return join_graphs(folder, models)


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _compare(folder: Path, file: FileRecord, there: object) -> list[Finding]:
    from huggingface_hub.hf_api import RepoFile

    if not isinstance(there, RepoFile):
        return [Finding(file.name, "missing", REMEDY)]
    if there.size != file.size_bytes:
        return [Finding(file.name, f"{there.size:,} bytes, the manifest says {file.size_bytes:,}", REMEDY)]
    sha256 = there.lfs.sha256 if there.lfs is not None else hash_file(folder / file.name, hashlib.sha256())
    if sha256 != file.sha256:
        return [Finding(file.name, "its sha256 is not the manifest's: bytes have changed", REMEDY)]
    return []


def _check_beside(folder: Path, manifest: bytes, expected: bytes) -> list[Finding]:
    """Report and provenance must be of this manifest, and the report must have passed."""
    findings = []
    if (folder / PROVENANCE).exists() and (folder / PROVENANCE).read_bytes() != expected:
        findings.append(Finding(PROVENANCE, "not the statement that follows from the manifest", REMEDY))
    if not (folder / REPORT).exists():
        return [*findings, Finding(REPORT, "missing: nothing says what was measured", REMEDY)]
    try:
        report = read_report(folder / REPORT)
    except FormatError as error:
        return [*findings, Finding(REPORT, str(error), REMEDY)]
    if report.manifest_sha256 != hashlib.sha256(manifest).hexdigest():
        findings.append(Finding(REPORT, "it is of another manifest", REMEDY))
    elif not report.passed:
        findings.append(Finding(REPORT, "it did not pass", REMEDY))
    return findings
