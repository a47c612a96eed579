"""Makes an artifact again from what its manifest says, and compares bytes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from convert.pipeline import convert
from convert.progress import QUIET, Progress
from convert.recipe import parse_recipe
from convert.remote import fetch_manifest, parse_remote
from formats.errors import FormatError
from formats.manifest import MANIFEST, Manifest, hash_file, read_manifest
from formats.safetensors import json_bytes


@dataclass(frozen=True)
class Reproduced:
    """``differences``: one text each, none where every byte came out the same; ``versions``: what differs of the libraries."""

    files: int
    size_bytes: int
    differences: tuple[str, ...]
    versions: tuple[str, ...]


def reproduce(artifact: str, *, progress: Progress = QUIET, device: str = "cpu") -> Reproduced:
    """Rebuilds the artifact of a folder, or of a name on the Hub (``org/name@revision``), in a folder that goes again.

    The source is opened at the commit that the manifest names. All targets of its recipe are made, as they were then; weights,
    configuration, tokenizer and ledger of this one are compared with the manifest, and, where ``artifact`` is a folder, with the files in
    it. Raises what :func:`convert.pipeline.convert` raises.
    """
    with TemporaryDirectory(prefix="octavo-reproduce-", dir=Path.cwd()) as scratch:
        folder = Path(artifact)
        local = folder.is_dir()
        remote = None if local else parse_remote(artifact)
        if not local:
            if remote is None:
                raise FormatError(f"{artifact}: no such folder, and not a Hub id of the form organisation/name[@revision]")
            folder = Path(scratch)
            fetch_manifest(remote, folder)
        manifest = read_manifest(folder)
        recipe = parse_recipe(
            json_bytes({**manifest.recipe, "model": manifest.pinned}).decode(), f"{artifact}/{MANIFEST}", name="reproduce"
        )
        recipe.target(manifest.target)
        out = Path(scratch) / "out"
        outcome = convert(recipe, out, device=device, check=False, progress=progress)
        made = next(item.manifest for item in outcome.artifacts if item.manifest.target == manifest.target)
        differences = [*_compare(manifest, made), *(_compare_folder(folder, manifest) if local else [])]
    versions = sorted(manifest.versions.keys() | made.versions.keys())
    changed = [
        f"{name} {manifest.versions.get(name)}, here {made.versions.get(name)}"
        for name in versions
        if manifest.versions.get(name) != made.versions.get(name)
    ]
    return Reproduced(len(made.files), sum(file.size_bytes for file in made.files), tuple(differences), tuple(changed))


def _compare(expected: Manifest, made: Manifest) -> list[str]:
    files = {file.name: file for file in made.files}
    found = []
    for file in expected.source["files"]:
        here = next((item for item in made.source["files"] if item["name"] == file["name"]), None)
        if here is None or here["digest"] != file["digest"]:
            found.append(f"{file['name']} of the source: {here['digest'][:19] if here else 'missing'}, it was {file['digest'][:19]}")
    for record in expected.files:
        again = files.pop(record.name, None)
        if again is None:
            found.append(f"{record.name}: not made again")
        elif again != record:
            was, now = (f"{file.size_bytes:,} bytes with sha256 {file.sha256[:12]}" for file in (record, again))
            found.append(f"{record.name}: {now}; it was {was}")
    found += [f"{name}: made now, and not then" for name in files]
    pairs = zip_longest(_fates(expected), _fates(made), fillvalue={"tensor": "the ledger's end"})
    return found + [f"{was['tensor']}: the ledger has another fate for it now" for was, now in pairs if was != now]


def _fates(manifest: Manifest) -> list[dict[str, Any]]:
    """The ledger without ``rule``, which names a line of the recipe's file, and not of the recipe in the manifest."""
    return [{key: value for key, value in entry.items() if key != "rule"} for entry in manifest.ledger]


def _compare_folder(folder: Path, manifest: Manifest) -> list[str]:
    """The files that lie there now against the manifest, since the question is whether these bytes can be made."""
    return [
        f"{file.name}: the file in the folder is not the manifest's"
        for file in manifest.files
        if not (folder / file.name).is_file() or hash_file(folder / file.name, hashlib.sha256()) != file.sha256
    ]
