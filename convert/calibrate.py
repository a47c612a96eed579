"""Runs calibration text through the source, block by block, and keeps what the plan needs of it: how large inputs, keys and values become,
and, where codes are chosen with the model at work, the codes themselves, each as soon as its block has been seen."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.crew import Crew, crew
from convert.lanes import HELD_TOKENS
from convert.ledger import Entry, TargetPlan
from convert.observe import NO_STATS, Stats
from convert.respell import lacks_cache, takes_input_scale
from formats.errors import InputError, NumericsError
from formats.safetensors import json_bytes

if TYPE_CHECKING:
    import torch

    from convert.architecture import Part
    from convert.ledger import Plan
    from convert.progress import Progress
    from convert.recover import Recovery
    from convert.solve import Solved
    from convert.walk import Recall


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
    from convert.walk import Run, Walk

    found = dict.fromkeys((target.name for target in targets), NO_STATS)
    known = _source_scales(plan)
    wanted = [target for target in targets if target.solved or lacks_cache(plan.checkpoint, target) or set(target.static) - known.keys()]
    for target in targets:
        if target.calibrated and target not in wanted:
            found[target.name] = Stats(inputs=known, record={"text": "the source's own scales"})
    if not wanted:
        return found
    folder, dtype = scratch(), walk_dtype(plan, device)
    tokens, record = calibration_tokens(plan, folder)
    record = {**record, "dtype": dtype}
    quantized = [target for target in wanted if target.solved and plan.calibration.propagate == "quantized"]
    others = [target for target in wanted if target not in quantized]
    with crew(workers if device == "cpu" else 1) as hands:
        recoveries = _recoveries(plan, wanted, progress, device, hands, training)
        # Of what is trained whole, everything is done again: each block's training hangs on all others.
        before = {**done, **{name: frozenset[str]() for name, recovery in recoveries.items() if recovery.mode == "logits"}}
        run = Run(plan, progress, tokens, dtype, device, hands, folder, known, before, recall, recoveries)
        for walked in [*([others] if others else []), *([target] for target in quantized)]:
            progress.say(f"{', '.join(target.name for target in walked)}: calibrating on {sum(map(len, tokens)):,} tokens")
            walk = Walk(run, walked)
            yield from walk.solve()
            for recovery in (recoveries[target.name] for target in walked if target.name in recoveries):
                for solved in recovery.whole(tokens) if recovery.mode == "logits" else ():
                    if solved.tensor not in done[solved.target]:
                        yield solved
            found |= {target.name: walk.stats(target, record) for target in walked}
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
    if plan.calibration.dtype == "float32":
        return "float32"
    return own if device != "cpu" or (own == "bfloat16" and instructions() & {"avx512_bf16", "amx_bf16"}) else "float32"


def alike(plan: Plan, other: Plan) -> frozenset[str]:
    """Source tensors in blocks of which calibration makes the same in the one target of both plans, because the blocks see the same inputs
    and are solved in the same way: behind one that differs none are, unless blocks see the source's own inputs (``propagate: float``)."""

    def job(of: Plan) -> Any:
        recipe = of.recipe.resolved(predicts=of.predicts)
        return {key: value for key, value in recipe.items() if key not in ("targets", "validation", "push")}, of.targets[0].format

    def fate(entry: Entry) -> Any:
        return (entry.scheme, entry.steps, entry.algorithm, entry.scale_dtype, entry.observer, entry.parts, entry.outputs, entry.transposed,
                entry.alongside)  # fmt: skip

    mine, others = ({entry.tensor.name: entry for entry in of.targets[0].entries} for of in (plan, other))
    trained = any(entry.asks("recover") for entries in (mine, others) for entry in entries.values())
    if plan.architecture is None or mine.keys() != others.keys() or job(plan) != job(other) or trained:
        return frozenset()
    found: set[str] = set()
    for block in plan.architecture.blocks:
        inside = [name for name, entry in mine.items() if entry.within(block)]
        if all(fate(mine[name]) == fate(others[name]) for name in inside):
            found.update(inside)
        elif plan.calibration.propagate == "quantized":
            break
    return frozenset(found)


def statistics_bytes(plan: Plan, workers: int) -> int:
    """What the Hessians of one block take, of its experts no more than ``expert_hessians`` allows, three more for each that is factorised,
    and what the linears have read of the batches that each of the workers holds; in float32. Of the experts of a layer a batch is counted
    once."""
    assert plan.architecture is not None
    leaders = {module: group[0] for group in plan.architecture.groups or () for module in group}
    budget, largest = int(plan.calibration.expert_hessians), 0
    for target in plan.targets:
        for block in plan.architecture.blocks:
            solved = [entry for entry in target.quantized if entry.coder == "gptq" and entry.within(block)]
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
            before = sum(entry.tensor.elements for entry in target.quantized if entry.within(block)) if held < sum(experts) else 0
            rows = min(plan.calibration.tokens, workers * max(int(plan.calibration.length), HELD_TOKENS))
            together = sum(squares) - sum(experts) + held
            largest = max(largest, 4 * (together + 3 * sum(squares[:workers]) + rows * sum(read.values()) + before))
    return largest


def _input_of(entry: Entry, part: Part, leaders: Mapping[str, str]) -> tuple[object, ...]:
    """What layers that read the same input have in common: of one expert, those of one shape do."""
    module = entry.module(part)
    return (module.rpartition(".")[0], part.shape(entry.tensor)) if entry.experts else (leaders.get(module, module),)


def source_tokenizer(plan: Plan, scratch: Path) -> Any:
    """The tokenizer of the source, from a copy in ``scratch`` of the small files beside its weights. Raises :class:`InputError`."""
    from convert.text import load_tokenizer

    return load_tokenizer(source_sidecars(plan, scratch), trust_remote_code=plan.recipe.trust_remote_code, of=plan.checkpoint.origin)


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

    settings = plan.calibration
    tokenizer = source_tokenizer(plan, scratch)
    selection = Selection(settings.config, settings.split, settings.column)
    wanted: dict[str, Any] = {"sequences": settings.sequences, "length": settings.length, "seed": settings.seed, "selection": selection}
    if settings.documents or settings.chat:
        documents, record = take_documents(settings.text, tokenizer, chat=settings.chat, **wanted)
        require_known(plan, max(int(document.max()) for document in documents))
        return [torch.from_numpy(document) for document in documents], record
    tokens, record = take_tokens(settings.text, tokenizer, purpose="calibration", **wanted)
    require_known(plan, int(tokens.max()))
    return list(torch.from_numpy(tokens)), record


def require_known(plan: Plan, largest: int) -> None:
    """Raises :class:`InputError` where a text has a token for which the embedding has no row: the tokenizer is another model's."""
    rows = plan.architecture.token_rows if plan.architecture is not None else None
    if rows is not None and largest >= rows:
        raise InputError(
            f"{plan.checkpoint.origin}: its tokenizer makes token {largest:,} of a text, and its embedding has {rows:,} rows; "
            "put the tokenizer of this model beside its weights"
        )


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
