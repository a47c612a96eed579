"""The table: whole, with its evidence, and right where the answer is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.runtimes import RUNTIMES
from formats import FORMATS
from formats.compatibility import HARDWARE, KERNELS, PLAIN, TABLE, VERSIONS, Part, find, kernel_of, markdown, matrix, worst
from formats.scheme import SCHEMES

ACCEPTED = [
    (name, scheme.name)
    for name, form in FORMATS.items()
    for scheme in SCHEMES.values()
    if form.refusal(scheme, (256, 512), transposed=False) is None
]

#: What a runtime names the format of, and nobody has run there or read: the plan warns that it is not known. Whoever runs one moves it.
NOT_KNOWN = {
    *(("onnxruntime-gpu", "onnx", scheme) for scheme in ("int8-weight-only-g64", "int8-weight-only-g128", "int8-dynamic", "int8-static")),
    *(("onnxruntime-gpu", "onnx", scheme) for scheme in ("fp8-weight-only", "fp8-static", "int8-lookup")),
    *(("onnxruntime-gpu", "onnx-matmulnbits", scheme) for scheme in ("int8-weight-only", "int8-weight-only-g32")),
    *(("onnxruntime-gpu", "onnx-matmulnbits", scheme) for scheme in ("int8-weight-only-g64", "int8-weight-only-g128", "int8-lookup")),
}


@pytest.mark.parametrize(("name", "scheme"), ACCEPTED)
def test_what_can_be_written_has_a_row_in_every_runtime_that_names_its_format(name: str, scheme: str) -> None:
    for runtime, known in RUNTIMES.items():
        if name in known.formats:
            known_of = any(find(runtime, place, name, scheme) for place in HARDWARE)
            assert known_of != ((runtime, name, scheme) in NOT_KNOWN), f"{runtime}: {name} {scheme} has {'a' if known_of else 'no'} row"


def test_every_row_says_where_it_is_from_and_speaks_the_words_there_are() -> None:
    for row in TABLE:
        assert row.evidence.startswith(("read: ", "seen: ")), row
        assert len(row.evidence) > len("read: project:path"), row
        assert row.kernel in KERNELS, row
        assert set(row.hardware) <= set(HARDWARE), row
        assert set(row.versions) <= set(VERSIONS[row.runtime]), row
        assert row.hardware, row
        assert row.schemes, row
        assert row.note or row.kernel in ("plain", "native", "fused"), f"what is slow or refused says why: {row}"


def test_no_row_stands_wholly_in_the_shade_of_those_before_it() -> None:
    taken: set[tuple[str, str, str, str, str]] = set()
    for row in TABLE:
        mine = {
            (row.runtime, version, place, row.format, scheme)
            for version in row.versions
            for place in row.hardware
            for scheme in row.schemes
        }
        assert mine - taken, f"never found: {row}"
        taken |= mine


@pytest.mark.parametrize(
    ("runtime", "version", "hardware", "name", "scheme", "kernel"),
    [
        ("vllm", None, "cpu-vnni", "compressed-tensors", "int8-dynamic", "native"),
        ("vllm", None, "cpu-vnni", "compressed-tensors", "fp8-dynamic", "emulated"),
        ("vllm", None, "cpu-vnni", "compressed-tensors", "int8-weight-only-g64", "none"),
        ("vllm", None, "cpu", "compressed-tensors", "int8-dynamic", "not known"),
        ("vllm", "0.24", "sm_90", "compressed-tensors", "int8-dynamic", "native"),
        ("vllm", None, "sm_120", "compressed-tensors", "int8-dynamic", "none"),
        ("vllm", None, "sm_120", "compressed-tensors", "fp8-dynamic", "native"),
        ("vllm", None, "sm_80", "compressed-tensors", "fp8-dynamic", "fused"),
        ("vllm", None, "sm_80", "compressed-tensors", "int8-weight-only", "fused"),
        ("vllm", "0.32", "sm_89", "compressed-tensors", "fp8-block", "fused"),
        ("vllm", "0.24", "sm_89", "compressed-tensors", "fp8-block", "native"),
        ("vllm", None, "sm_90", "bitsandbytes", "llm-int8", "none"),
        ("vllm", None, "sm_110", "compressed-tensors", "int8-dynamic", "not known"),
        ("transformers", "5.23", "sm_90", "compressed-tensors", "int8-weight-only", "dequantize"),
        ("transformers", "5.23", "sm_90", "fp8", "fp8-block", "native"),
        ("transformers", "5.23", "sm_80", "fp8", "fp8-block", "dequantize"),
        ("transformers", "4.57.1", "cpu", "fp8", "fp8-block", "none"),
        ("transformers", "4.57.1", "sm_90", "fp8", "fp8-block", "not known"),
        ("transformers", None, "cpu", "modelopt", "fp8-static", "none"),
        ("bitsandbytes", None, "cpu", "bitsandbytes", "llm-int8", "emulated"),
        ("tensorrt-llm", None, "sm_80", "modelopt", "fp8-static", "none"),
        ("onnxruntime", None, "cpu", "compressed-tensors", "int8-dynamic", "not known"),
        ("onnxruntime-gpu", None, "sm_90", "onnx", "int8-weight-only", "fused"),
        ("onnxruntime-gpu", None, "sm_80", "onnx", "int8-weight-only", "not known"),
        ("onnxruntime-gpu", None, "sm_90", "onnx", "int8-static", "not known"),
        ("vllm", "0.32", "cpu-vnni", "compressed-tensors", "int8-dynamic-experts", "none"),
        ("vllm", "0.32", "cpu-amx", "compressed-tensors", "int8-dynamic-experts", "native"),
        ("vllm", "0.24", "cpu-amx", "compressed-tensors", "int8-dynamic-experts", "none"),
        ("vllm", None, "cpu-vnni", "compressed-tensors", "fp8-dynamic-experts", "none"),
        ("vllm", None, "sm_120", "compressed-tensors", "int8-dynamic-experts", "native"),
        ("vllm", None, "sm_80", "compressed-tensors", "fp8-static-experts", "fused"),
        ("vllm", None, "sm_90", "compressed-tensors", "int8-static-experts", "none"),
        ("vllm", None, "sm_90", "fp8", "fp8-block-experts", "native"),
        ("transformers", None, "cpu-vnni", "compressed-tensors", "fp8-dynamic-experts", "dequantize"),
        ("transformers", None, "sm_90", "compressed-tensors", "int8-dynamic-experts", "none"),
    ],
)
def test_answers_that_are_known(runtime: str, version: str | None, hardware: str, name: str, scheme: str, kernel: str) -> None:
    assert kernel_of(find(runtime, hardware, name, scheme, version=version)) == kernel


def test_a_shape_that_the_runtime_refuses_is_none() -> None:
    row = find("vllm", "sm_90", "compressed-tensors", "fp8-block")
    assert kernel_of(row, [(256, 128)]) == "native"
    assert kernel_of(row, [(256, 128), (576, 128)]) == "none"
    assert kernel_of(row, [(256, 1)]) == "none"
    assert str(row and row.shape) == "output features in multiples of 128 and input features in multiples of 128"


def test_a_mixture_is_as_good_as_the_part_that_holds_it_back() -> None:
    def parts(*schemes: str | None) -> list[Part]:
        return [Part(scheme, frozenset()) for scheme in schemes]

    assert worst("vllm", "sm_90", "compressed-tensors", parts("int8-dynamic", "fp8-dynamic"))[0] == "native"
    assert worst("vllm", "sm_80", "compressed-tensors", parts("int8-dynamic", "fp8-dynamic"))[0] == "fused"
    assert worst("vllm", "sm_120", "compressed-tensors", parts("int8-dynamic", "fp8-dynamic"))[0] == "none"
    assert worst("vllm", "sm_90", "compressed-tensors", parts("int8-dynamic", None))[0] == "not known"


def test_the_matrix_has_a_line_a_version_that_differs() -> None:
    lines = [(line.runtime, line.versions) for line in matrix("compressed-tensors", [Part("fp8-weight-only", frozenset())])]
    assert lines == [("transformers", ("5.23",)), ("vllm", ("0.32",)), ("vllm", ("0.24",)), ("sglang", ("0.5.23",))]
    assert {kernel for line in matrix(PLAIN, [Part(PLAIN, frozenset())]) for kernel in line.kernels.values()} == {"plain", "not known"}


def test_the_docs_show_the_table_there_is() -> None:
    shown = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    assert shown == markdown(), "docs/compatibility.md is out of date; run: make docs"
