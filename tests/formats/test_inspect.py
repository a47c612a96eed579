"""What a folder or file holds, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from formats.errors import FormatError
from formats.inspect import inspect
from formats.manifest import MANIFEST, FileRecord, Manifest, ledger_digest
from formats.safetensors import INDEX_FILE

TENSORS = {
    "embed_tokens.weight": torch.zeros(11, 6, dtype=torch.bfloat16),
    "up_proj.weight": torch.zeros(13, 6, dtype=torch.int8),
    "up_proj.weight_scale": torch.ones(13, 1, dtype=torch.bfloat16),
    "down_proj.weight": torch.zeros(6, 13, dtype=torch.float8_e4m3fn),
    "down_proj.weight_scale": torch.ones(6, 1, dtype=torch.bfloat16),
    "norm.weight": torch.ones(6, dtype=torch.bfloat16),
    "temperature": torch.tensor(1.0),
}
ROWS = {
    ("BF16", "matrices"): (1, 66, 132),
    ("I8", "codes"): (1, 78, 78),
    ("F8_E4M3", "codes"): (1, 78, 78),
    ("BF16", "scales and shapes"): (2, 19, 38),
    ("BF16", "vectors"): (1, 6, 12),
    ("F32", "vectors"): (1, 1, 4),
}
CONFIG = {"architectures": ["TinyForCausalLM"], "model_type": "tiny", "hidden_size": 6, "dtype": "bfloat16", "rope_theta": 1e4}


def rows_of(found: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {(row["dtype"], row["kind"]): (row["tensors"], row["elements"], row["bytes"]) for row in found["tensors"]}


def save_folder(folder: Path, config: object = CONFIG) -> Path:
    safetensors.torch.save_file(TENSORS, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_single_file_is_counted_by_dtype_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"format": "pt", "note": "hello"})
    found = inspect(path)
    assert rows_of(found) == ROWS
    assert found["path"] == str(path)
    assert found["metadata"] == {"format": "pt", "note": "hello"}


def test_the_largest_come_first(tmp_path: Path) -> None:
    found = inspect(save_folder(tmp_path))
    assert [row["bytes"] for row in found["tensors"]] == sorted((size for _, _, size in ROWS.values()), reverse=True)


def test_a_folder_also_says_what_model_it_is(tmp_path: Path) -> None:
    found = inspect(save_folder(tmp_path))
    assert rows_of(found) == ROWS
    assert found["model"] == {"architectures": ["TinyForCausalLM"], "model_type": "tiny", "hidden_size": 6, "dtype": "bfloat16"}
    assert found["quantization"] == "none"
    assert "made_by" not in found


def test_a_folder_says_how_it_is_quantized(tmp_path: Path) -> None:
    quantization = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    assert inspect(save_folder(tmp_path, {**CONFIG, "quantization_config": quantization}))["quantization"] == quantization


def test_shards_are_counted_together(tmp_path: Path) -> None:
    weight_map = {name: f"{i % 2}.safetensors" for i, name in enumerate(TENSORS)}
    for file in set(weight_map.values()):
        safetensors.torch.save_file({name: tensor for name, tensor in TENSORS.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    found = inspect(tmp_path)
    assert rows_of(found) == ROWS
    assert found["model"] == {}, "a folder of weights alone is a folder that can be inspected"


@pytest.mark.parametrize(
    ("name", "tensor", "kind"),
    [
        ("q_proj.weight_scale_inv", torch.ones(2, 2), "scales and shapes"),  # block float8 of transformers
        ("q_proj.weight_zero_point", torch.zeros(3, 1, dtype=torch.int8), "scales and shapes"),
        ("q_proj.input_scale", torch.ones(1), "scales and shapes"),
        ("q_proj.weight_shape", torch.zeros(2, dtype=torch.int64), "scales and shapes"),  # pack-quantized
        ("q_proj.SCB", torch.ones(3), "scales and shapes"),  # bitsandbytes
        ("q_proj.weight_format", torch.tensor(0, dtype=torch.uint8), "scales and shapes"),
        ("q_proj.weight_packed", torch.zeros(3, 2, dtype=torch.int32), "codes"),
        ("q_proj.weight", torch.zeros(3, 2, dtype=torch.float16), "matrices"),
        ("q_proj.bias", torch.zeros(3), "vectors"),
        ("conv.weight", torch.zeros(3, 2, 1, 1), "matrices"),
        ("rescale", torch.zeros(3), "vectors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_a_weight_is_told_from_what_is(tmp_path: Path, name: str, tensor: torch.Tensor, kind: str) -> None:
    safetensors.torch.save_file({name: tensor}, tmp_path / "one.safetensors")
    (row,) = inspect(tmp_path / "one.safetensors")["tensors"]
    assert row["kind"] == kind


def test_an_artifact_says_what_made_it_and_of_what(tmp_path: Path) -> None:
    manifest = Manifest(
        target="int8",
        format="compressed-tensors",
        source={"origin": "org/model", "commit": "abc", "licence": "mit", "base_model": "org/model", "files": []},
        recipe={},
        calibration=None,
        versions={"octavo": "9.9.9", "torch": "2"},
        plan_digest="",
        ledger_sha256=ledger_digest([]),
        ledger=(),
        files=(FileRecord("config.json", 1, "0" * 64),),
    )
    save_folder(tmp_path)
    (tmp_path / MANIFEST).write_bytes(manifest.to_bytes())
    assert inspect(tmp_path)["made_by"] == {"octavo": "9.9.9", "target": "int8", "source": "org/model", "commit": "abc"}
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(FormatError, match=MANIFEST):
        inspect(tmp_path)


def write_gguf(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    eight = gguf.GGMLQuantizationType.Q8_0
    for name, rows in (("token_embd.weight", 16), ("blk.0.attn_q.weight", 32)):
        writer.add_tensor(name, gguf.quants.quantize(np.zeros((rows, 32), np.float32), eight), raw_dtype=eight)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_is_counted_by_block_type(tmp_path: Path) -> None:
    found = inspect(write_gguf(tmp_path / "tiny.gguf"))
    assert rows_of(found) == {("Q8_0", "codes"): (2, 48 * 32, 48 * 34), ("F32", "vectors"): (1, 32, 128)}
    assert found["metadata"] == {"name": "tiny llama"}
    assert (found["model"]["model_type"], found["model"]["num_attention_heads"], found["model"]["vocab_size"]) == ("llama", 2, 16)


@pytest.mark.parametrize("kind", ["folder", "file", "gguf"])
def test_what_is_found_is_plain_data(tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        path = write_gguf(tmp_path / "tiny.gguf")
    else:
        path = save_folder(tmp_path) if kind == "folder" else save_folder(tmp_path) / "model.safetensors"
    found = inspect(path)
    assert json.loads(json.dumps(found)) == found


def test_what_cannot_be_read_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("not a header, but long enough to have one")
    (tmp_path / "text.gguf").write_text("not a header, but long enough to have one")
    for name, reason in (("gone", "no such file"), ("empty", "neither"), ("text.txt", "no safetensors file"), ("text.gguf", "GGUF")):
        with pytest.raises(FormatError, match=reason) as raised:
            inspect(tmp_path / name)
        assert name in str(raised.value)


@pytest.mark.parametrize(("text", "reason"), [("[]", "not a JSON object"), ("{", "not valid JSON"), ('"a"', "not a JSON object")])
def test_a_folder_with_a_broken_config_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (save_folder(tmp_path) / "config.json").write_text(text)
    with pytest.raises(FormatError, match=rf"config\.json: {reason}"):
        inspect(tmp_path)
