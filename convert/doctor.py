"""What this machine has, and what each runtime on it can do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import cache_from_source, find_spec

from convert import __version__, environments
from convert.hardware import instructions, this_machine
from convert.runtimes import RUNTIMES, Runtime
from formats.errors import MachineError

#: What most of the 3,000 files are of that a plan imports.
IMPORTED = ("torch", "sympy", "transformers", "convert")
PACKAGES = ("torch", "transformers", "compressed-tensors", "huggingface-hub", "safetensors", "tokenizers", "gguf", "ml_dtypes")


def examine() -> dict[str, dict[str, str]]:
    """Facts by section, every value ready to print."""
    return {"versions": _versions(), "machine": _machine(), "devices": _devices(), "runtimes": _runtimes()}


def _versions() -> dict[str, str]:
    return {"octavo": __version__, "python": platform.python_version(), **{name: _version(name) or "not installed" for name in PACKAGES}}


def _machine() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(".")
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(len(os.sched_getaffinity(0))),
        "instructions": " ".join(sorted(instructions())) or "none that matter here",
        "8-bit hardware": this_machine(),
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free",
        "disk here": f"{disk.total / 1e9:.1f} GB, {disk.free / 1e9:.1f} GB free",
        "bytecode": _bytecode(),
    }


def _bytecode() -> str:
    """Whether Python keeps what it compiles of what it imports. Where it may not (``PYTHONDONTWRITEBYTECODE``, a folder that is read-only)
    and nobody else has done it, it compiles torch and the rest anew in every process: seconds, most of what a command takes to start."""
    origins = {name: str(spec.origin) for name in IMPORTED if (spec := find_spec(name)) is not None}
    folders = {name: os.path.dirname(origin) for name, origin in origins.items() if not os.path.exists(cache_from_source(origin))}
    writable = all(os.access(folder, os.W_OK) for folder in folders.values()) or sys.pycache_prefix is not None
    if not folders or (writable and not sys.dont_write_bytecode):
        return "kept"
    place = "" if writable else "set PYTHONPYCACHEPREFIX to a folder of yours, and "
    run = f"{place}run: {sys.executable} -m compileall -q {' '.join(folders.values())}"
    return f"not kept of {', '.join(folders)}, which are compiled whenever a command starts, for seconds; {run}"


def _devices() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {"cuda": "none"}
    found = {}
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        native = (
            "INT8 and FP8"
            if (properties.major, properties.minor) >= (8, 9)
            else "INT8"
            if (properties.major, properties.minor) >= (7, 5)
            else "no"
        )
        found[f"cuda:{i}"] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 1e9:.0f} GB, {native} tensor cores"
        )
    return found


def _runtimes() -> dict[str, str]:
    found = {}
    for name, runtime in RUNTIMES.items():
        if runtime.environment:
            found[name] = _environment(name, runtime)
            continue
        missing = {form: [p for p in (*runtime.needs, *further) if not _version(p)] for form, further in runtime.formats.items()}
        loads = [f"loads {', '.join(form for form in missing if not missing[form])}"] if not all(missing.values()) else []
        found[name] = "; ".join([*loads, *(f"cannot load {form}: pip install {' '.join(m)}" for form, m in missing.items() if m)])
    return found


def _environment(name: str, runtime: Runtime) -> str:
    try:
        return f"loads {', '.join(runtime.formats)} ({environments.describe(name)})"
    except MachineError as error:
        return f"cannot load {', '.join(runtime.formats)}: {error}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
