"""Runs calibration text through the source, block by block, and keeps what the plan needs of it: how large inputs, keys and values become,
and, where codes are chosen with the model at work, the codes themselves, each as soon as its block has been seen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.ailments import explain
from convert.algorithms import TRANSFORMS
from convert.crew import Crew, crew
from convert.observe import NO_STATS, Limit, Observer, Shown, Stats
from convert.plan import RESPELL, Entry, TargetPlan, cache_sources, takes_input_scale
from convert.static import by_histogram, find_limits
from formats.errors import InputError, MachineError, NumericsError, OctavoError, RecipeError, SourceError
from formats.safetensors import json_bytes

if TYPE_CHECKING:
    import torch

    from convert.architecture import Part
    from convert.lanes import Stand
    from convert.loading import Skeleton
    from convert.plan import Plan
    from convert.progress import Progress
    from convert.recover import Recovery
    from convert.solve import Solved
    from formats.qtensor import QTensor

#: Why a layer is not smoothed, for messages and the ledger.
NOTHING_FEEDS_IT = "nothing was found that feeds it and could take up the factors"

#: Tokens that a GPU takes through a block at once: 8 sequences of 2,048.
GPU_TOKENS = 16_384
#: What an interrupted run has written already: (target, entry, part, or None for what is kept) -> the values it stands for.
Recall = Callable[[str, Entry, "Part | None"], "torch.Tensor"]


def calibrate(
    plan: Plan,
    targets: Sequence[TargetPlan],
    progress: Progress,
    *,
    done: Mapping[str, frozenset[str]],
    recall: Recall,
    scratch: Callable[[], Path],
    training: Callable[[str], Path],
    device: str = "cpu",
    workers: int = 1,
) -> Generator[Solved, None, dict[str, Stats]]:
    """Yields what was solved, block by block, and returns what each target needs to know of the model at work, by target.

    ``done``: by target, tensors that were written before; ``scratch`` makes an empty folder for files of this run, ``training`` says where
    the state of a target's training lies from run to run. Targets whose blocks see the same inputs share a walk. On a CPU
    ``workers`` threads share the batches of a block, and then its layers.

    Raises :class:`InputError` when the text is too short or the source has no tokenizer, :class:`MachineError` when the model cannot be
    run, :class:`NumericsError` naming the module whose input was not finite, or always zero, or whose Hessian cannot be factorised.
    """
    found = dict.fromkeys((target.name for target in targets), NO_STATS)
    known = _source_scales(plan)
    wanted = [target for target in targets if target.solved or _lacks_cache(plan, target) or set(target.static) - known.keys()]
    for target in targets:
        if target.calibrated and target not in wanted:
            found[target.name] = Stats(inputs=known, record={"text": "the source's own scales"})
    if not wanted:
        return found
    folder = scratch()
    tokens, record = calibration_tokens(plan, folder)
    record = {**record, "dtype": walk_dtype(plan, device)}
    quantized = [target for target in wanted if target.solved and _settings(plan).propagate == "quantized"]
    others = [target for target in wanted if target not in quantized]
    count = sum(len(sequence) for sequence in tokens)
    with crew(workers if device == "cpu" else 1) as hands:
        recoveries = _recoveries(plan, wanted, progress, device, hands, training)
        # Of what is trained whole, everything is done again: each block's training hangs on all others.
        before = {**done, **{name: frozenset[str]() for name, found in recoveries.items() if found.mode == "logits"}}
        for walked in [*([others] if others else []), *([target] for target in quantized)]:
            names = ", ".join(target.name for target in walked)
            progress.say(f"{names}: calibrating on {count:,} tokens")
            stats, looked = yield from _walk(
                plan, walked, progress, tokens, done=before, recall=recall, known=known, scratch=folder, device=device, hands=hands,
                recoveries=recoveries,
            )  # fmt: skip
            for recovery in (recoveries[target.name] for target in walked if target.name in recoveries):
                for solved in recovery.whole(tokens) if recovery.mode == "logits" else ():
                    if solved.tensor not in done[solved.target]:
                        yield solved
            for target in walked:
                held = stats.limits[target.name]
                inputs = {**stats.inputs, **{module: limit.limit for module, limit in held.items()}}
                found[target.name] = replace(stats, inputs=inputs, record=record, limits={target.name: held}, health=looked[target.name])
    return found


def _recoveries(
    plan: Plan, targets: Sequence[TargetPlan], progress: Progress, device: str, hands: Crew, training: Callable[[str], Path]
) -> dict[str, Recovery]:
    """By target, those that are trained, and how."""
    found: dict[str, Recovery] = {}
    for target in targets:
        if any(entry.asks("recover") for entry in target.quantized):
            from convert.recover import Recovery, choose_mode

            recovery = Recovery(plan, target, "", device, hands, progress, training(target.name))
            recovery.mode = choose_mode(plan, target, recovery.options, device)
            if recovery.mode == "blocks" and recovery.options.generated:
                progress.say(f"warning: {target.name}: trained block by block, for the whole does not fit, on calibration text alone")
            found[target.name] = recovery
    return found


def walk_dtype(plan: Plan, device: str) -> str:
    """In what the model computes while it is watched, a torch name; ``calibration.dtype`` says how it is chosen."""
    from convert.hardware import instructions
    from convert.loading import own_dtype

    own = own_dtype(plan.checkpoint)
    if _settings(plan).dtype == "float32":
        return "float32"
    return own if device != "cpu" or (own == "bfloat16" and instructions() & {"avx512_bf16", "amx_bf16"}) else "float32"


def alike(plan: Plan, other: Plan) -> frozenset[str]:
    """Source tensors in blocks of which calibration makes the same in the one target of both plans, because the blocks see the same inputs
    and are solved in the same way: behind one that differs none are, unless blocks see the source's own inputs (``propagate: float``)."""

    def job(of: Plan) -> Any:
        recipe = of.recipe.resolved(predicts=of.predicts)
        return {key: value for key, value in recipe.items() if key not in ("targets", "validation", "push")}, of.targets[0].format

    def fate(entry: Entry) -> Any:
        return (entry.scheme, entry.steps, entry.algorithm, entry.scale_dtype, entry.observer, entry.parts, entry.outputs, entry.transposed)

    mine, others = ({entry.tensor.name: entry for entry in of.targets[0].entries} for of in (plan, other))
    trained = any(entry.asks("recover") for entries in (mine, others) for entry in entries.values())
    if plan.architecture is None or mine.keys() != others.keys() or job(plan) != job(other) or trained:
        return frozenset()
    found: set[str] = set()
    for block in plan.architecture.blocks:
        inside = [name for name, entry in mine.items() if _within(entry, block)]
        if all(fate(mine[name]) == fate(others[name]) for name in inside):
            found.update(inside)
        elif _settings(plan).propagate == "quantized":
            break
    return frozenset(found)


def lane_tokens(plan: Plan) -> int:
    """Tokens that walk through the model together."""
    return int(_settings(plan).sequences * _settings(plan).length)


def statistics_bytes(plan: Plan, workers: int) -> int:
    """What the Hessians of one block take, of its experts no more than ``expert_hessians`` allows, three more for each that is factorised,
    and what the linears of a batch have read, for each of the workers; in float32. Of the experts of a layer a batch is counted once."""
    assert plan.architecture is not None
    leaders = {module: group[0] for group in plan.architecture.groups or () for module in group}
    budget, largest = int(_settings(plan).expert_hessians), 0
    for target in plan.targets:
        for block in plan.architecture.blocks:
            solved = [entry for entry in target.quantized if entry.coder == "gptq" and _within(entry, block)]
            inputs = {_input_of(entry, part, leaders): part.shape(entry.tensor)[1] for entry in solved for part in entry.parts}
            read = {
                entry.experts or leaders.get(entry.module(part), entry.module(part)): part.shape(entry.tensor)[1]
                for entry in solved
                for part in entry.parts
            }
            of_experts = {_input_of(entry, part, leaders) for entry in solved if entry.experts for part in entry.parts}
            squares = sorted((n * n for n in inputs.values()), reverse=True)
            experts = [inputs[key] ** 2 for key in of_experts]
            held = min(sum(experts), max(budget // 4, *experts, 0)) if experts else 0
            # Between passes over experts the block is there as it was, beside what smoothing made of it.
            before = sum(entry.tensor.elements for entry in target.quantized if _within(entry, block)) if held < sum(experts) else 0
            rows = workers * int(_settings(plan).length)
            together = sum(squares) - sum(experts) + held
            largest = max(largest, 4 * (together + 3 * sum(squares[:workers]) + rows * sum(read.values()) + before))
    return largest


def _input_of(entry: Entry, part: Part, leaders: Mapping[str, str]) -> tuple[object, ...]:
    """What layers that read the same input have in common: of one expert, those of one shape do."""
    module = entry.module(part)
    return (module.rpartition(".")[0], part.shape(entry.tensor)) if entry.experts else (leaders.get(module, module),)


def _settings(plan: Plan) -> Any:
    from convert.recipe import Calibration

    return plan.recipe.calibration or Calibration()


def source_tokenizer(plan: Plan, scratch: Path) -> Any:
    """The tokenizer of the source, from a copy in ``scratch`` of the small files beside its weights. Raises :class:`InputError`."""
    from convert.text import load_tokenizer

    return load_tokenizer(source_sidecars(plan, scratch), trust_remote_code=plan.recipe.trust_remote_code)


def source_sidecars(plan: Plan, scratch: Path) -> Path:
    """A folder in ``scratch`` with the small files beside the source's weights: its tokenizer, or its processor of pictures."""
    folder = scratch / "tokenizer"
    folder.mkdir()
    for name, content in {**plan.checkpoint.sidecars(), "config.json": json_bytes(dict(plan.targets[0].config))}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def calibration_tokens(plan: Plan, scratch: Path) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Sequences, int64 (tokens,) each, and what they were made of."""
    import torch

    from convert.datasets import Selection
    from convert.text import take_documents, take_tokens

    settings = _settings(plan)
    tokenizer = source_tokenizer(plan, scratch)
    selection = Selection(settings.config, settings.split, settings.column)
    wanted = {"sequences": settings.sequences, "length": settings.length, "seed": settings.seed, "selection": selection}
    if settings.documents or settings.chat:
        documents, record = take_documents(settings.text, tokenizer, chat=settings.chat, **wanted)
        return [torch.from_numpy(document) for document in documents], record
    tokens, record = take_tokens(settings.text, tokenizer, purpose="calibration", **wanted)
    return list(torch.from_numpy(tokens)), record


def _batches(tokens: Sequence[torch.Tensor], limit: int) -> list[torch.Tensor]:
    """Sequences in their order, int64 (sequences, tokens), neighbours of one length together up to ``limit`` tokens; the first is alone,
    for groups are proved on it."""
    import torch

    batches: list[list[torch.Tensor]] = []
    for i, sequence in enumerate(tokens):
        if i > 1 and len(sequence) == len(batches[-1][0]) and (len(batches[-1]) + 1) * len(sequence) <= limit:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return [torch.stack(batch) for batch in batches]


def _widened(module: Any) -> dict[Any, torch.dtype]:
    """Makes float32 of a block's 16-bit parameters, so that no scale is lost in rounding; returns what they were."""
    import torch

    narrow = {p: p.dtype for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    return narrow


def _lacks_cache(plan: Plan, target: TargetPlan) -> bool:
    """Whether scales of keys and values are wanted that the source does not have."""
    contents = target.contents
    return contents.cache is not None and not cache_sources(plan.checkpoint, contents.attentions, contents.cache)


def _source_scales(plan: Plan) -> dict[str, float]:
    """What the source's own static scales say of its inputs, for layers that are only spelled anew."""
    known: dict[str, float] = {}
    for target in plan.targets:
        for entry in target.quantized:
            coded = plan.checkpoint.coded.get(entry.tensor.name)
            if coded is not None and takes_input_scale(coded, entry) and entry.scheme and entry.scheme.activation:
                scales = plan.checkpoint.scales(str(coded.input_scale))
                if len(scales) != 1 or not 0 < scales[0] < float("inf"):
                    raise NumericsError(f"{coded.input_scale}: {scales[0]:g} is no scale; the checkpoint is damaged")
                known |= {entry.module(part): scales[0] * entry.scheme.activation.grid.high for part in entry.parts}
    return known


def _walk(
    plan: Plan,
    targets: Sequence[TargetPlan],
    progress: Progress,
    tokens: Sequence[torch.Tensor],
    *,
    done: Mapping[str, frozenset[str]],
    recall: Recall,
    known: Mapping[str, float],
    scratch: Path,
    device: str,
    hands: Crew,
    recoveries: Mapping[str, Recovery],
) -> Generator[Solved, None, tuple[Stats, dict[str, dict[str, Any]]]]:
    """What was seen, and what there is to say of layers that are not solved, by target."""
    import psutil
    import torch

    from convert import health
    from convert.groups import Group, find_groups
    from convert.lanes import place_for, walk
    from convert.loading import Skeleton
    from convert.solve import input_limits, smooth_block, solve_block

    assert plan.architecture is not None
    dtype = walk_dtype(plan, device)
    quantized = any(target.solved for target in targets) and _settings(plan).propagate == "quantized"
    static = sorted({module for target in targets for module in target.static} - known.keys())
    cache = any(_lacks_cache(plan, target) for target in targets)
    free = torch.cuda.mem_get_info()[0] if device != "cpu" else 0
    lane = 2 * lane_tokens(plan) * (plan.architecture.hidden_size or 0) * getattr(torch, dtype).itemsize
    place = place_for(lane, on_gpu=device != "cpu", gpu_free_bytes=free, host_free_bytes=psutil.virtual_memory().available)
    with _explained(plan):
        skeleton = Skeleton(plan.checkpoint, dtype=dtype, trust_remote_code=plan.recipe.trust_remote_code)
        _find_experts(skeleton, targets)
    outside = [module for module in static if not any(_lies_in(module, block, skeleton) for block in plan.architecture.blocks)]
    batches: list[dict[str, Any]] = [{"input_ids": batch} for batch in _batches(tokens, GPU_TOKENS if device != "cpu" else 1)]
    watched = _watch_cache(batches) if cache else []
    if skeleton.model.can_generate() and not cache:
        batches = [{**batch, "use_cache": False} for batch in batches]
    observer = Observer(skeleton, plan.architecture.groups)
    observer.want(static, "absmax")
    shown: list[Shown] = []

    def finish(*_: object) -> None:
        observer.take([shown], hands)
        shown.clear()

    stands = walk(skeleton, batches, device=device, place=place, scratch=scratch, finish=finish if outside else None, crew=hands)
    by_block = any(recoveries[target.name].mode == "blocks" for target in targets if target.name in recoveries)
    # Beside it goes the source in float32, for blocks to be trained to return what its blocks do.
    source = Skeleton(plan.checkpoint, dtype="float32", trust_remote_code=plan.recipe.trust_remote_code) if by_block else None
    teachers = walk(source, batches, device=device, place=place, scratch=scratch, crew=hands) if source else None
    groups: tuple[Group, ...] = ()
    headed = {
        target.name: [entry for entry in by_histogram(target.quantized) if set(_modules([entry])) & set(outside)] for target in targets
    }
    limits: dict[str, dict[str, Limit]] = {target.name: {} for target in targets}
    looked: dict[str, dict[str, Any]] = {target.name: {} for target in targets}
    bare: list[str] = []  # layers that smoothing was asked for and did not reach
    few: list[str] = []
    count = sum(len(sequence) for sequence in tokens)
    with observer, progress.stage("calibrating", count * len(plan.architecture.blocks), unit="tokens") as advance:
        while True:
            # Behind the last block the model goes on to its head; observers of histograms are forgotten with each block.
            observer.want(_modules(entry for entries in headed.values() for entry in entries), "histogram")
            with _explained(plan), observer.watching_outside(outside) as shown:
                stand = next(stands, None)
                teacher = next(teachers, None) if teachers and stand else None
            if stand is None:
                break
            todo = {
                target.name: [
                    entry for entry in target.quantized if target.solved and _within(entry, stand.name) and entry.algorithm != RESPELL
                ]
                for target in targets
            }
            left = {name: [entry for entry in entries if entry.tensor.name not in done[name]] for name, entries in todo.items()}
            # A block of which anything is missing is done again whole: the same inputs give the same bytes.
            again = {name: entries for name, entries in todo.items() if left[name]}
            entries = [entry for entries in again.values() for entry in entries]
            smoothing = [entry for entry in entries if entry.asks(*TRANSFORMS)]
            by_gptq = _modules(entry for entry in entries if entry.coder == "gptq")
            passes = _passes(by_gptq, skeleton, observer, budget_bytes=_settings(plan).expert_hessians)[1:]
            later = {leader for each in passes for leader in each}
            observer.want([module for module in by_gptq if observer.leader.get(module, module) not in later], "hessian")
            observer.want(_modules(smoothing), "channels")
            observer.want(_modules(entry for entry in smoothing if _searches(entry)), "rows")
            observer.want(_modules(entry for entry in smoothing if entry.asks("awq")), "mean_magnitude")
            observer.want(_modules(entry for entry in entries if entry.asks("bias_correction")), "mean")
            # What smoothing changes is seen once more behind it.
            statics = {target.name: [entry for entry in by_histogram(target.quantized) if _within(entry, stand.name)] for target in targets}
            plain = {name: [entry for entry in entries if not entry.asks(*TRANSFORMS)] for name, entries in statics.items()}
            observer.want(_modules(entry for entries in plain.values() for entry in entries), "histogram")
            to_look = {
                target.name: again.get(target.name, []) if target.solved else _static_within(target, stand.name) for target in targets
            }
            for kind in health.KINDS:
                observer.want(_modules(entry for entries in to_look.values() for entry in entries), kind)
            with _explained(plan):
                of_static = [module for module in static if _lies_in(module, stand.name, skeleton)]
                if again or of_static:
                    stand.run(keep=not quantized, observer=observer)
                few += _judge_experts(plan, [*by_gptq, *_modules(smoothing), *of_static], stand, observer, by_gptq, skeleton)
                wide = smoothing or any(entry.asks("recover") for entry in entries)
                # What further passes over experts run, whatever becomes of the block in between.
                of_block = stand.module.parameters() if passes else ()
                as_seen = {p: p.data.clone() if wide and p.dtype == torch.float32 else p.data for p in of_block}
                was_dtype = _widened(stand.module) if wide else {}
                groups = find_groups(stand, groups, skeleton.experts_in(stand.name)) if smoothing else groups
            for target in targets:
                held = find_limits(target, plain[target.name], observer)
                limits[target.name] |= {} if target.solved else held
                inputs = {**known, **observer.absmax(), **{module: found.limit for module, found in held.items()}}
                items = [(entry, module) for entry in to_look[target.name] for module in _modules([entry])]
                look = partial(_look, skeleton=skeleton, observer=observer, inputs=inputs)
                looked[target.name] |= {module: found for (_, module), found in zip(items, hands.map(look, items), strict=True) if found}
                if target.name in again:
                    were = None if quantized else [(p, p.clone()) for p in stand.module.parameters()]
                    smoothed, changed = (
                        smooth_block(target, again[target.name], stand, groups, skeleton, observer) if smoothing else ({}, {})
                    )
                    reached = {module for module, leader in observer.leader.items() if leader in smoothed} | smoothed.keys()
                    bare += _uncovered(plan, target, again[target.name], reached)
                    with _explained(plan), _narrow(was_dtype):
                        behind = [entry for entry in statics[target.name] if entry.asks(*TRANSFORMS)]
                        held |= _see_again(target, behind, stand, skeleton, plan.architecture.groups)
                    results: Iterable[tuple[Solved, dict[str, QTensor]]] = solve_block(
                        target,
                        again[target.name],
                        skeleton,
                        observer,
                        inputs,
                        smoothed,
                        held,
                        looked[target.name],
                        changed=changed,
                        crew=hands,
                        passes=passes,
                        seen_in=partial(
                            _in_another_pass,
                            stand=stand,
                            skeleton=skeleton,
                            groups=plan.architecture.groups,
                            observer=observer,
                            was=as_seen,
                        ),
                    )
                    if (recovery := recoveries.get(target.name)) is not None:
                        bounds = input_limits(observer, inputs, smoothed, held)
                        results = _recovered(
                            recovery,
                            again[target.name],
                            list(results),
                            stand,
                            teacher,
                            skeleton,
                            observer,
                            bounds,
                            len(plan.architecture.blocks),
                        )
                    for solved, codes in results:
                        for module, code in codes.items() if quantized else ():
                            skeleton.weight(module).copy_(code.dequantize())
                        if solved.tensor not in done[target.name] and not (recovery and recovery.mode == "logits"):
                            yield solved
                    for parameter, was in were or ():
                        parameter.copy_(was)
                elif quantized:
                    _recall(target, stand.name, done[target.name], skeleton, recall)
            for parameter, narrow in was_dtype.items():
                parameter.data = parameter.data.to(narrow)
            observer.forget("hessian", "histogram", "mean", "mean_magnitude", *health.KINDS)
            advance(count)
    if teachers:
        teachers.close()
    if bare:
        progress.say(f"{bare[0]} (and {len(bare) - 1} more) is not smoothed: {NOTHING_FEEDS_IT}; the ledger says so of each")
    if few:
        progress.say(
            f"warning: {few[0]} (and {len(few) - 1} more of experts): fewer tokens than inputs, and GPTQ then wins little over rounding; "
            "the manifest has the tokens of each"
        )
    for target in targets:
        limits[target.name] |= find_limits(target, headed[target.name], observer)
    inputs = observer.absmax()
    for module, absmax in inputs.items():
        if not 0 < absmax < float("inf"):
            raise NumericsError(f"{module}: the largest input that calibration saw is {absmax:g}; give it other text, or a dynamic scheme")
    unseen = [module for module in static if module not in inputs]
    if unseen:
        raise InputError(f"{unseen[0]} (and {len(unseen) - 1} more) was never run by calibration, so it can have no static scale")
    ranges = _joined(watched)
    attentions = next((target.contents.attentions for target in targets if _lacks_cache(plan, target)), ())
    stats = Stats(
        inputs={**known, **inputs},
        limits=limits,
        keys={attention.module: tuple(ranges.keys[attention.layer].tolist()) for attention in attentions},
        values={attention.module: tuple(ranges.values[attention.layer].tolist()) for attention in attentions},
        experts=observer.experts(),
    )
    return stats, {target.name: {} if target.solved else looked[target.name] for target in targets}


def _recovered(
    recovery: Recovery,
    entries: Sequence[Entry],
    solved: Sequence[tuple[Solved, dict[str, QTensor]]],
    stand: Stand,
    teacher: Stand | None,
    skeleton: Skeleton,
    observer: Observer,
    limits: Mapping[str, float],
    blocks: int,
) -> Iterator[tuple[Solved, dict[str, QTensor]]]:
    """What was solved of a block, trained if that goes block by block, else kept for when all blocks are there."""
    from convert.recover import Start

    codes = {module: code for _, chosen in solved for module, code in chosen.items()}
    starts = {
        module: Start(
            entry,
            codes[module],
            skeleton.weight(module).float().clone(),
            limits[module] if entry.scheme and entry.scheme.static else None,
            observer.leader.get(module, module),
        )
        for entry in entries
        for module in _modules([entry])
    }
    if teacher is not None:
        return iter(recovery.block(stand, teacher, solved, starts, skeleton, blocks))
    recovery.keep([item for item, _ in solved], starts, skeleton)
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


@contextmanager
def _in_another_pass(
    leaders: Collection[str],
    *,
    stand: Stand,
    skeleton: Skeleton,
    groups: Sequence[Sequence[str]] | None,
    observer: Observer,
    was: Mapping[Any, torch.Tensor],
) -> Iterator[None]:
    """The Hessians of some experts, for as long as the context lasts: all batches run through the block as it ``was`` when all else was
    seen, so that they are those of the first pass, to the bit."""
    now = {parameter: parameter.data for parameter in was}
    with Observer(skeleton, groups) as behind:
        behind.want(list(leaders), "hessian")
        for parameter, data in was.items():
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


def _judge_experts(
    plan: Plan, modules: Sequence[str], stand: Stand, observer: Observer, by_gptq: Sequence[str], skeleton: Skeleton
) -> list[str]:
    """Does what the recipe says of experts that too few tokens came to; returns, in words, those of which GPTQ knows too little.

    Raises :class:`NumericsError` where it says nothing, and :class:`SourceError` where no expert was seen at all.

    Of a Hessian of fewer tokens than inputs the rest is damping: on random layers with inputs of a falling spectrum, as many tokens as
    inputs left 0.89 to 1.06 of the output error of rounding, on other tokens of the same kind, four times as many 0.67 to 0.78.
    """
    settings = _settings(plan)
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
                raise NumericsError(
                    f"{name} (and {len(named) - 1} more experts of {stand.name}): {tokens} of the {lane_tokens(plan):,} tokens of "
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


@dataclass(frozen=True)
class _Ranges:
    """The largest magnitude of each head's keys and values, (heads,), by layer."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)


def _watch_cache(batches: list[dict[str, Any]]) -> list[_Ranges]:
    """Gives every batch a cache that keeps nothing but how large keys and values become."""
    import torch
    from transformers import DynamicCache

    class Watcher(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.ranges = _Ranges()

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            for seen, states in ((self.ranges.keys, key_states), (self.ranges.values, value_states)):
                absmax = states.detach().abs().amax(dim=(0, 2, 3)).float()
                seen[layer_idx] = torch.maximum(seen[layer_idx], absmax) if layer_idx in seen else absmax
            return key_states, value_states

    watchers = [Watcher() for _ in batches]
    for batch, watcher in zip(batches, watchers, strict=True):
        batch |= {"past_key_values": watcher, "use_cache": True}
    return [watcher.ranges for watcher in watchers]


def _joined(each: Sequence[_Ranges]) -> _Ranges:
    """The largest of all batches."""
    import torch

    joined = _Ranges()
    for ranges in each:
        for into, seen in ((joined.keys, ranges.keys), (joined.values, ranges.values)):
            for layer, absmax in seen.items():
                into[layer] = torch.maximum(into[layer], absmax) if layer in into else absmax
    return joined


def _within(entry: Entry, block: str) -> bool:
    return any(module.startswith(f"{block}.") for module in entry.modules)


def _lies_in(module: str, block: str, skeleton: Skeleton) -> bool:
    """``module`` as it is called by :meth:`Entry.module`: an expert by its name on disk."""
    return (skeleton.experts[module].parameter if module in skeleton.experts else module).startswith(f"{block}.")


def _searches(entry: Entry) -> bool:
    return any((s.smoothquant and s.smoothquant.alpha == "search") or (s.awq and s.awq.ratio == "search") for s in entry.steps)


def _see_again(
    target: TargetPlan, entries: Sequence[Entry], stand: Stand, skeleton: Skeleton, groups: Sequence[Sequence[str]] | None
) -> dict[str, Limit]:
    """The limits of inputs that smoothing has changed: all batches run once more, for a histogram does not tell channels apart."""
    if not entries:
        return {}
    with Observer(skeleton, groups) as behind:
        behind.want(_modules(entries), "histogram")
        stand.run(keep=False, observer=behind)
        return find_limits(target, entries, behind)


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


def _static_within(target: TargetPlan, block: str) -> list[Entry]:
    static = [entry for entry in target.quantized if entry.scheme and entry.scheme.static and entry.algorithm != RESPELL]
    return [entry for entry in static if _within(entry, block)]


def _modules(entries: Iterable[Entry]) -> list[str]:
    return [entry.module(part) for entry in entries for part in entry.parts]


def _look(item: tuple[Entry, str], *, skeleton: Skeleton, observer: Observer, inputs: Mapping[str, float]) -> dict[str, Any]:
    from convert import health

    entry, module = item
    return health.look(entry, module, skeleton.weight(module).float(), observer, inputs.get(module))


def _uncovered(plan: Plan, target: TargetPlan, entries: Iterable[Entry], reached: Collection[str]) -> list[str]:
    """Layers that smoothing was asked for and did not reach. Raises :class:`RecipeError` unless their rule says to leave them."""
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
        if entry.scheme is not None and _within(entry, block):
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
