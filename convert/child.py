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
from convert.environments import COMMAND, Environment, surroundings
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
    # transformers puts what went wrong with a weight into a warning, and raises an error that only points to it.
    variables = {
        **(surroundings() | dict(environment.variables) if environment else os.environ),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "warning",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    start = [*environment.start, _file(program)] if environment else [sys.executable, "-m", program]
    done = subprocess.run(
        [*start, str(scratch / "request.json"), str(answer)],
        capture_output=True,
        text=True,
        check=False,
        env=variables,
    )
    if done.returncode == 0 and answer.exists():
        return json.loads(answer.read_text()), ""
    if environment and done.returncode == MachineError.exit_code:
        raise MachineError(f"the environment of {program} is broken: {last_lines(done.stderr)}; build it again: {COMMAND}")
    killed = f"\nit was killed by signal {-done.returncode}" if done.returncode < 0 else ""
    return None, done.stdout + done.stderr + killed


def _file(module: str) -> str:
    """Where a program lies: a module of ours, or a file beside the others in another language."""
    if module.endswith(".cjs"):
        return str(Path(__file__).parent / "runtimes" / module)
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{module} has no file")
    return spec.origin
