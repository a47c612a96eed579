"""Imports of what is large."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps Python's collector of garbage away while torch and transformers are imported, and from what they made for good: of a million
    objects all stay, and to find that again and again is a sixth of the time, and once more after it a tenth."""
    enabled, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if len(sys.modules) > known:
                gc.freeze()
            gc.enable()
