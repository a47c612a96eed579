"""What may be published: an artifact whose bytes are those of its manifest, and whose report proves these bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.progress import Progress
from convert.recipe import Recipe, Target, parse_recipe
from convert.report import Check, Report, manifest_digest, read_report, report_path
from convert.runtimes import HARNESSED, RUNTIMES
from formats.errors import FormatError, RefusedError
from formats.manifest import CARD, MANIFEST, FileRecord, Manifest, hash_file, read_manifest
from formats.safetensors import json_bytes
from formats.verify import verify

#: What is smaller is kept in memory from the hash to the commit; what is larger goes under LFS, where its hash is its name.
KEPT_BYTES = 1 << 20


@dataclass(frozen=True)
class Sealed:
    """A file that was hashed: its bytes, or where they lie and what ``stat`` said then (inode, size, time of change)."""

    size_bytes: int
    sha256: str
    content: bytes | Path
    stamp: tuple[int, int, int] | None = None

    def still_holds(self) -> bool:
        """Whether nobody has touched the file since it was hashed."""
        return not isinstance(self.content, Path) or _stamp(self.content) == self.stamp


@dataclass(frozen=True)
class Admitted:
    """An artifact that may be published. Only :func:`admit` makes one.

    ``files`` by their names in the artifact: all that the manifest names, and the manifest. Not the model card, which says where the
    artifact is published and is made for that place.
    """

    path: Path
    manifest: Manifest
    report: Report
    recipe: Recipe
    files: dict[str, Sealed]

    @property
    def target(self) -> Target:
        return self.recipe.target(self.manifest.target)


def seal(content: bytes) -> Sealed:
    """Bytes in memory as a file that was hashed."""
    return Sealed(len(content), hashlib.sha256(content).hexdigest(), content)


def admit(path: Path, progress: Progress) -> Admitted:
    """Hashes every file again and holds the report against manifest and recipe.

    Raises :class:`RefusedError` that says everything that speaks against it, :class:`FormatError` when there is no manifest to hold it to.
    """
    manifest = read_manifest(path)
    recipe = parse_recipe(json_bytes(manifest.recipe).decode(), f"{path}/{MANIFEST}", name=path.absolute().parent.name)
    wrong = [f"{finding.where}: {finding.what}" for finding in verify(path, quick=True).errors]
    files: dict[str, Sealed] = {}
    if not wrong:
        with (
            progress.stage(f"hashing {path.name}", sum(file.size_bytes for file in manifest.files)) as advance,
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        ):

            def one(file: FileRecord) -> Sealed:
                sealed = _seal(path / file.name)
                advance(sealed.size_bytes)
                return sealed

            files = dict(zip((file.name for file in manifest.files), pool.map(one, manifest.files), strict=True))
        wrong += [
            f"{file.name}: its sha256 is not the manifest's: bytes have changed"
            for file in manifest.files
            if files[file.name].sha256 != file.sha256
        ]
    try:
        report = read_report(report_path(path))
    except FormatError as error:
        raise RefusedError(_refusal(path, [*wrong, f"it was not proven ({error})"])) from None
    wrong += _objections(path, manifest, report, recipe.target(manifest.target))
    if wrong:
        raise RefusedError(_refusal(path, wrong))
    return Admitted(path, manifest, report, recipe, {**files, MANIFEST: seal(manifest.to_bytes())})


def _refusal(path: Path, wrong: list[str]) -> str:
    return (
        f"{path} is not published: "
        + "; ".join(wrong)
        + f". Make it again if bytes have changed; prove it with: octavo check {path}; a limit is loosened in its recipe, and nowhere else"
    )


def _objections(path: Path, manifest: Manifest, report: Report, target: Target) -> Iterator[str]:
    """What is wrong with a report: that it is of other bytes, leaves something out, or did not pass."""
    if not report.manifest_sha256 == manifest_digest(path) == hashlib.sha256(manifest.to_bytes()).hexdigest():
        yield f"its report is of another manifest ({report.manifest_sha256[:12]}, not {manifest_digest(path)[:12]})"
        return
    if report.target != target.name:
        yield f"its report is of the target {report.target}, not {target.name}"
    checks = {check.name: check for check in report.checks}
    for check in report.checks:
        if not check.passed:
            yield f"{check.name} failed ({_in_words(check)})"
        elif not _follows(check):
            yield f"{check.name} is said to have passed and did not ({_in_words(check)})"
    if "promises" not in checks:
        yield "the report does not say whether promises were kept"
    if any(entry["decision"] == "quantize" for entry in manifest.ledger) and not any(name.startswith("numbers") for name in checks):
        yield "the report does not hold the numbers against the source"
    limits = next(item for item in manifest.recipe["targets"] if item["name"] == target.name)["limits"]
    ran = [run.name for run in report.runtimes if (run.divergence or run.drift) is not None]
    for runtime in (f"{name} {mode}".rstrip() for name in target.runtimes for mode in RUNTIMES[name].modes):
        # Of a run the name goes on with its session, where there are several kinds.
        run = next((name for name in ran if name == runtime or name.startswith(f"{runtime} (")), runtime)
        held = {name: limit for wanted, limit in limits.items() for name in _checks_of(wanted, runtime, manifest.recipe)}
        wanted = [f"{run}: loads and runs", *(f"{run}: {name}" for name in held)]
        absent = [name for name in wanted if name not in checks]
        if run not in ran or absent:
            yield f"it was not proven in {runtime}, which its target names" + (f" (no {', '.join(absent)})" if absent else "")
        for name, limit in held.items():
            found = checks.get(f"{run}: {name}")
            if found is not None and found.limit != limit:
                yield f"{found.name} was held against {found.limit:g}, its recipe says {limit:g}"
    card = path / CARD
    if not card.is_file() or hashlib.sha256(card.read_bytes()).hexdigest() != report.card_sha256:
        yield f"{CARD} is not the one that was made from the report: it may say what was not measured"


def _checks_of(limit: str, runtime: str, recipe: Mapping[str, Any]) -> list[str]:
    """What the checks of a limit are called, after the runtime."""
    if limit != "recovery":
        return [limit]
    return [f"recovery of {task['name']}" for task in recipe["validation"]["tasks"]] if runtime in HARNESSED else []


def _follows(check: Check) -> bool:
    match check.bound:
        case "at most":
            return check.value <= check.limit
        case "at least":
            return check.value >= check.limit
    return check.bound == "holds" and check.value == 1


def _in_words(check: Check) -> str:
    said = f"{check.value:.4g}, {check.bound} {check.limit:g} {check.unit}".rstrip() if check.bound != "holds" else "no"
    return f"{said}: {check.detail}" if check.detail else said


def _seal(path: Path) -> Sealed:
    """Raises :class:`RefusedError` when the file changes under the hash."""
    stamp = _stamp(path)
    if stamp[1] <= KEPT_BYTES:
        return seal(path.read_bytes())
    digest = hash_file(path, hashlib.sha256())
    if _stamp(path) != stamp:
        raise RefusedError(f"{path} changed while it was hashed; nothing was published")
    return Sealed(stamp[1], digest, path, stamp)


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
