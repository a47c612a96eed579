"""A good artifact has no findings; every way to damage one has a finding that names what was damaged."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.algorithms.rtn import quantize
from formats import compressed_tensors
from formats.dtypes import DTYPES
from formats.errors import FormatError
from formats.layer import Contents, QuantizedLayer
from formats.manifest import CARD, MANIFEST, FileRecord, Manifest, hash_file, ledger_digest, read_manifest
from formats.model_config import spell
from formats.provenance import PROVENANCE, statement
from formats.safetensors import INDEX_FILE, TensorSpec, index_json, json_bytes, lay_out, read_folder
from formats.scheme import SCHEMES
from formats.verify import IGNORED, Finding, verify

INT8, FP8, NORM, LOGIT_SCALE, EMBEDDING = "up_proj.weight", "down_proj.weight", "norm.weight", "logit_scale", "embed_tokens.weight"
SOURCE = {
    EMBEDDING: ("BF16", (11, 6), None),
    INT8: ("BF16", (13, 6), "int8-dynamic"),
    FP8: ("BF16", (6, 13), "fp8-dynamic"),
    NORM: ("BF16", (6,), None),
    LOGIT_SCALE: ("F32", (), None),
}


def build(folder: Path) -> Path:
    """An artifact as convert makes one: three shards, an INT8 and an FP8 layer, an embedding, a norm, and a scalar that is negative."""
    stored: dict[str, torch.Tensor] = {}
    specs: list[TensorSpec] = []
    ledger: list[dict[str, Any]] = []
    for name, (dtype, shape, scheme) in SOURCE.items():
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(getattr(torch, DTYPES[dtype].torch_name))
        plain = TensorSpec(name, dtype, shape)
        if scheme is None:
            stored[name] = weight if shape else -weight.abs()
            outputs: tuple[TensorSpec, ...] = (plain,)
        else:
            outputs = compressed_tensors.layer_tensors(plain, SCHEMES[scheme])
            stored |= compressed_tensors.encode(name, quantize(weight, SCHEMES[scheme].weight, scale_dtype=weight.dtype), SCHEMES[scheme])
        specs += outputs
        ledger.append(
            {
                "tensor": name,
                "dtype": dtype,
                "shape": list(shape),
                "module": name.removesuffix(".weight"),
                "decision": "quantize" if scheme else "keep",
                **({"scheme": scheme, "algorithm": "rtn"} if scheme else {"why": "a test"}),
                "rule": "default",
                "outputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in outputs],
            }
        )
    shards = lay_out(specs, {"format": "pt"}, 150)
    assert len(shards) == 3
    folder.mkdir()
    for shard in shards:
        file = bytearray(shard.header.ljust(shard.size_bytes, b"\xee"))
        for item in shard.tensors:
            file[item.start : item.stop] = stored[item.spec.name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        (folder / shard.file).write_bytes(file)
    layers = [QuantizedLayer(name.removesuffix(".weight"), scheme, shape) for name, (_, shape, scheme) in SOURCE.items() if scheme]
    config = spell({"model_type": "tiny"}, "BF16", compressed_tensors.config(Contents(layers, [], "BF16")))
    (folder / "config.json").write_bytes(json_bytes(config))
    (folder / INDEX_FILE).write_bytes(index_json(shards) or b"")
    (folder / "tokenizer.json").write_text("{}")
    manifest = Manifest(
        target="int8",
        format="compressed-tensors",
        source={"origin": "sample:tiny", "commit": None, "licence": None, "base_model": None, "files": []},
        recipe={"model": "sample:tiny"},
        calibration=None,
        versions={"octavo": "0.1.0"},
        plan_digest="0" * 64,
        ledger_sha256=ledger_digest(ledger),
        ledger=tuple(ledger),
        files=tuple(records(folder)),
    )
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    (folder / CARD).write_text("# tiny")
    return folder


def records(folder: Path) -> Iterator[FileRecord]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in (MANIFEST, CARD):
            content = path.read_bytes()
            yield FileRecord(path.name, len(content), sha256(content).hexdigest())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return build(tmp_path_factory.mktemp("artifact") / "good")


@pytest.fixture
def artifact(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "artifact")


# The good one


@pytest.mark.parametrize("quick", [False, True])
def test_a_good_artifact_has_no_findings(good: Path, quick: bool) -> None:
    verdict = verify(good, quick=quick)
    assert verdict.findings == ()
    assert verdict.passed
    assert (verdict.files, verdict.tensors) == (6, 7)
    weights_and_texts = sum(path.stat().st_size for path in good.iterdir() if path.name not in (MANIFEST, CARD))
    assert verdict.hashed_bytes == (0 if quick else weights_and_texts)


def test_a_manifest_is_read_as_it_was_written(good: Path) -> None:
    manifest = read_manifest(good)
    assert manifest.to_bytes() == (good / MANIFEST).read_bytes()
    assert manifest.files == tuple(records(good))


def test_what_hub_clients_leave_behind_and_an_edited_card_are_no_findings(artifact: Path) -> None:
    for name in IGNORED:
        (artifact / name).mkdir()
    (artifact / CARD).write_text("# I edited this")
    assert verify(artifact).passed
    (artifact / CARD).unlink()
    assert verify(artifact).passed


def test_links_into_a_cache_are_files(artifact: Path, tmp_path: Path) -> None:
    """A snapshot of the Hub's cache is a folder of links that lead out of it."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in [path for path in artifact.iterdir() if path.name != MANIFEST]:
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    assert verify(artifact).passed


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 * (1 << 20)])
def test_hash_file_is_the_hash_of_the_file(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(251)) * (size // 251 + 1)
    (tmp_path / "f").write_bytes(content[:size])
    assert hash_file(tmp_path / "f", sha256()) == sha256(content[:size]).hexdigest()


def test_hash_file_stops_when_told(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * (3 << 20))
    asked = iter([False, True])
    assert hash_file(tmp_path / "f", sha256(), stop=lambda: next(asked)) == sha256(b"x" * (1 << 20)).hexdigest()


# Damage


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest's JSON."""
    raw = json.loads((folder / MANIFEST).read_bytes())
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))


def vouch(folder: Path) -> None:
    """Gives the manifest the sizes and hashes of what now lies there, so that only a look at the content can find anything."""
    files = [{"name": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256} for file in records(folder)]
    edit(folder, lambda raw: raw.update(files=files))


def vouch_for_ledger(folder: Path) -> None:
    edit(folder, lambda raw: raw.update(ledger_sha256=ledger_digest(raw["ledger"])))


def poke(folder: Path, tensor: str, offset_bytes: int, new: bytes) -> str:
    """Writes over a tensor's bytes and returns the shard it lies in."""
    item = read_folder(folder)[tensor]
    with (folder / item.file).open("r+b") as stream:
        stream.seek(item.start + offset_bytes)
        stream.write(new)
    return item.file


def poke_scale(folder: Path, tensor: str, row: int, value: float) -> None:
    poke(folder, f"{tensor}_scale", 2 * row, torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    vouch(folder)


def shard_of(folder: Path, tensor: str) -> Path:
    return folder / read_folder(folder)[tensor].file


def reshard(folder: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrites the shard a tensor lies in, index and hashes too: whoever does this leaves only the ledger to tell."""
    path = shard_of(folder, tensor)
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    index = json.loads((folder / INDEX_FILE).read_bytes())
    kept = {name: file for name, file in index["weight_map"].items() if file != path.name}
    (folder / INDEX_FILE).write_text(json.dumps({**index, "weight_map": kept | dict.fromkeys(tensors, path.name)}))
    vouch(folder)


def configure(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    vouch(folder)


def change_file_record(folder: Path, name: str, **changes: object) -> None:
    edit(folder, lambda raw: next(file for file in raw["files"] if file["name"] == name).update(changes))


def change_entry(folder: Path, tensor: str, **changes: object) -> None:
    edit(folder, lambda raw: next(entry for entry in raw["ledger"] if entry["tensor"] == tensor).update(changes))
    vouch_for_ledger(folder)


def point_manifest_at(folder: Path, name: str, size_bytes: int) -> None:
    edit(folder, lambda raw: raw["files"].append({"name": name, "size_bytes": size_bytes, "sha256": "0" * 64}))


@dataclass(frozen=True)
class Damage:
    """What is done, and the one finding it must lead to: ``where`` exactly, ``what`` in part.

    ``needs_hashes``: only a look at every byte can see it.
    """

    do: Callable[[Path], object]
    where: str
    what: str
    needs_hashes: bool = False


SECOND, THIRD = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"

DAMAGES: dict[str, Damage] = {
    "a code": Damage(lambda folder: poke(folder, INT8, 7, b"\x55"), SECOND, "sha256", needs_hashes=True),
    "a kept weight": Damage(lambda folder: poke(folder, NORM, 3, b"\x12"), THIRD, "sha256", needs_hashes=True),
    "a letter of config.json": Damage(
        lambda folder: (folder / "config.json").write_bytes((folder / "config.json").read_bytes().replace(b"tiny", b"tinY")),
        "config.json",
        "sha256",
        needs_hashes=True,
    ),
    "a tokenizer that grew": Damage(
        lambda folder: (folder / "tokenizer.json").write_text("{ }"), "tokenizer.json", "3 bytes, the manifest says 2"
    ),
    "a file that is missing": Damage(lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json", "missing"),
    "a folder in place of a file": Damage(
        lambda folder: ((folder / "tokenizer.json").unlink(), (folder / "tokenizer.json").mkdir()), "tokenizer.json", "missing"
    ),
    "a pipe in place of a file": Damage(
        lambda folder: ((folder / "tokenizer.json").unlink(), os.mkfifo(folder / "tokenizer.json")), "tokenizer.json", "missing"
    ),
    "a link that leads nowhere": Damage(
        lambda folder: ((folder / "tokenizer.json").unlink(), (folder / "tokenizer.json").symlink_to("gone")), "tokenizer.json", "missing"
    ),
    "a file too many": Damage(
        lambda folder: (folder / "modeling_tiny.py").write_text("import os"), "modeling_tiny.py", "not in the manifest"
    ),
    "a folder too many": Damage(lambda folder: (folder / "more").mkdir(), "more", "not in the manifest"),
    "a file that the manifest no longer vouches for": Damage(
        lambda folder: edit(folder, lambda raw: raw["files"].pop()), "tokenizer.json", "not in the manifest"
    ),
    "a scale of zero": Damage(
        lambda folder: poke_scale(folder, INT8, 3, 0.0), f"{INT8}_scale", "1 scales are not positive numbers, the first 0.0 at 3"
    ),
    "a scale of minus zero": Damage(lambda folder: poke_scale(folder, INT8, 3, -0.0), f"{INT8}_scale", "the first -0.0 at 3"),
    "a negative scale": Damage(lambda folder: poke_scale(folder, FP8, 5, -0.5), f"{FP8}_scale", "the first -0.5 at 5"),
    "a scale of NaN": Damage(lambda folder: poke_scale(folder, INT8, 12, math.nan), f"{INT8}_scale", "the first nan at 12"),
    "an infinite scale": Damage(lambda folder: poke_scale(folder, FP8, 0, math.inf), f"{FP8}_scale", "the first inf at 0"),
    "a float8 code that is NaN": Damage(
        lambda folder: (poke(folder, FP8, 17, b"\x7f"), vouch(folder)), FP8, "1 of its float8 codes are NaN", needs_hashes=True
    ),
    "two float8 codes that are NaN": Damage(
        lambda folder: (poke(folder, FP8, 0, b"\x7f"), poke(folder, FP8, 77, b"\xff"), vouch(folder)),
        FP8,
        "2 of its float8 codes are NaN",
        needs_hashes=True,
    ),
    "an edited ledger": Damage(
        lambda folder: edit(folder, lambda raw: raw["ledger"][0].update(why="because")),
        MANIFEST,
        "the ledger is not the one its digest was taken of",
    ),
    "an edited digest of the ledger": Damage(
        lambda folder: edit(folder, lambda raw: raw.update(ledger_sha256="0" * 64)), MANIFEST, "digest"
    ),
    "an entry of the ledger that is gone": Damage(
        lambda folder: (edit(folder, lambda raw: raw["ledger"].pop(3)), vouch_for_ledger(folder)), NORM, "not in the ledger"
    ),
    "a tensor that is gone": Damage(
        lambda folder: reshard(folder, NORM, lambda tensors: tensors.pop(NORM)), NORM, "promised in the ledger and not there"
    ),
    "a scale that is gone": Damage(
        lambda folder: reshard(folder, f"{INT8}_scale", lambda tensors: tensors.pop(f"{INT8}_scale")),
        f"{INT8}_scale",
        "promised in the ledger",
    ),
    "a tensor too many": Damage(
        lambda folder: reshard(folder, NORM, lambda tensors: tensors.update(backdoor=torch.zeros(3))), "backdoor", "not in the ledger"
    ),
    "a zero point for a symmetric scheme": Damage(
        lambda folder: reshard(
            folder, INT8, lambda tensors: tensors.update({"up_proj.weight_zero_point": torch.zeros(13, 1, dtype=torch.int8)})
        ),
        "up_proj.weight_zero_point",
        "not in the ledger",
    ),
    "a tensor of another dtype": Damage(
        lambda folder: reshard(folder, NORM, lambda tensors: tensors.update({NORM: tensors[NORM].half()})),
        NORM,
        "the ledger says ('BF16', (6,))",
    ),
    "codes that became weights again": Damage(
        lambda folder: reshard(folder, INT8, lambda tensors: tensors.update({INT8: tensors[INT8].bfloat16()})),
        INT8,
        "('BF16', (13, 6)), the ledger says ('I8'",
    ),
    "a tensor of another shape": Damage(
        lambda folder: reshard(folder, INT8, lambda tensors: tensors.update({INT8: tensors[INT8].reshape(6, 13)})),
        INT8,
        "the ledger says ('I8', (13, 6))",
    ),
    "scales without their second axis": Damage(
        lambda folder: reshard(
            folder, f"{FP8}_scale", lambda tensors: tensors.update({f"{FP8}_scale": tensors[f"{FP8}_scale"].reshape(6)})
        ),
        f"{FP8}_scale",
        "the ledger says ('BF16', (6, 1))",
    ),
    "a promise of another dtype": Damage(
        lambda folder: change_entry(folder, NORM, outputs=[[NORM, "F16", [6]]]), NORM, "the ledger says ('F16', (6,))"
    ),
    "no quantization_config": Damage(
        lambda folder: configure(folder, lambda config: config.pop("quantization_config")), "config.json", "no quantization_config"
    ),
    "another quant_method": Damage(
        lambda folder: configure(folder, lambda config: config["quantization_config"].update(quant_method="bitsandbytes")),
        "config.json",
        "quant_method 'bitsandbytes', the manifest says compressed-tensors",
    ),
    "a config that is a list": Damage(
        lambda folder: ((folder / "config.json").write_text("[]"), vouch(folder)), "config.json", "not a JSON object"
    ),
    "a config that is no JSON": Damage(
        lambda folder: ((folder / "config.json").write_text("{"), vouch(folder)), "config.json", "not valid JSON"
    ),
    "a manifest that vouches for another size": Damage(
        lambda folder: change_file_record(folder, "tokenizer.json", size_bytes=3), "tokenizer.json", "2 bytes, the manifest says 3"
    ),
    "a manifest that vouches for another hash": Damage(
        lambda folder: change_file_record(folder, "tokenizer.json", sha256="0" * 64), "tokenizer.json", "sha256", needs_hashes=True
    ),
    "a manifest that names a file that leads outside": Damage(
        lambda folder: point_manifest_at(folder, "../secret", 6), "../secret", "not a file of this folder"
    ),
    "a manifest that names an absolute path": Damage(
        lambda folder: point_manifest_at(folder, "/etc/hostname", 6), "/etc/hostname", "not a file of this folder"
    ),
    "a manifest that names an endless device": Damage(
        lambda folder: point_manifest_at(folder, "/dev/zero", 0), "/dev/zero", "not a file of this folder"
    ),
    "a manifest that names the folder": Damage(
        lambda folder: point_manifest_at(folder, ".", folder.stat().st_size), ".", "not a file of this folder"
    ),
    "a manifest that names nothing": Damage(
        lambda folder: point_manifest_at(folder, "", folder.stat().st_size), "", "not a file of this folder"
    ),
    "a manifest that names the folder above": Damage(
        lambda folder: point_manifest_at(folder, "..", 4096), "..", "not a file of this folder"
    ),
    "a manifest that names a file in a folder that is not there": Damage(
        lambda folder: point_manifest_at(folder, "sub/file", 1), "sub/file", "missing"
    ),
    "a manifest that leaves the folder through one in it": Damage(
        lambda folder: point_manifest_at(folder, "sub/../../secret", 6), "sub/../../secret", "not a file of this folder"
    ),
    "a manifest with a backslash": Damage(
        lambda folder: point_manifest_at(folder, "..\\secret", 6), "..\\secret", "not a file of this folder"
    ),
    "a manifest with a null byte": Damage(lambda folder: point_manifest_at(folder, "a\0b", 6), "a\0b", "not a file of this folder"),
    "a manifest with an endless name": Damage(lambda folder: point_manifest_at(folder, "n" * 300, 6), "n" * 300, "missing"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_found_and_named(artifact: Path, case: str) -> None:
    damage = DAMAGES[case]
    (artifact.parent / "secret").write_text("secret")
    damage.do(artifact)
    found = verify(artifact)
    assert [(finding.where, damage.what in finding.what) for finding in found.findings] == [(damage.where, True)], found
    assert not found.passed
    assert all(finding.remedy for finding in found.findings)


@pytest.mark.parametrize("case", DAMAGES)
def test_a_quick_look_finds_all_damage_that_does_not_need_every_byte(artifact: Path, case: str) -> None:
    damage = DAMAGES[case]
    damage.do(artifact)
    found = verify(artifact, quick=True)
    assert [finding.where for finding in found.findings] == ([] if damage.needs_hashes else [damage.where])
    assert found.hashed_bytes == 0


def test_nothing_outside_the_folder_is_opened(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = artifact.parent / "secret"
    outside.write_text("secret")
    for name in ("../secret", str(outside)):
        point_manifest_at(artifact, name, 6)
    opened: list[Path] = []
    monkeypatch.setattr("formats.verify.hash_file", lambda path, hasher: (opened.append(path), hash_file(path, hasher))[1])
    found = verify(artifact)
    assert len(found.findings) == 2
    assert {path.resolve().parent for path in opened} == {artifact.resolve()}


@pytest.mark.parametrize("quick", [False, True])
def test_a_truncated_shard_is_named_by_its_size_and_by_its_header(artifact: Path, quick: bool) -> None:
    path = artifact / SECOND
    path.write_bytes(path.read_bytes()[:-1])
    findings = verify(artifact, quick=quick).findings
    assert [finding.where for finding in findings] == [SECOND, str(artifact)]
    assert f"{path.stat().st_size:,} bytes, the manifest says {path.stat().st_size + 1:,}" in findings[0].what
    assert SECOND in findings[1].what
    assert "truncated" in findings[1].what


def test_a_shard_that_is_missing_is_named(artifact: Path) -> None:
    (artifact / SECOND).unlink()
    findings = verify(artifact).findings
    assert findings[0] == Finding(SECOND, "missing", "fetch or make the artifact again")
    assert [SECOND in finding.what for finding in findings[1:]] == [True]


def test_a_config_that_is_missing_is_named(artifact: Path) -> None:
    (artifact / "config.json").unlink()
    assert [finding.where for finding in verify(artifact).findings] == ["config.json", "config.json"]


def test_several_damages_are_several_findings(artifact: Path) -> None:
    poke(artifact, INT8, 0, b"\x01")
    poke(artifact, f"{FP8}_scale", 0, b"\0\0")
    (artifact / "tokenizer.json").unlink()
    (artifact / "extra").touch()
    assert {finding.where for finding in verify(artifact).findings} == {"tokenizer.json", "extra", f"{FP8}_scale", SECOND, THIRD}


def test_an_artifact_that_quantizes_nothing_needs_no_quantization_config(artifact: Path) -> None:
    kept = {"decision": "keep", "why": "nothing to win"}
    edit(artifact, lambda raw: [entry.update(kept) for entry in raw["ledger"]])
    vouch_for_ledger(artifact)
    configure(artifact, lambda config: config.pop("quantization_config"))
    # The manifest is content; the weights that lie there are codes all the same.
    assert [finding.what[:27] for finding in verify(artifact).findings] == ["2 weights are 8-bit codes ("]


@pytest.mark.parametrize("value", [-3.0, 0.0, math.nan])
def test_a_parameter_of_the_model_that_is_called_a_scale_may_be_what_it_is(artifact: Path, value: float) -> None:
    reshard(artifact, LOGIT_SCALE, lambda tensors: tensors.update({LOGIT_SCALE: torch.tensor(value)}))
    assert verify(artifact).findings == ()


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_a_byte_flipped_anywhere_is_found(good: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([file.name for file in read_manifest(good).files]))
    content = bytearray((good / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    folder = shutil.copytree(good, tmp_path_factory.mktemp("flipped") / "artifact")
    (folder / name).write_bytes(content)
    assert name in {finding.where for finding in verify(folder).findings}
    shutil.rmtree(folder)


# A manifest that is none


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not a manifest of version 2"),
        (b"{}", "not a manifest of version 2"),
        (b'{"manifest_version": 9}', "not a manifest of version 2"),
        (b'{"manifest_version": "2"}', "not a manifest of version 2"),
        (b'{"manifest_version": 2}', "not whole (KeyError: 'target')"),
        (b'{"manifest_version": 2, "target": "\\ud800"}', "not valid JSON"),
    ],
)
def test_a_manifest_that_is_none_is_refused(artifact: Path, text: bytes, reason: str) -> None:
    (artifact / MANIFEST).write_bytes(text)
    with pytest.raises(FormatError) as raised:
        verify(artifact)
    assert str(artifact / MANIFEST) in str(raised.value)
    assert reason in str(raised.value)


def test_a_folder_without_a_manifest_is_a_checkpoint_of_somebody_else(artifact: Path) -> None:
    (artifact / MANIFEST).unlink()
    verdict = verify(artifact)
    assert verdict.findings == ()
    assert (verdict.tensors, verdict.hashed_bytes) == (7, 0)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(FormatError, match="give the folder of a checkpoint"):
        verify(tmp_path)
    with pytest.raises(FormatError, match="no such folder"):
        verify(tmp_path / "nowhere")


@pytest.mark.parametrize("key", ["target", "format", "source", "recipe", "versions", "plan_digest", "ledger_sha256", "ledger", "files"])
def test_a_manifest_that_lacks_a_key_or_has_a_number_there_is_refused_by_it(artifact: Path, key: str) -> None:
    edit(artifact, lambda raw: raw.update({key: 7}))
    with pytest.raises(FormatError, match=key):
        read_manifest(artifact)
    edit(artifact, lambda raw: raw.pop(key))
    with pytest.raises(FormatError, match=key):
        read_manifest(artifact)


@pytest.mark.parametrize("key", ["origin", "commit"])
def test_a_manifest_that_does_not_name_its_source_is_refused(artifact: Path, key: str) -> None:
    edit(artifact, lambda raw: raw["source"].pop(key))
    with pytest.raises(FormatError, match=key):
        read_manifest(artifact)


@pytest.mark.parametrize(
    "changes",
    [
        {"decision": "quantise", "why": "a typo"},
        {"decision": None, "why": "nobody decided"},
        {"scheme": None},
        {"algorithm": 3},
        {"module": None},
        {"outputs": None},
        {"outputs": [[INT8, "I8"]]},
        {"outputs": [[INT8, "I8", "136"]]},
        {"outputs": [[INT8, "I8", [13, 6.0]]]},
        {"outputs": [[[INT8], "I8", [13, 6]]]},
        {"outputs": ["abc"]},
        {"shape": 3},
    ],
    ids=str,
)
def test_an_entry_of_the_ledger_that_is_not_whole_is_refused(artifact: Path, changes: dict[str, object]) -> None:
    change_entry(artifact, INT8, **changes)
    with pytest.raises(FormatError, match="not whole"):
        verify(artifact)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["..", "/dev/zero", "\0", "quantize", "config.json"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, top: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every container and key within a JSON value, with the key at the top that leads there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield top or key, value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key], top or key)


@pytest.fixture(scope="module")
def scratch(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / "artifact")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_manifest_with_anything_anywhere_is_refused_or_judged(good: Path, scratch: Path, data: st.DataObject) -> None:
    raw = json.loads((good / MANIFEST).read_bytes())
    every = list(places(raw))
    top, container, key = every[data.draw(st.integers(0, len(every) - 1))]
    before, container[key] = container[key], data.draw(anything)
    (scratch / MANIFEST).write_text(json.dumps(raw))
    try:
        passed = verify(scratch).passed
    except FormatError as error:
        assert str(scratch / MANIFEST) in str(error)  # noqa: PT017  the other outcome is right as well
    else:
        judged = top in ("format", "files", "ledger", "ledger_sha256")
        assert not (passed and judged and container[key] != before)


# Without torch, and as a program

NO_TORCH = """
import json, sys
from pathlib import Path
from formats.verify import verify
from formats.inspect import inspect
assert verify(Path(sys.argv[1])).passed
inspect(Path(sys.argv[1]))
print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'convert', 'gguf'})))
"""


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def test_verify_and_inspect_do_without_torch(good: Path) -> None:
    assert json.loads(run("-c", NO_TORCH, str(good))) == []


def test_the_program_prints_its_verdict_as_json(artifact: Path) -> None:
    assert json.loads(run("-m", "formats.verify", str(artifact))) == {
        "passed": True,
        "findings": [],
        "files": 6,
        "tensors": 7,
        "hashed_bytes": verify(artifact).hashed_bytes,
    }
    poke(artifact, INT8, 7, b"\x55")
    damaged = json.loads(run("-m", "formats.verify", str(artifact)))
    assert damaged["passed"] is False
    assert [(finding["where"], bool(finding["what"]), bool(finding["remedy"])) for finding in damaged["findings"]] == [(SECOND, True, True)]
    assert json.loads(run("-m", "formats.verify", str(artifact), "--quick"))["passed"] is True


def test_the_program_prints_json_about_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    said = json.loads(run("-m", "formats.verify", str(tmp_path)))
    assert said["passed"] is False
    assert MANIFEST in said["findings"][0]["what"]


def test_a_manifest_is_not_changed_by_being_written(good: Path) -> None:
    manifest = read_manifest(good)
    assert replace(manifest, target="other").to_bytes() != manifest.to_bytes()
    assert json.loads(manifest.to_bytes())["manifest_version"] == 2


def test_a_statement_of_provenance_is_the_one_that_follows_from_the_manifest(artifact: Path) -> None:
    path = artifact / PROVENANCE
    path.write_bytes(statement(read_manifest(artifact)))
    assert verify(artifact).passed
    path.write_bytes(path.read_bytes().replace(b"rtn", b"rtm") + b" ")
    assert [finding.where for finding in verify(artifact).errors] == [PROVENANCE]
    path.unlink()
    path.symlink_to("/dev/zero")
    assert [finding.where for finding in verify(artifact).errors] == [PROVENANCE], "and nothing is read that never ends"
