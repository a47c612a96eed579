"""Layers that static scales ruin are taken out, up to the recipe's bound: against the same rules written by hand."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import KILLED
from safetensors.torch import load_file, save_file

from convert import pipeline, solve
from convert.lanes import Stand
from convert.pipeline import convert, plan
from convert.progress import Lines
from convert.recipe import parse_recipe
from convert.reproduce import reproduce
from formats.errors import RecipeError

RECIPE = """\
model: {{model}}
calibration: {{{{sequences: 6, length: 32, dtype: float32}}}}
targets:
  - name: q
    format: compressed-tensors
    runtimes: [{runtime}]
    rules: [{rules}]
{ruined}
"""
STATIC = "{{match: linear, scheme: int8-static, algorithm: gptq}}"


def _text(ruined: str, rules: str = STATIC, runtime: str = "transformers") -> str:
    return RECIPE.format(rules=rules, runtime=runtime, ruined=f"    ruined: {{{{{ruined}}}}}" if ruined else "")


def _plant(folder: Path, *, norms: int = 0) -> Path:
    """A channel before the second down projection becomes enormous, and is read with as much smaller weights; and one behind the first of
    so many ``norms`` before q, k and v."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5] *= 20_000
    tensors["model.layers.1.mlp.down_proj.weight"][:, 5] /= 20_000
    for layer in range(norms):
        tensors[f"model.layers.{layer}.input_layernorm.weight"][3] *= 20_000
        for name in "qkv":
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"][:, 3] /= 20_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _ledger(artifact: Any) -> dict[str, dict[str, Any]]:
    return {entry["module"]: entry for entry in artifact.manifest.ledger}


@pytest.mark.parametrize(
    ("instead", "rule"),
    [
        ("", "{{match: '*.1.mlp.down_proj', keep: true, why: by hand}}"),
        (", instead: int8-dynamic", "{{match: '*.1.mlp.down_proj', scheme: int8-dynamic, algorithm: gptq}}"),
    ],
)
def test_what_is_taken_out_gives_the_bytes_of_a_rule_by_hand(
    instead: str, rule: str, make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _plant(make_llama())
    text = _text(f"at_most: 2{instead}")
    fate = "made int8-dynamic" if instead else "kept in 16 bit"
    assert any(
        f"14 layers with static inputs up to 2 may be {fate}" in warning for warning in plan(recipe_for(folder, text=text)).warnings()
    )
    (made,) = convert(recipe_for(folder, text=text), tmp_path / "out", check=False).artifacts
    (by_hand,) = convert(recipe_for(folder, text=_text("", f"{rule}, {STATIC}")), tmp_path / "hand", check=False).artifacts
    assert (made.path / "model.safetensors").read_bytes() == (by_hand.path / "model.safetensors").read_bytes()
    assert (made.path / "config.json").read_bytes() == (by_hand.path / "config.json").read_bytes()
    changed = {name: entry for name, entry in _ledger(made).items() if entry.get("why", "").startswith("static activations would ruin")}
    assert list(changed) == ["model.layers.1.mlp.down_proj"]
    (entry,) = changed.values()
    assert (entry["decision"], entry.get("scheme")) == (("quantize", "int8-dynamic") if instead else ("keep", None))
    assert "model.layers.1.mlp.down_proj (output off by " in entry["why"]
    assert entry["rule"].startswith("test.yaml:8:5 ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"q", "q.ruined"}
    exported: list[Any] = []
    export = pipeline.export
    monkeypatch.setattr("convert.pipeline.export", lambda job, *args, **more: (exported.append(job), export(job, *args, **more))[1])
    assert convert(recipe_for(folder, text=text), tmp_path / "out", check=False).artifacts[0].reused
    assert exported == [], "what is made is found made"
    monkeypatch.chdir(tmp_path)
    again = reproduce(str(made.path))
    assert again.differences == ()
    assert len(exported) == 1, "the recipe that is recorded needs no second pass"


def test_more_than_the_bound_are_refused_by_name_and_known_when_it_is_raised(
    make_llama: Any, recipe_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM makes one layer of q, k and v, so these go together or not at all."""
    folder = _plant(make_llama(), norms=1)
    text = _text("at_most: {bound}", runtime="vllm")
    with pytest.raises(RecipeError, match=r"^test.yaml:8:5: static activations ruin 4 layers, and at_most 2 .*Raise at_most") as error:
        convert(recipe_for(folder, text=text.replace("{bound}", "2")), tmp_path, check=False)
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert all(f"{name} (output off by " in str(error.value) for name in (*names, "model.layers.1.mlp.down_proj"))
    (made,) = convert(recipe_for(folder, text=text.replace("{bound}", "4")), tmp_path, check=False, progress=Lines()).artifacts
    said = capsys.readouterr().err
    assert said.count("q: calibrating on ") == 1, "only what was not made yet"
    assert "q: made again with 4 more layers kept in 16 bit: " in said
    assert "warning: q: static activations ruin" not in said
    kept = {name for name, entry in _ledger(made).items() if "would ruin" in entry.get("why", "")}
    assert kept == {*names, "model.layers.1.mlp.down_proj"}


def test_a_killed_pass_is_taken_up_to_the_same_bytes(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = _plant(make_llama())
    text = _text("at_most: 1")
    (tmp_path / "recipe.yaml").write_text(text.format(model=folder))
    (whole,) = convert(recipe_for(folder, text=text), tmp_path / "whole", check=False).artifacts
    tensors = len(whole.manifest.ledger)
    for count in (tensors // 2, tensors + 9):  # in the first pass, and in the second
        out = tmp_path / f"killed-{count}"
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(out), str(count)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert (out / "q.ruined").exists() == (count > tensors)
        assert (out / ".q.ruined" / ("1" if count > tensors else "0") / ".q.partial" / "journal").exists()
        (again,) = convert(recipe_for(folder, text=text), out, check=False).artifacts
        assert (again.path / "octavo.json").read_bytes() == (whole.path / "octavo.json").read_bytes()


@pytest.mark.parametrize(("propagate", "solved_again"), [("quantized", [1, 2]), ("float", [1])])
def test_a_pass_takes_over_the_blocks_that_it_does_not_change(
    propagate: str, solved_again: list[int], make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bytes, manifest and notes of health included, as the recipe that it ended in makes in one pass."""
    folder = _plant(make_llama(num_hidden_layers=3))
    rules = "{{match: linear, scheme: int8-static, algorithm: gptq}}"
    text = _text("at_most: 1", rules).replace("dtype: float32", f"dtype: float32, propagate: {propagate}")
    solved: list[int] = []
    seen: list[int] = []
    solve_block, run = solve.solve_block, Stand.run

    def see(stand: Stand, *, keep: bool, observer: Any = None) -> None:
        seen.extend([int(stand.name.split(".")[2])] if observer else [])
        run(stand, keep=keep, observer=observer)

    monkeypatch.setattr(Stand, "run", see)

    def spy(target: Any, entries: Any, *args: Any, **more: Any) -> Any:
        solved.append(int(entries[0].modules[0].split(".")[2]))
        return solve_block(target, entries, *args, **more)

    monkeypatch.setattr(solve, "solve_block", spy)
    (made,) = convert(recipe_for(folder, text=text), tmp_path / "out", check=False).artifacts
    assert solved == [0, 1, 2, *solved_again]
    assert seen == solved, "what is taken over is not looked at"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"q", "q.ruined"}
    recorded = json.dumps({**made.manifest.recipe, "model": str(folder)})
    (alone,) = convert(parse_recipe(recorded, "recorded.yaml", name="recorded"), tmp_path / "alone", check=False).artifacts
    assert solved[3 + len(solved_again) :] == [0, 1, 2]
    for name in ("model.safetensors", "config.json"):
        assert (made.path / name).read_bytes() == (alone.path / name).read_bytes()
    assert made.manifest.calibration == alone.manifest.calibration


def test_where_the_disk_holds_one_artifact_nothing_is_taken_over(
    make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, text = _plant(make_llama()), _text("at_most: 1")
    (whole,) = convert(recipe_for(folder, text=text), tmp_path / "whole", check=False).artifacts
    full = shutil.disk_usage(tmp_path)._replace(free=len((whole.path / "model.safetensors").read_bytes()))
    monkeypatch.setattr("convert.ruined.shutil.disk_usage", lambda _: full)
    likes: list[Any] = []
    export = pipeline.export
    monkeypatch.setattr("convert.pipeline.export", lambda *args, **more: (likes.append(more["like"]), export(*args, **more))[1])
    (made,) = convert(recipe_for(folder, text=text), tmp_path / "out", check=False).artifacts
    assert likes == [None, None]
    assert (made.path / "octavo.json").read_bytes() == (whole.path / "octavo.json").read_bytes()


def test_a_target_beside_it_is_made_as_it_would_be_alone(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = _plant(make_llama())
    more = "  - {{name: d, format: compressed-tensors, rules: [{{match: linear, scheme: int8-dynamic, algorithm: gptq}}]}}\n"
    outcome = convert(recipe_for(folder, text=_text("at_most: 1") + more), tmp_path, check=False)
    assert [artifact.path.name for artifact in outcome.artifacts] == ["q", "d"]
    assert [len(artifact.manifest.recipe["targets"]) for artifact in outcome.artifacts] == [1, 1]
    assert json.loads((tmp_path / "q" / "octavo.json").read_text())["recipe"]["targets"][0]["ruined"] is None


def test_a_rule_of_which_nothing_is_left_is_named(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    rules = "{{match: '*.1.mlp.down_proj', scheme: int8-static}}, {{match: linear, scheme: int8-dynamic}}"
    with pytest.raises(
        RecipeError, match=r"^test.yaml:7:13: static activations ruin every layer that '\*.1.mlp.down_proj' names: model.layers.1"
    ):
        convert(recipe_for(_plant(make_llama()), text=_text("at_most: 1", rules)), tmp_path, check=False)


@pytest.mark.parametrize(
    ("ruined", "rules", "message"),
    [
        ("at_most: 1", "{match: linear, scheme: int8-dynamic}", "no rule has a static scheme"),
        ("at_most: 0", "{match: linear, scheme: int8-static}", "greater than 0"),
        ("at_most: 1, instead: fp8-static", "{match: linear, scheme: int8-static}", "fp8-static has static inputs too"),
        ("at_most: 1, instead: int8-dynamc", "{match: linear, scheme: int8-static}", "did you mean int8-dynamic"),
        ("at_most: 1", "{match: linear, scheme: int8-static, algorithm: [gptq, recover]}", "recover trains what static inputs lose"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_line(ruined: str, rules: str, message: str) -> None:
    text = f"model: m\ntargets:\n  - name: q\n    format: compressed-tensors\n    rules: [{rules}]\n    ruined: {{{ruined}}}\n"
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, "test.yaml")
