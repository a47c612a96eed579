"""Tasks of lm-evaluation-harness: real ones, run by the real harness on data that lie here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from convert import pipeline, tasks
from convert.recipe import parse_recipe
from convert.report import TaskScore, read_report, report_path
from formats.errors import InputError, MachineError, RecipeError

CONFIG = """\
task: {name}
dataset_path: {dataset}
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{word}}}}:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def make_task(folder: Path, *, name: str = "devil", dataset: str = "json") -> Path:
    """A task of real text: which of two meanings is that of a word in The Devil's Dictionary."""
    text = (Path(tasks.__file__).parent / "texts" / "calibration.txt").read_text()
    entries = re.findall(r"^([A-Z]{3,}), n\.  (.{20,80}?\.)", text, re.MULTILINE)
    rows = [{"word": word, "choices": [meaning, entries[i - 1][1]], "gold": 0} for i, (word, meaning) in enumerate(entries)]
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(CONFIG.format(name=name, dataset=dataset, data=folder / "data.jsonl"))
    return folder


def given(folder: Path, limit: int = 24, **more: Any) -> str:
    return json.dumps([{"name": "devil", "limit": limit, "include_path": str(folder), **more}])


@pytest.mark.slow
def test_source_and_artifact_are_scored_by_the_harness(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """The harness itself, on the same documents, is the oracle: of the model that transformers loads."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, source = make_task(tmp_path / "tasks"), make_llama()
    recipe = recipe_for(source, **{"validation.tasks": given(folder), "targets.0.limits.recovery": "0.01"})
    outcome = pipeline.convert(recipe, tmp_path / "out")
    (report,) = outcome.reports
    (before,), (after,) = report.source.tasks, report.runtimes[0].tasks
    for path, score in ((source, before), (outcome.artifacts[0].path, after)):
        model = HFLM(pretrained=str(path), tokenizer=str(path), device="cpu", dtype="float32" if score is before else "auto")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = lm_eval.simple_evaluate(model, tasks=["devil"], limit=24, task_manager=manager, bootstrap_iters=0)
        assert score.score == found["results"]["devil"]["acc_norm,none"]
        assert (score.metric, score.documents, score.shots, score.higher_is_better) == ("acc_norm", 24, 0, True)
    assert after.recovery == pytest.approx(after.score / before.score)
    assert after.recovery_interval is not None
    assert after.recovery_interval.low <= after.recovery <= after.recovery_interval.high
    (check,) = [check for check in report.checks if check.name == "transformers: recovery of devil"]
    assert (check.value, check.limit, check.unit, check.interval) == (after.recovery, 0.01, "of the source", after.recovery_interval)
    assert report.validation["tasks"] == "devil (24 documents, 0 shots)"
    path = outcome.artifacts[0].path
    assert read_report(report_path(path)) == report
    assert "Tasks of lm-evaluation-harness" in report_path(path).with_suffix(".html").read_text()
    assert f"| devil, acc_norm | {before.score:.4g}" in (path / "README.md").read_text()


def test_tasks_that_cannot_be_run_are_an_error_before_any_work(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder, source = make_task(tmp_path / "tasks"), make_llama()
    (folder / "data.jsonl").unlink()
    with pytest.raises(InputError, match="task devil: it or its data cannot be loaded"):
        pipeline.convert(recipe_for(source, **{"validation.tasks": given(folder)}), tmp_path / "out")
    with pytest.raises(InputError, match="is no folder; include_path names"):
        tasks.require_tasks(recipe_for(source, **{"validation.tasks": given(tmp_path / "none")}))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_dataset_out_of_reach_is_one_sentence(make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = make_task(tmp_path / "tasks", dataset="nobody/nothing-here")
    with pytest.raises(InputError, match=r"nobody/nothing-here.*fetch them once on a machine with a network") as caught:
        tasks.require_tasks(recipe_for(make_llama(), **{"validation.tasks": given(folder)}))
    assert "\n" not in str(caught.value)


def test_without_the_harness_it_is_said_how_to_get_it(make_llama: Any, recipe_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(tasks, "version", absent)
    with pytest.raises(MachineError, match=r"pip install 'lm_eval>=0.4.13' 'pytablewriter>=1.2'"):
        tasks.require_tasks(recipe_for(make_llama(), **{"validation.tasks": "[{name: hellaswag}]"}))


RECIPE = """\
model: m
validation: {{tasks: {tasks}}}
targets:
  - {{name: q, format: {format}, runtimes: [{runtime}], limits: {limits}}}
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "[]", "limits": "{recovery: 0.9}"}, r"r.yaml:4:\d+: validation has no tasks whose score could be recovered"),
        ({"tasks": "[{name: a}, {name: a, limit: 3}]"}, r"r.yaml:2:\d+: task a is there twice"),
        ({"tasks": "[{name: a, limt: 3}]"}, r"no key 'limt' here \(did you mean limit\?\)"),
        ({"format": "onnx", "runtime": "onnxruntime"}, r"r.yaml:4:\d+: lm-evaluation-harness runs q in transformers or bitsandbytes"),
    ],
)
def test_recipes_that_make_no_sense_are_named_with_their_line(settings: dict[str, str], message: str) -> None:
    text = RECIPE.format(**{"tasks": "[{name: a}]", "format": "compressed-tensors", "runtime": "transformers", "limits": "{}"} | settings)
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, "r.yaml")


def answer(each: list[float] | None, **more: Any) -> dict[str, Any]:
    score = sum(each) / len(each) if each else 8.0
    facts = {"task": "t", "name": "t", "metric": "acc", "higher_is_better": True, "score": score, "documents": 40, "shots": 0}
    return {"scores": [{**facts, "each": each, "sha256": "ab", **more}]}


def test_recovery_is_of_pairs() -> None:
    """Where the same documents are lost and all others are the same, the interval of pairs is narrower than that of two samples."""
    before, after = [1.0] * 20 + [0.0] * 20, [1.0] * 18 + [0.0] * 22
    (found,) = tasks.score(answer(after), answer(before))
    assert found.recovery == 0.9
    assert found.recovery_interval is not None
    assert found.interval is not None
    assert 0.65 < found.recovery_interval.low < 0.9 < found.recovery_interval.high <= 1.0
    alone = found.interval.high / found.score - found.interval.low / found.score
    assert found.recovery_interval.high - found.recovery_interval.low < 0.6 * alone
    (source,) = tasks.score(answer(before))
    assert source.recovery is None


def test_less_is_better_where_the_task_says_so_and_corpus_scores_have_no_interval() -> None:
    (found,) = tasks.score(answer(None, higher_is_better=False), answer(None, higher_is_better=False, score=6.0))
    assert (found.recovery, found.interval, found.recovery_interval) == (0.75, None, None)


def test_a_source_that_scores_nothing_recovers_nothing() -> None:
    (found,) = tasks.score(answer([1.0] * 4), answer([0.0] * 4))
    assert found.recovery != found.recovery
    assert found.recovery_interval is None
    assert tasks.lowest([TaskScore("t", "u", "acc", True, 1.0, 4, 0, None, 1.0), found], "t") is found


def test_other_documents_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="different documents"):
        tasks.score(answer([1.0]), answer([1.0], sha256="cd"))
