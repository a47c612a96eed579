"""Rotation of a source: the same function by the plain model, and every promise about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tokenizer
from families import FAMILIES, join_experts, save_family

from convert import pipeline
from convert.export import cores
from convert.pipeline import convert, plan
from convert.recipe import parse_recipe
from convert.rotate import RotatedReader, prove
from convert.source import Checkpoint
from formats.errors import RecipeError, SourceError
from formats.verify import verify

RECIPE = """\
model: {model}
rotation: {rotation}
validation: {{tokens: 128, length: 64}}
calibration: {{sequences: 4, length: 32}}
targets:
  - name: q
    format: compressed-tensors
    rules: [{{match: linear, scheme: {scheme}, algorithm: {algorithm}}}]
    limits: {{kl_nats: 5.0, top1: 0.0, perplexity_ratio: 50.0}}
"""
PLAIN = RECIPE.replace("calibration: {{sequences: 4, length: 32}}\n", "")


def _recipe(folder: Path, rotation: str = "{}", scheme: str = "int8-dynamic", algorithm: str = "rtn") -> Any:
    text = PLAIN if algorithm == "rtn" and "static" not in scheme else RECIPE
    return parse_recipe(text.format(model=folder, rotation=rotation, scheme=scheme, algorithm=algorithm), "r.yaml", name="r")


def _norms_of_their_own(folder: Path) -> None:
    """Random norms (those of a new model are ones), so that folding them is seen."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.dim() == 1 and "norm" in name:
            tensors[name] = (torch.rand(tensor.shape, generator=generator) + 0.5).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _logits(checkpoint: Checkpoint) -> torch.Tensor:
    """What transformers' own model makes of all the tensors of a checkpoint, in float64."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**dict(checkpoint.config))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    read = {name: checkpoint.reader.read(name, 0, spec.matrix_shape[0]).reshape(spec.shape) for name, spec in checkpoint.tensors.items()}
    missing, unexpected = model.load_state_dict(read, strict=False)
    assert not unexpected
    assert not missing or missing == ["lm_head.weight"]
    model.tie_weights()
    with torch.no_grad():
        return model(input_ids=torch.arange(40)[None], use_cache=False).logits


@pytest.mark.parametrize("rotation", ["{}", "{residual: false}", "{values: false, seed: 5}"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True},
        {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 97},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ],
    ids=["llama", "tied", "odd", "biases"],
)
def test_rotation_leaves_the_function_as_it_was(config: dict[str, Any], rotation: str, make_llama: Any) -> None:
    folder = make_llama(dtype="float32", **config)
    _norms_of_their_own(folder)
    before = pipeline.open_source(str(folder))
    after = plan(_recipe(folder, rotation)).checkpoint
    prove(after)
    expected, found = _logits(before), _logits(after)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    moved = {
        name
        for name, spec in before.tensors.items()
        if not torch.allclose(
            after.reader.read(name, 0, spec.matrix_shape[0]), before.reader.read(name, 0, spec.matrix_shape[0]), atol=1e-4
        )
    }
    inside = {name for name in before.tensors if name.endswith("weight")}
    if rotation != "{residual: false}":
        assert moved >= inside
    else:
        assert moved & inside == {name for name in inside if "v_proj" in name or "o_proj" in name}


@pytest.mark.parametrize("family", ["gemma", "mixtral", "qwen3_moe", "qwen2_moe", "joined"])
def test_gemma_and_mixtures_turn_too(family: str, tmp_path: Path) -> None:
    """Norms that add one to their weight; routers and experts, each in a tensor of its own or all in one; loaded by transformers."""
    import transformers
    from safetensors.torch import save_file

    named = "qwen3_moe" if family == "joined" else family
    folder = save_family(named, tmp_path)
    if family == "joined":
        join_experts(folder, turned=False)
    _norms_of_their_own(folder)
    after = plan(_recipe(folder, scheme="int8-weight-only")).checkpoint
    prove(after)
    turned = tmp_path / "turned"
    turned.mkdir()
    tensors = {name: after.reader.read(name, 0, spec.matrix_shape[0]).reshape(spec.shape) for name, spec in after.tensors.items()}
    save_file(
        {name: tensor.float().contiguous() for name, tensor in tensors.items()}, turned / "model.safetensors", metadata={"format": "pt"}
    )
    (turned / "config.json").write_text(json.dumps(dict(after.config)))
    load = getattr(transformers, FAMILIES[named][0]).from_pretrained
    models = [load(each, dtype=torch.float64).eval() for each in (folder, turned)]
    for model in models if family != "gemma" else ():
        model.set_experts_implementation("eager")  # grouped products know no float64
    with torch.no_grad():
        logits = [model(input_ids=torch.arange(60)[None], use_cache=False).logits for model in models]
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < 1e-5
    norms = [tensor for name, tensor in tensors.items() if name.endswith(("layernorm.weight", "model.norm.weight"))]
    assert len(norms) == 5
    assert all(bool((norm == (0.0 if family == "gemma" else 1.0)).all()) for norm in norms)
    before = pipeline.open_source(str(folder)).reader
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and name != "lm_head.weight":
            assert not torch.allclose(
                tensor.flatten(), before.read(name, 0, tensor.numel() // tensor.shape[-1]).float().flatten(), atol=1e-3
            )


def test_a_rotated_mixture_is_quantized_and_passes(tmp_path: Path) -> None:
    folder = save_family("qwen3_moe", tmp_path)
    save_tokenizer(folder, 300)
    _norms_of_their_own(folder)
    outcome = convert(_recipe(folder, scheme="int8-weight-only", algorithm="[{smoothquant: {alpha: 0.5}}, gptq]"), tmp_path / "out")
    assert outcome.passed, [check for check in outcome.reports[0].checks if not check.passed]
    assert outcome.reports[0].runtimes[0].divergence.kl_nats < 0.02


def test_a_rotated_source_becomes_a_graph(make_llama: Any, tmp_path: Path) -> None:
    """Its head is untied, and the graph has the one and the other."""
    folder = make_llama(tie_word_embeddings=True)
    _norms_of_their_own(folder)
    text = PLAIN.replace("compressed-tensors", "onnx").replace("    limits", "    runtimes: [onnxruntime]\n    limits")
    text = text.format(model=folder, rotation="{}", scheme="int8-weight-only-g32", algorithm="rtn")
    outcome = convert(parse_recipe(text, "r.yaml", name="r"), tmp_path)
    assert outcome.passed, [check for check in outcome.reports[0].checks if not check.passed]
    assert all(run.divergence.kl_nats < 0.02 for run in outcome.reports[0].runtimes)


def test_the_plan_counts_what_turning_takes(make_llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from convert.command import _show_plan

    folder = make_llama()
    jobs = [plan(_recipe(folder, rotation)) for rotation in ("{values: false}", "{}")]
    plain = parse_recipe(
        PLAIN.replace("rotation: {rotation}\n", "").format(model=folder, scheme="int8-dynamic", algorithm="rtn"), "r.yaml", name="r"
    )
    bare, turned = (pipeline.needs(job, tmp_path, check=False) for job in (plan(plain), jobs[1]))
    reader = jobs[1].checkpoint.reader
    assert isinstance(reader, RotatedReader)
    assert turned.memory_bytes - bare.memory_bytes == reader.held_bytes(cores()) > 3 * 4 * 96 * 64
    linear = 2 * (64 * 16 * (4 + 2 + 2 + 4) + 3 * 64 * 96)
    assert reader.turned_elements == linear + 2 * 300 * 64
    _show_plan(jobs[1], turned, ledger=False)
    assert "rotates    " in capsys.readouterr().out


def test_rows_are_the_same_however_they_are_read(make_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(dtype="float32")
    after = plan(_recipe(folder)).checkpoint
    monkeypatch.setattr("convert.rotate._CHUNK", 700)
    slabs = plan(_recipe(folder)).checkpoint
    for name, spec in after.tensors.items():
        rows = spec.matrix_shape[0]
        whole = after.reader.read(name, 0, rows)
        parts = torch.cat([slabs.reader.read(name, start, min(start + 7, rows)) for start in range(0, rows, 7)])
        assert torch.allclose(whole, parts, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic"])
def test_an_artifact_of_a_tied_model_has_a_head_of_its_own_and_passes(scheme: str, make_llama: Any, tmp_path: Path) -> None:
    folder = make_llama(tie_word_embeddings=True)
    _norms_of_their_own(folder)
    outcome = convert(_recipe(folder, scheme=scheme), tmp_path)
    (report,) = outcome.reports
    assert report.passed, [check for check in report.checks if not check.passed]
    numbers = next(check for check in report.checks if check.name.startswith("numbers"))
    assert numbers.value <= 1
    assert verify(outcome.artifacts[0].path).findings == ()
    assert report.runtimes[0].divergence.kl_nats < 0.02
    ledger = {record["tensor"]: record for record in outcome.artifacts[0].manifest.ledger}
    assert ledger["lm_head.weight"]["note"] == "rotated (untied from model.embed_tokens.weight, model.norm.weight moved in, R1)"
    assert ledger["model.norm.weight"]["note"] == "rotated (its weight moved into what reads it)"
    assert ledger["model.layers.0.self_attn.o_proj.weight"]["note"] == "rotated (R1, R2)"
    assert all("rotated" in record["note"] for record in ledger.values())


def test_rotation_goes_together_with_smoothing_gptq_and_static_scales(make_llama: Any, tmp_path: Path) -> None:
    folder = make_llama()
    _norms_of_their_own(folder)
    outcome = convert(_recipe(folder, scheme="int8-static", algorithm="[{smoothquant: {alpha: 0.5}}, gptq]"), tmp_path)
    assert outcome.passed, [check for check in outcome.reports[0].checks if not check.passed]
    assert outcome.reports[0].runtimes[0].divergence.kl_nats < 0.02
    card = (outcome.artifacts[0].path / "README.md").read_text()
    assert "quantized already" not in card, "turned and smoothed is not quantized"
    assert "What was done to them beside that: " in card
    assert " tensors smoothed: divided by" in card
    assert " tensors rotated (R1" in card


def test_a_wrong_turn_is_found_before_anything_is_written(make_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a stream that somebody else reads too."""
    folder = make_llama()
    job = plan(_recipe(folder))
    reader = job.checkpoint.reader
    assert isinstance(reader, RotatedReader)
    del reader._turns["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(SourceError, match=r"differs by .* at the end"):
        prove(job.checkpoint)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", r"r.yaml:2:1: transformer.ln_f takes the mean"),
        ("llama4", r"r.yaml:2:1: model.layers.0.feed_forward.experts.gate_up_proj may read or write the residual stream"),
        ("gemma2", r"r.yaml:2:1: model.layers.0.post_attention_layernorm scales what is written to the residual stream"),
        ("bert", r"r.yaml:2:1: BertModel predicts no tokens"),
    ],
)
def test_a_model_whose_stream_does_not_turn_is_refused_by_name(family: str, message: str, tmp_path: Path) -> None:
    save: Callable[..., Path] = save_family
    with pytest.raises(RecipeError, match=message):
        plan(_recipe(save(family, tmp_path)))


def test_an_encoder_decoder_is_not_rotated(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "vocab_size": 300}
    T5ForConditionalGeneration(T5Config(**settings)).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"r.yaml:2:1: T5ForConditionalGeneration writes beside what it reads"):
        plan(_recipe(tmp_path))
