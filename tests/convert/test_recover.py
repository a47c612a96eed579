"""Training with quantization: that it helps, is the same twice, survives a kill, and that the artifact is what was trained."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Make
from families import save_family

from convert import recover
from convert.pipeline import convert, plan
from convert.recipe import parse_recipe
from formats.errors import MachineError, RecipeError
from formats.manifest import read_manifest
from formats.verify import verify

RECIPE = """\
model: {model}
calibration: {{dtype: float32, sequences: 18, length: 48}}
validation: {{tokens: 960, length: 48}}
targets:
  - name: q
    format: compressed-tensors
    rules: [{{match: linear, scheme: {scheme}, algorithm: [{before}, {{recover: {{{options}}}}}]}}]
    limits: {{kl_nats: 5.0, top1: 0.0, perplexity_ratio: 50.0}}
"""
OPTIONS = "steps: 40, batch: 4, learning_rate: 3.0e-4, scale_learning_rate: 2.0e-3, mode: logits"


def _recipe(folder: Path, options: str = OPTIONS, *, scheme: str = "int8-static", before: str = "rtn") -> Any:
    return parse_recipe(RECIPE.format(model=folder, options=options, scheme=scheme, before=before), "r.yaml", name="r")


@pytest.fixture
def peaked(make_llama: Make) -> Path:
    """A model whose predictions are far from uniform, so that there is something to lose, and whose inputs have channels that stand out."""
    from safetensors.torch import load_file, save_file

    folder = make_llama("peaked", initializer_range=0.25)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor[:3] *= 40
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _records(folder: Path) -> dict[str, Any]:
    calibration = read_manifest(folder).calibration
    assert calibration is not None
    return {module: seen["recover"] for module, seen in calibration["solved"].items() if "recover" in seen}


def _digest(folder: Path) -> str:
    """Of the weights and of everything that is said of them."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes() + (folder / "octavo.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic", "fp8-static", "fp8-dynamic"])
def test_training_brings_predictions_closer_on_text_held_back(peaked: Path, tmp_path: Path, scheme: str) -> None:
    convert(_recipe(peaked, f"{OPTIONS}, generated: 32", scheme=scheme), tmp_path, check=False)
    records = _records(tmp_path / "q")
    assert len(records) == 14
    one = next(iter(records.values()))
    assert (one["steps"], one["mode"], one["out_of_time"]) == (40, "logits", False)
    assert one["after"] < one["before"]
    assert any(record["codes_changed"] > 0 for record in records.values())
    assert all(("input_limit" in record) == scheme.endswith("static") for record in records.values())


def test_the_check_measures_what_training_won(peaked: Path, tmp_path: Path) -> None:
    with_it, text = (
        convert(_recipe(peaked, f"{OPTIONS}, generated: 32"), tmp_path / "with"),
        RECIPE.replace(", {{recover: {{{options}}}}}", ""),
    )
    plain = convert(parse_recipe(text.format(model=peaked, scheme="int8-static", before="rtn"), "r.yaml", name="r"), tmp_path / "without")
    assert with_it.passed, [check for check in with_it.reports[0].checks if not check.passed]
    kl = [outcome.reports[0].runtimes[0].divergence.kl_nats for outcome in (with_it, plain)]  # type: ignore[union-attr]
    assert kl[0] < kl[1], kl


def test_the_artifact_is_the_model_that_was_trained(peaked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's logits, taken when training ended, against transformers with the artifact's codes."""
    students: list[Any] = []
    fitted = recover.fit

    def watched(student: Any, *args: Any, **kwargs: Any) -> Any:
        found = fitted(student, *args, **kwargs)
        students.append(student)
        return found

    monkeypatch.setattr(recover, "fit", watched)
    convert(_recipe(peaked), tmp_path, check=False)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "q" / "model.safetensors")
    (student,) = students
    student.refresh()
    for name, weight in student._made.items():
        if name in student.weights:
            scale = stored[f"{name}.weight_scale"].float().reshape(-1, 1)
            assert torch.equal(weight.detach(), stored[f"{name}.weight"].float() * scale), name
            found = stored[f"{name}.input_scale"].float().reshape(())
            assert torch.equal(found, student._made[student._input(name)].detach().reshape(())), name


def test_layers_of_one_input_keep_one_scale(peaked: Path, tmp_path: Path) -> None:
    convert(_recipe(peaked), tmp_path, check=False)
    limits = {name: record["input_limit"] for name, record in _records(tmp_path / "q").items()}
    for block in ("model.layers.0", "model.layers.1"):
        assert len({limits[f"{block}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert limits[f"{block}.mlp.gate_proj"] == limits[f"{block}.mlp.up_proj"]


@pytest.mark.parametrize("mode", ["logits", "blocks"])
def test_the_same_recipe_gives_the_same_bytes_however_many_threads(
    peaked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    recipe = _recipe(peaked, OPTIONS.replace("logits", mode).replace("40", "6"))
    digests = set()
    for count in (1, 1, 3):
        monkeypatch.setattr("convert.export.cores", lambda count=count: count)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        convert(recipe, out, check=False)
        digests.add(_digest(out / "q"))
    assert len(digests) == 1
    other = _recipe(peaked, OPTIONS.replace("logits", mode).replace("40", "6") + ", seed: 1")
    convert(other, tmp_path / "other", check=False)
    assert _digest(tmp_path / "other" / "q") not in digests


def test_block_by_block_each_block_comes_closer_to_the_sources(peaked: Path, tmp_path: Path) -> None:
    convert(_recipe(peaked, OPTIONS.replace("logits", "blocks")), tmp_path, check=False)
    records = _records(tmp_path / "q")
    assert {record["mode"] for record in records.values()} == {"blocks"}
    assert sum(record["after"] for record in records.values()) < sum(record["before"] for record in records.values())


@pytest.mark.parametrize("mode", ["logits", "blocks"])
def test_a_conversion_that_was_killed_goes_on_to_the_same_bytes(peaked: Path, tmp_path: Path, mode: str) -> None:
    options = OPTIONS.replace("logits", mode).replace("40", "12")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=peaked, options=options, scheme="int8-static", before="rtn"))
    recipe = parse_recipe((tmp_path / "recipe.yaml").read_text(), "test.yaml", name="test")
    convert(recipe, tmp_path / "whole", check=False)
    killed = KILLED_IN_TRAINING if mode == "logits" else KILLED_IN_BLOCKS
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path / "recipe.yaml"), str(tmp_path / "again")], check=False)
    assert done.returncode == -9
    assert (tmp_path / "again" / ".q.partial" / "training.pt").exists() == (mode == "logits")
    steps: list[int] = []

    class Watching:
        def say(self, message: str) -> None:
            pass

        def stage(self, name: str, total: int, **_: str) -> Any:  # noqa: ARG002
            from contextlib import nullcontext

            return nullcontext(lambda count, note="": steps.append(1) if "step " in note and count else None)

    convert(recipe, tmp_path / "again", check=False, progress=Watching())  # type: ignore[arg-type]
    assert _digest(tmp_path / "again" / "q") == _digest(tmp_path / "whole" / "q")
    assert len(steps) == (12 - 7 if mode == "logits" else 12), "what was trained before is not trained again"
    assert verify(tmp_path / "again" / "q").passed
    assert not list((tmp_path / "again" / "q").glob("training*"))


#: After the seventh of its steps, each of which is saved.
KILLED_IN_TRAINING = """
import os, signal, sys
from pathlib import Path
from convert import recover
from convert.pipeline import convert
from convert.recipe import parse_recipe
recover.SAVED_SECONDS = -1.0
saved = recover._save
def counted(path, student, optimizer, step, *more):
    saved(path, student, optimizer, step, *more)
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
recover._save = counted
convert(parse_recipe(Path(sys.argv[1]).read_text(), "test.yaml", name="test"), Path(sys.argv[2]), check=False)
"""
#: In the training of the second block.
KILLED_IN_BLOCKS = """
import os, signal, sys, time
from pathlib import Path
from convert import recover
from convert.pipeline import convert
from convert.recipe import parse_recipe
block, blocks = recover.Recovery.block, []
def counted(self, *args):
    blocks.append(1)
    if len(blocks) == 2:
        time.sleep(2)  # what was solved of the first is written meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    return block(self, *args)
recover.Recovery.block = counted
convert(parse_recipe(Path(sys.argv[1]).read_text(), "test.yaml", name="test"), Path(sys.argv[2]), check=False)
"""


def test_time_that_runs_out_ends_training_and_the_manifest_says_so(peaked: Path, tmp_path: Path) -> None:
    convert(_recipe(peaked, "steps: 100000, batch: 4, minutes: 0.05, mode: logits"), tmp_path, check=False)
    one = next(iter(_records(tmp_path / "q").values()))
    assert one["out_of_time"]
    assert 5 <= one["steps"] < one["asked"] == 100000
    assert one["seconds"] < 10


def test_sequences_that_the_source_writes_are_the_same_twice(peaked: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(peaked, dtype=torch.float32).eval()
    one, two = (recover.generate(model, 3, 20, seed=4, device="cpu") for _ in range(2))
    assert len(one) == 3
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    # Written tokens are likely ones: more so than the same tokens in another order.
    ids = torch.stack(one)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    likely = logits.gather(-1, ids[:, 1:, None]).mean()
    assert likely > logits.gather(-1, ids.flip(1)[:, 1:, None]).mean() + 1


def test_text_the_source_writes_is_trained_on_too(peaked: Path, tmp_path: Path) -> None:
    convert(_recipe(peaked, "steps: 4, batch: 4, generated: 16, mode: logits"), tmp_path, check=False)
    one = next(iter(_records(tmp_path / "q").values()))
    assert one["sequences"] + one["held_back"] == 18 + 16


def test_layers_that_are_not_trained_are_what_they_were(peaked: Path, tmp_path: Path) -> None:
    text = RECIPE.format(model=peaked, options=OPTIONS.replace("40", "6"), scheme="int8-static", before="gptq").replace(
        "rules: [", "rules: [{match: down_proj, scheme: int8-static, algorithm: gptq}, "
    )
    convert(parse_recipe(text, "r.yaml", name="r"), tmp_path / "some", check=False)
    convert(
        parse_recipe(text.replace(", {recover: {" + OPTIONS.replace("40", "6") + "}}", ""), "r.yaml", name="r"),
        tmp_path / "none",
        check=False,
    )
    from safetensors.torch import load_file

    some, none = (load_file(tmp_path / name / "q" / "model.safetensors") for name in ("some", "none"))
    changed = {name for name in some if not torch.equal(some[name].float(), none[name].float())}
    assert changed
    assert not any("down_proj" in name or "norm" in name or "embed" in name or "head" in name for name in changed)


def test_a_source_that_is_quantized_already_is_refused(make_llama: Make, tmp_path: Path) -> None:
    folder = make_llama()
    text = f"model: {folder}\ntargets: [{{name: q, format: compressed-tensors, rules: [{{match: linear, scheme: int8-dynamic}}]}}]"
    convert(parse_recipe(text, "r.yaml", name="r"), tmp_path, check=False)
    with pytest.raises(RecipeError, match=r"r\.yaml:7.*quantized already.*16-bit model it was made from"):
        plan(_recipe(tmp_path / "q", scheme="fp8-dynamic"))


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("[{match: linear, scheme: int8-static, algorithm: [{recover: {}}, rtn]}]", "write it last"),
        ("[{match: linear, scheme: int8-static, algorithm: [recover]}]", "recover chooses no codes"),
        ("[{match: linear, scheme: int8-static, algorithm: [rtn, {recover: {mode: blocks, generated: 8}}]}]", "calibration text alone"),
        ("[{match: linear, scheme: mxfp8, algorithm: [rtn, recover]}]", "powers of two"),
        (
            "[{match: o_proj, scheme: int8-static, algorithm: [rtn, {recover: {steps: 3}}]}, {match: linear, scheme: int8-static, "
            "algorithm: [rtn, recover]}]",
            "trained once",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_from_headers_alone(make_llama: Make, rules: str, said: str) -> None:
    text = f"model: {make_llama()}\ntargets: [{{name: q, format: compressed-tensors, rules: {rules}}}]"
    with pytest.raises(RecipeError, match=said):
        plan(parse_recipe(text, "r.yaml", name="r"))


def test_experts_are_refused(tmp_path: Path) -> None:
    folder = save_family("mixtral", tmp_path / "m")
    rules = "[{match: linear, scheme: int8-dynamic, algorithm: [rtn, recover]}]"
    text = f"model: {folder}\ntargets: [{{name: q, format: compressed-tensors, runtimes: [vllm], rules: {rules}}}]"
    with pytest.raises(RecipeError, match="does not train experts"):
        plan(parse_recipe(text, "r.yaml", name="r"))


def test_what_does_not_fit_into_memory_goes_block_by_block_or_says_so(make_llama: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    folder = make_llama()
    for mode, free, expected in (
        ("auto", 10**12, "logits"),
        ("auto", 10**6, "blocks"),
        ("blocks", 10**12, "blocks"),
        ("logits", 10**6, None),
    ):
        job = plan(_recipe(folder, f"mode: {mode}"))
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: type("Free", (), {"available": free}))
        options = job.targets[0].quantized[0].asks("recover").recover  # type: ignore[union-attr]
        assert options is not None
        if expected is None:
            with pytest.raises(MachineError, match=r"set recover\.mode to blocks"):
                recover.choose_mode(job, job.targets[0], options, "cpu")
        else:
            assert recover.choose_mode(job, job.targets[0], options, "cpu") == expected


def test_numbers_notice_a_code_and_a_scale_that_training_did_not_leave(peaked: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from convert.numbers import compare
    from convert.source import open_source

    convert(_recipe(peaked, OPTIONS.replace("40", "6")), tmp_path, check=False)
    file, source = tmp_path / "q" / "model.safetensors", open_source(str(peaked))
    assert max(layer.worst for layer in compare(tmp_path / "q", source, threads=1)) <= 1
    tensors = load_file(file)
    for name, change in (("mlp.up_proj.weight", 1), ("mlp.up_proj.input_scale", 0.01)):
        damaged = {key: value.clone() for key, value in tensors.items()}
        damaged[f"model.layers.1.{name}"].view(-1)[0] += change
        save_file(damaged, file, metadata={"format": "pt"})
        worst = {layer.tensor: layer.worst for layer in compare(tmp_path / "q", source, threads=1)}
        assert worst["model.layers.1.mlp.up_proj.weight"] > 1, name
        assert sum(value > 1 for value in worst.values()) == 1


@pytest.mark.parametrize("quantized", [False, True])
def test_it_is_the_last_rung_and_left_out_where_it_cannot_be(
    make_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, quantized: bool
) -> None:
    from convert import recipe

    monkeypatch.setitem(recipe._RUNG_OPTIONS, "recover", {"steps": 3, "mode": "logits"})
    source = make_llama()
    if quantized:
        text = f"model: {source}\ntargets: [{{name: q, format: compressed-tensors, rules: [{{match: linear, scheme: fp8-dynamic}}]}}]"
        convert(parse_recipe(text, "r.yaml", name="r"), tmp_path / "fp8", check=False)
        source = tmp_path / "fp8" / "q"
    text = f"""
model: {source}
calibration: {{sequences: 6, length: 32}}
validation: {{tokens: 128, length: 32}}
targets:
  - name: q
    format: compressed-tensors
    rules: [{{match: linear, scheme: int8-dynamic}}]
    budget: {{kl_nats: 1.0e-9}}
    ladder: [rtn, recover]
"""
    outcome = convert(parse_recipe(text, "r.yaml", name="r"), tmp_path / "out")
    assert not outcome.passed
    assert [rung["name"] for rung in outcome.reports[0].ladder["rungs"]] == (["rtn"] if quantized else ["rtn", "recover"])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["logits", "blocks"])
def test_a_gpu_trains_and_twice_the_same(peaked: Path, tmp_path: Path, mode: str) -> None:
    recipe = _recipe(peaked, OPTIONS.replace("logits", mode) + (", generated: 8" if mode == "logits" else ""))
    for name in ("one", "two"):
        convert(recipe, tmp_path / name, device="cuda", check=False)
    assert _digest(tmp_path / "one" / "q") == _digest(tmp_path / "two" / "q")
    records = _records(tmp_path / "one" / "q").values()
    assert sum(record["after"] for record in records) < sum(record["before"] for record in records)
