"""Whether a model folder has one of the five errors a bitsandbytes user meets, seen in its headers or by running it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.ailments import AILMENTS, FLAG, FLOAT, MEMORY, REPEATED, REPEATED_SHARE, last_lines, recognise, repeated_share
from convert.architecture import Architecture, describe
from convert.child import run_program, threads
from formats.bitsandbytes import THRESHOLD, quantization_config
from formats.errors import FormatError
from formats.safetensors import TensorSpec, read_folder, read_json
from formats.skips import skip_list, skips

QUESTION = "What is the capital of France?"
NEW_TOKENS = 32
UNKNOWN = "something else"

#: What ``config.json`` and headers alone decide; the others show when the folder is run.
HEADERS = (FLAG, FLOAT)


@dataclass(frozen=True)
class Diagnosis:
    """``found`` is None for what could not be looked for; ``what`` then says why."""

    name: str
    found: bool | None
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class _Model:
    """A folder as its headers show it. ``codes``: modules whose weights are codes of LLM.int8(). ``section``: its quantization_config."""

    folder: Path
    section: Any
    tensors: Mapping[str, TensorSpec]
    architecture: Architecture | None
    codes: tuple[str, ...]

    @property
    def ours(self) -> bool:
        """Whether the config is one of LLM.int8(), or none of any other kind."""
        section = self.section
        return (
            isinstance(section, dict) and section.get("quant_method", "bitsandbytes") == "bitsandbytes" and not section.get("load_in_4bit")
        )

    def kept(self) -> list[str]:
        """The modules that readers would replace unless told not to, and whose weights are floats."""
        replaceable = self.architecture.replaceable if self.architecture else frozenset()
        linears = self.architecture.linears if self.architecture else ()
        return [module for module in linears if module in replaceable and module not in self.codes]

    def cure(self) -> str:
        """The ``quantization_config`` that the tensors ask for."""
        skipped = skip_list(self.codes, self.kept(), self.architecture.skipped if self.architecture else ())
        threshold = self.section.get("llm_int8_threshold") if isinstance(self.section, dict) else None
        section = json.dumps(quantization_config(skipped, llm_int8_threshold=THRESHOLD if threshold is None else threshold))
        return f'{self.folder / "config.json"} must have "quantization_config": {section}'


def diagnose(folder: Path, *, device: str = "cpu", run: bool = True) -> list[Diagnosis]:
    """Looks for every ailment in a model folder: in its headers, and when those show none, by loading and running it in a process of
    its own, unless ``run`` is false. Raises :class:`FormatError` when the folder holds no model that can be read."""
    model = _read(folder)
    found = _look_at_config(model) or _look_at_skip_modules(model) or _look_at_memory(model, device)
    ran = run and not found
    if ran:
        found = _look_at_run(model, device)
    why = "cure the other first" if found else "it was not run"
    by_name = {
        name: Diagnosis(name, False, "not seen") if ran or name in HEADERS else Diagnosis(name, None, f"not looked for: {why}")
        for name in AILMENTS
    }
    return list({**by_name, **{diagnosis.name: diagnosis for diagnosis in found}}.values())


def _read(folder: Path) -> _Model:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{folder / 'config.json'}: not a JSON object")
    tensors = {name: item.spec for name, item in read_folder(folder).items()}
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    architecture = describe(plain, tensors, folder=folder)
    codes = [
        architecture.parameters[name].modules[0] if architecture else name.removesuffix(".weight")
        for name, spec in tensors.items()
        if name.endswith(".weight") and spec.dtype == "I8" and f"{name.removesuffix('weight')}SCB" in tensors
    ]
    return _Model(folder, config.get("quantization_config"), tensors, architecture, tuple(codes))


def _look_at_config(model: _Model) -> list[Diagnosis]:
    if model.ours and "load_in_8bit" not in model.section:
        return [Diagnosis(FLAG, True, AILMENTS[FLAG].message, model.cure())]
    if not model.codes or (model.ours and model.section["load_in_8bit"]):
        return []
    if not model.section:
        why = "no quantization_config"
    elif model.ours:
        why = "load_in_8bit: false"
    else:
        why = f"a quantization_config of {model.section.get('quant_method') if isinstance(model.section, dict) else 'another kind'}"
    what = f"{len(model.codes)} weights are int8 codes (the first: {model.codes[0]}), but config.json has {why}: they load as floats"
    return [Diagnosis(FLOAT, True, what, f"{model.cure()}; pass no other to from_pretrained")]


def _look_at_skip_modules(model: _Model) -> list[Diagnosis]:
    if model.architecture is None or not model.ours:
        return []
    foreign = [module for module in model.codes if module not in model.architecture.replaceable]
    if foreign:
        what = f"{_several(foreign)} hold int8 codes and are no torch.nn.Linear or Conv1D: bitsandbytes replaces no other class"
        return [Diagnosis(REPEATED, True, what, "quantize it again from the source and keep them")]
    said = model.section.get("llm_int8_skip_modules")
    patterns = model.architecture.skipped if said is None else said
    wrong = [module for module in model.codes if skips(module, patterns)]
    unnamed = [module for module in model.kept() if not skips(module, patterns)]
    if not wrong and not unnamed:
        return []
    how = "leaves out, when nothing is said," if said is None else "names"
    whats = [f"{how} {_several(wrong)}, whose weights are int8 codes"] if wrong else []
    whats += [f"does not name {_several(unnamed)}, whose weights are floats"] if unnamed else []
    head = f" ({model.architecture.head} is the output head)" if model.architecture.head in (*wrong, *unnamed) else ""
    return [Diagnosis(REPEATED, True, f"llm_int8_skip_modules {' and '.join(whats)}{head}: what it writes is noise", model.cure())]


def _look_at_memory(model: _Model, device: str) -> list[Diagnosis]:
    """The files and what they become are held at once; transformers' threads may hold more for a while, so this is the least it takes."""
    stored = sum(spec.size_bytes for spec in model.tensors.values())
    free = _free_bytes(device)
    if model.section:
        if stored <= free:
            return []
        what = f"its weights take {stored / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        return [Diagnosis(MEMORY, True, what, "free memory, or load it on several devices: device_map='auto'")]
    codes = sum(spec.elements for name, spec in model.tensors.items() if _is_replaced(name, model.architecture))
    if stored + codes <= free:
        return []
    what = f"at least {(stored + codes) / 1e9:.2f} GB are needed to quantize it while it loads, {free / 1e9:.2f} GB are free"
    return [Diagnosis(MEMORY, True, what, _convert_once(model))]


def _look_at_run(model: _Model, device: str) -> list[Diagnosis]:
    answer, output = _run(model.folder, device)
    if answer is None:
        name = recognise(output)
        if name is None:
            return [Diagnosis(UNKNOWN, True, f"it does not run: {last_lines(output)}", "this is none of the five")]
        remedy = _convert_once(model) if name == MEMORY and not model.section else AILMENTS[name].remedy
        what = (
            f"{AILMENTS[name].message} while the weights were quantized" if name == MEMORY and not model.section else AILMENTS[name].message
        )
        return [Diagnosis(name, True, what, remedy)]
    share = repeated_share(answer["generated"])
    if len(answer["generated"]) < 8 or share <= REPEATED_SHARE:
        return []
    return [_blame(share, [module for module, dtype in answer["module_dtypes"].items() if dtype == "int8"], model)]


def _blame(share: float, quantized: Sequence[str], model: _Model) -> Diagnosis:
    head = model.architecture.head if model.architecture else None
    if head in quantized:
        what = f"one token makes up {share:.0%} of what it writes, and {head}, the output head, is quantized"
        return Diagnosis(REPEATED, True, what, f"quantize it again from the source and keep {head}: name it in llm_int8_skip_modules")
    what = f"one token makes up {share:.0%} of what it writes; the head is not quantized, {len(quantized)} other layers are"
    return Diagnosis(
        REPEATED, True, what, "if the source does not do the same, quantize it again and keep more layers, the last ones first"
    )


def _run(folder: Path, device: str) -> tuple[dict[str, Any] | None, str]:
    """What :mod:`convert.runtimes.bitsandbytes` answered, or None and everything it printed."""
    import numpy as np

    ids = _prompt(folder)
    with tempfile.TemporaryDirectory(prefix="octavo-doctor-") as name:
        scratch = Path(name)
        np.save(scratch / "tokens.npy", np.array([ids], dtype=np.int64))
        request = {
            "artifact": str(folder),
            "tokens": str(scratch / "tokens.npy"),
            "logits": os.devnull,
            "prompt": ids,
            "new_tokens": NEW_TOKENS,
            "dtype": "auto",
            "device": device,
            "threads": threads(),
            "trust_remote_code": False,
        }
        return run_program("convert.runtimes.bitsandbytes", request, scratch)


def _prompt(folder: Path) -> list[int]:
    """A question in tokens; without a tokenizer any tokens will do, for a good head gives different successors."""
    from transformers import AutoTokenizer

    try:
        return list(AutoTokenizer.from_pretrained(str(folder), local_files_only=True)(QUESTION).input_ids)
    except Exception:  # noqa: BLE001  tokenizers fail in as many ways as there are tokenizers
        return list(range(1, 9))


def _is_replaced(tensor: str, architecture: Architecture | None) -> bool:
    if architecture is None or not tensor.endswith(".weight"):
        return False
    return any(
        module in architecture.replaceable and not skips(module, architecture.skipped) for module in architecture.parameters[tensor].modules
    )


def _convert_once(model: _Model) -> str:
    return f"write the 8-bit weights once, tensor by tensor, and load those: octavo convert llama-bnb-int8 --model {model.folder}"


def _free_bytes(device: str) -> int:
    if device == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    import torch

    return int(torch.cuda.mem_get_info()[0])


def _several(modules: Sequence[str]) -> str:
    return modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more"
