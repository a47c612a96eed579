"""The whole job on small models, in the real runtime, in processes of its own; and artifacts that must not pass."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import pipeline
from convert.check import _scratch
from convert.divergence import compare_logits, compare_states
from convert.numbers import compare
from convert.report import read_report, report_path
from convert.reproduce import reproduce
from convert.text import TEXTS, _read_text
from formats.errors import FormatError, InputError, OctavoError, RecipeError
from formats.manifest import CARD


def failed(report: Any) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


@pytest.fixture(scope="module")
def converted(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from convert.recipe import parse_recipe

    text = f"""
model: {make_llama(max_position_embeddings=512)}
validation: {{tokens: 256, length: 64}}
targets:
  - {{name: w8a8, format: compressed-tensors, limits: &l {{kl_nats: 0.5, top1: 0.2, perplexity_ratio: 1.5}}}}
  - {{name: fp8, format: compressed-tensors, rules: [{{match: linear, scheme: fp8-dynamic}}], limits: *l}}
  - {{name: plain, format: compressed-tensors, rules: [{{match: linear, keep: true, why: as it was}}], limits: *l}}
"""
    return pipeline.convert(parse_recipe(text, "all.yaml", name="all"), tmp_path_factory.mktemp("out"))


def test_a_good_artifact_passes_and_its_report_says_why(converted: Any) -> None:
    assert converted.passed, [failed(report) for report in converted.reports]
    for report, artifact in zip(converted.reports, converted.artifacts, strict=True):
        assert read_report(report_path(artifact.path)) == report
        assert {run.name for run in report.runtimes} == {"transformers"}
        assert (artifact.path / CARD).read_text().startswith("---\n")
    divergence = converted.reports[0].runtimes[0].divergence
    (check,) = [check for check in converted.reports[0].checks if check.name == "transformers: kl_nats"]
    assert check.interval == divergence.kl_interval
    assert check.interval.low < divergence.kl_nats < check.interval.high
    text = f"[{divergence.ratio_interval.low:.3f}, {divergence.ratio_interval.high:.3f}]"
    assert text in (converted.artifacts[0].path / CARD).read_text()
    quantized = [check for check in converted.reports[0].checks if check.name == "transformers: modules in 8 bit"]
    assert quantized[0].value == 14


def test_an_artifact_that_keeps_everything_is_the_source(converted: Any) -> None:
    divergence = converted.reports[2].runtimes[0].divergence
    assert divergence.kl_nats < 1e-3, "bfloat16 against float32 arithmetic is all that is left"
    assert converted.reports[0].runtimes[0].divergence.kl_nats > divergence.kl_nats


def test_the_divergence_is_what_transformers_itself_computes(converted: Any, make_llama: Any) -> None:
    """The oracle runs the source and the decoded weights in this process, without any of our programs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report, path = converted.reports[1], converted.artifacts[1].path
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer((TEXTS / "validation.txt").read_text(), add_special_tokens=False, verbose=False).input_ids[:256]
    tokens = torch.tensor(ids).view(4, 64)
    source = AutoModelForCausalLM.from_pretrained(converted.plan.checkpoint.origin, dtype=torch.float32)
    artifact = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with torch.inference_mode():
        p, q = (torch.log_softmax(model(tokens).logits.double(), -1) for model in (source, artifact))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    nll = -p[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    divergence = report.runtimes[0].divergence
    assert divergence.kl_nats == pytest.approx(kl, rel=0.02)
    assert divergence.source_perplexity == pytest.approx(float(nll.exp()), rel=1e-3)
    assert divergence.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.02)


def test_the_card_is_valid_for_the_hub_and_states_only_what_was_measured(converted: Any) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(converted.artifacts[0].path / CARD)
    assert card.data.to_dict()["library_name"] == "transformers"
    assert "int8-dynamic" in card.data.tags
    divergence = converted.reports[0].runtimes[0].divergence
    assert f"{divergence.kl_nats:.4f}" in card.text
    assert f"{divergence.perplexity:.2f}" in card.text


def test_a_limit_that_is_not_met_fails_and_is_named(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    outcome = pipeline.convert(recipe_for(make_llama(), **{"targets.0.limits.kl_nats": "1e-9"}), tmp_path / "out")
    assert not outcome.passed
    assert failed(outcome.reports[0]) == {"transformers: kl_nats"}
    assert outcome.artifacts[0].path.exists(), "it is made all the same"


def shift_codes(tensors: dict[str, torch.Tensor]) -> str:
    tensors["model.layers.1.mlp.up_proj.weight"][5] += 1
    return "model.layers.1.mlp.up_proj.weight"


def double_scale(tensors: dict[str, torch.Tensor]) -> str:
    tensors["model.layers.0.self_attn.q_proj.weight_scale"][0] *= 2
    return "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("change", [shift_codes, double_scale])
def test_codes_and_scales_that_are_off_are_caught_by_the_numbers(make_llama: Any, recipe_for: Any, tmp_path: Path, change: Any) -> None:
    outcome = pipeline.convert(recipe_for(make_llama()), tmp_path / "out", check=False)
    path, source = outcome.artifacts[0].path, outcome.plan.checkpoint
    assert all(layer.worst <= 1 for layer in compare(path, source, threads=2))
    tensors = load_file(path / "model.safetensors")
    changed = change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert [layer.tensor for layer in compare(path, source, threads=2) if layer.worst > 1] == [changed]


SOLVED = """
model: {{model}}
calibration: {{{{sequences: 12, length: 32}}}}
{validation}
targets:
  - {{{{name: q, format: compressed-tensors, rules: [{{{{match: linear, scheme: {scheme}, algorithm: {algorithm}}}}}]}}}}
"""
SMOOTH = "{{smoothquant: {{alpha: 0.7}}}}"


def next_code(tensors: dict[str, torch.Tensor]) -> str:
    """One code of six thousand, by one step."""
    codes = tensors["model.layers.1.mlp.up_proj.weight"]
    codes.view(torch.uint8)[5, 3] += 1  # no tie: that would lie as near on the other side
    return "model.layers.1.mlp.up_proj.weight"


def swap_codes(tensors: dict[str, torch.Tensor]) -> str:
    """What moves no sum of codes."""
    codes = tensors["model.layers.0.self_attn.v_proj.weight"].view(torch.uint8)
    codes[[3, 4]] = codes[[4, 3]]
    return "model.layers.0.self_attn.v_proj.weight"


def nudge_scale(tensors: dict[str, torch.Tensor]) -> str:
    """By one unit in the last place of a bfloat16."""
    tensors["model.layers.0.mlp.down_proj.weight_scale"].view(torch.int16)[0] += 1
    return "model.layers.0.mlp.down_proj.weight"


def nudge_norm(tensors: dict[str, torch.Tensor]) -> str:
    tensors["model.layers.1.input_layernorm.weight"].view(torch.int16)[9] += 2
    return "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("scheme", "algorithm", "reference", "changes"),
    [
        ("int8-dynamic", f"[{SMOOTH}, gptq]", "float32", (next_code, swap_codes, nudge_scale, nudge_norm)),
        ("int8-dynamic", f"[{SMOOTH}, rtn]", "source", (swap_codes, nudge_scale, nudge_norm)),
        ("int8-dynamic", "{{gptq: {{clip: true}}}}", "float32", (next_code, swap_codes)),
        ("int8-static", "{{rtn: {{clip: true}}}}", "float32", (next_code, swap_codes)),
        ("int8-weight-only-g32", "{{gptq: {{static_groups: false, activation_order: false}}}}", "float32", ()),
        ("fp8-static", f"[{SMOOTH}, gptq]", "source", (next_code, swap_codes, nudge_norm)),
    ],
)
def test_solved_and_smoothed_layers_are_held_to_what_can_be_made_again(
    scheme: str, algorithm: str, reference: str, changes: tuple[Any, ...], make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    text = SOLVED.format(scheme=scheme, algorithm=algorithm, validation=f"validation: {{{{reference: {reference}}}}}")
    outcome = pipeline.convert(recipe_for(make_llama(), text=text), tmp_path / "out", check=False)
    path, source = outcome.artifacts[0].path, outcome.plan.checkpoint
    found = compare(path, source, threads=2)
    assert len(found) == 14 + ("smooth" in algorithm) * 4
    assert {layer.tensor for layer in found if layer.worst > 1} == set()
    for change in changes:
        tensors = load_file(path / "model.safetensors")
        changed = change(tensors)
        save_file(tensors, tmp_path / "changed.safetensors", metadata={"format": "pt"})
        whole = (path / "model.safetensors").rename(tmp_path / "whole.safetensors")
        (tmp_path / "changed.safetensors").rename(path / "model.safetensors")
        assert [layer.tensor for layer in compare(path, source, threads=2) if layer.worst > 1] == [changed], change.__name__
        whole.rename(path / "model.safetensors")


def test_what_gptq_did_not_note_does_not_pass(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    text = SOLVED.format(scheme="int8-dynamic", algorithm="gptq", validation="")
    outcome = pipeline.convert(recipe_for(make_llama(), text=text), tmp_path / "out", check=False)
    manifest = outcome.artifacts[0].path / "octavo.json"
    record = json.loads(manifest.read_text())
    del record["calibration"]["solved"]["model.layers.1.mlp.up_proj"]["moved"]
    manifest.write_text(json.dumps(record))
    found = compare(manifest.parent, outcome.plan.checkpoint, threads=2)
    assert [layer.tensor for layer in found if layer.worst > 1] == ["model.layers.1.mlp.up_proj.weight"]


def test_an_artifact_that_would_load_as_floats_is_caught(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    outcome = pipeline.convert(recipe_for(make_llama()), tmp_path / "out", check=False)
    path = outcome.artifacts[0].path
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (report,) = pipeline.prove([path])
    assert {"promises", "transformers: modules in 8 bit"} <= failed(report)


def test_a_runtime_that_cannot_load_it_is_a_failed_check_and_no_crash(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    outcome = pipeline.convert(recipe_for(make_llama()), tmp_path / "out", check=False)
    path = outcome.artifacts[0].path
    (path / "model.safetensors").write_bytes(b"garbage!")
    (report,) = pipeline.prove([path])
    assert {"promises", "numbers: largest error / bound", "transformers: loads and runs"} <= failed(report)


def test_a_manifest_that_was_edited_is_no_ground_for_a_check(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    path = pipeline.convert(recipe_for(make_llama()), tmp_path / "out", check=False).artifacts[0].path
    manifest = json.loads((path / "octavo.json").read_text())
    (path / "octavo.json").write_text(json.dumps({**manifest, "versions": {}}))
    with pytest.raises(FormatError, match=r"octavo.json: not as octavo wrote it"):
        pipeline.prove([path])
    (path / "octavo.json").write_text(json.dumps({**manifest, "target": "another"}))
    with pytest.raises(RecipeError, match=r"octavo.json:\S+: no target is called 'another'; there is q"):
        reproduce(str(path))


def test_what_a_killed_check_left_behind_goes_with_the_next(tmp_path: Path) -> None:
    left, young = tmp_path / ".check-left", tmp_path / ".check-young"
    for folder in (left, young):
        folder.mkdir()
        (folder / "source.f32").write_bytes(b"logits")
    with _scratch(tmp_path) as used:
        for folder in (left, used):
            os.utime(folder, (0, 0))
        with _scratch(tmp_path) as other:
            assert set(tmp_path.iterdir()) == {young, used, other}
    assert list(tmp_path.iterdir()) == [young]


def test_artifacts_of_two_models_are_not_checked_against_one_of_them(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    made = [pipeline.convert(recipe_for(make_llama(seed=i)), tmp_path / f"{i}", check=False).artifacts[0].path for i in (0, 1)]
    with pytest.raises(InputError, match=r"1/q was made with another model than .*0/q; check them one by one"):
        pipeline.prove(made)
    assert not list(tmp_path.glob("*/*.report.json"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not much " * 20, r"validation text .*short.txt: 1\d\d tokens, 256 are needed"),
        ("not much", r"test\.yaml:2:1: validation: 256 tokens are asked of .*short.txt, which has 8 bytes"),
    ],
)
def test_a_text_that_is_too_short_says_how_many_tokens_are_needed(
    text: str, said: str, make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(InputError, match=said):
        pipeline.convert(recipe_for(make_llama(), **{"validation.text": str(tmp_path / "short.txt")}), tmp_path / "out")


def test_a_jsonl_text_is_read_by_its_text_key(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert _read_text(str(tmp_path / "t.jsonl"), "validation") == ("one\n\ntwo", "t.jsonl")
    (tmp_path / "t.jsonl").write_text('{"body": "x"}')
    with pytest.raises(InputError, match='each line must be a JSON object with a "text"'):
        _read_text(str(tmp_path / "t.jsonl"), "validation")


# --- the measure itself ---


def write(path: Path, logits: np.ndarray) -> Path:
    logits.astype(np.float32).tofile(path)
    return path


def test_the_divergence_of_a_model_from_itself_is_nothing(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 70, 11)) * 5
    tokens = np.random.default_rng(1).integers(0, 11, (2, 70))
    found = compare_logits(write(tmp_path / "a", logits), write(tmp_path / "b", logits), tokens, 11)
    assert (found.kl_nats, found.top1, found.perplexity_ratio) == (pytest.approx(0, abs=1e-9), 1.0, 1.0)


def test_the_divergence_agrees_with_scipy_free_arithmetic_in_float64(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b, tokens = rng.normal(size=(3, 50, 7)), rng.normal(size=(3, 50, 7)), rng.integers(0, 7, (3, 50))
    found = compare_logits(write(tmp_path / "a", a), write(tmp_path / "b", b), tokens, 7)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    assert found.kl_nats == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    assert found.kl_nats_p99 == pytest.approx(np.quantile((p * np.log(p / q)).sum(-1), 0.99), rel=1e-5)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    taken = np.take_along_axis(q[:, :-1], tokens[:, 1:, None], -1)
    assert found.perplexity == pytest.approx(np.exp(-np.log(taken).mean()), rel=1e-5)


def test_nan_logits_and_another_vocabulary_do_not_pass(tmp_path: Path) -> None:
    logits = np.zeros((1, 8, 5))
    tokens = np.zeros((1, 8), dtype=np.int64)
    broken = logits.copy()
    broken[0, 3, 2] = np.nan
    found = compare_logits(write(tmp_path / "a", logits), write(tmp_path / "b", broken), tokens, 5)
    assert np.isnan(found.kl_nats)
    with pytest.raises(OctavoError, match="the vocabularies differ"):
        compare_logits(write(tmp_path / "a", logits), write(tmp_path / "b", np.zeros((1, 8, 6))), tokens, 5)


def test_the_drift_is_the_mean_error_as_a_share_of_the_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(70, 5)).astype(np.float32), rng.normal(size=(70, 5)).astype(np.float32)
    found = compare_states(write(tmp_path / "a", a), write(tmp_path / "b", b), 5)
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    assert found.vectors == 70
    assert found.relative_error == pytest.approx((np.linalg.norm(a - b, axis=1) / lengths[0]).mean(), rel=1e-6)
    assert found.cosine == pytest.approx(((a * b).sum(1) / lengths[0] / lengths[1]).mean(), rel=1e-6)
    with pytest.raises(OctavoError, match="widths differ"):
        compare_states(tmp_path / "a", write(tmp_path / "c", a[:-1]), 5)
    b[3, 2] = np.nan
    assert np.isnan(compare_states(tmp_path / "a", write(tmp_path / "b", b), 5).relative_error)


def test_a_source_that_does_not_fit_runs_block_by_block_to_the_same_numbers(
    make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import check as module
    from convert.pipeline import convert

    reports = []
    for share in (0.8, 0.0):
        monkeypatch.setattr(module, "WHOLE_SHARE", share)
        reports.append(convert(recipe_for(make_llama()), tmp_path / str(share)).reports[0])
    whole, walked = (report.runtimes[0].divergence for report in reports)
    assert whole == walked
    assert reports[1].passed
    assert reports[0].source.continuation
    assert reports[1].source.continuation == ""


def test_a_chat_template_that_takes_no_question_does_not_end_the_check(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = make_llama()
    (folder / "chat_template.jinja").write_text("{{ raise_exception('a system message first') }}")
    said: list[str] = []
    progress = pipeline.QUIET.__class__()
    progress.say = said.append  # type: ignore[method-assign]
    (report,) = pipeline.convert(recipe_for(folder), tmp_path / "out", progress=progress).reports
    assert report.passed
    assert report.prompt == "What is the capital of France?"
    assert [line for line in said if "chat template takes no plain question (a system message first)" in line]


@pytest.mark.parametrize("check", [True, False])
def test_a_tokenizer_of_another_model_is_found_before_any_work(check: bool, make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """Its ids lie behind the end of the embedding, where a program would only say that an index is out of range."""
    folder = make_llama()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["e"] = 399
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = SOLVED.format(scheme="int8-dynamic", algorithm="gptq", validation="") if not check else None
    recipe = recipe_for(folder, **({"text": text} if text else {}))
    with pytest.raises(InputError, match=r"its tokenizer makes token 399 of a text, and its embedding has 300 rows"):
        pipeline.convert(recipe, tmp_path / "out", check=check)
    assert not (tmp_path / "out").exists()
