"""What goes into each expert, against hooks and arithmetic by hand on the plain model; and what is made of it."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from conftest import KILLED, save_tokenizer
from families import FAMILIES, join_experts, save_family
from safetensors.torch import load_file, save_file

from convert import pipeline
from convert.architecture import describe
from convert.calibrate import statistics_bytes
from convert.compatibility import parts_of_ledger
from convert.folds import folded, read_fold, touching
from convert.loading import Skeleton
from convert.numbers import compare
from convert.progress import Lines
from convert.recipe import parse_recipe
from convert.source import open_source
from convert.text import load_tokenizer, take_tokens
from formats.errors import InputError, RecipeError
from formats.inspect import compatibility

ALL = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "qwen3_5_moe", "llama4")
RECIPE = """
model: {model}
calibration: {{sequences: 6, length: 32, seed: 3, dtype: float32{more}}}
targets:
  - name: q
    format: compressed-tensors
    runtimes: [{runtime}]
    hardware: [{hardware}]
    rules: [{{match: linear, scheme: {scheme}, algorithm: {algorithm}}}]
"""


def recipe(model: Path, scheme: str, algorithm: str = "rtn", *, runtime: str = "transformers", hardware: str = "", more: str = "") -> Any:
    text = RECIPE.format(model=model, scheme=scheme, algorithm=algorithm, runtime=runtime, hardware=hardware, more=more)
    return parse_recipe(text, "test.yaml", name="test")


def plainly(model: Path) -> Any:
    """The same in INT8 by rounding, which reads no text."""
    text = "\n".join(line for line in RECIPE.splitlines() if not line.startswith("calibration"))
    options = {"model": model, "scheme": "int8-weight-only", "algorithm": "rtn", "runtime": "transformers", "hardware": ""}
    return parse_recipe(text.format(**options), "test.yaml", name="test")


def saved(family: str, folder: Path) -> Path:
    source = save_family(family, folder)
    save_tokenizer(source, 300)
    return source


def converted(job: Any, out: Path, **options: Any) -> Any:
    return pipeline.convert(job, out, check=False, **options).artifacts[0]


def inputs(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """By expert's layer, as the checkpoint calls it, all that goes into it while the plain model reads the text of calibration."""
    model = getattr(transformers, FAMILIES[family][0]).from_pretrained(folder, dtype=torch.float32).eval()
    tokens, _ = take_tokens(
        "sample", load_tokenizer(folder, trust_remote_code=False), sequences=6, length=32, purpose="calibration", seed=3
    )
    found: dict[str, list[torch.Tensor]] = {}

    def see(name: str, module: Any, args: Any) -> None:
        for expert in range(4):
            if family == "llama4":
                x = args[0].view(4, -1, 64)[expert]
                x = x[x.any(dim=1)]
                gate, up = (x @ module.gate_up_proj[expert]).chunk(2, dim=-1)
            else:
                x = args[0][(args[1] == expert).any(dim=1)]
                gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            found.setdefault(f"{name}.{expert}.up", []).append(x)
            found.setdefault(f"{name}.{expert}.down", []).append(module.act_fn(gate) * up)

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, args, name=name: see(name, module, args))
    with torch.no_grad():
        for sequence in torch.from_numpy(tokens):
            model(input_ids=sequence[None], use_cache=False)
    joined = {name: torch.cat(rows) for name, rows in found.items()}
    other = {"gate_proj": "up", "up_proj": "up", "down_proj": "down"}
    if family == "mixtral":
        joined = {name.replace(".mlp.", ".block_sparse_moe."): x for name, x in joined.items()}
        other = {"w1": "up", "w3": "up", "w2": "down"}
    return {
        f"{name.rpartition('.')[0]}.{layer}": x for name, x in joined.items() for layer, kind in other.items() if name.endswith(f".{kind}")
    }


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight of an artifact, by compressed-tensors."""
    tensors = load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    group = next(iter(config.config_groups.values()))
    found = {}
    for scale in (name for name in tensors if name.endswith(".weight_scale")):
        module = scale.removesuffix(".weight_scale")
        assert not any(is_match(module, torch.nn.Linear(1, 1), name) for name in config.ignore)
        stored = {name.removeprefix(f"{module}."): tensors[name] for name in tensors if name.startswith(f"{module}.")}
        compressor = BaseCompressor.get_value_from_registry(group.format or config.format)
        found[module] = compressor.decompress(stored, copy.deepcopy(group))["weight"].float()
    return found


@pytest.mark.parametrize("family", [*ALL, "joined"])
def test_every_expert_is_found_where_the_model_holds_it(family: str, tmp_path: Path) -> None:
    source = save_family("qwen3_moe" if family == "joined" else family, tmp_path)
    if family == "joined":
        join_experts(source, turned=False)
    checkpoint = open_source(str(source))
    architecture = describe(checkpoint.config, checkpoint.tensors)
    assert architecture is not None
    parts = {name: parameter.parts for name, parameter in architecture.parameters.items() if parameter.kind == "expert"}
    skeleton = Skeleton(checkpoint, dtype="float32")
    skeleton.find_experts(parts)
    for block in architecture.blocks:
        skeleton.load(block, "cpu")
    assert len(skeleton.experts) == sum(map(len, parts.values())) > 0
    for name, of in parts.items():
        rows = skeleton.read(name).float().reshape(checkpoint.tensors[name].matrix_shape)
        for part in of:
            matrix = rows[part.start : part.stop]
            matrix = matrix if part.columns is None else matrix[:, slice(*part.columns)].T
            assert torch.equal(skeleton.weight(part.module), matrix), part
            skeleton.weight(part.module).zero_()
    assert not any(skeleton.model.get_parameter(place.parameter).any() for place in skeleton.experts.values())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "qwen3_5_moe", "llama4"])
def test_a_hessian_of_each_expert_is_that_of_the_plain_model(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convert import solve

    source = saved(family, tmp_path)
    seen: dict[str, torch.Tensor] = {}
    solving = solve._solve

    def spy(members: Any, *, known: Any) -> Any:
        for entry, part in members:
            if entry.experts:
                seen[part.module] = known.observer.get(part.module, "hessian").value.clone()
        return solving(members, known=known)

    monkeypatch.setattr(solve, "_solve", spy)
    made = converted(recipe(source, "int8-weight-only", "gptq", more=", propagate: float"), tmp_path / "out")
    expected = inputs(source, family)
    assert seen.keys() == expected.keys()
    for name, x in expected.items():
        assert made.manifest.calibration["solved"][name]["tokens"] == len(x) > 0
        assert torch.allclose(seen[name], x.T @ x, rtol=1e-3, atol=1e-4 * float((x.T @ x).abs().max())), name


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_5_moe", "llama4"])
def test_gptq_of_experts_lowers_their_output_error_and_reloads(family: str, tmp_path: Path) -> None:
    source = saved(family, tmp_path)
    made = [converted(plainly(source), tmp_path / "rtn"), converted(recipe(source, "int8-weight-only", "gptq"), tmp_path / "gptq")]
    rounded, solved = (decoded(artifact.path) for artifact in made)
    assert rounded.keys() == solved.keys()
    before = {name: x for name, x in inputs(source, family).items() if name.startswith(f"model.layers.{int(family == 'deepseek_v3')}.")}
    assert len(before) == 12
    checkpoint = open_source(str(source))
    architecture = describe(checkpoint.config, checkpoint.tensors)
    assert architecture is not None
    weights = {}
    for name, parameter in architecture.parameters.items():
        for part in parameter.parts if parameter.kind == "expert" else ():
            rows = checkpoint.reader.read(name, part.start, part.stop).float()
            weights[part.module] = rows if part.columns is None else rows[:, slice(*part.columns)].T
    for name, x in before.items():
        errors = [codes[name] - weights[name] for codes in (rounded, solved)]
        assert errors[1].norm() > errors[0].norm(), name
        assert (x @ errors[1].T).norm() < 0.7 * (x @ errors[0].T).norm(), name
    model, info = getattr(transformers, FAMILIES[family][0]).from_pretrained(made[1].path, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    plain = getattr(transformers, FAMILIES[family][0]).from_pretrained(source, dtype=torch.float32)
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        logits = [each.eval()(input_ids=ids).logits.float() for each in (plain, model)]
    assert torch.nn.functional.cosine_similarity(*logits, dim=-1).mean() > 0.998


def test_experts_in_one_tensor_are_solved_as_separate_ones_are(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path)
    job = recipe(source, "fp8-dynamic", "gptq")
    separate = load_file(converted(job, tmp_path / "separate").path / "model.safetensors")
    join_experts(source, turned=False)
    joined = load_file(converted(job, tmp_path / "joined").path / "model.safetensors")
    assert separate.keys() == joined.keys()
    assert all(torch.equal(separate[name].view(torch.uint8), joined[name].view(torch.uint8)) for name in separate)


@pytest.mark.parametrize("algorithm", ["gptq", "[{smoothquant: {alpha: 0.5}}, gptq]"])
@pytest.mark.parametrize("unseen", ["error", "all_tokens"])
def test_hessians_of_experts_in_passes_give_the_bytes_of_one_pass(
    algorithm: str, unseen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for three, for one, and for less than one; and the plan counts what is held."""
    from convert import observe

    source = starved(tmp_path) if unseen == "all_tokens" else saved("qwen3_moe", tmp_path)
    held: list[int] = []
    take = observe.Observer.take

    def counted(self: Any, *args: Any) -> None:
        take(self, *args)
        kept = [kinds["hessian"] for leader, kinds in self._seen.items() if ".experts." in leader and kinds.get("hessian")]
        held.append(sum(4 * hessian.features**2 for hessian in kept))

    monkeypatch.setattr("convert.observe.Observer.take", counted)
    made, most, needed = {}, {}, {}
    for budget in (8_000_000_000, 3 * 64 * 64 * 4, 1):
        more = f", unseen_experts: {unseen}, expert_hessians: {budget}"
        job = recipe(source, "int8-weight-only", algorithm.replace("0.5}", "0.5, uncovered: leave}"), more=more)
        needed[budget] = statistics_bytes(pipeline.plan(job), 1)
        held.clear()
        made[budget] = (converted(job, tmp_path / str(budget)).path / "model.safetensors").read_bytes()
        most[budget] = max(held)
    assert len(set(made.values())) == 1
    whole, three, one = most.values()
    assert whole > 4 * 64 * 64 * 4
    assert three <= 3 * 64 * 64 * 4 < whole
    assert one <= 64 * 64 * 4
    if unseen == "error":  # all Hessians, or one and the block as it was beside it
        assert needed[8_000_000_000] - needed[1] == 4 * (4 * (64**2 + 40**2) - 64**2 - (4 * 3 * 64 * 40 + 64 * 16 * (4 + 2 + 2 + 4)))


def test_experts_may_be_rounded_beside_layers_that_are_solved(tmp_path: Path) -> None:
    """And the plan counts their Hessians where they have any: one for gate and up, one for down, of each expert; and what they read."""
    source = saved("qwen3_moe", tmp_path)
    text = RECIPE.format(model=source, scheme="int8-weight-only", algorithm="gptq", runtime="transformers", hardware="", more="")
    every = parse_recipe(text, "test.yaml", name="test")
    rules = "[{match: '*.self_attn.?_proj', scheme: int8-weight-only, algorithm: gptq}, {match: linear, scheme: int8-weight-only}]"
    some = parse_recipe(text, "test.yaml", name="test", overrides=[f"targets.0.rules={rules}"])
    hessians, read = 4 * (64**2 + 40**2), min(every.calibration.tokens, 2048) * 64
    assert statistics_bytes(pipeline.plan(every), 1) - statistics_bytes(pipeline.plan(some), 1) == 4 * (hessians + read)
    rounded = load_file(converted(plainly(source), tmp_path / "rtn").path / "model.safetensors")
    solved = load_file(converted(some, tmp_path / "some").path / "model.safetensors")
    codes = [name for name in rounded if name.endswith(".weight_packed")]
    assert len(codes) == 2 * (4 + 12)
    assert all(torch.equal(rounded[name], solved[name]) == (".experts." in name) for name in codes)


def test_static_scales_of_experts_are_those_of_the_plain_model(tmp_path: Path) -> None:
    source = saved("mixtral", tmp_path)
    made = converted(recipe(source, "fp8-static", runtime="vllm", hardware="sm_90"), tmp_path / "out")
    stored = load_file(made.path / "model.safetensors")
    expected = inputs(source, "mixtral")
    assert len(expected) == 24
    for name, x in expected.items():
        scale = stored[f"{name}.input_scale"]
        assert torch.allclose(scale, (x.abs().max() / 448).to(scale.dtype), rtol=2**-7), name


def starved(folder: Path) -> Path:
    """A DeepSeek of which experts 2 and 3 of layer 1, which are its second group, are never asked."""
    source = saved("deepseek_v3", folder)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][2:] = -1e9
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_an_expert_that_saw_no_token_is_an_error_unless_the_recipe_says_what_to_do(tmp_path: Path) -> None:
    source = starved(tmp_path)
    layers = [f"model.layers.1.mlp.experts.{i}.{name}_proj" for i in (2, 3) for name in ("down", "gate", "up")]
    asked = inputs(source, "deepseek_v3")
    assert sorted(name for name, x in asked.items() if not len(x)) == layers
    with pytest.raises(InputError, match=r"^model.layers.1.mlp.experts.2 \(and 1 more .*: 0 of the 192 tokens .* all_tokens or round$"):
        converted(recipe(source, "int8-weight-only", "gptq"), tmp_path / "error")
    rounded = converted(plainly(source), tmp_path / "rtn")
    made = {
        how: converted(recipe(source, "int8-weight-only", "gptq", more=f", unseen_experts: {how}"), tmp_path / how)
        for how in ("round", "all_tokens")
    }
    ours = {how: load_file(artifact.path / "model.safetensors") for how, artifact in made.items()}
    plain = load_file(rounded.path / "model.safetensors")
    for layer in layers:
        weight = f"{layer}.weight_packed"
        assert torch.equal(ours["round"][weight], plain[weight])
        assert not torch.equal(ours["all_tokens"][weight], plain[weight])
        for how, done in (("round", "rounded"), ("all_tokens", "shown_all_tokens")):
            health = made[how].manifest.calibration["solved"][layer]
            assert health[done] == 1.0
            assert health["tokens"] == (0 if how == "round" else 192)
    for how, words in (("round", "its weights are rounded"), ("all_tokens", "shown all of its layer")):
        notes = {entry["tensor"]: entry.get("note", "") for entry in made[how].manifest.ledger}
        assert sorted(name for name in notes if words in notes[name]) == [f"{layer}.weight" for layer in layers]


def test_what_an_expert_is_shown_is_all_that_comes_to_its_layer(tmp_path: Path) -> None:
    source = starved(tmp_path)
    scales = {}
    for how in ("all_tokens", "round"):
        job = recipe(source, "fp8-static", runtime="vllm", hardware="sm_90", more=f", unseen_experts: {how}")
        scales[how] = load_file(converted(job, tmp_path / how).path / "model.safetensors")
    seen = inputs(source, "deepseek_v3")
    experts = "model.layers.1.mlp.experts"
    largest = max(x.abs().max() for name, x in seen.items() if name.endswith("up_proj") and len(x))
    for how, found in scales.items():
        scale = found[f"{experts}.2.up_proj.input_scale"]
        # Every token goes to the two others, which see all.
        assert torch.allclose(scale, (largest / 448).to(scale.dtype), rtol=2**-7), how
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    module = model.model.layers[1].mlp.experts
    rows = torch.unique(torch.cat([x for name, x in seen.items() if name.endswith("up_proj") and len(x)]), dim=0)
    gate, up = (rows @ module.gate_up_proj[2].T).chunk(2, dim=-1)
    expected = (module.act_fn(gate) * up).abs().max() / 448
    of_down = {how: found[f"{experts}.2.down_proj.input_scale"] for how, found in scales.items()}
    assert torch.allclose(of_down["all_tokens"], expected.to(torch.bfloat16), rtol=2**-7)
    beside = max(x.abs().max() for name, x in seen.items() if name.endswith("down_proj") and len(x)) / 448
    assert torch.allclose(of_down["round"], beside.to(torch.bfloat16), rtol=2**-7)
    assert not torch.equal(of_down["all_tokens"], of_down["round"])


def test_an_expert_with_fewer_tokens_than_asked_for_is_unseen_and_one_with_fewer_than_inputs_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved("mixtral", tmp_path)
    made = converted(recipe(source, "int8-weight-only", "gptq"), tmp_path / "out", progress=Lines())
    tokens = {name: seen["tokens"] for name, seen in made.manifest.calibration["solved"].items() if name.endswith(".w2")}
    few = [name for name, count in tokens.items() if count < 96]
    said = f"warning: {few[0]} saw {tokens[few[0]]:.0f} tokens and has 96 inputs (and {len(few) - 1} more of experts)"
    assert said in capsys.readouterr().err
    least = int(min(tokens.values())) + 1
    with pytest.raises(InputError, match=rf"{least - 1} of the 192 tokens of calibration came to it, {least} are asked for"):
        converted(recipe(source, "int8-weight-only", "gptq", more=f", expert_tokens: {least}"), tmp_path / "error")


@pytest.mark.parametrize("algorithm", ["gptq", "[{smoothquant: {alpha: 0.6}}, gptq]"])
def test_experts_of_a_killed_run_are_taken_up_to_the_same_bytes(algorithm: str, tmp_path: Path) -> None:
    """Killed within the second block: what the first became is put back into the model's 3-D parameters, its router and its norms."""
    source = saved("qwen3_moe", tmp_path)
    text = RECIPE.format(model=source, scheme="int8-weight-only", algorithm=algorithm, runtime="transformers", hardware="", more="")
    (tmp_path / "recipe.yaml").write_text(text)
    whole = converted(parse_recipe(text, "test.yaml", name="test"), tmp_path / "whole")
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(out), "20"], check=False)
    assert done.returncode == -signal.SIGKILL
    again = converted(parse_recipe(text, "test.yaml", name="test"), out)
    assert (again.path / "octavo.json").read_bytes() == (whole.path / "octavo.json").read_bytes()
    other = converted(recipe(source, "int8-weight-only", algorithm, more=", propagate: float"), tmp_path / "float")
    different = [name for name, tensor in load_file(other.path / "model.safetensors").items() if not _same(tensor, name, whole.path)]
    assert different
    assert all(name.startswith("model.layers.1.") for name in different)


def _same(tensor: torch.Tensor, name: str, folder: Path) -> bool:
    return torch.equal(tensor, load_file(folder / "model.safetensors")[name])


def with_an_outlier(source: Path) -> Path:
    """A channel that the norms before experts make 64 times as large, and that experts and routers read with as much smaller weights."""
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("post_attention_layernorm.weight"):
            tensor[5] *= 64
        elif tensor.dim() == 2 and tensor.shape[1] == 64 and (".experts." in name or name.endswith("gate.weight")):
            tensor[:, 5] /= 64
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize(
    ("family", "algorithm"),
    [
        ("mixtral", "[{smoothquant: {alpha: 0.5}}, gptq]"),
        ("mixtral", "[{smoothquant: {alpha: search}}, rtn]"),
        ("qwen3_moe", "[awq, rtn]"),
        ("qwen3_moe", "[{smoothquant: {alpha: 0.5}}, gptq]"),
    ],
)
def test_smoothing_reaches_experts_and_leaves_the_function_and_the_router_as_they_were(family: str, algorithm: str, tmp_path: Path) -> None:
    """Of what the manifest says was folded in, transformers' own model makes the source's logits; and every token goes where it went."""
    source = with_an_outlier(saved(family, tmp_path))
    scheme = "int8-weight-only" if "awq" in algorithm else "int8-dynamic"
    runtime, hardware = ("transformers", "") if "awq" in algorithm else ("vllm", "sm_90")
    made = converted(recipe(source, scheme, algorithm, runtime=runtime, hardware=hardware), tmp_path / "out")
    ledger = {entry["tensor"]: entry for entry in made.manifest.ledger}
    assert not [name for name, entry in ledger.items() if "not smoothed" in entry.get("note", "")]
    folds = [read_fold(record) for record in made.manifest.calibration["folds"]]
    assert len(folds) == 2 * (3 + 4), "two norms, values, and up projections of four experts, in each block"
    assert all(torch.equal(fold.scales.log2().round().exp2(), fold.scales) for fold in folds if ".experts." in fold.producer)
    tensors, stored = load_file(source / "model.safetensors"), load_file(made.path / "model.safetensors")
    turned = {}
    for name, tensor in tensors.items():
        entry = ledger[name]
        module = name.removesuffix(".weight") if entry.get("experts") else entry["module"]
        turned[name] = folded(tensor.float(), module, touching(folds, module), bias=name.endswith(".bias"))
    gates = [name for name in tensors if name.endswith("gate.weight")]
    assert len(gates) == 2
    for name in gates:
        assert "smoothed" in ledger[name]["note"]
        assert torch.equal(stored[name].float(), turned[name]), "a router is exact in the dtype it is stored in"
        assert torch.equal((stored[name].float() / tensors[name].float()).log2().round(), (stored[name] / tensors[name]).float().log2())
    save_file(turned, tmp_path / "turned.safetensors", metadata={"format": "pt"})
    folder = tmp_path / "float"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "turned.safetensors").rename(folder / "model.safetensors")
    models = [getattr(transformers, FAMILIES[family][0]).from_pretrained(each, dtype=torch.float64).eval() for each in (source, folder)]
    for model in models:
        model.set_experts_implementation("eager")  # grouped products know no float64
    with torch.inference_mode():
        expected, found = (model(input_ids=torch.arange(3, 103)[None]).logits for model in models)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    numbers = compare(made.path, open_source(str(source)), threads=1)
    assert {item.tensor for item in numbers} >= set(gates)
    assert max(item.worst for item in numbers) <= 1
    if "search" not in algorithm:
        of_channel = {fold.producer: float(fold.scales[5] / fold.scales.median()) for fold in folds if "post_attention" in fold.producer}
        assert all(factor > 3 for factor in of_channel.values()), of_channel


def test_an_expert_without_tokens_is_smoothed_with_the_others_or_named(tmp_path: Path) -> None:
    source = starved(tmp_path)
    algorithm = "[{smoothquant: {alpha: 0.5, uncovered: leave}}, rtn]"
    with pytest.raises(InputError, match=r"0 of the 192 tokens"):
        converted(recipe(source, "int8-weight-only", algorithm), tmp_path / "error")
    made = converted(recipe(source, "int8-weight-only", algorithm, more=", unseen_experts: round"), tmp_path / "out")
    folds = [read_fold(record) for record in made.manifest.calibration["folds"]]
    experts = [fold for fold in folds if fold.producer == "model.layers.1.post_attention_layernorm"]
    assert len(experts) == 1
    assert {f"model.layers.1.mlp.experts.{i}.{name}_proj" for i in range(4) for name in ("gate", "up")} <= set(experts[0].consumers)
    assert {fold.producer for fold in folds if ".experts." in fold.producer} == {f"model.layers.1.mlp.experts.{i}.up_proj" for i in (0, 1)}
    assert max(item.worst for item in compare(made.path, open_source(str(source)), threads=1)) <= 1


VLLM = """
model: {model}
targets:
  - name: q
    format: compressed-tensors
    runtimes: [vllm]
    hardware: [{hardware}]
    rules: [{{match: linear, scheme: {scheme}}}]
"""


@pytest.mark.parametrize(
    ("hardware", "scheme", "why"),
    [
        ("cpu-vnni", "int8-dynamic", "wants AMX; keep the experts with a rule .*No Int8 MoE backend supports the deployment configuration"),
        ("cpu-vnni", "fp8-dynamic", "no kernel for such FP8 experts on a CPU"),
        ("cpu-amx", "int8-weight-only", "weight-only kernels for experts on a CPU are of 4 bit"),
        ("sm_90", "int8-static", "INT8 experts want dynamic activations"),
        ("sm_90", "int8-dynamic", ""),
        ("cpu-amx", "int8-dynamic", ""),
    ],
)
def test_experts_that_vllm_has_no_kernel_for_are_refused_with_their_line(hardware: str, scheme: str, why: str, tmp_path: Path) -> None:
    text = VLLM.format(model=save_family("mixtral", tmp_path), hardware=hardware, scheme=scheme)
    if why:
        with pytest.raises(RecipeError, match=rf"^test.yaml:6:16: vllm does not load .*{scheme}-experts.* on {hardware}: .*{why}"):
            pipeline.plan(parse_recipe(text, "test.yaml", name="test"))
    else:
        pipeline.plan(parse_recipe(text, "test.yaml", name="test"))


def test_the_matrix_of_a_folder_and_its_ledger_tell_experts_from_other_layers(tmp_path: Path) -> None:
    source = save_family("mixtral", tmp_path)
    text = VLLM.format(model=source, hardware="sm_90", scheme="int8-dynamic")
    made = converted(parse_recipe(text, "test.yaml", name="test"), tmp_path / "q")
    found = compatibility(made.path)
    assert sorted(found["schemes"]) == ["int8-dynamic", "int8-dynamic-experts"]
    assert {part.scheme for part in parts_of_ledger(made.manifest.ledger)} == set(found["schemes"])
    (line,) = [line for line in found["matrix"] if line["runtime"] == "vllm" and "0.32" in line["versions"]]
    assert (line["kernels"]["cpu-vnni"], line["kernels"]["sm_90"], line["kernels"]["sm_120"]) == ("none", "native", "none")
    plan = pipeline.plan(plainly(save_family("llama4", tmp_path)))
    assert not any("-experts" in caution for caution in plan.targets[0].cautions), "its experts become Linear modules"
