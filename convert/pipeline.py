"""The whole job as function calls; the command does nothing that is not here."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convert.answers import read_questions
from convert.architecture import describe
from convert.calibrate import hessian_bytes, lane_tokens
from convert.card import render_card
from convert.comparison import Comparison
from convert.comparison import compare as side_by_side
from convert.datasets import pin
from convert.export import Artifact, cores, export, partial_bytes
from convert.hardware import this_machine
from convert.health import remark
from convert.html import render, render_comparison
from convert.lanes import WHOLE_SHARE, walk_sizes, whole_bytes
from convert.plan import Plan, TargetPlan, make_plan
from convert.progress import QUIET, Progress
from convert.quantize import working_bytes
from convert.recipe import Recipe, parse_recipe
from convert.report import Report, plain_json, report_path
from convert.source import Checkpoint, SourceDigests, open_source
from formats.errors import InputError, MachineError
from formats.manifest import CARD, read_manifest
from formats.safetensors import json_bytes

#: Resident memory of Python with torch and transformers loaded, before any tensor: 430 MB were seen with torch 2.13 on CPU.
BASE_BYTES = 600_000_000


@dataclass(frozen=True)
class Needs:
    """What a conversion needs of the machine, and what the machine has; ``check_memory_bytes`` is 0 without a check."""

    memory_bytes: int
    check_memory_bytes: int
    memory_free_bytes: int
    disk_bytes: int
    disk_free_bytes: int


@dataclass(frozen=True)
class Outcome:
    """Artifacts and, unless the check was left out, their reports, in the plan's order."""

    plan: Plan
    artifacts: tuple[Artifact, ...]
    reports: tuple[Report, ...]

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.reports)


def plan(recipe: Recipe) -> Plan:
    """Opens the recipe's model and decides the fate of every tensor; reads headers only.

    Raises :class:`~formats.errors.RecipeError`, :class:`~formats.errors.SourceError` or :class:`~formats.errors.FormatError`.
    """
    return _plan(recipe, open_source(recipe.model, trust_remote_code=recipe.trust_remote_code))


def needs(plan: Plan, out: Path, *, check: bool, device: str = "cpu") -> Needs:
    """What the job needs in memory and on the disk of ``out``, less what an interrupted run already took."""
    import psutil

    disk = plan.checkpoint.download_bytes + sum(max(0, target.weight_bytes - partial_bytes(out, target.name)) for target in plan.targets)
    memory = BASE_BYTES + working_bytes(plan.targets, cores(), gpu=device != "cpu")
    free = psutil.virtual_memory().available
    wide = plan.recipe.validation.reference == "float32"
    if plan.architecture is not None and any(target.calibrated for target in plan.targets):
        tokens = lane_tokens(plan)
        memory = max(
            memory, BASE_BYTES + walk_sizes(plan.checkpoint, plan.architecture, tokens=tokens, wide=wide).peak_bytes + hessian_bytes(plan)
        )
    check_memory = 0
    if check:
        check_memory = BASE_BYTES + whole_bytes(plan.checkpoint, wide=wide)
        if check_memory > WHOLE_SHARE * free and plan.architecture is not None:
            check_memory = (
                BASE_BYTES + walk_sizes(plan.checkpoint, plan.architecture, tokens=plan.recipe.validation.tokens, wide=wide).peak_bytes
            )
    if check:
        # Logits, or the hidden states of a model without a head, which are as wide as its embeddings.
        entries = [entry for target in plan.targets for entry in target.entries]
        width = max((entry.tensor.shape[0] for entry in entries if entry.kind == "head"), default=0)
        width = width or max((entry.tensor.matrix_shape[1] for entry in entries if entry.kind == "embedding"), default=0)
        disk += 2 * plan.recipe.validation.tokens * width * 4
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    return Needs(memory, check_memory, free, disk, shutil.disk_usage(existing).free)


def require(found: Needs, out: Path) -> None:
    """Raises :class:`MachineError` when the machine cannot carry the job, before any work."""
    if found.disk_bytes > found.disk_free_bytes:
        raise MachineError(
            f"{out}: {found.disk_bytes / 1e9:.2f} GB of disk are needed, {found.disk_free_bytes / 1e9:.2f} are free; "
            "make room or choose another --out"
        )
    if found.check_memory_bytes > found.memory_free_bytes:
        raise MachineError(
            f"the check runs the source, which needs {found.check_memory_bytes / 1e9:.2f} GB of memory even block by block, "
            f"{found.memory_free_bytes / 1e9:.2f} are free; "
            "set validation.reference: source in the recipe, or convert with --no-check and run octavo check on a larger machine"
        )
    if found.memory_bytes > found.memory_free_bytes:
        raise MachineError(
            f"{found.memory_bytes / 1e9:.2f} GB of memory are needed, {found.memory_free_bytes / 1e9:.2f} are free; close something first"
        )


def convert(recipe: Recipe, out: Path | None = None, *, device: str = "cpu", check: bool = True, progress: Progress = QUIET) -> Outcome:
    """Plans, quantizes, exports and proves; artifacts go to ``out/<target>`` (default ``artifacts/<recipe>``), reports beside them.

    Raises what :func:`plan` raises, :class:`MachineError` before any work when disk, memory or a runtime is missing, and
    :class:`~formats.errors.NumericsError` on NaN or Inf. An artifact that misses a limit is no error: see :attr:`Outcome.passed`.
    """
    out = out or Path("artifacts") / recipe.name
    checkpoint = open_source(recipe.model, trust_remote_code=recipe.trust_remote_code)
    with SourceDigests(checkpoint) as digests:
        job = _plan(recipe, checkpoint)
        _require_all(job, out, progress, check=check, device=device)
        artifacts = export(job, out, progress, digests=digests, device=device)
    for artifact in artifacts:
        if said := remark((artifact.manifest.calibration or {}).get("health", {})):
            progress.say(f"warning: {artifact.manifest.target}: {said}")
    reports = prove([artifact.path for artifact in artifacts], job.recipe, progress=progress, device=device) if check else []
    return Outcome(job, tuple(artifacts), tuple(reports))


def compare(recipes: Sequence[Recipe], out: Path | None = None, *, device: str = "cpu", progress: Progress = QUIET) -> Comparison:
    """Converts what is not yet made of each recipe, to ``out/<recipe>/<target>`` (default ``artifacts``), proves all on the same text with
    one run of the source, and writes ``out/compare.html`` and ``.json``.

    Raises :class:`InputError` when the recipes are about other models or texts, or share a name, and what :func:`convert` raises.
    """
    out = out or Path("artifacts")
    names = [recipe.name for recipe in recipes]
    for recipe in recipes:
        if names.count(recipe.name) > 1:
            raise InputError(f"{names.count(recipe.name)} recipes are called {recipe.name}; rename all but one")
        for what in ("model", "validation", "trust_remote_code"):
            if getattr(recipe, what) != getattr(recipes[0], what):
                where = recipe.where(what)
                raise InputError(f"{where}: {recipe.name} has another {what} than {names[0]}; --model and --set hold for all recipes")
    for recipe in recipes:  # what cannot be carried to its end stops all, before any work
        job = plan(recipe)
        _require_all(job, out / recipe.name, QUIET, check=True, device=device)
    made = [convert(recipe, out / recipe.name, device=device, check=False, progress=progress) for recipe in recipes]
    paths = [artifact.path for outcome in made for artifact in outcome.artifacts]
    by_artifact = [outcome.plan.recipe for outcome in made for _ in outcome.artifacts]
    reports = prove(paths, by_artifact, progress=progress, device=device)
    found = side_by_side([(read_manifest(path), report) for path, report in zip(paths, reports, strict=True)])
    (out / "compare.html").write_text(render_comparison(found), encoding="utf-8")
    (out / "compare.json").write_bytes(plain_json(found.record()))
    return found


def prove(
    artifacts: Sequence[Path], recipe: Recipe | Sequence[Recipe] | None = None, *, progress: Progress = QUIET, device: str = "cpu"
) -> list[Report]:
    """Checks artifacts of one recipe (default: the one in the first one's manifest), or of one each, and writes reports and model cards."""
    from convert.check import check

    recipe = recipe or recipe_of(artifacts[0])
    reports = []
    for path, report in zip(artifacts, check(artifacts, recipe, progress, device=device), strict=True):
        manifest = read_manifest(path)
        card = render_card(report, manifest).encode()
        report = replace(report, card_sha256=hashlib.sha256(card).hexdigest())
        (path / CARD).write_bytes(card)
        report_path(path).write_bytes(report.to_bytes())
        report_path(path).with_suffix(".html").write_text(render(report, manifest), encoding="utf-8")
        reports.append(report)
    return reports


def recipe_of(artifact: Path) -> Recipe:
    """The recipe that an artifact's manifest records. Raises :class:`~formats.errors.FormatError` or ``RecipeError``."""
    manifest = read_manifest(artifact)
    return parse_recipe(json_bytes(manifest.recipe).decode(), f"{artifact}/octavo.json", name=artifact.absolute().parent.name)


def plain_bytes(target: TargetPlan) -> int:
    """What the target's tensors would take unquantized."""
    return sum(entry.plain.size_bytes for entry in target.entries)


def _plan(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    recipe = _pinned(recipe)
    architecture = describe(checkpoint.config, checkpoint.tensors, folder=checkpoint.folder, trust_remote_code=recipe.trust_remote_code)
    return make_plan(recipe, checkpoint, architecture, machine=this_machine())


def _pinned(recipe: Recipe) -> Recipe:
    """With the commits of datasets on the Hub, so that the same job reads the same text for as long as it is interrupted, and later."""
    sections = {name: getattr(recipe, name) for name in ("calibration", "validation")}
    pins = {name: pin(section.text) for name, section in sections.items() if section is not None and section.text != "sample"}
    changed = {name: sections[name].model_copy(update={"text": text}) for name, text in pins.items() if text != sections[name].text}
    return recipe.model_copy(update=changed) if changed else recipe


def _require_all(job: Plan, out: Path, progress: Progress, *, check: bool, device: str) -> None:
    """Says the plan's warnings, and stops where the job could not be carried to its end."""
    from convert.check import require_runtimes

    for warning in job.warnings():
        progress.say(f"warning: {warning}")
    if check:
        if job.architecture is None:
            raise InputError(
                f"{job.checkpoint.origin}: transformers does not know its architecture, so nothing can run it to compare; "
                "convert it with --no-check"
            )
        if job.recipe.validation.prompts is not None:
            if not job.predicts:
                raise InputError(
                    f"{job.recipe.where('validation', 'prompts')}: {job.checkpoint.origin} predicts no tokens, so it answers nothing"
                )
            read_questions(Path(job.recipe.validation.prompts))
        for target in job.recipe.targets:
            require_runtimes(target)
    require(needs(job, out, check=check, device=device), out)
