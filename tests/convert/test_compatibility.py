"""What the plan and the model card make of the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convert import pipeline
from convert.compatibility import judge, loads_in, parts_of, parts_of_ledger, places
from convert.hardware import cpu_tag, this_machine
from convert.plan import make_plan
from convert.runtimes import RUNTIMES
from convert.source import open_source
from formats.compatibility import PLAIN, Part
from formats.errors import RecipeError

CT = "compressed-tensors"


def of(scheme: str, *shapes: tuple[int, int]) -> tuple[Part, ...]:
    return (Part(scheme, frozenset(shapes or ((256, 256),))),)


def test_what_loads_on_none_of_the_hardware_named_is_refused() -> None:
    found = judge("vllm", CT, of("int8-dynamic"), hardware=("sm_100", "sm_120"), machine=None)
    assert found.refusal is not None
    assert found.refusal.startswith("vllm does not load compressed-tensors int8-dynamic on sm_100, sm_120: it loads and stops")
    assert "fp8-dynamic" in found.refusal, "the remedy"
    some = judge("vllm", CT, of("int8-dynamic"), hardware=("sm_90", "sm_120"), machine=None)
    assert some.refusal is None
    assert [warning.split(":")[0] for warning in some.warnings] == ["vllm on sm_120"]


def test_what_loads_nowhere_is_refused_where_no_hardware_is_named() -> None:
    assert judge("vllm", "bitsandbytes", of("llm-int8"), hardware=(), machine="sm_90").refusal
    assert judge("transformers", "modelopt", of("fp8-static"), hardware=(), machine="cpu").refusal
    assert not judge("vllm", CT, of("int8-dynamic"), hardware=(), machine="sm_120").refusal, "sm_90 loads it"


def test_a_shape_that_a_runtime_refuses_is_named() -> None:
    found = judge("vllm", CT, of("fp8-block", (576, 1536)), hardware=("sm_90",), machine=None)
    assert found.refusal is not None
    assert "multiples of 128, and a layer is 576 x 1536" in found.refusal


@pytest.mark.parametrize(
    ("runtime", "scheme", "hardware", "said"),
    [
        ("vllm", "fp8-dynamic", "sm_80", "no FP8 product before sm_89"),
        ("vllm", "fp8-dynamic", "cpu-vnni", "emulated"),
        ("transformers", "int8-weight-only", "sm_90", "decode is no faster than 16 bit"),
        ("vllm", "int8-dynamic", "cpu", "not known"),
        ("vllm", "int8-weight-only", "sm_80", None),
        ("vllm", "int8-dynamic", "sm_80", None),
        ("vllm", "fp8-dynamic", "sm_120", None),
    ],
)
def test_what_has_no_8_bit_kernel_is_warned_of(runtime: str, scheme: str, hardware: str, said: str | None) -> None:
    for asked in ({"hardware": (hardware,), "machine": "sm_90"}, {"hardware": (), "machine": hardware}):
        found = judge(runtime, CT, of(scheme), **asked)  # type: ignore[arg-type]
        assert found.refusal is None
        assert len(found.warnings) == (said is not None), found.warnings
        assert all(str(said) in warning and hardware in warning for warning in found.warnings)


def test_a_warning_names_a_runtime_that_has_the_kernel() -> None:
    (warning,) = judge("transformers", CT, of("int8-dynamic"), hardware=("cpu-vnni",), machine=None).warnings
    assert warning.endswith("; vllm has one there")
    (warning,) = judge("transformers", CT, of("int8-dynamic"), hardware=("sm_120",), machine=None).warnings
    assert not warning.endswith("there"), "no runtime of the table has one"


def test_the_plan_warns_and_knows_the_words_for_hardware(make_llama: Any, recipe_for: Any) -> None:
    text = (
        "model: {model}\ntargets:\n  - name: q\n    format: compressed-tensors\n    rules: [{{match: linear, scheme: {scheme}}}]\n"
        "    runtimes:\n      - transformers\n    hardware: [sm_90]\n"
    )
    folder = make_llama()
    source = open_source(str(folder))
    warnings = make_plan(recipe_for(folder, text=text), source, pipeline.plan(recipe_for(folder)).architecture).warnings()
    assert [
        warning for warning in warnings if warning.startswith("q: transformers on sm_90: compressed-tensors int8-dynamic: no 8-bit kernel")
    ]
    with pytest.raises(RecipeError, match=r"test.yaml:8:\d+: no hardware is called 'sm_9' \(did you mean sm_90"):
        recipe_for(folder, text=text.replace("sm_90", "sm_9"))


@pytest.mark.skipif("vllm" not in RUNTIMES, reason="no runtime here refuses what its format can hold")
def test_the_command_refuses_what_a_runtime_cannot_load(make_llama: Any, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {make_llama()}\ntargets:\n  - name: q\n    format: compressed-tensors\n    hardware: [sm_120]\n    runtimes:\n"
        "      - transformers\n      - vllm\n"
    )
    done = subprocess.run([sys.executable, "-m", "convert", "plan", str(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout
    assert f"error: {job}:8:9: vllm does not load compressed-tensors int8-dynamic on sm_120: it loads and stops" in done.stderr
    assert "Traceback" not in done.stderr
    job.write_text(job.read_text().replace("sm_120", "sm_90"))
    done = subprocess.run([sys.executable, "-m", "convert", "plan", str(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loads in   transformers 5.23 (dequantize on all)" in done.stdout
    assert "warning    q: transformers on sm_90: compressed-tensors int8-dynamic: no 8-bit kernel, dequantize" in done.stdout


def test_the_ledger_and_the_plan_agree_on_what_is_quantized(make_llama: Any, recipe_for: Any) -> None:
    target = pipeline.plan(recipe_for(make_llama())).targets[0]
    planned = parts_of(target.contents.layers)
    assert parts_of_ledger(json.loads(json.dumps(target.ledger()))) == planned
    assert {(64, 64), (32, 64), (96, 64), (64, 96)} == planned[0].shapes
    assert parts_of([]) == (Part(PLAIN, frozenset()),)


def test_the_card_tells_what_was_proven_from_what_is_in_the_table() -> None:
    found = places(CT, of("int8-dynamic"), {"transformers": "5.23.0 cpu", "onnxruntime": "1.32 cpu"})
    proven = {place.runtime: place.proven for place in found if place.proven}
    assert proven == {"transformers": "5.23.0 on cpu", "onnxruntime": "1.32 on cpu"}
    vllm = next(place for place in found if place.runtime == "vllm")
    assert "none on sm_100 sm_120" in vllm.where
    assert any("scaled_mm_entry.cu" in evidence for evidence in vllm.evidence)


def test_loads_in_is_a_line_a_runtime() -> None:
    lines = loads_in(CT, of("int8-dynamic"))
    assert lines[0] == "transformers 5.23 (dequantize on all)"
    assert lines[1].startswith("vllm 0.32 (native on cpu-vnni cpu-amx sm_75 sm_80 sm_86 sm_89 sm_90; none on sm_100 sm_120)")


def test_a_processor_is_told_by_its_instructions() -> None:
    assert cpu_tag({"avx2", "avx512_vnni", "amx_int8"}) == "cpu-amx"
    assert cpu_tag({"avx512_vnni"}) == cpu_tag({"avx_vnni"}) == "cpu-vnni"
    assert cpu_tag({"avx2", "avx512f", "amx_tile"}) == "cpu"
    flags = Path("/proc/cpuinfo").read_text()
    machine = this_machine()
    assert machine.startswith("sm_") or (machine == "cpu-amx") == ("amx_int8" in flags)
