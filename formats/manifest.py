"""``octavo.json``: what an artifact is, what it was made of, and the hash of every byte of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from formats.errors import FormatError
from formats.safetensors import json_bytes, read_json

MANIFEST = "octavo.json"
#: The model card is written after the check, from the manifest and the report; people edit it. The report holds its hash.
CARD = "README.md"
#: What was measured, as it is published beside the artifact; on this machine it lies next to the folder.
REPORT = "octavo.report.json"
VERSION = 2
CHUNK_BYTES = 1 << 20

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class FileRecord:
    """A file of the artifact."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``source``: origin, commit, licence, base_model (a Hub id or null), ``gated`` and ``private`` (null where nobody told), a digest of
    every weight file, and ``dropped``, scales of a quantized source that nothing here comes from. ``note`` of a ledger's record: what
    became of codes that the source had.

    ``recipe``: the whole job, defaults spelled out. ``calibration``: which text was read, null where none was. ``ledger``: one record for
    every tensor of the source, and for every tensor that was added to them. ``files``: all but this one and the model card.
    """

    target: str
    format: str
    source: dict[str, Any]
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    versions: dict[str, str]
    plan_digest: str
    ledger_sha256: str
    ledger: tuple[dict[str, Any], ...]
    files: tuple[FileRecord, ...]

    @property
    def pinned(self) -> str:
        """The source as a recipe would name it, with the commit it was read at."""
        origin, commit = self.source["origin"], self.source["commit"]
        return f"{origin}@{commit}" if commit else str(origin)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files, headers and graphs included."""
        return sum(file.size_bytes for file in self.files if file.name.endswith(".safetensors") or file.name.startswith("onnx/"))

    def to_bytes(self) -> bytes:
        return json_bytes({"manifest_version": VERSION, **asdict(self)})


def ledger_digest(ledger: list[dict[str, Any]]) -> str:
    """sha256 of the ledger's JSON."""
    return hashlib.sha256(json_bytes(ledger)).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Raises :class:`FormatError` when there is none, or it is not whole."""
    if not os.path.lexists(folder / MANIFEST):
        what = f"no {MANIFEST} in it, so octavo did not make it" if folder.is_dir() else "no such folder"
        raise FormatError(f"{folder}: {what}; give a folder that octavo convert made")
    raw = read_json(folder / MANIFEST)
    if not isinstance(raw, dict) or raw.get("manifest_version") != VERSION:
        raise FormatError(f"{folder / MANIFEST}: not a manifest of version {VERSION}; it was made by another version of octavo")
    try:
        return Manifest(
            target=_is(str, raw, "target"),
            format=_is(str, raw, "format"),
            source=_source(_is(dict, raw, "source")),
            recipe=_is(dict, raw, "recipe"),
            calibration=_is(dict, raw, "calibration") if raw["calibration"] is not None else None,
            versions=_is(dict, raw, "versions"),
            plan_digest=_is(str, raw, "plan_digest"),
            ledger_sha256=_is(str, raw, "ledger_sha256"),
            ledger=tuple(_ledger_entry(entry) for entry in _is(list, raw, "ledger")),
            files=tuple(
                FileRecord(_is(str, item, "name"), _is(int, item, "size_bytes"), _is(str, item, "sha256"))
                for item in _is(list, raw, "files")
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{folder / MANIFEST}: not whole ({type(error).__name__}: {error})") from None


def _source(source: dict[str, Any]) -> dict[str, Any]:
    """The source, if it says what :attr:`Manifest.pinned` does."""
    _is(str, source, "origin")
    if source["commit"] is not None:
        _is(str, source, "commit")
    return source


def _ledger_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, if it has what an entry has; see ``convert.ledger.Entry.record``."""
    for key in ("tensor", "dtype", "module", "rule", *(("scheme", "algorithm") if entry["decision"] == "quantize" else ("why",))):
        _is(str, entry, key)
    if entry["decision"] not in ("quantize", "keep", "add", "drop"):
        raise ValueError(f"{entry['tensor']}: a decision is quantize, keep, add or drop, not {entry['decision']!r}")
    for name, dtype, shape in [(entry["tensor"], entry["dtype"], entry["shape"]), *_is(list, entry, "outputs")]:
        if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list) or any(type(n) is not int for n in shape):
            raise TypeError(f"{entry['tensor']}: an output is a name, a dtype and a shape")
    return entry


def _is(kind: type[_Kind], record: Any, key: str) -> _Kind:
    value = record[key]
    if type(value) is not kind:
        raise TypeError(f"{key} must be a {kind.__name__}")
    return value


def hash_file(path: Path, hasher: Any, *, stop: Callable[[], bool] = lambda: False) -> str:
    """Feeds a file to a ``hashlib``-like hasher, a mebibyte at a time until ``stop()``, and returns its hex digest."""
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while not stop() and (count := stream.readinto(buffer)):
            hasher.update(view[:count])
    return str(hasher.hexdigest())
