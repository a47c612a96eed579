"""Writes artifacts: workers read, quantize and write slabs into files whose every offset is known, hashes follow behind.

What is written lies in ``.<name>.partial`` until it is whole, and is then renamed. A journal there names the tensors that are
finished, so that a run that was killed is taken up where it stopped; only what a worker held in its hands is done again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from convert import __version__, quantize
from convert.calibrate import calibrate
from convert.crew import in_order
from convert.ledger import Plan, TargetPlan
from convert.observe import Stats
from convert.progress import Progress
from convert.rotate import prove
from convert.source import Checkpoint, SafetensorsReader, SourceDigests
from convert.walk import NOTHING_FEEDS_IT
from formats.errors import BusyError, FormatError, InputError, MachineError, OctavoError
from formats.manifest import CHUNK_BYTES, MANIFEST, FileRecord, Manifest, ledger_digest, read_manifest
from formats.provenance import PROVENANCE, statement
from formats.safetensors import Shard
from formats.verify import verify

if TYPE_CHECKING:
    import torch

    from convert.architecture import Part
    from convert.ledger import Entry
    from convert.solve import Solved

JOURNAL = "journal"
#: What was seen while tensors were solved, a JSON line each; like the journal it is there until the artifact is whole.
HEALTH = "health"
#: What the ledger says of a tensor that is kept, and changed so that layers behind it are easier to quantize.
SMOOTHED = "smoothed: divided by what the layers that read it are multiplied by"
#: And by what it says so in the journal.
CHANGED = {"smoothed": SMOOTHED, "corrected": "corrected: the mean of what codes lose at the output was taken out of it"}
#: And why a layer is not smoothed although its rule asks for it.
BARE = {"uncovered": NOTHING_FEEDS_IT, "unseen": "no token of calibration came to this expert"}
#: In the ledger, what was done about experts that too few tokens came to (:meth:`convert.observe.Observer.noted`).
UNSEEN = {
    "shown_all_tokens": "an expert that calibration brought too few tokens: it was shown all of its layer",
    "rounded": "an expert that calibration brought too few tokens: its weights are rounded, and a static scale is that of its neighbours",
}
#: What calibration keeps in files for the time it runs.
SCRATCH = "scratch"
#: The state of a training, from which it goes on when it was killed.
TRAINING = "training.pt"

#: Solved tensors that may wait to be written: about a block's.
SOLVED_AHEAD = 8

#: glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Artifact:
    """A finished folder, its manifest beside its weights. ``reused``: it was there already, from the same plan."""

    path: Path
    manifest: Manifest
    reused: bool = False

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.manifest.files)


def export(
    plan: Plan,
    out: Path,
    progress: Progress,
    *,
    digests: SourceDigests | None = None,
    device: str = "cpu",
    workers: int | None = None,
    like: Like | None = None,
    keep_notes: bool = False,
) -> list[Artifact]:
    """Makes every artifact of the plan in ``out/<target>``, or finds it made, and returns them in the plan's order.

    What needs calibration is calibrated first, and what that solves is written block by block. ``digests`` of the source, if somebody
    began them already. ``like``: an artifact that was solved from the same source with the same text, of which tensors are taken over as
    if an earlier run of this plan had made them; it was made with ``keep_notes``, which leaves beside it what was seen of each tensor.

    Raises :class:`BusyError` when another run holds one of them, :class:`InputError` where something that octavo did not make has its
    name, :class:`MachineError` when the disk is full, and whatever calibrating, reading and quantizing raise; what was finished stays
    for the next run.
    """
    for target in plan.targets:
        require_free(out / target.name, plan.checkpoint)
    made = {target.name: already_made(out / target.name, plan.digest) for target in plan.targets}
    pending = [target for target in plan.targets if made[target.name] is None]
    if pending:
        sidecars = plan.checkpoint.sidecars()
        with writing(out), ExitStack() as stack:
            prove(plan.checkpoint, trust_remote_code=plan.recipe.trust_remote_code)
            digests = digests or stack.enter_context(SourceDigests(plan.checkpoint))
            stack.enter_context(_cleared_on_input_error(out))
            writers = {target.name: stack.enter_context(_Writer(target, out, plan.digest)) for target in pending}
            if like is not None:
                for writer in writers.values():
                    writer.take_over(like)
            # A slab or a batch is one core's work, and the cores share them; with more, calibration's sums would come out otherwise.
            stack.enter_context(one_thread())
            _keep_freed_memory()
            stats = _calibrate(plan, writers, progress, device=device, workers=workers or cores())
            _stream(plan, writers, progress, stats, device=device, workers=workers or cores())
            for target in pending:
                made[target.name] = writers[target.name].finish(plan, sidecars, digests.result(), stats[target.name], keep_notes=keep_notes)
    return [artifact for artifact in made.values() if artifact is not None]


@dataclass(frozen=True)
class Like:
    """An artifact in ``folder`` whose plan has the same ``tensors`` of the source in the same codes as the plan at hand."""

    folder: Path
    target: TargetPlan
    tensors: frozenset[str]


def _notes(artifact: Path) -> Path:
    """Where the notes of an artifact lie that was made with ``keep_notes``."""
    return artifact.with_name(f".{artifact.name}.notes")


def _calibrate(plan: Plan, writers: Mapping[str, _Writer], progress: Progress, *, device: str, workers: int) -> dict[str, Stats]:
    """Writes what calibration solves as it comes; returns what it saw, by target."""
    stats: dict[str, Stats] = {}

    def solving() -> Iterator[Solved]:
        nonlocal stats
        stats = yield from calibrate(
            plan,
            [writer.target for writer in writers.values()],
            progress,
            done={name: frozenset(writer.done) for name, writer in writers.items()},
            recall=lambda target, entry, part: writers[target].recall(entry, part),
            scratch=next(iter(writers.values())).scratch,
            training=lambda target: writers[target].training,
            device=device,
            workers=workers,
        )

    def write(solved: Solved) -> None:
        writer = writers[solved.target]
        for piece in solved.pieces:
            writer.write(piece)
        writer.note(solved.tensor, solved.health)
        writer.finished(solved.tensor)

    # What is solved is written while the next is; one thread, so that the journal has their order.
    with ThreadPoolExecutor(1, thread_name_prefix="solved") as pool:
        for _ in in_order(pool, write, solving(), ahead=SOLVED_AHEAD):
            pass
    return stats


def _stream(
    plan: Plan, writers: Mapping[str, _Writer], progress: Progress, stats: Mapping[str, Stats], *, device: str, workers: int
) -> None:
    """Runs all work through a pool of workers."""
    targets = {name: writer.target for name, writer in writers.items()}
    for writer in writers.values():
        for entry, piece in quantize.cache_pieces(writer.target, stats[writer.target.name], plan.checkpoint):
            if entry.tensor.name not in writer.done:
                writer.write(piece)
                writer.finished(entry.tensor.name)
    done = {name: frozenset(writer.done) for name, writer in writers.items()}
    largest = cache(partial(quantize.largest_of, plan.checkpoint))
    work = list(quantize.plan_work(list(targets.values()), list(plan.checkpoint.tensors.values()), done, gpu=device != "cpu"))
    with (
        progress.stage("converting", sum(item.size_bytes for item in work)) as advance,
        ThreadPoolExecutor(workers, thread_name_prefix="slab") as pool,
    ):

        def one(item: quantize.Work) -> quantize.Work:
            for piece in quantize.run(item, plan.checkpoint, targets, stats, device=device, largest=largest):
                writers[piece.target].write(piece)
            return item

        for item in in_order(pool, one, work, ahead=2 * workers):
            advance(item.size_bytes)
            if item.last:
                for name in item.entries:
                    writers[name].finished(item.spec.name)
        for writer in writers.values():
            writer.wait_for_hashes()


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread, whatever the machine has: how a product is shared out decides its last bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Writer:
    """One artifact in the making."""

    def __init__(self, target: TargetPlan, out: Path, digest: str) -> None:
        self.target = target
        self.done: set[str] = set()
        self.health: dict[str, Mapping[str, Any]] = {}
        self._final = out / target.name
        self._partial = out / f".{target.name}.partial"
        self._digest = digest
        self._places = {item.spec.name: (shard.file, item) for shard in target.shards for item in shard.tensors}
        self._entries = {entry.tensor.name: entry for entry in target.entries}
        self._regions = {name: region for shard in target.shards for region in _regions(shard) for name in region.unwritten}
        self._written: Counter[str] = Counter()
        self._counting = Lock()
        self._descriptors: dict[str, int] = {}
        self._followers: dict[str, _Follower] = {}

    def __enter__(self) -> _Writer:
        with ExitStack() as stack:
            stack.enter_context(_locked(self._partial, self._final))
            self._resume()
            for shard in self.target.shards:
                (self._partial / shard.file).parent.mkdir(exist_ok=True)
                self._descriptors[shard.file] = stack.enter_context(_descriptor(self._partial / shard.file, os.O_RDWR | os.O_CREAT))
                self._allocate(shard)
            self._journal = stack.enter_context(_descriptor(self._rewrite_journal(), os.O_WRONLY | os.O_APPEND))
            for shard in self.target.shards:
                follower = self._followers[shard.file] = _Follower(self._descriptors[shard.file], shard)
                stack.callback(follower.stop)
                follower.start()
            for name in self.done:
                self._release(name)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stack.close()
        if kind is not None and issubclass(kind, InputError):
            shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, piece: quantize.Piece) -> None:
        """Puts a piece where the plan said; thread-safe, pieces may come in any order."""
        file, item = self._places[piece.name]
        rows = piece.data[None] if piece.data.ndim == 1 else piece.data
        pitch = (item.pitch_bytes or item.spec.size_bytes // item.spec.matrix_shape[0]) if len(rows) > 1 else 0
        if rows.shape[1] == pitch:
            rows, pitch = rows.reshape(1, -1), 0
        position = item.start + piece.offset_bytes
        if position + (len(rows) - 1) * pitch + rows.shape[1] > item.stop:
            raise OctavoError(f"{piece.name}: more bytes than the plan promised; this is a defect of octavo, please report it")
        for i, row in enumerate(rows):
            _write_all(self._descriptors[file], memoryview(row), position + i * pitch)
        with self._counting:
            self._written[piece.name] += piece.data.nbytes

    def finished(self, tensor: str) -> None:
        """All pieces of a source tensor are written: into the journal with it."""
        for spec in self._entries[tensor].outputs:
            if (written := self._written.pop(spec.name, 0)) != spec.size_bytes:
                raise OctavoError(
                    f"{spec.name}: {written:,} bytes written, {spec.size_bytes:,} promised; this is a defect of octavo, please report it"
                )
        os.write(self._journal, f"{tensor}\n".encode())
        self.done.add(tensor)
        self._release(tensor)

    def note(self, tensor: str, health: Mapping[str, Mapping[str, Any]]) -> None:
        """Keeps what was seen while a tensor was solved, for the manifest, through interruptions."""
        self.health |= health
        with (self._partial / HEALTH).open("a") as stream:
            stream.write(json.dumps({"tensor": tensor, "health": health}) + "\n")

    def scratch(self) -> Path:
        """An empty folder for files that go when the artifact is whole."""
        folder = self._partial / SCRATCH
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    @property
    def training(self) -> Path:
        """Where the state of a training lies until the artifact is whole."""
        return self._partial / TRAINING

    def recall(self, entry: Entry, part: Part | None) -> torch.Tensor:
        """What an earlier run has written: the values that the codes of a part stand for, or those of a tensor that is kept."""
        reader = SafetensorsReader(
            {name: item for name, (_, item) in self._places.items()},
            lambda file: self._partial / file,
            headers=self.target.shards[0].header != b"",
        )
        if entry.scheme is None or part is None:
            plain = reader.read(entry.plain.name, 0, entry.plain.matrix_shape[0]).reshape(entry.plain.shape)
            return plain.T if entry.transposed else plain
        return quantize.decoded_part(reader, self.target.format, entry, part)

    def take_over(self, like: Like) -> None:
        """Copies what another artifact has in the same codes, with what was noted of it. Nothing where it has no notes."""
        notes = _notes(like.folder)
        if not notes.exists():
            return
        noted = {item["tensor"]: item["health"] for item in map(json.loads, notes.read_text().splitlines())}
        places = {item.spec.name: (shard.file, item) for shard in like.target.shards for item in shard.tensors}
        for entry in self.target.entries:
            # What nothing was noted of was not solved, but streamed.
            if (name := entry.tensor.name) not in like.tensors or name in self.done or name not in noted:
                continue
            if any(places[spec.name][1].pitch_bytes for spec in entry.outputs):
                continue  # rows that lie apart, in a graph
            for spec in entry.outputs:
                file, item = places[spec.name]
                data = np.fromfile(like.folder / file, np.uint8, spec.size_bytes, offset=item.start)
                self.write(quantize.Piece(self.target.name, spec.name, 0, data))
            self.note(name, noted[name])
            self.finished(name)

    def wait_for_hashes(self) -> None:
        for follower in self._followers.values():
            follower.join()

    def finish(self, plan: Plan, sidecars: Mapping[str, bytes], digests: Mapping[str, str], stats: Stats, *, keep_notes: bool) -> Artifact:
        """Writes everything that is not a weight, the manifest last, and gives the folder its final name."""
        missing = [entry.tensor.name for entry in self.target.entries if entry.tensor.name not in self.done]
        if missing:
            raise OctavoError(f"{missing[0]} was promised and not written; this is a defect of octavo, please report it")
        files = [FileRecord(shard.file, shard.size_bytes, self._followers[shard.file].hexdigest()) for shard in self.target.shards]
        for name, content in self.target.texts(sidecars).items():
            (self._partial / name).parent.mkdir(exist_ok=True)
            (self._partial / name).write_bytes(content)
            files.append(FileRecord(name, len(content), hashlib.sha256(content).hexdigest()))
        ledger = [self._noted(entry, stats) for entry in self.target.entries]
        manifest = Manifest(
            target=self.target.name,
            format=self.target.format,
            source={
                "origin": plan.checkpoint.origin,
                "commit": plan.checkpoint.commit,
                "licence": plan.checkpoint.licence,
                "base_model": plan.checkpoint.base_model,
                "gated": plan.checkpoint.gated,
                "private": plan.checkpoint.private,
                "dropped": list(self.target.dropped),
                "files": [
                    {"name": file.name, "size_bytes": file.size_bytes, "digest": digests[file.name]} for file in plan.checkpoint.files
                ],
            },
            recipe=plan.resolved(),
            calibration=self._calibration(stats) if self.target.calibrated else None,
            versions=_versions(),
            plan_digest=plan.digest,
            ledger_sha256=ledger_digest(ledger),
            ledger=tuple(ledger),
            files=tuple(sorted(files, key=lambda file: file.name)),
        )
        (self._partial / MANIFEST).write_bytes(manifest.to_bytes())
        (self._partial / PROVENANCE).write_bytes(statement(manifest))
        (self._partial / JOURNAL).unlink()
        if keep_notes and (self._partial / HEALTH).exists():
            (self._partial / HEALTH).rename(_notes(self._final))
        (self._partial / HEALTH).unlink(missing_ok=True)
        for path in self._partial.glob(f"{self.training.stem}.*"):
            path.unlink()
        shutil.rmtree(self._partial / SCRATCH, ignore_errors=True)
        old = self._final.with_name(f".{self.target.name}.old")
        if self._final.exists():
            shutil.rmtree(old, ignore_errors=True)
            self._final.rename(old)
        self._partial.rename(self._final)
        shutil.rmtree(old, ignore_errors=True)
        return Artifact(self._final, manifest)

    def _noted(self, entry: Entry, stats: Stats) -> dict[str, Any]:
        """The record of an entry, with what calibration did to it, or could not do, that the plan could not know."""
        record = entry.record()
        seen = [self._seen(name, stats) for name in (entry.tensor.name, *(entry.module(part) for part in entry.parts))]
        notes = [record["note"]] if record.get("note") else []
        notes += [why for word, why in CHANGED.items() if any(item.get(word) for item in seen)]
        notes += [f"not smoothed ({why})" for word, why in BARE.items() if any(item.get(word) for item in seen)]
        for what, words in UNSEEN.items():
            found = [entry.module(part) for part in entry.parts if self._seen(entry.module(part), stats).get(what)] if entry.scheme else []
            if found:
                notes.append(words if len(entry.parts) == 1 else f"{words} (of {len(entry.parts)} layers: {', '.join(found)})")
        return {**record, "note": "; ".join(notes)} if notes else record

    def _seen(self, module: str, stats: Stats) -> Mapping[str, Any]:
        return {**stats.experts.get(module, {}), **self.health.get(module, {})}

    def _calibration(self, stats: Stats) -> dict[str, Any]:
        """The text, and what was seen while layers were solved, in the order of the plan."""
        modules = [entry.module(part) for entry in self.target.quantized for part in entry.parts]
        solved: dict[str, dict[str, Any]] = {module: dict(seen) for module in modules if (seen := self._seen(module, stats))}
        folds = [seen.pop("fold") for seen in solved.values() if "fold" in seen]
        health = {module: stats.health[module] for module in modules if module in stats.health}
        health |= {module: seen.pop("health") for module, seen in solved.items() if "health" in seen}
        static = {module: limit.record() for module, limit in stats.limits.get(self.target.name, {}).items()}
        static |= {module: seen.pop("static") for module, seen in solved.items() if "static" in seen}
        solved = {module: seen for module, seen in solved.items() if seen}
        told = {"health": health, "solved": solved, "folds": folds, "static": static}
        return {**stats.record, **{name: found for name, found in told.items() if found}}

    def _resume(self) -> None:
        """Takes up a folder of the same plan, or begins anew. The journal's first line is the plan's digest."""
        journal = self._partial / JOURNAL
        lines = journal.read_text(errors="replace").split("\n") if journal.exists() else []
        whole = all((self._partial / shard.file).exists() for shard in self.target.shards)
        if lines and lines[0] == self._digest and whole:
            # The last element is what comes after the last newline: a line cut short by a kill, or nothing.
            self.done = set(lines[1:-1]) & set(self._entries)
            with suppress(ValueError, KeyError, TypeError):  # of notes that a power cut left unwritten
                self._resume_health()
                return
            self.done, self.health = set(), {}
        for path in self._partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _resume_health(self) -> None:
        """What was noted of tensors that are finished; a line cut short by a kill belongs to one that is not."""
        path = self._partial / HEALTH
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        noted = {item["tensor"]: item for item in map(json.loads, lines) if item["tensor"] in self.done}
        path.write_text("".join(json.dumps(item) + "\n" for item in noted.values()))
        for item in noted.values():
            self.health |= item["health"]

    def _rewrite_journal(self) -> Path:
        """The journal without a line that a kill cut short, which must not grow into the next one."""
        fresh = self._partial / f"{JOURNAL}.new"
        fresh.write_text("".join(f"{line}\n" for line in (self._digest, *sorted(self.done))))
        return fresh.rename(self._partial / JOURNAL)

    def _allocate(self, shard: Shard) -> None:
        """Reserves all the space of a shard and writes its header."""
        try:
            os.posix_fallocate(self._descriptors[shard.file], 0, shard.size_bytes)
        except OSError:
            if not self.done:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        os.pwrite(self._descriptors[shard.file], shard.header, 0)

    def _release(self, tensor: str) -> None:
        for spec in self._entries[tensor].outputs:
            region = self._regions[spec.name]
            region.unwritten.discard(spec.name)
            if not region.unwritten:
                self._followers[self._places[spec.name][0]].release(region.start, region.stop)


@dataclass(frozen=True)
class _Region:
    """Bytes of a file that are final when all of some tensors are written, which take turns in them."""

    start: int
    stop: int
    unwritten: set[str]


def _regions(shard: Shard) -> list[_Region]:
    """A file without its header, cut between tensors; what is left free before a tensor goes with it."""
    found: list[_Region] = []
    for item in sorted(shard.tensors, key=lambda item: (item.start, item.stop)):
        before = found[-1].stop if found else len(shard.header)
        if item.start < before:
            found[-1] = _Region(found[-1].start, max(before, item.stop), found[-1].unwritten | {item.spec.name})
        else:
            found.append(_Region(before, item.stop, {item.spec.name}))
    return found


class _Follower(Thread):
    """Hashes a file from its beginning as far as it is written, reading back what the page cache still holds."""

    def __init__(self, descriptor: int, shard: Shard) -> None:
        super().__init__(name=f"sha256 {shard.file}", daemon=True)
        self._descriptor = descriptor
        self._size = shard.size_bytes
        self._hasher = hashlib.sha256()
        self._condition = Condition()
        self._released = {0: len(shard.header)}
        self._frontier = 0
        self._stopped = False

    def release(self, start: int, stop: int) -> None:
        """``[start, stop)`` is written."""
        with self._condition:
            if stop > start:
                self._released[start] = stop
            while self._frontier in self._released:
                self._frontier = self._released.pop(self._frontier)
            self._condition.notify()

    def run(self) -> None:
        self.release(0, 0)
        buffer = bytearray(CHUNK_BYTES)
        view = memoryview(buffer)
        position = 0
        while position < self._size:
            with self._condition:
                while not self._stopped and self._frontier == position:
                    self._condition.wait()
                if self._stopped:
                    return
                limit = min(self._frontier - position, CHUNK_BYTES)
            count = os.preadv(self._descriptor, [view[:limit]], position)
            self._hasher.update(view[:count])
            position += count

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify()
        if self.is_alive():  # it is not where an interruption came before it had begun
            self.join()

    def hexdigest(self) -> str:
        """The file's sha256, once the thread has ended."""
        self.join()
        return self._hasher.hexdigest()


def partial_bytes(out: Path, name: str) -> int:
    """Disk space that an interrupted run of a target already holds."""
    folder = out / f".{name}.partial"
    return sum(path.stat().st_blocks * 512 for path in [*folder.glob("*.safetensors"), *folder.glob("*/*_data*")]) if folder.exists() else 0


def already_made(folder: Path, digest: str) -> Artifact | None:
    """The artifact of an earlier run of the same plan, if every byte of it is still there."""
    try:
        manifest = read_manifest(folder)
        same = manifest.plan_digest == digest and verify(folder).passed
    except FormatError:
        return None
    return Artifact(folder, manifest, reused=True) if same else None


def require_free(folder: Path, source: Checkpoint) -> None:
    """Raises :class:`InputError` where an artifact called ``folder`` would replace what octavo did not make, or the source itself."""
    if source.commit is None and Path(source.origin).expanduser().resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder}: the model that is to be converted lies there; choose another --out")
    if not os.path.lexists(folder) or (folder / MANIFEST).is_file() or (folder.is_dir() and not any(folder.iterdir())):
        return
    raise InputError(f"{folder} is there, and not an artifact of octavo's that a new one could replace; move it, or choose another --out")


def require_writable(out: Path, name: str) -> None:
    """Raises :class:`InputError` where no artifact of that name could be written in ``out``, which need not be there yet: in a file or a
    folder that takes none, or under a name that is too long. Leaves nothing."""
    try:
        with suppress(FileNotFoundError):
            os.lstat(out / f".{name}.partial" / "model-00001-of-00001.safetensors")
        existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"{out}: nothing can be written there ({error.strerror}); choose another --out") from None


def _keep_freed_memory() -> None:
    """Asks glibc not to return freed slabs to the system only to fault them in again: a third of the system time otherwise.

    What is kept is at most the working set that the plan announces. Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(parameter, 1 << 30)


@contextmanager
def _locked(folder: Path, final: Path) -> Iterator[None]:
    """Makes ``folder`` and holds it for this run alone; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with _descriptor(folder, os.O_RDONLY) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have renamed it to its final name in between.
            held = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except OSError:
            held = False
        if not held:
            raise BusyError(f"{final}: another run is writing it; wait for it, or choose another --out")
        yield


def _write_all(descriptor: int, view: memoryview, position: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _cleared_on_input_error(out: Path) -> Iterator[None]:
    """A wrong input leaves nothing behind, not even the folders that were made for its output."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except InputError:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Says why something could not be written in ``out``, and what to do."""
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, str | bytes) else out.absolute()
        if not named.is_relative_to(out.absolute()) and not out.absolute().is_relative_to(named):
            raise  # something that was read
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"{out}: the disk is full; make room and run the same command again, finished tensors are kept") from None
        if error.errno == errno.EFBIG:  # FAT32 ends at 4 GB
            raise MachineError(
                f"{out}: no file so large can be written there, by its file system or by ulimit -f; lower max_shard_size, or choose "
                "another --out"
            ) from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise MachineError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG):
            raise InputError(f"{named}: cannot be written ({error.strerror}); choose another --out") from None
        raise


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "safetensors", "gguf", "tokenizers")
    return {"octavo": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def cores() -> int:
    """Processors this process may use, and so the workers that convert."""
    return len(os.sched_getaffinity(0))
