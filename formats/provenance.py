"""``provenance.json``: what an artifact was made of and by what, as an in-toto statement that others' tools read.

Layout: in-toto Statement v1 (in-toto/attestation, spec/v1/statement.md) around SLSA Provenance v1 (slsa.dev/spec/v1.0/provenance). It
follows from the manifest alone, without a clock or a name of a machine, so that the same artifact has the same statement. It is not
signed: what signs it needs a key that is no business of this tool.
"""

from __future__ import annotations

import hashlib
from typing import Any

from formats.manifest import MANIFEST, Manifest
from formats.safetensors import json_bytes

PROVENANCE = "provenance.json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "urn:octavo:convert:v1"


def statement(manifest: Manifest) -> bytes:
    """The statement as JSON: every file of the artifact is a subject, every weight file of the source and the recipe a dependency."""
    files = [(file.name, file.sha256) for file in manifest.files]
    files.append((MANIFEST, hashlib.sha256(manifest.to_bytes()).hexdigest()))
    recipe = hashlib.sha256(json_bytes(manifest.recipe)).hexdigest()
    source = [
        {"name": file["name"], "uri": _uri(manifest.source, file["name"]), "digest": dict([file["digest"].split(":", 1)])}
        for file in manifest.source["files"]
    ]
    predicate: dict[str, Any] = {
        "buildDefinition": {
            "buildType": BUILD,
            "externalParameters": {"recipe": manifest.recipe, "target": manifest.target},
            "internalParameters": {"plan": manifest.plan_digest},
            "resolvedDependencies": [*source, {"name": "recipe", "digest": {"sha256": recipe}}],
        },
        "runDetails": {"builder": {"id": f"urn:octavo:{manifest.versions.get('octavo', '')}", "version": manifest.versions}},
    }
    subject = [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files)]
    return json_bytes({"_type": STATEMENT, "subject": subject, "predicateType": PREDICATE, "predicate": predicate})


def _uri(source: dict[str, Any], file: str) -> str:
    """``hf://org/name@commit/file``, as huggingface_hub's file system spells it; or what the recipe says."""
    if source["commit"]:
        return f"hf://{source['origin']}@{source['commit']}/{file}"
    return str(source["origin"]) if ":" in str(source["origin"]) else f"file:{source['origin']}"
