from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KILLED, Make
from safetensors.torch import load_file, save_file

from convert import export as export_module
from convert import pipeline
from convert.progress import QUIET
from convert.recipe import parse_recipe
from formats.errors import BusyError, InputError, MachineError, NumericsError
from formats.manifest import read_manifest
from formats.verify import verify

#: Enough tensors that a kill lands between them, small enough that thirty kills stay cheap.
MANY = {"num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 512}
RECIPE = """\
model: {model}
targets:
  - {{name: a, format: compressed-tensors, max_shard_size: 5MB}}
  - {{name: b, format: compressed-tensors, rules: [{{match: linear, scheme: fp8-dynamic}}]}}
"""
TWICE = """\
model: {model}
targets:
  - {{name: a, format: compressed-tensors}}
  - {{name: b, format: compressed-tensors, max_shard_size: 1MB}}
"""


def make(recipe: Any, out: Path, **options: Any) -> list[Path]:
    return [artifact.path for artifact in export_module.export(pipeline.plan(recipe), out, QUIET, **options)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_files_are_as_large_as_the_plan_said_to_the_byte(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    job = pipeline.plan(recipe_for(make_llama(), **{"targets.0.max_shard_size": "1000001"}))
    (artifact,) = export_module.export(job, tmp_path / "out", QUIET)
    sizes = {path.name: path.stat().st_size for path in artifact.path.glob("*.safetensors")}
    assert sizes == {shard.file: shard.size_bytes for shard in job.targets[0].shards}


@pytest.mark.parametrize("scheme", ["int8-dynamic", "fp8-dynamic"])
def test_what_is_kept_is_kept_to_the_bit_and_what_is_quantized_decodes_near_the_source(
    make_llama: Any, recipe_for: Any, tmp_path: Path, scheme: str
) -> None:
    folder = make_llama(hidden_size=52, intermediate_size=61, num_attention_heads=4, head_dim=14, vocab_size=301)
    (path,) = make(recipe_for(folder, scheme), tmp_path / "out")
    source, written = load_file(folder / "model.safetensors"), weights(path)
    for name, tensor in source.items():
        if f"{name}_scale" in written:
            decoded = written[name].float() * written[f"{name}_scale"].float()
            assert (decoded - tensor.float()).abs().max() <= tensor.float().abs().max() / 16
        else:
            assert torch.equal(written[name], tensor)


def test_threads_shards_and_slabs_do_not_change_a_byte(
    make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, many = make_llama(**MANY), make_llama(**MANY, shards=5)
    reference = make(recipe_for(one, text=RECIPE), tmp_path / "1", workers=1)
    monkeypatch.setattr("convert.quantize.SLAB_ELEMENTS", 1000)
    for out, model, workers in (("2", one, 7), ("3", many, 3)):
        for ours, theirs in zip(reference, make(recipe_for(model, text=RECIPE), tmp_path / out, workers=workers), strict=True):
            first, second = weights(ours), weights(theirs)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)
    assert len(list(reference[0].glob("*.safetensors"))) > 1


def test_the_same_job_twice_gives_the_same_bytes_and_is_not_done_twice(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    recipe = recipe_for(make_llama())
    (first,) = make(recipe, tmp_path / "1")
    (second,) = make(recipe, tmp_path / "2")
    assert contents(first) == contents(second)
    again = export_module.export(pipeline.plan(recipe), tmp_path / "1", QUIET)
    assert again[0].reused


def test_an_artifact_that_was_damaged_is_made_again(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    recipe = recipe_for(make_llama())
    (path,) = make(recipe, tmp_path / "out")
    before = contents(path)
    with (path / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")
    assert not verify(path).passed
    make(recipe, tmp_path / "out")
    assert contents(path) == before


def test_a_source_that_changed_is_converted_anew(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = make_llama()
    recipe = recipe_for(folder)
    (path,) = make(recipe, tmp_path / "out")
    before = contents(path)
    save_file({name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")
    make(recipe, tmp_path / "out")
    assert contents(path) != before


def test_targets_that_share_a_scheme_share_the_codes(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    first, second = (weights(path) for path in make(recipe_for(make_llama(), text=TWICE), tmp_path / "out"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_manifest_names_source_files_by_digest_and_every_file_by_hash(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    import blake3

    folder = make_llama()
    (path,) = make(recipe_for(folder), tmp_path / "out")
    manifest = read_manifest(path)
    digest = blake3.blake3((folder / "model.safetensors").read_bytes()).hexdigest()
    assert [file["digest"] for file in manifest.source["files"]] == [f"blake3:{digest}"]
    assert verify(path).passed
    assert {file.name for file in manifest.files} == {item.name for item in path.iterdir()} - {"octavo.json", "provenance.json"}


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_what_is_not_finite_is_named_and_nothing_is_left_behind(
    make_llama: Any, recipe_for: Any, tmp_path: Path, name: str, value: float, shown: str
) -> None:
    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    index = (3,) * tensors[name].dim()
    tensors[name][index] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=rf"^{name}: {shown} at index \[{', '.join('3' * len(index))}\]"):
        make(recipe_for(folder), tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_do_not_fit_the_dtype_asked_for_are_an_error(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model.norm.weight: values up to .* exceed F16; set dtype: bfloat16"):
        make(recipe_for(folder, dtype="float16"), tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "wanted", "stored"), [("float32", "source", "F32"), ("float32", "bfloat16", "BF16"), ("bfloat16", "float16", "F16")]
)
def test_what_is_kept_takes_the_dtype_the_recipe_wants(
    make_llama: Any, recipe_for: Any, tmp_path: Path, source: str, wanted: str, stored: str
) -> None:
    (path,) = make(recipe_for(make_llama(dtype=source), dtype=wanted), tmp_path / "out")
    outputs = {name: dtype for entry in read_manifest(path).ledger for name, dtype, _ in entry["outputs"]}
    assert {outputs["model.norm.weight"], outputs["model.layers.0.mlp.up_proj.weight_scale"]} == {stored}
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[stored]


def test_two_runs_on_one_output_refuse_each_other(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    recipe = recipe_for(make_llama())
    with export_module._locked(tmp_path / ".q.partial", tmp_path / "q"), pytest.raises(BusyError, match="another run is writing it"):
        make(recipe, tmp_path)
    make(recipe, tmp_path)


@pytest.mark.parametrize("what", ["file", "folder", "source"])
def test_what_octavo_did_not_make_is_never_replaced(make_llama: Any, recipe_for: Any, tmp_path: Path, what: str) -> None:
    final, source = tmp_path / "out" / "q", make_llama()
    final.parent.mkdir()
    if what == "file":
        final.write_text("mine")
    elif what == "folder":
        final.mkdir()
        (final / "thesis.txt").write_text("mine")
    else:
        source = shutil.copytree(make(recipe_for(source), tmp_path / "first")[0], final)  # an artifact, but what is to be read
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match=r"out/q(: the model that is to be converted lies there| is there, and not an artifact)"):
        pipeline.convert(recipe_for(source, "fp8-dynamic"), tmp_path / "out", check=False)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["q"]


def test_an_artifact_takes_the_place_of_an_older_one_and_of_an_empty_folder(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "q").mkdir(parents=True)
    for scheme in ("int8-dynamic", "fp8-dynamic"):
        (path,) = make(recipe_for(make_llama(), scheme), tmp_path / "out")
        assert verify(path).passed
        assert {entry.get("scheme") for entry in read_manifest(path).ledger} == {scheme, None}


def test_an_output_that_is_a_file_is_a_mistake_in_one_sentence(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match=r"notes/sub.*: cannot be written \(Not a directory\); choose another --out"):
        make(recipe_for(make_llama()), tmp_path / "notes" / "sub")
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root to mount a small disk")
def test_a_full_disk_is_said_before_any_work_and_leaves_nothing(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk], check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        recipe = recipe_for(make_llama())
        with pytest.raises(MachineError, match="of disk are needed"):
            pipeline.convert(recipe, disk / "out", check=False)
        with pytest.raises(MachineError, match="the disk is full; make room and run the same command again"):
            make(recipe, disk / "out")
        assert [path for path in disk.rglob("*") if path.is_file()] == []
    finally:
        subprocess.run(["umount", disk], check=True)


def _convert_in_child(text: str, out: str) -> None:
    make(parse_recipe(text, "kill.yaml"), Path(out), workers=2)


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_no_byte(make_llama: Any, tmp_path: Path) -> None:
    text = RECIPE.format(model=make_llama(**MANY))
    make(parse_recipe(text, "kill.yaml"), tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    # A server that has torch loaded is forked for each run, so that a run takes tenths of a second and not seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.modeling_utils", "transformers.models.llama.modeling_llama", "convert.pipeline"])
    for name in ("warm", "timed"):
        started = time.monotonic()
        child = context.Process(target=_convert_in_child, args=(text, str(tmp_path / name)))
        child.start()
        child.join()
    longest = time.monotonic() - started
    dice = random.Random(8)
    killed = resumed = 0
    for round_ in range(1000):
        out = tmp_path / f"killed{round_}"
        while killed < 30 and not (out / "b").exists():
            child = context.Process(target=_convert_in_child, args=(text, str(out)))
            journal = out / ".a.partial" / "journal"
            before = journal.stat().st_ino if journal.exists() else 0
            child.start()
            if killed % 3 == 0:
                child.join(dice.uniform(0, longest))
            else:
                # A run begins with a journal of its own; from then on tensors are finished, one every few milliseconds.
                while child.is_alive() and (not journal.exists() or journal.stat().st_ino == before):
                    time.sleep(0.001)
                child.join(dice.uniform(0, longest / 8))
            if child.is_alive():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                killed += 1
                resumed += journal.exists() and len(journal.read_text().splitlines()) > 1
            child.join()
        if killed == 30:
            break
        shutil.rmtree(out)
    make(parse_recipe(text, "kill.yaml"), out)
    assert contents(out) == whole
    assert resumed > 0, "no kill came after a tensor was finished, so nothing was resumed"


@pytest.mark.parametrize("lost", ["journal", "health"])
def test_what_a_power_cut_made_of_the_notes_is_no_crash(make_llama: Any, tmp_path: Path, lost: str) -> None:
    job = tmp_path / "test.yaml"
    job.write_text(RECIPE.format(model=make_llama()))
    subprocess.run([sys.executable, "-c", KILLED, str(job), str(tmp_path / "out"), "8"], check=False)
    partial = tmp_path / "out" / ".a.partial"
    assert len((partial / "journal").read_text().splitlines()) > 1
    (partial / lost).write_bytes(b"\xff\x00{\n\0\0\n")
    recipe = parse_recipe(job.read_text(), "test.yaml", name="test")
    for made, whole in zip(make(recipe, tmp_path / "out"), make(recipe, tmp_path / "whole"), strict=True):
        assert contents(made) == contents(whole)


def test_finished_tensors_are_not_done_again(make_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(RECIPE.format(model=make_llama(**MANY)), "r.yaml")
    job = pipeline.plan(recipe)
    seen: list[str] = []
    run = export_module.quantize.run

    def stop_at_the_hundredth(work: Any, *args: Any, **options: Any) -> Any:
        if len(seen) == 100:
            raise KeyboardInterrupt
        seen.append(work.spec.name)
        return run(work, *args, **options)

    monkeypatch.setattr(export_module.quantize, "run", stop_at_the_hundredth)
    with pytest.raises(KeyboardInterrupt):
        export_module.export(job, tmp_path / "out", QUIET, workers=1)
    assert not (tmp_path / "out" / "a").exists()
    finished = set((tmp_path / "out" / ".a.partial" / "journal").read_text().splitlines()[1:])
    assert len(finished) > 90
    monkeypatch.setattr(
        export_module.quantize, "run", lambda work, *args, **options: (seen.append(work.spec.name), run(work, *args, **options))[1]
    )
    seen.clear()
    export_module.export(job, tmp_path / "out", QUIET)
    assert not finished & set(seen)
    make(recipe, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_interruption_while_a_file_is_begun_is_an_interruption(
    make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    recipe = recipe_for(make_llama())
    with monkeypatch.context() as patch:
        patch.setattr(export_module._Follower, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(recipe, tmp_path / "out")
    make(recipe, tmp_path / "out")


def test_peak_memory_does_not_grow_with_the_tensor(make_llama: Any, tmp_path: Path) -> None:
    """An embedding of 131 MB passes through in slabs: the process never grows by as much as half of it."""
    folder = make_llama(vocab_size=32_000, hidden_size=1024, intermediate_size=256)
    program = (
        "import resource, sys; from pathlib import Path; from convert import pipeline; from convert.export import export\n"
        "from convert.progress import QUIET; from convert.recipe import parse_recipe\n"
        "job = pipeline.plan(parse_recipe(sys.argv[1], 'r.yaml')); import torch; torch.ones(8, 8).float() @ torch.ones(8, 8)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; export(job, Path(sys.argv[2]), QUIET, workers=2)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    text = f"model: {folder}\ntargets: [{{name: q, format: compressed-tensors}}]\n"
    done = subprocess.run([sys.executable, "-c", program, text, str(tmp_path / "out")], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 65_000_000


def test_a_file_that_is_too_large_for_its_place_is_no_traceback(make_llama: Make, recipe_for: Any, tmp_path: Path) -> None:
    model = make_llama()
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, was[1]))
    try:
        with pytest.raises(MachineError, match=r"no file so large can be written there, .* lower max_shard_size, or choose another --out"):
            pipeline.convert(recipe_for(model), tmp_path / "out", check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert verify(pipeline.convert(recipe_for(model), tmp_path / "out", check=False).artifacts[0].path).passed


@pytest.mark.parametrize("out", ["/proc/x", "/sys/x", "/dev/full/x", "file", "file/a/b", "x" * 300, "y/" * 2100, "locked/a"])
def test_where_nothing_can_be_written_is_said_before_any_work(out: str, make_llama: Make, recipe_for: Any, tmp_path: Path) -> None:
    if out == "locked/a" and os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    where = tmp_path / out
    with pytest.raises(InputError, match=r"nothing can be written there \(.*\); choose another --out$") as failed:
        pipeline.convert(recipe_for(make_llama()), where)
    assert str(failed.value).startswith(str(where))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "locked"]
