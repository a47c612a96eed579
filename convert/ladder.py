"""Climbs to a budget: each rung is planned, converted and checked, and the first that meets the budget wins.

A rung is a recipe of its own, with algorithms in its rules and the budget among its limits; the one that wins is what the manifest records,
so that the artifact can be made again without climbing. ``mixed`` takes the best rung below it, measures on its artifact what each group
of layers loses alone, and keeps in 16 bit the groups that meet the budget with the fewest bytes; as losses do not add exactly, what comes
of it is measured, the model of how they add is corrected, and the choice made again. ``recover``, the last, trains the model with every
layer quantized.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.export import Artifact
from convert.mixed import Line, Measured, by_order, choose, frontier, line_through
from convert.plan import Plan
from convert.progress import Progress
from convert.recipe import LADDER, Budget, Recipe, Rule, Target, reads_calibration, rung_steps
from convert.report import Report
from convert.sensitivity import Loss, artifact_trials, measure, spelled
from formats.errors import RecipeError

#: A choice that is expected to take this share of the bytes of one that met the budget, or less, is worth converting.
WORTHWHILE = 0.9
#: Plans, converts and checks a recipe of one target in a folder.
Make = Callable[[Recipe, Path], tuple[Plan, Artifact, Report]]


@dataclass(frozen=True)
class Rung:
    """What came of a rung. ``kl_nats`` and ``perplexity_ratio`` are those of the worst runtime, infinite where one did not run;
    ``kept_share`` of the bytes of all linear layers are in 16 bit."""

    name: str
    plan: Plan
    artifact: Artifact
    report: Report
    kl_nats: float
    perplexity_ratio: float
    kept_share: float
    kept_groups: int = 0

    @property
    def weight_bytes(self) -> int:
        return self.plan.targets[0].weight_bytes

    def record(self) -> dict[str, Any]:
        """For the report."""
        return {
            "name": self.name,
            "kl_nats": self.kl_nats,
            "perplexity_ratio": self.perplexity_ratio,
            "weight_bytes": self.weight_bytes,
            "kept_share": self.kept_share,
            "kept_groups": self.kept_groups,
            "passed": self.report.passed,
            "failed": [check.name for check in self.report.checks if not check.passed],
        }


@dataclass(frozen=True)
class Climb:
    """Every rung that was tried, in order, the one that is taken (the first that passed, or the nearest), and for the report what ``mixed``
    saw of the groups."""

    rungs: tuple[Rung, ...]
    taken: Rung
    groups: tuple[dict[str, Any], ...] = ()
    curves: dict[str, list[list[float]]] | None = None

    def record(self, budget: Budget) -> dict[str, Any]:
        """As plain data, for the report."""
        return {
            "budget": budget.model_dump(include={"kl_nats", "perplexity_ratio"}, exclude_none=True),
            "taken": self.taken.name,
            "rungs": [rung.record() for rung in self.rungs],
            "groups": list(self.groups),
            "curves": self.curves or {},
        }


def climb(recipe: Recipe, target: Target, out: Path, make: Make, progress: Progress, *, device: str = "cpu") -> Climb:
    """Makes rung after rung of a target in ``out/<rung>``. Raises what planning, converting and measuring raise."""
    assert target.budget is not None
    rungs: list[Rung] = []
    mixed: Climb | None = None
    for name in target.ladder or LADDER:
        if name == "mixed":
            best = min(rungs, key=lambda rung: _distance(rung, target.budget))
            mixed = _mix(recipe, target, out, make, progress, rungs, best, device)
            if mixed.taken.report.passed:
                return mixed
            rungs = list(mixed.rungs)
            continue
        progress.say(f"{target.name}: rung {name}")
        try:
            rungs.append(_try(name, rung_recipe(recipe, target, name), out / name, make, progress))
        except RecipeError as error:
            # It is the one rung that not every model can take, and there is an artifact already.
            if name != "recover" or not rungs:
                raise
            progress.say(f"{target.name}: rung recover is left out: {error}")
            break
        if rungs[-1].report.passed:
            break
    return Climb(tuple(rungs), _taken(rungs, target.budget), *((mixed.groups, mixed.curves) if mixed else ()))


def rung_recipe(recipe: Recipe, target: Target, rung: str, *, kept: Sequence[Rule] = (), alone: dict[str, float] | None = None) -> Recipe:
    """The recipe of one rung: ``kept`` before the target's own rules, which take the rung's algorithms; the budget becomes limits."""
    steps = rung_steps(rung)
    rules = (*kept, *(rule.model_copy(update={"algorithm": steps}) if rule.scheme else rule for rule in target.rules))
    changed = {"rules": rules, "limits": target.merged_limits(), "budget": None, "ladder": None, "alone": alone or None}
    index = recipe.targets.index(target)
    made = recipe.only([target])
    made = made.model_copy(update={"targets": (target.model_copy(update=changed),)})
    if not reads_calibration(made.targets[0]):
        made = made.model_copy(update={"calibration": None})
    # Rules that the ladder puts first come from the budget's line, and move the others down.
    of_rules = {path: where for path, where in made._where.items() if path[:3] == ("targets", 0, "rules") and len(path) > 3}
    for path in of_rules:
        del made._where[path]
    made._where |= {(*path[:3], int(path[3]) + len(kept), *path[4:]): where for path, where in of_rules.items()}
    made._where |= {("targets", 0, "rules", i): recipe.where("targets", index, "budget") for i in range(len(kept))}
    if "rules" not in target.model_fields_set:
        made._where |= {("targets", 0, "rules", len(kept) + i): recipe.where("targets", index) for i in range(len(target.rules))}
    return made


def _try(name: str, recipe: Recipe, folder: Path, make: Make, progress: Progress, *, kept_groups: int = 0) -> Rung:
    plan, artifact, report = make(recipe, folder)
    divergences = [run.divergence for run in report.runtimes]
    ran = len(divergences) == len(plan.targets[0].runtimes) and all(divergences)
    kl = max((found.kl_nats for found in divergences if found), default=math.inf) if ran else math.inf
    ratio = max((found.perplexity_ratio for found in divergences if found), default=math.inf) if ran else math.inf
    rung = Rung(name, plan, artifact, report, kl, ratio, kept_share(plan), kept_groups)
    progress.say(
        f"{name}: KL {kl:.4g} nats, perplexity ratio {ratio:.4g}, {rung.weight_bytes / 1e6:.1f} MB, "
        f"{rung.kept_share:.1%} of the linear bytes in 16 bit: {'passed' if report.passed else 'not enough'}"
    )
    return rung


def kept_share(plan: Plan) -> float:
    """Of the unquantized bytes of all linear layers and experts but the head, the share that stays as it is."""
    linear = [entry for entry in plan.targets[0].entries if entry.kind in ("linear", "expert", "unknown") and entry.parts]
    whole = sum(entry.plain.size_bytes for entry in linear)
    return sum(entry.plain.size_bytes for entry in linear if not entry.scheme) / whole if whole else 0.0


def _mix(recipe: Recipe, target: Target, out: Path, make: Make, progress: Progress, rungs: list[Rung], best: Rung, device: str) -> Climb:
    budget = target.budget
    assert budget is not None
    if not math.isfinite(best.kl_nats) or not math.isfinite(best.perplexity_ratio):
        progress.say(f"{target.name}: no rung ran everywhere with finite logits, so there is nothing to mix")
        return Climb(tuple(rungs), _taken(rungs, budget))
    progress.say(f"{target.name}: measuring what each group of {best.name} loses alone, on {budget.tokens:,} tokens")
    trials = artifact_trials(best.plan, best.artifact.path)
    # Of rounding the recipe names no text, but the ladder's does.
    asked = replace(best.plan, recipe=best.plan.recipe.model_copy(update={"calibration": recipe.calibration}))
    losses, _ = measure(asked, trials, progress, tokens=budget.tokens, device=device)
    # Three digits are more than the text can tell, and do not depend on how many threads shared out a product.
    values = [float(f"{max(loss.kl_nats, 0.0):.3g}") for loss in losses]
    sizes = [_extra_bytes(best.plan, loss) for loss in losses]
    kl, ratio = [Measured(sum(values), best.kl_nats)], [Measured(sum(values), math.log(best.perplexity_ratio))]
    tried: list[list[bool]] = []
    mixed: list[tuple[Rung, list[bool]]] = []
    for attempt in range(budget.tries):
        kept = choose(values, sizes, allowed=_allowed(budget, line_through(kl), line_through(ratio)))
        if kept is None:
            progress.say(f"{target.name}: not even keeping every group in 16 bit is expected to meet the budget")
            break
        passed = [(rung, choice) for rung, choice in mixed if rung.report.passed]
        if kept in tried or (passed and _taking(kept, sizes) > WORTHWHILE * min(_taking(choice, sizes) for _, choice in passed)):
            break
        tried.append(kept)
        left = sum(value for value, keep in zip(values, kept, strict=True) if not keep)
        expected = line_through(kl).expect(left)
        name = "mixed" if attempt == 0 else f"mixed-{attempt + 1}"
        progress.say(
            f"{target.name}: rung {name}: {best.name} with {sum(kept)} of {len(kept)} groups in 16 bit, {_taking(kept, sizes) / 1e6:.2f} "
            f"MB more, KL {expected:.4g} expected"
        )
        rules = [_keep(loss, value, size) for loss, value, size, keep in zip(losses, values, sizes, kept, strict=True) if keep]
        alone = {module: value for loss, value in zip(losses, values, strict=True) for module in loss.modules}
        made = rung_recipe(recipe, target, best.name, kept=rules, alone=alone)
        rung = _try(name, made, out / name, make, progress, kept_groups=sum(kept))
        rungs.append(rung)
        mixed.append((rung, kept))
        if not math.isfinite(rung.kl_nats):
            break
        kl.append(Measured(left, rung.kl_nats))
        ratio.append(Measured(left, math.log(rung.perplexity_ratio)))
    taken = _taken(rungs, budget)
    chosen = next((choice for rung, choice in mixed if rung is taken), [False] * len(values))
    groups = tuple(
        {
            "modules": list(loss.modules),
            "scheme": loss.scheme,
            "alone_nats": value,
            "standard_error": loss.standard_error,
            "block_error": loss.block_error,
            "extra_bytes": size,
            "kept": keep,
        }
        for loss, value, size, keep in zip(losses, values, sizes, chosen, strict=True)
    )
    return Climb(tuple(rungs), taken, groups, _curves(losses, values, sizes, line_through(kl), best.weight_bytes))


def _keep(loss: Loss, value: float, size: int) -> Rule:
    """The rule that keeps a group, with its reason."""
    pattern = "|".join(re.escape(module) for module in loss.modules)
    return Rule(
        match=f"re:{pattern}",
        keep=True,
        why=f"mixed precision: quantized alone its group loses {value:g} nats, and keeping it takes {size:,} bytes",
    )


def _extra_bytes(plan: Plan, loss: Loss) -> int:
    """What a group takes more in 16 bit."""
    entries = {entry.module(part): entry for entry in plan.targets[0].quantized for part in entry.parts}
    return sum(entries[module].plain.size_bytes - entries[module].size_bytes for module in loss.modules)


def _allowed(budget: Budget, kl: Line, log_ratio: Line) -> float:
    """How much groups may lose alone, together, so that both bounds are expected to be met."""
    bounds = [kl.allows(budget.kl_nats)] if budget.kl_nats is not None else []
    bounds += [log_ratio.allows(math.log(budget.perplexity_ratio))] if budget.perplexity_ratio is not None else []
    return min(bounds)


def _taking(kept: Sequence[bool], sizes: Sequence[int]) -> int:
    return sum(size for size, keep in zip(sizes, kept, strict=True) if keep)


def _distance(rung: Rung, budget: Budget | None) -> float:
    """By how many times the budget is missed, at most one where it is met; NaN is infinitely far."""
    assert budget is not None
    shares = [rung.kl_nats / budget.kl_nats] if budget.kl_nats is not None else []
    shares += [rung.perplexity_ratio / budget.perplexity_ratio] if budget.perplexity_ratio is not None else []
    return math.inf if any(math.isnan(share) for share in shares) else max(shares)


def _taken(rungs: Sequence[Rung], budget: Budget | None) -> Rung:
    """Of those that passed the smallest, which is the first but for repeated choices of ``mixed``; else the one that comes closest."""
    passed = [rung for rung in rungs if rung.report.passed]
    if passed:
        return min(passed, key=lambda rung: rung.weight_bytes)
    return min(rungs, key=lambda rung: _distance(rung, budget))


def _curves(
    losses: Sequence[Loss], values: Sequence[float], sizes: Sequence[int], line: Line, base_bytes: int
) -> dict[str, list[list[float]]]:
    """By name, (bytes of all weights, KL expected) of choices: the exact frontier, groups in random order (one, fixed), and those with the
    largest error in their own block first."""
    order = sorted(range(len(values)), key=lambda i: hashlib.sha256(spelled(losses[i].modules).encode()).digest())
    worst = sorted(range(len(values)), key=lambda i: -losses[i].block_error)

    def points(choices: Sequence[Sequence[bool]]) -> list[list[float]]:
        return [
            [base_bytes + _taking(kept, sizes), line.expect(sum(value for value, keep in zip(values, kept, strict=True) if not keep))]
            for kept in choices
        ]

    nothing = [[False] * len(values)]
    return {
        "frontier": points(frontier(values, sizes)),
        "random order": points(nothing + by_order(order, len(values))),
        "largest error in its block first": points(nothing + by_order(worst, len(values))),
    }


def settle(found: Climb, target: Target, out: Path, scratch: Path) -> Artifact:
    """Moves the artifact that is taken to its final name, and removes what was made on the way."""
    final, old = out / target.name, out / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    found.taken.artifact.path.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return replace(found.taken.artifact, path=final)
