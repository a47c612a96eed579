"""Whether a folder still is what its manifest promises, and what is wrong with it whoever made it: offline, without torch.

Run as ``python -m formats.verify FOLDER [--quick]`` it prints a JSON verdict; :func:`verify` is the same as a function.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from formats.errors import FormatError
from formats.lint import ERROR, Finding, lint
from formats.manifest import CARD, MANIFEST, REPORT, FileRecord, Manifest, hash_file, ledger_digest, read_manifest
from formats.onnx_graph import has_graph
from formats.provenance import PROVENANCE, statement
from formats.safetensors import INDEX_FILE, SINGLE_FILE, Located, is_inner_path, read_folder, read_json
from formats.tensors import GRAPHS, read_tensors

#: Files that a Hub client or a version-control system leaves beside an artifact.
IGNORED = (".git", ".gitattributes", ".cache")


@dataclass(frozen=True)
class Verdict:
    """``findings`` has no errors for a good artifact. ``hashed_bytes`` is zero for a quick look, and where there is no manifest."""

    findings: tuple[Finding, ...]
    files: int
    tensors: int
    hashed_bytes: int

    @property
    def passed(self) -> bool:
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == ERROR)


def verify(folder: Path, *, quick: bool = False) -> Verdict:
    """Lints a folder (:mod:`formats.lint`); of an artifact made here also checks files against sizes and hashes, headers against the
    ledger, ``config.json`` against both.

    ``quick`` leaves out what needs every byte: the hashes, and NaN among float8 codes. Raises :class:`FormatError` when the
    folder has a manifest that cannot be read, or nothing that could be a checkpoint.
    """
    if not os.path.lexists(folder / MANIFEST):
        return _verify_foreign(folder, quick=quick)
    manifest = read_manifest(folder)
    findings = [*_check_files(folder, manifest), *check_ledger(manifest), *_check_provenance(folder, manifest)]
    tensors: dict[str, Located] = {}
    try:
        tensors = read_tensors(folder, manifest.format)
    except FormatError as error:
        broken = [Finding(str(folder), str(error), "fetch or make the artifact again")]
    else:
        broken = check_promises(manifest, tensors)
    broken += check_config(folder, manifest)
    # Of a folder that is not what was made, everything else that is wrong follows from that.
    findings += broken or ([] if manifest.format in GRAPHS else lint(folder, tensors, quick=quick))
    hashed = 0
    if not quick:
        sound = [file for file in manifest.files if is_inner_path(file.name) and _size(folder / file.name) == file.size_bytes]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for found in pool.map(lambda file: _check_hash(folder, file), sound):
                findings += found
        hashed = sum(file.size_bytes for file in sound)
    return Verdict(tuple(findings), len(manifest.files), len(tensors), hashed)


def _verify_foreign(folder: Path, *, quick: bool) -> Verdict:
    if not folder.is_dir():
        raise FormatError(f"{folder}: {'a file; give the folder around it' if folder.exists() else 'no such folder'}")
    if not has_graph(folder) and not any((folder / name).exists() for name in ("config.json", SINGLE_FILE, INDEX_FILE)):
        raise FormatError(f"{folder}: no config.json, {SINGLE_FILE} or {MANIFEST} is there; give the folder of a checkpoint")
    if has_graph(folder):
        files = sum(path.is_file() for path in folder.rglob("*"))
        try:
            return Verdict((), files, len(read_tensors(folder, GRAPHS[0])), 0)
        except FormatError as error:
            return Verdict((Finding(str(folder), str(error), "fetch or make the graph again"),), files, 0, 0)
    tensors: dict[str, Located] | None = None
    with contextlib.suppress(FormatError):  # lint says it
        tensors = read_folder(folder)
    findings = lint(folder, tensors, quick=quick)
    return Verdict(tuple(findings), sum(path.is_file() for path in folder.iterdir()), len(tensors or {}), 0)


def _check_files(folder: Path, manifest: Manifest) -> list[Finding]:
    findings = []
    for file in manifest.files:
        # Before anything is opened: what a manifest names outside may be a device that never ends.
        if not is_inner_path(file.name):
            findings.append(Finding(file.name, "the manifest names what is not a file of this folder", "do not use this artifact"))
        elif (size := _size(folder / file.name)) is None:
            findings.append(Finding(file.name, "missing", "fetch or make the artifact again"))
        elif size != file.size_bytes:
            findings.append(
                Finding(file.name, f"{size:,} bytes, the manifest says {file.size_bytes:,}", "fetch or make the artifact again")
            )
    known = {MANIFEST, CARD, REPORT, PROVENANCE, *IGNORED, *(file.name for file in manifest.files if is_inner_path(file.name))}
    return findings + [Finding(name, "not in the manifest", "remove it: nothing vouches for it") for name in _unknown(folder, known)]


def _unknown(folder: Path, known: set[str]) -> Iterator[str]:
    """What is not among ``known``; of a folder that holds some of it, what else it holds."""
    for path in sorted(folder.iterdir()):
        inner = {name.partition("/")[2] for name in known if name.startswith(f"{path.name}/")}
        if inner and path.is_dir():
            yield from (f"{path.name}/{name}" for name in _unknown(path, inner))
        elif path.name not in known:
            yield path.name


def check_ledger(manifest: Manifest) -> list[Finding]:
    """Whether the ledger is the one that the manifest's digest was taken of."""
    if ledger_digest(list(manifest.ledger)) == manifest.ledger_sha256:
        return []
    return [Finding(MANIFEST, "the ledger is not the one its digest was taken of", "make the artifact again")]


def _check_provenance(folder: Path, manifest: Manifest) -> list[Finding]:
    path = folder / PROVENANCE
    try:
        expected = statement(manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        return [Finding(MANIFEST, "what it says of the source cannot be read", "fetch or make the artifact again")]
    if not os.path.lexists(path) or (_size(path) == len(expected) and path.read_bytes() == expected):
        return []
    return [Finding(PROVENANCE, "not the statement that follows from the manifest", "fetch or make the artifact again")]


def check_promises(manifest: Manifest, tensors: dict[str, Located]) -> list[Finding]:
    """Whether the tensors there are those of the ledger."""
    promised = {name: (dtype, tuple(shape)) for entry in manifest.ledger for name, dtype, shape in entry["outputs"]}
    found = {name: (item.spec.dtype, item.spec.shape) for name, item in tensors.items()}
    remedy = "make the artifact again"
    return [
        *(Finding(name, "promised in the ledger and not there", remedy) for name in promised if name not in found),
        *(Finding(name, "there and not in the ledger", remedy) for name in found if name not in promised),
        *(
            Finding(name, f"{found[name]}, the ledger says {expected}", remedy)
            for name, expected in promised.items()
            if name in found and found[name] != expected
        ),
    ]


def check_config(folder: Path, manifest: Manifest) -> list[Finding]:
    """Whether ``config.json`` tells readers of the quantization that the manifest names."""
    try:
        config = read_json(folder / "config.json")
    except FormatError as error:
        return [Finding("config.json", str(error), "fetch or make the artifact again")]
    if not isinstance(config, dict):
        return [Finding("config.json", "not a JSON object", "fetch or make the artifact again")]
    quantized = manifest.format not in GRAPHS and any(entry["decision"] == "quantize" for entry in manifest.ledger)
    section = config.get("quantization_config")
    if quantized and not isinstance(section, dict):
        return [
            Finding("config.json", "no quantization_config: readers would take codes for weights", "restore it, or make the artifact again")
        ]
    if isinstance(section, dict) and section.get("quant_method") != manifest.format:
        return [
            Finding(
                "config.json",
                f"quant_method {section.get('quant_method')!r}, the manifest says {manifest.format}",
                "make the artifact again",
            )
        ]
    return []


def _check_hash(folder: Path, file: FileRecord) -> list[Finding]:
    try:
        if hash_file(folder / file.name, hashlib.sha256()) == file.sha256:
            return []
    except OSError as error:
        return [Finding(file.name, f"cannot be read ({error.strerror})", "fetch or make the artifact again")]
    return [Finding(file.name, "its sha256 is not the manifest's: bytes have changed", "fetch or make the artifact again")]


def _size(path: Path) -> int | None:
    """Of a regular file (Hub clients link to them); None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def main(folder: str, *options: str) -> None:
    """Prints the verdict on a folder as JSON."""
    try:
        verdict = verify(Path(folder), quick="--quick" in options)
    except FormatError as error:
        verdict = Verdict((Finding(folder, str(error), "give the folder of an artifact"),), 0, 0, 0)
    json.dump({"passed": verdict.passed, **asdict(verdict)}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
