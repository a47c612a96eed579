"""Takes out of a target the layers that static scales of their inputs would ruin, as its recipe says, up to its bound.

Whether a scale told in advance ruins a layer is seen with the model at work (:mod:`convert.health`), when the artifact is laid out
already. So the target is made again, by a recipe with a rule and its reason for each of these layers, until none is ruined; that recipe
is what the manifest records, and the artifact can be made again from it in one pass. A pass takes over the codes of blocks that
it does not change from the one before.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert import health
from convert.calibrate import alike
from convert.export import Artifact, Like, already_made
from convert.fusion import fused
from convert.ladder import pattern, settle
from convert.ledger import Entry, Plan
from convert.progress import Progress
from convert.recipe import Recipe, Rule, Target
from convert.runtimes import RUNTIMES
from formats.errors import RecipeError
from formats.safetensors import json_bytes
from formats.scheme import SCHEMES


@dataclass(frozen=True)
class Spared:
    """``modules`` share their fate, and ``rules`` (plain data) give them another. ``ruined``: of which of them it was seen, in words."""

    modules: tuple[str, ...]
    rules: tuple[dict[str, Any], ...]
    ruined: str


@dataclass(frozen=True)
class Passes:
    """What the pipeline does for a pass: ``draft`` plans a recipe of one target, ``make`` makes its artifact in a folder, taking over what
    the pass before has like it."""

    draft: Callable[[Recipe], Plan]
    make: Callable[[Plan, Path, Like | None], Artifact]


def spare(recipe: Recipe, target: Target, out: Path, passes: Passes, progress: Progress) -> tuple[Plan, Artifact]:
    """Makes ``out/<target>`` with no layer left that a static scale ruins, and returns it with the plan that made it.

    Of those that a pass finds, the worst are taken out, as many as the bound still allows: what lies behind a ruined layer may be ruined by
    it alone. What was found is kept in ``out/<target>.ruined``, so that an interrupted run goes on with the pass it was in, and one with
    a higher bound with what is known.

    Raises :class:`RecipeError` naming the layers where there are more than the bound allows, and what planning and making raise.
    """
    assert target.ruined is not None
    index = recipe.targets.index(target)
    where = recipe.where("targets", index, "ruined")
    final, scratch, note = out / target.name, out / f".{target.name}.ruined", out / f"{target.name}.ruined"
    asked = hashlib.sha256(f"{passes.draft(_recipe(recipe, target, ())).digest} {target.ruined.instead}".encode()).hexdigest()
    spared = _read(note, asked)
    job, like = passes.draft(_recipe(recipe, target, spared)), None
    while True:
        folder = scratch / str(_count(spared))
        artifact = already_made(final, job.digest) or passes.make(job, folder, like)
        if like is not None:
            shutil.rmtree(like.folder.parent)
        layers = (artifact.manifest.calibration or {}).get("health", {})
        found = _found(job, layers, target.ruined.instead)
        if not found:
            break
        left = target.ruined.at_most - _count(spared)
        taken = [one for i, one in enumerate(found) if _count(found[: i + 1]) <= left]
        if not taken:
            told = "; ".join(one.ruined for one in (*spared, *found))
            raise RecipeError(
                f"{where}: static activations ruin {_count((*spared, *found))} layers, and at_most {target.ruined.at_most} of them may "
                f"be taken out: {told}. Raise at_most, smooth or rotate what is large, or give them rules of their own"
            )
        _require_others(recipe, index, job, [*spared, *taken])
        spared = [*spared, *taken]
        _write(note, asked, spared)
        before, job = job, passes.draft(_recipe(recipe, target, spared))
        like = _left_there(artifact, before, job, folder)
        fate = "kept in 16 bit" if target.ruined.instead == "keep" else f"made {target.ruined.instead}"
        progress.say(f"{target.name}: made again with {_count(taken)} more layers {fate}: {'; '.join(one.ruined for one in taken)}")
    return job, artifact if artifact.path == final else settle(artifact, final, scratch)


def _left_there(artifact: Artifact, before: Plan, job: Plan, folder: Path) -> Like | None:
    """What the pass of ``job`` can take over of the ``artifact`` that the one ``before`` made in a ``folder``; where there is nothing, or
    the disk does not hold both, the folder goes. Taking over is the first thing that a pass does, so one that is taken up needs none."""
    tensors = alike(job, before)
    if artifact.path.parent != folder:
        return None  # an earlier result, of which there are no notes
    if tensors and shutil.disk_usage(folder).free > 1.1 * artifact.size_bytes:
        return Like(artifact.path, before.targets[0], tensors)
    shutil.rmtree(folder)
    return None


def _recipe(recipe: Recipe, target: Target, spared: Sequence[Spared]) -> Recipe:
    """That of the target alone, in which layers have another fate."""
    first = [Rule.model_validate(rule) for one in spared for rule in one.rules]
    return recipe.remade(target, (*first, *target.rules), first=len(first), by="ruined", changed={"ruined": None})


def all_instead(recipe: Recipe, target: Target) -> Recipe:
    """That of the target alone, in which every layer with a static scale has what ruined ones get, for a plan that finds what cannot be."""
    assert target.ruined is not None
    rules = tuple(
        rule.model_copy(update={"scheme": target.ruined.instead, "observer": None, "percentile": None})
        if rule.scheme and SCHEMES[rule.scheme].static
        else rule
        for rule in target.rules
    )
    return recipe.remade(target, rules, first=0, by="ruined", changed={"ruined": None})


def _found(job: Plan, layers: dict[str, Any], instead: str) -> list[Spared]:
    """What ruined layers are taken out with, the worst first: all that share a tensor of the source or, in a runtime, a layer with them."""
    target = job.targets[0]
    fates = {entry.module(part): entry for entry in target.entries for part in entry.parts}
    together = [{entry.module(part) for part in entry.parts} for entry in target.quantized]
    together += map(set, fused(job.architecture, fates) if any(RUNTIMES[name].fuses for name in target.runtimes) else [])
    found: list[Spared] = []
    for name in health.ruined(layers):
        if any(name in one.modules for one in found):
            continue
        members = {name}
        while more := set().union(*(group for group in together if group & members)) - members:
            members |= more
        modules = tuple(module for module in fates if module in members)
        also = [module for module in health.ruined(layers) if module in members]
        told = ", ".join(health.described(module, layers[module]) for module in also)
        found.append(Spared(modules, tuple(_rules([(module, fates[module]) for module in modules], instead, told)), told))
    return found


def _rules(members: Sequence[tuple[str, Entry]], instead: str, told: str) -> list[dict[str, Any]]:
    """One rule that keeps them, or one for all that have the same algorithms, which they keep."""
    why = f"static activations would ruin {told}"
    if instead == "keep":
        return [Rule(match=pattern([module for module, _ in members]), keep=True, why=why).model_dump(mode="json", exclude_unset=True)]
    by_steps: dict[str, list[tuple[str, Entry]]] = {}
    for module, entry in members:
        by_steps.setdefault(repr(entry.steps), []).append((module, entry))
    return [
        Rule(
            match=pattern([module for module, _ in alike]), scheme=instead, algorithm=alike[0][1].steps, why=why
        ).model_dump(mode="json", exclude_unset=True)
        for alike in by_steps.values()
    ]  # fmt: skip


def _require_others(recipe: Recipe, index: int, job: Plan, spared: Sequence[Spared]) -> None:
    """Raises :class:`RecipeError` for a rule whose layers are all ruined: what is left of it would match nothing."""
    modules = {module for one in spared for module in one.modules}
    for i, rule in enumerate(recipe.targets[index].rules):
        of_rule = [entry for entry in job.targets[0].entries if entry.scheme and entry.rule.endswith(f" {rule.match}")]
        if of_rule and all(entry.module(part) in modules for entry in of_rule for part in entry.parts):
            raise RecipeError(
                f"{recipe.where('targets', index, 'rules', i)}: static activations ruin every layer that {rule.match!r} names: "
                f"{'; '.join(one.ruined for one in spared)}. Give the rule a dynamic scheme, or keep: true"
            )


def _count(spared: Sequence[Spared]) -> int:
    return sum(len(one.modules) for one in spared)


def _read(note: Path, asked: str) -> list[Spared]:
    """What earlier passes of the same job found."""
    try:
        record = json.loads(note.read_text())
    except (OSError, ValueError):
        return []
    if record.get("asked") != asked:
        return []
    return [Spared(tuple(one["modules"]), tuple(one["rules"]), one["ruined"]) for one in record["spared"]]


def _write(note: Path, asked: str, spared: Sequence[Spared]) -> None:
    partial = note.with_name(f".{note.name}.new")
    partial.write_bytes(json_bytes({"asked": asked, "spared": [asdict(one) for one in spared]}))
    partial.rename(note)
