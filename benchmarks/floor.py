"""The floor of a conversion: every source byte read once, as many bytes written once, at the same time, and nothing in between.

    python benchmarks/floor.py MODEL OUT --bytes-out N

Readers take the source, warm in the page cache, chunk by chunk into one buffer each; writers put random bytes into preallocated files.
Which way of writing is fastest depends on the machine, so all are tried and the best one is the floor. No run syncs, as no converter
does. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from measure import delete

#: A buffer this large stays in a core's second-level cache from one read to the next.
READ_BYTES = 1 << 20
#: Direct writes go to the device as they are: larger ones queue better.
DIRECT_BYTES = 8 << 20
#: O_DIRECT wants offsets, lengths and addresses in multiples of the device's block, 4096 at most.
ALIGNMENT = 4096


@dataclass(frozen=True)
class Way:
    """How to write: how many threads, into how many files they share, and whether past the page cache."""

    name: str
    writers: int
    files: int
    direct: bool


WAYS = (
    Way("buffered, 1 writer", 1, 1, direct=False),
    Way("buffered, 2 writers, 1 file", 2, 1, direct=False),
    Way("buffered, 2 writers, 2 files", 2, 2, direct=False),
    Way("direct, 2 writers, 1 file", 2, 1, direct=True),
    Way("direct, 2 writers, 2 files", 2, 2, direct=True),
    Way("direct, 4 writers, 4 files", 4, 4, direct=True),
)


def floor(model: Path, out: Path, *, bytes_out: int, readers: int) -> dict[str, float | None]:
    """Seconds by way of writing; None where the file system has no direct writes. Each run's files are deleted before the next."""
    sources = sorted(model.glob("*.safetensors"))
    # Random, so that a device that folds equal or empty blocks has nothing to fold; a map, so that it is aligned.
    random = mmap.mmap(-1, DIRECT_BYTES)
    random[:] = os.urandom(DIRECT_BYTES)
    seconds: dict[str, float | None] = {}
    for way in WAYS:
        delete(out)
        os.sync()
        out.mkdir(parents=True)
        try:
            seconds[way.name] = _overlapped(sources, out, way, memoryview(random), bytes_out=bytes_out, readers=readers)
        except OSError as error:
            if not way.direct or error.errno != errno.EINVAL:
                raise
            seconds[way.name] = None
    delete(out)
    return seconds


def _overlapped(sources: Sequence[Path], out: Path, way: Way, random: memoryview, *, bytes_out: int, readers: int) -> float:
    step = DIRECT_BYTES if way.direct else READ_BYTES
    share = -(-bytes_out // way.files)
    with ExitStack() as stack:
        started = time.perf_counter()
        chunks: list[tuple[int, int, int]] = []
        for path in sources:
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            size = os.fstat(descriptor).st_size
            chunks += [(descriptor, start, min(READ_BYTES, size - start)) for start in range(0, size, READ_BYTES)]
        targets: list[tuple[int, int]] = []
        for number in range(way.files):
            descriptor = os.open(out / str(number), os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if way.direct else 0), 0o644)
            stack.callback(os.close, descriptor)
            size = min(share, bytes_out - number * share)
            os.posix_fallocate(descriptor, 0, -(-size // ALIGNMENT) * ALIGNMENT)
            targets.append((descriptor, size))
        work = [_reader(chunks)] * readers
        for number in range(way.writers):
            descriptor, size = targets[number % way.files]
            starts = range(number // way.files * step, size, way.writers // way.files * step)
            work.append(_writer(descriptor, starts, random[:step], size, direct=way.direct))
        _run_all(work)
        for descriptor, size in targets:
            os.ftruncate(descriptor, size)
        return time.perf_counter() - started


def _reader(chunks: Sequence[tuple[int, int, int]]) -> Callable[[], None]:
    """Work for any number of threads: they take the chunks (descriptor, start, length) in turn."""
    tickets = itertools.count()

    def read() -> None:
        buffer = memoryview(mmap.mmap(-1, READ_BYTES))
        while (ticket := next(tickets)) < len(chunks):
            descriptor, start, length = chunks[ticket]
            if os.preadv(descriptor, [buffer[:length]], start) != length:
                raise OSError(errno.EIO, "a short read from a file in the page cache")

    return read


def _writer(descriptor: int, starts: range, data: memoryview, size: int, *, direct: bool) -> Callable[[], None]:
    """Work for one thread: ``data`` at every start, cut off at ``size`` (rounded up to whole blocks for direct writes)."""

    def write() -> None:
        for start in starts:
            length = min(len(data), size - start)
            if direct:
                length = -(-length // ALIGNMENT) * ALIGNMENT
            if os.pwrite(descriptor, data[:length], start) != length:
                raise OSError(errno.EIO, "a short write")

    return write


def _run_all(work: Sequence[Callable[[], None]]) -> None:
    """Runs every function in a thread of its own; raises what the first of them raised."""
    failures: list[BaseException] = []

    def guarded(function: Callable[[], None]) -> None:
        try:
            function()
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of safetensors files")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to and to delete afterwards")
    parser.add_argument("--bytes-out", type=int, required=True)
    parser.add_argument("--readers", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: one a core)")
    args = parser.parse_args()
    seconds = floor(args.model, args.out, bytes_out=args.bytes_out, readers=args.readers)
    measured = {name: value for name, value in seconds.items() if value is not None}
    best = min(measured, key=lambda name: measured[name])
    bytes_in = sum(path.stat().st_size for path in args.model.glob("*.safetensors"))
    print(json.dumps({"seconds": measured[best], "best": best, "ways": seconds, "bytes_in": bytes_in, "bytes_out": args.bytes_out}))


if __name__ == "__main__":
    main()
