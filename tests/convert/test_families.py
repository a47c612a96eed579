"""Every family as a small random model: planned, converted, reloaded by its runtime, and close to the source; experts under every name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_tokenizer
from families import FAMILIES, join_experts, save_family
from safetensors.torch import load_file

from convert import pipeline
from convert.check import _check_modules
from convert.numbers import compare
from convert.recipe import parse_recipe
from convert.report import read_report, report_path
from convert.runtimes import RUNTIMES
from formats.errors import RecipeError
from formats.manifest import read_manifest
from formats.verify import verify

RULES = """
model: {model}
validation: {{tokens: 64, length: 32}}
targets:
  - name: q
    format: {format}
    runtimes: [{runtime}]
    rules:
      - {rules}
"""
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "qwen3_5_moe")
SEPARATE = ("llama4",)
REFUSED = ("gpt_oss",)
DENSE = tuple(name for name in FAMILIES if name not in (*MOE, *SEPARATE, *REFUSED))


def recipe(model: Path, *rules: str, runtime: str = "transformers", **overrides: str) -> Any:
    text = RULES.format(model=model, format=next(iter(RUNTIMES[runtime].formats)), runtime=runtime, rules="\n      - ".join(rules))
    return parse_recipe(text, "test.yaml", name="test", overrides=[f"{key}={value}" for key, value in overrides.items()])


def quantize(scheme: str, match: str = "linear") -> str:
    return f"{{match: '{match}', scheme: {scheme}}}"


def converted(job: Any, out: Path) -> tuple[Path, Any]:
    outcome = pipeline.convert(job, out, check=False)
    path = outcome.artifacts[0].path
    errors = [finding for finding in verify(path).findings if finding.where not in ("tokenizer.json",) and finding.severity == "error"]
    assert errors == []
    return path, outcome.plan


def outputs(folder: Path, family: str, **options: Any) -> torch.Tensor:
    """Logits, or last hidden states; every weight must have been found, and none be left over."""
    model, info = getattr(transformers, FAMILIES[family][0]).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    with torch.inference_mode():
        given = model.eval()(input_ids=torch.arange(3, 43)[None])
    return (given.logits if hasattr(given, "logits") else given.last_hidden_state).float()


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *((name, "int8-dynamic") for name in DENSE if name != "gpt2"),
        ("phi3", "fp8-dynamic"),
        ("falcon", "fp8-dynamic"),
        ("gemma2", "fp8-dynamic"),
    ],
)
def test_a_family_is_converted_and_reloaded(family: str, scheme: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path)
    path, plan = converted(recipe(source, quantize(scheme)), tmp_path / "out")
    assert all(entry.scheme is None for entry in plan.targets[0].entries if entry.kind != "linear")
    limit = 0.999 if scheme == "int8-dynamic" else 0.995
    assert cosine(outputs(source, family, dtype=torch.float32), outputs(path, family, dtype="auto")) > limit


@pytest.mark.parametrize("family", [name for name in DENSE if name != "falcon"])
def test_a_family_is_reloaded_in_bitsandbytes(family: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path)
    path, _ = converted(recipe(source, quantize("llm-int8"), runtime="bitsandbytes"), tmp_path / "out")
    found = outputs(path, family, dtype="auto", device_map={"": "cpu"})
    assert cosine(outputs(source, family, dtype=torch.float32), found) > 0.998


@pytest.mark.parametrize(
    ("family", "scheme", "runtime", "why"),
    [
        ("gpt2", "int8-dynamic", "transformers", r"transposed \(Conv1D\).*bitsandbytes holds it \(scheme llm-int8\)"),
        ("falcon", "llm-int8", "bitsandbytes", "is no torch.nn.Linear or Conv1D"),
        ("falcon", "int8-weight-only", "transformers", "arithmetic of its own, which does not find packed codes"),
        ("gpt_oss", "fp8-dynamic", "transformers", "no reader of 8-bit experts is known that takes them in the layout"),
        ("mixtral", "int8-dynamic", "transformers", "holds experts as floats, and reads them from fp8-dynamic"),
        ("mixtral", "fp8-static", "transformers", "holds experts as floats, and reads them from fp8-dynamic"),
        ("qwen2_moe", "llm-int8", "bitsandbytes", "holds the experts of this model as floats only"),
    ],
)
def test_what_no_reader_could_load_is_refused_with_its_line(family: str, scheme: str, runtime: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"^test.yaml:\d+:\d+: .*{why}"):
        pipeline.plan(recipe(save_family(family, tmp_path), quantize(scheme), runtime=runtime))


OUTSIDE = {
    "T5EncoderModel": ("T5Config", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 300}),
    "SiglipVisionModel": (
        "SiglipVisionConfig",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    ),
}


@pytest.mark.parametrize("model", OUTSIDE)
def test_a_layer_that_transformers_asks_for_its_weight_while_it_loads_is_not_packed(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways: with codes under the weight's own name it loads and is close; packed, transformers would end in an AttributeError."""
    config, settings = OUTSIDE[model]
    torch.manual_seed(0)
    plain = getattr(transformers, model)(getattr(transformers, config)(**settings)).to(torch.bfloat16).eval()
    plain.save_pretrained(tmp_path / "source")
    kept = "{match: '*.wo', keep: true, why: float32 there}" if model.startswith("T5") else "{match: 'head.*', keep: true, why: of torch}"
    rules = kept, quantize("int8-weight-only")
    with pytest.raises(RecipeError, match=r"test.yaml:\d+:9: .* cannot be int8-weight-only: while transformers loads this model it asks"):
        pipeline.plan(recipe(tmp_path / "source", *rules))
    path, _ = converted(recipe(tmp_path / "source", kept, quantize("int8-dynamic")), tmp_path / "out")
    loaded = getattr(transformers, model).from_pretrained(path, dtype="auto")
    pictures = torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)
    given = {"pixel_values": pictures} if model.startswith("Siglip") else {"input_ids": torch.arange(3, 19)[None]}
    with torch.no_grad():
        found, expected = (part(**given).last_hidden_state.float() for part in (loaded, plain))
    assert 0.99 < cosine(found, expected) < 1
    monkeypatch.setattr("convert.requirements._unfound", lambda *_: iter(()))
    packed, _ = converted(recipe(tmp_path / "source", *rules), tmp_path / "packed")
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'weight'"):
        getattr(transformers, model).from_pretrained(packed, dtype="auto")


def test_a_head_under_another_name_is_quantized_when_named_and_keeps_its_name_on_disk(tmp_path: Path) -> None:
    source = save_family("gpt_neox", tmp_path)
    rules = quantize("int8-dynamic", "embed_out"), quantize("fp8-dynamic")
    path, _ = converted(recipe(source, *rules), tmp_path / "out")
    assert {"embed_out.weight", "embed_out.weight_scale"} <= load_file(path / "model.safetensors").keys()
    assert cosine(outputs(source, "gpt_neox", dtype=torch.float32), outputs(path, "gpt_neox", dtype="auto")) > 0.998
    kept, _ = converted(recipe(source, quantize("fp8-dynamic")), tmp_path / "kept")
    assert {"embed_out", "lm_head"} <= set(json.loads((kept / "config.json").read_text())["quantization_config"]["ignore"])


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *((name, "int8-weight-only") for name in (*MOE, *SEPARATE)),
        ("mixtral", "fp8-dynamic"),
        ("deepseek_v3", "fp8-dynamic"),
        ("llama4", "int8-dynamic"),
    ],
)
def test_experts_are_quantized_one_by_one_and_routers_are_kept(family: str, scheme: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path)
    path, plan = converted(recipe(source, quantize(scheme)), tmp_path / "out")
    entries = plan.targets[0].entries
    routers = [entry for entry in entries if entry.kind == "router"]
    assert routers
    assert {entry.why for entry in routers} == {"a router: its error changes which experts are asked"}
    assert all(entry.scheme for entry in entries if entry.kind in ("linear", "expert"))
    assert all("shared_expert" not in entry.tensor.name for entry in entries if entry.kind == "expert")
    assert cosine(outputs(source, family, dtype=torch.float32), outputs(path, family, dtype="auto")) > 0.998


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "int8-weight-only"])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_one_tensor_give_the_very_codes_of_separate_ones(
    scheme: str, turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert.quantize.SLAB_ELEMENTS", 500)
    source = save_family("qwen3_moe", tmp_path)
    job = recipe(source, quantize(scheme))
    separate, _ = converted(job, tmp_path / "separate")
    join_experts(source, turned=turned)
    joined, plan = converted(job, tmp_path / "joined")
    ours, theirs = (load_file(path / "model.safetensors") for path in (joined, separate))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours)
    assert len([entry for entry in plan.targets[0].quantized if len(entry.parts) == 8]) == 2
    numbers = compare(joined, plan.checkpoint, threads=1)
    assert len(numbers) == 8 + 24
    assert all(layer.worst <= 1 for layer in numbers)


def test_experts_that_are_kept_leave_the_artifact_readable(tmp_path: Path) -> None:
    keep = "{match: '*.experts.*', keep: true, why: because}"
    source = save_family("mixtral", tmp_path)
    path, _ = converted(recipe(source, keep, quantize("fp8-dynamic")), tmp_path / "out")
    ignored = json.loads((path / "config.json").read_text())["quantization_config"]["ignore"]
    assert r"re:model\.layers\.0\.block_sparse_moe\.experts\..+" in ignored
    assert "model.layers.1.block_sparse_moe.gate" in ignored
    assert cosine(outputs(source, "mixtral", dtype=torch.float32), outputs(path, "mixtral", dtype="auto")) > 0.998
    with pytest.raises(RecipeError, match=r"test.yaml:10:9: transformers would read .*experts.0.w1, which is kept, as the codes"):
        pipeline.plan(recipe(source, keep, quantize("int8-dynamic")))
    with pytest.raises(RecipeError, match=r"test.yaml:9:9: .*experts.down_proj is kept, .* one by one"):
        pipeline.plan(recipe(save_family("llama4", tmp_path), keep, quantize("int8-dynamic")))
    bnb, _ = converted(recipe(source, keep, quantize("llm-int8"), runtime="bitsandbytes"), tmp_path / "bnb")
    found = outputs(bnb, "mixtral", dtype="auto", device_map={"": "cpu"})
    assert cosine(outputs(source, "mixtral", dtype=torch.float32), found) > 0.998


def test_experts_of_another_scheme_than_the_rest(tmp_path: Path) -> None:
    source = save_family("mixtral", tmp_path)
    rules = quantize("fp8-dynamic", "*.experts.*"), quantize("int8-dynamic")
    path, plan = converted(recipe(source, *rules), tmp_path / "out")
    assert "makes floats of 24 layers of experts" in " ".join(plan.warnings())
    assert cosine(outputs(source, "mixtral", dtype=torch.float32), outputs(path, "mixtral", dtype="auto")) > 0.998


def test_a_rule_names_one_expert_and_the_runtime_decides_whether_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = "{match: '*.experts.3.*', keep: true, why: because}"
    source = save_family("qwen3_moe", tmp_path)
    job = recipe(source, one, quantize("fp8-dynamic"))
    with pytest.raises(RecipeError, match=r"test.yaml:9:9: .*experts.3.down_proj is kept where .* and transformers reads all experts"):
        pipeline.plan(job)
    free = RUNTIMES["transformers"].__class__("x", ("compressed-tensors",), ())
    monkeypatch.setitem(RUNTIMES, "transformers", free)
    kept = [entry.tensor.name for entry in pipeline.plan(job).targets[0].entries if entry.why == "because"]
    assert len(kept) == 6
    assert all(".experts.3." in name for name in kept)
    join_experts(source, turned=False)
    with pytest.raises(RecipeError, match=r"test.yaml:9:9: .* names model.layers.0.mlp.experts.3.down_proj and not all 4 layers"):
        pipeline.plan(job)


@pytest.mark.parametrize(
    ("keep", "fine"), [("k_proj", False), ("up_proj", False), ("*.experts.2.*", False), ("o_proj", True), ("*.self_attn.*", True)]
)
def test_what_a_runtime_fuses_must_have_one_scheme(keep: str, fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fusing = RUNTIMES["transformers"].__class__("x", ("compressed-tensors",), (), fuses=True)
    monkeypatch.setitem(RUNTIMES, "transformers", fusing)
    source = save_family("deepseek_v2" if keep == "up_proj" else "qwen3_moe", tmp_path)
    job = recipe(source, f"{{match: '{keep}', keep: true, why: because}}", quantize("fp8-dynamic"))
    if fine:
        pipeline.plan(job)
    else:
        with pytest.raises(RecipeError, match=r"test.yaml:9:9: .* is kept where .* is fp8-dynamic, and transformers makes them one layer"):
            pipeline.plan(job)


@pytest.mark.slow
def test_an_encoder_is_proven_by_its_hidden_states(tmp_path: Path) -> None:
    source = save_family("bert", tmp_path)
    save_tokenizer(source, 300)
    second = "\n  - {name: strict, format: compressed-tensors, limits: {relative_error: 1e-6}}"
    text = RULES.format(model=source, format="compressed-tensors", runtime="transformers", rules=quantize("int8-dynamic")) + second
    outcome = pipeline.convert(parse_recipe(text, "test.yaml", name="test"), tmp_path / "out")
    good, strict = outcome.reports
    assert good.passed, [check for check in good.checks if not check.passed]
    assert [check.name for check in strict.checks if not check.passed] == ["transformers: relative_error"]
    (run,) = good.runtimes
    assert 0 < run.drift.relative_error < 0.1
    assert (run.divergence, run.continuation) == (None, "")
    assert read_report(report_path(outcome.artifacts[0].path)) == good
    card = (outcome.artifacts[0].path / "README.md").read_text()
    assert f"{run.drift.relative_error:.5f}" in card
    assert "AutoModel.from_pretrained" in card
    pipeline.plan(pipeline.recipe_of(outcome.artifacts[0].path))  # what it records can be run again


def test_experts_that_a_runtime_merges_are_said_to_be_floats_there(tmp_path: Path) -> None:
    source = save_family("qwen3_moe", tmp_path)
    path, _ = converted(recipe(source, quantize("int8-weight-only")), tmp_path / "out")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(path, dtype="auto")
    dtypes = {name: str(module.weight_packed.dtype)[6:] for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    found = _check_modules("transformers", "transformers", read_manifest(path), dtypes, dequantized=False)
    assert (found.passed, found.value, found.detail) == (True, 8, "24 layers of experts are floats there")
    del dtypes["model.layers.0.self_attn.q_proj"]
    assert not _check_modules("transformers", "transformers", read_manifest(path), dtypes, dequantized=False).passed


@pytest.mark.parametrize(("family", "limit"), [("bert", "kl_nats"), ("llama", "relative_error")])
def test_a_limit_that_cannot_apply_is_an_error_with_its_line(family: str, limit: str, tmp_path: Path) -> None:
    text = "model: {model}\ntargets:\n  - name: q\n    format: compressed-tensors\n    limits:\n      " + limit + ": 0.1\n"
    with pytest.raises(RecipeError, match=rf"test.yaml:6:7: .* predicts (no )?tokens, so it has no {limit}; its limits are"):
        pipeline.plan(parse_recipe(text.format(model=save_family(family, tmp_path)), "test.yaml"))
