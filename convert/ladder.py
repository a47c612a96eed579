"""Climbs to a budget: each rung is planned, converted and checked, and the first that meets the budget wins.

A rung is a recipe of its own, with algorithms in its rules and the budget among its limits; the one that wins is what the manifest records,
so that the artifact can be made again without climbing. Of a rung on the way a pilot is made first, calibrated on a part of the tokens and
looked at on a part of the text: where that misses the budget, the rung is passed over, and made whole only if no other passes and noise may
be why it did not. ``mixed`` takes the best rung below it, measures on its artifact what each group of layers loses alone, and keeps in 16
bit, or quantizes in another scheme, the groups that meet the budget with the fewest bytes; as losses do not add exactly, what comes of it
is measured, the model of how they add is corrected, and the choice made again. ``recover``, the last, trains the model with every layer
quantized.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from convert.algorithms import TRANSFORMS
from convert.calibrate import alike
from convert.export import Artifact, Like
from convert.ledger import Plan
from convert.mixed import Choice, Line, Measured, Option, by_order, bytes_of, choose, filled, frontier, line_through, loss_of
from convert.progress import Progress
from convert.recipe import LADDER, Budget, Calibration, Recipe, Rounding, Rule, Step, Target, rung_steps
from convert.report import NO_LOOK, Look, Report, manifest_digest
from convert.runtimes import RUNTIMES
from convert.sensitivity import Loss, Trial, artifact_trials, entries_of, in_words, measure, spelled, together, weight_error
from formats.errors import NumericsError, RecipeError

#: A choice that is expected to take this share of the bytes of one that met the budget, or less, is worth converting.
WORTHWHILE = 0.9
#: What ``mixed`` may spend so that the budget is met by more than the noise of the text: of the linear bytes, the share kept beyond what
#: the value alone asks for; as much of the noise as that buys, in quarters.
CERTAINTY = 0.05
#: How a rung on the way is looked at first.
FIRST_LOOK = Look(0.125, only=True)
#: What its pilot is calibrated on: this share of the tokens, and so many at least.
PILOT, PILOT_TOKENS = 0.125, 2048
#: How a choice of ``mixed`` is measured; the one that is taken is proven.
MEASURED = Look(1.0, only=True)


class Make(Protocol):
    def __call__(self, recipe: Recipe, folder: Path, *, look: Look, like: Like | None = None) -> tuple[Plan, Artifact, Report]: ...


@dataclass(frozen=True)
class Stages:
    """What the pipeline does for a climb, for recipes of one target. ``draft``: plans one. ``make``: plans, converts and checks it in a
    folder, taking over what is ``like`` it; the check ends with the first ``look`` where that shows that a limit is missed, or is
    all there is to be."""

    draft: Callable[[Recipe], Plan]
    make: Make


@dataclass(frozen=True)
class Rung:
    """What came of a rung. ``kl_nats`` and ``perplexity_ratio`` are those of the worst runtime, on ``tokens``, infinite where one did not
    run; ``kept_share`` of the bytes of all linear layers are in 16 bit. ``chosen_by``: of ``mixed``, what its groups were chosen by.
    ``pilot``: the tokens of calibration behind a pilot, 0 of a rung that was made whole."""

    name: str
    plan: Plan
    artifact: Artifact
    report: Report
    kl_nats: float
    perplexity_ratio: float
    kept_share: float
    kept_groups: int = 0
    tokens: int = 0
    chosen_by: str = ""
    pilot: int = 0

    @property
    def passed(self) -> bool:
        """Whether it, and not a part of it, met every limit that was looked at."""
        return self.report.passed and not self.pilot

    @property
    def in_part(self) -> bool:
        """Whether it was made, or looked at, on a part of the tokens."""
        return self.pilot > 0 or self.tokens < int(self.report.validation["tokens"])

    @property
    def weight_bytes(self) -> int:
        return self.plan.targets[0].weight_bytes

    def noise(self) -> tuple[float, float]:
        """How far the values may lie below what more text would show, as the upper ends of the worst intervals say: of KL as a share of it,
        of the logarithm of the perplexity ratio in nats."""
        found = [run.divergence for run in self.report.runtimes if run.divergence]
        kl = [one.kl_interval.high / one.kl_nats - 1 for one in found if one.kl_interval and one.kl_nats > 0]
        ratio = [math.log(one.ratio_interval.high / one.perplexity_ratio) for one in found if one.ratio_interval]
        return max(kl, default=0.0), max(ratio, default=0.0)

    def may_pass(self, budget: Budget) -> bool:
        """Whether the budget is missed by no more than the noise."""
        kl, ratio = self.noise()
        return (budget.kl_nats is None or self.kl_nats <= budget.kl_nats * (1 + kl)) and (
            budget.perplexity_ratio is None or self.perplexity_ratio <= budget.perplexity_ratio * math.exp(ratio)
        )

    def certain(self, budget: Budget) -> bool:
        """Whether it passed, and the budget lies above what the text leaves in doubt."""
        kl, ratio = self.noise()
        return (
            self.passed
            and (budget.kl_nats is None or self.kl_nats * (1 + kl) <= budget.kl_nats)
            and (budget.perplexity_ratio is None or self.perplexity_ratio * math.exp(ratio) <= budget.perplexity_ratio)
        )

    def record(self, budget: Budget) -> dict[str, Any]:
        """For the report."""
        return {
            "name": self.name,
            "kl_nats": self.kl_nats,
            "perplexity_ratio": self.perplexity_ratio,
            "weight_bytes": self.weight_bytes,
            "kept_share": self.kept_share,
            "kept_groups": self.kept_groups,
            "tokens": self.tokens,
            "chosen_by": self.chosen_by,
            "pilot": self.pilot,
            "passed": self.passed,
            "certain": self.certain(budget),
            "failed": [check.name for check in self.report.checks if not check.passed],
        }


@dataclass(frozen=True)
class Climb:
    """Every rung that was tried, in order, the one that is taken (the first that passed, or the nearest), and for the report what ``mixed``
    saw of the groups and how it measured them."""

    rungs: tuple[Rung, ...]
    taken: Rung
    groups: tuple[dict[str, Any], ...] = ()
    curves: dict[str, list[list[float]]] | None = None
    measured: str = ""

    def record(self, budget: Budget) -> dict[str, Any]:
        """As plain data, for the report."""
        return {
            "budget": budget.model_dump(include={"kl_nats", "perplexity_ratio"}, exclude_none=True),
            "taken": self.taken.name,
            "rungs": [rung.record(budget) for rung in self.rungs],
            "groups": list(self.groups),
            "curves": self.curves or {},
            "measured": self.measured,
        }


def climb(recipe: Recipe, target: Target, out: Path, stages: Stages, progress: Progress, *, device: str = "cpu") -> Climb:
    """Makes rung after rung of a target in ``out/<rung>``. Raises what planning, converting and measuring raise."""
    assert target.budget is not None
    ladder = target.ladder or LADDER
    rungs: list[Rung] = []
    others = [choice for choice in target.budget.choices if choice != "keep"] if "mixed" in ladder else []
    # What the format or a runtime cannot hold is an error before the first rung.
    schemes = {name: stages.draft(in_scheme(recipe, target, name)) for name in others}
    mixed: Climb | None = None
    for i, name in enumerate(ladder):
        if name == "mixed":
            _settle_doubts(rungs, recipe, target, out, stages, progress)
            best = _taken(rungs, target.budget)
            if best.passed:
                break
            mixed = _mix(recipe, target, out, stages, progress, rungs, best, schemes, device)
            if mixed.taken.passed:
                return mixed
            rungs = list(mixed.rungs)
            continue
        progress.say(f"{target.name}: rung {name}")
        asked, behind = rung_recipe(recipe, target, name), ladder[i + 1 : i + 2]
        # To pass over a rung costs the time of the next, but bytes where that is `mixed`, and training where it is `recover`.
        dear = behind in (("mixed",), ("recover",))
        if behind and not dear and not (first := _first_look(name, asked, out, stages, progress)).report.passed:
            rungs.append(first)
            continue
        try:
            rungs.append(_try(name, asked, out / name, stages, progress, look=Look(1.0) if dear else NO_LOOK))
        except RecipeError as error:
            # It is the one rung that not every model can take, and there is an artifact already.
            if name != "recover" or not rungs:
                raise
            progress.say(f"{target.name}: rung recover is left out: {error}")
            break
        if rungs[-1].passed:
            break
    _settle_doubts(rungs, recipe, target, out, stages, progress)
    taken = _taken(rungs, target.budget)
    while taken.report.brief or taken.pilot:
        _again(rungs, taken, recipe, target, out, stages, progress, look=NO_LOOK)
        taken = _taken(rungs, target.budget)
    return Climb(tuple(rungs), taken, *((mixed.groups, mixed.curves, mixed.measured) if mixed else ()))


def _first_look(name: str, recipe: Recipe, out: Path, stages: Stages, progress: Progress) -> Rung:
    """A rung on the way, looked at on a few tokens: a pilot of it, where that saves most of the calibration. Experts of a model would see
    too few tokens in one."""
    settings, target = recipe.calibration or Calibration(), stages.draft(recipe).targets[0]
    count = max(math.ceil(PILOT * settings.sequences), math.ceil(PILOT_TOKENS / settings.length))
    if 2 * count <= settings.sequences and target.calibrated and not any(entry.experts for entry in target.quantized):
        part = settings.model_copy(update={"sequences": count})
        pilot = recipe.model_copy(update={"calibration": part})
        try:
            rung = _try(f"{name} (pilot)", pilot, out / f"{name}.pilot", stages, progress, look=FIRST_LOOK)
            return replace(rung, name=name, pilot=part.tokens)
        except NumericsError as error:  # of more tokens it may not be true
            progress.say(f"{name}: {error}; so there is no pilot")
    return _try(name, recipe, out / name, stages, progress, look=FIRST_LOOK)


def _settle_doubts(rungs: list[Rung], recipe: Recipe, target: Target, out: Path, stages: Stages, progress: Progress) -> None:
    """Where no rung passed, makes those whole that may have missed the budget by the noise of a part, the closest first, until one does."""
    budget = target.budget
    assert budget is not None
    doubtful = sorted((rung for rung in rungs if rung.in_part and rung.may_pass(budget)), key=lambda rung: _distance(rung, budget))
    for rung in doubtful:
        if any(each.passed for each in rungs):
            return
        _again(rungs, rung, recipe, target, out, stages, progress, look=Look(1.0))


def _again(
    rungs: list[Rung], rung: Rung, recipe: Recipe, target: Target, out: Path, stages: Stages, progress: Progress, *, look: Look
) -> None:
    """Has a rung made whole, if it is not yet, and looked at more closely, in its place."""
    asked = rung_recipe(recipe, target, rung.name) if rung.pilot else rung.plan.recipe
    made = _try(rung.name, asked, out / rung.name, stages, progress, look=look, kept_groups=rung.kept_groups)
    rungs[rungs.index(rung)] = replace(made, chosen_by=rung.chosen_by)


def rung_recipe(recipe: Recipe, target: Target, rung: str, *, kept: Sequence[Rule] = (), alone: dict[str, float] | None = None) -> Recipe:
    """The recipe of one rung: ``kept`` before the target's own rules, which take the rung's algorithms; the budget becomes limits."""
    steps = rung_steps(rung)
    rules = (*kept, *(rule.model_copy(update={"algorithm": steps}) if rule.scheme else rule for rule in target.rules))
    changed = {"limits": target.merged_limits(), "budget": None, "ladder": None, "alone": alone or None}
    return recipe.remade(target, rules, first=len(kept), by="budget", changed=changed)


def _try(
    name: str,
    recipe: Recipe,
    folder: Path,
    stages: Stages,
    progress: Progress,
    *,
    look: Look,
    kept_groups: int = 0,
    like: Like | None = None,
) -> Rung:
    plan, artifact, report = stages.make(recipe, folder, look=look, like=like)
    divergences = [run.divergence for run in report.runtimes]
    ran = len(divergences) == sum(len(RUNTIMES[runtime].modes) for runtime in plan.targets[0].runtimes) and all(divergences)
    kl = max((found.kl_nats for found in divergences if found), default=math.inf) if ran else math.inf
    ratio = max((found.perplexity_ratio for found in divergences if found), default=math.inf) if ran else math.inf
    tokens = min((found.tokens for found in divergences if found), default=0)
    rung = Rung(name, plan, artifact, report, kl, ratio, kept_share(plan), kept_groups, tokens)
    part = f" after a look at {tokens:,} tokens" if report.brief else ""
    progress.say(
        f"{name}: KL {kl:.4g} nats, perplexity ratio {ratio:.4g}, {rung.weight_bytes / 1e6:.1f} MB, "
        f"{rung.kept_share:.1%} of the linear bytes in 16 bit: {'passed' if report.passed else 'not enough'}{part}"
    )
    return rung


def kept_share(plan: Plan) -> float:
    """Of the unquantized bytes of all linear layers and experts but the head, the share that stays as it is."""
    linear = [entry for entry in plan.targets[0].entries if entry.kind in ("linear", "expert", "unknown") and entry.parts]
    whole = sum(entry.plain.size_bytes for entry in linear)
    return sum(entry.plain.size_bytes for entry in linear if not entry.scheme) / whole if whole else 0.0


def in_scheme(recipe: Recipe, target: Target, scheme: str) -> Recipe:
    """With everything that rules quantize in another scheme, rounded."""
    made = rung_recipe(recipe, target, "rtn")
    rules = tuple(
        rule.model_copy(update={"scheme": scheme, "observer": None, "percentile": None}) if rule.scheme else rule
        for rule in made.targets[0].rules
    )
    return made.model_copy(update={"targets": (made.targets[0].model_copy(update={"rules": rules}),)})


@dataclass(frozen=True)
class _Item:
    """Layers that share their fate, and what it can be: the first of ``fates`` is that of the best rung, others are schemes or ``keep``."""

    losses: tuple[Loss, ...]
    fates: tuple[str, ...]
    options: tuple[Option, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(module for loss in self.losses for module in loss.modules)

    def record(self, taken: int) -> dict[str, Any]:
        return {
            "modules": list(self.modules),
            "scheme": self.losses[0].scheme,
            "alone_nats": self.options[0].loss,
            "standard_error": math.hypot(*(loss.standard_error for loss in self.losses)),
            "block_error": max(loss.block_error for loss in self.losses),
            "extra_bytes": self.options[-1].extra_bytes,
            "kept": self.fates[taken] == "keep",
            "taken": self.fates[taken],
        }


def _mix(
    recipe: Recipe,
    target: Target,
    out: Path,
    stages: Stages,
    progress: Progress,
    rungs: list[Rung],
    best: Rung,
    schemes: dict[str, Plan],
    device: str,
) -> Climb:
    budget = target.budget
    assert budget is not None
    if not math.isfinite(best.kl_nats) or not math.isfinite(best.perplexity_ratio):
        progress.say(f"{target.name}: no rung ran everywhere with finite logits, so there is nothing to mix")
        return Climb(tuple(rungs), _taken(rungs, budget))
    losses, measured = _losses(recipe, budget, best, list(schemes), out, progress, device)
    items = _items(recipe, target, best, losses, schemes, stages, progress)
    groups = [item.options for item in items]
    most = int(CERTAINTY * sum(entry.plain.size_bytes for entry in best.plan.targets[0].quantized))
    unchanged = loss_of(groups, [0] * len(items))
    kl, ratio = [Measured(unchanged, best.kl_nats)], [Measured(unchanged, math.log(best.perplexity_ratio))]
    rivals = _Rivals(recipe, target, best, items, list(schemes), progress, device)
    mixed: list[tuple[Rung, Choice]] = []
    for attempt in range(budget.tries):
        choice = _chosen(groups, budget, line_through(kl), line_through(ratio), rungs[-1].noise(), most=most)
        if choice is None:
            progress.say(f"{target.name}: not even the smallest losses there can be are expected to meet the budget")
            break
        if all(item.fates[j] == "keep" for item, j in zip(items, choice, strict=True)):
            progress.say(f"{target.name}: only with every group in 16 bit is the budget expected to be met, which is no artifact in 8 bit")
            break
        certain = [bytes_of(groups, was) for rung, was in mixed if rung.certain(budget)]
        if choice in [was for _, was in mixed] or (certain and bytes_of(groups, choice) > WORTHWHILE * min(certain)):
            break
        chosen_by, choice = rivals.best(choice)
        if choice in [was for _, was in mixed]:
            break
        left = loss_of(groups, choice)
        name = "mixed" if attempt == 0 else f"mixed-{attempt + 1}"
        fates = Counter(item.fates[j] for item, j in zip(items, choice, strict=True) if j)
        said = " and ".join(f"{count} {_said(fate)}" for fate, count in fates.items())
        progress.say(
            f"{target.name}: rung {name}: {best.name} with {said} of {len(items)} groups, "
            f"{bytes_of(groups, choice) / 1e6:.2f} MB more, KL {line_through(kl).expect(left):.4g} expected, chosen by {chosen_by}"
        )
        rules = [_rule(item, j, items, best) for item, j in zip(items, choice, strict=True) if j]
        alone = {module: item.options[0].loss for item in items for module in item.modules}
        made = rung_recipe(recipe, target, best.name, kept=rules, alone=alone)
        like = _most_alike(stages.draft(made), (best, *(rung for rung, _ in mixed)))
        rung = _try(name, made, out / name, stages, progress, look=MEASURED, kept_groups=fates["keep"], like=like)
        rung = replace(rung, chosen_by=chosen_by)
        rungs.append(rung)
        mixed.append((rung, choice))
        if not math.isfinite(rung.kl_nats):
            break
        kl.append(Measured(left, rung.kl_nats))
        ratio.append(Measured(left, math.log(rung.perplexity_ratio)))
    taken = _taken(rungs, budget)
    while taken.passed and taken.report.brief:
        _again(rungs, taken, recipe, target, out, stages, progress, look=NO_LOOK)
        taken = _taken(rungs, budget)
    chosen = next((choice for rung, choice in mixed if rung.name == taken.name), [0] * len(items))
    records = tuple(item.record(j) for item, j in zip(items, chosen, strict=True))
    return Climb(tuple(rungs), taken, records, _curves(items, line_through(kl), best.weight_bytes), measured)


#: What groups can be chosen by, for people.
SUM, WEIGHTS, BLOCKS = "losses alone", "largest weight error", "largest error in its block"


@dataclass
class _Rivals:
    """What else a choice's bytes could keep. Losses do not add: two groups kept can win more, or less, than what they lose alone says, so
    a choice is measured as a whole, on text on which no group was, against those that keep the groups with the largest errors."""

    recipe: Recipe
    target: Target
    rung: Rung
    items: Sequence[_Item]
    schemes: Sequence[str]
    progress: Progress
    device: str

    def best(self, choice: Choice) -> tuple[str, Choice]:
        """The choice that loses least of those that take no more bytes, and what it was chosen by."""
        groups = [item.options for item in self.items]
        most = bytes_of(groups, choice)
        if most <= 0:
            return SUM, choice
        rivals = {SUM: choice}
        for name, order in self._orders.items():
            rival = filled(order, groups, most=most)
            # What keeps every group is no artifact in 8 bit, and what keeps none is no rival.
            if rival not in rivals.values() and any(rival) and self._quantized(rival):
                rivals[name] = rival
        if len(rivals) == 1:
            return SUM, choice
        assert self.target.budget is not None
        whole = {name: self._quantized(rival) for name, rival in rivals.items()}
        settings = self.recipe.calibration or Calibration()
        settings = settings.model_copy(update={"seed": settings.seed + 1})
        asked = replace(self.rung.plan, recipe=self.rung.plan.recipe.model_copy(update={"calibration": settings}))
        self.progress.say(f"{self.target.name}: measuring {len(rivals)} choices of {most / 1e6:.2f} MB, each as a whole")
        trials = [together(each) for each in whole.values()]
        losses, _ = measure(asked, trials, self.progress, tokens=self.target.budget.tokens, device=self.device)
        found = {name: _rounded(loss) for name, loss in zip(whole, losses, strict=True)}
        name = min(found, key=lambda name: found[name])
        self.progress.say(f"{self.target.name}: chosen by {', by '.join(f'{each} {loss:.4g} nats' for each, loss in found.items())}")
        return name, rivals[name]

    @cached_property
    def _trials(self) -> dict[tuple[tuple[str, ...], str], Trial]:
        trials = artifact_trials(self.rung.plan, self.rung.artifact.path, self.schemes)
        count = len(trials) // (1 + len(self.schemes))
        return {(trial.modules, "" if i < count else trial.scheme): trial for i, trial in enumerate(trials)}

    @cached_property
    def _orders(self) -> dict[str, list[int]]:
        """Of items that can be kept, by name."""
        can = [i for i, item in enumerate(self.items) if item.fates[-1] == "keep"]
        of_weights = {i: max(weight_error(self.rung.plan, self._trials[loss.modules, ""]) for loss in self.items[i].losses) for i in can}
        of_blocks = {i: max(loss.block_error for loss in self.items[i].losses) for i in can}
        return {
            name: sorted(can, key=lambda i, errors=errors: math.inf if math.isnan(errors[i]) else -errors[i])  # type: ignore[misc]
            for name, errors in ((WEIGHTS, of_weights), (BLOCKS, of_blocks))
        }

    def _quantized(self, choice: Choice) -> list[Trial]:
        """The groups that a choice leaves quantized, as it does."""
        fates = [(item, item.fates[j]) for item, j in zip(self.items, choice, strict=True)]
        return [self._trials[loss.modules, fate] for item, fate in fates if fate != "keep" for loss in item.losses]


def _most_alike(plan: Plan, rungs: Sequence[Rung]) -> Like:
    """The rung of which most can be taken over."""
    found = [Like(rung.artifact.path, rung.plan.targets[0], alike(plan, rung.plan)) for rung in rungs]
    return max(found, key=lambda like: len(like.tensors))


def _losses(
    recipe: Recipe, budget: Budget, best: Rung, schemes: Sequence[str], out: Path, progress: Progress, device: str
) -> tuple[list[Loss], str]:
    """What each group loses alone, as the best rung made it and, behind these, in other schemes, and how it was measured; kept by content,
    for a climb that is taken up again."""
    # Of rounding the recipe names no text, but the ladder's does.
    asked = replace(best.plan, recipe=best.plan.recipe.model_copy(update={"calibration": recipe.calibration}))
    text = asked.recipe.calibration.model_dump(mode="json") if asked.recipe.calibration else {}
    facts = [manifest_digest(best.artifact.path), budget.tokens, schemes, text]
    kept = out / f"losses-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json"
    if kept.exists():
        found = json.loads(kept.read_text())
        return [Loss(**{**record, "modules": tuple(record["modules"])}) for record in found["losses"]], found["measured"]
    progress.say(f"{best.plan.targets[0].name}: measuring what each group of {best.name} loses alone, on {budget.tokens:,} tokens")
    losses, how = measure(asked, artifact_trials(best.plan, best.artifact.path, schemes), progress, tokens=budget.tokens, device=device)
    partial = kept.with_suffix(".partial")
    partial.write_text(json.dumps({"losses": [asdict(loss) for loss in losses], "measured": in_words(how)}))
    partial.rename(kept)
    return losses, in_words(how)


def _items(
    recipe: Recipe,
    target: Target,
    best: Rung,
    losses: Sequence[Loss],
    schemes: dict[str, Plan],
    stages: Stages,
    progress: Progress,
) -> list[_Item]:
    """What can be chosen: group by group, or all experts of the model at once where a runtime reads them in one way; and of experts only
    what the plan says that all runtimes of the target can load."""
    assert target.budget is not None
    entries = best.plan.targets[0].entries
    experts = {entry.module(part): entry.reading for entry in entries if entry.experts for part in entry.parts}
    merges = any(RUNTIMES[name].merges is not None for name in target.runtimes)
    count = len(losses) // (1 + len(schemes))
    together: dict[object, list[int]] = {}
    for i, loss in enumerate(losses[:count]):
        reading = experts.get(loss.modules[0])
        together.setdefault(reading if reading == "merged" and merges else i, []).append(i)
    items: list[_Item] = []
    refused: dict[str, bool] = {}
    for members in together.values():
        own = tuple(losses[i] for i in members)
        item = _Item(own, ("",), (Option(math.fsum(_rounded(loss) for loss in own), 0),))
        modules = item.modules
        now, plain = _bytes(best.plan, modules, plain=False), _bytes(best.plan, modules, plain=True)
        for choice in target.budget.choices:
            if choice == own[0].scheme:
                continue
            if choice == "keep":
                option = Option(0.0, plain - now)
            else:
                k = 1 + list(schemes).index(choice)
                option = Option(
                    math.fsum(_rounded(losses[count * k + i]) for i in members), _bytes(schemes[choice], modules, plain=False) - now
                )
            more = _Item(own, (*item.fates, choice), (*item.options, option))
            if modules[0] in experts:
                if choice not in refused:
                    refused[choice] = _refuses(recipe, target, best, _rule(more, len(more.fates) - 1, [], best), stages, progress)
                if refused[choice]:
                    continue
            item = more
        items.append(item)
    return items


def _refuses(recipe: Recipe, target: Target, best: Rung, rule: Rule, stages: Stages, progress: Progress) -> bool:
    try:
        stages.draft(rung_recipe(recipe, target, best.name, kept=[rule]))
    except RecipeError as error:
        progress.say(f"{target.name}: experts stay as {best.name} has them: {error}")
        return True
    return False


def _rounded(loss: Loss) -> float:
    """Three digits are more than the text can tell, and do not depend on how many threads shared out a product."""
    return float(f"{max(loss.kl_nats, 0.0):.3g}")


def _said(fate: str) -> str:
    return "in 16 bit" if fate == "keep" else f"in {fate}"


def _rule(item: _Item, taken: int, items: Sequence[_Item], best: Rung) -> Rule:
    """The rule that gives layers another fate, with its reason."""
    fate, option, was = item.fates[taken], item.options[taken], item.options[0]
    match = pattern(item.modules, [module for other in items if other is not item for module in other.modules])
    lost = f"mixed precision: in {item.losses[0].scheme} alone its group loses {was.loss:g} nats, "
    if fate == "keep":
        return Rule(match=match, keep=True, why=f"{lost}and keeping it takes {option.extra_bytes:,} bytes")
    steps = [step for step in rung_steps(best.name) if step.name in TRANSFORMS]
    return Rule(match=match, scheme=fate, algorithm=(*steps, Step(rtn=Rounding())), why=f"{lost}in {fate} {option.loss:g}")


def pattern(modules: Sequence[str], others: Sequence[str] | None = None) -> str:
    """What matches these modules and none of the ``others``: all that lies in one where that is so, or each by its name."""
    common = modules[0].split(".")
    while common and not all(module.startswith(".".join((*common, ""))) for module in modules):
        common.pop()
    inside = ".".join((*common, ""))
    if others is not None and len(modules) > 8 and common and not any(module.startswith(inside) for module in others):
        return f"re:{re.escape(inside)}.*"
    return f"re:{'|'.join(re.escape(module) for module in modules)}"


def _bytes(plan: Plan, modules: Sequence[str], *, plain: bool) -> int:
    """On disk, of the tensors that layers lie in, as they are planned or unquantized."""
    return sum(entry.plain.size_bytes if plain else entry.size_bytes for entry in entries_of(plan.targets[0], modules))


def _chosen(
    groups: Sequence[Sequence[Option]], budget: Budget, kl: Line, log_ratio: Line, noise: tuple[float, float], *, most: int
) -> Choice | None:
    """The choice that is expected to meet the budget, and by as much of the noise as ``most`` bytes more buy: what was chosen for its value
    on some text would not keep it on other text, half of the time."""

    def allowed(share: float) -> float:
        bounds = [kl.allows(budget.kl_nats / (1 + share * noise[0]))] if budget.kl_nats is not None else []
        if budget.perplexity_ratio is not None:
            bounds.append(log_ratio.allows(math.log(budget.perplexity_ratio) - share * noise[1]))
        return min(bounds)

    bare = choose(groups, allowed=allowed(0.0))
    for share in (1.0, 0.75, 0.5, 0.25) if bare is not None else ():
        sure = choose(groups, allowed=allowed(share))
        if sure is not None and bytes_of(groups, sure) <= bytes_of(groups, bare or sure) + most:
            return sure
    return bare


def _distance(rung: Rung, budget: Budget | None) -> float:
    """By how many times the budget is missed, at most one where it is met; NaN is infinitely far."""
    assert budget is not None
    shares = [rung.kl_nats / budget.kl_nats] if budget.kl_nats is not None else []
    shares += [rung.perplexity_ratio / budget.perplexity_ratio] if budget.perplexity_ratio is not None else []
    return math.inf if any(math.isnan(share) for share in shares) else max(shares)


def _taken(rungs: Sequence[Rung], budget: Budget | None) -> Rung:
    """Of those that passed beyond the noise the smallest, else of those that passed, which is one but for repeated choices of ``mixed``;
    else the one that comes closest, of those that were made and measured as a whole."""
    assert budget is not None
    passed = [rung for rung in rungs if rung.passed]
    if passed:
        return min([rung for rung in passed if rung.certain(budget)] or passed, key=lambda rung: rung.weight_bytes)
    return min([rung for rung in rungs if not rung.in_part] or rungs, key=lambda rung: _distance(rung, budget))


def _curves(items: Sequence[_Item], line: Line, base_bytes: int) -> dict[str, list[list[float]]]:
    """By name, (bytes of all weights, KL expected) of choices: the exact frontier, groups kept in random order (one, fixed), and those with
    the largest error in their block first."""
    groups = [item.options for item in items]
    # Curves to compare with know two fates.
    two = [(group[0], group[-1]) for group in groups]

    def points(options: Sequence[Sequence[Option]], choices: Sequence[Choice]) -> list[list[float]]:
        return [[float(base_bytes + bytes_of(options, choice)), line.expect(loss_of(options, choice))] for choice in choices]

    count = len(items)
    errors = [max((loss.block_error for loss in item.losses), default=0.0) for item in items]
    worst = sorted(range(count), key=lambda i: (-(math.inf if math.isnan(errors[i]) else errors[i]), items[i].modules))
    shuffled = sorted(range(count), key=lambda i: hashlib.sha256(spelled(items[i].modules).encode()).digest())
    nothing = [[0] * count]
    return {
        "frontier": points(groups, frontier(groups)),
        "groups in random order": points(two, nothing + by_order(shuffled, count)),
        "largest error in its block first": points(two, nothing + by_order(worst, count)),
    }


def settle(artifact: Artifact, final: Path, scratch: Path) -> Artifact:
    """Moves an artifact to its final name, and removes what was made on the way."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    artifact.path.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return replace(artifact, path=final, reused=False)
