"""Climbing on small models: which rung wins, what is kept, and what is said where none does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convert.child import run
from convert.pipeline import convert, plan
from convert.progress import QUIET, Quiet
from convert.recipe import parse_recipe
from convert.report import read_report
from formats.errors import InputError, NumericsError, RecipeError


class Said(Quiet):
    def __init__(self, lines: list[str]) -> None:
        self.say = lines.append  # type: ignore[method-assign]


TEXT = """\
model: {{model}}
calibration: {{{{dtype: float32, sequences: 4, length: 32}}}}
validation: {{{{tokens: 128, length: 64}}}}
targets:
  - name: q
    format: compressed-tensors
    rules: [{{{{match: linear, scheme: int8-dynamic}}}}]
    budget: {{{{kl_nats: {kl}, tokens: 64}}}}
    ladder: {ladder}
    limits: {{{{top1: 0.0, perplexity_ratio: 50.0}}}}
"""


def _text(kl: float, ladder: str) -> str:
    return TEXT.format(kl=kl, ladder=ladder)


def test_the_first_rung_that_meets_the_budget_wins(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    outcome = convert(recipe_for(make_llama(), text=_text(5.0, "[rtn, smoothquant, gptq, mixed]")), tmp_path)
    assert outcome.passed
    ladder = outcome.reports[0].ladder
    assert (ladder["taken"], [rung["name"] for rung in ladder["rungs"]]) == ("rtn", ["rtn"])
    assert {path.name for path in tmp_path.iterdir()} == {"q", "q.ladder", "q.report.json", "q.report.html"}
    again = convert(recipe_for(plan_model(outcome), text=_text(5.0, "[rtn, smoothquant, gptq, mixed]")), tmp_path)
    assert again.artifacts[0].reused
    assert again.reports == outcome.reports


def plan_model(outcome: Any) -> str:
    return str(outcome.plan.recipe.model)


def test_mixed_keeps_what_it_must_and_no_more(make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs: list[str] = []
    monkeypatch.setattr("convert.check.run", lambda program, *args, **more: (programs.append(program), run(program, *args, **more))[1])
    folder = make_llama(num_hidden_layers=3, dtype="float32")
    rounded = convert(recipe_for(folder, text=_text(1e-9, "[rtn]").replace("calibration", "# ")), tmp_path / "rtn")
    assert not rounded.passed
    kl = rounded.reports[0].ladder["rungs"][0]["kl_nats"]
    outcome = convert(recipe_for(folder, text=_text(kl * 0.6, "[rtn, mixed]")), tmp_path / "mixed")
    assert outcome.passed
    assert programs.count("convert.runtimes.transformers") >= 3
    assert programs.count("convert.runtimes.source") == 2, "once for each of two climbs, whatever the rungs"
    ladder = read_report(tmp_path / "mixed" / "q.report.json").ladder
    taken = next(rung for rung in ladder["rungs"] if rung["name"] == ladder["taken"])
    assert taken["kl_nats"] <= kl * 0.6
    assert 0 < taken["kept_groups"] < 12
    assert taken["kept_share"] < 0.6
    assert " tokens a group" in ladder["measured"]
    kept = {module for group in ladder["groups"] if group["kept"] for module in group["modules"]}
    ledger = {entry["module"]: entry for entry in outcome.artifacts[0].manifest.ledger if entry["module"].endswith("_proj")}
    assert {module for module, entry in ledger.items() if entry["decision"] == "keep"} == kept
    assert all("alone its group loses" in entry["why"] for entry in ledger.values() if entry["decision"] == "keep")
    assert all(entry["alone_nats"] > 0 for entry in ledger.values()), "of what is quantized too"
    assert all(entry["rule"].startswith("test.yaml:") for entry in ledger.values())
    for layer in range(3):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({ledger[f"model.layers.{layer}.{name}"]["decision"] for name in fused}) == 1
    # the recipe in the manifest makes the same weights without climbing
    recipe = parse_recipe(json.dumps(outcome.artifacts[0].manifest.recipe), "again.json", name="test")
    made = convert(recipe, tmp_path / "again", check=False).artifacts[0]
    weights = [{f.name: f.sha256 for f in a.manifest.files if f.name.endswith(".safetensors")} for a in (made, outcome.artifacts[0])]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("ladder", ["[rtn, gptq]", "[rtn, smoothquant, mixed]"])
def test_a_rung_on_the_way_is_looked_at_first(
    ladder: str, make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget far below what rungs lose is missed on the first tokens; the artifact that is taken is checked to the end all the same."""
    monkeypatch.setattr("convert.check.LOOK_TOKENS", 128)
    asked: list[tuple[str, int]] = []

    def spy(program: str, request: Any, *args: Any, **more: Any) -> Any:
        asked.append((program.rpartition(".")[2], len(np.load(request["tokens"]))))
        return run(program, request, *args, **more)

    monkeypatch.setattr("convert.check.run", spy)
    # Three rungs at 1e-9 nats: nothing meets that, whatever mixed keeps.
    text = _text(1e-9, ladder).replace("tokens: 128", "tokens: 1024").replace("tokens: 64}", "tokens: 64, tries: 1}")
    outcome = convert(recipe_for(make_llama(num_hidden_layers=1, dtype="float32"), text=text), tmp_path)
    assert not outcome.passed
    rungs = outcome.reports[0].ladder["rungs"]
    assert rungs[0]["tokens"] == 128, "an eighth of 1,024"
    assert ("transformers", 2) in asked
    assert asked[0] == ("source", 16)
    assert [program for program, _ in asked[:3]] == ["source", "transformers", "transformers" if "mixed" in ladder else "numbers"]
    assert all(rung["tokens"] in (128, 1024) and not rung["passed"] for rung in rungs)
    assert bool(outcome.reports[0].ladder["measured"]) == ("mixed" in ladder), "how groups were measured, where the budget is missed too"
    # What is left behind was proven whole.
    assert not outcome.reports[0].brief
    assert [check.name for check in outcome.reports[0].checks][:2] == ["promises", "numbers: largest error / bound"]
    assert next(rung for rung in rungs if rung["name"] == outcome.reports[0].ladder["taken"])["tokens"] == 1024
    assert not read_report(tmp_path / "q.report.json").brief


@pytest.mark.parametrize(
    ("kl", "ladder", "pilots", "taken"),
    [
        (1e-9, "[gptq, smoothquant+gptq]", {"gptq": 512, "smoothquant+gptq": 0}, "smoothquant+gptq"),
        (1e-9, "[rtn, smoothquant, gptq]", {"rtn": 0, "smoothquant": 512, "gptq": 0}, "gptq"),
        (5.0, "[gptq, smoothquant+gptq]", {"gptq": 0}, "gptq"),
    ],
)
def test_a_rung_that_a_pilot_rules_out_is_not_made_whole(
    kl: float,
    ladder: str,
    pilots: dict[str, int],
    taken: str,
    make_llama: Any,
    recipe_for: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("convert.ladder.PILOT_TOKENS", 256)
    monkeypatch.setattr("convert.check.LOOK_TOKENS", 128)
    folder = make_llama(num_hidden_layers=1, dtype="float32")
    text = _text(kl, ladder).replace("sequences: 4, length: 32", "sequences: 64, length: 64").replace("tokens: 128", "tokens: 1024")
    outcome = convert(recipe_for(folder, text=text), tmp_path / "climbed")
    found = outcome.reports[0].ladder
    assert (found["taken"], {rung["name"]: rung["pilot"] for rung in found["rungs"]}) == (taken, pilots)
    assert {rung["tokens"] for rung in found["rungs"][:-1] if rung["name"] != taken} <= {128}
    # What is taken is proven whole, and is what its rung alone makes.
    assert outcome.passed == (kl > 1)
    assert not outcome.reports[0].brief
    alone = convert(recipe_for(folder, text=text.replace(ladder, f"[{taken}]")), tmp_path / "alone")
    manifests = [each.artifacts[0].manifest.to_bytes() for each in (outcome, alone)]
    assert manifests[0] == manifests[1], "with the hashes of all files in it"
    calibration = outcome.artifacts[0].manifest.calibration
    assert calibration is not None
    assert calibration["tokens"] == 4096


def test_a_pilot_that_misses_by_noise_is_made_whole_before_bytes_are_spent(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = make_llama(num_hidden_layers=1, dtype="float32")
    text = (
        _text(1e-9, "[smoothquant, rtn]")
        .replace("sequences: 4, length: 32", "sequences: 256, length: 32")
        .replace("tokens: 128", "tokens: 4096")
    )
    pilot = convert(recipe_for(folder, text=text), tmp_path / "far").reports[0].ladder["rungs"][0]
    assert (pilot["pilot"], pilot["tokens"]) == (2048, 512)
    near = text.replace("kl_nats: 1e-09", f"kl_nats: {pilot['kl_nats'] * 0.999}").replace("[smoothquant, rtn]", "[smoothquant, rtn, mixed]")
    said: list[str] = []
    found = convert(recipe_for(folder, text=near), tmp_path / "near", progress=Said(said)).reports[0].ladder
    tried = [line.partition(":")[0] for line in said if ": KL " in line]
    assert tried[:3] == ["smoothquant (pilot)", "rtn", "smoothquant"]
    assert next(rung for rung in found["rungs"] if rung["name"] == "smoothquant")["pilot"] == 0


def test_an_interrupted_climb_goes_on_where_it_was(
    make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import ladder

    programs: list[str] = []
    real = ladder._try

    def interrupt(name: str, *args: Any, **more: Any) -> Any:
        if name == "gptq":
            raise KeyboardInterrupt
        return real(name, *args, **more)

    monkeypatch.setattr("convert.check.run", lambda program, *args, **more: (programs.append(program), run(program, *args, **more))[1])
    monkeypatch.setattr(ladder, "PILOT_TOKENS", 64)
    text = _text(1e-9, "[rtn, smoothquant, gptq]").replace("sequences: 4", "sequences: 16")
    recipe = recipe_for(make_llama(num_hidden_layers=1, dtype="float32"), text=text)
    monkeypatch.setattr(ladder, "_try", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(recipe, tmp_path)
    monkeypatch.setattr(ladder, "_try", real)
    assert programs == ["convert.runtimes.source", "convert.runtimes.transformers", "convert.runtimes.transformers"]
    programs.clear()
    assert [rung["name"] for rung in convert(recipe, tmp_path).reports[0].ladder["rungs"]] == ["rtn", "smoothquant", "gptq"]
    assert programs == ["convert.numbers", "convert.runtimes.transformers"], "of the last rung alone"


def test_a_graph_is_mixed_too_and_a_rung_is_as_close_as_in_the_worst_mode_of_its_runtime(
    make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    folder = make_llama(num_hidden_layers=2, dtype="float32")
    text = _text(1e-9, "[gptq]").replace("compressed-tensors", "onnx\n    runtimes: [onnxruntime]")
    report = convert(recipe_for(folder, text=text), tmp_path / "gptq").reports[0]
    kl = report.ladder["rungs"][0]["kl_nats"]
    assert kl == max(run.divergence.kl_nats for run in report.runtimes if run.divergence)
    text = text.replace("kl_nats: 1e-09", f"kl_nats: {kl * 0.6}").replace("[gptq]", "[gptq, mixed]")
    outcome = convert(recipe_for(folder, text=text), tmp_path / "mixed")
    assert outcome.passed
    assert outcome.reports[0].ladder["taken"].startswith("mixed")


def test_a_pilot_that_cannot_be_made_leaves_its_rung_to_be_tried_whole(
    make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import ladder

    tried: list[str] = []
    real = ladder._try

    def spy(name: str, *args: Any, **more: Any) -> Any:
        tried.append(name)
        if name.endswith("(pilot)"):
            raise NumericsError("a layer saw nothing")
        return real(name, *args, **more)

    monkeypatch.setattr(ladder, "_try", spy)
    monkeypatch.setattr(ladder, "PILOT_TOKENS", 64)
    text = _text(5.0, "[gptq, smoothquant+gptq]").replace("sequences: 4", "sequences: 16")
    outcome = convert(recipe_for(make_llama(num_hidden_layers=1, dtype="float32"), text=text), tmp_path)
    assert outcome.passed
    assert tried == ["gptq (pilot)", "gptq", "gptq"]


def test_smoothed_groups_are_measured_as_they_were_made(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """With everything left in 16 bit but what smoothing and GPTQ made, losses of groups add up to about what all of them lose."""
    from convert.ladder import rung_recipe
    from convert.sensitivity import artifact_trials, measure

    recipe = recipe_for(make_llama(num_hidden_layers=3, dtype="float32", hidden_size=128), text=_text(1e-9, "[smoothquant+gptq]"))
    rung = rung_recipe(recipe, recipe.targets[0], "smoothquant+gptq")
    outcome = convert(rung, tmp_path)
    trials = artifact_trials(outcome.plan, outcome.artifacts[0].path)
    losses, _ = measure(outcome.plan, trials, QUIET, tokens=128, length=64)
    divergence = outcome.reports[0].runtimes[0].divergence
    assert divergence is not None
    assert sum(loss.kl_nats for loss in losses) == pytest.approx(divergence.kl_nats, rel=0.5)
    assert outcome.artifacts[0].manifest.calibration["folds"], "or nothing was smoothed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("ladder: [rtn]", "ladder: [recover, rtn]"), "so it comes last"),
        (("ladder: [rtn]", "ladder: [rtn, mixed, recover, gptq]"), "so it comes last"),
        (("ladder: [rtn]", "ladder: [mixed]"), "name one before it"),
        (("ladder: [rtn]", "ladder: [rtn, mixed, gptq]"), "it comes last"),
        (("ladder: [rtn]", "ladder: [rtm]"), r"no rung is called 'rtm' \(did you mean rtn\?\)"),
        (("kl_nats: 1.0, ", ""), "a budget needs kl_nats, perplexity_ratio or both"),
        (("limits: {{", "limits: {{kl_nats: 1.0, "), "kl_nats is both in budget and in limits"),
        (("int8-dynamic}}", "int8-dynamic, algorithm: gptq}}"), "the ladder chooses the algorithm"),
        (("budget: {{kl_nats: 1.0, tokens: 64}}", "max_shard_size: 5GB"), "a ladder is climbed to a budget"),
    ],
)
def test_what_a_budget_cannot_be_is_an_error_with_its_line(change: tuple[str, str], message: str, recipe_for: Any) -> None:
    text = _text(1.0, "[rtn]")
    assert change[0] in text
    with pytest.raises(RecipeError, match=rf"^test.yaml:\d+:\d+: .*{message}"):
        recipe_for("/nowhere", text=text.replace(*change))


def test_a_budget_needs_the_check_and_resolves_to_itself(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    recipe = recipe_for(make_llama(), text=_text(1.0, "[rtn, mixed]"))
    with pytest.raises(InputError, match="leave --no-check out"):
        convert(recipe, tmp_path, check=False)
    resolved = plan(recipe).resolved()
    assert parse_recipe(json.dumps(resolved), "again.json").resolved() == resolved
    assert recipe.targets[0].bounds().kl_nats == 1.0


def test_another_scheme_is_chosen_before_sixteen_bits(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = make_llama(num_hidden_layers=3, dtype="float32")
    plain = _text(1e-9, "[rtn]").replace("calibration", "# ")
    kl = convert(recipe_for(folder, text=plain), tmp_path / "rtn").reports[0].ladder["rungs"][0]["kl_nats"]
    text = (
        _text(kl * 2, "[rtn, mixed]")
        .replace("int8-dynamic", "fp8-dynamic")
        .replace("tokens: 64}", "tokens: 64, choices: [int8-dynamic, keep]}")
    )
    outcome = convert(recipe_for(folder, text=text), tmp_path / "mixed")
    assert outcome.passed
    ledger = outcome.artifacts[0].manifest.ledger
    schemes = {entry["scheme"]: entry for entry in ledger if entry["decision"] == "quantize"}
    assert set(schemes) == {"int8-dynamic", "fp8-dynamic"}
    assert "in fp8-dynamic alone its group loses" in schemes["int8-dynamic"]["why"]
    assert not [entry for entry in ledger if entry["decision"] == "keep" and entry["module"].endswith("_proj")]


def test_a_rival_that_keeps_every_group_is_none_and_the_others_are_still_compared(
    make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import ladder
    from convert.mixed import Option
    from convert.sensitivity import Loss, Trial

    job = recipe_for(make_llama(), text=_text(0.01, "[rtn, mixed]"))
    names = ("a", "b", "c")
    losses = {name: Loss((name,), "int8-dynamic", 1, 0.1, 0.01, 0.1) for name in names}
    # To keep b takes no more bytes than to quantize it, so that all are kept in the bytes in which the choice keeps two.
    items = [
        ladder._Item((losses[name],), ("", "keep"), (Option(0.1, 0), Option(0.0, extra)))
        for name, extra in zip(names, (5, 0, 5), strict=True)
    ]
    rivals = ladder._Rivals(job, job.targets[0], SimpleNamespace(plan=plan(job)), items, [], QUIET, "cpu")  # type: ignore[arg-type]
    rivals.__dict__["_orders"] = {ladder.WEIGHTS: [0, 1, 2], ladder.BLOCKS: [1]}
    rivals.__dict__["_trials"] = {((name,), ""): Trial((name,), "int8-dynamic", 1, {}) for name in names}
    compared: list[list[tuple[str, ...]]] = []

    def measure(_: Any, trials: Sequence[Trial], *__: Any, **___: Any) -> Any:
        compared.append([trial.modules for trial in trials])
        return [Loss(trial.modules, "", 1, 1.0 / len(trial.modules), 0.0, 0.0) for trial in trials], {}

    monkeypatch.setattr(ladder, "measure", measure)
    assert rivals.best([1, 0, 1]) == (ladder.BLOCKS, [0, 1, 0])
    assert compared == [[("b",), ("a", "c")]]
