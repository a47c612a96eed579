"""Sources that are quantized already: decoded as the other libraries decode them, respelled without a loss, requantized with a warning."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from corruptions import folders
from families import save_family
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from convert import pipeline
from convert.architecture import Part
from convert.numbers import compare
from convert.quantize import respell
from convert.recipe import parse_recipe
from convert.respell import respellable
from convert.source import Checkpoint, open_source
from formats.errors import InputError, NumericsError, SourceError
from formats.existing import read_quantization
from formats.manifest import read_manifest
from formats.qtensor import QTensor
from formats.safetensors import read_folder
from formats.scheme import BLOCK_128, FP8_E4M3, INT8, PER_CHANNEL, PER_TENSOR, SCHEMES, Quantization, per_group
from formats.verify import verify

AWKWARD = {"hidden_size": 52, "intermediate_size": 61, "num_attention_heads": 4, "head_dim": 14, "vocab_size": 301}
PLAIN = "rules: [{match: linear, keep: true, why: as it was}]"
#: Where no element of a row is left over and no row is longer than the packed one.
UNEVEN = {name: folders.TARGETS[name] for name in ("int8", "packed", "fp8", "fp8-static", "mixed", "int8-static")}
bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def make(root: Path, model: Path, targets: dict[str, str]) -> dict[str, Path]:
    """Checkpoints as anybody would have made them."""
    outcome = pipeline.convert(parse_recipe(folders.recipe(model, targets), "s.yaml", name="s"), root, check=False)
    for artifact in outcome.artifacts:
        (artifact.path / "octavo.json").unlink()
    return {artifact.path.name: artifact.path for artifact in outcome.artifacts}


@pytest.fixture(scope="module")
def sources(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Not to be written to."""
    root = tmp_path_factory.mktemp("sources")
    llama = make_llama(**folders.SIZES, num_hidden_layers=1)
    found = {"source": llama, **make(root / "even", llama, {name: says for name, says in folders.TARGETS.items() if name != "sharded"})}
    odd = make_llama(**AWKWARD, num_hidden_layers=1)
    found |= {f"odd-{name}": path for name, path in make(root / "odd", odd, UNEVEN).items()}
    found["fine-grained"] = folders.fine_grained(found["block"], root / "fine-grained")
    found["modelopt"] = folders.modelopt(found["fp8-static"], root / "modelopt")
    found["modelopt-legacy"] = folders.modelopt(found["fp8-static"], root / "modelopt-legacy", legacy=True)
    found["torchao"] = folders.torchao(found["int8"], root / "torchao")
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes"] = folders.bitsandbytes(llama, root / "bitsandbytes")
        gpt2 = save_family("gpt2", root)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(llama / file, gpt2)
        found["gpt2"] = folders.bitsandbytes(gpt2, root / "bitsandbytes-gpt2")
    return found


def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / folder.name)


def decoded(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    spec = checkpoint.tensors[name]
    return checkpoint.reader.read(name, 0, spec.matrix_shape[0]).reshape(spec.shape)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def convert(folder: Path, out: Path, says: str, *, form: str = "compressed-tensors", extra: str = "") -> Any:
    limits = "limits: {kl_nats: 9.0, top1: 0.0, perplexity_ratio: 99.0}"
    runtimes = ", runtimes: [bitsandbytes]" if form == "bitsandbytes" else ""
    target = f"{{name: q, format: {form}, {says}, {limits}{runtimes}}}"
    text = f"model: {folder}\n{extra}validation: {{tokens: 256, length: 64}}\ntargets: [{target}]\n"
    return pipeline.convert(parse_recipe(text, "c.yaml", name="c"), out, check=False)


def notes(outcome: Any, *, quantized: bool = True) -> set[str]:
    ledger = read_manifest(outcome.artifacts[0].path).ledger
    return {entry.get("note", "") for entry in ledger if (entry["decision"] == "quantize") == quantized and entry.get("note")}


# Decoding: the other library's decoder is the oracle


def by_compressed_tensors(folder: Path) -> dict[str, torch.Tensor]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    linear = torch.nn.Linear(1, 1)
    tensors = weights(folder)
    found = {}
    for name in [name for name in tensors if name.endswith((".weight_packed", ".weight")) and tensors[name].dtype != torch.bfloat16]:
        module = name.rpartition(".")[0]
        group = next(group for group in parsed.config_groups.values() if is_match(module, linear, group.targets, parsed.ignore))
        stored = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == module}
        found[f"{module}.weight"] = BaseCompressor.get_value_from_registry(group.format).decompress(stored, copy.deepcopy(group))["weight"]
    return found


CT = ["int8", "int8-static", "int8-head", "packed", "packed-g64", "fp8", "fp8-static", "block", "mxfp8", "cache", "mixed"]


@pytest.mark.parametrize("name", [*CT, *(f"odd-{name}" for name in UNEVEN)])
def test_compressed_tensors_is_decoded_as_its_library_decodes_it(sources: Any, name: str) -> None:
    checkpoint = open_source(str(sources[name]))
    expected = by_compressed_tensors(sources[name])
    assert set(expected) == set(checkpoint.coded)
    assert len(expected) >= 7
    for weight, tensor in expected.items():
        assert torch.equal(decoded(checkpoint, weight).to(tensor.dtype), tensor), weight
        assert checkpoint.tensors[weight].shape == tuple(tensor.shape)
    plain = load_file(sources["source"] / "model.safetensors")
    assert set(checkpoint.tensors) == set(plain), "nothing but weights is left"
    assert "quantization_config" not in checkpoint.config


def test_blocks_of_deepseek_are_decoded_as_transformers_decodes_them(sources: Any) -> None:
    checkpoint, stored = open_source(str(sources["fine-grained"])), weights(sources["fine-grained"])
    for name in checkpoint.coded:
        oracle = Fp8Dequantize(None)._dequantize_one(stored[name], stored[f"{name}_scale_inv"])
        assert torch.equal(decoded(checkpoint, name).to(oracle.dtype), oracle)


def test_blocks_that_do_not_divide_a_weight_keep_their_own_scales(tmp_path: Path) -> None:
    """Where transformers' decoder goes wrong: 192 rows in blocks of 128 are 128 and 64, not twice 96."""
    codes = torch.randn(192, 130, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    save_file({"m.weight": codes, "m.weight_scale_inv": scale}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of", "quantization_config": section}))
    checkpoint = open_source(str(tmp_path))
    expected = codes.float() * scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :130]
    assert torch.equal(decoded(checkpoint, "m.weight"), expected)
    for start, stop in ((100, 140), (128, 192), (130, 191), (191, 192)):
        assert torch.equal(checkpoint.reader.read("m.weight", start, stop), expected[start:stop]), "rows that begin and end inside a block"


@pytest.mark.parametrize("name", ["modelopt", "modelopt-legacy"])
def test_modelopt_is_decoded_with_its_scalars(sources: Any, name: str) -> None:
    checkpoint, stored = open_source(str(sources[name])), weights(sources[name])
    assert len(checkpoint.coded) == 7
    for weight in checkpoint.coded:
        oracle = Fp8Dequantize(None)._dequantize_one(stored[weight], stored[f"{weight}_scale"])
        assert torch.equal(decoded(checkpoint, weight).to(oracle.dtype), oracle)
    assert not [name for name in checkpoint.tensors if "scale" in name]


@bitsandbytes
def test_bitsandbytes_is_decoded_as_it_decodes_itself(sources: Any) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    checkpoint, stored = open_source(str(sources["bitsandbytes"])), weights(sources["bitsandbytes"])
    assert len(checkpoint.coded) == 7
    for weight in checkpoint.coded:
        oracle = int8_vectorwise_dequant(stored[weight], stored[weight.replace(".weight", ".SCB")])
        assert torch.equal(decoded(checkpoint, weight), oracle)


@bitsandbytes
def test_a_gpt2_of_bitsandbytes_is_decoded_to_the_way_its_model_stores_it(sources: Any) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    checkpoint, stored = open_source(str(sources["gpt2"])), weights(sources["gpt2"])
    original = load_file(sources["gpt2"].parent / "gpt2" / "model.safetensors")
    assert len(checkpoint.coded) == 8
    for weight in checkpoint.coded:
        oracle = int8_vectorwise_dequant(stored[weight], stored[weight.replace(".weight", ".SCB")]).T
        assert torch.equal(decoded(checkpoint, weight), oracle)
        assert (oracle - original[weight].float()).abs().max() < 0.02 * original[weight].float().abs().max()
        assert torch.equal(checkpoint.reader.read(weight, 3, 5), oracle[3:5])


def test_torchao_is_decoded_and_a_zero_point_is_not_passed_over(sources: Any, tmp_path: Path) -> None:
    checkpoint, stored = open_source(str(sources["torchao"])), weights(sources["torchao"])
    for weight in checkpoint.coded:
        module = weight.removesuffix(".weight")
        assert torch.equal(decoded(checkpoint, weight), stored[f"{module}._weight_qdata"] * stored[f"{module}._weight_scale"])
    folder = copied(sources["torchao"], tmp_path)
    folders.edit_tensors(folder, lambda t: t[f"{module}._weight_zero_point"][-1].fill_(1))
    with pytest.raises(SourceError, match="zero points that are not zero"):
        decoded(open_source(str(folder)), f"{module}.weight")


# Three fates


@pytest.fixture(scope="module")
def proven(sources: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An fp8 source, dequantized and requantized, and run against what it decodes to."""
    rules = {"plain": PLAIN, "again": "rules: [{match: linear, scheme: int8-dynamic}]"}
    text = folders.recipe(sources["fp8"], rules).replace("kl_nats: 9.0", "kl_nats: 0.05")
    return pipeline.convert(parse_recipe(text, "c.yaml", name="c"), tmp_path_factory.mktemp("proven"))


@pytest.mark.slow
def test_dequantized_and_requantized_artifacts_are_proven_against_what_the_source_decodes_to(proven: Any) -> None:
    assert proven.passed
    plain, again = proven.reports
    assert plain.runtimes[0].divergence.kl_nats < 1e-4, "bfloat16 against float32 arithmetic is all that is left"
    assert all(0 < layer.worst <= 1 for layer in again.layers)
    paths = [artifact.path for artifact in proven.artifacts]
    cards = [(path / "README.md").read_text() for path in paths]
    assert "The source was quantized already: 7 tensors dequantized (compressed-tensors float8_e4m3fn per channel)" in cards[0]
    assert not [card for card in cards if "What was done to them" in card]
    assert "keep: as it was; dequantized" in paths[0].with_name("plain.report.html").read_text()
    assert "Errors of a second quantization add" not in (paths[0] / "README.md").read_text()
    assert "Errors of a second quantization add" in (paths[1] / "README.md").read_text()
    assert "errors of a second quantization add" in paths[1].with_name("again.report.html").read_text()


@pytest.mark.parametrize("name", ["int8", "fine-grained", "odd-packed", "modelopt"])
def test_what_is_kept_is_dequantized_loads_as_a_plain_model_and_says_so(sources: Any, tmp_path: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM

    outcome = convert(sources[name], tmp_path, PLAIN)
    path = outcome.artifacts[0].path
    assert {note.partition(" (")[0] for note in notes(outcome, quantized=False)} == {"dequantized"}
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    assert verify(path).passed
    checkpoint = open_source(str(sources[name]))
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
    for weight in checkpoint.coded:
        assert loaded[weight].dtype == torch.bfloat16
        assert torch.equal(loaded[weight], decoded(checkpoint, weight).bfloat16())


RESPELLINGS = [
    ("int8", "int8-dynamic"),
    ("int8", "int8-weight-only"),
    ("odd-packed", "int8-dynamic"),
    ("packed-g64", "int8-weight-only-g64"),
    ("int8", "int8-weight-only-g32"),
    ("fp8", "fp8-weight-only"),
    ("fine-grained", "fp8-block"),
    ("modelopt-legacy", "fp8-static"),
    ("modelopt", "fp8-dynamic"),
    ("mxfp8", "mxfp8"),
    ("torchao", "int8-dynamic"),
]


@pytest.mark.parametrize(("name", "scheme"), RESPELLINGS)
def test_respelled_codes_decode_to_the_same_floats(sources: Any, tmp_path: Path, name: str, scheme: str) -> None:
    outcome = convert(sources[name], tmp_path, f"rules: [{{match: linear, scheme: {scheme}}}]")
    path = outcome.artifacts[0].path
    assert {note.partition(" (")[0] for note in notes(outcome)} == {"respelled"}
    before, after = open_source(str(sources[name])), open_source(str(path))
    for weight in before.coded:
        rows = before.tensors[weight].shape[0]
        assert torch.equal(before.codes(weight, 0, rows).values, after.codes(weight, 0, rows).values)
        assert torch.equal(decoded(before, weight), decoded(after, weight))
    for weight, tensor in by_compressed_tensors(path).items():
        assert torch.equal(tensor, decoded(before, weight).to(tensor.dtype))
    assert [layer.worst for layer in compare(path, before, threads=1)] == [0] * 7
    assert not verify(path).errors
    assert not [warning for warning in outcome.plan.warnings() if "second time" in warning]


def test_scales_that_a_reader_will_round_are_announced(sources: Any, tmp_path: Path) -> None:
    """On disk nothing is lost; transformers rounds float32 scales to the model's dtype as it loads."""
    outcome = convert(sources["torchao"], tmp_path, "rules: [{match: linear, scheme: int8-dynamic}]")
    assert any("7 respelled tensors keep their scales in F32" in warning for warning in outcome.plan.warnings())
    silent = convert(sources["torchao"], tmp_path / "b", "rules: [{match: linear, scheme: llm-int8}]", form="bitsandbytes")
    assert not [warning for warning in silent.plan.warnings() if "keep their scales" in warning], "SCB is float32 to every reader"
    stored = weights(outcome.artifacts[0].path)
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith("weight_scale")} == {torch.float32}


@bitsandbytes
def test_bitsandbytes_becomes_compressed_tensors_and_comes_back_to_the_byte(sources: Any, tmp_path: Path) -> None:
    there = convert(sources["bitsandbytes"], tmp_path / "a", "rules: [{match: linear, scheme: int8-dynamic}]").artifacts[0].path
    before, after = weights(sources["bitsandbytes"]), weights(there)
    checkpoint = open_source(str(sources["bitsandbytes"]))
    for weight in checkpoint.coded:
        assert torch.equal(before[weight], after[weight])
        scale = before[weight.replace(".weight", ".SCB")].double() / 127
        assert torch.equal(after[f"{weight}_scale"].reshape(-1), scale.float())
    assert max(layer.worst for layer in compare(there, checkpoint, threads=1)) <= 1
    back = convert(there, tmp_path / "b", "rules: [{match: linear, scheme: llm-int8}]", form="bitsandbytes").artifacts[0].path
    for weight in checkpoint.coded:
        assert torch.equal(before[weight], weights(back)[weight])
        magnitude = weight.replace(".weight", ".SCB")
        assert torch.allclose(before[magnitude], weights(back)[magnitude], rtol=2.0**-23, atol=0)
    assert max(layer.worst for layer in compare(back, open_source(str(there)), threads=1)) <= 1


@bitsandbytes
@pytest.mark.parametrize("name", ["bitsandbytes", "gpt2"])
def test_bitsandbytes_respelled_as_itself_is_the_same_bytes(sources: Any, tmp_path: Path, name: str) -> None:
    outcome = convert(sources[name], tmp_path, "rules: [{match: linear, scheme: llm-int8}]", form="bitsandbytes")
    assert {note.partition(" (")[0] for note in notes(outcome)} == {"respelled"}
    before, after = weights(sources[name]), weights(outcome.artifacts[0].path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    assert max(layer.worst for layer in compare(outcome.artifacts[0].path, open_source(str(sources[name])), threads=1)) == 0


def test_compressed_tensors_to_bitsandbytes_and_back_keeps_every_scale(sources: Any, tmp_path: Path) -> None:
    there = convert(sources["int8"], tmp_path / "a", "rules: [{match: linear, scheme: llm-int8}]", form="bitsandbytes").artifacts[0].path
    back = convert(there, tmp_path / "b", "rules: [{match: linear, scheme: int8-dynamic}]").artifacts[0].path
    before, after = weights(sources["int8"]), weights(back)
    for name in before:
        assert torch.equal(before[name].float(), after[name].float()), name


def test_other_grids_and_tiles_are_requantized_and_the_plan_warns(sources: Any, tmp_path: Path) -> None:
    outcome = convert(sources["fp8"], tmp_path, "rules: [{match: linear, scheme: int8-dynamic}]")
    assert notes(outcome) == {"requantized (compressed-tensors float8_e4m3fn per channel)"}
    (warning,) = (text for text in outcome.plan.warnings() if "second time" in text)
    assert "7 tensors are quantized a second time" in warning
    assert "errors add up" in warning


def test_a_changed_scale_does_not_pass_for_a_respelling(sources: Any, tmp_path: Path) -> None:
    path = convert(sources["int8"], tmp_path, "rules: [{match: linear, scheme: int8-dynamic}]").artifacts[0].path
    name = "model.layers.0.mlp.up_proj.weight"
    folders.edit_tensors(path, lambda t: t[f"{name}_scale"][3].mul_(1 + 2.0**-7))
    worst = {layer.tensor: layer.worst for layer in compare(path, open_source(str(sources["int8"])), threads=1)}
    assert worst.pop(name) > 1
    assert set(worst.values()) == {0}
    folders.edit_tensors(path, lambda t: t[f"{name}_scale"][3].fill_(float("nan")))
    assert not {layer.tensor: layer.worst for layer in compare(path, open_source(str(sources["int8"])), threads=1)}[name] <= 1


def test_codes_of_minus_128_stay(sources: Any, tmp_path: Path) -> None:
    folder = copied(sources["int8"], tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    folders.edit_tensors(folder, lambda t: t[name][0].fill_(-128))
    for says in ("int8-dynamic", "int8-weight-only"):
        path = convert(folder, tmp_path / says, f"rules: [{{match: linear, scheme: {says}}}]").artifacts[0].path
        assert torch.equal(decoded(open_source(str(path)), name), decoded(open_source(str(folder)), name))
        assert not verify(path).errors
        assert max(layer.worst for layer in compare(path, open_source(str(folder)), threads=1)) == 0


def test_powers_of_two_become_floats_and_no_float_becomes_a_power_of_two() -> None:
    wide = Quantization(FP8_E4M3, BLOCK_128, scale="F8_E8M0")
    stored = QTensor(torch.ones(2, 2).to(torch.float8_e4m3fn), torch.tensor([[2.0**-127]]).to(torch.float8_e8m0fnu), wide)
    wanted = SCHEMES["fp8-block"].weight
    assert respellable(wide, wanted, [Part("m", 0, 2)])
    assert respell(stored, wanted, "BF16", "m").scale.float().item() == 2.0**-127
    assert not respellable(wanted, wide, [Part("m", 0, 2)])


@pytest.mark.parametrize(
    ("existing", "wanted", "start", "expected"),
    [
        (Quantization(INT8, PER_TENSOR), Quantization(INT8, PER_CHANNEL), 0, True),
        (Quantization(INT8, PER_CHANNEL), Quantization(INT8, per_group(32)), 7, True),
        (Quantization(INT8, per_group(32)), Quantization(INT8, PER_CHANNEL), 0, False),
        (Quantization(INT8, per_group(64)), Quantization(INT8, per_group(32)), 0, False),
        (Quantization(FP8_E4M3, PER_CHANNEL), Quantization(INT8, PER_CHANNEL), 0, False),
        (Quantization(FP8_E4M3, BLOCK_128), Quantization(FP8_E4M3, BLOCK_128), 128, True),
        (Quantization(FP8_E4M3, BLOCK_128), Quantization(FP8_E4M3, BLOCK_128), 64, False),
    ],
)
def test_which_codes_can_stay(existing: Quantization, wanted: Quantization, start: int, expected: bool) -> None:
    assert respellable(existing, wanted, [Part("m", start, start + 64)]) == expected


# Scales of inputs, keys and values


@pytest.mark.parametrize(("name", "scheme"), [("int8-static", "int8-static"), ("modelopt", "fp8-static"), ("fp8-static", "fp8-static")])
def test_scales_of_static_inputs_are_taken_over(sources: Any, tmp_path: Path, name: str, scheme: str) -> None:
    outcome = convert(sources[name], tmp_path, f"rules: [{{match: linear, scheme: {scheme}}}]")
    before, after = weights(sources[name]), weights(outcome.artifacts[0].path)
    inputs = [tensor for tensor in before if tensor.endswith(".input_scale")]
    assert len(inputs) == 7
    assert all(torch.equal(before[tensor].reshape(1), after[tensor]) for tensor in inputs)
    assert outcome.plan.targets[0].dropped == ()
    assert read_manifest(outcome.artifacts[0].path).calibration == {"text": "the source's own scales"}


@pytest.mark.parametrize(("name", "cache"), [("cache", "fp8"), ("cache-per-head", "fp8-per-head")])
def test_scales_of_keys_and_values_are_taken_over(sources: Any, tmp_path: Path, name: str, cache: str) -> None:
    outcome = convert(sources[name], tmp_path, f"rules: [{{match: linear, scheme: fp8-dynamic}}], kv_cache: {cache}")
    before, after = weights(sources[name]), weights(outcome.artifacts[0].path)
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    ledger = {entry["tensor"]: entry for entry in read_manifest(outcome.artifacts[0].path).ledger}
    assert ledger["model.layers.0.self_attn.k_scale"]["note"].startswith("taken over")


def test_modelopt_s_names_of_cache_scales_are_understood(sources: Any, tmp_path: Path) -> None:
    folder = copied(sources["modelopt"], tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        for x in "kv":
            tensors[f"model.layers.0.self_attn.{x}_proj.{x}_scale"] = torch.tensor(0.0123 if x == "k" else 0.5)

    folders.edit_tensors(folder, add)
    folders.edit_config(folder, lambda c: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8, "type": "float"}))
    outcome = convert(folder, tmp_path / "out", "rules: [{match: linear, scheme: fp8-static}], kv_cache: fp8")
    after = weights(outcome.artifacts[0].path)
    assert after["model.layers.0.self_attn.k_scale"] == torch.tensor([0.0123])
    assert after["model.layers.0.self_attn.v_scale"] == torch.tensor([0.5])


def test_scales_that_are_not_taken_over_are_said_to_be_dropped(sources: Any, tmp_path: Path) -> None:
    outcome = convert(sources["cache"], tmp_path / "a", "rules: [{match: linear, scheme: fp8-dynamic}]")
    assert any("2 scales of inputs, keys or values that the source has are not taken over" in text for text in outcome.plan.warnings())
    assert read_manifest(outcome.artifacts[0].path).source["dropped"] == [f"model.layers.0.self_attn.{x}_scale" for x in "kv"]
    text = "calibration: {sequences: 2, length: 32}\n"
    anew = convert(sources["cache"], tmp_path / "b", "rules: [{match: linear, scheme: fp8-dynamic}], kv_cache: fp8-per-head", extra=text)
    assert "calibrated anew (the source's own scales are dropped)" in notes(anew, quantized=False)
    static = convert(sources["fp8-static"], tmp_path / "c", "rules: [{match: linear, scheme: fp8-dynamic}]")
    assert len(static.plan.targets[0].dropped) == 7


# What is not read, or broken


def gptq(folder: Path) -> None:
    folders.edit_config(folder, lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    folders.edit_tensors(folder, lambda t: folders.rename(t, "up_proj.weight", "up_proj.qweight"))


def asymmetric(folder: Path) -> None:
    folders.edit_config(folder, lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=False))


def four_bits(folder: Path) -> None:
    folders.edit_config(folder, lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=4))


def activation_order(folder: Path) -> None:
    folders.edit_tensors(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.weight_g_idx": torch.zeros(256, dtype=torch.int32)}))


def no_section(folder: Path) -> None:
    folders.edit_config(folder, lambda c: c.pop("quantization_config"))


def wrong_scale(folder: Path) -> None:
    folders.edit_tensors(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(3, 1)}))


def fewer_columns(folder: Path) -> None:
    folders.edit_tensors(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.weight_shape": torch.tensor([512, 7])}))


@pytest.mark.parametrize(
    ("name", "break_it", "expected"),
    [
        ("source", gptq, r"already quantized \(gptq\), model.layers.0.mlp.up_proj for one.*convert the model it was made from"),
        ("int8", asymmetric, r"model.layers.0.* \(and 6 more\) is quantized in a way that is not read here: asymmetric weights"),
        ("packed", four_bits, r"model.layers.0.*: 4-bit int; convert the model it was made from"),
        ("packed", activation_order, r"up_proj is quantized in a way .*weight_g_idx changes what its codes mean"),
        ("packed", fewer_columns, r"up_proj.weight_shape says \(512, 7\), its codes are those of \(512, 256\)"),
        ("int8", no_section, r"neither config.json nor hf_quant_config.json says how they are quantized"),
        ("int8", wrong_scale, r"up_proj.weight_scale has shape \[3, 1\], where config_groups.group_0 needs 512 x 1"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(sources: Any, tmp_path: Path, name: str, break_it: Any, expected: str) -> None:
    folder = copied(sources[name], tmp_path)
    break_it(folder)
    with pytest.raises(InputError, match=expected):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("name", "spoil", "expected"),
    [
        ("int8", lambda t: t["model.layers.0.mlp.up_proj.weight_scale"][1].fill_(float("nan")), "up_proj.weight: a scale is NaN"),
        ("int8", lambda t: t["model.layers.0.mlp.up_proj.weight_scale"][1].fill_(0), "a scale is zero over codes that are not"),
        ("fp8", lambda t: t["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[1].fill_(0x7F), "a code is NaN"),
    ],
)
def test_damage_is_not_respelled(sources: Any, tmp_path: Path, name: str, spoil: Any, expected: str) -> None:
    folder = copied(sources[name], tmp_path)
    folders.edit_tensors(folder, spoil)
    with pytest.raises(NumericsError, match=expected):
        convert(folder, tmp_path / "out", f"rules: [{{match: linear, scheme: {name}-dynamic}}]")


def test_a_plan_knows_a_source_by_how_it_is_quantized(sources: Any, tmp_path: Path) -> None:
    folder = copied(sources["fp8"], tmp_path)
    before = open_source(str(folder)).fingerprint()
    section = lambda c: c["quantization_config"]["config_groups"]["group_0"].update(input_activations=None)  # noqa: E731
    folders.edit_config(folder, section)
    assert open_source(str(folder)).fingerprint() != before
    assert read_quantization(json.loads((folder / "config.json").read_text()), {n: i.spec for n, i in read_folder(folder).items()})


def test_an_interrupted_respelling_is_taken_up(sources: Any, tmp_path: Path) -> None:
    says = "rules: [{match: linear, scheme: fp8-static}]"
    first = convert(sources["modelopt"], tmp_path, says)
    assert convert(sources["modelopt"], tmp_path, says).artifacts[0].reused
    again = convert(sources["modelopt"], tmp_path / "again", says)
    for path in first.artifacts[0].path.iterdir():
        assert path.read_bytes() == (again.artifacts[0].path / path.name).read_bytes()


def test_the_plan_shows_what_becomes_of_codes(sources: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from convert.command import _show_plan

    text = (
        f"model: {sources['fp8']}\ntargets:\n  - {{name: q, format: compressed-tensors, rules: [{{match: linear, scheme: fp8-dynamic}}]}}\n"
    )
    job = pipeline.plan(parse_recipe(text, "c.yaml", name="c"))
    _show_plan(job, pipeline.needs(job, tmp_path, check=True), ledger=True)
    shown = " ".join(capsys.readouterr().out.split())  # the table breaks its lines
    assert shown.count("respelled (compressed-tensors float8_e4m3fn per channel)") == 1 + 7, "the table, and each line of the ledger"
