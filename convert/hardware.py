"""What hardware this machine is, in the words of :data:`formats.compatibility.HARDWARE`."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
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


def keep_freed_memory() -> None:
    """Lets glibc's allocator hand what is freed to the next that asks, rather than back to the system, which clears every page of it again:
    of threads that make and drop many arrays of a megabyte that was a tenth of the time. Another C library is left as it is."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for size in (32 << 20, 1 << 30):  # the largest that glibc before 2.35 takes
            mallopt(-3, size)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def instructions() -> set[str]:
    """Those of :data:`INSTRUCTIONS` that this machine has."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return set(INSTRUCTIONS) & set(line.split())
