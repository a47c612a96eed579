"""Whether a folder still is what its manifest promises: offline, at the speed of the disk, without torch.

Run as ``python -m formats.verify FOLDER [--quick]`` it prints a JSON verdict; :func:`verify` is the same as a function.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from formats.dtypes import numpy_dtype
from formats.errors import FormatError
from formats.manifest import CARD, CHUNK_BYTES, MANIFEST, FileRecord, Manifest, hash_file, ledger_digest, read_manifest
from formats.safetensors import Located, is_plain_name, read_folder, read_json

#: Files that a Hub client or a version-control system leaves beside an artifact.
IGNORED = (".git", ".gitattributes", ".cache")


@dataclass(frozen=True)
class Finding:
    """One broken promise: ``where`` (a file or a tensor), ``what`` is wrong in numbers, ``remedy``."""

    where: str
    what: str
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """``findings`` is empty for a good artifact. ``hashed_bytes`` is zero for a quick look."""

    findings: tuple[Finding, ...]
    files: int
    tensors: int
    hashed_bytes: int

    @property
    def passed(self) -> bool:
        return not self.findings


def verify(folder: Path, *, quick: bool = False) -> Verdict:
    """Checks files against sizes and hashes, headers and scales against the ledger, ``config.json`` against both.

    ``quick`` leaves out what needs every byte: the hashes, and NaN among float8 codes. Raises :class:`FormatError` when the
    folder has no manifest that can be read.
    """
    manifest = read_manifest(folder)
    findings = [*_check_files(folder, manifest), *_check_ledger(manifest)]
    tensors: dict[str, Located] = {}
    try:
        tensors = read_folder(folder)
    except FormatError as error:
        findings.append(Finding(str(folder), str(error), "fetch or make the artifact again"))
    else:
        findings += _check_promises(manifest, tensors)
    findings += _check_config(folder, manifest)
    # Only scales that were written here: a model may have parameters of that name (CLIP's logit_scale), and they may be negative.
    quantized = {name for entry in manifest.ledger if entry["decision"] == "quantize" for name, _, _ in entry["outputs"]}
    scales = [item for name, item in tensors.items() if name in quantized and name.endswith(("_scale", ".SCB"))]
    findings += [finding for item in scales for finding in _check_scale(folder, item)]
    hashed = 0
    if not quick:
        sound = [file for file in manifest.files if is_plain_name(file.name) and _size(folder / file.name) == file.size_bytes]
        codes = [item for item in tensors.values() if item.spec.dtype == "F8_E4M3"]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for found in (
                *pool.map(lambda file: _check_hash(folder, file), sound),
                *pool.map(lambda item: _check_codes(folder, item), codes),
            ):
                findings += found
        hashed = sum(file.size_bytes for file in sound)
    return Verdict(tuple(findings), len(manifest.files), len(tensors), hashed)


def _check_files(folder: Path, manifest: Manifest) -> list[Finding]:
    findings = []
    for file in manifest.files:
        # Before anything is opened: what a manifest names outside may be a device that never ends.
        if not is_plain_name(file.name):
            findings.append(Finding(file.name, "the manifest names what is not a file of this folder", "do not use this artifact"))
        elif (size := _size(folder / file.name)) is None:
            findings.append(Finding(file.name, "missing", "fetch or make the artifact again"))
        elif size != file.size_bytes:
            findings.append(
                Finding(file.name, f"{size:,} bytes, the manifest says {file.size_bytes:,}", "fetch or make the artifact again")
            )
    known = {MANIFEST, CARD, *IGNORED, *(file.name for file in manifest.files)}
    return findings + [
        Finding(path.name, "not in the manifest", "remove it: nothing vouches for it")
        for path in sorted(folder.iterdir())
        if path.name not in known
    ]


def _check_ledger(manifest: Manifest) -> list[Finding]:
    if ledger_digest(list(manifest.ledger)) == manifest.ledger_sha256:
        return []
    return [Finding(MANIFEST, "the ledger is not the one its digest was taken of", "make the artifact again")]


def _check_promises(manifest: Manifest, tensors: dict[str, Located]) -> list[Finding]:
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


def _check_config(folder: Path, manifest: Manifest) -> list[Finding]:
    try:
        config = read_json(folder / "config.json")
    except FormatError as error:
        return [Finding("config.json", str(error), "fetch or make the artifact again")]
    if not isinstance(config, dict):
        return [Finding("config.json", "not a JSON object", "fetch or make the artifact again")]
    quantized = any(entry["decision"] == "quantize" for entry in manifest.ledger)
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


def _check_scale(folder: Path, item: Located) -> list[Finding]:
    import numpy as np

    values = _read(folder, item).view(numpy_dtype(item.spec.dtype)).astype(np.float32)
    # LLM.int8() stores the largest magnitude itself, which is zero for a row of zeros.
    positive = values >= 0 if item.spec.name.endswith(".SCB") else values > 0
    bad = ~(np.isfinite(values) & positive)
    if not bad.any():
        return []
    first = int(np.flatnonzero(bad)[0])
    return [
        Finding(
            item.spec.name,
            f"{int(bad.sum())} scales are not positive numbers, the first {values[first]} at {first}",
            "make the artifact again",
        )
    ]


def _check_codes(folder: Path, item: Located) -> list[Finding]:
    import numpy as np

    nans = sum(int(np.count_nonzero((chunk & 0x7F) == 0x7F)) for chunk in _chunks(folder, item))
    if not nans:
        return []
    return [Finding(item.spec.name, f"{nans} of its float8 codes are NaN: every logit would be", "make the artifact again")]


def _check_hash(folder: Path, file: FileRecord) -> list[Finding]:
    try:
        if hash_file(folder / file.name, hashlib.sha256()) == file.sha256:
            return []
    except OSError as error:
        return [Finding(file.name, f"cannot be read ({error.strerror})", "fetch or make the artifact again")]
    return [Finding(file.name, "its sha256 is not the manifest's: bytes have changed", "fetch or make the artifact again")]


def _chunks(folder: Path, item: Located) -> Any:
    import numpy as np

    with (folder / item.file).open("rb", buffering=0) as stream:
        stream.seek(item.start)
        for position in range(item.start, item.stop, CHUNK_BYTES):
            yield np.frombuffer(stream.read(min(CHUNK_BYTES, item.stop - position)), np.uint8)


def _read(folder: Path, item: Located) -> Any:
    import numpy as np

    return np.concatenate([np.empty(0, np.uint8), *_chunks(folder, item)])


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
