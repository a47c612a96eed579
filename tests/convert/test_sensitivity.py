"""Losses of single groups against the plain model with that group's weights and inputs rounded, and KL in float64."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tokenizer
from families import save_family

from convert.algorithms import rtn
from convert.algorithms.smoothing import fake_quantize
from convert.crew import Crew
from convert.integers import pays
from convert.ledger import Plan
from convert.pipeline import plan
from convert.progress import QUIET
from convert.reference import Reference
from convert.sensitivity import Trial, groups_of, in_words, measure, round_trials, sensitivity_of
from convert.text import load_tokenizer, take_tokens
from formats.errors import InputError
from formats.scheme import SCHEMES

LINEARS = {
    "q": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def _oracle(folder: Path, modules: tuple[str, ...], scheme: str, tokens: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    chosen = SCHEMES[scheme]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits.double().log_softmax(-1)
        for name in modules:
            module: Any = model.get_submodule(name)
            weight = rtn.quantize(module.weight.detach().clone(), chosen.weight, scale_dtype=torch.bfloat16).dequantize()
            module.weight = torch.nn.Parameter(weight)
            module.register_forward_pre_hook(
                lambda _, args: (fake_quantize(args[0].reshape(-1, args[0].shape[-1]), chosen.activation).reshape(args[0].shape),)
            )
        got = model(input_ids=tokens).logits.double().log_softmax(-1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


def _tokens(folder: Path) -> torch.Tensor:
    tokens, _ = take_tokens(
        "sample", load_tokenizer(folder, trust_remote_code=False), sequences=2, length=16, purpose="calibration", seed=1
    )
    return torch.from_numpy(tokens)


@pytest.mark.parametrize(
    "int8", [False, pytest.param(True, marks=pytest.mark.skipif(not pays("cpu"), reason="this processor does not multiply INT8 faster"))]
)
@pytest.mark.parametrize("tied", [False, True])
def test_each_group_loses_what_the_plain_model_loses_with_it_rounded(
    tied: bool, int8: bool, make_llama: Any, recipe_for: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("convert.integers.pays", lambda _: int8)
    folder = make_llama(tie_word_embeddings=tied)
    job = plan(recipe_for(folder))
    trials = round_trials(job, ["int8-dynamic", "fp8-dynamic"])
    losses, how = measure(job, trials, QUIET, tokens=32, length=16)
    wanted = [
        tuple(f"model.layers.{i}.{'mlp' if name in ('gate', 'down') else 'self_attn'}.{x}" for x in names)
        for i in range(2)
        for name, names in LINEARS.items()
    ]
    assert sorted(loss.modules for loss in losses if loss.scheme == "int8-dynamic") == sorted([*wanted, ("lm_head",)])
    assert [loss.scheme for loss in losses] == ["int8-dynamic"] * 9 + ["fp8-dynamic"] * 9
    for loss in losses:
        expected = _oracle(folder, loss.modules, loss.scheme, _tokens(folder))
        assert loss.kl_nats == pytest.approx(expected, rel=2e-2 if int8 else 1e-3, abs=1e-10), loss
        assert loss.standard_error > 0
    assert how["text"]["tokens"] == 32
    assert how["logits"]["compared"] == how["logits"]["vocabulary"], "so few are all computed"
    assert ("products" in how) == int8
    assert ("in INT8" in in_words(how)) == int8


def _expert_oracle(folder: Path, layer: int, scheme: str, tokens: torch.Tensor) -> float:
    """All experts of a layer rounded, and what goes into each of their products, in arithmetic of our own."""
    from transformers import AutoModelForCausalLM

    chosen = SCHEMES[scheme]

    def weight(matrix: torch.Tensor) -> torch.Tensor:
        return rtn.quantize(matrix.clone(), chosen.weight, scale_dtype=torch.bfloat16).dequantize()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    experts = model.model.layers[layer].mlp.experts

    def forward(x: torch.Tensor, index: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for expert in range(len(experts.gate_up_proj)):
            gate, up = weight(experts.gate_up_proj[expert]).chunk(2)
            read = fake_quantize(x, chosen.activation)
            inner = torch.nn.functional.silu(read @ gate.T) * (read @ up.T)
            out = fake_quantize(inner, chosen.activation) @ weight(experts.down_proj[expert]).T
            total += out * (share * (index == expert)).sum(-1, keepdim=True)
        return total

    with torch.no_grad():
        expected = model(input_ids=tokens).logits.double().log_softmax(-1)
        experts.forward = forward
        got = model(input_ids=tokens).logits.double().log_softmax(-1)
    return float((expected.exp() * (expected - got)).sum(-1).mean())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_all_experts_of_a_layer_are_one_group(family: str, recipe_for: Any, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path)
    save_tokenizer(folder, 300)
    text = "model: {model}\ntargets: [{{name: q, format: compressed-tensors, runtimes: [vllm]}}]\n"
    job = plan(recipe_for(folder, text=text))
    trials = round_trials(job, ["int8-dynamic"])
    losses, _ = measure(job, trials, QUIET, tokens=32, length=16)
    found = {int(loss.modules[0].split(".")[2]): loss for loss in losses if "experts" in loss.modules[0]}
    assert {layer: len(loss.modules) for layer, loss in found.items()} == {0: 12, 1: 12}
    whole = sum(entry.tensor.elements for entry in job.targets[0].entries if entry.kind == "expert")
    assert sum(loss.parameters for loss in found.values()) == whole
    for layer, loss in found.items():
        assert loss.kl_nats == pytest.approx(_expert_oracle(folder, layer, "int8-dynamic", _tokens(folder)), rel=2e-3)


def test_groups_of_several_blocks_are_measured_together(make_llama: Any, recipe_for: Any) -> None:
    folder = make_llama()
    job = plan(recipe_for(folder))
    trials = round_trials(job, ["int8-dynamic"])
    chosen = [trial for trial in trials if "gate_proj" not in trial.modules[0]]
    modules = tuple(module for trial in chosen for module in trial.modules)
    together = Trial(modules, "int8-dynamic", 0, {name: form for trial in chosen for name, form in trial.forms.items()})
    (loss,), _ = measure(job, [together], QUIET, tokens=32, length=16)
    assert loss.kl_nats == pytest.approx(_oracle(folder, modules, "int8-dynamic", _tokens(folder)), rel=1e-3)


def test_with_little_time_the_worst_are_measured_and_the_others_expected(make_llama: Any, recipe_for: Any) -> None:
    job = plan(recipe_for(make_llama(num_hidden_layers=3)))
    trials = round_trials(job, ["int8-dynamic"])
    whole, _ = measure(job, trials, QUIET, tokens=32, length=16)
    some, _ = measure(job, trials, QUIET, tokens=32, length=16, seconds=1e-9)
    measured = [loss for loss in some if loss.measured]
    assert [loss.modules for loss in measured] == [("lm_head",)], "what is nearest to the output has no block whose error could be taken"
    assert [loss.block_error for loss in some][:-1] == [loss.block_error for loss in whole][:-1]
    more, _ = measure(job, trials, QUIET, tokens=32, length=16, seconds=1e9)
    assert more == whole


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_few_places_of_a_vocabulary_tell_the_loss(family: str, make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Gemma 2 caps its logits, each by itself."""
    folder = make_llama() if family == "llama" else save_family(family, tmp_path)
    if family != "llama":
        save_tokenizer(folder, 300)
    job = plan(
        recipe_for(
            folder,
            text="model: {model}\ntargets: [{{name: q, format: compressed-tensors, rules: [{{match: linear, scheme: int8-dynamic}}]}}]\n",
        )
    )
    trials = round_trials(job, ["int8-dynamic"])
    whole, _ = measure(job, trials, QUIET, tokens=64, length=16)
    monkeypatch.setattr("convert.sensitivity.PLACES", 150)
    some, how = measure(job, trials, QUIET, tokens=64, length=16)
    logits = how["logits"]
    assert logits["compared"] <= 150 < logits["vocabulary"]
    assert 0 < logits["left_out"] < 1
    assert f"KL from {logits['compared']} of {logits['vocabulary']} logits a token (every one likelier than 1 in 150," in in_words(how)
    ratios = torch.tensor([few.kl_nats / all_.kl_nats for few, all_ in zip(some, whole, strict=True)])
    assert (ratios != 1).all()
    assert (ratios - 1).abs().max() < 0.1
    assert abs(float(ratios.mean()) - 1) < 0.03


def test_a_model_that_mixes_its_logits_has_all_of_them_computed(make_llama: Any, recipe_for: Any, monkeypatch: Any) -> None:
    from transformers import LlamaForCausalLM

    folder = make_llama()
    job = plan(recipe_for(folder))
    trials = round_trials(job, ["int8-dynamic"])
    forward = LlamaForCausalLM.forward

    def centred(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(-1, keepdim=True)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", centred)
    expected, _ = measure(job, trials, QUIET, tokens=32, length=16)
    monkeypatch.setattr("convert.sensitivity.PLACES", 100)
    assert measure(job, trials, QUIET, tokens=32, length=16)[0] == expected


def test_lanes_that_do_not_fit_take_another_pass(make_llama: Any, recipe_for: Any, monkeypatch: Any) -> None:
    job = plan(recipe_for(make_llama()))
    trials = round_trials(job, ["int8-static", "int8-dynamic"])
    once, how = measure(job, trials, QUIET, tokens=40, length=16)
    assert how["text"]["tokens"] == 39, "three sequences of 13"
    hidden = job.architecture.hidden_size if job.architecture else None
    monkeypatch.setattr("convert.sensitivity.LANES_BYTES", 7 * 3 * 39 * 4 * (hidden or 0))
    names: list[str] = []
    monkeypatch.setattr(QUIET.__class__, "stage", lambda _, name, *rest, unit: (names.append(name), nullcontext(lambda *_: None))[1])  # noqa: ARG005
    assert measure(job, trials, QUIET, tokens=40, length=16)[0] == once
    assert names == [f"measuring groups, {i} of 4" for i in range(1, 5)], "18 trials, 5 beside the source and its witness"


def test_a_static_head_is_rounded_by_what_the_source_shows(make_llama: Any, recipe_for: Any) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_llama()
    job = plan(recipe_for(folder))
    (trial,) = [each for each in round_trials(job, ["int8-static"]) if each.modules == ("lm_head",)]
    (loss,), _ = measure(job, [trial], QUIET, tokens=32, length=16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model.model(input_ids=_tokens(folder)).last_hidden_state
        scale = hidden.abs().max() / 127
        weight = rtn.quantize(model.lm_head.weight.clone(), SCHEMES["int8-static"].weight, scale_dtype=torch.bfloat16).dequantize()
        expected = (hidden @ model.lm_head.weight.T).double().log_softmax(-1)
        got = ((hidden / scale).round().clamp(-127, 127) * scale @ weight.T).double().log_softmax(-1)
    assert loss.kl_nats == pytest.approx(float((expected.exp() * (expected - got)).sum(-1).mean()), rel=1e-3)


def test_a_tiny_divergence_is_told() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 1000, generator=generator) * 4
    for size in (0.0, 1e-4, 1e-2, 1.0):
        other = z + size * torch.randn(5, 1000, generator=generator) + 7
        p, q = torch.log_softmax(z.double(), -1), torch.log_softmax(other.double(), -1)
        expected = (p.exp() * (p - q)).sum(-1)
        assert torch.allclose(Reference(z).kl(other, Crew()).double(), expected, rtol=2e-2, atol=1e-9), size


def test_a_model_without_logits_is_refused(recipe_for: Any, tmp_path: Path) -> None:
    text = "model: {model}\ntargets: [{{name: q, format: compressed-tensors}}]\n"
    job: Plan = plan(recipe_for(save_family("bert", tmp_path), text=text))
    with pytest.raises(InputError, match="sensitivity is measured at the logits"):
        measure(job, [], QUIET)
    assert groups_of(job)


def test_with_no_time_the_heads_of_all_schemes_are_measured_all_the_same(make_llama: Any, recipe_for: Any) -> None:
    """They lie in no block, so that no error there could stand for what they lose."""
    job = plan(recipe_for(make_llama()))
    losses, _ = sensitivity_of(job, QUIET, tokens=32, seconds=0.0)
    assert {loss.scheme for loss in losses if loss.modules == ("lm_head",) and loss.measured} == {"int8-dynamic", "fp8-dynamic"}
    assert len(losses) == 18


def test_tiles_that_do_not_divide_a_layer_are_refused_before_the_walk(make_llama: Any, recipe_for: Any) -> None:
    with pytest.raises(InputError, match=r"_proj is \d+ x \d+, which tiles of fp8-block do not divide; leave that scheme out"):
        sensitivity_of(plan(recipe_for(make_llama())), QUIET, schemes=["int8-dynamic", "fp8-block"], tokens=32)
