"""Quantization-aware distillation: what the other algorithms made of a model is trained until it predicts what the source predicts.

The student is the model with fake-quantized weights and inputs (:mod:`convert.algorithms.lsq`), begun at the codes and scales that the
algorithms before have chosen; the teacher is the source. Weights of quantized layers, their scales and those of static inputs are
trained, everything else stays as it is. Whole, the loss is KL(source || student) a token; block by block, while the walk of
:mod:`convert.calibrate` stands before each, the error of its output, with one block's gradients in memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.functional import kl_div, linear, log_softmax

from convert import quantize
from convert.algorithms import lsq
from convert.groups import first_tensor
from convert.loading import Skeleton
from convert.moved import moved
from convert.observe import Stats
from convert.solve import Solved
from formats.dtypes import DTYPES
from formats.errors import MachineError, NumericsError

if TYPE_CHECKING:
    from convert.crew import Crew
    from convert.lanes import Stand
    from convert.ledger import Entry, Plan, TargetPlan
    from convert.progress import Advance, Progress
    from convert.recipe import Recover
    from formats.qtensor import QTensor

Batch = TypeVar("Batch")

#: What of the memory that is free training may take; beyond that it goes block by block.
MEMORY_SHARE = 0.8
#: Tokens of one backward pass on a GPU; on a CPU it is a sequence, one a thread.
GPU_TOKENS = 4_096
#: The share of sequences that is held back, to see what training does to others than those it saw.
HELD_BACK = 16
#: Of so many steps, the last ones, the mean time says how many more fit into ``minutes``; the very first is slower and not counted.
TIMED = 20
#: Seconds between two states on disk, from which a run that was killed goes on.
SAVED_SECONDS = 60.0


@dataclass(frozen=True)
class Start:
    """A layer before it is trained. ``codes``: what was chosen for ``source`` (out, in) float32, the source's weight, smoothed; ``limit``:
    the largest magnitude that a static input's scale holds; ``leader``: the name under which its input is known."""

    entry: Entry
    codes: QTensor
    source: torch.Tensor
    limit: float | None
    leader: str

    @property
    def options(self) -> Recover | None:
        step = self.entry.asks("recover")
        return step.recover if step else None


@dataclass(frozen=True)
class Fit:
    """How training went: ``steps`` of those ``asked`` for, in ``seconds``; the loss on sequences held back ``before`` and ``after``;
    ``out_of_time``: the clock had a say in how many there are, and so in their learning rates."""

    steps: int
    asked: int
    seconds: float
    before: float
    after: float
    out_of_time: bool


class Student:
    """Layers that compute with fake-quantized weights and inputs while :meth:`at_work`; those whose entry asks for it are trained."""

    def __init__(self, modules: Mapping[str, Any], starts: Mapping[str, Start], device: str) -> None:
        self._modules = {name: modules[name] for name in starts}
        self._starts = starts
        self.weights: dict[str, torch.Tensor] = {}
        self.scales: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, torch.Tensor] = {}
        self._fixed: dict[str, torch.Tensor] = {}
        for name, start in starts.items():
            trained = start.options is not None
            if trained:
                begun = lsq.within_codes(start.source.to(device), on(start.codes, device))
                self.weights[name] = begun.requires_grad_()
                self.scales[name] = start.codes.scale.to(device).float().log().requires_grad_()
            else:
                self._fixed[name] = on(start.codes, device).dequantize()
            activation = start.entry.scheme.activation if start.entry.scheme else None
            if start.limit is not None and activation is not None:
                key = self._input(name)
                log_scale = torch.tensor(math.log(start.limit / activation.grid.high), device=device)
                self.inputs[key] = torch.maximum(self.inputs[key], log_scale) if key in self.inputs else log_scale
        for key in self.inputs:
            self.inputs[key].requires_grad_(not key.startswith("fixed "))
        self._leaves: dict[str, torch.Tensor] = {}
        self._made: dict[str, torch.Tensor] = {}

    def _input(self, name: str) -> str:
        """Layers of one input share its scale, if they are quantized alike."""
        start = self._starts[name]
        assert start.entry.scheme is not None
        return f"{'trained' if start.options else 'fixed'} {start.entry.scheme.name} {start.leader}"

    def trained(self) -> list[torch.Tensor]:
        """Weights, scales of weights, scales of inputs, in a fixed order."""
        return [*self.weights.values(), *self.scales.values(), *(x for x in self.inputs.values() if x.requires_grad)]

    def refresh(self) -> None:
        """Quantizes weights as they are now; until the next time every batch computes with these."""
        with torch.enable_grad():
            made: dict[str, torch.Tensor] = {}
            for name, weight in self.weights.items():
                entry = self._starts[name].entry
                assert entry.scheme is not None
                scale = lsq.stored(self.scales[name], self._scale_dtype(name))
                made[name] = lsq.fake_quantize_weight(weight, scale, entry.scheme.weight)
            for name in self._starts:
                key = self._input(name)
                if key in self.inputs and key not in made:
                    made[key] = lsq.stored(self.inputs[key], getattr(torch, DTYPES[self._starts[name].entry.scale_dtype].torch_name))
        self._made = made
        self._leaves = {key: value.detach().requires_grad_(value.requires_grad) for key, value in made.items()}

    def _scale_dtype(self, name: str) -> torch.dtype:
        return self._starts[name].codes.scale.dtype

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        """With respect to quantized weights and scales of inputs, for :meth:`pull`."""
        leaves = [leaf for leaf in self._leaves.values() if leaf.requires_grad]
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(leaves, found, strict=True)]

    def pull(self, gradients: Sequence[torch.Tensor]) -> None:
        """Turns gradients of what :meth:`refresh` made into those of what is trained."""
        for parameter in self.trained():
            parameter.grad = None
        torch.autograd.backward([made for made in self._made.values() if made.requires_grad], list(gradients))
        self._made = {}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The model computes as the student."""
        for name, module in self._modules.items():
            module.forward = self._forward(name, module)
        try:
            yield
        finally:
            for module in self._modules.values():
                del module.forward

    def _forward(self, name: str, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        scheme = self._starts[name].entry.scheme
        assert scheme is not None
        activation, key = scheme.activation, self._input(name)

        def forward(x: torch.Tensor) -> torch.Tensor:
            x = x.float()
            if activation is not None and activation.dynamic:
                x = lsq.pass_through(x, activation)
            elif activation is not None:
                x = lsq.fake_quantize(x, self._leaves[key], activation.grid)
            weight = self._leaves[name] if name in self._leaves else self._fixed[name]
            return linear(x, weight, module.bias)

        return forward

    def codes(self, name: str) -> QTensor:
        """A trained layer, as it is exported."""
        start = self._starts[name]
        assert start.entry.scheme is not None
        with torch.no_grad():
            scale = self.scales[name].exp().to(self._scale_dtype(name))
            return lsq.codes(self.weights[name].detach(), scale, start.entry.scheme.weight)

    def limit(self, name: str) -> float | None:
        """The largest magnitude that the scale of a layer's static input holds."""
        start = self._starts[name]
        if self._input(name) not in self.inputs or start.entry.scheme is None or start.entry.scheme.activation is None:
            return None
        dtype = getattr(torch, DTYPES[start.entry.scale_dtype].torch_name)
        scale = self.inputs[self._input(name)].detach().exp().to(dtype)
        return float(scale.double()) * start.entry.scheme.activation.grid.high

    def state(self) -> list[torch.Tensor]:
        return [parameter.detach() for parameter in self.trained()]


def on(codes: QTensor, device: str) -> QTensor:
    """The same codes and scales, on ``device``."""
    return replace(codes, values=codes.values.to(device), scale=codes.scale.to(device))


def fit(
    student: Student,
    loss: Callable[[Batch], torch.Tensor],
    size: Callable[[Batch], int],
    options: Recover,
    *,
    draw: Callable[[int], Sequence[Batch]],
    held: Sequence[Batch],
    crew: Crew,
    minutes: float | None,
    advance: Advance,
    saved: Path | None = None,
    name: str = "",
) -> Fit:
    """Trains a student. ``loss`` of a batch, summed over its ``size`` tokens; ``draw(step)`` gives the batches of a step, those ``held``
    only measure. ``saved``: where its state lies between runs.

    Gradients of batches are added up in their order, so that they do not depend on how many of the crew are at work. Raises
    :class:`NumericsError` when the loss is not finite.
    """
    weights = list(student.weights.values())
    scales = [parameter for parameter in student.trained() if not any(parameter is weight for weight in weights)]
    groups = [{"params": weights, "rate": options.learning_rate}, {"params": scales, "rate": options.scale_learning_rate}]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99), eps=1e-12)

    def gradients(batch: Batch) -> tuple[float, list[torch.Tensor]]:
        with torch.enable_grad():
            value = loss(batch)
            return float(value.detach()), student.gradients(value)

    def measure(batch: Batch) -> float:
        with torch.no_grad():
            return float(loss(batch))

    def measured() -> float:
        student.refresh()
        return sum(crew.map(measure, held)) / sum(map(size, held))

    done, total, before = 0, options.steps, None
    clock = _Clock(minutes, options.steps)
    with student.at_work():
        if saved is not None and saved.exists():
            kept = torch.load(saved, weights_only=True)
            for parameter, value in zip(student.trained(), kept["trained"], strict=True):
                parameter.data.copy_(value)
            optimizer.load_state_dict(kept["optimizer"])
            done, total, before, clock.spent, clock.hurried = (kept[key] for key in ("step", "total", "before", "seconds", "hurried"))
            advance(0, f"{name}going on at step {done}")
        before = measured() if before is None else before
        if not math.isfinite(before):
            raise NumericsError(
                f"{name}recover: the loss is {before} before any step: the source, or what was made of it, computes NaN on this text"
            )
        clock.start()
        written, first = clock.begun, done
        while done < total:
            batches = draw(done)
            tokens = sum(map(size, batches))
            student.refresh()
            value, sums = _added(crew.map(gradients, batches))
            if not math.isfinite(value):
                raise NumericsError(
                    f"{name}recover: the loss of step {done + 1} is {value}; lower learning_rate ({options.learning_rate:g}) or "
                    f"scale_learning_rate ({options.scale_learning_rate:g})"
                )
            student.pull([x.div_(tokens) for x in sums])
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * pace(done, total)
            optimizer.step()
            done += 1
            advance(tokens, f"{name}step {done} of {total}, loss {value / tokens:.4g}")
            now = time.monotonic()
            total = clock.fitting(done, total, now)
            if saved is not None and done < total and now - written > SAVED_SECONDS:
                _save(saved, student, optimizer, done, total, before, clock)
                written = time.monotonic()
        seconds = clock.seconds()
        if saved is not None and done > first:
            _save(saved, student, optimizer, done, done, before, clock)
        after = measured()
    return Fit(done, options.steps, seconds, before, after, out_of_time=clock.hurried)


def _added(found: Iterable[tuple[float, list[torch.Tensor]]]) -> tuple[float, list[torch.Tensor]]:
    """The losses of batches and their gradients, added up in their order."""
    value = 0.0
    sums: list[torch.Tensor] = []
    for one, gradients in found:
        value += one
        sums = [x.add_(y) for x, y in zip(sums, gradients, strict=True)] if sums else gradients
    return value, sums


class _Clock:
    """How many steps fit into ``minutes``, where they are told. ``spent``: seconds of training in runs before this one; ``hurried``: there
    are fewer than ``asked`` because of it."""

    def __init__(self, minutes: float | None, asked: int) -> None:
        self._allowed = None if minutes is None else minutes * 60
        self._asked = asked
        self._times: list[float] = []
        self.begun = 0.0
        self.spent = 0.0
        self.hurried = False

    def start(self) -> None:
        self.begun = time.monotonic()

    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.begun

    def fitting(self, done: int, total: int, now: float) -> int:
        """How many steps there will be in all, as it looks ``now`` that so many are ``done``."""
        if self._allowed is None:
            return total
        self._times = [*self._times[-TIMED:], now]
        left = self._allowed - self.spent - (now - self.begun)
        if left <= 0:
            total = done
        elif len(self._times) > 2:
            fitting = done + int(left * (len(self._times) - 2) / max(now - self._times[1], 1e-9))
            total = min(self._asked, max(done, fitting))
        self.hurried = self.hurried or total < self._asked
        return total


def _save(path: Path, student: Student, optimizer: Any, step: int, total: int, before: float, clock: _Clock) -> None:
    fresh = path.with_suffix(".new")
    went = {"step": step, "total": total, "before": before, "seconds": clock.seconds(), "hurried": clock.hurried}
    torch.save({"trained": student.state(), "optimizer": optimizer.state_dict(), **went}, fresh)
    fresh.rename(path)


def pace(step: int, total: int) -> float:
    """What of the learning rate a step takes: rising over the first twentieth, then falling along a cosine."""
    rise = max(1, total // 20)
    return min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * step / total)))


def order(count: int, batch: int, seed: int) -> Callable[[int], list[int]]:
    """Which of ``count`` sequences a step takes: all of them once, in random order, before any comes again."""
    epochs: dict[int, list[int]] = {}

    def of(step: int) -> list[int]:
        found = []
        for place in range(step * batch, (step + 1) * batch):
            epoch, i = divmod(place, count)
            if epoch not in epochs:
                epochs.clear()
                epochs[epoch] = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
            found.append(epochs[epoch][i])
        return found

    return of


def kl_sum(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """``sum over tokens of KL(teacher || student)`` in nats, from logits (..., vocabulary)."""
    return kl_div(log_softmax(student.float(), -1), log_softmax(teacher.float(), -1), reduction="sum", log_target=True)


def relative_error_sum(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """``sum over tokens of |found - expected|**2 / |expected|**2`` of hidden states (..., features): a token whose state is thousands of
    times as long as the others' counts as much as they do."""
    error = (found.float() - expected.float()).square().sum(-1)
    return (error / expected.float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).sum()


@dataclass
class Recovery:
    """The training of one target, whole (``logits``) or block by block. ``saved``: where its state lies between runs."""

    plan: Plan
    target: TargetPlan
    mode: str
    device: str
    crew: Crew
    progress: Progress
    saved: Path
    _starts: dict[str, Start] = field(default_factory=dict)
    _solved: list[Solved] = field(default_factory=list)
    _changed: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def options(self) -> Recover:
        step = next(step for entry in self.target.quantized if (step := entry.asks("recover")))
        assert step.recover is not None
        return step.recover

    def keep(self, solved: Sequence[Solved], starts: Mapping[str, Start], skeleton: Skeleton) -> None:
        """A block that is done but for training, which comes when all are."""
        self._solved += solved
        self._starts |= {name: replace(start, source=start.source.cpu(), codes=on(start.codes, "cpu")) for name, start in starts.items()}
        for item in solved:
            for name in skeleton.parameters(item.tensor):
                if not any(name == f"{module}.weight" for module in starts):
                    self._changed[name] = skeleton.model.get_parameter(name).detach().clone()

    def whole(self, sequences: Sequence[torch.Tensor]) -> Iterator[Solved]:
        """Trains the whole model on sequences of tokens, int64 (tokens,) each, and yields every tensor that was kept for it."""
        with _exact(self.device):
            student, record = self._train(sequences)
        for solved in self._solved:
            yield self._retold(solved, student, self._starts, record)

    def _train(self, sequences: Sequence[torch.Tensor]) -> tuple[Student, dict[str, Any]]:
        options, device = self.options, self.device
        source, copy = (
            Skeleton(self.plan.checkpoint, dtype="float32", trust_remote_code=self.plan.recipe.trust_remote_code) for _ in range(2)
        )
        source.compute_buffers(device)
        source.load("", device)
        copy.compute_buffers(device)
        layers = {f"{name}.weight" for name in self._starts}
        for name, parameter in source.model.named_parameters(remove_duplicate=False):
            if name not in layers:  # what is not trained the student shares with the source, unless smoothing changed it
                copy.put(name, self._changed[name].to(device).float() if name in self._changed else parameter.data)
        student = Student(dict(copy.model.named_modules()), self._starts, device)
        if options.generated:
            length = max(map(len, sequences))
            self.progress.say(f"{self.target.name}: the source writes {options.generated} sequences of {length} tokens")
            sequences = [*sequences, *generate(source.model, options.generated, length, seed=options.seed, device=device)]
        held, seen = held_back(len(sequences))
        limit = GPU_TOKENS if device != "cpu" else 1

        def logits(model: Any, batch: Sequence[torch.Tensor]) -> torch.Tensor:
            return model(input_ids=torch.stack(list(batch)).to(device), use_cache=False).logits  # type: ignore[no-any-return]

        def loss(batch: Sequence[torch.Tensor]) -> torch.Tensor:
            with torch.no_grad():
                expected = logits(source.model, batch)
            return kl_sum(expected, logits(copy.model, batch))

        drawn = order(len(seen), options.batch, options.seed)
        with self.progress.stage("training", options.steps * options.batch * max(map(len, sequences)), unit="tokens") as advance:
            found = fit(
                student, loss, lambda batch: sum(map(len, batch)), options,
                draw=lambda step: together([sequences[seen[i]] for i in drawn(step)], limit),
                held=together([sequences[i] for i in held], limit),
                crew=self.crew, minutes=options.minutes, advance=advance, saved=self.saved,
            )  # fmt: skip
        self._say("", found, "KL", "nats a token")
        return student, self._record(found, held, seen)

    def _record(self, found: Fit, held: Sequence[int], seen: Sequence[int]) -> dict[str, Any]:
        """For the manifest; how long it took only where bytes hang on it, for the same job has to give the same manifest."""
        told = {name: value for name, value in asdict(found).items() if name != "seconds" or found.out_of_time}
        return {**told, "mode": self.mode, "sequences": len(seen), "held_back": len(held)}

    def block(
        self,
        stand: Stand,
        teacher: Stand,
        solved: Sequence[tuple[Solved, dict[str, QTensor]]],
        starts: Mapping[str, Start],
        skeleton: Skeleton,
        blocks: int,
    ) -> list[tuple[Solved, dict[str, QTensor]]]:
        """Trains a block whose parameters are float32 to return what the source's returns; ``blocks``: how many there are."""
        if not any(start.options for start in starts.values()):
            return list(solved)
        options, minutes = self.options, None
        if self.options.minutes is not None:
            minutes = self.options.minutes / blocks
        student = Student(dict(skeleton.model.named_modules()), starts, self.device)
        shapes = [first_tensor(arguments[0]).shape[:-1] for arguments in stand.arguments]
        held, seen = held_back(len(shapes))

        def loss(i: int) -> torch.Tensor:
            with torch.no_grad():
                expected = first_tensor(teacher.output(i, torch.float32))
            return relative_error_sum(expected, first_tensor(stand.output(i, torch.float32)))

        several = max(1, options.batch * len(shapes) // sum(shape[0] for shape in shapes))
        drawn = order(len(seen), several, options.seed)
        tokens = options.steps * several * max(shape.numel() for shape in shapes)
        with _exact(self.device), self.progress.stage(f"training {stand.name}", tokens, unit="tokens") as advance:
            found = fit(
                student, loss, lambda i: shapes[i].numel(), options, draw=lambda step: [seen[i] for i in drawn(step)], held=held,
                crew=self.crew, minutes=minutes, advance=advance, name=f"{stand.name}: ",
            )  # fmt: skip
        self._say(f"{stand.name}: ", found, "error of the output", "of its square")
        record = self._record(found, held, seen)
        return [
            (
                self._retold(item, student, starts, record),
                {name: student.codes(name) if starts[name].options else codes for name, codes in chosen.items()},
            )
            for item, chosen in solved
        ]

    def _say(self, name: str, found: Fit, what: str, unit: str) -> None:
        ended = f" (of {found.asked} asked for, as many as the time allowed)" if found.out_of_time else ""
        self.progress.say(
            f"{self.target.name}: {name}{found.steps} steps in {found.seconds:.0f} s{ended}; {what} on text held back "
            f"{found.before:.4g} before, {found.after:.4g} after ({unit})"
        )
        if not found.after < found.before:
            self.progress.say(
                f"warning: {self.target.name}: {name}training lost more than it won; give it more text (calibration.sequences, "
                f"generated), or lower learning_rate ({self.options.learning_rate:g})"
            )

    def _retold(self, solved: Solved, student: Student, starts: Mapping[str, Start], record: Mapping[str, Any]) -> Solved:
        """A solved tensor as training left it."""
        entry = next((entry for entry in self.target.quantized if entry.tensor.name == solved.tensor), None)
        if entry is None or entry.asks("recover") is None:
            return solved
        pieces: list[quantize.Piece] = []
        health: dict[str, dict[str, Any]] = {}
        for part in entry.parts:
            name = entry.module(part)
            start, codes, limit = starts[name], on(student.codes(name), "cpu"), student.limit(name)
            work = quantize.Work(entry.tensor, part.start, part.stop, {}, last=True)
            stats = Stats(inputs={} if limit is None else {name: limit})
            pieces += quantize.encode(self.target, entry, part, codes, work, stats)
            source = start.source.cpu()
            flipped = (codes.values.float() != start.codes.values.cpu().float()).float().mean()
            noted = {**record, "codes_changed": float(f"{flipped.item():.4g}")}
            if limit is not None and start.limit is not None:
                noted |= {"input_limit": limit, "input_limit_before": start.limit}
            health[name] = {**solved.health.get(name, {}), "moved": asdict(moved(source, codes)), "recover": noted}
            health[name].pop("static", None)
            if "health" in health[name]:
                health[name]["health"] = {**health[name]["health"], "trained": True}
        return Solved(solved.target, solved.tensor, tuple(pieces), health)


def held_back(count: int) -> tuple[list[int], list[int]]:
    """Places that only measure, every sixteenth and at least one, and those that are trained on. One alone does both."""
    held = list(range(0, count, HELD_BACK))
    return held, [i for i in range(count) if i % HELD_BACK] or held


def together(sequences: Sequence[torch.Tensor], limit: int) -> list[list[torch.Tensor]]:
    """Neighbours of one length, as many as ``limit`` tokens hold and at least one."""
    found: list[list[torch.Tensor]] = []
    for sequence in sequences:
        if found and len(found[-1][0]) == len(sequence) and (len(found[-1]) + 1) * len(sequence) <= limit:
            found[-1].append(sequence)
        else:
            found.append([sequence])
    return found


def generate(model: Any, count: int, length: int, *, seed: int, device: str) -> list[torch.Tensor]:
    """Sequences that a model writes, int64 (length,) each: a random first token, the others drawn from its own predictions (LLM-QAT, Liu
    et al. 2023, section 3.1). The same seed gives the same on one kind of device."""
    from transformers import DynamicCache

    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator(device=device).manual_seed(seed)
    first = torch.randint(vocabulary, (count, 1), generator=torch.Generator().manual_seed(seed))
    written: list[torch.Tensor] = []
    with torch.no_grad():
        for start in range(0, count, 256):
            tokens = [first[start : start + 256].to(device)]
            cache = DynamicCache()
            for _ in range(length - 1):
                logits = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits[:, -1].float()
                tokens.append(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            written += list(torch.cat(tokens, 1).cpu())
    return written


def needed_bytes(plan: Plan, target: TargetPlan, device: str) -> int:
    """What training a target whole takes: the source in float32; of trained weights, values, their quantized form, two gradients, and two
    moments; the largest step's activations and logits."""
    trained = sum(entry.tensor.elements for entry in target.quantized if entry.asks("recover"))
    source = sum(spec.elements for spec in plan.checkpoint.tensors.values())
    length = plan.calibration.length
    tokens = length if device == "cpu" else max(length, GPU_TOKENS)
    features = sum(3 * part.shape(entry.tensor)[1] + part.shape(entry.tensor)[0] for entry in target.quantized for part in entry.parts)
    heads = int(plan.checkpoint.config.get("num_attention_heads") or 0)
    attention = 3 * heads * length * len(plan.architecture.blocks if plan.architecture else ())
    vocabulary: int = max((e.tensor.matrix_shape[0] for e in target.entries if e.kind in ("head", "embedding")), default=0)
    floats: int = source + 7 * trained + tokens * (2 * features + attention + 6 * vocabulary)
    return 4 * floats


def generated_tokens(plan: Plan, target: TargetPlan) -> int:
    """How many tokens the source writes itself to train a target on."""
    asked = {step.recover.generated for entry in target.quantized if (step := entry.asks("recover")) and step.recover}
    return max(asked, default=0) * plan.calibration.length


def training_bytes(plan: Plan, target: TargetPlan, walked_bytes: int, *, free_bytes: int, device: str) -> int:
    """Memory of the host that training takes, 0 where there is none: :func:`needed_bytes`, or of a block, beside ``walked_bytes`` of the
    walk, another walk, and six copies of its weights. On a GPU the host has what was solved, in float32 and as codes."""
    trained = [entry for entry in target.quantized if entry.asks("recover")]
    if not trained or plan.architecture is None:
        return 0
    options = trained[0].asks("recover")
    assert options is not None
    assert options.recover is not None
    elements = sum(entry.tensor.elements for entry in target.quantized)
    if mode_for(plan, target, options.recover, free_bytes=free_bytes, device=device) == "logits":
        return needed_bytes(plan, target, device) + 5 * elements if device == "cpu" else walked_bytes + 5 * elements
    blocks = plan.architecture.blocks
    largest = max(sum(e.tensor.elements for e in trained if any(m.startswith(f"{block}.") for m in e.modules)) for block in blocks)
    return 2 * walked_bytes + 4 * 6 * largest


def mode_for(plan: Plan, target: TargetPlan, options: Recover, *, free_bytes: int, device: str) -> str:
    """``logits`` or ``blocks``: what the recipe says, else whether the whole model's training fits."""
    if options.mode != "auto":
        return options.mode
    return "logits" if plan.predicts and needed_bytes(plan, target, device) <= MEMORY_SHARE * free_bytes else "blocks"


def choose_mode(plan: Plan, target: TargetPlan, options: Recover, device: str) -> str:
    """:func:`mode_for` with what is free now. Raises :class:`MachineError` where the whole model is asked for and does not fit."""
    import psutil

    free = torch.cuda.mem_get_info()[0] if device != "cpu" else psutil.virtual_memory().available
    mode = mode_for(plan, target, options, free_bytes=free, device=device)
    if mode == "logits" and (need := needed_bytes(plan, target, device)) > free:
        raise MachineError(
            f"{target.name}: training the whole model takes {need / 1e9:.1f} GB, {free / 1e9:.1f} are free; set recover.mode to blocks"
        )
    return mode


@contextmanager
def _exact(device: str) -> Iterator[None]:
    """On a GPU, float32 products in TF32 (ten bits of mantissa, as of inputs in float16), and attention in the one way whose gradient does
    not depend on which block of threads comes first."""
    if device == "cpu":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(was)
