"""Tasks of lm-evaluation-harness: whether they can be run, what an artifact reaches of the source's score, and where that lies."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from convert.child import run
from convert.intervals import bootstrap, recovery
from convert.recipe import Recipe
from convert.report import TaskScore
from formats.errors import InputError, MachineError

PROGRAM = "convert.runtimes.harness"


def require_tasks(recipe: Recipe) -> None:
    """Reads every task and its data once, before any work.

    Raises :class:`MachineError` where the harness is not installed, :class:`InputError` for a task that it does not know or cannot load.
    """
    tasks = recipe.validation.tasks
    if not tasks:
        return
    try:
        version("lm_eval")
    except PackageNotFoundError:
        raise MachineError(
            "validation.tasks needs lm-evaluation-harness, which is not installed; run: pip install 'lm_eval>=0.4.13' 'pytablewriter>=1.2'"
        ) from None
    with tempfile.TemporaryDirectory(prefix="octavo-tasks-") as scratch:
        answer, failure = run(PROGRAM, {"tasks": asked(recipe)}, Path(scratch))
    if answer is None or "error" in answer:
        raise InputError(f"{recipe.where('validation', 'tasks')}: {answer['error'] if answer else failure}")


def asked(recipe: Recipe) -> list[dict[str, Any]]:
    """The tasks as the program is told them."""
    return [task.model_dump(mode="json") for task in recipe.validation.tasks]


def score(answer: dict[str, Any], source: dict[str, Any] | None = None) -> tuple[TaskScore, ...]:
    """The records of a program's answer; with the source's answer, what was recovered of its scores.

    Raises :class:`InputError` where both were not asked the same documents.
    """
    before = {item["name"]: item for item in source["scores"]} if source else {}
    return tuple(_score(item, before.get(item["name"])) for item in answer["scores"])


def _score(item: dict[str, Any], before: dict[str, Any] | None) -> TaskScore:
    each = item["each"]
    kept = {key: item[key] for key in ("task", "name", "metric", "higher_is_better", "score", "documents", "shots")}
    interval = bootstrap(each, [1] * len(each)) if each else None
    if before is None:
        return TaskScore(**kept, interval=interval)
    if before["sha256"] != item["sha256"] or before["metric"] != item["metric"]:
        raise InputError(f"task {item['name']}: source and artifact were asked different documents; check the artifact again")
    above, below = (item, before) if item["higher_is_better"] else (before, item)
    share = above["score"] / below["score"] if below["score"] else math.nan
    pairs = recovery(above["each"], below["each"]) if above["each"] and below["each"] else None
    return TaskScore(**kept, interval=interval, recovery=share, recovery_interval=pairs)


def describe(answer: dict[str, Any]) -> dict[str, Any]:
    """What the report says of the tasks."""
    said = [f"{item['name']} ({item['documents']:,} documents, {item['shots']} shots)" for item in answer["scores"]]
    return {"tasks": ", ".join(said), "tasks_run_by": f"lm_eval {answer['versions']['lm_eval']}"}


def lowest(scores: Sequence[TaskScore], task: str) -> TaskScore:
    """Of the scores of one task that was asked for, the one that recovers least; NaN is less than any."""
    return min(
        (item for item in scores if item.task == task), key=lambda item: (not math.isnan(item.recovery or math.nan), item.recovery or 0)
    )
