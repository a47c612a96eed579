"""Runs tasks of lm-evaluation-harness on the source, or on an artifact in transformers, with its own ``HFLM``.

Run as ``python -m convert.runtimes.harness REQUEST ANSWER``, both JSON files; it loads what it measures as the programs beside it do.

Request: ``tasks`` (each ``name``, ``limit``, ``shots``, ``chat``, ``include_path``, ``metric``, as :class:`convert.recipe.Task` has them)
and ``program`` (``source``, ``transformers`` or ``bitsandbytes``) with what that program is asked, and ``tokenizer`` (folder). Without
``program`` nothing is loaded: it only says whether the tasks and their data are there.

Answer: ``scores``, for each task one or (a tag, a group that has no score of its own) several: ``task`` (as asked), ``name``, ``metric``,
``higher_is_better`` (bool), ``score``, ``documents``, ``shots``, ``each`` (the score of each document, None where the metric is not their
mean), ``sha256`` (of the documents' hashes); and ``versions``. Or ``error``, a sentence for whoever wrote the recipe.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

#: Which metric counts where the recipe names none: the first of these that a task has, else the task's own first. Of multiple choice it is
#: that in which long answers are at no disadvantage.
METRICS = ("acc_norm", "acc", "exact_match")
#: Sequences multiplied together: padding on a CPU costs what it saves.
BATCH = {"cpu": 1, "cuda": 16}


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    request = json.loads(Path(request_path).read_text())
    try:
        found = [_load(task) for task in request["tasks"]]
    except _UnusableError as error:
        Path(answer_path).write_text(json.dumps({"error": str(error)}))
        return
    answer: dict[str, Any] = {"versions": {"lm_eval": version("lm_eval")}}
    if "program" in request:
        model = _model(request)
        pairs = zip(request["tasks"], found, strict=True)
        answer["scores"] = [score for task, manager in pairs for score in _evaluate(model, task, manager)]
    Path(answer_path).write_text(json.dumps(answer))


class _UnusableError(Exception):
    """A task that cannot be run, in one sentence."""


def _load(task: dict[str, Any]) -> Any:
    """A task manager that knows a task, whose data were read once."""
    from lm_eval.tasks import TaskManager

    name, folder = task["name"], task["include_path"]
    if folder is not None and not Path(folder).is_dir():
        raise _UnusableError(f"task {name}: {folder} is no folder; include_path names the one in which its YAML lies")
    # To index the tasks that come with the harness takes it many seconds, which a task of the user's own does not need.
    managers = (TaskManager(include_path=folder, include_defaults=defaults) for defaults in ((False, True) if folder else (True,)))
    manager = next((manager for manager in managers if name in manager.all_tasks), None)
    if manager is None:
        import difflib

        known = TaskManager(include_path=folder).all_tasks
        near = difflib.get_close_matches(name, known, n=3)
        where = f", nor in {folder}" if folder else "; include_path names the folder of one of your own"
        raise _UnusableError(f"lm-evaluation-harness {version('lm_eval')} has no task {name!r}{_or(near)}{where}")
    try:
        manager.load([name])
    except Exception as error:  # noqa: BLE001  datasets raises anything: no network, no such configuration, a gated or moved repo, a bad YAML
        said = " ".join(str(error).split())[:300]
        raise _UnusableError(
            f"task {name}: it or its data cannot be loaded ({type(error).__name__}: {said}); fetch them once on a machine with a "
            "network and keep its Hugging Face cache, or give a task of local files with include_path"
        ) from None
    return manager


def _or(names: list[str]) -> str:
    return f" (did you mean {' or '.join(names)}?)" if names else ""


def _model(request: dict[str, Any]) -> Any:
    """What the request names, on its device, as the harness wants it."""
    import importlib

    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    torch.set_num_threads(request["threads"])
    model = importlib.import_module(f"convert.runtimes.{request['program']}").load(request)
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"], local_files_only=True, trust_remote_code=request["trust_remote_code"])
    if request["program"] != "bitsandbytes":  # whose models lie where they were loaded, and refuse to be moved
        model = model.to(request["device"])
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=BATCH[request["device"]])


def _evaluate(model: Any, task: dict[str, Any], manager: Any) -> Iterator[dict[str, Any]]:
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model,
        tasks=[task["name"]],
        num_fewshot=task["shots"],
        limit=task["limit"],
        apply_chat_template=task["chat"],
        task_manager=manager,
        bootstrap_iters=0,  # intervals are ours, of pairs
    )
    groups = found.get("groups", {})
    names = [task["name"]] if task["name"] in groups else [name for name in found["results"] if name not in groups]
    for name in names:
        results = groups.get(name) or found["results"][name]
        leaves = _leaves(name, found)
        key = _metric(task, name, [key for key, value in results.items() if "," in key and "_stderr," not in key and _is_number(value)])
        metric, filter_name = key.split(",")
        samples = [item for leaf in leaves for item in found["samples"][leaf] if item["filter"] == filter_name]
        each = [item.get(metric) for item in samples]
        mean = all(map(_is_number, each)) and abs(sum(each) / len(each) - results[key]) < 1e-9
        better = [found["higher_is_better"].get(leaf, {}).get(metric) for leaf in leaves]
        yield {
            "task": task["name"],
            "name": name,
            "metric": metric if filter_name == "none" else key,
            "higher_is_better": False not in better,
            "score": float(results[key]),
            "documents": len(samples),
            "shots": int(found["n-shot"].get(leaves[0], 0)),
            "each": [float(value) for value in each] if mean else None,
            "sha256": hashlib.sha256("".join(item["doc_hash"] for item in samples).encode()).hexdigest(),
        }


def _leaves(name: str, found: dict[str, Any]) -> list[str]:
    """The tasks of a group, all the way down; a task is its own."""
    below = found["group_subtasks"].get(name, [])
    return [leaf for child in below for leaf in _leaves(child, found)] if below else [name]


def _metric(task: dict[str, Any], name: str, keys: list[str]) -> str:
    """The key of the metric that counts, which is ``metric,filter``."""
    wanted = [task["metric"]] if task["metric"] else [*METRICS, *keys]
    chosen = next((key for metric in wanted for key in keys if metric in (key, key.split(",")[0])), None)
    if chosen is None:
        raise ValueError(f"task {name} has no metric {task['metric'] or 'that is one number'}; it has {', '.join(keys) or 'none'}")
    return chosen


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


if __name__ == "__main__":
    main(*sys.argv[1:])
