"""What hardware this machine is, in the words of :data:`formats.compatibility.HARDWARE`."""

from __future__ import annotations

import os
from pathlib import Path

#: What eight-bit arithmetic on a CPU lives on, as Linux names it.
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve")


def this_machine() -> str:
    """The tag of the first CUDA device (``sm_90``), or of the CPU where there is none."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"sm_{major}{minor}"
    return cpu_tag(instructions())


def cpu_tag(flags: set[str]) -> str:
    """``cpu-amx``, ``cpu-vnni`` or ``cpu``, by a processor's instructions."""
    if "amx_int8" in flags:
        return "cpu-amx"
    return "cpu-vnni" if flags & {"avx512_vnni", "avx_vnni"} else "cpu"


def let_segments_grow() -> None:
    """Before torch first uses a GPU: its allocator shall grow pieces of memory rather than keep some of every size, which for one block of
    Llama-8B takes 17 GB where 12 are in use. What the user has set stays."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def instructions() -> set[str]:
    """Those of :data:`INSTRUCTIONS` that this machine has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return set(INSTRUCTIONS) & set(line.split())
