"""Batches that walk through a model in lockstep, block by block, with one block's weights in memory.

The model's own forward runs once for every batch, each in a greenlet of its own, over an empty model: a call of a decoder block does not
compute but switches to the scheduler. When all batches stand before the same block, its weights are loaded, all batches go through it, and
each greenlet is handed its output and runs to the next block. Masks, rotary embeddings, residual streams and whatever else the
model does between blocks is its own code, so the result is that of the plain forward, bit for bit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.architecture import blocks_of
from convert.crew import Crew
from formats.errors import MachineError, SourceError

if TYPE_CHECKING:
    import torch

    from convert.architecture import Architecture
    from convert.loading import Skeleton
    from convert.observe import Observer
    from convert.source import Checkpoint

#: Elements of the output head that are converted to the model's dtype at once.
HEAD_SLAB_ELEMENTS = 1 << 25
#: Tokens of short sequences that a thread takes through a block before what an observer saw is added up, by all threads together.
HELD_TOKENS = 2048
#: What of the memory that is free a lane may take.
LANE_SHARE = 0.5
#: A model that takes more than this of the memory that is free does not run whole.
WHOLE_SHARE = 0.8


@dataclass
class Stand:
    """All batches standing before a block, whose weights are in ``module``: whoever drives the walk may hook and change them, and run the
    batches as often as it likes. ``arguments``: those of each batch's call, as they lie in the lane. ``_held``: of how many batches a
    thread may hold what an observer sees. ``_probe``: where the walk has one, its place behind them."""

    name: str
    module: Any
    arguments: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]
    _run: Callable[..., Any]
    _keep: Callable[[Any], Any]
    _crew: Crew
    _held: int = 1
    _outputs: list[Any] = field(default_factory=list)
    _made: Iterator[Any] | None = None
    _probe: int | None = None

    def run(self, *, keep: bool, observer: Observer | None = None) -> None:
        """Runs every batch through the block as it is now; what comes out is what the next block sees if ``keep``, else forgotten.

        As many batches at once as the crew has threads. ``observer`` is handed what each has seen in the order of the batches, of a few
        before any later one begins, so that no more than their inputs are held. With an ``observer`` and without ``keep``, later batches
        run no further than to the last input that the first ones showed.
        """
        import torch

        count = len(self.arguments)
        enough: int | None = None

        def one(i: int) -> tuple[Any, Any]:
            output = None
            with torch.no_grad(), observer.watching(enough) if observer else nullcontext() as seen:
                output = self._run(i)
            return self._keep(output) if keep else None, seen

        step = self._crew.count * self._held if observer else count
        for start in range(0, count, step):
            outputs, seen = zip(*self._crew.map(one, range(start, min(start + step, count))), strict=True)
            if keep:
                self._outputs[start : start + step] = outputs
            if observer:
                # What is behind the last layer that is looked at, in a Llama the down projection, need not be computed again.
                enough = len(seen[0]) if not keep and observer.steady and len({len(each) for each in seen}) == 1 else None
                observer.take(seen, self._crew)

    def output(self, i: int, dtype: torch.dtype | None = None) -> Any:
        """What the block as it is now makes of one batch, whose floats are cast to ``dtype`` if that is given; nothing is kept. With
        gradients, where the caller keeps them."""
        return self._run(i, dtype)

    @property
    def sample(self) -> int:
        """The shortest there is to see how the block computes, for :meth:`output`: the probe, or the first batch."""
        return self._probe or 0

    def hand_on(self, outputs: Sequence[Any]) -> None:
        """What each batch's block call returns, as the caller made it with :meth:`output`; batches that are alike may share one."""
        kept = {id(output): self._keep(output) for output in outputs}
        self._outputs[:] = [kept[id(output)] for output in outputs]

    def hand_on_as_made(self, outputs: Iterable[Any]) -> None:
        """:meth:`hand_on`, each made only when all before it have gone on to where the model stops next, or to its end."""
        self._made = iter(outputs)

    @property
    def kept(self) -> bool:
        return bool(self._outputs) or self._made is not None

    def take(self) -> Iterator[Any]:
        """What each batch's call returns, once; nothing is held of what was taken."""
        if self._made is not None:
            yield from self._made
            return
        outputs, self._outputs, self.arguments = self._outputs, [], ()
        for i in range(len(outputs)):
            output, outputs[i] = outputs[i], None
            yield output


def walk(
    skeleton: Skeleton,
    batches: Sequence[Mapping[str, Any]],
    *,
    device: str = "cpu",
    place: str = "host",
    scratch: Path | None = None,
    read: Callable[[str], torch.Tensor] | None = None,
    finish: Callable[[int, Any], None] | None = None,
    at_head: bool = False,
    probe: Mapping[str, Any] | None = None,
    crew: Crew = Crew(),  # noqa: B008  a frozen record
    held: int = 1,
) -> Generator[Stand, None, None]:
    """Yields every block in the order of call, with all batches before it; what the caller has not run with ``keep`` is then run.

    ``batches``: keyword arguments of the model's forward, tensors on the CPU, and no cache that keeps what it is given, for a block may run
    more than once. Blocks run on ``device``; hidden states and all other code
    of the model lie where ``place`` says: ``device``, ``host``, or ``disk``, in files in ``scratch`` that vanish when they are not needed.
    ``read``: where weights of blocks come from, the checkpoint unless given. ``finish(i, output)`` is handed what the model returns for
    each batch; without it the walk ends behind the last block, and the output head is never read. With ``at_head`` a head is
    yielded behind the blocks too, and lies where hidden states do. ``probe``: the beginning of a batch, which goes along to the last block,
    through what becomes of each, and is in no statistics (:attr:`Stand.sample`). Of ``crew`` each thread takes a batch
    through the block; greenlets, and with them all other code of the model, stay in the caller's. ``held``: of how many batches each may
    hold what an observer sees.

    Raises :class:`MachineError` when batches do not call the blocks in one order, :class:`SourceError` when the model has no blocks,
    :class:`NumericsError` for a block with a weight that is not finite.
    """
    import torch

    model = skeleton.model
    blocks = blocks_of(model)
    if not blocks:
        raise SourceError(f"{type(model).__name__} is no stack of blocks, so it cannot be run block by block")
    home = device if place == "device" else "cpu"
    park = _parked(scratch) if place == "disk" else (lambda tensor: tensor.to(home))
    head = _prepare(skeleton, blocks, batches, home, head=finish is not None)
    stops = [*blocks, head] if at_head and head is not None else blocks
    seen = 0
    with _Lockstep(skeleton, stops) as lockstep, _Ahead(skeleton, read or skeleton.read, pinned=device != "cpu") as ahead:
        lockstep.begin(batches, home, probe)
        while name := lockstep.stop():
            if name == head:
                lockstep.forwards[name] = _load_head(skeleton, name, home, lockstep.forwards[name])
            else:
                skeleton.load(name, device, read=ahead.read)
                skeleton.require_finite(name)
            seen += 1
            if seen < len(blocks):
                ahead.begin(blocks[seen])
            run = partial(lockstep.run, name, home if name == head else device)
            stand = Stand(name, model.get_submodule(name), lockstep.arguments(), run, lambda out: _mapped(out, park), crew, held)
            stand._probe = lockstep.probe
            yield stand
            if not stand.kept:
                stand.run(keep=True)
            last = seen == len(blocks)
            if last:
                lockstep.leave_probe()
            with torch.no_grad():
                probed = None if lockstep.probe is None else _mapped(run(lockstep.probe), park)
            if stand._made is None:
                skeleton.free(name)
            if last and finish is None:
                return
            if last and head is not None and head not in stops:
                module = model.get_submodule(head)
                module.forward = _load_head(skeleton, head, home, module.forward)
            lockstep.hand_on(stand.take(), finish, probed)


class _Lockstep:
    """The model's forward for every batch, each in a greenlet of its own that stands before the same of the ``stops``, or is at its end."""

    def __init__(self, skeleton: Skeleton, stops: Sequence[str]) -> None:
        from greenlet import getcurrent

        self._skeleton = skeleton
        self._stops = stops
        self._scheduler = getcurrent()
        self._greenlets: list[Any] = []
        # Of each batch the stop it stands before and what that is called with; at its end "" and what the model returned.
        self._states: list[Any] = []
        self._count = 0
        #: The place of a probe behind the batches, while there is one.
        self.probe: int | None = None
        #: What each stop computes with.
        self.forwards: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> _Lockstep:
        from greenlet import getcurrent

        def stand_before(name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: getcurrent().parent.switch((name, args, kwargs))

        for name in self._stops:
            module: Any = self._skeleton.model.get_submodule(name)
            self.forwards[name], module.forward = module.forward, stand_before(name)
        return self

    def __exit__(self, *error: object) -> None:
        from greenlet import GreenletExit

        for standing in self._greenlets:
            if not standing.dead:
                standing.throw(GreenletExit)
        for name in self._stops:
            del self._skeleton.model.get_submodule(name).forward
            self._skeleton.free(name)

    def begin(self, batches: Sequence[Mapping[str, Any]], home: str, probe: Mapping[str, Any] | None) -> None:
        """Every batch to the first stop, and the probe with them."""
        from greenlet import greenlet

        def start(batch: Mapping[str, Any]) -> tuple[str, Any, Any]:
            arguments = {key: _mapped(value, lambda tensor: tensor.to(home)) for key, value in batch.items()}
            return "", self._skeleton.model(**arguments), None

        self._count = len(batches)
        if probe:
            batches, self.probe = [*batches, probe], self._count
        self._greenlets = [greenlet(start, self._scheduler) for _ in batches]
        self._states = [self._switch(started, batch) for started, batch in zip(self._greenlets, batches, strict=True)]

    def stop(self) -> str:
        """Before which all batches stand; empty at the end. Raises :class:`MachineError` where they do not stand before the same."""
        name: str = self._states[0][0]
        if any(state[0] != name for state in self._states):
            raise MachineError(f"{type(self._skeleton.model).__name__}: some batches call {name} where others call another block")
        return name

    def arguments(self) -> list[tuple[tuple[Any, ...], Mapping[str, Any]]]:
        return [state[1:] for state in self._states[: self._count]]

    def run(self, name: str, where: str, i: int, dtype: torch.dtype | None = None) -> Any:
        """What the stop makes of a batch, on the device ``where``; floats in ``dtype`` if that is given."""
        _, args, kwargs = self._states[i]
        args, kwargs = _mapped((args, kwargs), lambda x: x.to(where, dtype if x.is_floating_point() else None))
        return self.forwards[name](*args, **kwargs)

    def leave_probe(self) -> None:
        from greenlet import GreenletExit

        if self.probe is not None:
            self._states.pop()
            self._greenlets.pop().throw(GreenletExit)
            self.probe = None

    def hand_on(self, outputs: Iterable[Any], finish: Callable[[int, Any], None] | None, probed: Any) -> None:
        """Every batch to the next stop, or to its end, with what the stop it stands before made of it; the probe before them."""
        if self.probe is not None:
            self._states[self.probe] = self._switch(self._greenlets[self.probe], probed)
        for i, (standing, output) in enumerate(zip(self._greenlets[: self._count], outputs, strict=True)):
            self._states[i] = None
            self._states[i] = self._switch(standing, output)
            if self._states[i][0] == "":
                if finish is not None:
                    finish(i, self._states[i][1])
                self._states[i] = ("", None, None)

    @staticmethod
    def _switch(to: Any, handed: Any) -> tuple[str, Any, Any]:
        import torch

        # Gradients are off only while the model computes: a generator that yielded within would leave them off in its caller.
        with torch.no_grad():
            return to.switch(handed)  # type: ignore[no-any-return]


def place_for(lane_bytes: int, *, on_gpu: bool, gpu_free_bytes: int, host_free_bytes: int) -> str:
    """Where a lane of that size lies: on the GPU if blocks run there and half of what is free holds it, else in host memory, or on disk."""
    if on_gpu and lane_bytes <= LANE_SHARE * gpu_free_bytes:
        return "device"
    return "host" if lane_bytes <= LANE_SHARE * host_free_bytes else "disk"


@dataclass(frozen=True)
class WalkSizes:
    """What a walk holds: ``lane_bytes`` before and behind a block and where it began, the largest block, the head as it is stored with a
    slab of it, and ``rest_bytes`` of everything else but embeddings."""

    lane_bytes: int
    block_bytes: int
    head_bytes: int
    rest_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Logits aside."""
        return self.lane_bytes + 2 * self.block_bytes + self.head_bytes + self.rest_bytes


def walk_sizes(checkpoint: Checkpoint, architecture: Architecture, *, tokens: int, wide: bool) -> WalkSizes:
    """Sizes of a walk of ``tokens``; ``wide``: in float32, whatever the checkpoint stores."""
    size = 4 if wide else 2
    blocks: dict[str, int] = dict.fromkeys(architecture.blocks, 0)
    rest = head = 0
    for name, parameter in architecture.parameters.items():
        spec = checkpoint.tensors[name]
        inside = next((block for block in blocks if any(module.startswith(f"{block}.") for module in parameter.modules)), None)
        if inside is not None:
            blocks[inside] += size * spec.elements
        elif parameter.kind == "head":
            head = spec.size_bytes + HEAD_SLAB_ELEMENTS * 4
        elif parameter.kind != "embedding":
            rest += size * spec.elements
    return WalkSizes(3 * tokens * (architecture.hidden_size or 0) * size, max(blocks.values(), default=0), head, rest)


def whole_bytes(checkpoint: Checkpoint, *, wide: bool) -> int:
    """Memory that the whole model takes."""
    return sum(4 * spec.elements if wide else spec.size_bytes for spec in checkpoint.tensors.values())


class _Ahead:
    """Reads the tensors of the block that probably comes next while the present one computes; on the way to a GPU into pinned memory.

    A block that does not come next costs the reading, no more.
    """

    def __init__(self, skeleton: Skeleton, read: Callable[[str], torch.Tensor], *, pinned: bool) -> None:
        self._skeleton = skeleton
        self._read = read
        self._pinned = pinned
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._begun: dict[str, Future[torch.Tensor]] = {}

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, block: str) -> None:
        """Forgets what was read and not taken."""
        self._begun = {name: self._pool.submit(self._fetched, name) for name in self._skeleton.tensors(block)}

    def read(self, name: str) -> torch.Tensor:
        begun = self._begun.pop(name, None)
        return begun.result() if begun else self._read(name)

    def _fetched(self, name: str) -> torch.Tensor:
        values = self._read(name)
        return values.pin_memory() if self._pinned else values


def _prepare(skeleton: Skeleton, blocks: Sequence[str], batches: Sequence[Mapping[str, Any]], home: str, *, head: bool) -> str | None:
    """Fills everything that is in no block, of the token embedding only the rows that are looked up; returns the head, still empty."""
    import torch

    model = skeleton.model
    names = {id(module): name for name, module in model.named_modules()}
    outputs = model.get_output_embeddings()
    skip = list(blocks)
    head_name = names[id(outputs)] if outputs is not None else None
    if head_name is not None:
        skip.append(head_name)
    embedding = model.get_input_embeddings()
    ids = [batch["input_ids"].reshape(-1) for batch in batches if batch.get("input_ids") is not None]
    rows_only = isinstance(embedding, torch.nn.Embedding) and len(ids) == len(batches)
    weight = f"{names[id(embedding)]}.weight" if rows_only else ""
    if weight and skeleton.own_tensor(weight) is not None:
        skip.append(names[id(embedding)])
    else:
        weight = ""
    skeleton.compute_buffers(home)
    skeleton.load("", home, skip=skip)
    if weight:
        rows = torch.unique(torch.cat(ids))
        skeleton.load_rows(weight, rows, home)
        rows = rows.to(home)
        embedding.padding_idx = None

        def compact(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            places = torch.searchsorted(rows, args[0]).clamp_(max=len(rows) - 1)
            if not torch.equal(rows[places], args[0]):
                raise SourceError(f"{type(model).__name__} looks up tokens that are in none of its inputs; it cannot be run block by block")
            return (places, *args[1:])

        embedding.register_forward_pre_hook(compact)
    return head_name if head else None


def _load_head(skeleton: Skeleton, head: str, home: str, forward_of: Callable[..., Any]) -> Callable[..., Any]:
    """Fills the output head, a linear layer as the checkpoint stores it. What multiplies by it: that one in slabs of the model's dtype, any
    other by ``forward_of`` the module."""
    import torch

    module: Any = skeleton.model.get_submodule(head)
    name = skeleton.own_tensor(f"{head}.weight")
    if type(module) is not torch.nn.Linear or name is None:
        skeleton.load(head, home)
        return forward_of
    stored = skeleton.read(name).to(home)
    module.weight = torch.nn.Parameter(stored, requires_grad=False)
    if module.bias is not None:
        skeleton.load(f"{head}.bias", home)
    step = max(1, HEAD_SLAB_ELEMENTS // stored.shape[1])

    def forward(x: torch.Tensor) -> torch.Tensor:
        if stored.dtype == x.dtype or len(stored) <= step:
            return torch.nn.functional.linear(x, stored.to(x.dtype), module.bias)
        logits = torch.empty(*x.shape[:-1], len(stored), dtype=x.dtype, device=x.device)
        for start in range(0, len(stored), step):
            bias = None if module.bias is None else module.bias[start : start + step]
            logits[..., start : start + step] = torch.nn.functional.linear(x, stored[start : start + step].to(x.dtype), bias)
        return logits

    return forward


def _parked(scratch: Path | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Copies tensors into files that have no name any more, so that they go when nothing refers to them."""
    import torch

    def park(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == 0:
            return tensor.cpu()
        with tempfile.NamedTemporaryFile(dir=scratch, prefix="lane-") as file:
            parked = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return parked.copy_(tensor.reshape(-1)).view(tensor.shape)

    return park


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with every tensor mapped."""
    import torch

    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, function) for item in value)
    if type(value) is dict:
        return {key: _mapped(item, function) for key, item in value.items()}
    return value
