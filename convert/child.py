"""Programs that run in a process of their own, asked and answered in JSON files, so that what they hold goes with them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from convert.ailments import explain, last_lines
from convert.environments import COMMAND, surroundings
from convert.recipe import Recipe
from formats.errors import MachineError


def request(recipe: Recipe, scratch: Path, *, device: str = "cpu") -> dict[str, Any]:
    """What every program that runs a model is asked; the tokens lie in ``scratch/tokens.npy``."""
    return {
        "tokens": str(scratch / "tokens.npy"),
        "device": device,
        "threads": len(os.sched_getaffinity(0)),
        "trust_remote_code": recipe.trust_remote_code,
    }


def run(program: str, request: dict[str, Any], scratch: Path, *, python: Path | None = None) -> tuple[dict[str, Any] | None, str]:
    """A program's answer, or None and why there is none, with the remedy where that is known.

    ``python`` is the interpreter of another environment; it runs the program as a file and sees nothing of ours. Raises
    :class:`MachineError` when that environment is broken, which is no fault of what was to be run.
    """
    answer, output = run_program(program, request, scratch, python=python)
    return answer, "" if answer is not None else explain(output)


def run_program(program: str, request: dict[str, Any], scratch: Path, *, python: Path | None = None) -> tuple[dict[str, Any] | None, str]:
    """A program's answer, or None and everything it printed."""
    (scratch / "request.json").write_text(json.dumps(request))
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    # transformers puts what went wrong with a weight into a warning, and raises an error that only points to it.
    environment = {
        **(surroundings() if python else os.environ),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "warning",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    start = [str(python), "-I", _file(program)] if python else [sys.executable, "-m", program]
    done = subprocess.run(
        [*start, str(scratch / "request.json"), str(answer)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode == 0 and answer.exists():
        return json.loads(answer.read_text()), ""
    if python and done.returncode == MachineError.exit_code:
        raise MachineError(f"the environment of {program} is broken: {last_lines(done.stderr)}; build it again: {COMMAND}")
    killed = f"\nit was killed by signal {-done.returncode}" if done.returncode < 0 else ""
    return None, done.stdout + done.stderr + killed


def _file(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} has no file")
    return spec.origin
