"""AWQ and bias correction as a recipe asks for them, against what the plain model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Make, save_tokenizer
from families import UNEVEN, save_family

from convert.architecture import build
from convert.folds import read_fold
from convert.numbers import compare
from convert.pipeline import convert, plan
from convert.recipe import parse_recipe
from convert.source import open_source
from convert.text import load_tokenizer, take_tokens
from formats.errors import RecipeError
from formats.verify import verify

RECIPE = """\
model: {model}
calibration: {{dtype: float32, sequences: 6, length: 32, seed: 3}}
targets:
  - name: q
    format: compressed-tensors
    rules: [{{match: linear, scheme: {scheme}, algorithm: {algorithm}}}]
"""


def _recipe(folder: Path, algorithm: str, scheme: str = "int8-weight-only") -> Any:
    text = RECIPE if "," in algorithm or "gptq" in algorithm else RECIPE.replace(RECIPE.split("\n")[1] + "\n", "")
    return parse_recipe(text.format(model=folder, algorithm=algorithm, scheme=scheme), "r.yaml", name="r")


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _tokens(folder: Path) -> torch.Tensor:
    tokens, _ = take_tokens(
        "sample", load_tokenizer(folder, trust_remote_code=False), sequences=6, length=32, purpose="calibration", seed=3
    )
    return torch.from_numpy(tokens)


def _first_block(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of the first block's linear layers, by module, and of the block itself."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.startswith("model.layers.0.") and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *args, name=name: seen.setdefault(name, []).append(args[2]))
    model.model.layers[0].register_forward_hook(lambda *args: seen.setdefault("block", []).append(args[2]))
    with torch.no_grad():
        for sequence in tokens:
            model(input_ids=sequence[None], use_cache=False)
    return {name: torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]) for name, parts in seen.items()}


def _with_large_channels(folder: Path) -> None:
    """Some channels of the norms twenty times as large: what scaling is for."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::16] *= 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("algorithm", "share"), [("[awq, rtn]", 0.8), ("[{awq: {ratio: 0.5}}, gptq]", 1.5)])
def test_awq_lowers_the_error_of_a_block_that_is_rounded(algorithm: str, share: float, make_llama: Make, tmp_path: Path) -> None:
    """GPTQ makes up for most of it itself; what matters there is that the function is the same."""
    folder = make_llama(dtype="float32")
    _with_large_channels(folder)
    tokens = _tokens(folder)
    expected = _first_block(_load(folder), tokens)["block"]
    errors = []
    for i, chosen in enumerate([algorithm.replace("awq, ", "").replace("{awq: {ratio: 0.5}}, ", ""), algorithm]):
        (made,) = convert(_recipe(folder, chosen), tmp_path / str(i), check=False).artifacts
        found = _first_block(_load(made.path), tokens)["block"]
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] < share * errors[0]
    health = made.manifest.calibration["solved"]  # type: ignore[index]
    ratios = {health[f"model.layers.0.self_attn.{x}_proj"]["ratio"] for x in "qkv"}
    assert len(ratios) == 1
    assert 0 < ratios.pop() < 1
    notes = {record["tensor"]: record.get("note", "") for record in made.manifest.ledger}
    assert notes["model.layers.0.input_layernorm.weight"].startswith("smoothed: ")


@pytest.mark.parametrize("algorithm", ["[rtn, bias_correction]", "[{smoothquant: {alpha: 0.5}}, gptq, bias_correction]"])
def test_corrected_biases_keep_the_mean_of_every_output(algorithm: str, tmp_path: Path, make_llama: Make) -> None:
    """Of layers whose inputs are the source's own: q, k and v of the first block."""
    folder = make_llama(dtype="float32", attention_bias=True, mlp_bias=True)
    _set_biases(folder)
    tokens = _tokens(folder)
    expected = _first_block(_load(folder), tokens)
    (plain,) = convert(_recipe(folder, algorithm.replace(", bias_correction", "")), tmp_path / "plain", check=False).artifacts
    (made,) = convert(_recipe(folder, algorithm), tmp_path / "corrected", check=False).artifacts
    assert verify(made.path).findings == ()
    without, found = _first_block(_load(plain.path), tokens), _first_block(_load(made.path), tokens)
    notes = {record["tensor"]: record.get("note", "") for record in made.manifest.ledger}
    for x in "qk":  # v's own rows are divided by what o is multiplied by
        name = f"model.layers.0.self_attn.{x}_proj"
        off = [float((got[name] - expected[name]).mean(dim=0).norm()) for got in (without, found)]
        assert off[1] < 0.05 * off[0], name
        assert "corrected: " in notes[f"{name}.bias"]
        assert made.manifest.calibration["solved"][name]["bias_moved"] > 0  # type: ignore[index]
    assert ("smoothed" in notes["model.layers.0.mlp.up_proj.bias"]) == ("smoothquant" in algorithm)


def test_bias_correction_where_no_layer_has_a_bias_is_refused(make_llama: Make) -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:6:13: bias_correction: none of the 14 layers has a bias"):
        plan(_recipe(make_llama(), "[rtn, bias_correction]"))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("bias_correction", "bias_correction chooses no codes"),
        ("[bias_correction, rtn, gptq]", "chooses the codes"),
        ("[smoothquant, awq, rtn]", "smoothquant and awq scale the same channels"),
    ],
)
def test_lists_that_make_no_sense_are_refused(algorithm: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _recipe(Path("x"), algorithm)


def test_biases_of_a_model_with_some_are_corrected_and_others_left(tmp_path: Path) -> None:
    """Qwen2 has biases on q, k and v only."""
    job = plan(_recipe(save_family("qwen2", tmp_path), "[rtn, bias_correction]"))
    assert {entry.algorithm for entry in job.targets[0].quantized} == {"rtn+bias_correction"}
    assert json.dumps(job.targets[0].ledger())


def test_a_block_of_more_columns_than_there_are_is_all_of_them(make_llama: Make, tmp_path: Path) -> None:
    model = make_llama()
    made = [
        convert(_recipe(model, algorithm), tmp_path / str(i), check=False).artifacts[0].path / "model.safetensors"
        for i, algorithm in enumerate(["gptq", "{gptq: {block_size: 1000000000000}}"])
    ]
    assert made[0].read_bytes() == made[1].read_bytes()


@pytest.mark.parametrize("family", sorted(UNEVEN))
def test_blocks_that_are_not_alike_are_smoothed_each_by_its_own_widths(family: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path)
    save_tokenizer(source, 300)
    text = RECIPE.replace("match: linear", "match: '*.layers.*_proj'").format(
        model=source, scheme="int8-dynamic", algorithm="[{smoothquant: {alpha: 0.5, uncovered: leave}}, rtn]"
    )
    made = convert(parse_recipe(text, "r.yaml", name="r"), tmp_path / "out", check=False).artifacts[0]
    widths = {fold["producer"]: len(fold["rows"]) for fold in map(vars, map(read_fold, made.manifest.calibration["folds"]))}
    with torch.device("meta"):
        model = build(open_source(str(source)).config, folder=None, trust_remote_code=False)
    rows = {name: len(module.weight) for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    assert widths == {name: rows[name] for name in widths}
    if family != "nemotron_h":
        assert {f"model.layers.{i}.mlp.up_proj" for i in range(model.config.num_hidden_layers)} <= widths.keys()
        assert len({widths[name] for name in widths if name.endswith(".up_proj")}) > 1
    assert max(item.worst for item in compare(made.path, open_source(str(source)), threads=1)) <= 1


def _set_biases(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensors[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
