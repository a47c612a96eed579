"""The five errors a bitsandbytes user meets, each made real: real folders, the real loaders, their own exceptions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_family
from safetensors.torch import load_file, save_file

from convert.ailments import AILMENTS, ATTENTION, FLAG, FLOAT, MEMORY, REPEATED, explain, last_lines, recognise, repeated_share
from convert.child import run_program
from convert.diagnosis import UNKNOWN, Diagnosis, diagnose
from formats.errors import FormatError

Edit = Callable[[dict[str, Any]], object]
LAST = "model.layers.1.mlp.down_proj"


def found(folder: Path) -> Diagnosis:
    """The one ailment that a folder has."""
    (diagnosis,) = [item for item in diagnose(folder) if item.found]
    return diagnosis


def run_it(folder: Path) -> Any:
    """What transformers with bitsandbytes makes of a folder in this process, whatever the headers say; it must compute something."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    return model


@pytest.fixture
def eight_bit(make_llama: Any, tmp_path: Path) -> Callable[..., Path]:
    """``eight_bit(config=edit, tensors=edit)``: a Llama as bitsandbytes saves it, then edited."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def make(*, config: Edit | None = None, tensors: Edit | None = None, source: Path | None = None, **options: Any) -> Path:
        model = source or make_llama()
        folder = tmp_path / f"eight-bit-{len(list(tmp_path.iterdir()))}"
        quantization = BitsAndBytesConfig(load_in_8bit=True, **options)
        AutoModelForCausalLM.from_pretrained(model, quantization_config=quantization).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model / name, folder / name)
        edit(folder, config, tensors)
        return folder

    return make


def edit(folder: Path, config: Edit | None, tensors: Edit | None) -> None:
    if config:
        found = json.loads((folder / "config.json").read_text())
        config(found)
        (folder / "config.json").write_text(json.dumps(found))
    if tensors:
        weights = load_file(folder / "model.safetensors")
        tensors(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def apply(folder: Path, diagnosis: Diagnosis) -> None:
    """Does what a remedy about config.json says, after which the headers must be good."""
    _, _, section = diagnosis.remedy.partition('"quantization_config": ')
    right, _ = json.JSONDecoder().raw_decode(section)
    edit(folder, lambda config: config.update(quantization_config=right), None)
    assert not any(item.found for item in diagnose(folder, run=False))


@pytest.fixture
def at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lines that every Python process started from here runs first, as a machine that lacks something would behave."""

    def install(lines: str) -> None:
        (tmp_path / "start").mkdir(exist_ok=True)
        (tmp_path / "start" / "sitecustomize.py").write_text(lines)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'start'}:{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parents[2]}")

    return install


# Good folders


@pytest.mark.parametrize("skipped", [None, [], ["lm_head", "down_proj"]], ids=["automatic", "a quantized head", "more"])
def test_the_headers_of_what_bitsandbytes_saves_are_good(skipped: Any, eight_bit: Any) -> None:
    assert not any(item.found for item in diagnose(eight_bit(llm_int8_skip_modules=skipped), run=False))


def test_a_good_folder_has_none(eight_bit: Any) -> None:
    folder = eight_bit()
    assert [(item.name, item.found) for item in diagnose(folder)] == [(name, False) for name in AILMENTS]
    assert [item.found for item in diagnose(folder, run=False)] == [False, None, None, None, False]


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config.json"):
        diagnose(tmp_path)


# load_in_8bit missing


@pytest.mark.parametrize("with_method", [True, False])
def test_load_in_8bit_missing(with_method: bool, eight_bit: Any) -> None:
    """transformers 5.23 loads the codes as weights and says nothing, or, without quant_method, raises an error about that."""

    def older(config: dict[str, Any]) -> None:
        method = {"quant_method": "bitsandbytes"} if with_method else {}
        config["quantization_config"] = {**method, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None}

    folder = eight_bit(config=older)
    if with_method:
        assert run_it(folder).get_submodule(LAST).weight.dtype == torch.bfloat16
    else:
        with pytest.raises(ValueError, match="quant_method") as caught:
            run_it(folder)
        assert recognise(str(caught.value)) == FLAG
    diagnosis = found(folder)
    assert diagnosis.name == FLAG
    assert '"load_in_8bit": true' in diagnosis.remedy
    apply(folder, diagnosis)


# Loaded as float


@pytest.mark.parametrize(
    ("section", "why"),
    [
        (None, "no quantization_config"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": False}, "load_in_8bit: false"),
        ({"quant_method": "compressed-tensors", "config_groups": {}, "format": "dense"}, "a quantization_config of compressed-tensors"),
    ],
)
def test_saved_in_8_bit_and_loaded_as_float(section: Any, why: str, eight_bit: Any) -> None:
    folder = eight_bit(config=lambda config: config.update(quantization_config=section) if section else config.pop("quantization_config"))
    if not section or section["quant_method"] == "bitsandbytes":
        assert run_it(folder).get_submodule(LAST).weight.dtype == torch.bfloat16, "and says nothing"
    diagnosis = found(folder)
    assert diagnosis.name == FLOAT
    assert f"14 weights are int8 codes (the first: model.layers.0.mlp.down_proj), but config.json has {why}" in diagnosis.what
    apply(folder, diagnosis)


# No attention kernel


@pytest.mark.slow
def test_no_attention_kernel(eight_bit: Any, at_start: Any) -> None:
    folder = eight_bit()
    at_start(
        "import torch\n"
        "for kind in ('math', 'flash', 'mem_efficient', 'cudnn'):\n"
        "    getattr(torch.backends.cuda, f'enable_{kind}_sdp')(False)\n"
    )
    diagnosis = found(folder)
    assert diagnosis.name == ATTENTION
    assert 'attn_implementation="eager"' in diagnosis.remedy
    cured = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M; "
        "M.from_pretrained(sys.argv[1], attn_implementation='eager')(input_ids=torch.ones(1, 4, dtype=torch.long))"
    )
    done = subprocess.run([sys.executable, "-c", cured, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Out of memory


@pytest.mark.slow
def test_out_of_memory_while_quantizing(make_llama: Any, at_start: Any, tmp_path: Path) -> None:
    """A process that may hold what loading a small model takes, and the file, but not what quantizing its matrices takes besides."""
    peak = tmp_path / "peak"
    at_start(
        "import os, pathlib\n"
        "def note(code, leave=os._exit):\n"
        "    status = pathlib.Path('/proc/self/status').read_text()\n"
        f"    pathlib.Path({str(peak)!r}).write_text(next(l.split()[1] for l in status.splitlines() if l.startswith('VmPeak')))\n"
        "    leave(code)\n"
        "os._exit = note\n"
    )
    small = make_llama()
    assert not any(item.found for item in diagnose(small))
    size = save_zeros(tmp_path / "large")
    limit = int(peak.read_text()) * 1024 + 2 * size
    at_start(f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n")
    assert not any(item.found for item in diagnose(small)), "the limit is none for a small model"
    diagnosis = found(tmp_path / "large")
    assert diagnosis.name == MEMORY
    assert diagnosis.what == "memory ran out while the weights were quantized"
    assert f"octavo convert llama-bnb-int8 --model {tmp_path / 'large'}" in diagnosis.remedy


def save_zeros(folder: Path) -> int:
    """A Llama of few, large matrices; its size in bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=2048, intermediate_size=16384, num_hidden_layers=1, num_attention_heads=16, vocab_size=300)
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in names.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("quantized", [True, False])
def test_more_than_the_machine_has_is_seen_without_trying(
    quantized: bool, eight_bit: Any, make_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import diagnosis as module

    folder = eight_bit() if quantized else make_llama()
    monkeypatch.setattr(module, "_free_bytes", lambda _: 100_000)
    diagnosis = found(folder)
    assert diagnosis.name == MEMORY
    assert "0.00 GB are free" in diagnosis.what
    assert ("octavo convert" in diagnosis.remedy) == (not quantized)
    assert {item.name: item.found for item in diagnose(folder)} == {
        FLAG: False,
        FLOAT: False,
        ATTENTION: None,
        REPEATED: None,
        MEMORY: True,
    }


# One repeated token


def press(weights: dict[str, Any], module: str) -> None:
    half = weights[f"{module}.weight"].half().float()
    magnitudes = half.abs().amax(1)
    weights |= {
        f"{module}.weight": (half * (127 / magnitudes[:, None])).round().to(torch.int8),
        f"{module}.SCB": magnitudes,
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def skipping(*modules: str) -> Edit:
    return lambda config: config["quantization_config"].update(llm_int8_skip_modules=list(modules))


@pytest.mark.parametrize(
    ("config", "tensors", "what"),
    [
        (
            None,
            lambda weights: press(weights, "lm_head"),
            "leaves out, when nothing is said, lm_head, whose weights are int8 codes (lm_head is the output head)",
        ),
        (skipping("lm_head", "q_proj"), None, "names model.layers.0.self_attn.q_proj and 1 more, whose"),
        (skipping(), None, "does not name lm_head, whose weights are floats (lm_head is the output head)"),
    ],
    ids=["quantized head not said", "names codes", "does not name floats"],
)
def test_wrong_skip_modules(config: Any, tensors: Any, what: str, eight_bit: Any) -> None:
    folder = eight_bit(config=config, tensors=tensors)
    with pytest.raises((RuntimeError, AttributeError)) as caught:
        run_it(folder)
    assert recognise(str(caught.value)) == REPEATED
    diagnosis = found(folder)
    assert diagnosis.name == REPEATED
    assert what in diagnosis.what
    apply(folder, diagnosis)


@pytest.mark.slow
def test_a_quantized_head_that_repeats_one_token_is_named(eight_bit: Any, make_llama: Any) -> None:
    """A head with one column of outliers ranks tokens by the others, which 8 bit rounds to zero: bitsandbytes saves it without a word."""
    model = make_llama()
    edit(model, None, outlying_head)
    assert not any(item.found for item in diagnose(eight_bit(source=model))), "with its head in 16 bit it does not repeat itself"
    diagnosis = found(eight_bit(source=model, llm_int8_skip_modules=[]))
    assert diagnosis.name == REPEATED
    assert "lm_head, the output head, is quantized" in diagnosis.what
    assert "keep lm_head" in diagnosis.remedy


def outlying_head(weights: dict[str, Any]) -> None:
    weights["lm_head.weight"][:, 7] = 300.0
    weights["model.norm.weight"][7] = 1e-3


def test_one_token_for_another_reason_names_what_is_quantized(eight_bit: Any) -> None:
    diagnosis = found(eight_bit(tensors=lambda weights: weights["model.norm.weight"].zero_()))
    assert diagnosis.name == REPEATED
    assert diagnosis.what == "one token makes up 100% of what it writes; the head is not quantized, 14 other layers are"


# What is none of the five, and what other programs print


def test_another_failure_is_said_to_be_another(eight_bit: Any) -> None:
    diagnosis = found(eight_bit(config=lambda config: config.update(vocab_size=301)))
    assert diagnosis.name == UNKNOWN
    assert "it does not run" in diagnosis.what


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("AttributeError: 'dict' object has no attribute 'load_in_8bit'", FLAG),
        ("RuntimeError: No available kernel. Aborting execution.", ATTENTION),
        ("RuntimeError: cutlassF: no kernel found to launch!", ATTENTION),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", MEMORY),
        ("\nit was killed by signal 9", MEMORY),
        ("\nit was killed by signal 11", None),
        ("KeyError: 'llama'", None),
        ("", None),
    ],
)
def test_what_other_versions_and_devices_print_is_known(output: str, name: str | None) -> None:
    """As reported for torch 2.0 on a V100, on CUDA devices, and for transformers 4.31."""
    assert recognise(output) == name
    said = explain(output)
    assert (AILMENTS[name].remedy in said) if name else (said == (" ".join(output.split()) or "it said nothing"))


def test_a_failure_in_a_check_says_the_remedy(eight_bit: Any, at_start: Any, tmp_path: Path) -> None:
    from convert.child import run

    folder = eight_bit()
    at_start("import torch\ntorch.cuda.is_available()\nraise SystemExit(print('CUDA out of memory') or 1)\n")
    answer, failure = run("convert.runtimes.bitsandbytes", {"artifact": str(folder)}, tmp_path)
    assert answer is None
    assert AILMENTS[MEMORY].remedy in failure
    assert run_program("convert.runtimes.bitsandbytes", {"artifact": str(folder)}, tmp_path)[0] is None


def test_the_share_of_one_token() -> None:
    assert repeated_share([]) == 0
    assert repeated_share([1, 2, 1, 1]) == 0.75


def test_codes_in_a_layer_that_bitsandbytes_leaves(tmp_path: Path) -> None:
    """Falcon's linear layers are of a class of their own."""
    from transformers import BitsAndBytesConfig

    folder, module = save_family("falcon", tmp_path), "transformer.h.0.mlp.dense_h_to_4h"
    section = {**BitsAndBytesConfig(load_in_8bit=True).to_dict(), "quant_method": "bitsandbytes"}
    edit(folder, lambda config: config.update(quantization_config=section), lambda weights: press(weights, module))
    with pytest.raises(RuntimeError, match="signed char"):
        run_it(folder)
    diagnosis = found(folder)
    assert diagnosis.name == REPEATED
    assert diagnosis.what.startswith(f"{module} hold int8 codes and are no torch.nn.Linear")


def test_what_a_program_ended_with_is_said_without_the_marks_under_it() -> None:
    said = "Traceback (most recent call last):\n  File x, line 768, in forward\n    y = outputs[0],\n        ~~~~~~~^^^\nKeyError: 0\n"
    assert last_lines(said) == "y = outputs[0], KeyError: 0"
