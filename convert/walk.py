"""One walk of calibration text through the source: what is looked at while all batches stand before a block, and what becomes of it.

A walk serves targets whose blocks see the same inputs: those that change nothing in the model together, and one that changes what later
blocks see alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from convert import groups, health, solve
from convert.ailments import explain
from convert.algorithms import TRANSFORMS
from convert.crew import Crew
from convert.lanes import HELD_TOKENS, place_for, walk
from convert.ledger import RESPELL, Entry, TargetPlan
from convert.loading import Skeleton
from convert.observe import CacheRanges, Limit, Observer, Shown, Stats, watch_cache
from convert.respell import lacks_cache
from convert.static import by_histogram, find_limits
from formats.errors import InputError, MachineError, NumericsError, OctavoError, RecipeError, SourceError

if TYPE_CHECKING:
    from convert.architecture import Part
    from convert.lanes import Stand
    from convert.ledger import Plan
    from convert.progress import Progress
    from convert.recover import Recovery
    from convert.solve import Smoothed, Solved
    from formats.qtensor import QTensor

#: Why a layer is not smoothed, for messages and the ledger.
NOTHING_FEEDS_IT = "nothing was found that feeds it and could take up the factors"
#: Tokens that a GPU takes through a block at once: 8 sequences of 2,048.
GPU_TOKENS = 16_384
#: Tokens on which groups that a block before had are proved to scale together here too.
PROBE_TOKENS = 128
#: What an interrupted run has written already: (target, entry, part, or None for what is kept) -> the values it stands for.
Recall = Callable[[str, Entry, "Part | None"], torch.Tensor]


@dataclass(frozen=True)
class Run:
    """What the walks of one calibration have in common. ``tokens``: its sequences, int64 (tokens,); ``dtype``: in what the model computes,
    a torch name; ``known``: largest inputs that the source's own scales tell, by module. ``done``: by target, tensors that were written
    before, and ``recall`` what they stand for; ``recoveries``: by target, those that are trained."""

    plan: Plan
    progress: Progress
    tokens: Sequence[torch.Tensor]
    dtype: str
    device: str
    hands: Crew
    scratch: Path
    known: Mapping[str, float]
    done: Mapping[str, frozenset[str]]
    recall: Recall
    recoveries: Mapping[str, Recovery]


@dataclass(frozen=True)
class _Todo:
    """What there is to do before a block. By target: ``again``, the entries to be solved; those whose static scales come from histograms,
    ``plain`` where the input is what is seen, ``behind`` where smoothing changes it; ``looked_at``, those whose health is. ``static``: the
    modules inside of which the largest input is wanted. ``passes``: leaders of experts, by the pass over the block that sees their
    Hessians, without those of the first one."""

    again: Mapping[str, list[Entry]]
    plain: Mapping[str, list[Entry]]
    behind: Mapping[str, list[Entry]]
    looked_at: Mapping[str, list[Entry]]
    static: Sequence[str]
    by_gptq: Sequence[str]
    passes: Sequence[tuple[str, ...]]

    @cached_property
    def entries(self) -> list[Entry]:
        """Of all targets, what is to be solved."""
        return [entry for entries in self.again.values() for entry in entries]

    @cached_property
    def smoothing(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.asks(*TRANSFORMS)]

    @property
    def wide(self) -> bool:
        """Whether the block has to be in float32 while it is worked on, so that no factor is lost in rounding."""
        return bool(self.smoothing) or any(entry.asks("recover") for entry in self.entries)


@dataclass(frozen=True)
class _Block:
    """A block that was seen, while its targets are worked on one after the other. ``teacher``: the same one of the source, where something
    is trained block by block. ``groups``: what scales together, where anything is smoothed. ``narrow``: the dtypes of parameters that are
    widened meanwhile; ``as_seen``: what parameters were when inputs were seen, where further passes need it."""

    stand: Stand
    teacher: Stand | None
    todo: _Todo
    groups: Sequence[groups.Group]
    narrow: Mapping[Any, torch.dtype]
    as_seen: Mapping[Any, torch.Tensor]


class Walk:
    """Takes all batches through the blocks once: :meth:`solve`, and then :meth:`stats`."""

    def __init__(self, run: Run, targets: Sequence[TargetPlan]) -> None:
        plan = run.plan
        assert plan.architecture is not None
        self._run = run
        self._targets = targets
        self._blocks = plan.architecture.blocks
        self._propagates = any(target.solved for target in targets) and plan.calibration.propagate == "quantized"
        with _explained(plan):
            self._skeleton = Skeleton(plan.checkpoint, dtype=run.dtype, trust_remote_code=plan.recipe.trust_remote_code)
            _find_experts(self._skeleton, targets)
        self._observer = Observer(self._skeleton, plan.architecture.groups)
        self._static = sorted({module for each in targets for module in set(each.static) - self._written(each)} - run.known.keys())
        self._observer.want(self._static, "absmax")
        self._outside = [module for module in self._static if not any(_lies_in(module, block, self._skeleton) for block in self._blocks)]
        self._headed = {
            target.name: [entry for entry in by_histogram(target.quantized) if set(_modules([entry])) & set(self._outside)]
            for target in targets
        }
        # By names and shapes of parameters: blocks need not be alike, and where they alternate each has its like.
        self._groups: dict[tuple[tuple[str, torch.Size], ...], tuple[groups.Group, ...]] = {}
        self._ranges: list[CacheRanges] = []
        self._limits: dict[str, dict[str, Limit]] = {target.name: {} for target in targets}
        self._looked: dict[str, dict[str, Any]] = {target.name: {} for target in targets}
        self._bare: list[str] = []  # layers that smoothing was asked for and did not reach
        self._few: list[str] = []  # experts of which GPTQ knows too little

    def solve(self) -> Generator[Solved, None, None]:
        """Yields what was solved, block by block. Raises as :func:`convert.calibrate.calibrate` does."""
        count = sum(map(len, self._run.tokens))
        with self._observer, self._run.progress.stage("calibrating", count * len(self._blocks), unit="tokens") as advance:
            for stand, teacher in self._stands():
                yield from self._work(stand, teacher)
                advance(count)
        self._tell()
        for target in self._targets:
            self._limits[target.name] |= find_limits(target, self._headed[target.name], self._observer)
        self._require_seen()

    def stats(self, target: TargetPlan, record: dict[str, Any]) -> Stats:
        """What a target needs to know of the model at work, when all is solved; ``record`` says on which text."""
        ranges = CacheRanges.joined(self._ranges)
        attentions = next((each.contents.attentions for each in self._targets if lacks_cache(self._run.plan.checkpoint, each)), ())
        limits = self._limits[target.name]
        return Stats(
            inputs={**self._run.known, **self._observer.absmax(), **{module: found.limit for module, found in limits.items()}},
            keys={attention.module: tuple(ranges.keys[attention.layer].tolist()) for attention in attentions},
            values={attention.module: tuple(ranges.values[attention.layer].tolist()) for attention in attentions},
            record=record,
            limits={target.name: limits},
            health={} if target.solved else self._looked[target.name],
            experts=self._observer.experts(),
        )

    def _stands(self) -> Iterator[tuple[Stand, Stand | None]]:
        """Every block with all batches before it, beside it the source's own where blocks are trained to return what its blocks do."""
        run, observer, plan = self._run, self._observer, self._run.plan
        batches = self._batches()
        way: dict[str, Any] = {"device": run.device, "place": self._place(), "scratch": run.scratch, "crew": run.hands}
        way["held"] = max(1, HELD_TOKENS // int(plan.calibration.length)) if run.device == "cpu" else 1
        shown: list[Shown] = []

        def finish(*_: object) -> None:
            observer.take([shown], run.hands)

        stands = walk(self._skeleton, batches, finish=finish if self._outside else None, probe=self._probe(), **way)
        by_block = any(run.recoveries[target.name].mode == "blocks" for target in self._targets if target.name in run.recoveries)
        source = Skeleton(plan.checkpoint, dtype="float32", trust_remote_code=plan.recipe.trust_remote_code) if by_block else None
        teachers = walk(source, batches, **way) if source else None
        while True:
            # Behind the last block the model goes on to its head; observers of histograms are forgotten with each block.
            observer.want(_modules(entry for entries in self._headed.values() for entry in entries), "histogram")
            with _explained(plan), observer.watching_outside(self._outside) as seen:
                shown = seen
                stand = next(stands, None)
                teacher = next(teachers, None) if teachers and stand else None
            if stand is None:
                break
            yield stand, teacher
        if teachers:
            teachers.close()

    def _batches(self) -> list[dict[str, Any]]:
        """Arguments of the model's forward, a cache that only looks at keys and values where these are wanted."""
        limit = GPU_TOKENS if self._run.device != "cpu" else 1
        batches: list[dict[str, Any]] = [{"input_ids": batch} for batch in batched(self._run.tokens, limit)]
        if any(lacks_cache(self._run.plan.checkpoint, target) for target in self._targets):
            self._ranges = watch_cache(batches)
        elif self._skeleton.model.can_generate():
            batches = [{**batch, "use_cache": False} for batch in batches]
        return batches

    def _probe(self) -> dict[str, Any] | None:
        """The beginning of the text, where groups are looked for; not where experts are, for few tokens come to few of them."""
        asked = any(entry.asks(*TRANSFORMS) for target in self._targets for entry in target.quantized)
        if not asked or self._skeleton.experts or len(self._run.tokens[0]) <= PROBE_TOKENS:
            return None
        without = {"use_cache": False} if self._skeleton.model.can_generate() else {}
        return {"input_ids": self._run.tokens[0][None, :PROBE_TOKENS], **without}

    def _place(self) -> str:
        """Where the lane lies."""
        architecture, on_gpu = self._run.plan.architecture, self._run.device != "cpu"
        assert architecture is not None
        lane_bytes = 2 * self._run.plan.calibration.tokens * (architecture.hidden_size or 0) * getattr(torch, self._run.dtype).itemsize
        free = torch.cuda.mem_get_info()[0] if on_gpu else 0
        return place_for(lane_bytes, on_gpu=on_gpu, gpu_free_bytes=free, host_free_bytes=psutil.virtual_memory().available)

    def _work(self, stand: Stand, teacher: Stand | None) -> Iterator[Solved]:
        """All that is done before a block, for one target after the other."""
        todo = self._todo(stand.name)
        self._ask(todo)
        with _explained(self._run.plan):
            self._see(stand, todo)
            # What further passes over experts run, whatever becomes of the block in between: what is widened is written to.
            of_block = stand.module.parameters() if todo.passes else ()
            as_seen = {p: p.data.clone() if todo.wide and p.dtype == torch.float32 else p.data for p in of_block}
            narrow = _widen(stand.module) if todo.wide else {}
            found: tuple[groups.Group, ...] = ()
            if todo.smoothing:
                shapes = tuple((name, parameter.shape) for name, parameter in stand.module.named_parameters())
                found = groups.find_groups(stand, self._groups.get(shapes, ()), self._skeleton.experts_in(stand.name))
                self._groups[shapes] = found
        block = _Block(stand, teacher, todo, found, narrow, as_seen)
        for target in self._targets:
            yield from self._work_for(target, block)
        for parameter, dtype in narrow.items():
            parameter.data = parameter.data.to(dtype)
        self._observer.forget("hessian", "histogram", "mean", "mean_magnitude", *health.KINDS)

    def _todo(self, block: str) -> _Todo:
        done, again, plain, behind, looked_at = self._run.done, {}, {}, {}, {}
        for target in self._targets:
            inside = [entry for entry in target.quantized if entry.within(block) and entry.algorithm != RESPELL]
            # A block of which anything is missing is done again whole: the same inputs give the same bytes.
            if target.solved and any(entry.tensor.name not in done[target.name] for entry in inside):
                again[target.name] = inside
            static = by_histogram(inside) if not target.solved or target.name in again else []
            plain[target.name] = [entry for entry in static if not entry.asks(*TRANSFORMS)]
            behind[target.name] = [entry for entry in static if entry.asks(*TRANSFORMS)]
            of_static = [entry for entry in inside if entry.scheme and entry.scheme.static]
            looked_at[target.name] = again.get(target.name, []) if target.solved else of_static
        by_gptq = _modules(entry for entries in again.values() for entry in entries if entry.coder == "gptq")
        passes = _passes(by_gptq, self._skeleton, self._observer, budget_bytes=self._run.plan.calibration.expert_hessians)[1:]
        static_inputs = [module for module in self._static if _lies_in(module, block, self._skeleton)]
        return _Todo(again, plain, behind, looked_at, static_inputs, by_gptq, passes)

    def _written(self, target: TargetPlan) -> set[str]:
        """Modules of blocks that an earlier run has solved whole, so that their inputs need not be seen again."""
        done, found = self._run.done[target.name], set[str]()
        for block in self._blocks if target.solved else ():
            inside = [entry for entry in target.quantized if entry.within(block) and entry.algorithm != RESPELL]
            if all(entry.tensor.name in done for entry in inside):
                found |= set(_modules(inside))
        return found

    def _ask(self, todo: _Todo) -> None:
        """Has the observer keep what the algorithms need of inputs in a block."""
        want, leader = self._observer.want, self._observer.leader
        later = {each for leaders in todo.passes for each in leaders}
        want([module for module in todo.by_gptq if leader.get(module, module) not in later], "hessian")
        want(_modules(todo.smoothing), "channels")
        want(_modules(entry for entry in todo.smoothing if _searches(entry)), "rows")
        want(_modules(entry for entry in todo.smoothing if entry.asks("awq")), "mean_magnitude")
        want(_modules(entry for entry in todo.entries if entry.asks("bias_correction")), "mean")
        want(_modules(entry for entries in todo.plain.values() for entry in entries), "histogram")
        for kind in health.KINDS:
            want(_modules(entry for entries in todo.looked_at.values() for entry in entries), kind)

    def _see(self, stand: Stand, todo: _Todo) -> None:
        """Runs the batches through the block as it is, where anything is wanted of it."""
        if todo.again or todo.static:
            stand.run(keep=not self._propagates, observer=self._observer)
        modules = [*todo.by_gptq, *_modules(todo.smoothing), *todo.static]
        self._few += _judge_experts(self._run.plan, modules, stand, self._observer, todo.by_gptq, self._skeleton)

    def _work_for(self, target: TargetPlan, block: _Block) -> Iterator[Solved]:
        """What a block is to one target: chosen limits, health, and codes, or those of an earlier run."""
        todo, observer = block.todo, self._observer
        limits = find_limits(target, todo.plain[target.name], observer)
        inputs = {**self._run.known, **observer.absmax(), **{module: found.limit for module, found in limits.items()}}
        self._look(target, todo.looked_at[target.name], inputs)
        if not target.solved:
            self._limits[target.name] |= limits
        elif target.name in todo.again:
            # Blocks behind see what the source makes of this one, unless it is changed for good.
            were = None if self._propagates else [(p, p.clone()) for p in block.stand.module.parameters()]
            yield from self._solve(target, block, inputs, limits)
            for parameter, was in were or ():
                parameter.copy_(was)
        elif self._propagates:
            _recall(target, block.stand.name, self._run.done[target.name], self._skeleton, self._run.recall)

    def _look(self, target: TargetPlan, entries: Sequence[Entry], inputs: Mapping[str, float]) -> None:
        items = [(entry, module) for entry in entries for module in _modules([entry])]
        look = partial(_look, skeleton=self._skeleton, observer=self._observer, inputs=inputs)
        found = zip(items, self._run.hands.map(look, items), strict=True)
        self._looked[target.name] |= {module: seen for (_, module), seen in found if seen}

    def _solve(self, target: TargetPlan, block: _Block, inputs: Mapping[str, float], limits: Mapping[str, Limit]) -> Iterator[Solved]:
        """Smooths, chooses codes, and trains, as the rules of a target ask for; the block then computes with these codes."""
        entries = block.todo.again[target.name]
        smoothed, changed = self._smooth(target, block)
        with _explained(self._run.plan), _narrow(block.narrow):
            limits = {**limits, **self._see_again(target, block)}
        known = solve.Known(
            self._skeleton,
            self._observer,
            smoothed,
            limits,
            solve.input_limits(self._observer, inputs, smoothed, limits),
            self._looked[target.name],
        )
        results = solve.solve_block(
            target,
            entries,
            known,
            changed=changed,
            crew=self._run.hands,
            passes=block.todo.passes,
            seen_in=partial(self._in_another_pass, block=block),
        )
        recovery = self._run.recoveries.get(target.name)
        if recovery is not None:
            results = _recovered(recovery, entries, list(results), block, known, len(self._blocks))
        written = self._run.done[target.name]
        for solved, codes in results:
            for module, code in codes.items() if self._propagates else ():
                self._skeleton.weight(module).copy_(code.dequantize())
            if solved.tensor not in written and not (recovery and recovery.mode == "logits"):
                yield solved

    def _smooth(self, target: TargetPlan, block: _Block) -> tuple[dict[str, Smoothed], dict[str, str]]:
        """As :func:`convert.solve.smooth_block`; notes the layers that it should have reached and did not."""
        if not block.todo.smoothing:
            return {}, {}
        entries = block.todo.again[target.name]
        smoothed, changed = solve.smooth_block(target, entries, block.stand, block.groups, self._skeleton, self._observer, self._run.hands)
        # Of experts that no token came to the recipe says what to do: they are rounded, whatever feeds them.
        known = smoothed.keys() | {leader for leader in self._observer.rounded if not self._observer.noted(leader)["tokens"]}
        reached = {module for module, leader in self._observer.leader.items() if leader in known} | known
        self._bare += _uncovered(self._run.plan, target, entries, reached)
        return smoothed, changed

    def _see_again(self, target: TargetPlan, block: _Block) -> dict[str, Limit]:
        """The limits of inputs that smoothing has changed: all batches run once more, for a histogram does not tell channels apart."""
        entries = block.todo.behind[target.name]
        if not entries:
            return {}
        with Observer(self._skeleton, self._groups_of_inputs) as behind:
            behind.want(_modules(entries), "histogram")
            block.stand.run(keep=False, observer=behind)
            return find_limits(target, entries, behind)

    @contextmanager
    def _in_another_pass(self, leaders: Collection[str], *, block: _Block) -> Iterator[None]:
        """The Hessians of some experts, for as long as the context lasts: all batches run through the block as it was when all else was
        seen, so that they are those of the first pass, to the bit."""
        stand, observer = block.stand, self._observer
        now = {parameter: parameter.data for parameter in block.as_seen}
        with Observer(self._skeleton, self._groups_of_inputs) as behind:
            behind.want(list(leaders), "hessian")
            for parameter, data in block.as_seen.items():
                parameter.data = data
            try:
                stand.run(keep=False, observer=behind)
                if shown := [leader for leader in leaders if leader in observer.shown]:
                    behind.show_all(shown, lambda: stand.run(keep=False, observer=behind))
            finally:
                for parameter, data in now.items():
                    parameter.data = data
        with observer.lent(behind, leaders, "hessian"):
            yield

    @property
    def _groups_of_inputs(self) -> Sequence[Sequence[str]] | None:
        """Modules that read the same input."""
        assert self._run.plan.architecture is not None
        return self._run.plan.architecture.groups

    def _tell(self) -> None:
        """What the user should know of layers that did not get what was asked for."""
        bare, few, say = self._bare, self._few, self._run.progress.say
        if bare:
            say(f"{bare[0]} (and {len(bare) - 1} more) is not smoothed: {NOTHING_FEEDS_IT}; the ledger says so of each")
        if few:
            say(
                f"warning: {few[0]} (and {len(few) - 1} more of experts): fewer tokens than inputs, and GPTQ then wins little over "
                "rounding; the manifest has the tokens of each"
            )

    def _require_seen(self) -> None:
        inputs = self._observer.absmax()
        for module, absmax in inputs.items():
            if not 0 < absmax < float("inf"):
                raise NumericsError(
                    f"{module}: the largest input that calibration saw is {absmax:g}; give it other text, or a dynamic scheme"
                )
        unseen = [module for module in self._static if module not in inputs]
        if unseen:
            raise InputError(
                f"{unseen[0]} (and {len(unseen) - 1} more) was never run by calibration, so it can have no static scale; give it a dynamic "
                "scheme, or keep it, with a rule of its own"
            )


def batched(tokens: Sequence[torch.Tensor], limit: int) -> list[torch.Tensor]:
    """Sequences in their order, int64 (sequences, tokens), neighbours of one length together up to ``limit`` tokens; the first is alone,
    for groups are proved on it."""
    batches: list[list[torch.Tensor]] = []
    for i, sequence in enumerate(tokens):
        if i > 1 and len(sequence) == len(batches[-1][0]) and (len(batches[-1]) + 1) * len(sequence) <= limit:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return [torch.stack(batch) for batch in batches]


def _widen(module: Any) -> dict[Any, torch.dtype]:
    """Makes float32 of a block's 16-bit parameters, so that no scale is lost in rounding; returns what they were."""
    narrow = {p: p.dtype for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    return narrow


def _recovered(
    recovery: Recovery,
    entries: Sequence[Entry],
    solved: Sequence[tuple[Solved, dict[str, QTensor]]],
    block: _Block,
    known: solve.Known,
    blocks: int,
) -> Iterator[tuple[Solved, dict[str, QTensor]]]:
    """What was solved of a block, trained if that goes block by block, else kept for when all ``blocks`` are there."""
    from convert.recover import Start

    codes = {module: code for _, chosen in solved for module, code in chosen.items()}
    starts = {
        module: Start(
            entry,
            codes[module],
            known.skeleton.weight(module).float().clone(),
            known.inputs[module] if entry.scheme and entry.scheme.static else None,
            known.observer.leader.get(module, module),
        )
        for entry in entries
        for module in _modules([entry])
    }
    if block.teacher is not None:
        return iter(recovery.block(block.stand, block.teacher, solved, starts, known.skeleton, blocks))
    recovery.keep([item for item, _ in solved], starts, known.skeleton)
    return iter(solved)


def _find_experts(skeleton: Skeleton, targets: Sequence[TargetPlan]) -> None:
    """Has the skeleton find those that calibration sees or changes, and transformers multiply them one by one, as their classes do."""
    parts = {entry.tensor.name: entry.parts for target in targets for entry in target.quantized if entry.experts}
    skeleton.find_experts(parts)
    if skeleton.experts:
        skeleton.model.set_experts_implementation("eager")


def _passes(modules: Iterable[str], skeleton: Skeleton, observer: Observer, *, budget_bytes: int) -> list[tuple[str, ...]]:
    """The leaders of experts among ``modules``, in passes whose Hessians take no more than the budget together, or one alone more."""
    found: list[list[str]] = []
    left = 0
    for leader in dict.fromkeys(observer.leader.get(module, module) for module in modules if module in skeleton.experts):
        size_bytes = 4 * skeleton.weight(leader).shape[1] ** 2
        if not found or size_bytes > left:
            found.append([])
            left = budget_bytes
        found[-1].append(leader)
        left -= size_bytes
    return [tuple(each) for each in found]


def _judge_experts(
    plan: Plan, modules: Sequence[str], stand: Stand, observer: Observer, by_gptq: Sequence[str], skeleton: Skeleton
) -> list[str]:
    """Does what the recipe says of experts that too few tokens came to; returns, in words, those of which GPTQ knows too little.

    Raises :class:`NumericsError` where it says nothing, and :class:`SourceError` where no expert was seen at all.

    Of a Hessian of fewer tokens than inputs the rest is damping: on random layers with inputs of a falling spectrum, as many tokens as
    inputs left 0.89 to 1.06 of the output error of rounding, on other tokens of the same kind, four times as many 0.67 to 0.78.
    """
    settings = plan.calibration
    missing = observer.too_few(modules, settings.expert_tokens)
    if missing and not any(observer.noted(module).get("tokens") for module in modules):
        raise SourceError(
            f"{next(iter(missing))} and all other experts of {stand.name}: the model multiplies them in a way that calibration does not "
            "see; round them, with dynamic activations"
        )
    if missing:
        named = {module.rpartition(".")[0]: tokens for module, tokens in missing.items()}
        name, tokens = next(iter(named.items()))
        match settings.unseen_experts:
            case "error":
                others = f" (and {len(named) - 1} more experts of {stand.name})" if len(named) > 1 else ""
                raise NumericsError(
                    f"{name}{others}: {tokens} of the {settings.tokens:,} tokens of "
                    f"calibration came to it, {settings.expert_tokens} are asked for; raise calibration.sequences, give it other text, or "
                    "say in calibration.unseen_experts what to do: all_tokens or round"
                )
            case "all_tokens":
                observer.show_all(missing, lambda: stand.run(keep=False, observer=observer))
            case "round":
                observer.rounded |= missing.keys()
    leaders = [module for module in by_gptq if observer.leader.get(module) == module and observer.noted(module)]
    few = {
        module: (int(observer.noted(module)["tokens"]), skeleton.weight(module).shape[1])
        for module in leaders
        if module not in observer.rounded
    }
    return [f"{module} saw {tokens} tokens and has {count} inputs" for module, (tokens, count) in few.items() if tokens < count]


def _lies_in(module: str, block: str, skeleton: Skeleton) -> bool:
    """``module`` as it is called by :meth:`Entry.module`: an expert by its name on disk."""
    return (skeleton.experts[module].parameter if module in skeleton.experts else module).startswith(f"{block}.")


def _searches(entry: Entry) -> bool:
    return any((s.smoothquant and s.smoothquant.alpha == "search") or (s.awq and s.awq.ratio == "search") for s in entry.steps)


@contextmanager
def _narrow(was: Mapping[Any, torch.dtype]) -> Iterator[None]:
    """Parameters that were widened have the dtype of the lane for a while."""
    wide = {parameter: parameter.data for parameter in was}
    for parameter, dtype in was.items():
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in wide.items():
            parameter.data = data


def _modules(entries: Iterable[Entry]) -> list[str]:
    return [entry.module(part) for entry in entries for part in entry.parts]


def _look(item: tuple[Entry, str], *, skeleton: Skeleton, observer: Observer, inputs: Mapping[str, float]) -> dict[str, Any]:
    entry, module = item
    along = [skeleton.model.get_parameter(skeleton.parameters(name)[0]) for name in entry.alongside]
    absmax = torch.stack([weight.abs().amax() for weight in along]).amax().float() if along else None
    return health.look(entry, module, skeleton.weight(module).float(), observer, inputs.get(module), absmax)


def _uncovered(plan: Plan, target: TargetPlan, entries: Iterable[Entry], reached: Collection[str]) -> list[str]:
    """Layers that smoothing was asked for and should have ``reached``. Raises :class:`RecipeError` unless their rule says to leave them."""
    asked = [(module, entry) for entry in entries if entry.asks(*TRANSFORMS) for module in _modules([entry])]
    bare = [(module, entry) for module, entry in asked if module not in reached]
    refused = [(module, entry) for module, entry in bare if entry.uncovered == "error"]
    if refused:
        named = ", ".join(module for module, _ in refused)
        name = next(step.name for step in refused[0][1].steps if step.name in TRANSFORMS)
        raise RecipeError(
            f"{_position(plan, target, refused[0][1])}: {name} does not reach {named}: {NOTHING_FEEDS_IT}. Give it a rule without "
            f"{name}, or write {name}: {{uncovered: leave}} to have it quantized as it is; so for the like in later blocks"
        )
    return [f"{target.name}: {module}" for module, _ in bare]


def _position(plan: Plan, target: TargetPlan, entry: Entry) -> str:
    """Where the recipe asks for the first algorithm of an entry."""
    index, named = next((i, item) for i, item in enumerate(plan.recipe.targets) if item.name == target.name)
    rule = next(i for i, rule in enumerate(named.rules) if rule.algorithm is entry.steps and entry.rule.endswith(f" {rule.match}"))
    return plan.recipe.where("targets", index, "rules", rule, "algorithm", 0)


def _recall(target: TargetPlan, block: str, done: frozenset[str], skeleton: Skeleton, recall: Recall) -> None:
    """Makes a block what an earlier run wrote of it, so that its successors see the same."""
    for entry in target.entries:
        if entry.tensor.name not in done or entry.algorithm == RESPELL:
            continue
        if entry.scheme is not None and entry.within(block):
            for part in entry.parts:
                skeleton.weight(entry.module(part)).copy_(recall(target.name, entry, part))
        for name in skeleton.parameters(entry.tensor.name) if entry.scheme is None else ():
            if name.startswith(f"{block}."):
                skeleton.model.get_parameter(name).copy_(recall(target.name, entry, None))


@contextmanager
def _explained(plan: Plan) -> Iterator[None]:
    """Whatever a model's code may fail with, as one message."""
    try:
        yield
    except (OctavoError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise MachineError(
            f"{plan.checkpoint.origin}: the source could not be run for calibration: {explain(f'{type(error).__name__}: {error}')}"
        ) from error
