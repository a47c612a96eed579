"""Programs that run in a process of their own, asked and answered in JSON files, so that what they hold goes with them."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from convert.ailments import explain, last_lines
from convert.environments import COMMAND, Environment, surroundings
from convert.leash import leashed
from convert.recipe import Recipe
from formats.errors import MachineError


def request(recipe: Recipe, scratch: Path, *, device: str = "cpu") -> dict[str, Any]:
    """What every program that runs a model is asked; the tokens lie in ``scratch/tokens.npy``."""
    return {
        "tokens": str(scratch / "tokens.npy"),
        "device": device,
        "threads": threads(),
        "trust_remote_code": recipe.trust_remote_code,
    }


def threads() -> int:
    """With how many threads a program computes: what ``OMP_NUM_THREADS`` says, else one for each processor it may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a list has a number for each level of nesting
    return int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))


def run(
    program: str, request: dict[str, Any], scratch: Path, *, environment: Environment | None = None
) -> tuple[dict[str, Any] | None, str]:
    """A program's answer, or None and why there is none, with the remedy where that is known.

    With ``environment`` the program is run in it as a file and sees nothing of ours. Raises :class:`MachineError` when that environment is
    broken, which is no fault of what was to be run.
    """
    answer, output = run_program(program, request, scratch, environment=environment)
    return answer, "" if answer is not None else explain(output)


def run_program(
    program: str, request: dict[str, Any], scratch: Path, *, environment: Environment | None = None
) -> tuple[dict[str, Any] | None, str]:
    """A program's answer, or None and everything it printed."""
    (scratch / "request.json").write_text(json.dumps(request))
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    variables, device = _variables(environment), str(request.get("device", "cpu"))
    arguments = [str(scratch / "request.json"), str(answer)]
    if environment is None and program in _FORKED and _server.serves(device):
        code, output = _server.run(program, arguments, scratch / "output.txt", variables, device)
    else:
        start = [*environment.start, _file(program)] if environment else [sys.executable, "-m", program]
        code, output = _alone([*start, *arguments], variables)
        if environment and code == MachineError.exit_code:
            raise MachineError(f"the environment of {program} is broken: {last_lines(output)}; build it again: {COMMAND}")
    if code == 0 and answer.exists():
        return json.loads(answer.read_text()), ""
    killed = f"\nit was killed by signal {-code}" if code < 0 else ""
    return None, output + killed


def prepare(device: str) -> None:
    """Lets what a check's programs share be imported while other things are done; nothing waits for it."""
    if _server.serves(device):
        _server.begin(_variables(None), device)


def _variables(environment: Environment | None) -> dict[str, str]:
    # transformers puts what went wrong with a weight into a warning, and raises an error that only points to it.
    return {
        **(surroundings() | dict(environment.variables) if environment else os.environ),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "warning",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _alone(command: Sequence[str], variables: dict[str, str]) -> tuple[int, str]:
    """A command's exit code (negative: the signal that killed it) and what it printed."""
    done = subprocess.run(leashed(command), capture_output=True, text=True, check=False, env=variables)
    return done.returncode, done.stdout + done.stderr


#: Programs that begin with the same imports, four of the five seconds that a small model takes.
_FORKED = frozenset(("convert.numbers", *(f"convert.runtimes.{name}" for name in ("source", "transformers", "bitsandbytes", "harness"))))


class _Server:
    """The :mod:`convert.forkserver` of this process, begun where it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process: subprocess.Popen[str] | None = None
        self._began: tuple[int, dict[str, str]] | None = None
        self._gpu = False
        #: Whether programs on a GPU begin by themselves, because something that is imported here begins it and no fork survives that.
        self._gpu_alone = False

    def serves(self, device: str) -> bool:
        """Whether programs for ``device`` can be forked here."""
        return hasattr(os, "pidfd_open") and not (device != "cpu" and self._gpu_alone)

    def run(self, program: str, arguments: Sequence[str], output: Path, variables: dict[str, str], device: str) -> tuple[int, str]:
        """A program's exit code (negative: the signal that killed it) and what it printed."""
        output.unlink(missing_ok=True)
        order = {
            "program": program,
            "arguments": list(map(os.path.abspath, arguments)),
            "folder": os.getcwd(),
            "output": str(output.absolute()),
        }
        with self._lock:
            server = self.begin(variables, device)
            pid = 0
            try:
                assert server.stdin is not None
                assert server.stdout is not None
                server.stdin.write(json.dumps(order) + "\n")
                server.stdin.flush()
                pid = int(server.stdout.readline())
                code = int(server.stdout.readline())
            except (OSError, ValueError):
                # It is gone: what keeps it from starting keeps a process of its own from it too, and there it is said. A program that it
                # left behind would write to the same files.
                self._kill(pid)
                self._gpu_alone |= self._gpu and not pid
                self.end()
                return _alone([sys.executable, "-m", program, *arguments], variables)
            except BaseException:
                self._kill(pid)
                self.end()
                raise
        return code, output.read_text(errors="replace") if output.exists() else ""

    def begin(self, variables: dict[str, str], device: str) -> subprocess.Popen[str]:
        """Begins it again where the environment has changed, which libraries read while they are imported; where a GPU is asked for that it
        may have begun; or behind a fork."""
        with self._lock:
            if self._process is None or self._began != (os.getpid(), variables) or (device != "cpu" and not self._gpu):
                self.end()
                self._gpu = device != "cpu"
                command = [sys.executable, "-m", "convert.forkserver", *(["gpu"] if self._gpu else [])]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=variables
                )
                self._began = (os.getpid(), dict(variables))
            return self._process

    @staticmethod
    def _kill(pid: int) -> None:
        """Ends a program, if one was begun and has not ended by itself."""
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Ends it, if it runs and is ours."""
        process, self._process = self._process, None
        if process is None or self._began is None or self._began[0] != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # of what was not read any more
                if pipe is not None:
                    pipe.close()


_server = _Server()
atexit.register(_server.end)


def _file(module: str) -> str:
    """Where a program lies: a module of ours, or a file beside the others in another language."""
    if module.endswith(".cjs"):
        return str(Path(__file__).parent / "runtimes" / module)
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} has no file")
    return spec.origin
