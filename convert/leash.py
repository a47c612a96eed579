"""Programs that end with whoever began them, whatever ends that: a ``kill -9`` of ours would otherwise leave a runtime that goes on for
minutes, with gigabytes, on a GPU too.

Run as a file, ``python leash.py PID COMMAND...``, it becomes that command.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing and pathlib would take longer than all else here
    from collections.abc import Sequence
    from pathlib import Path

#: Of Linux, <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def leashed(command: Sequence[str | Path]) -> list[str | Path]:
    """A command that, on Linux, is killed when the thread that runs it ends, which has to wait for it. It costs the start of a bare Python,
    20 ms."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command] if sys.platform == "linux" else list(command)


def end_with(parent: int) -> None:
    """Has the kernel kill this process, and what it becomes by an exec, when the thread that began it ends; ``parent`` is that of it."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:  # it has ended before that
        os._exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    try:
        os.execvp(sys.argv[2], sys.argv[2:])
    except OSError as error:
        sys.exit(f"{sys.argv[2]}: {error.strerror}")
