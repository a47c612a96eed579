"""The command as a person runs it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from convert.command import run

ROOT = Path(__file__).parents[1]


def octavo_process(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False, env={**os.environ, **environment})


def installed(*arguments: object) -> list[str]:
    """The command as pip installs it, or as a module where it is not installed."""
    script = Path(sys.executable).with_name("octavo")
    return [*([str(script)] if script.exists() else [sys.executable, "-m", "convert"]), *map(str, arguments)]


def octavo(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in this process, from its arguments to its exit code: to import torch takes it longer than what it is asked. What it
    would end in a traceback ends the test in one."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["octavo", *map(str, arguments)])
        patch.chdir(cwd or Path.cwd())
        for name in ("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", *environment):  # main sets the first two
            patch.setenv(name, environment.get(name, "false" if name == "TOKENIZERS_PARALLELISM" else "error"))
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = run()
        finally:
            signal.signal(signal.SIGTERM, before)
    return subprocess.CompletedProcess(["octavo", *map(str, arguments)], code, out.getvalue(), err.getvalue())


@pytest.mark.parametrize(
    ("code", "arguments", "said", "complaint"),
    [
        (0, ["verify", "{empty}"], "good (2 files, 0 tensors", ""),
        (1, ["verify", "{broken}"], "broken: model.safetensors: a header of ", ""),
        (2, ["verify", "/nowhere"], "", "error: /nowhere: no such folder"),
        (2, ["verify", "--quik", "{empty}"], "", "No such option: --quik"),
        (3, ["runtimes", "onnxruntime-gpu"], "", "error: runtime onnxruntime-gpu is for NVIDIA cards"),
    ],
)
def test_the_process_ends_with_the_exit_code_that_help_names(
    tmp_path: Path, code: int, arguments: list[str], said: str, complaint: str
) -> None:
    places = {"{empty}": tmp_path / "empty", "{broken}": tmp_path / "broken"}
    for folder, weights in zip(places.values(), (b"\2\0\0\0\0\0\0\0{}", b"no safetensors"), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
    command = installed(*(places.get(argument, argument) for argument in arguments))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PATH": ""})
    assert done.returncode == code, done.stderr
    assert said in done.stdout
    assert complaint in done.stderr
    assert bool(complaint) == bool(done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_process_that_is_interrupted_ends_with_130(tmp_path: Path, kind: signal.Signals) -> None:
    (tmp_path / "model.safetensors").touch()
    os.mkfifo(tmp_path / "config.json")
    process = subprocess.Popen(installed("verify", tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with (tmp_path / "config.json").open("wb"):  # opened as soon as the command reads it, and it waits for more
        process.send_signal(kind)
        said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "")
    assert errors == "interrupted; run the same command again to go on where it stopped\n"


def recipe(folder: Path, model: Path | str, extra: str = "") -> Path:
    path = folder / "job.yaml"
    path.write_text(
        f"model: {model}\nvalidation: {{tokens: 128, length: 64}}\ntargets:\n  - name: q\n    format: compressed-tensors\n"
        f"    limits: {{kl_nats: 1.0, top1: 0.0, perplexity_ratio: 9.0}}\n{extra}"
    )
    return path


def test_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pydantic', 'huggingface_hub'}"
    program = f"import sys, convert.command; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "convert" in octavo_process("--help").stdout


#: A command, and which of some modules it had loaded when it ended.
LOADED = """
import atexit, sys
from convert import command
command.app.callback()(lambda: atexit.register(lambda: print("loaded", *sorted({wanted} & set(sys.modules)))))
sys.argv = ["octavo", *sys.argv[1:]]
command.main()
"""


@pytest.mark.parametrize(
    ("form", "runtime", "loaded"),
    [("compressed-tensors", "transformers", "torch transformers"), ("onnx", "onnxruntime", "onnx_ir torch transformers")],
)
def test_a_plan_loads_what_its_recipe_uses(make_llama: Any, tmp_path: Path, form: str, runtime: str, loaded: str) -> None:
    program = LOADED.replace("{wanted}", repr({"torch", "transformers", "onnx_ir", "onnxscript"}))
    overrides = ("--set", f"targets.0.format={form}", "--set", f"targets.0.runtimes=[{runtime}]")
    command = [sys.executable, "-c", program, "plan", str(recipe(tmp_path, make_llama())), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == [f"loaded {loaded}"], done.stderr


def test_a_command_ends_without_taking_apart_what_it_imported() -> None:
    tell = "class Heavy:\n    def __del__(self): print('taken apart')\nheavy = Heavy()\nimport sys; sys.argv[1:] = sys.argv[1:]"
    program = f"{tell}; from convert.command import main; main()"
    for arguments, code in ((["--help"], 0), (["--nothing"], 2)):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, "taken apart" in done.stdout) == (code, False)


def test_what_was_registered_for_the_end_is_done_and_what_was_printed_arrives() -> None:
    tell = "import atexit; from convert import command; command.run = lambda: (atexit.register(print, 'registered'), print('said'), 3)[2]"
    command = [sys.executable, "-c", f"{tell}; command.main()"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "said\nregistered\n")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    assert done.returncode == 120
    assert "No space left" in done.stderr


COMMANDS = [
    "",
    *["plan", "convert", "sensitivity", "push", "reproduce", "check", "compare", "verify", "inspect", "schema", "doctor", "runtimes"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_docs_show_the_help_there_is(command: str) -> None:
    shown = octavo(*command.split(), "--help", COLUMNS="100").stdout.strip()
    assert shown in (ROOT / "docs" / "command.md").read_text(), "docs/command.md is out of date; run: make docs"


def test_a_job_from_recipe_to_proof(make_llama: Any, tmp_path: Path) -> None:
    done = octavo_process("convert", recipe(tmp_path, make_llama()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "artifacts" / "job"
    assert {path.name for path in folder.iterdir()} == {"q", "q.report.json", "q.report.html"}
    assert "passed" in done.stdout
    assert "kl_nats" in done.stdout
    assert "converting: 0.00 GB" in done.stderr, "plain lines where there is no terminal"
    assert octavo("verify", folder / "q").returncode == 0
    assert json.loads(octavo("inspect", folder / "q", "--json").stdout)["made_by"]["target"] == "q"
    again = octavo("convert", recipe(tmp_path, make_llama()), "--quiet", cwd=tmp_path)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_a_limit_missed_is_exit_code_1(make_llama: Any, tmp_path: Path) -> None:
    done = octavo("convert", recipe(tmp_path, make_llama()), "--set", "targets.0.limits.kl_nats=1e-9", cwd=tmp_path)
    assert done.returncode == 1
    assert "FAIL  transformers: kl_nats" in done.stdout


_GPTQ = ("--set", "targets.0.rules=[{match: linear, scheme: int8-dynamic, algorithm: gptq}]")
_STATIC = ("--set", "targets.0.rules=[{match: linear, scheme: int8-static}]")
_BUDGET = ("--set", "targets.0.limits={}", "--set", "targets.0.budget={kl_nats: 0.1}")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["convert", "nothing-like-it"], 2, "error: no recipe 'nothing-like-it'"),
        (["convert", "{bad}"], 2, "no key 'rulez' here (did you mean rules?)"),
        (["convert", "{good}", "--model", "/nowhere"], 2, "error: /nowhere: no such folder or file"),
        (["convert", "{good}", "--set", "nonsense"], 2, "error: --set nonsense: write it as key.path=value"),
        (["convert", "{good}", "--device", "tpu"], 2, "'tpu' is no device"),
        (["convert", "{good}", "--device", "cuda"], 3, "no CUDA device is here"),
        (["plan", "{good}", "--set", "targets.0.rules=[{match: nowhere, scheme: int8-dynamic}]"], 2, "'nowhere' matches nothing"),
        (["verify", "/nowhere"], 2, "error: /nowhere: no such folder"),
        (["inspect", "/nowhere"], 2, "error: /nowhere: no such file or folder"),
        (["check", "/nowhere"], 2, "error: /nowhere: no such folder; give a folder that octavo convert made"),
        (["check", "{model}"], 2, ": no octavo.json in it, so octavo did not make it; give a folder that octavo convert made"),
        (["verify", "{model}/config.json"], 2, "config.json: a file; give the folder around it"),
        (["plan", "x" * 5000], 2, "error: no recipe 'xxx"),
        (["plan", "{good}", "--model", "x" * 5000], 2, "xxx: no such folder or file, and not a Hub id"),
        (["plan", "{good}", "--model", ""], 2, "error: --model is empty"),
        (["plan", "{good}", "--set", "targets.²=x"], 2, "error: --set targets.²=x: there is no targets.² in the recipe"),
        *(
            (
                [command, "{good}", "--set", f"validation.{key}=none.jsonl"],
                2,
                f"error: --set validation.{key}=none.jsonl: validation.{key}: ",
            )
            for command in ("plan", "convert")
            for key in ("text", "prompts", "images")
        ),
        (["plan", "{good}", *_GPTQ, "--set", "calibration.text=none.txt"], 2, "calibration.text: none.txt cannot be read (No such file"),
        (
            ["convert", "{good}", "--no-check", *_GPTQ, "--set", "calibration.text=none"],
            2,
            "none cannot be read (No such file or directory); a",
        ),
        (["plan", "{good}", *_GPTQ, "--set", "calibration.text=/proc"], 2, "calibration.text: /proc cannot be read (Is a directory)"),
        (
            ["plan", "{good}", *_BUDGET, "--set", "targets.0.budget.choices=[fp8-block]"],
            2,
            "error: --set targets.0.budget.choices=[fp8-block]: ",
        ),
        (["plan", "{good}", *_BUDGET, "--set", "targets.0.rules=[{match: linear, scheme: llm-int8}]"], 2, "cannot be llm-int8: "),
        (["convert", "{good}", *_BUDGET, "--set", "targets.0.budget.tokens=1000000"], 2, "149,928 tokens, 996,285 are needed"),
        (["convert", "{good}", *_BUDGET, "--set", "calibration.sequences=400"], 2, "149,928 tokens, 204,800 are needed"),
        (["plan", "{good}", "--set", "targets.0.ruined={at_most: 1, instead: llm-int8}", *_STATIC], 2, "instead: --set targets.0.rules="),
        (["sensitivity", "{good}", "--out", "{good}"], 2, "is in the way of"),
        (["sensitivity", "{good}", "--json", "/proc/n.json"], 3, "error: /proc/n.json: "),
        (["push", "{model}", "--repo", "x"], 2, "Invalid value for --repo: 'x': write organisation/name"),
        (["push", "{model}", "--repo", "a/b", "--revision", ""], 2, "Invalid value for --revision: ''"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["convert"], 2, "Missing argument 'RECIPE'"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(make_llama: Any, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    good = recipe(tmp_path, make_llama())
    bad = tmp_path / "bad.yaml"
    bad.write_text(good.read_text() + "    rulez: []\n")
    places = {"{good}": str(good), "{bad}": str(bad), "{model}": str(make_llama())}
    done = octavo(*(re.sub(r"\{\w+\}", lambda found: places[found[0]], argument) for argument in arguments), cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"job.yaml", "bad.yaml"}, "nothing was written"


def test_a_damaged_weight_is_named_and_nothing_is_written(make_llama: Any, tmp_path: Path) -> None:
    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][2, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = octavo_process("convert", recipe(tmp_path, folder), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: model.layers.0.mlp.up_proj.weight: nan at index [2, 3]")
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_a_damaged_artifact_is_exit_code_1(make_llama: Any, tmp_path: Path) -> None:
    assert octavo("convert", recipe(tmp_path, make_llama()), "--no-check", "--quiet", cwd=tmp_path).returncode == 0
    path = tmp_path / "artifacts" / "job" / "q"
    (path / "config.json").write_text("{}")
    done = octavo("verify", path)
    assert done.returncode == 1
    assert "config.json: " in done.stdout


def test_anybodys_checkpoint_is_linted(make_llama: Any) -> None:
    folder = make_llama()
    done = octavo("verify", folder)
    assert (done.returncode, done.stdout) == (0, f"{folder}: good (5 files, 21 tensors, no manifest, so nothing vouches for its bytes)\n")
    (folder / "tokenizer.json").unlink()
    done = octavo("verify", folder)
    assert done.returncode == 0, "a warning is none"
    assert done.stdout.startswith(
        "warning: tokenizer.json: no tokenizer: readers need one to take text [transformers, vLLM]; copy the source"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    done = octavo("verify", folder, "--json", "--quick")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["passed"] is False
    assert [(item["severity"], item["where"]) for item in found["findings"]] == [
        ("error", "model.embed_tokens.weight"),
        ("warning", "tokenizer.json"),
    ]


def test_the_plan_is_a_table_for_people_and_json_for_programs(make_llama: Any, tmp_path: Path) -> None:
    job = recipe(tmp_path, make_llama())
    shown = octavo("plan", job, "--ledger", cwd=tmp_path)
    assert "int8-dynamic" in shown.stdout
    assert "model.layers.0.mlp.up_proj.weight [96, 64] BF16 -> int8-dynamic rtn (default rule: linear)" in shown.stdout
    plan = json.loads(octavo("plan", job, "--json", cwd=tmp_path).stdout)
    assert len(plan["targets"][0]["ledger"]) == 21
    assert plan["needs"]["disk_bytes"] > plan["targets"][0]["weight_bytes"]
    assert not (tmp_path / "artifacts").exists()


def test_patterns_and_reasons_are_shown_as_they_stand(make_llama: Any, tmp_path: Path) -> None:
    rules = "[{match: 're:.*[qkv]_proj', scheme: int8-dynamic}, {match: linear, keep: true, why: 'see [red]docs[/red] [/]'}]"
    shown = octavo("plan", recipe(tmp_path, make_llama()), "--set", f"targets.0.rules={rules}").stdout
    assert "re:.*[qkv]_proj" in shown
    assert "see [red]docs[/red] [/]" in shown


#: The command, each tensor of whose conversion takes half a second, so that it is under way when a signal comes.
SLOW = """
import sys, time
from convert import command, export
finished = export._Writer.finished
def slowly(self, tensor):
    finished(self, tensor)
    time.sleep(0.5)
export._Writer.finished = slowly
sys.argv = ["octavo", *sys.argv[1:]]
command.main()
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_exit_code_130_and_says_how_to_go_on(make_llama: Any, tmp_path: Path, kind: signal.Signals) -> None:
    job = recipe(tmp_path, make_llama())
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "convert", str(job), "--no-check"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    journal = tmp_path / "artifacts" / "job" / ".q.partial" / "journal"
    deadline = time.monotonic() + 120
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted; run the same command again to go on where it stopped"
    assert "Traceback" not in errors
    assert octavo("convert", job, "--no-check", "--quiet", cwd=tmp_path).returncode == 0


def test_doctor_names_versions_devices_and_runtimes() -> None:
    found = json.loads(octavo("doctor", "--json").stdout)
    assert found["versions"]["torch"][0].isdigit()
    assert found["runtimes"]["transformers"].startswith("loads compressed-tensors, fp8")


def test_doctor_says_what_is_compiled_whenever_a_command_starts(tmp_path: Path) -> None:
    def bytecode(**variables: str) -> str:
        program = "from convert.doctor import _bytecode; print(_bytecode())"
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")}
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, check=True, env={**environment, **variables}).stdout.strip()

    elsewhere = {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    assert bytecode(**elsewhere) == "kept"
    said = bytecode(**elsewhere, PYTHONDONTWRITEBYTECODE="1")
    assert said.startswith("not kept of torch, sympy, transformers, which are compiled"), said
    folders = [str(Path(str(find_spec(name).origin)).parent) for name in ("torch", "sympy", "transformers")]  # type: ignore[union-attr]
    assert said.endswith(f"; run: {sys.executable} -m compileall -q {' '.join(folders)}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-int8", "llama-fp8"])
def test_a_recipe_passes_on_the_sample(name: str, tmp_path: Path) -> None:
    """The main job, on the real model; a quarter of the usual tokens, because the full check is the command's own business."""
    done = octavo("convert", name, "--set", "validation.tokens=1024", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Paris" in done.stdout


def test_sensitivity_is_a_table_numbers_and_a_drawing(make_llama: Any, tmp_path: Path) -> None:
    done = octavo(
        "sensitivity", recipe(tmp_path, make_llama()), "--tokens", 32, "--scheme", "fp8-dynamic", "--json", "n.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.self_attn.{q_proj, k_proj, v_proj}" in done.stdout
    found = json.loads((tmp_path / "n.json").read_text())
    assert len(found["groups"]) == 9
    assert all(group["kl_nats"] > 0 and group["scheme"] == "fp8-dynamic" for group in found["groups"])
    assert "<svg" in (tmp_path / "artifacts" / "job" / "sensitivity.svg").read_text()
    refused = octavo("sensitivity", recipe(tmp_path, make_llama()), "--scheme", "int9", cwd=tmp_path)
    assert (refused.returncode, "no scheme is called 'int9'" in refused.stderr) == (2, True)
