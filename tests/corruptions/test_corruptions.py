"""Every known failure is found, with what it is and who trips over it; good checkpoints have no finding."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from corruptions.table import CORRUPTIONS

from formats.verify import verify

GOOD = (
    *("int8", "int8-static", "int8-head", "packed", "packed-g64", "fp8", "fp8-static", "block", "mxfp8", "cache", "cache-per-head"),
    *("mixed", "sharded", "tied", "qwen2", "source", "fine-grained", "modelopt", "modelopt-legacy", "torchao"),
    *("bitsandbytes", "bitsandbytes-mixtral", "bitsandbytes-tied"),
)


def folder_of(goods: Mapping[str, Path], name: str) -> Path:
    if name not in goods and name.startswith("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    return goods[name]


@pytest.mark.parametrize("name", GOOD)
def test_good_checkpoints_have_no_finding(goods: Mapping[str, Path], artifacts: Mapping[str, Path], name: str) -> None:
    assert verify(folder_of(goods, name)).findings == ()
    if name in artifacts:
        assert verify(artifacts[name]).findings == ()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_are_found(goods: Mapping[str, Path], tmp_path: Path, name: str) -> None:
    corruption = CORRUPTIONS[name]
    folder = shutil.copytree(folder_of(goods, corruption.good), tmp_path / "corrupted")
    corruption.do(folder)
    verdict = verify(folder)
    found = [
        finding
        for finding in verdict.findings
        if corruption.where in finding.where
        and corruption.what in finding.what
        and finding.severity == corruption.severity
        and corruption.runtime in finding.runtime
    ]
    assert found, verdict.findings
    assert found[0].remedy
    assert verdict.passed == (corruption.severity == "warning"), verdict.findings
