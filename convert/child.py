"""Programs that run in a process of their own, asked and answered in JSON files, so that what they hold goes with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from convert.recipe import Recipe


def request(recipe: Recipe, scratch: Path, *, device: str = "cpu") -> dict[str, Any]:
    """What every program that runs a model is asked; the tokens lie in ``scratch/tokens.npy``."""
    return {
        "tokens": str(scratch / "tokens.npy"),
        "device": device,
        "threads": len(os.sched_getaffinity(0)),
        "trust_remote_code": recipe.trust_remote_code,
    }


def run(program: str, request: dict[str, Any], scratch: Path) -> tuple[dict[str, Any] | None, str]:
    """A program's answer, or None and why there is none."""
    (scratch / "request.json").write_text(json.dumps(request))
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", program, str(scratch / "request.json"), str(answer)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode == 0 and answer.exists():
        return json.loads(answer.read_text()), ""
    if done.returncode < 0:
        return None, f"it was killed by signal {-done.returncode}" + (", most likely for want of memory" if done.returncode == -9 else "")
    return None, last_lines(done.stderr)


def last_lines(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines[-2:])[-600:] or "it said nothing"
