"""How much each group of layers loses alone: the KL divergence of the model's output with that group quantized and nothing else.

Layers that a runtime fuses are one group. All groups walk through the model together, a block of weights in memory at a time: up to its own
block a group is the source, and shares its hidden states; from there on it has its own. Nothing is computed twice, and a model of any size
costs a block of memory and a lane a group.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.fusion import fused
from convert.ledger import Entry, Plan, TargetPlan
from convert.quantize import decoded_part
from convert.reference import PLACES, Reference
from formats.dtypes import DTYPES
from formats.errors import InputError, NumericsError
from formats.scheme import SCHEMES, Quantization

if TYPE_CHECKING:
    import torch

    from convert.crew import Crew
    from convert.differences import Differences
    from convert.lanes import Stand
    from convert.loading import Skeleton
    from convert.progress import Progress

#: Tokens unless told otherwise, and at most in one sequence of them.
TOKENS, LENGTH = 1024, 256
#: What is tried unless told otherwise.
SCHEMES_TRIED = ("int8-dynamic", "fp8-dynamic")
#: Lanes of which logits are computed at a time.
LANES = 64
#: Memory on a CPU for the lanes of one pass; what more trials cost is the source's way through the model, once a pass.
LANES_BYTES = 5 << 29


@dataclass(frozen=True)
class Form:
    """How a quantized linear layer computes: with ``weight(w)`` (out, in) for its weight ``w``, both float32, and an input (tokens, in)
    that is divided by ``divisor`` (in,), if there is one, and then rounded as ``activation`` says. ``limit``: the largest magnitude that a
    static scale holds, what is seen here unless given."""

    weight: Callable[[torch.Tensor], torch.Tensor]
    activation: Quantization | None
    divisor: torch.Tensor | None = None
    limit: float | None = None

    @property
    def lacks_limit(self) -> bool:
        """Whether its input has to be looked at before it can be rounded."""
        return self.activation is not None and not self.activation.dynamic and self.limit is None


@dataclass(frozen=True)
class Trial:
    """A group of ``modules`` in one ``scheme``, each in its form, of one block or of several; ``parameters`` of all their weights. Experts
    have the names they have on disk."""

    modules: tuple[str, ...]
    scheme: str
    parameters: int
    forms: Mapping[str, Form] = field(repr=False)


@dataclass(frozen=True)
class Loss:
    """What a group loses alone: ``kl_nats``, the mean over tokens of KL(source || source with this group quantized), with the standard
    error of that mean; ``block_error``, how far it moves what its block returns, as a share of it (the mean of tokens; NaN for the head).
    Not ``measured``: time was short, and the KL is what the block's error lets expect."""

    modules: tuple[str, ...]
    scheme: str
    parameters: int
    kl_nats: float
    standard_error: float
    block_error: float
    measured: bool = True


def groups_of(plan: Plan) -> list[tuple[str, ...]]:
    """Modules of linear layers that must share a scheme, group by group in the order of the checkpoint, the head last; all experts of a
    layer are one group."""
    entries = [entry for entry in plan.targets[0].entries if entry.parts]
    head = plan.architecture.head if plan.architecture else None
    fates = {entry.module(part): entry for entry in entries for part in entry.parts if entry.kind in ("linear", "unknown", "expert")}
    found = [tuple(group) for group in fused(plan.architecture, fates)]
    covered = {module for group in found for module in group}
    found += [(module,) for module in fates if module not in covered]
    order = {module: i for i, module in enumerate(fates)}
    found.sort(key=lambda group: min(order[module] for module in group))
    return [*found, *([(head,)] if head is not None else [])]


def entries_of(target: TargetPlan, modules: Iterable[str]) -> list[Entry]:
    """The tensors that layers lie in, each once, in the order of the plan."""
    wanted = set(modules)
    return [entry for entry in target.entries if wanted & {*entry.modules, *(entry.module(part) for part in entry.parts)}]


def round_trials(plan: Plan, schemes: Sequence[str]) -> list[Trial]:
    """Every group rounded to nearest in every scheme, weights by the code that writes them."""
    groups, entries = groups_of(plan), _by_module(plan)
    return [
        Trial(group, name, _parameters(entries, group), {module: _rounded(plan, entries[module], name) for module in group})
        for name in schemes
        for group in groups
    ]


def _by_module(plan: Plan) -> dict[str, Entry]:
    entries = plan.targets[0].entries
    return {name: entry for entry in entries for name in (*entry.modules, *(entry.module(part) for part in entry.parts))}


def _parameters(entries: Mapping[str, Entry], group: Iterable[str]) -> int:
    """Of layers of which several may lie in one tensor."""
    return sum({(entry := entries[module]).tensor.name: entry.tensor.elements for module in group}.values())


def sensitivity_of(
    plan: Plan,
    progress: Progress,
    *,
    schemes: Sequence[str] | None = None,
    tokens: int = TOKENS,
    seconds: float | None = None,
    device: str = "cpu",
) -> tuple[list[Loss], dict[str, Any]]:
    """:func:`measure` of every group, rounded to nearest in each of ``schemes``. Raises :class:`InputError` for a scheme that is none, or
    whose tiles a layer is not made of."""
    names = tuple(dict.fromkeys(schemes or SCHEMES_TRIED))
    for name in names:
        if name not in SCHEMES:
            raise InputError(f"no scheme is called {name!r}; known are {', '.join(SCHEMES)}")
        _require_tiles(plan, name)
    return measure(plan, round_trials(plan, names), progress, tokens=tokens, seconds=seconds, device=device)


def _require_tiles(plan: Plan, name: str) -> None:
    entries, tile = _by_module(plan), SCHEMES[name].weight.tile
    for module in (module for group in groups_of(plan) for module in group):
        entry = entries[module]
        rows, columns = next((part.shape(entry.tensor) for part in entry.parts if part.module == module), entry.tensor.matrix_shape)
        if rows % (tile.rows or 1) or columns % (tile.columns or 1):
            raise InputError(f"{module} is {rows} x {columns}, which tiles of {name} do not divide; leave that scheme out")


def spelled(modules: Sequence[str]) -> str:
    """A group's name for people: what its modules have in common, and the rest of each."""
    parents = {module.rpartition(".")[0] for module in modules}
    if len(modules) == 1 or len(parents) > 1:
        return ", ".join(modules)
    return f"{parents.pop()}.{{{', '.join(module.rpartition('.')[2] for module in modules)}}}"


def in_words(how: Mapping[str, Any]) -> str:
    """A line on how losses were measured, from what :func:`measure` says of it."""
    logits, products = how.get("logits", {}), how.get("products")
    compared, vocabulary = logits.get("compared", 0), logits.get("vocabulary", 0)
    words = [f"{how['text']['tokens']:,} tokens a group"]
    if compared < vocabulary:
        words.append(
            f"KL from {compared:,} of {vocabulary:,} logits a token (every one likelier than 1 in {PLACES:,}, and a sample for the rest; "
            f"{100 * logits['left_out']:.2g} % of the probability is left out)"
        )
    if products:
        words.append(f"effects on later layers multiplied in INT8, wrong by at most {100 * products['wrong']:.2g} % of each")
    return "; ".join(words)


def records(losses: Sequence[Loss]) -> list[dict[str, Any]]:
    """As plain data; what is not known is left out."""
    found = []
    for loss in losses:
        values = {"kl_nats": loss.kl_nats, "standard_error": loss.standard_error, "block_error": loss.block_error}
        rounded = {key: float(f"{value:.6g}") for key, value in values.items() if math.isfinite(value)}
        found.append(
            {"modules": list(loss.modules), "scheme": loss.scheme, "parameters": loss.parameters, **rounded, "measured": loss.measured}
        )
    return found


def _rounded(plan: Plan, entry: Entry, name: str) -> Form:
    import torch

    from convert.algorithms import rtn

    dtype = getattr(torch, DTYPES[entry.scale_dtype or plan.targets[0].dtype].torch_name)
    scheme = SCHEMES[name]
    return Form(lambda weight: rtn.quantize(weight.clone(), scheme.weight, scale_dtype=dtype).dequantize(), scheme.activation)


def artifact_trials(plan: Plan, artifact: Path, schemes: Sequence[str] = ()) -> list[Trial]:
    """Every group that is quantized in an artifact of the plan's first target, as it was made: its codes, and what smoothing folded into
    them and out of their input. Behind these, every group with what was smoothed rounded in each of ``schemes``.

    What was folded into the rows of a layer that feeds another is taken out again: alone, it feeds that other one unsmoothed.
    """
    import torch

    from convert.folds import folded, read_fold, touching
    from convert.source import SafetensorsReader
    from formats.manifest import read_manifest
    from formats.tensors import GRAPHS, read_tensors

    target = plan.targets[0]
    calibration = read_manifest(artifact).calibration or {}
    folds = [read_fold(record) for record in calibration.get("folds", [])]
    located = read_tensors(artifact, target.format)
    reader = SafetensorsReader(located, lambda file: artifact / file, headers=target.format not in GRAPHS)
    entries = {entry.module(part): (entry, part) for entry in target.quantized for part in entry.parts}

    walked = getattr(torch, calibration.get("dtype", "float32"))

    def form_of(module: str, other: str = "") -> Form:
        entry, part = entries[module]
        assert entry.scheme is not None
        rounded = _rounded(plan, entry, other) if other else None
        mine = touching(folds, module)
        divisor = next((fold.scales for fold in mine if module in fold.consumers), None)
        rows = [fold.rows for fold in mine if module == fold.producer]

        def weight(was: torch.Tensor) -> torch.Tensor:
            if rounded is None:
                decoded = decoded_part(reader, target.format, entry, part)
            else:
                decoded = rounded.weight(folded(was.cpu().to(walked).float(), module, mine) if mine else was.cpu())
            for scales in rows:
                decoded = decoded * scales[:, None]
            return decoded.to(was.device)

        return Form(weight, rounded.activation if rounded else entry.scheme.activation, divisor)

    by_module = {module: entry for module, (entry, _) in entries.items()}
    return [
        Trial(group, other or _scheme(by_module[group[0]]), _parameters(by_module, group), {name: form_of(name, other) for name in group})
        for other in ("", *schemes)
        for group in groups_of(plan)
        if all(module in entries for module in group)
    ]


def together(trials: Sequence[Trial]) -> Trial:
    """All groups of some trials at once."""
    return Trial(
        tuple(module for trial in trials for module in trial.modules),
        " ".join(dict.fromkeys(trial.scheme for trial in trials)),
        sum(trial.parameters for trial in trials),
        {module: form for trial in trials for module, form in trial.forms.items()},
    )


def weight_error(plan: Plan, trial: Trial) -> float:
    """The error of a group's weights as a share of their length; NaN for experts."""
    noise = signal = 0.0
    for entry in entries_of(plan.targets[0], trial.modules):
        if entry.experts:
            return math.nan
        weight = plan.checkpoint.reader.read(entry.tensor.name, 0, entry.tensor.matrix_shape[0]).float()
        form = trial.forms[entry.modules[0]]
        found = form.weight(weight)
        found = found if form.divisor is None else found / form.divisor
        noise += float((found - weight).square().sum())
        signal += float(weight.square().sum())
    return math.sqrt(noise / signal)


def _scheme(entry: Entry) -> str:
    assert entry.scheme is not None
    return entry.scheme.name


def measured_on(plan: Plan, *, tokens: int = TOKENS, length: int = LENGTH) -> Plan:
    """The plan with the calibration text on which losses are measured. Raises :class:`InputError` for a model of which none can be."""
    model = plan.architecture
    if model is None or not model.predicts or not model.blocks or model.encoder_decoder:
        raise InputError(f"{plan.checkpoint.origin}: sensitivity is measured at the logits of a stack of blocks, which this model is not")
    count = math.ceil(tokens / length)
    settings = plan.calibration
    settings = settings.model_copy(update={"sequences": count, "length": tokens // count, "seed": settings.seed + 1})
    return replace(plan, recipe=plan.recipe.model_copy(update={"calibration": settings}))


def measure(
    plan: Plan,
    trials: Sequence[Trial],
    progress: Progress,
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    seconds: float | None = None,
    device: str = "cpu",
) -> tuple[list[Loss], dict[str, Any]]:
    """The loss of every trial, in their order, and how it was measured: the ``text``, which calibration itself does not begin with; of
    a token's ``logits`` how many are ``compared``, the mean, and the probability ``left_out``; and ``products`` of differences: of how many
    layers of all walks in INT8, how wrong the worst was, and of how many in float32 after all, see :mod:`convert.differences`.

    With ``seconds`` the error that each makes in its own block is taken first, in one pass, and only as many as that time allows are
    followed to the output, those with the largest errors.

    Raises :class:`InputError` for a model that predicts no tokens or is no stack of blocks, :class:`NumericsError` for logits that are not
    finite, and what reading text raises.
    """
    from convert.calibrate import calibration_tokens
    from convert.differences import MOST_WRONG

    asked = measured_on(plan, tokens=tokens, length=length)
    with tempfile.TemporaryDirectory(prefix="octavo-") as scratch:
        sequences, record = calibration_tokens(asked, Path(scratch))
        batches = [sequence[None] for sequence in sequences]
        chosen: list[int] = list(range(len(trials)))
        errors: dict[int, float] = {}
        if seconds is not None:
            started = time.perf_counter()
            errors = _Pass(plan, trials, batches, progress, Path(scratch), device).run("ordering groups", to_output=False).errors
            chosen = _affordable(plan, trials, errors, spent=time.perf_counter() - started, seconds=seconds)
        values: dict[int, tuple[float, float]] = {}
        how: dict[str, Any] = {"text": record}
        wrong: list[float] = []
        most = _lanes_at_once(plan, sum(batch.numel() for batch in batches), device)
        passes = math.ceil(len(chosen) / most)
        each = math.ceil(len(chosen) / max(1, passes))
        for number in range(passes):
            part = chosen[number * each : (number + 1) * each]
            name = f"measuring groups{f', {number + 1} of {passes}' if passes > 1 else ''}"
            done = _Pass(plan, [trials[i] for i in part], batches, progress, Path(scratch), device).run(name, to_output=True)
            errors |= {part[i]: error for i, error in done.errors.items()}
            values |= {i: done.kl(j) for j, i in enumerate(part)}
            wrong += done.wrong
            how["logits"] = done.logits
    if right := [share for share in wrong if share <= MOST_WRONG]:
        how["products"] = {"int8": len(right), "wrong": float(f"{max(right):.3g}"), "float32": len(wrong) - len(right)}
    for i, (kl, _) in values.items():
        if not math.isfinite(kl):
            raise NumericsError(f"{trials[i].modules[0]} in {trials[i].scheme}: the logits are not finite")
    losses = []
    for i, trial in enumerate(trials):
        if i in values:
            kl, error = values[i]
        else:  # a small error of the stream is a small shift of logits, and the KL its square
            ratios = [values[j][0] / errors[j] ** 2 for j in values if trials[j].scheme == trial.scheme and errors.get(j, 0) > 0]
            kl, error = errors[i] ** 2 * statistics.median(ratios or [1.0]), math.nan
        losses.append(Loss(trial.modules, trial.scheme, trial.parameters, kl, error, errors.get(i, math.nan), measured=i in values))
    return losses, how


def _affordable(plan: Plan, trials: Sequence[Trial], errors: Mapping[int, float], *, spent: float, seconds: float) -> list[int]:
    """The trials with the largest errors in their blocks, the head first, that can be followed to the output in the time that is left. The
    pass that found the errors took the source through all blocks and each trial through one, which tells what a block costs."""
    assert plan.architecture is not None
    blocks = plan.architecture.blocks
    each = spent / (len(blocks) + len(errors))
    block = max(1, sum(trial.parameters for trial in trials) // max(1, len(blocks)) // max(1, len({trial.scheme for trial in trials})))
    head = max((entry.tensor.elements for entry in plan.targets[0].entries if entry.kind == "head"), default=0) / block * 1.5
    left = seconds - spent - each * (len(blocks) + head)
    chosen: list[int] = []
    for i in sorted(range(len(trials)), key=lambda i: -errors.get(i, math.inf)):
        behind = len(blocks) - _block_of(blocks, trials[i].modules[0])
        left -= each * (behind + head)
        if left < 0 and chosen and i in errors:  # what lies in no block has no error there to be estimated by
            break
        chosen.append(i)
    return sorted(chosen)


def _lane_bytes(plan: Plan, tokens: int) -> int:
    """What a lane holds at most: what goes into a block and comes out of it, and where it began."""
    assert plan.architecture is not None
    return 3 * tokens * (plan.architecture.hidden_size or 0) * 4


def _lanes_at_once(plan: Plan, tokens: int, device: str) -> int:
    """As many as are held in memory beside the source, at least one."""
    import psutil
    import torch

    from convert.lanes import LANE_SHARE

    on_gpu = device != "cpu"
    most = torch.cuda.mem_get_info()[0] * LANE_SHARE if on_gpu else min(LANES_BYTES, psutil.virtual_memory().available * LANE_SHARE)
    return max(1, int(most) // max(1, _lane_bytes(plan, tokens)) - _Pass.SOURCES)


def _block_of(blocks: Sequence[str], module: str) -> int:
    return next((i for i, block in enumerate(blocks) if module.startswith(f"{block}.")), len(blocks))


class _Pass:
    """One walk of the source and of trials beside it.

    At the head the source is ahead. Of the trials only the logits are computed that the source makes likely and a sample of the others
    (:class:`Reference`), token by token for all lanes at once, and handed to the model, which may scale or cap each. That it does no
    more is seen by a witness, the source's own logits at these places; if it does, all are computed.
    """

    #: Lanes of a batch before those of the trials: the source and the witness.
    SOURCES = 2

    def __init__(
        self, plan: Plan, trials: Sequence[Trial], batches: Sequence[torch.Tensor], progress: Progress, scratch: Path, device: str
    ) -> None:

        from convert.loading import Skeleton

        self._plan, self._trials, self._progress = plan, trials, progress
        self._scratch, self._device = scratch, device
        self._tokens = batches
        self._skeleton = Skeleton(plan.checkpoint, dtype="float32", trust_remote_code=plan.recipe.trust_remote_code)
        experts = {entry.tensor.name: entry.parts for entry in plan.targets[0].entries if entry.experts and entry.parts}
        self._skeleton.find_experts(experts)
        if self._skeleton.experts:
            self._skeleton.model.set_experts_implementation("eager")
        self._reference: Reference | None = None
        self._kl: dict[int, list[torch.Tensor]] = {}
        self._in_places = False
        self.wrong: list[float] = []
        self.logits: dict[str, Any] = {}
        self._looked: list[tuple[int, int, float]] = []
        self.errors: dict[int, float] = {}

    def kl(self, trial: int) -> tuple[float, float]:
        """Mean and its standard error over tokens."""
        import torch

        values = torch.cat(self._kl[trial]).double()
        return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan

    def run(self, name: str, *, to_output: bool) -> _Pass:
        import psutil
        import torch

        from convert.crew import crew
        from convert.differences import Differences
        from convert.export import cores, one_thread
        from convert.integers import pays
        from convert.lanes import place_for, walk

        assert self._plan.architecture is not None
        count, blocks = len(self._tokens), self._plan.architecture.blocks
        begins = [min(self._lies_in(module) for module in trial.forms) for trial in self._trials]
        lanes = len(self._trials) + self.SOURCES if to_output else 1
        # Batch by batch all lanes: of the source's logits those of one batch are kept.
        batches = [{"input_ids": batch, "use_cache": False} for batch in self._tokens for _ in range(lanes)]
        free = torch.cuda.mem_get_info()[0] if self._device != "cpu" else 0
        size = sum(batch.numel() for batch in self._tokens)
        lane_bytes = lanes * _lane_bytes(self._plan, size)
        host = psutil.virtual_memory().available
        place = place_for(lane_bytes, on_gpu=self._device != "cpu", gpu_free_bytes=free, host_free_bytes=host)
        finish = partial(self._finish, lanes) if to_output else None
        stands = walk(self._skeleton, batches, device=self._device, place=place, scratch=self._scratch, finish=finish, at_head=to_output)
        work = sum(len(blocks) + 1 - begin for begin in begins) + len(blocks) if to_output else len(blocks) + len(begins)
        workers = cores() if self._device == "cpu" else 1
        with self._progress.stage(name, size * work, unit="tokens") as advance, one_thread(), crew(workers) as hands:
            self._advance, self._hands = advance, hands
            for i, stand in enumerate(stands):
                if i == len(blocks):
                    stand.hand_on_as_made(self._logits(stand, lanes))
                    continue
                apart = Differences(stand.module, stand.name, hands, on=pays(self._device))
                with apart.put_in():
                    source, outputs = self._block(stand, i, begins, apart, lanes, to_output=to_output)
                self.wrong += apart.wrong
                if to_output:
                    all_lanes = [source] * self.SOURCES + [outputs.get(j, source) for j in range(len(self._trials))]
                    stand.hand_on([lane[batch] for batch in range(count) for lane in all_lanes])
        return self

    def _block(
        self, stand: Stand, i: int, begins: Sequence[int], apart: Differences, lanes: int, *, to_output: bool
    ) -> tuple[list[Any], dict[int, list[Any]]]:
        """What a block returns for the source's batches, and for each trial that has begun."""
        count = len(self._tokens)
        size = sum(batch.numel() for batch in self._tokens)

        def through(numbers: Sequence[int], exact: Set[str] = frozenset()) -> Iterator[Any]:
            def one(number: int, *, look: bool = False) -> Any:
                with apart.beside(number // lanes, exact=exact, look=look):
                    return stand.output(number)

            look = apart.unlooked
            if look:
                yield one(numbers[0], look=True)
            yield from self._hands.map(one, numbers[look:])

        source = self._through(stand, [self._forms_in(trial, i) for trial in self._trials], apart, range(0, count * lanes, lanes))
        mine = [self._forms_in(trial, i) for trial in self._trials]
        self._advance(size)
        outputs: dict[int, list[Any]] = {}
        if plain := [j for j, begin in enumerate(begins) if to_output and begin < i and not mine[j]]:
            # Batch by batch: what the source has shown of one is then in cache for all.
            made = through([batch * lanes + self.SOURCES + j for batch in range(count) for j in plain])
            for batch in range(count):
                for j in plain:
                    outputs.setdefault(j, []).append(next(made))
                self._advance(len(plain) * self._tokens[batch].numel())
        for j in range(len(self._trials)):
            if mine[j] and (begins[j] == i or to_output):
                with _put_in(self._skeleton, mine[j]):
                    outputs[j] = list(through(range(self.SOURCES + j if to_output else 0, count * lanes, lanes), mine[j].keys()))
                if begins[j] == i:
                    self.errors[j] = _mean_error(source, outputs[j])
                self._advance(size)
        return source, outputs

    def _lies_in(self, module: str) -> int:
        """The number of a layer's block, beyond the last where it lies in none."""
        assert self._plan.architecture is not None
        place = self._skeleton.experts.get(module)
        return _block_of(self._plan.architecture.blocks, place.parameter if place else module)

    def _forms_in(self, trial: Trial, block: int) -> dict[str, Form]:
        return {module: form for module, form in trial.forms.items() if self._lies_in(module) == block}

    def _through(self, stand: Stand, mine: Sequence[Mapping[str, Form]], apart: Differences, source: Sequence[int]) -> list[Any]:
        """What the source's block returns for each batch of its lane, ``source``; of forms that round statically and do not say by what,
        the largest input that the source shows becomes the limit."""
        divisors = {module: form.divisor for forms in mine for module, form in forms.items() if form.lacks_limit}
        seen: dict[str, list[float]] = {name: [] for name in divisors}

        def look(name: str, x: torch.Tensor) -> None:
            divisor = divisors[name]
            if x.numel():
                seen[name].append(float((x if divisor is None else x / divisor.to(x.device)).abs().max()))

        def plain(batch: int) -> Any:
            with apart.source(batch):
                return stand.output(source[batch])

        with _inputs(self._skeleton, divisors, look):
            outputs = list(self._hands.map(plain, range(len(source))))
        if divisors:
            limits = {module: max(found, default=0.0) for module, found in seen.items()}
            self._trials = [
                replace(t, forms={m: replace(f, limit=limits[m]) if m in limits and f.lacks_limit else f for m, f in t.forms.items()})
                for t in self._trials
            ]
        return outputs

    def _logits(self, stand: Stand, lanes: int) -> Iterator[torch.Tensor]:
        """What the head returns for every lane of each batch, made when those before have become logits."""
        firsts = range(0, len(self._tokens) * lanes, lanes)
        sources = [stand.arguments[first][0][0] for first in firsts]
        named = self._plan.architecture.head if self._plan.architecture else None
        forms = {j: _limited(trial.forms[named], sources) for j, trial in enumerate(self._trials) if named and named in trial.forms}
        head = _Head(stand, {first + self.SOURCES + j: form for j, form in forms.items() for first in firsts}, self._hands)
        self._in_places = head.is_linear
        for first in firsts:
            others = range(first + self.SOURCES, first + lanes)
            yield (source := head.whole(first))
            assert self._reference is not None
            yield source if self._reference.places is None else next(head.at(self._reference, [first]))
            # The witness may have changed it.
            yield from map(head.whole, others) if self._reference.places is None else head.at(self._reference, others)

    def _finish(self, lanes: int, i: int, output: Any) -> None:
        logits, lane = output.logits[0], i % lanes
        if lane == 0:
            self._reference = Reference(logits, most=PLACES if self._in_places else logits.shape[-1])
            self._source = logits
            return
        assert self._reference is not None
        if lane < self.SOURCES:
            if not self._reference.is_like(logits):
                self._in_places = False
                self._reference = Reference(self._source, most=self._source.shape[-1])
            reference, whole = self._reference, self._source.shape[-1]
            self._looked.append((len(logits), sum(reference.counts) or whole * len(logits), reference.left_out))
            self.logits = {"vocabulary": whole, **_compared(self._looked)}
            del self._source
            return
        self._kl.setdefault(lane - self.SOURCES, []).append(self._reference.kl(logits, self._hands).cpu())
        self._advance(len(logits))


class _Head:
    """The output head before which all lanes stand; ``forms`` of the lanes in which it is quantized."""

    def __init__(self, stand: Stand, forms: Mapping[int, Form], hands: Crew) -> None:
        self._stand, self._hands, self._forms = stand, hands, forms
        self._inputs: list[torch.Tensor] = [args[0] for args, _ in stand.arguments]
        self._bias = stand.module.bias
        weights = {number: form.weight(stand.module.weight.float()) for number, form in {id(form): form for form in forms.values()}.items()}
        self._weights = {lane: weights[id(form)] for lane, form in forms.items()}

    @property
    def is_linear(self) -> bool:
        """Whether a logit is a product with one row of its weight."""
        import torch

        return type(self._stand.module) is torch.nn.Linear

    def whole(self, lane: int) -> torch.Tensor:
        """Logits (1, tokens, vocabulary)."""
        import torch

        # The greenlets are all in this thread, and the product is a large one.
        torch.set_num_threads(self._hands.count)
        try:
            if lane in self._forms:
                return torch.nn.functional.linear(_seen(self._inputs[lane], self._forms[lane]), self._weights[lane], self._bias)
            found: torch.Tensor = self._stand.output(lane)
            return found
        finally:
            torch.set_num_threads(1)

    def at(self, reference: Reference, lanes: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits (1, tokens, k) of each lane at the places of ``reference``."""
        import torch

        for start in range(0, len(lanes), LANES):
            some = lanes[start : start + LANES]
            plain = [self._inputs[lane] for lane in some if lane not in self._forms]
            found = iter(self._products(torch.cat(plain), self._stand.module.weight, reference) if plain else ())
            for lane in some:
                if lane in self._forms:
                    (logits,) = self._products(_seen(self._inputs[lane], self._forms[lane]), self._weights[lane], reference)
                else:
                    logits = next(found)
                yield logits[None]

    def _products(self, x: torch.Tensor, weight: torch.Tensor, reference: Reference) -> torch.Tensor:
        """Of x (lanes, tokens, in) with rows of a weight (vocabulary, in) that each token has its own of: (lanes, tokens, k)."""
        import torch

        places = reference.places
        assert places is not None
        logits = torch.empty(*x.shape[:2], places.shape[1], device=x.device)

        def of_token(i: int) -> None:
            count = reference.counts[i]
            own = logits[:, i]
            own[:, :count] = x[:, i] @ weight[places[i, :count]].to(x.dtype).T
            own[:, count:] = own[:, :1]

        list(self._hands.map(of_token, range(len(places))))
        return logits if self._bias is None else logits.add_(self._bias[places])


def _compared(batches: Sequence[tuple[int, int, float]]) -> dict[str, float]:
    """Of batches of (tokens, logits that are compared, probability of the others)."""
    tokens = sum(count for count, *_ in batches)
    left_out = sum(count * share for count, _, share in batches) / tokens
    return {"compared": round(sum(logits for _, logits, _ in batches) / tokens), "left_out": float(f"{left_out:.3g}")}


def _limited(form: Form, inputs: Iterable[torch.Tensor]) -> Form:
    """With the largest magnitude among the inputs as its limit, if it lacks one."""
    if not form.lacks_limit:
        return form
    divisor = form.divisor
    return replace(form, limit=max(float((x if divisor is None else x / divisor.to(x.device)).abs().max()) for x in inputs))


def _mean_error(source: Sequence[Any], own: Sequence[Any]) -> float:
    import torch

    from convert.groups import first_tensor

    shares = []
    for before, after in zip(source, own, strict=True):
        was = first_tensor(before).float()
        shares.append(((first_tensor(after).float() - was).norm(dim=-1) / was.norm(dim=-1).clamp(min=1e-30)).flatten())
    return float(torch.cat(shares).mean())


def _seen(x: torch.Tensor, form: Form) -> torch.Tensor:
    """An input (..., in) as the quantized layer has it."""
    from convert.algorithms.rtn import to_nearest
    from convert.algorithms.smoothing import fake_quantize

    rows = x.reshape(-1, x.shape[-1]).float()
    if form.divisor is not None:
        rows = rows / form.divisor.to(rows.device)
    if form.activation is not None and not form.activation.dynamic:
        scale = (form.limit or 0.0) / form.activation.grid.high
        rows = to_nearest(rows / scale, form.activation.grid).mul_(scale) if scale else rows
    else:
        rows = fake_quantize(rows, form.activation)
    return rows.reshape(x.shape).to(x.dtype)


@contextmanager
def _put_in(skeleton: Skeleton, forms: Mapping[str, Form]) -> Iterator[None]:
    """Makes layers quantized ones while the context lasts."""
    was = {name: skeleton.weight(name).clone() for name in forms}
    try:
        for name, form in forms.items():
            skeleton.weight(name).copy_(form.weight(was[name].float()))
        with _inputs(skeleton, forms, lambda name, x: _seen(x, forms[name])):
            yield
    finally:
        for name, weight in was.items():
            skeleton.weight(name).copy_(weight)


@contextmanager
def _inputs(skeleton: Skeleton, modules: Iterable[str], seen: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Calls ``seen(module, x)`` for what goes into layers, x (..., in) or, of experts, (tokens, in); what it returns goes in instead."""
    from convert.experts import Products, around

    # An expert's layers that read the same input are multiplied as one matrix, so one of them speaks for all.
    experts: dict[str, dict[int, str]] = {}
    hooks = []
    for name in modules:
        if place := skeleton.experts.get(name):
            experts.setdefault(place.parameter, {}).setdefault(place.expert, name)
        else:
            hook = lambda _, args, name=name: None if (x := seen(name, args[0])) is None else (x, *args[1:])  # noqa: E731
            hooks.append(skeleton.model.get_submodule(name).register_forward_pre_hook(hook))

    def product(parameter: str, expert: int, x: torch.Tensor) -> torch.Tensor | None:
        name = experts[parameter].get(expert)
        return None if name is None else seen(name, x)

    owners: dict[str, list[str]] = {}
    for parameter in experts:
        owners.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    for owner, names in owners.items():
        module = skeleton.model.get_submodule(owner)
        parameters = {name: skeleton.model.get_parameter(name) for name in names}
        hooks += around(module, partial(Products, parameters, product, pieces=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
