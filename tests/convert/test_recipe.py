from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from convert.recipe import find_recipe, json_schema, parse_recipe, read_recipe
from formats.errors import RecipeError
from formats.safetensors import json_bytes

ROOT = Path(__file__).parents[2]
SHORTEST = "model: a/b\ntargets:\n  - name: w8a8\n    format: compressed-tensors\n"


def complaint(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml", overrides=overrides)
    return str(caught.value)


def test_the_shortest_recipe_has_sensible_defaults() -> None:
    target = parse_recipe(SHORTEST, "r.yaml").targets[0]
    assert [rule.scheme for rule in target.rules] == ["int8-dynamic"]
    assert target.runtimes == ("transformers",)
    assert (target.bounds().kl_nats, target.bounds().top1) == (0.05, 0.85)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid_for_us_and_for_an_editor(path: Path) -> None:
    read_recipe(path)
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    jsonschema.Draft202012Validator(json_schema()).validate(YAML(typ="safe", pure=True).load(path.read_text()))


def test_the_committed_schema_is_the_one_the_command_prints() -> None:
    assert json.loads((ROOT / "recipes" / "recipe.schema.json").read_text()) == json_schema()


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": "a/b", "targets": []},
        {"model": "a/b", "targets": [{"name": "x", "format": "zip"}]},
        {"model": "a/b", "targets": [{"name": "x", "format": "compressed-tensors", "rulez": []}]},
        {"model": "a/b", "targets": [{"name": "x", "format": "compressed-tensors", "rules": [{"match": "linear", "scheme": "int7"}]}]},
    ],
)
def test_an_editor_sees_the_errors_that_we_see(wrong: dict[str, object]) -> None:
    assert list(jsonschema.Draft202012Validator(json_schema()).iter_errors(wrong))
    complaint(json_bytes(wrong).decode())


def test_an_unknown_key_is_named_with_its_place_and_the_nearest_known_one() -> None:
    text = SHORTEST + "    rulez: []\n"
    assert complaint(text).startswith("r.yaml:5:5: no key 'rulez' here (did you mean rules?)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SHORTEST.replace("model: a/b", "model: 3"), "r.yaml:1:1: model: input should be a valid string, got 3"),
        (SHORTEST.replace("compressed-tensors", "compresed-tensors"), "r.yaml:4:5: no format is called 'compresed-tensors' (did you mean"),
        (SHORTEST + "    runtimes: [vllmm]\n", "r.yaml:5:16: no runtime is called 'vllmm'"),
        (SHORTEST + "    limits: {top1: 1.5}\n", "r.yaml:5:14: targets.0.limits.top1: input should be less than or equal to 1, got 1.5"),
        (SHORTEST + "    limits: {kl_nats: '0.1'}\n", "r.yaml:5:14: targets.0.limits.kl_nats: input should be a valid number"),
        (SHORTEST + "    rules: [{match: linear}]\n", "r.yaml:5:13: a rule needs either a scheme or keep: true"),
        (SHORTEST + "    rules: [{match: linear, keep: true}]\n", "r.yaml:5:13: keep: true needs a why"),
        (
            SHORTEST + "    rules: [{match: linear, keep: true, why: x, algorithm: gptq}]\n",
            "r.yaml:5:13: what is kept has no codes that an algorithm could choose; leave algorithm out",
        ),
        *(
            (
                SHORTEST + f"    rules: [{{match: linear, scheme: int8-weight-only, algorithm: [{{{name}: {{{key}: {value}}}}}, rtn]}}]\n",
                f"r.yaml:5:{74 if name == 'awq' else 82}: {value} is no strength; write a number from 0 to 1, or search",
            )
            for name, key, value in (("smoothquant", "alpha", "'serach'"), ("smoothquant", "alpha", 2), ("awq", "ratio", True))
        ),
        (SHORTEST + "    rules: [{match: linear, scheme: int8}]\n", "r.yaml:5:29: no scheme is called 'int8' (did you mean int8-dynamic?)"),
        (SHORTEST + "    hardware: [h100]\n", "r.yaml:5:16: no hardware is called 'h100' (did you mean sm_90?); known are cpu, "),
        (SHORTEST + "    hardware: [gfx942]\n", "r.yaml:5:16: no hardware is called 'gfx942'; known are cpu, "),
        (SHORTEST + "dtype: bf16\n", "r.yaml:5:1: dtype: input should be 'source', 'bfloat16', 'float16' or 'float32', got 'bf16'"),
        (SHORTEST + "push: {repo: name}\n", "r.yaml:5:8: push.repo: 'name' is none; write organisation/name"),
        (
            SHORTEST + "    rules: [{match: linear, scheme: int8-dynamc}]\n",
            "r.yaml:5:29: no scheme is called 'int8-dynamc' (did you mean int8-dynamic?)",
        ),
        (SHORTEST + "    rules: []\n", "r.yaml:5:5: targets.0.rules must not be empty"),
        (SHORTEST + "    runtimes: vllm\n", "r.yaml:5:5: targets.0.runtimes must be a list, got 'vllm'; write [...]"),
        (SHORTEST + "    runtimes: [vllm, vllm]\n", "r.yaml:5:5: vllm is there twice"),
        (SHORTEST + "    limits: 5\n", "r.yaml:5:5: targets.0.limits must be a mapping of keys, got 5"),
        (SHORTEST + "    limits: {kl_nats: .inf}\n", "r.yaml:5:14: targets.0.limits.kl_nats: input should be a finite number"),
        (SHORTEST + "validation: {text: ''}\n", "r.yaml:5:14: validation.text: string should have at least 1 character"),
        (SHORTEST + "    max_shard_size: 5 apples\n", "r.yaml:5:5: '5 apples' is no size"),
        (SHORTEST + f"    max_shard_size: {'9' * 400}GB\n", f"r.yaml:5:5: '{'9' * 400}GB' is no size"),
        (
            SHORTEST + "  - name: W8A8\n    format: compressed-tensors\n",
            "r.yaml:5:5: a second target called 'W8A8' (the first: r.yaml:3:5)",
        ),
        (SHORTEST + "calibration: {}\n", "r.yaml:5:1: no target has a calibrated algorithm"),
        (SHORTEST + "model: c/d\n", "r.yaml:5:1: model is given a second time"),
        *(
            (SHORTEST + f"    budget: {{kl_nats: 1}}\n    ladder: [rtn, {rung}]\n", f"r.yaml:6:5: rung {rung}: {why}")
            for rung, why in {
                "gptq+rtn": "gptq chooses the codes, so nothing can come after it",
                "gptq+gptq": "gptq chooses the codes",
                "smoothquant+awq": "smoothquant and awq scale the same channels; choose one",
                "gptq+smoothquant+rtn": "gptq chooses the codes",
            }.items()
        ),
        (SHORTEST + "    budget: {kl_nats: 1, choices: [keep, keep]}\n", "r.yaml:5:26: keep is there twice"),
        (
            SHORTEST + "    rules: [{match: linear, scheme: int8-weight-only-g32, algorithm: {gptq: {static_groups: false}}}]\n",
            "r.yaml:5:13: gptq: groups whose scales are taken on the way need columns in their places; add activation_order: false",
        ),
        (SHORTEST.replace("w8a8", "../w8a8"), "r.yaml:3:5: targets.0.name: '../w8a8' is none; a name has letters, digits"),
        (SHORTEST + "validation: {tokens: 16, length: 64}\n", "r.yaml:5:1: tokens (16) must be at least length (64)"),
        ("targets: [}", "r.yaml:1:11: not valid YAML"),
        ("- a\n", "r.yaml:1:1: a recipe is a mapping"),
        ("", "r.yaml:1:1: a recipe is a mapping"),
        ("model: !!python/object/apply:os.system [ls]\n", "r.yaml:1:1: model: input should be a valid string"),
        ("model: !!binary aGk=\n", "r.yaml:1:8: 'aGk=' with tag tag:yaml.org,2002:binary is not something a recipe can hold"),
    ],
)
def test_bad_recipes_say_where_and_what(text: str, expected: str) -> None:
    assert complaint(text).splitlines()[0].startswith(expected)


def test_anchors_may_be_used_and_may_not_explode() -> None:
    anchored = SHORTEST + "    limits: &l {kl_nats: 0.2}\n  - name: second\n    format: compressed-tensors\n    limits: *l\n"
    assert parse_recipe(anchored, "r.yaml").targets[1].limits.kl_nats == 0.2
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    assert "unfolds to more than" in complaint(bomb)
    assert "contains itself" in complaint("model: &a [*a]\n")


def test_deep_nesting_is_an_error_and_no_crash() -> None:
    assert complaint("model: " + "[" * 20_000)


def test_a_step_with_nothing_behind_its_colon_is_the_algorithm_with_its_defaults() -> None:
    rule = "    rules:\n      - {match: linear, scheme: int8-dynamic, algorithm: [%s]}\n"
    said, named = (parse_recipe(SHORTEST + rule % steps, "r.yaml") for steps in ("{smoothquant: }, {gptq: }", "smoothquant, gptq"))
    assert said.resolved() == named.resolved()


def test_overrides_replace_values_and_say_where_they_are_wrong() -> None:
    recipe = parse_recipe(SHORTEST, "r.yaml", overrides=["targets.0.limits.kl_nats=0.5", "validation.tokens=1024"])
    assert (recipe.targets[0].bounds().kl_nats, recipe.validation.tokens) == (0.5, 1024)
    assert complaint(SHORTEST, "targets.0.limits.kl=0.5").startswith(
        "--set targets.0.limits.kl=0.5: no key 'kl' here (did you mean kl_nats?)"
    )
    assert complaint(SHORTEST, "targets.7.name=x").startswith("--set targets.7.name=x: there is no targets.7")
    assert complaint(SHORTEST, "tokens").startswith("--set tokens: write it as key.path=value")
    assert parse_recipe(SHORTEST, "r.yaml", overrides=["model=12"]).model == "12"


def test_the_resolved_recipe_is_a_recipe_for_the_same_job() -> None:
    recipe = parse_recipe(SHORTEST, "r.yaml", overrides=["targets.0.max_shard_size=2GiB"])
    again = parse_recipe(json_bytes(recipe.resolved()).decode(), "r.json")
    assert again.resolved() == recipe.resolved()
    assert again.targets[0].max_shard_size == 2 * 1024**3


@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    with suppress(RecipeError):
        parse_recipe(text, "r.yaml")


def test_a_recipe_is_found_by_name_or_the_nearest_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("llama-int8").stem == "llama-int8"
    with pytest.raises(RecipeError, match="did you mean llama-int8"):
        find_recipe("lama-int8")
