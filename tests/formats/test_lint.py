"""What the linter says of folders; tests/corruptions holds what it must find."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.lint import ERROR, WARNING, lint
from formats.safetensors import TensorSpec, lay_out
from formats.verify import verify

CT = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}


def write(folder: Path, tensors: dict[str, np.ndarray[Any, Any]], config: dict[str, Any]) -> Path:
    """A checkpoint by hand: float32, int8 and uint8 arrays."""
    names = {"float32": "F32", "int8": "I8", "uint8": "U8", "int32": "I32", "int64": "I64"}
    specs = [TensorSpec(name, names[array.dtype.name], array.shape) for name, array in tensors.items()]
    (shard,) = lay_out(specs, {"format": "pt"}, 1 << 40)
    content = bytearray(shard.header.ljust(shard.size_bytes))
    for item in shard.tensors:
        content[item.start : item.stop] = tensors[item.spec.name].tobytes()
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def layer(module: str, rows: int = 8, columns: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(len(module))
    return {
        f"{module}.weight": rng.integers(-127, 127, (rows, columns), np.int8),
        f"{module}.weight_scale": np.full((rows, 1), 0.01, np.float32),
    }


def test_a_row_of_zeros_may_have_a_scale_of_zero(tmp_path: Path) -> None:
    tensors = layer("m.up_proj")
    tensors["m.up_proj.weight_scale"][3] = 0
    write(tmp_path, tensors, {"quantization_config": CT})
    assert [finding.what for finding in lint(tmp_path)] == ["1 scales are not positive numbers, the first 0.0 at 3"]
    tensors["m.up_proj.weight"][3] = 0
    assert lint(write(tmp_path, tensors, {"quantization_config": CT})) == []


def test_errors_come_before_warnings_and_warnings_pass(tmp_path: Path) -> None:
    section = {**CT, "ignore": ["lm_head", "m.none"]}
    write(tmp_path, layer("m.up_proj"), {"quantization_config": section})
    verdict = verify(tmp_path)
    assert [finding.severity for finding in verdict.findings] == [WARNING]
    assert verdict.passed
    write(tmp_path, layer("m.up_proj"), {"quantization_config": {**section, "quantization_status": "frozen"}})
    verdict = verify(tmp_path)
    assert [finding.severity for finding in verdict.findings] == [ERROR, WARNING]
    assert verdict.errors == verdict.findings[:1]
    assert not verdict.passed


def test_a_quick_look_reads_scales_and_no_codes(tmp_path: Path) -> None:
    import ml_dtypes

    codes = np.zeros((8, 4), np.uint8)
    codes[2, 1] = 0x7F
    section = json.loads(json.dumps(CT).replace('"int"', '"float"').replace("int-quantized", "float-quantized"))
    tensors = {**layer("m.up_proj"), "m.up_proj.weight": codes}
    write(tmp_path, tensors, {"quantization_config": section})
    raw = (tmp_path / "model.safetensors").read_bytes().replace(b'"dtype":"U8",', b'"dtype":"F8_E4M3",')
    length = int.from_bytes(raw[:8], "little") + len("F8_E4M3") - len("U8")
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + raw[8:])
    assert np.isnan(codes.view(ml_dtypes.float8_e4m3fn)).sum() == 1
    assert [finding.where for finding in lint(tmp_path)] == ["m.up_proj.weight"]
    assert lint(tmp_path, quick=True) == []


@pytest.mark.parametrize("count", [2, 4])
def test_experts_that_vllm_fuses_are_quantized_alike(tmp_path: Path, count: int) -> None:
    tensors: dict[str, Any] = {}
    for expert in range(count):
        tensors |= layer(f"m.layers.0.mlp.experts.{expert}.down_proj")
    assert lint(write(tmp_path, tensors, {"quantization_config": CT})) == []
    del tensors["m.layers.0.mlp.experts.1.down_proj.weight_scale"]
    tensors["m.layers.0.mlp.experts.1.down_proj.weight"] = np.ones((8, 4), np.float32)
    section = {**CT, "ignore": ["m.layers.0.mlp.experts.1.down_proj"]}
    (finding,) = lint(write(tmp_path, tensors, {"quantization_config": section}))
    assert (finding.where, finding.runtime) == ("m.layers.0.mlp.experts (experts)", "vLLM")
    assert "experts.1.down_proj is the odd one (float)" in finding.what


def test_a_router_that_is_left_alone_without_a_word_is_a_warning(tmp_path: Path) -> None:
    tensors = {**layer("m.mlp.experts.0.w1"), "m.mlp.gate.weight": np.ones((2, 4), np.float32)}
    (finding,) = lint(write(tmp_path, tensors, {"quantization_config": CT}))
    assert (finding.where, finding.severity, finding.runtime) == ("m.mlp.gate.weight", WARNING, "transformers 4")


def test_names_of_a_vision_language_model_are_not_held_against_its_lists(tmp_path: Path) -> None:
    config = {"quantization_config": {**CT, "ignore": ["lm_head", "model.visual.merger"]}, "vision_config": {}}
    assert lint(write(tmp_path, layer("language_model.model.up_proj"), config)) == []


def test_a_chat_template_is_missed_only_where_there_is_chat(tmp_path: Path) -> None:
    write(tmp_path, layer("m.up_proj"), {"quantization_config": CT, "vocab_size": 9})
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"content": "<s>"}]}')
    assert lint(tmp_path) == []
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"content": "<start_of_turn>"}]}')
    (finding,) = lint(tmp_path)
    assert "the tokenizer knows <start_of_turn>" in finding.what
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert lint(tmp_path) == []


@pytest.mark.parametrize("config", [b"", b"[]", b"{", b'{"quantization_config": 3}', b'{"quantization_config": {"quant_method": []}}'])
@pytest.mark.parametrize("weights", [b"", b"\0" * 100, None])
def test_nothing_ends_in_a_traceback(tmp_path: Path, config: bytes, weights: bytes | None) -> None:
    write(tmp_path, layer("m.up_proj"), {})
    (tmp_path / "config.json").write_bytes(config)
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    findings = lint(tmp_path)
    assert findings
    assert all(finding.severity == ERROR for finding in findings)


HOSTILE: list[Any] = [None, 3, -1, True, "x", [], {}, [3], ["re:("], {"a": 3}, [128, 128], 1e999]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
@pytest.mark.parametrize("base", ["compressed-tensors", "fp8", "modelopt", "bitsandbytes", "torchao"])
def test_no_value_of_any_key_ends_in_a_traceback(tmp_path: Path, base: str, value: Any) -> None:
    bases: dict[str, dict[str, Any]] = {
        "compressed-tensors": {**CT, "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
        "fp8": {"quant_method": "fp8", "weight_block_size": [4, 4], "activation_scheme": "dynamic", "modules_to_not_convert": ["a"]},
        "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["a"], "kv_cache_scheme": {"type": "float", "num_bits": 8}},
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["a"]},
        "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    }
    tensors = {
        **layer("m.self_attn.k_proj"),
        "m.self_attn.k_scale": np.ones(1, np.float32),
        "m.self_attn.k_proj.SCB": np.ones(8, np.float32),
    }
    write(tmp_path, tensors, {})
    for path in _paths(bases[base]):
        section = json.loads(json.dumps(bases[base]))
        parent = section
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = value
        config = {
            "quantization_config": section,
            "vocab_size": value,
            "rope_parameters": value,
            "architectures": value,
            "text_config": value,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        for finding in lint(tmp_path):
            assert finding.severity in (ERROR, WARNING)


def _paths(value: Any) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict):
        return []
    return [path for key, inner in value.items() for path in ((key,), *((key, *rest) for rest in _paths(inner)))]


def test_memory_does_not_grow_with_the_codes(tmp_path: Path) -> None:
    """64 MB of codes, streamed and not held: in a process of its own, under a limit that holding them would break."""
    rows, columns = 4096, 4096
    tensors = {f"m.{i}.{name}": array for i in range(4) for name, array in layer("up_proj", rows, columns).items()}
    write(tmp_path, tensors, {"quantization_config": CT})
    program = (
        "import resource, sys; from pathlib import Path; from formats.lint import lint;"
        "import numpy, ml_dtypes; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "assert lint(Path(sys.argv[1])) == [];"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16_000
