"""Verifying and rebuilding what lies on the Hub, from a stand-in through the real client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, hub_fixture  # noqa: F401

from convert.pipeline import convert
from convert.recipe import parse_recipe
from convert.remote import Remote, parse_remote
from convert.report import Divergence, Report, RuntimeResult, at_most, manifest_digest
from formats.manifest import read_manifest
from formats.provenance import statement

RECIPE = """\
model: {model}
targets:
  - {{name: q, format: compressed-tensors, max_shard_size: 1MB}}
"""


def a_report(artifact: Path) -> bytes:
    run = RuntimeResult("transformers", {"transformers": "5"}, "cpu", 1, 1, 1.0, 1.0, 1.0, "x", Divergence(1, 0.0, 0.0, 1.0, 1.0, 1.0))
    check = at_most("transformers: kl_nats", 0.0, 1.0, "nats")
    return Report("r", "q", manifest_digest(artifact), (check,), (), run, (run,), {"text": "t", "tokens": 1, "length": 1}, "p").to_bytes()


@pytest.fixture
def artifact(make_llama: Any, tmp_path: Path) -> Path:
    """An artifact in several shards, made of a folder."""
    source = make_llama(hidden_size=128, vocab_size=5000)
    return convert(parse_recipe(RECIPE.format(model=source), "r.yaml"), tmp_path / "out", check=False).artifacts[0].path


@pytest.fixture
def published(hub: Hub, artifact: Path) -> Hub:
    files: dict[str, bytes | Path] = {path.name: path for path in artifact.iterdir()}
    hub.add("org/q", {**files, "octavo.report.json": a_report(artifact), "README.md": b"edited by people"})
    folder = {f"q/{name}": content for name, content in hub.repos["org/q"].commits[0].files.items()}
    hub.add("org/folders", {path: b"".join(blob.read()) for path, blob in folder.items()})
    return hub


def octavo(hub: Hub, home: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=hub.environment(home), cwd=home)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", Remote("org/name", None, "")),
        ("org/name@main", Remote("org/name", "main", "")),
        ("org/name@v1.0", Remote("org/name", "v1.0", "")),
        ("org/name@main/w8a8", Remote("org/name", "main", "w8a8")),
        ("org/name@refs/pr/1", Remote("org/name", "refs/pr/1", "")),
        ("org/name@refs/pr/1/w8a8", Remote("org/name", "refs/pr/1", "w8a8")),
        ("name", None),
        ("a/b/c", None),
        ("org/name@", None),
    ],
)
def test_names_of_artifacts_on_the_hub(name: str, expected: Remote | None) -> None:
    assert parse_remote(name) == expected


def test_an_artifact_on_the_hub_is_verified_by_headers_and_hashes(published: Hub, artifact: Path, tmp_path: Path) -> None:
    done = octavo(published, tmp_path, "verify", "org/q")
    assert done.returncode == 0, done.stdout + done.stderr
    commit = published.repos["org/q"].branches["main"]
    assert f"commit {commit[:12]}" in done.stdout
    assert "org/q: good" in done.stdout
    whole = sum(path.stat().st_size for path in artifact.glob("*.safetensors"))
    weights = published.asked("cdn.*safetensors", method="GET")
    assert weights
    assert all(exchange.range for exchange in weights), "weights are asked for by range only"
    assert octavo(published, tmp_path, "verify", "org/folders@main/q").returncode == 0
    found = octavo(published, tmp_path, "verify", f"org/q@{commit}", "--json")
    assert json.loads(found.stdout)["hashed_bytes"] >= whole
    absent = octavo(published, tmp_path, "verify", "org/nothing")
    assert (absent.returncode, "does not exist" in absent.stderr) == (2, True)
    assert "has no octavo.json" in octavo(published, tmp_path, "verify", "org/folders").stderr


def test_what_is_wrong_on_the_hub_is_named(published: Hub, artifact: Path, tmp_path: Path) -> None:
    repo = published.repos["org/q"]
    manifest = read_manifest(artifact)
    shard = next(file.name for file in manifest.files if file.name.endswith(".safetensors"))
    raw = bytearray((artifact / shard).read_bytes())
    raw[-1] ^= 1
    repo.commit({shard: bytes(raw), "tokenizer.json": b"{}", "extra.bin": b"x"}, delete=["generation_config.json", "octavo.report.json"])
    done = octavo(published, tmp_path, "verify", "org/q")
    assert done.returncode == 1
    for said in (
        f"error: {shard}: its sha256 is not the manifest's",
        "error: tokenizer.json: 2 bytes, the manifest says",
        "error: generation_config.json: missing",
        "error: extra.bin: not in the manifest",
        "error: octavo.report.json: missing",
    ):
        assert said in done.stdout
    first = repo.commits[0]
    assert octavo(published, tmp_path, "verify", f"org/q@{first.sha}").returncode == 0, "the commit before is good"


def test_a_graph_is_fetched_for_its_tensors_and_its_data_is_not(hub: Hub, make_llama: Any, tmp_path: Path) -> None:
    recipe = RECIPE.replace("compressed-tensors", "onnx, runtimes: [onnxruntime]").format(model=make_llama())
    folder = convert(parse_recipe(recipe, "r.yaml"), tmp_path / "out", check=False).artifacts[0].path
    files: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    hub.add("org/graph", {**files, "octavo.report.json": a_report(folder)})
    done = octavo(hub, tmp_path, "verify", "org/graph", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = {name for entry in read_manifest(folder).ledger for name, *_ in entry["outputs"]}
    assert json.loads(done.stdout)["tensors"] == len(outputs) > 0
    assert not hub.asked("onnx_data", method="GET"), "what is beside a graph stays there"
    manifest = json.loads((folder / "octavo.json").read_text())
    manifest["ledger"][0]["outputs"][0][0] = "renamed"
    hub.repos["org/graph"].commit({"octavo.json": json.dumps(manifest).encode()})
    assert "renamed: promised in the ledger and not there" in octavo(hub, tmp_path, "verify", "org/graph").stdout
    data = next(file for file in manifest["files"] if file["name"].endswith("_data"))
    data["size_bytes"] -= 1
    hub.repos["org/graph"].commit({"octavo.json": json.dumps(manifest).encode()})
    assert "it is truncated" in octavo(hub, tmp_path, "verify", "org/graph").stdout


def test_a_header_that_breaks_the_promise_is_named(published: Hub, artifact: Path, tmp_path: Path) -> None:
    """The hash of a renamed tensor's file may be in a manifest that somebody rewrote; the ledger then tells."""
    path = artifact / "octavo.json"
    manifest = json.loads(path.read_text())
    manifest["ledger"][0]["outputs"][0][0] = "renamed"
    published.repos["org/q"].commit({"octavo.json": json.dumps(manifest).encode()})
    done = octavo(published, tmp_path, "verify", "org/q")
    assert done.returncode == 1
    assert "renamed: promised in the ledger and not there" in done.stdout
    assert "octavo.report.json: it is of another manifest" in done.stdout
    assert "provenance.json: not the statement that follows from the manifest" in done.stdout


def test_an_artifact_is_rebuilt_to_the_byte_or_what_differs_is_named(published: Hub, artifact: Path, tmp_path: Path) -> None:
    done = octavo(published, tmp_path, "reproduce", artifact, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same to the byte" in done.stdout
    assert octavo(published, tmp_path, "reproduce", "org/q", "--quiet", "--device", "cpu").returncode == 0, "from its name on the Hub too"
    shard = max(artifact.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    source = Path(read_manifest(artifact).source["origin"])
    config = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.5}))
    done = octavo(published, tmp_path, "reproduce", artifact, "--device", "cpu")
    assert done.returncode == 1
    assert f"differs: {shard.name}: the file in the folder is not the manifest's" in done.stdout
    assert "differs: generation_config.json: " in done.stdout
    assert not list(tmp_path.glob("octavo-reproduce-*")), "nothing is left"


def test_the_statement_names_every_file_the_source_and_the_recipe(artifact: Path) -> None:
    found = json.loads((artifact / "provenance.json").read_bytes())
    manifest = read_manifest(artifact)
    assert (artifact / "provenance.json").read_bytes() == statement(manifest)
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://slsa.dev/provenance/v1"
    digests = {subject["name"]: subject["digest"]["sha256"] for subject in found["subject"]}
    assert digests == {**{file.name: file.sha256 for file in manifest.files}, "octavo.json": manifest_digest(artifact)}
    source, recipe = found["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert f"blake3:{source['digest']['blake3']}" == manifest.source["files"][0]["digest"]
    assert recipe["name"] == "recipe"
    assert found["predicate"]["runDetails"]["builder"]["version"] == manifest.versions
