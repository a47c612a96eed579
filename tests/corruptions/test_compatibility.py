"""The matrix of folders that anybody made, of every format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from convert.command import app
from formats.inspect import compatibility

#: folder -> format, schemes, and the kernel in vLLM 0.32 on sm_90 (None: it has no line).
KNOWN = {
    "source": ("plain", ["plain"], "plain"),
    "int8": ("compressed-tensors", ["int8-dynamic"], "native"),
    "int8-static": ("compressed-tensors", ["int8-static"], "native"),
    "packed": ("compressed-tensors", ["int8-weight-only"], "fused"),
    "packed-g64": ("compressed-tensors", ["int8-weight-only-g64"], "fused"),
    "fp8": ("compressed-tensors", ["fp8-dynamic"], "native"),
    "fp8-static": ("compressed-tensors", ["fp8-static"], "native"),
    "block": ("compressed-tensors", ["fp8-block"], "native"),
    "mxfp8": ("compressed-tensors", ["mxfp8"], "fused"),
    "mixed": ("compressed-tensors", ["fp8-dynamic", "int8-dynamic"], "native"),
    "fine-grained": ("fp8", ["fp8-block"], "native"),
    "modelopt": ("modelopt", ["fp8-static"], "native"),
    "modelopt-legacy": ("modelopt", ["fp8-static"], "native"),
    "torchao": ("torchao", ["int8-weight-only"], None),
    "bitsandbytes": ("bitsandbytes", ["llm-int8"], "none"),
}


def test_folders_of_every_format_have_their_matrix(goods: Mapping[str, Path]) -> None:
    for name, (format_name, schemes, kernel) in KNOWN.items():
        if name == "bitsandbytes" and name not in goods:
            continue
        found = compatibility(goods[name])
        assert (found["format"], sorted(found["schemes"])) == (format_name, schemes), name
        vllm = next((line for line in found["matrix"] if line["runtime"] == "vllm" and line["versions"][0] == "0.32"), None)
        assert (vllm and vllm["kernels"]["sm_90"]) == kernel, name
        assert found["matrix"], name


def test_the_command_prints_it(goods: Mapping[str, Path]) -> None:
    run = CliRunner().invoke(app, ["inspect", "--matrix", str(goods["fp8"])])
    assert run.exit_code == 0, run.output
    assert "compressed-tensors, fp8-dynamic" in run.output
    assert "emulated" in run.output
    assert "_C::static_scaled_fp8_quant" not in run.output, "what is said of other schemes"
    assert "scaled_mm_entry.cu" in run.output
    as_json = CliRunner().invoke(app, ["inspect", "--matrix", "--json", str(goods["torchao"])])
    assert json.loads(as_json.output) == compatibility(goods["torchao"])


@pytest.mark.parametrize("name", ["gone", "file"])
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    from formats.errors import FormatError

    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="no such folder"):
        compatibility(tmp_path / name)
