"""What a person sees while long work runs: one interface, three ways to show it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Advance(Protocol):
    """Counts what a stage has moved; ``note``: how it stands with what it does, in a few words."""

    def __call__(self, count: int, note: str = "", /) -> None: ...


class Progress(Protocol):
    """Shown to the user; every method may be called from any thread."""

    def stage(self, name: str, total: int, *, unit: str = "bytes") -> AbstractContextManager[Advance]:
        """Opens a stage that moves ``total`` bytes, or tokens, each of them through every block; the function it gives counts them."""

    def say(self, message: str) -> None:
        """One line about what happens now."""


class Quiet:
    """Shows nothing."""

    @contextmanager
    def stage(self, name: str, total: int, *, unit: str = "bytes") -> Iterator[Advance]:  # noqa: ARG002
        yield lambda count, note="": None  # noqa: ARG005

    def say(self, message: str) -> None:
        pass


QUIET = Quiet()


class Lines:
    """Plain lines on standard error, for logs: at most one every ten seconds, and one at the end of each stage."""

    interval_seconds = 10.0

    @contextmanager
    def stage(self, name: str, total: int, *, unit: str = "bytes") -> Iterator[Advance]:
        scale, short = (1e9, "GB") if unit == "bytes" else (1e3, f"thousand {unit}")
        started = shown = time.monotonic()
        done = 0

        noted = ""

        def advance(count: int, note: str = "", /) -> None:
            nonlocal done, shown, noted
            done += count
            noted = note and f", {note}"
            now = time.monotonic()
            if now - shown >= self.interval_seconds:
                shown = now
                rate = done / (now - started)
                left = (total - done) / rate
                self.say(
                    f"{name}: {done / scale:.2f} of {total / scale:.2f} {short}, {rate / scale:.2f} {short}/s, {left:.0f} s left{noted}"
                )

        yield advance
        seconds = max(time.monotonic() - started, 1e-9)
        self.say(f"{name}: {done / scale:.2f} {short} in {seconds:.1f} s, {done / seconds / scale:.2f} {short}/s{noted}")

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


class Bars:
    """Progress bars with throughput and time left, on a terminal."""

    @contextmanager
    def stage(self, name: str, total: int, *, unit: str = "bytes") -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        counted = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
        columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
        with RichProgress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total)

            def advance(count: int, note: str = "", /) -> None:
                bar.update(task, advance=count, description=f"{name}: {note}" if note else None)

            yield advance

    def say(self, message: str) -> None:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(message, style="dim")


def choose(*, quiet: bool) -> Progress:
    """Bars on a terminal, lines elsewhere, nothing when asked for quiet."""
    if quiet:
        return QUIET
    return Bars() if sys.stderr.isatty() else Lines()
