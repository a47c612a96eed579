"""The whole job as function calls; the command does nothing that is not here."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convert.answers import describe as describe_questions
from convert.answers import encode, read_questions
from convert.architecture import describe
from convert.calibrate import calibration_tokens, require_known, source_sidecars, statistics_bytes, walk_dtype
from convert.card import render_card
from convert.comparison import Comparison
from convert.comparison import compare as side_by_side
from convert.datasets import is_hub_id, pin
from convert.export import Artifact, Like, cores, export, partial_bytes, require_free, require_writable, writing
from convert.hardware import let_segments_grow, this_machine
from convert.health import remark
from convert.html import render, render_comparison
from convert.ladder import Stages, climb, in_scheme, rung_recipe, settle
from convert.lanes import WHOLE_SHARE, place_for, walk_sizes, whole_bytes
from convert.ledger import Plan, TargetPlan
from convert.pictures import load_processor, take_pictures
from convert.plan import make_plan
from convert.progress import QUIET, Progress
from convert.quantize import working_bytes
from convert.ranges import observe
from convert.recipe import LADDER, Recipe, Target, parse_recipe, reads_calibration
from convert.recover import generated_tokens, training_bytes
from convert.report import NO_LOOK, Look, Report, manifest_digest, plain_json, read_report, report_path
from convert.rotate import rotate, rotation_bytes
from convert.ruined import Passes, all_instead, spare
from convert.sensitivity import measured_on
from convert.source import Checkpoint, SourceDigests, open_source, require_sidecars
from convert.tasks import require_tasks
from convert.text import SAMPLES, TEXTS, load_tokenizer, take_held_out
from formats.errors import FormatError, InputError, MachineError, RecipeError
from formats.manifest import CARD, MANIFEST, read_manifest
from formats.safetensors import json_bytes
from formats.verify import verify

#: Resident memory of Python with torch and transformers loaded, before any tensor: 430 MB were seen with torch 2.13 on CPU.
BASE_BYTES = 600_000_000
#: Where the rungs of a ladder keep what the source computed.
REFERENCE = "reference"


@dataclass(frozen=True)
class Needs:
    """What a conversion needs of the machine, and what the machine has; ``check_memory_bytes`` is 0 without a check. ``asked``: what a
    number of the recipe takes alone, with its place and the number."""

    memory_bytes: int
    check_memory_bytes: int
    memory_free_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    asked: tuple[Asked, ...] = ()


@dataclass(frozen=True)
class Asked:
    """Memory, or with ``of`` disk, that a number of the recipe takes alone. ``where``: its place and what it comes to, in words."""

    where: str
    size_bytes: int
    of: str = "memory"


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


def require_places(job: Plan, *, check: bool) -> None:
    """Raises :class:`InputError`, with the line of the recipe, where sequences are longer than the model's table of positions, or answers
    than anything it reads."""
    if job.architecture is None or job.architecture.reads != "input_ids" or job.architecture.context_length is None:
        return
    longest = job.architecture.context_length
    if check and job.recipe.validation.prompts is not None and (asked := job.recipe.validation.answer_tokens) > longest:
        raise InputError(
            f"{job.recipe.where('validation', 'answer_tokens')}: validation.answer_tokens: {asked:,} tokens are to be written, and "
            f"{job.checkpoint.origin} reads no more than {longest:,}; ask for fewer"
        )
    # OPT's and BART's tables begin with two rows for no position.
    tables = [entry.tensor.shape[0] for entry in job.targets[0].entries if entry.kind == "embedding"]
    tables = [rows for rows in tables if rows in (longest, longest + 2)]
    learned = bool(tables) and (tables != [job.checkpoint.config.get("vocab_size")])
    for key, length in job.lengths().items():
        if learned and length > longest and (check or key != "validation"):
            raise InputError(
                f"{job.recipe.where(key, 'length')}: {key}.length: {length:,} tokens in a sequence, and {job.checkpoint.origin} has "
                f"a table of {longest:,} positions; set {key}.length to that or less"
            )


def require_files(job: Plan, *, check: bool) -> None:
    """Raises :class:`InputError`, with the line of the recipe, where a text or a folder that it names cannot be read, and
    :class:`FormatError` for a small file of the source's that is no JSON: hours before either would be found. ``check``: whether what the
    check reads is wanted too."""
    recipe = job.recipe
    named = [("calibration", "text", job.calibration.text)] if any(map(reads_calibration, recipe.targets)) else []
    if check:
        named += [("validation", key, said) for key in ("text", "images", "prompts") if (said := getattr(recipe.validation, key))]
    for section, key, said in named:
        if key == "text":
            _require_length(job, section, said)
        if said == "sample" or (key != "prompts" and is_hub_id(said)):
            continue
        try:
            if key != "images" or not Path(said).is_dir():
                Path(said).open("rb").close()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            hint = "; a dataset on the Hub is named org/name" if key != "prompts" and not Path(said).suffix else ""
            why = getattr(error, "strerror", None) or error
            raise InputError(f"{recipe.where(section, key)}: {section}.{key}: {said} cannot be read ({why}){hint}") from None
    if job.checkpoint.folder is not None:
        require_sidecars(job.checkpoint.folder, job.checkpoint.origin)


def _require_length(job: Plan, section: str, said: str) -> None:
    """Raises :class:`InputError` where a file of text has too few bytes for the tokens that are asked of it, with which reading it ends."""
    path = TEXTS / SAMPLES[section][0] if said == "sample" else Path(said)
    if path.suffix == ".parquet" or not path.is_file():
        return
    settings = job.calibration
    count, what = job.recipe.validation.tokens, "tokens"
    if section == "calibration":
        count, what = (settings.sequences, "documents") if settings.documents else (settings.tokens, "tokens")
    # No tokenizer makes more tokens of a text than it has bytes; each sequence of two or more has one that begins it.
    if count > 2 * (size := path.stat().st_size):
        where = job.recipe.where(section)
        raise InputError(
            f"{where}: {section}: {count:,} {what} are asked of {said}, which has {size:,} bytes; give a longer text or ask for fewer"
        )


def require_rungs(job: Plan) -> None:
    """Plans what a target may become on the way: each rung of its ladder, each choice of ``mixed``, what it gets instead of static scales.
    Raises :class:`RecipeError` for what its format or a runtime cannot hold, hours before it would be made."""

    def draft(recipe: Recipe) -> Plan:
        return make_plan(recipe, job.checkpoint, job.architecture, machine=this_machine())

    for i, target in enumerate(job.recipe.targets):
        if target.ruined is not None and target.ruined.instead != "keep":
            try:
                draft(all_instead(job.recipe, target))
            except RecipeError as error:
                raise RecipeError(f"{job.recipe.where('targets', i, 'ruined')}: instead: {error}") from None
        if target.budget is None:
            continue
        for rung in (rung for rung in target.ladder or LADDER if rung != "mixed"):
            try:
                draft(rung_recipe(job.recipe, target, rung))
            except RecipeError:
                # The one rung that not every model can take is left out by who climbs; where it is the only one there is nothing left.
                if rung != "recover" or target.ladder == ("recover",):
                    raise
        if "mixed" not in (target.ladder or LADDER):
            continue
        try:
            measured_on(job)
        except InputError as error:
            raise RecipeError(f"{job.recipe.where('targets', i, 'ladder')}: mixed: {error}; give a ladder without mixed") from None
        for scheme in (choice for choice in target.budget.choices if choice != "keep"):
            try:
                draft(in_scheme(job.recipe, target, scheme))
            except RecipeError as error:
                raise RecipeError(f"{job.recipe.where('targets', i, 'budget', 'choices')}: {error}") from None


def needs(plan: Plan, out: Path, *, check: bool, device: str = "cpu") -> Needs:
    """What the job needs in memory and on the disk of ``out``, less what an interrupted run already took."""
    import psutil

    begun = {name: partial_bytes(out, name) + partial_bytes(out / f".{name}.ruined", name) for name in (t.name for t in plan.targets)}
    disk = plan.checkpoint.download_bytes + sum(max(0, target.weight_bytes - begun[target.name]) for target in plan.targets)
    turning = rotation_bytes(plan.checkpoint, cores())
    memory = BASE_BYTES + turning + working_bytes(plan.targets, cores(), gpu=device != "cpu")
    free = psutil.virtual_memory().available
    asked: list[Asked] = []
    wide = plan.recipe.validation.reference == "float32"
    if plan.architecture is not None and any(target.calibrated for target in plan.targets):
        tokens = plan.calibration.tokens
        sizes = walk_sizes(plan.checkpoint, plan.architecture, tokens=tokens, wide=walk_dtype(plan, device) == "float32")
        # Two lanes of three may lie on disk; where the walk began stays with the model's own code.
        parked = 2 * sizes.lane_bytes // 3
        parked = parked if place_for(parked, on_gpu=False, gpu_free_bytes=0, host_free_bytes=free) == "disk" else 0
        disk += parked
        # A block is smoothed in float32, whatever it is watched in.
        walked = sizes.peak_bytes - parked + 2 * sizes.block_bytes + turning
        memory = max(memory, BASE_BYTES + walked + statistics_bytes(plan, cores() if device == "cpu" else 1))
        memory = max(
            memory, *(BASE_BYTES + training_bytes(plan, target, walked, free_bytes=free, device=device) for target in plan.targets)
        )
        said = f"{plan.recipe.where('calibration')}: calibration.sequences x length: {tokens:,} tokens"
        asked += [Asked(said, sizes.lane_bytes - parked), Asked(said, parked, "disk")]
        for target in plan.targets:
            if written := generated_tokens(plan, target):
                where = plan.recipe.where("targets", [item.name for item in plan.recipe.targets].index(target.name), "rules")
                asked.append(Asked(f"{where}: recover.generated: {written:,} tokens that the source writes", 16 * written))
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
        compared = plan.recipe.validation.tokens
        asked.append(
            Asked(f"{plan.recipe.where('validation')}: validation.tokens: logits of {compared:,} tokens", 8 * compared * width, "disk")
        )
        disk += asked[-1].size_bytes
    existing = next(folder for folder in (out, *out.absolute().parents) if os.path.exists(folder))
    return Needs(memory, check_memory, free, disk, shutil.disk_usage(existing).free, tuple(asked))


def require(found: Needs, out: Path) -> None:
    """Raises :class:`MachineError` when the machine cannot carry the job, before any work, and :class:`InputError` where one number of the
    recipe asks for more than all there is."""
    for each in found.asked:
        free = found.memory_free_bytes if each.of == "memory" else found.disk_free_bytes
        if each.size_bytes > free:
            raise InputError(f"{each.where} take {each.size_bytes / 1e9:.2f} GB of {each.of}, {free / 1e9:.2f} are free; ask for fewer")
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
    :class:`~formats.errors.NumericsError` on NaN or Inf. An artifact that misses a limit is no error: see :attr:`Outcome.passed`. Targets
    with a budget come last, each made again until it is met (:mod:`convert.ladder`).
    """
    if device != "cpu":
        let_segments_grow()
    out = out or Path("artifacts") / recipe.name
    budgeted = [target for target in recipe.targets if target.budget is not None]
    if budgeted and not check:
        raise InputError(f"{budgeted[0].name}: whether a budget is met is seen by the check; leave --no-check out, or the budget")
    checkpoint = open_source(recipe.model, trust_remote_code=recipe.trust_remote_code)
    with SourceDigests(checkpoint) as digests:
        job = _plan(recipe, checkpoint)
        compared_on = _require_all(job, out, progress, check=check, device=device)
        if check:
            require_tasks(job.recipe)
        if budgeted:
            return _climb_all(job, out, digests, progress, compared_on, device=device)
        made = _export_all(job, checkpoint, out, digests, progress, device=device)
    artifacts = [artifact for _, artifact in made]
    for artifact in artifacts:
        if said := remark((artifact.manifest.calibration or {}).get("health", {})):
            progress.say(f"warning: {artifact.manifest.target}: {said}")
    recipes = [by.recipe for by, _ in made]
    reports = prove([artifact.path for artifact in artifacts], recipes, progress=progress, device=device) if check else []
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
        if what := _difference(recipe, recipes[0]):
            where = recipe.where(what)
            raise InputError(f"{where}: {recipe.name} has another {what} than {names[0]}; --model and --set hold for all recipes")
    for recipe in recipes:  # what cannot be carried to its end stops all, before any work
        job = plan(recipe)
        _require_all(job, out / recipe.name, QUIET, check=True, device=device)
    require_tasks(recipes[0])
    climbs = [any(target.budget is not None for target in recipe.targets) for recipe in recipes]
    made = [
        convert(recipe, out / recipe.name, device=device, check=climb_it, progress=progress)
        for recipe, climb_it in zip(recipes, climbs, strict=True)
    ]
    paths = [artifact.path for outcome in made for artifact in outcome.artifacts]
    by_artifact = [outcome.plan.recipe for outcome in made for _ in outcome.artifacts]
    reports = prove(paths, by_artifact, progress=progress, device=device)
    found = side_by_side([(read_manifest(path), report) for path, report in zip(paths, reports, strict=True)])
    if found.pair:
        schemes = {layer.tensor: layer.schemes for layer in found.layers}
        found = replace(found, ranges=observe(made[0].plan, schemes, progress, device=device))
    with writing(out):
        (out / "compare.html").write_text(render_comparison(found), encoding="utf-8")
        (out / "compare.json").write_bytes(plain_json(found.record()))
    return found


def _difference(one: Recipe, other: Recipe) -> str:
    """The first of what two recipes must share if one run of the source serves both, and do not; empty if there is none."""
    return next((what for what in ("model", "validation", "trust_remote_code") if getattr(one, what) != getattr(other, what)), "")


def _export_all(
    job: Plan, checkpoint: Checkpoint, out: Path, digests: SourceDigests, progress: Progress, *, device: str
) -> list[tuple[Plan, Artifact]]:
    """Every artifact with the plan that made it, in the job's order: targets together, but for each that takes out what static scales ruin.
    ``checkpoint``: the source as it was opened."""
    plain = tuple(target for target in job.recipe.targets if target.ruined is None)
    together = job if len(plain) == len(job.targets) else _plan(job.recipe.only(plain), checkpoint) if plain else None
    artifacts = export(together, out, progress, digests=digests, device=device) if together else []
    found = {artifact.manifest.target: (together or job, artifact) for artifact in artifacts}

    def make(again: Plan, folder: Path, like: Like | None) -> Artifact:
        require(needs(again, folder, check=False, device=device), folder)
        return export(again, folder, progress, digests=digests, device=device, like=like, keep_notes=True)[0]

    for target in job.recipe.targets:
        if target.ruined is not None:
            found[target.name] = spare(job.recipe, target, out, Passes(lambda recipe: _plan(recipe, checkpoint), make), progress)
    return [found[target.name] for target in job.recipe.targets]


def _climb_all(job: Plan, out: Path, digests: SourceDigests, progress: Progress, compared_on: Mapping[str, str], *, device: str) -> Outcome:
    """Targets without a budget together, then each that has one; what was proven of a rung before counts where it was on the same text."""
    found: dict[str, tuple[Artifact, Report]] = {}
    plain = tuple(target for target in job.recipe.targets if target.budget is None)
    if plain:
        made = convert(job.recipe.only(plain), out, device=device, progress=progress)
        found |= {target.name: pair for target, pair in zip(plain, zip(made.artifacts, made.reports, strict=True), strict=True)}

    def draft(recipe: Recipe) -> Plan:
        # Rungs differ in their rules and in no more.
        return make_plan(recipe, job.checkpoint, job.architecture, machine=this_machine())

    def make(recipe: Recipe, folder: Path, *, look: Look, like: Like | None = None) -> tuple[Plan, Artifact, Report]:
        rung = draft(recipe)
        require(needs(rung, folder, check=True, device=device), folder)
        artifact = export(rung, folder, progress, digests=digests, device=device, like=like, keep_notes=True)[0]
        known, reference = _known_report(artifact, compared_on), folder.parent / REFERENCE
        if known and (not known.brief or _tells(known, look)):
            return rung, artifact, known
        return rung, artifact, prove([artifact.path], rung.recipe, progress=progress, device=device, reference=reference, look=look)[0]

    for target in job.recipe.targets:
        if target.budget is not None:
            found[target.name] = _climb_one(job, target, out, Stages(draft, make), progress, compared_on, device=device)
    pairs = [found[target.name] for target in job.recipe.targets]
    return Outcome(job, tuple(artifact for artifact, _ in pairs), tuple(report for _, report in pairs))


def _climb_one(
    job: Plan, target: Target, out: Path, stages: Stages, progress: Progress, compared_on: Mapping[str, str], *, device: str
) -> tuple[Artifact, Report]:
    """Climbs, or finds that it was climbed: ``<target>.ladder`` beside the artifact says for which job."""
    assert target.budget is not None
    final, note = out / target.name, out / f"{target.name}.ladder"
    asked = hashlib.sha256(f"{job.digest} {target.name}".encode()).hexdigest()
    climbed = note.exists() and note.read_text().strip() == asked
    if climbed and (artifact := _whole(final)) and (report := _known_report(artifact, compared_on)):
        return artifact, report
    note.unlink(missing_ok=True)
    scratch = out / f".{target.name}.rungs"
    found = climb(job.recipe, target, scratch, stages, progress, device=device)
    artifact = settle(found.taken.artifact, final, scratch)
    report = replace(found.taken.report, ladder=found.record(target.budget))
    report_path(final).write_bytes(report.to_bytes())
    report_path(final).with_suffix(".html").write_text(render(report, artifact.manifest), encoding="utf-8")
    note.write_text(f"{asked}\n")
    return artifact, report


def _tells(brief: Report, look: Look) -> bool:
    """Whether a brief report has what such a look would find."""
    tokens = min((run.divergence.tokens for run in brief.runtimes if run.divergence), default=0)
    return 0 < look.share <= tokens / int(brief.validation["tokens"]) and (look.only or not brief.passed)


def _whole(folder: Path) -> Artifact | None:
    """The artifact in a folder, if every byte of it is there."""
    try:
        return Artifact(folder, read_manifest(folder), reused=True) if verify(folder).passed else None
    except FormatError:
        return None


def _known_report(artifact: Artifact, compared_on: Mapping[str, str]) -> Report | None:
    """The report beside an artifact, if it is about these bytes and was made on what has these hashes."""
    try:
        report = read_report(report_path(artifact.path))
    except FormatError:
        return None
    if report.manifest_sha256 != manifest_digest(artifact.path) or any(
        report.validation.get(key) != compared_on[key] for key in compared_on
    ):
        return None
    return report


def prove(
    artifacts: Sequence[Path],
    recipe: Recipe | Sequence[Recipe] | None = None,
    *,
    progress: Progress = QUIET,
    device: str = "cpu",
    reference: Path | None = None,
    look: Look = NO_LOOK,
) -> list[Report]:
    """Checks artifacts of one recipe, or of one each (default: those in their manifests), and writes reports and model cards.

    ``reference``: a folder on the artifacts' file system in which what the source computed is kept for the next check. ``look``: as of
    :func:`convert.check.check`; of an artifact with a brief report nothing else is written. Raises :class:`InputError` where artifacts are
    of other models or were proven on other text, and what the check raises.
    """
    if recipe is None:
        recipe = [recipe_of(path) for path in artifacts]
        for path, own in zip(artifacts, recipe, strict=True):
            if what := _difference(own, recipe[0]):
                raise InputError(f"{path} was made with another {what} than {artifacts[0]}; check them one by one")
        require_tasks(recipe[0])
    with writing(artifacts[0].absolute().parent):
        return _prove(artifacts, recipe, progress=progress, device=device, reference=reference, look=look)


def _prove(
    artifacts: Sequence[Path], recipe: Recipe | Sequence[Recipe], *, progress: Progress, device: str, reference: Path | None, look: Look
) -> list[Report]:
    from convert.check import check

    for path in artifacts:
        if (path / MANIFEST).read_bytes() != read_manifest(path).to_bytes():
            raise FormatError(f"{path / MANIFEST}: not as octavo wrote it, so nothing it says can be proven; make the artifact again")
    reports = []
    for path, report in zip(artifacts, check(artifacts, recipe, progress, device=device, reference=reference, look=look), strict=True):
        if report.brief:
            report_path(path).write_bytes(report.to_bytes())
            reports.append(report)
            continue
        manifest = read_manifest(path)
        card = render_card(report, manifest).encode()
        # How a budget was met is no measurement of this check's: it stays with the bytes.
        known = _known_report(Artifact(path, manifest, reused=True), {})
        report = replace(report, card_sha256=hashlib.sha256(card).hexdigest(), ladder=known.ladder if known else {})
        (path / CARD).write_bytes(card)
        report_path(path).write_bytes(report.to_bytes())
        report_path(path).with_suffix(".html").write_text(render(report, manifest), encoding="utf-8")
        reports.append(report)
    return reports


def recipe_of(artifact: Path) -> Recipe:
    """The recipe that an artifact's manifest records, with the commit its source had. Raises :class:`~formats.errors.FormatError` or
    ``RecipeError``."""
    manifest = read_manifest(artifact)
    text = json_bytes({**manifest.recipe, "model": manifest.pinned}).decode()
    return parse_recipe(text, f"{artifact}/octavo.json", name=artifact.absolute().parent.name)


def plain_bytes(target: TargetPlan) -> int:
    """What the target's tensors would take unquantized."""
    return sum(entry.plain.size_bytes for entry in target.entries)


def _plan(recipe: Recipe, checkpoint: Checkpoint) -> Plan:
    recipe = _pinned(recipe)
    checkpoint = rotate(checkpoint, recipe)
    architecture = describe(checkpoint.config, checkpoint.tensors, folder=checkpoint.folder, trust_remote_code=recipe.trust_remote_code)
    return make_plan(recipe, checkpoint, architecture, machine=this_machine())


def _pinned(recipe: Recipe) -> Recipe:
    """With the commits of datasets on the Hub, so that the same job reads the same text for as long as it is interrupted, and later."""
    changed = {}
    for name, keys in (("calibration", ("text",)), ("validation", ("text", "images"))):
        section = getattr(recipe, name)
        named = {key: said for key in keys if section is not None and (said := getattr(section, key)) not in (None, "sample")}
        pins = {key: pinned for key, said in named.items() if (pinned := pin(said)) != said}
        if pins:
            changed[name] = section.model_copy(update=pins)
    return recipe.model_copy(update=changed) if changed else recipe


def _require_all(job: Plan, out: Path, progress: Progress, *, check: bool, device: str) -> dict[str, str]:
    """Says the plan's warnings, and stops where the job could not be carried to its end. Returns the hashes of what reports are made on."""
    from convert.check import require_runtimes

    require_files(job, check=check)
    require_places(job, check=check)
    require_rungs(job)
    for target in job.recipe.targets:
        require_free(out / target.name, job.checkpoint)
        require_writable(out, target.name)
    for warning in job.warnings():
        progress.say(f"warning: {warning}")
    require(needs(job, out, check=check, device=device), out)
    compared_on = _require_comparable(job) if check else {}
    for target in job.recipe.targets if check else ():
        require_runtimes(target)
    for target in job.recipe.targets:
        # The first passes of these may read none of the text, and take hours.
        read = [job] if (target.budget or target.ruined) and reads_calibration(target) else []
        read += [measured_on(job, tokens=target.budget.tokens)] if target.budget and "mixed" in (target.ladder or LADDER) else []
        for reader in read:
            with tempfile.TemporaryDirectory(prefix="octavo-text-") as scratch:
                calibration_tokens(reader, Path(scratch))
    return compared_on


def _require_comparable(job: Plan) -> dict[str, str]:
    """Reads what source and artifacts are compared on, once, and forgets it but for its hashes. Raises :class:`InputError` where there is
    nothing to compare, or nothing to compare it on."""
    architecture, validation, trust = job.architecture, job.recipe.validation, job.recipe.trust_remote_code
    if architecture is None:
        raise InputError(
            f"{job.checkpoint.origin}: transformers does not know its architecture, so nothing can run it to compare; "
            "convert it with --no-check"
        )
    reads = architecture.reads
    if reads not in ("input_ids", "pixel_values") or (reads == "pixel_values" and validation.images is None):
        remedy = "convert it with --no-check, and compare it on data of yours"
        if reads == "pixel_values":
            remedy = "set validation.images to a folder of pictures or a dataset on the Hub, or convert it with --no-check"
        raise InputError(f"{job.checkpoint.origin} reads {reads}, and the check has nothing but text to give it; {remedy}")
    for key in ("prompts", "tasks"):
        if getattr(validation, key) and not job.predicts:
            nothing = {"prompts": "it answers nothing", "tasks": "it has no score in them"}[key]
            raise InputError(f"{job.recipe.where('validation', key)}: {job.checkpoint.origin} predicts no tokens, so {nothing}")
    with tempfile.TemporaryDirectory(prefix="octavo-text-") as scratch:
        folder = source_sidecars(job, Path(scratch))
        if reads == "pixel_values":
            _, record = take_pictures(validation, load_processor(folder, trust_remote_code=trust))
        else:
            tokenizer = load_tokenizer(folder, trust_remote_code=trust, of=job.checkpoint.origin)
            tokens, record = take_held_out(validation, tokenizer)
            require_known(job, int(tokens.max()))
    if validation.prompts is not None:
        questions = read_questions(path := Path(validation.prompts))
        encode(questions, tokenizer)
        record |= describe_questions(path, questions)
    return {key: record[key] for key in ("tokens_sha256", "prompts_sha256") if key in record}
