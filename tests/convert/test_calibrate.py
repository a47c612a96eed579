"""Statistics and solved codes against the plain model: hooks, a cache, and GPTQ's own claim."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import KILLED, save_tokenizer
from families import save_family

from convert import solve
from convert.calibrate import alike
from convert.crew import Crew, crew
from convert.export import Like, export
from convert.hardware import instructions
from convert.lanes import walk
from convert.loading import Skeleton
from convert.observe import ROWS, Observer
from convert.pipeline import convert, needs, plan, require
from convert.progress import QUIET, Lines
from convert.source import open_source
from convert.statistics import AbsMax, ChannelAbsMax, Hessian, Rows
from convert.text import load_tokenizer, take_documents, take_tokens
from convert.walk import batched
from formats.errors import InputError, MachineError, NumericsError, RecipeError
from formats.manifest import read_manifest
from formats.scheme import SCHEMES, Grid

#: Whether this CPU multiplies in bfloat16.
BFLOAT16 = bool(instructions() & {"avx512_bf16", "amx_bf16"})

RECIPE = """\
model: {{model}}
calibration: {{{{dtype: float32, sequences: 6, length: 32, seed: 3, propagate: {propagate}}}}}
targets:
  - name: q
    format: compressed-tensors
    rules: [{{{{match: linear, scheme: {scheme}, algorithm: {algorithm}}}}}]
"""


def _text(scheme: str, algorithm: str = "rtn", propagate: str = "quantized", more: str = "") -> str:
    return RECIPE.format(scheme=scheme, algorithm=algorithm, propagate=propagate) + more


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _plain(folder: Path) -> tuple[Any, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    tokens, _ = take_tokens(
        "sample", load_tokenizer(folder, trust_remote_code=False), sequences=6, length=32, purpose="calibration", seed=3
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), torch.from_numpy(tokens)


def test_static_scales_are_those_of_hooks_on_the_plain_model(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = make_llama()
    made = convert(recipe_for(folder, text=_text("fp8-static")), tmp_path, check=False).artifacts[0]
    model, tokens = _plain(folder)
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: max(seen.get(name, 0.0), args[0].abs().max().item())})
            )
    with torch.no_grad():
        for sequence in tokens:
            model(input_ids=sequence[None], use_cache=False)
    stored = {name: value for name, value in _tensors(made.path).items() if name.endswith("input_scale")}
    assert len(stored) == 14
    for name, value in stored.items():
        expected = torch.tensor([seen[name.removesuffix(".input_scale")]], dtype=torch.float64) / 448
        assert torch.equal(value, expected.to(value.dtype)), name


@pytest.mark.parametrize("observer", ["absmax", "percentile"])
def test_a_head_has_the_static_scale_of_what_it_reads(observer: str, make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """It lies behind the blocks, where nothing is run by the walk itself; two threads must not see it twice."""
    folder = make_llama(tie_word_embeddings=False)
    chosen = ", observer: percentile, percentile: 90" if observer == "percentile" else ""
    more = f"      - {{{{match: lm_head, scheme: fp8-static{chosen}}}}}\n"
    text = _text("int8-dynamic").replace("    rules: [", "    rules:\n      - ").replace("}}]", "}}") + more
    made = convert(recipe_for(folder, text=text), tmp_path, check=False).artifacts[0]
    artifact = _tensors(made.path)
    model, tokens = _plain(folder)
    with torch.no_grad():
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    expected = float(states.abs().max()) if observer == "absmax" else float(states.abs().flatten().quantile(0.9))
    assert float(artifact["lm_head.input_scale"]) * 448 == pytest.approx(expected, rel=0.03)


def test_what_nobody_looks_at_is_computed_for_the_first_batches_alone(make_llama: Any) -> None:
    folder = make_llama()
    skeleton = Skeleton(open_source(str(folder)), dtype="float32")
    batches = [{"input_ids": torch.arange(8)[None] + i, "use_cache": False} for i in range(5)]
    down: list[int] = []
    with Observer(skeleton, None) as observer:
        for stand in walk(skeleton, batches):
            names = [f"{stand.name}.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")]
            observer.want(names, "hessian")
            hook = stand.module.get_submodule("mlp.down_proj").register_forward_hook(lambda *_: down.append(1))
            stand.run(keep=False, observer=observer)
            hook.remove()
            # All that is looked at was seen whole, and nothing behind it was run but once.
            assert [observer.get(name, "hessian").tokens for name in names] == [40, 40]
            assert len(down) == 1
            down.clear()


@pytest.mark.parametrize("kind", ["fp8", "fp8-per-head"])
def test_cache_scales_are_those_of_the_plain_model_s_own_cache(kind: str, make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    from transformers import DynamicCache

    folder = make_llama()
    made = convert(recipe_for(folder, text=_text("fp8-dynamic", more=f"    kv_cache: {kind}\n")), tmp_path, check=False).artifacts[0]
    model, tokens = _plain(folder)
    keys, values = torch.zeros(2, 2), torch.zeros(2, 2)
    with torch.no_grad():
        for sequence in tokens:
            cache = DynamicCache()
            model(input_ids=sequence[None], past_key_values=cache, use_cache=True)
            for i, layer in enumerate(cache.layers):
                keys[i] = torch.maximum(keys[i], layer.keys.abs().amax(dim=(0, 2, 3)))
                values[i] = torch.maximum(values[i], layer.values.abs().amax(dim=(0, 2, 3)))
    stored = _tensors(made.path)
    for i in range(2):
        for letter, seen in (("k", keys), ("v", values)):
            scale = stored[f"model.layers.{i}.self_attn.{letter}_scale"]
            expected = seen[i] if kind == "fp8-per-head" else seen[i].max()[None]
            assert torch.equal(scale.flatten(), (expected / 448).to(scale.dtype))


def test_gptq_lowers_the_output_error_and_raises_the_weight_error(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """Of the first block, whose inputs are the source's own."""
    folder = make_llama()
    model, tokens = _plain(folder)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.0."):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for sequence in tokens:
            model(input_ids=sequence[None], use_cache=False)
    rounded = _tensors(convert(recipe_for(folder), tmp_path / "rtn", check=False).artifacts[0].path)
    made = convert(recipe_for(folder, text=_text("int8-dynamic", "gptq")), tmp_path / "gptq", check=False).artifacts[0]
    solved = _tensors(made.path)
    assert len(inputs) == 7
    for name, seen in inputs.items():
        weight = model.get_submodule(name).weight.detach()
        x = torch.cat(seen)
        errors = [(codes[f"{name}.weight"].float() * codes[f"{name}.weight_scale"].float() - weight) for codes in (rounded, solved)]
        assert torch.equal(rounded[f"{name}.weight_scale"], solved[f"{name}.weight_scale"])
        assert errors[1].norm() > errors[0].norm(), name
        assert (x @ errors[1].T).norm() < 0.9 * (x @ errors[0].T).norm(), name
        health = made.manifest.calibration["solved"][name]
        for error, key in zip(errors, ("output_error_rounded", "output_error"), strict=True):
            assert health[key] == pytest.approx(float((x @ error.T).norm() / (x @ weight.T).norm()), rel=2e-2)


def _digest(folder: Path) -> list[tuple[str, str]]:
    return [(file.name, file.sha256) for file in read_manifest(folder).files]


@pytest.mark.parametrize(
    ("propagate", "algorithm", "dtype", "count"),
    [("quantized", "[{{smoothquant: {{alpha: 0.7}}}}, gptq]", "source", 12), ("float", "gptq", "float32", 3)],
)
def test_a_killed_run_is_taken_up_to_the_same_bytes(
    propagate: str, algorithm: str, dtype: str, count: int, make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    """Killed within the second block, the first being finished, and within the first."""
    folder = make_llama()
    text = _text("int8-dynamic", algorithm, propagate).replace("dtype: float32", f"dtype: {dtype}")
    (tmp_path / "recipe.yaml").write_text(text.format(model=folder))
    whole = convert(recipe_for(folder, text=text), tmp_path / "whole", check=False).artifacts[0]
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(out), str(count)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (out / ".q.partial" / "journal").exists()
    again = convert(recipe_for(folder, text=text), out, check=False).artifacts[0]
    assert (again.path / "octavo.json").read_bytes() == (whole.path / "octavo.json").read_bytes()
    assert {path.name for path in again.path.iterdir()} == {path.name for path in whole.path.iterdir()}


def test_what_was_made_of_another_text_or_tokenizer_is_not_taken_up(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """Neither of a run that was killed, nor of an artifact that is whole."""
    folder, corpus, out = make_llama(), tmp_path / "corpus.txt", tmp_path / "killed"
    corpus.write_text("What was read first. " * 60)
    text = _text("int8-dynamic", "gptq").replace("seed: 3", f"seed: 3, text: {corpus}")
    (tmp_path / "recipe.yaml").write_text(text.format(model=folder))
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(out), "12"], check=False)
    assert done.returncode == -signal.SIGKILL
    corpus.write_text("Something else, to be read then. " * 60)
    other = convert(recipe_for(folder, text=text), tmp_path / "other", check=False).artifacts[0]
    again = convert(recipe_for(folder, text=text), out, check=False).artifacts[0]
    assert _digest(again.path) == _digest(other.path)
    assert convert(recipe_for(folder, text=text), out, check=False).artifacts[0].reused
    corpus.write_text("And at last, what nobody had read before. " * 60)
    last = convert(recipe_for(folder, text=text), out, check=False).artifacts[0]
    assert not last.reused
    assert _digest(last.path) != _digest(other.path)
    (folder / "generation_config.json").write_text('{"do_sample": true}')
    copied = convert(recipe_for(folder, text=text), out, check=False).artifacts[0]
    assert json.loads((copied.path / "generation_config.json").read_text()) == {"do_sample": True}


@pytest.mark.parametrize(
    ("rotation", "rules"),
    [
        ("{{}}", "[{{match: linear, scheme: int8-dynamic, algorithm: [{{smoothquant: {{alpha: 0.6}}}}, gptq]}}]"),
        (
            "",
            "[{{match: lm_head, scheme: int8-static, observer: percentile, percentile: 99.9}}, "
            "{{match: '*.self_attn.*', scheme: int8-static, observer: mse, algorithm: gptq}}, "
            "{{match: linear, scheme: int8-static, observer: percentile, algorithm: [{{smoothquant: {{alpha: 0.6}}}}, gptq]}}]",
        ),
    ],
    ids=["rotation", "observers-and-head"],
)
def test_a_killed_run_is_taken_up_behind_rotations_observers_and_with_a_static_head(
    rotation: str, rules: str, make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    folder = make_llama()
    text = _text("int8-dynamic").replace("[{{match: linear, scheme: int8-dynamic, algorithm: rtn}}]", rules)
    text = text.replace("targets:", f"rotation: {rotation}\ntargets:") if rotation else text
    assert rules in text
    (tmp_path / "recipe.yaml").write_text(text.format(model=folder))
    whole = convert(recipe_for(folder, text=text), tmp_path / "whole", check=False).artifacts[0]
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(out), "12"], check=False)
    assert done.returncode == -signal.SIGKILL
    again = convert(recipe_for(folder, text=text), out, check=False).artifacts[0]
    assert (again.path / "octavo.json").read_bytes() == (whole.path / "octavo.json").read_bytes()


def test_a_head_that_no_block_holds_is_refused_to_gptq_with_its_line(make_llama: Any, recipe_for: Any) -> None:
    rules = "[{{match: lm_head, scheme: int8-dynamic, algorithm: gptq}}]"
    text = _text("int8-dynamic").replace("[{{match: linear, scheme: int8-dynamic, algorithm: rtn}}]", rules)
    message = r"^test.yaml:6:13: lm_head.weight cannot be int8-dynamic: gptq works block by block, and it lies in none; use rtn, "
    message += r"with a rule of its own before this one: \{match: lm_head, scheme: int8-dynamic\}"
    with pytest.raises(RecipeError, match=message):
        plan(recipe_for(make_llama(), text=text))


@pytest.mark.parametrize(("propagate", "solved_again"), [("quantized", [1, 2]), ("float", [1])])
def test_what_is_alike_is_taken_over_to_the_same_bytes(
    propagate: str, solved_again: list[int], make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another artifact of the same source keeps a layer of the second block: the first one's codes are the same, and what was seen of
    them; behind it only where blocks see the source's own inputs."""
    folder = make_llama(num_hidden_layers=3)
    text = _text("int8-dynamic", "[{{smoothquant: {{alpha: 0.7}}}}, gptq]", propagate)
    keeps = text.replace("rules: [", "rules: [{{match: model.layers.1.mlp.down_proj, keep: true, why: a try}}, ")
    assert keeps != text
    first, second = (plan(recipe_for(folder, text=each)) for each in (text, keeps))
    made = export(first, tmp_path / "first", QUIET, keep_notes=True)[0]
    whole = export(second, tmp_path / "whole", QUIET)[0]
    solved: list[str] = []
    solve_block = solve.solve_block

    def spy(target: Any, entries: Any, *args: Any, **more: Any) -> Any:
        solved.append(entries[0].modules[0])
        return solve_block(target, entries, *args, **more)

    monkeypatch.setattr(solve, "solve_block", spy)
    like = Like(made.path, first.targets[0], alike(second, first))
    over = export(second, tmp_path / "over", QUIET, like=like)[0]
    assert [int(module.split(".")[2]) for module in solved] == solved_again
    assert {path.name for path in over.path.iterdir()} == {path.name for path in whole.path.iterdir()}
    for path in whole.path.iterdir():
        assert path.read_bytes() == (over.path / path.name).read_bytes(), path.name
    assert {path.name for path in over.path.parent.iterdir()} == {"q"}, "notes are kept where that is asked for"


def test_of_other_text_nothing_is_alike(make_llama: Any, recipe_for: Any) -> None:
    folder, text = make_llama(), _text("int8-dynamic", "gptq")
    job = plan(recipe_for(folder, text=text))
    assert len(alike(job, job)) == len([e for e in job.targets[0].entries if ".layers." in e.tensor.name])
    for change in (
        ("sequences: 6", "sequences: 7"),
        ("algorithm: gptq", "algorithm: {{gptq: {{damping: 0.1}}}}"),
        ("int8-dynamic", "fp8-dynamic"),
    ):
        assert not alike(job, plan(recipe_for(folder, text=text.replace(*change)))), change


@pytest.mark.parametrize("dtype", ["float32", "source"])
def test_threads_and_workers_do_not_change_a_byte(dtype: str, make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """Wide enough that products shared out between two threads are summed in another order than by one, and that Hessians have two parts; a
    number of batches that the workers do not divide."""
    folder = make_llama(hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=1)
    threads, made = torch.get_num_threads(), []
    text = _text("int8-dynamic", "[{{smoothquant: {{alpha: search}}}}, gptq]", more="    kv_cache: fp8\n")
    text = text.replace("sequences: 6, length: 32", "sequences: 5, length: 256").replace("dtype: float32", f"dtype: {dtype}")
    job = plan(recipe_for(folder, text=text))
    try:
        for workers, count in ((1, 1), (2, 2), (3, 1)):
            torch.set_num_threads(count)
            made.append(export(job, tmp_path / f"{workers}-{count}", QUIET, workers=workers)[0].path)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len({(folder / "model.safetensors").read_bytes() for folder in made}) == 1
    assert len({(folder / "octavo.json").read_bytes() for folder in made}) == 1


def test_a_bfloat16_source_is_watched_in_bfloat16_and_smoothed_in_float32(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """The same groups are found, and codes differ by little from those of a float32 walk."""
    folder, made = make_llama(), {}
    for dtype in ("float32", "source"):
        text = _text("int8-dynamic", "[{{smoothquant: {{alpha: 0.7}}}}, rtn]").replace("dtype: float32", f"dtype: {dtype}")
        made[dtype] = convert(recipe_for(folder, text=text), tmp_path / dtype, check=False).artifacts[0]
    calibration = [made[dtype].manifest.calibration for dtype in made]
    assert [seen["dtype"] for seen in calibration] == ["float32", "bfloat16" if BFLOAT16 else "float32"]
    assert calibration[0]["solved"] == calibration[1]["solved"]
    assert all(seen["alpha"] == 0.7 for seen in calibration[1]["solved"].values())
    first, second = (_tensors(made[dtype].path) for dtype in made)
    for name in first:
        if name.endswith("_proj.weight"):
            assert (first[name].float() - second[name].float()).abs().mean() < 0.5


@pytest.mark.gpu
def test_a_gpu_solves_like_a_cpu_and_twice_the_same(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """Sequences go through it together, and groups are found as they are on a CPU."""
    folder = make_llama(hidden_size=256, intermediate_size=704, num_attention_heads=4, num_key_value_heads=2)
    text = _text("int8-dynamic", "[{{smoothquant: {{alpha: 0.6}}}}, gptq]", more="    kv_cache: fp8\n")
    text = text.replace("sequences: 6, length: 32", "sequences: 9, length: 128").replace("dtype: float32", "dtype: source")
    made = [convert(recipe_for(folder, text=text), tmp_path / str(i), device=d, check=False) for i, d in enumerate(("cpu", "cuda", "cuda"))]
    files = [(each.artifacts[0].path / "model.safetensors").read_bytes() for each in made]
    assert files[1] == files[2]
    solved = [each.artifacts[0].manifest.calibration["solved"] for each in made[:2]]
    assert solved[0].keys() == solved[1].keys()
    for name, seen in solved[1].items():
        assert seen["alpha"] == 0.6
        assert seen["output_error"] < 0.9 * seen["output_error_rounded"]
        assert seen["output_error"] == pytest.approx(solved[0][name]["output_error"], rel=0.05), name


def test_sequences_of_one_length_go_together() -> None:
    tokens = [torch.arange(length) for length in (4, 4, 4, 4, 5, 4, 9)]
    assert [tuple(batch.shape) for batch in batched(tokens, 8)] == [(1, 4), (2, 4), (1, 4), (1, 5), (1, 4), (1, 9)]
    assert [tuple(batch.shape) for batch in batched(tokens, 1)] == [(1, len(item)) for item in tokens]
    assert torch.equal(torch.cat([row for batch in batched(tokens, 8) for row in batch]), torch.cat(tokens))


class _Overwriting(torch.nn.Linear):
    """What stands behind a linear that changes what that has read."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        x.mul_(2)
        return y


@pytest.mark.parametrize("kind", ["absmax", "channels", "hessian", "rows"])
def test_an_observer_takes_batches_in_their_order_or_not_at_all(kind: str) -> None:
    """What it ends in is what one accumulator fed batch by batch ends in, to the bit, however many are shown at once."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(800, 3), "b": _Overwriting(800, 3)})
    batches = torch.randn(5, 1, 40, 800, generator=torch.Generator().manual_seed(0)).unbind()
    expected = {"absmax": AbsMax(), "channels": ChannelAbsMax(800), "hessian": Hessian(800), "rows": Rows(ROWS)}[kind]
    for batch in batches:
        expected.update(batch[0])
    for count in (1, 2, 3):
        with Observer(SimpleNamespace(model=model, experts={}), None) as observer, crew(count) as hands, torch.no_grad():
            observer.want(["a"], kind)

            def show(batch: torch.Tensor, observer: Observer = observer) -> Any:
                with observer.watching() as seen:
                    model["a"](batch)
                return seen

            for start in range(0, 5, count):
                observer.take(list(hands.map(show, batches[start : start + count])), hands)
            model["a"](100 * batches[0])
            assert torch.equal(observer.get("a", kind).value, expected.value)
    with Observer(SimpleNamespace(model=model, experts={}), None) as observer, torch.no_grad():
        observer.want(["b"], kind)
        with observer.watching() as seen:
            model["b"](batches[0].clone())
        if kind == "hessian":
            with pytest.raises(MachineError, match="overwrites"):
                observer.take([seen], Crew())
        else:  # was taken when it was read
            observer.take([seen], Crew())
            alone = type(expected)(*([ROWS] if kind == "rows" else [800] if kind == "channels" else []))
            alone.update(batches[0][0])
            assert torch.equal(observer.get("b", kind).value, alone.value)


@pytest.mark.parametrize(("free", "on_disk"), [(24 * 10**9, False), (8 * 10**9, True)])
def test_a_lane_that_is_larger_than_memory_is_counted_where_it_lies(
    free: int, on_disk: bool, make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    settings = {"calibration.sequences": "30000", "calibration.length": "512", "calibration.dtype": "float32"}
    job = plan(recipe_for(make_llama(), text=_text("int8-dynamic", "gptq"), **settings))
    assert job.architecture is not None
    lane = 30_000 * 512 * int(job.architecture.hidden_size or 0) * 4
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    found = needs(job, tmp_path, check=False)
    assert (found.disk_bytes > 2 * lane) == on_disk
    assert (found.memory_bytes > 3 * lane) != on_disk
    assert found.memory_bytes > lane
    require(found, tmp_path)


def test_what_propagates_decides_what_later_blocks_see(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    made = [
        _tensors(convert(recipe_for(make_llama(), text=_text("int8-dynamic", "gptq", how)), tmp_path / how, check=False).artifacts[0].path)
        for how in ("quantized", "float")
    ]
    same = [name for name in made[0] if torch.equal(made[0][name], made[1][name])]
    assert any(name.startswith("model.layers.0.") and name.endswith("_proj.weight") for name in same)
    assert all(name in same for name in made[0] if name.startswith("model.layers.0."))
    assert not all(name in same for name in made[0] if name.startswith("model.layers.1."))


@pytest.mark.parametrize("alpha", ["0.7", "search"])
def test_smoothing_leaves_the_function_and_the_ledger_says_it(alpha: str, make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """The artifact's weights, as floats in the plain model, against the source: as far apart as rounding to 8 bit and no further."""
    from transformers import AutoModelForCausalLM

    folder = make_llama(dtype="float32")
    algorithm = f"[{{{{smoothquant: {{{{alpha: {alpha}}}}}}}}}, rtn]"
    made = convert(recipe_for(folder, text=_text("int8-dynamic", algorithm)), tmp_path, check=False).artifacts[0]
    stored = _tensors(made.path)
    model, tokens = _plain(folder)
    smoothed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = _tensors(folder)
    with torch.no_grad():
        for name, parameter in smoothed.named_parameters():
            value = stored[name].float()
            parameter.copy_(value * stored[f"{name}_scale"].float() if f"{name}_scale" in stored else value)
        expected, got = model(input_ids=tokens).logits, smoothed(input_ids=tokens).logits
    assert (got - expected).norm() < 0.03 * expected.norm()
    notes = {entry["tensor"]: entry.get("note", "") for entry in made.manifest.ledger}
    norms = [f"model.layers.{i}.{name}.weight" for i in range(2) for name in ("input_layernorm", "post_attention_layernorm")]
    changed = [name for name in notes if "smoothed" in notes[name]]
    assert changed == [name for name in changed if name in norms]
    assert changed
    for name, tensor in source.items():
        if name in stored and not name.endswith("_proj.weight"):
            assert torch.equal(stored[name], tensor) == (name not in changed)
    solved = made.manifest.calibration["solved"]
    assert solved["model.layers.0.mlp.down_proj"]["alpha"] == (0.7 if alpha == "0.7" else pytest.approx(0.65, abs=0.65))


@pytest.mark.parametrize(("family", "bare"), [("llama", ()), ("gpt_neox", ("attention.dense", "mlp.dense_4h_to_h"))])
def test_layers_that_nothing_can_smooth_are_an_error_unless_the_recipe_leaves_them(
    family: str, bare: tuple[str, ...], recipe_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_family(family, tmp_path)
    save_tokenizer(folder, 300)
    text = _text("int8-dynamic", "[{{smoothquant: {{alpha: 0.5}}}}, rtn]")
    if bare:
        with pytest.raises(RecipeError, match=r"^test.yaml:6:\d+: smoothquant does not reach gpt_neox.layers.0.attention.dense, gpt_neox"):
            convert(recipe_for(folder, text=text), tmp_path / "refused", check=False)
        assert not (tmp_path / "refused").exists(), "nothing is left of it"
        text = text.replace("alpha: 0.5", "uncovered: leave")
    made = convert(recipe_for(folder, text=text), tmp_path / "out", check=False, progress=Lines()).artifacts[0]
    assert ("is not smoothed" in capsys.readouterr().err) == bool(bare)
    noted = [entry["module"] for entry in made.manifest.ledger if "not smoothed (nothing" in entry.get("note", "")]
    assert noted == [f"gpt_neox.layers.{i}.{name}" for i in range(2) for name in bare]


@pytest.mark.parametrize("chat", [False, True])
def test_documents_are_read_as_they_are(chat: bool, make_llama: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_llama(), trust_remote_code=False)
    path = tmp_path / "d.jsonl"
    words = [f"{i} is " + "x" * i for i in range(9)]
    path.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": w}]} if chat else {"text": w}) for w in words))
    if chat:
        with pytest.raises(InputError, match="no chat template"):
            take_documents(str(path), tokenizer, sequences=4, length=12, seed=1, chat=True)
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    found, record = take_documents(str(path), tokenizer, sequences=4, length=12, seed=1, chat=chat)
    again, _ = take_documents(str(path), tokenizer, sequences=4, length=12, seed=1, chat=chat)
    other, _ = take_documents(str(path), tokenizer, sequences=4, length=12, seed=3, chat=chat)
    spelled = [f"<user>{word}"[:12] if chat else word[:12] for word in words]
    assert all(tokenizer.decode(ids) in spelled for ids in found)
    assert record["tokens"] == sum(map(len, found))
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in again] != [ids.tolist() for ids in other]
    for wrong, message in ((10, "9 documents, 10 are needed"), (9, 'line 10 has no usable "')):
        path.write_text(path.read_text() + ("\n{}" if wrong == 9 else ""))
        with pytest.raises(InputError, match=message):
            take_documents(str(path), tokenizer, sequences=wrong + (wrong == 9), length=12, seed=1, chat=chat)


def test_documents_of_several_lengths_walk_together(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": "word " * (i + 3)}) for i in range(8)))
    text = _text("int8-dynamic", "gptq").replace("seed: 3", f"seed: 3, documents: true, text: {path}")
    made = convert(recipe_for(make_llama(), text=text), tmp_path / "out", check=False).artifacts[0]
    assert made.manifest.calibration["documents"] == 6
    assert made.manifest.calibration["tokens"] < 6 * 32


@pytest.mark.parametrize("scheme", ["int8-static", "fp8-static"])
@pytest.mark.parametrize(("algorithm", "propagate"), [("rtn", "quantized"), ("[{{smoothquant: {{alpha: 0.6}}}}, rtn]", "float")])
@pytest.mark.parametrize("observer", ["mse", "percentile, percentile: 99"])
def test_observers_choose_the_scale_that_the_plain_model_s_inputs_ask_for(
    observer: str, scheme: str, algorithm: str, propagate: str, make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    """By torch's own quantile, and by trying scales around the chosen one, on all the inputs themselves."""
    folder = make_llama()
    text = _text(scheme, f"{algorithm}, observer: {observer}", propagate)
    made = convert(recipe_for(folder, text=text), tmp_path, check=False).artifacts[0]
    stored = _tensors(made.path)
    inputs = _inputs(folder)
    grid = SCHEMES[scheme].activation.grid  # type: ignore[union-attr]
    noted = made.manifest.calibration
    for name, x in inputs.items():
        producer = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}.get(name.rpartition(".")[2])
        if algorithm != "rtn":
            if producer is None:
                continue
            x = x * stored[f"{name.rpartition('.')[0].rpartition('.')[0]}.{producer}.weight"].float()  # the model's own are ones
        scale = float(stored[f"{name}.input_scale"])
        if observer == "mse":
            losses = {share: _loss(x, scale * share, grid) for share in (0.9, 0.95, 1.0, 1.05, 1.1)}
            assert losses[1.0] <= min(losses.values()) * (1.01 if grid.kind == "int" else 1.1), name
        else:
            assert scale * grid.high == pytest.approx(float(torch.quantile(x.abs().flatten(), 0.99)), rel=2e-2), name
        told = (noted["static"] if "static" in noted else {m: h["static"] for m, h in noted["solved"].items()})[name]
        assert told["limit"] == pytest.approx(scale * grid.high, rel=1e-2)
        assert told["clipped"] == pytest.approx(float((x.abs() > scale * grid.high).float().mean()), abs=2e-3)
        assert told["lost"] == pytest.approx((_loss(x, scale, grid) ** 0.5) / float(x.norm()), rel=0.1)
    assert {record.get("observer") for record in made.manifest.ledger if record["decision"] == "quantize"} == {
        observer.replace(", percentile:", "")
    }


def test_layers_that_a_runtime_fuses_get_the_largest_of_their_scales(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = make_llama()
    rules = (
        "[{match: q_proj, scheme: int8-static, observer: percentile, percentile: 90}, {match: linear, scheme: int8-static, observer: mse}]"
    )
    scales = {}
    for runtimes in ("transformers", "vllm"):
        text = _text("x").split("    rules:")[0] + f"    rules: {rules}\n    runtimes: [{runtimes}]\n"
        recipe = recipe_for(folder, text=text.replace("{match", "{{match").replace("90}", "90}}").replace("mse}", "mse}}"))
        stored = _tensors(convert(recipe, tmp_path / runtimes, check=False).artifacts[0].path)
        scales[runtimes] = [float(stored[f"model.layers.0.self_attn.{x}_proj.input_scale"]) for x in "qkv"]
    assert scales["transformers"][0] < scales["transformers"][1] == scales["transformers"][2]
    assert scales["vllm"] == [scales["transformers"][1]] * 3


def test_an_observer_of_what_is_not_static_is_refused_with_its_line(recipe_for: Any) -> None:
    with pytest.raises(RecipeError, match=r"test.yaml:6:.*: observer chooses the scale of a static input, and int8-dynamic has none"):
        recipe_for("x", text=_text("int8-dynamic", "rtn, observer: mse"))


def _inputs(folder: Path) -> dict[str, torch.Tensor]:
    """All the inputs of the source's linear layers, by module."""
    model, tokens = _plain(folder)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for sequence in tokens:
            model(input_ids=sequence[None], use_cache=False)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _loss(x: torch.Tensor, scale: float, grid: Grid) -> float:
    codes = (x / scale).clamp(grid.low, grid.high)
    codes = codes.round() if grid.kind == "int" else codes.to(torch.float8_e4m3fn).float()
    return float((codes * scale - x).double().square().sum())


@pytest.mark.parametrize("tensor", ["model.layers.1.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight"])
@pytest.mark.parametrize(
    ("scheme", "algorithm"),
    [("int8-dynamic", "gptq"), ("int8-dynamic", "[smoothquant, rtn]"), ("int8-static", "rtn"), ("fp8-dynamic", "[rtn, recover]")],
)
def test_a_value_that_is_not_finite_is_said_of_the_tensor_that_has_it(
    scheme: str, algorithm: str, tensor: str, make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    """And of none of the layers behind it, whose Hessians and scales it spoils, nor of smoothing that finds no function kept."""
    from safetensors.torch import save_file

    folder = make_llama()
    tensors = _tensors(folder)
    tensors[tensor][7] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=f"^{tensor}: NaN or Inf among its values in float32; the checkpoint is damaged"):
        convert(recipe_for(folder, text=_text(scheme, algorithm)), tmp_path / "out", check=False)
