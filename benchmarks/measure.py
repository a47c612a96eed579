"""A command run as a whole process, and what it took; the facts of the machine it ran on.

Nothing heavy is imported here, nor may be by a script that measures: at exec, Linux credits the child with the peak memory of the
process it was forked from, so a parent of 500 MB reports every child as at least that.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Seconds between two looks at a child's anonymous memory.
SAMPLE_SECONDS = 0.05
WARM_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Usage:
    """What a process took, its reaped children included in the times.

    ``peak_resident_bytes`` is ``ru_maxrss`` of wait4: the truth, but with the pages of mapped files that the kernel could drop at
    any time. ``peak_anonymous_bytes`` leaves those out; it is sampled, so a spike shorter than :data:`SAMPLE_SECONDS` may be missing.
    """

    wall_seconds: float
    user_seconds: float
    system_seconds: float
    peak_resident_bytes: int
    peak_anonymous_bytes: int
    stdout: str

    def record(self) -> dict[str, Any]:
        """Everything but the text."""
        return {name: value for name, value in asdict(self).items() if name != "stdout"}

    def answer(self) -> dict[str, Any]:
        """The last line of JSON that the process printed. Raises :class:`RuntimeError` when there is none."""
        for line in reversed(self.stdout.splitlines()):
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError("the process printed no line of JSON")


def run_measured(command: Sequence[str], *, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> Usage:
    """Runs a command to its end. Raises :class:`RuntimeError` with the end of its output when it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=cwd, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=out, stderr=log)
        with _AnonymousPeak(process.pid) as anonymous:
            _, status, usage = os.wait4(process.pid, 0)
            wall_seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        stdout = out.read().decode(errors="replace")
        if process.returncode:
            log.seek(0)
            tail = (stdout + log.read().decode(errors="replace"))[-4000:]
            raise RuntimeError(f"exit {process.returncode} from {' '.join(command)}:\n{tail}")
    return Usage(wall_seconds, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024, anonymous.peak_bytes, stdout)


class _AnonymousPeak:
    """Watches RssAnon of a process from a thread."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _AnonymousPeak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                found = re.search(r"RssAnon:\s+(\d+) kB", self._status.read_text())
            except OSError:
                return
            if found:
                self.peak_bytes = max(self.peak_bytes, int(found[1]) * 1024)


def settle(source: Path) -> None:
    """Brings every run to the same start: earlier writes on the disk, the source in the page cache as far as it fits."""
    os.sync()
    buffer = bytearray(WARM_CHUNK_BYTES)
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def delete(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size_bytes(folder: Path) -> int:
    """All files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def versions(python: str, distributions: Sequence[str]) -> dict[str, str]:
    """Of an interpreter and of what is installed for it; what is not is left out."""
    program = (
        "import json, platform, sys\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = version(name)\n"
        "    except PackageNotFoundError: pass\n"
        "print(json.dumps(found))\n"
    )
    return run_measured([python, "-c", program, *distributions]).answer()


def machine() -> dict[str, Any]:
    """Cores this process may use, processor, memory, kernel, GPU (None without), and the commit that is measured."""
    processor = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": processor[1] if processor else platform.machine(),
        "memory_bytes": int(memory[1]) * 1024 if memory else None,
        "kernel": platform.release(),
        "gpu": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
