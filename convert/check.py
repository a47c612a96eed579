"""Proves artifacts: promises, numbers and runtimes, each in a process of its own, against the limits of the recipe."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from convert import environments, tasks
from convert.ailments import REPEATED_SHARE, last_lines, repeated_share
from convert.answers import Question, describe, encode, judge, read_questions
from convert.architecture import build
from convert.child import prepare, request, run
from convert.divergence import compare_logits, compare_states
from convert.intervals import drop, undecided
from convert.lanes import WHOLE_SHARE, whole_bytes
from convert.leash import leashed
from convert.pictures import load_processor, take_pictures
from convert.progress import Progress
from convert.recipe import Recipe, Target
from convert.report import (
    NO_LOOK,
    Check,
    Divergence,
    Drift,
    LayerNumbers,
    Look,
    Report,
    RuntimeResult,
    at_least,
    at_most,
    holds,
    manifest_digest,
)
from convert.runtimes import HARNESSED, RUNTIMES
from convert.source import Checkpoint, open_source
from convert.text import load_tokenizer, take_held_out
from formats.dtypes import DTYPES, FLOATS
from formats.errors import MachineError, OctavoError
from formats.manifest import Manifest, read_manifest
from formats.scheme import SCHEMES, Quality
from formats.tensors import GRAPHS

NEW_TOKENS = 32
#: Tokens of a first look, at least: eight of the blocks that intervals are drawn from.
LOOK_TOKENS = 512
SCRATCH = ".check-"
SOURCE_VALUES = "source.f32"
#: A folder of another check may be so young that it is not locked yet.
NEWBORN_SECONDS = 60.0
QUESTION = "What is the capital of France?"
#: Passages of the held-out text that are continued beside the question, and how many tokens of each are given.
PASSAGES, PASSAGE_TOKENS = 2, 40


@dataclass(frozen=True)
class _Text:
    """Held-out tokens (sequences, length), what they were made of, a prompt to continue, ``templated`` where it went through the chat
    template, which writes special tokens itself, the user's own questions with theirs, how many tokens answer them, and passages of the
    held-out text. Or pictures (pictures, channels, height, width), and nothing of words."""

    tokens: np.ndarray
    record: dict[str, Any]
    prompt: str
    prompt_ids: list[int]
    templated: bool
    tokenizer: Any
    questions: Sequence[Question]
    question_ids: list[list[int]]
    answer_tokens: int
    passage_ids: list[list[int]]

    def written(self, answer: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Of a program's answer: what it says to the questions, and after the passages; of neither where it did not write all of them."""
        ids, count = answer.get("answers", []), len(self.questions)
        if len(ids) != count + len(self.passage_ids):
            return [], []
        # Greedily written, fewer tokens are the beginning of more.
        return [self.decode(item[: self.answer_tokens]) for item in ids[:count]], [self.decode(item[:NEW_TOKENS]) for item in ids[count:]]

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


@dataclass(frozen=True)
class _Source:
    """What every artifact is compared with. ``asked``: what every program is asked; ``answer``: what the source's program said to it;
    ``result``: the same for the report. Its logits or hidden states lie in ``scratch``, where programs write theirs."""

    model: str
    text: _Text
    asked: dict[str, Any]
    answer: dict[str, Any]
    result: RuntimeResult
    scratch: Path

    @property
    def predicts(self) -> bool:
        """Whether the model predicts tokens."""
        return bool(self.answer["predicts"])

    @property
    def values(self) -> Path:
        """Its logits, or its hidden states, float32."""
        return self.scratch / SOURCE_VALUES


def require_runtimes(target: Target) -> None:
    """Raises :class:`MachineError` when a runtime that the target names is not here: an unproven artifact cannot pass."""
    for name in target.runtimes:
        runtime = RUNTIMES[name]
        if runtime.environment:
            try:
                environments.require(name)
            except MachineError as error:
                raise MachineError(f"{target.name}: {error}") from None
        for distribution in (*runtime.needs, *runtime.formats[target.format]):
            try:
                version(distribution)
            except PackageNotFoundError:
                raise MachineError(
                    f"{target.name}: runtime {name} needs {distribution} to load {target.format}, and it is not installed; "
                    f"run: pip install {distribution}"
                ) from None


def check(
    artifacts: Sequence[Path],
    recipes: Recipe | Sequence[Recipe],
    progress: Progress,
    *,
    device: str = "cpu",
    reference: Path | None = None,
    look: Look = NO_LOOK,
) -> list[Report]:
    """Proves artifacts, in the order given, that were made by one recipe, or each by its own: these have the same model and the same
    ``validation``.

    The source runs once for all of them; with ``reference``, a folder, once for all checks that are given it and ask the same. ``look``:
    on which tokens an artifact is looked at first; if that shows that it misses a limit, or is all there is to be, its report is a brief
    one. Raises :class:`InputError` when the text is too short or the model has no tokenizer, :class:`MachineError` when the source does not
    fit in memory; a runtime that fails is a failed check, not an error.
    """
    prepare(device)
    recipes = [recipes] * len(artifacts) if isinstance(recipes, Recipe) else list(recipes)
    manifests = [read_manifest(path) for path in artifacts]
    with _scratch(artifacts[0].parent) as scratch:
        source = _run_source(artifacts[0], manifests[0].pinned, recipes[0], scratch, progress, device=device, kept=reference)
        reports = []
        for path, manifest, recipe in zip(artifacts, manifests, recipes, strict=True):
            target = recipe.target(manifest.target)
            brief = _look(path, recipe, target, source, progress, look) if look.share and source.predicts else None
            reports.append(brief or _check_one(path, manifest, recipe, target, source, progress))
        return reports


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for logits in ``folder`` that goes again, and with it those of checks that were killed: one in use is locked."""
    for old in folder.glob(f"{SCRATCH}*"):
        with suppress(OSError), _locked(old):
            if time.time() - old.stat().st_mtime > NEWBORN_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as name, _locked(Path(name)):
        yield Path(name)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _run_source(
    artifact: Path, model: str, recipe: Recipe, scratch: Path, progress: Progress, *, device: str, kept: Path | None
) -> _Source:
    """Runs the source, with the tokenizer or the processor of an artifact made of it; ``kept``: where it looks for what it said before."""
    checkpoint = open_source(model, trust_remote_code=recipe.trust_remote_code)
    text = _pictures(recipe, artifact) if _sees(checkpoint, recipe) else _held_out(recipe, artifact, progress)
    np.save(scratch / "tokens.npy", text.tokens)
    progress.say(f"running the source on {text.record['tokens']:,} held-out {text.record.get('unit', 'tokens')}")
    dtype = "auto" if recipe.validation.reference == "source" else recipe.validation.reference
    asked = {
        **request(recipe, scratch, device=device),
        "prompt": text.prompt_ids,
        "text": text.prompt,
        "special_tokens": not text.templated,
        "new_tokens": NEW_TOKENS,
        "prompts": [*text.question_ids, *text.passage_ids],
        "answer_tokens": max(recipe.validation.answer_tokens, NEW_TOKENS),
    }
    asked_source = {
        **asked,
        "artifact": str(artifact),
        "model": model,
        "dtype": dtype,
        "logits": str(scratch / SOURCE_VALUES),
        "blocks": _by_blocks(checkpoint, model, recipe, progress, wide=dtype == "float32"),
    }
    answer, failure = _run_once("convert.runtimes.source", asked_source, scratch, kept)
    if answer is None:
        raise MachineError(f"{model}: the source could not be run for comparison: {failure}")
    result = _result("source", answer, text, None)
    if answer.get("written"):
        text.record["written"] = "what is read, behind the token that the decoder begins with"
    if recipe.validation.tasks:
        names = ", ".join(task.name for task in recipe.validation.tasks)
        progress.say(f"running the source on {names} of lm-evaluation-harness")
        scored, failure = _run_once(tasks.PROGRAM, _task_request(asked_source, recipe, artifact, "source"), scratch, kept)
        if scored is None or "error" in scored:
            raise MachineError(f"{model}: the source could not be run on {names}: {scored['error'] if scored else failure}")
        result = replace(result, tasks=tasks.score(scored))
        text.record.update(tasks.describe(scored))
        answer["tasks"] = scored
    return _Source(model, text, {**asked, "predicts": answer["predicts"]}, answer, result, scratch)


def _by_blocks(checkpoint: Checkpoint, model: str, recipe: Recipe, progress: Progress, *, wide: bool) -> bool:
    """Whether the source does not fit into memory as a whole. Raises :class:`MachineError` where it has to."""
    whole = whole_bytes(checkpoint, wide=wide)
    if whole <= WHOLE_SHARE * psutil.virtual_memory().available:
        return False
    whole_ones = [name for name in ("prompts", "tasks") if getattr(recipe.validation, name)]
    if whole_ones:
        raise MachineError(
            f"{model}: {whole / 1e9:.1f} GB of memory are needed for the source to answer validation.{whole_ones[0]}, and are not "
            f"free; set validation.reference: source, leave the {whole_ones[0]} out, or run octavo check on a larger machine"
        )
    progress.say(f"the source takes {whole / 1e9:.1f} GB, more than is free: it runs block by block")
    return True


def _task_request(asked: dict[str, Any], recipe: Recipe, artifact: Path, program: str) -> dict[str, Any]:
    """What the harness is asked, beside what the program that loads the model is."""
    kept = {key: value for key, value in asked.items() if key not in ("logits", "prompts")}
    return {**kept, "program": program, "tokenizer": str(artifact), "tasks": tasks.asked(recipe)}


def _run_once(program: str, asked: dict[str, Any], scratch: Path, kept: Path | None) -> tuple[dict[str, Any] | None, str]:
    """The source's answer, with its logits, if it writes them, in ``scratch``: those in ``kept`` where the same was asked before of the
    same tokens."""
    if kept is None:
        return run(program, asked, scratch)
    # What differs from check to check: where things lie, and whose tokenizer was used.
    facts = {key: value for key, value in asked.items() if key not in ("artifact", "tokenizer", "tokens", "logits")}
    digest = hashlib.sha256(json.dumps([program, facts], sort_keys=True).encode() + Path(asked["tokens"]).read_bytes()).hexdigest()
    told, logits = kept / f"{digest}.json", kept / f"{digest}.f32"
    if told.exists():
        if "logits" in asked:
            os.link(logits, asked["logits"])
        return json.loads(told.read_text()), ""
    answer, failure = run(program, asked, scratch)
    if answer is not None:
        kept.mkdir(parents=True, exist_ok=True)
        if "logits" in asked:
            logits.unlink(missing_ok=True)
            os.link(asked["logits"], logits)
        told.write_text(json.dumps(answer))
    return answer, failure


def _modes(target: Target) -> Iterator[tuple[str, str, str]]:
    """Every runtime of a target in every mode: (runtime, mode, what a report calls the two)."""
    for runtime in target.runtimes:
        for mode in RUNTIMES[runtime].modes:
            yield runtime, mode, f"{runtime} {mode}".strip()


def _run_artifact(path: Path, runtime: str, asked: dict[str, Any], scratch: Path) -> tuple[dict[str, Any] | None, str]:
    """What a runtime's program says of an artifact, or None and why there is no answer."""
    environment = environments.require(runtime) if RUNTIMES[runtime].environment else None
    return run(RUNTIMES[runtime].program, {**asked, "artifact": str(path), "dtype": "auto"}, scratch, environment=environment)


def _check_one(path: Path, manifest: Manifest, recipe: Recipe, target: Target, source: _Source, progress: Progress) -> Report:
    """The report of one artifact: its promises, its numbers, and each of its runtimes."""
    progress.say(f"{target.name}: checking promises and numbers")
    layers, of_numbers = _check_numbers(path, source.model, source.asked, source.scratch)
    checks, results = [_check_promises(path), *of_numbers], []
    for runtime, mode, name in _modes(target):
        progress.say(f"{target.name}: running it in {name}")
        found, result = _check_runtime(path, manifest, recipe, target, source, progress, runtime=runtime, mode=mode, name=name)
        checks += found
        results += [result] if result else []
    return Report(
        recipe=recipe.name,
        target=target.name,
        manifest_sha256=manifest_digest(path),
        checks=tuple(checks),
        layers=tuple(layers),
        source=source.result,
        runtimes=tuple(results),
        validation=source.text.record,
        prompt=source.text.prompt,
        passages=tuple(source.text.decode(ids) for ids in source.text.passage_ids),
        health=(manifest.calibration or {}).get("health", {}),
    )


def _check_runtime(
    path: Path,
    manifest: Manifest,
    recipe: Recipe,
    target: Target,
    source: _Source,
    progress: Progress,
    *,
    runtime: str,
    mode: str,
    name: str,
) -> tuple[list[Check], RuntimeResult | None]:
    """What one runtime makes of an artifact; no result where it does not run, or gives what is not finite."""
    text, values = source.text, source.scratch / "artifact.f32"
    asked = {**source.asked, "logits": str(values), "mode": mode}
    answer, failure = _run_artifact(path, runtime, asked, source.scratch)
    if answer is not None and "session" in answer:
        name = f"{name} ({answer['session']})"
    checks = [holds(f"{name}: loads and runs", answer is not None, failure)]
    if answer is None:
        return checks, None
    checks += [at_most(f"{name}: {what}", value, limit, "share") for what, (value, limit) in answer.get("checks", {}).items()]
    try:
        found = _compare(source, values)
    except OctavoError as error:
        return [*checks, holds(f"{name}: finite {'logits' if source.predicts else 'hidden states'}", False, str(error))], None
    result = _result(name, answer, text, found)
    if recipe.validation.tasks and runtime in HARNESSED:
        names = ", ".join(task.name for task in recipe.validation.tasks)
        progress.say(f"{target.name}: running it in {name} on {names} of lm-evaluation-harness")
        of_artifact = {**asked, "artifact": str(path), "dtype": "auto"}
        scored, failure = run(tasks.PROGRAM, _task_request(of_artifact, recipe, path, runtime), source.scratch)
        failure = scored["error"] if scored and "error" in scored else failure
        checks.append(holds(f"{name}: tasks run", not failure, failure))
        if scored and not failure:
            result = replace(result, tasks=tasks.score(scored, source.answer["tasks"]))
            checks += _check_recovery(name, result, recipe, target.limits.recovery)
    if "module_dtypes" in answer:
        checks.append(_check_modules(name, runtime, manifest, answer["module_dtypes"], dequantized=answer.get("dequantized", False)))
    if target.kv_cache and "cache_dtype" in answer:
        checks.append(_check_cache(name, manifest, answer))
    if isinstance(found, Drift):
        return [*checks, *_check_drift(name, found, target.bounds())], result
    checks += _check_quality(name, found, target.bounds())
    checks.append(_check_continuation(name, answer["generated"], source.answer["generated"], result))
    if text.questions and target.limits.answers is not None:
        checks.append(_check_answers(name, result, source.result, answer, text, target.limits.answers))
    return checks, result


def _compare(source: _Source, values: Path) -> Divergence | Drift:
    """How far an artifact's logits or hidden states lie from the source's. Raises :class:`OctavoError` where they are not finite."""
    width = int(source.answer["vocabulary"])
    if source.predicts:
        return compare_logits(source.values, values, source.text.tokens, width)
    return compare_states(source.values, values, width, classes=source.answer.get("classes", False))


def _look(path: Path, recipe: Recipe, target: Target, source: _Source, progress: Progress, look: Look) -> Report | None:
    """A brief report, if on the first tokens an artifact misses a limit of quality, or if no more is wanted. Else None, as where it does
    not run, of which the check says why."""
    text, scratch, values = source.text, source.scratch, source.scratch / "few.f32"
    sequences, length = text.tokens.shape
    count = min(max(math.ceil(look.share * sequences), math.ceil(LOOK_TOKENS / length)), sequences)
    few = replace(text, tokens=text.tokens[:count], questions=(), question_ids=[], passage_ids=[])
    np.save(scratch / "few.npy", few.tokens)
    of_few = {**source.asked, "tokens": str(scratch / "few.npy"), "new_tokens": 1, "prompts": [], "answer_tokens": 1, "logits": str(values)}
    checks, results = [], []
    for runtime, mode, name in _modes(target):
        progress.say(f"{target.name}: looking at {few.tokens.size:,} of {text.tokens.size:,} tokens in {name}")
        answer, _ = _run_artifact(path, runtime, {**of_few, "mode": mode}, scratch)
        if answer is None:
            return None
        try:
            found = compare_logits(source.values, values, few.tokens, int(source.answer["vocabulary"]))
        except OctavoError:
            return None
        checks += _check_quality(name, found, target.bounds())
        results.append(replace(_result(name, answer, few, found), continuation="", decode_tokens_per_second=0.0))
    if not look.only and all(check.passed for check in checks):
        return None
    said = f"on the first {few.tokens.size:,} of {text.tokens.size:,} tokens; nothing else was checked"
    return Report(
        recipe=recipe.name,
        target=target.name,
        manifest_sha256=manifest_digest(path),
        checks=tuple(replace(check, detail="; ".join(filter(None, (said, check.detail)))) for check in checks),
        layers=(),
        source=source.result,
        runtimes=tuple(results),
        validation=text.record,
        prompt=text.prompt,
        brief=True,
    )


def _check_promises(path: Path) -> Check:
    done = subprocess.run(leashed([sys.executable, "-m", "formats.verify", str(path)]), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return at_most("promises", math.inf, 0, "broken", last_lines(done.stderr))
    findings = [item for item in json.loads(done.stdout)["findings"] if item["severity"] == "error"]
    detail = "; ".join(f"{item['where']}: {item['what']}" for item in findings[:3])
    return at_most("promises", len(findings), 0, "broken", detail or "files, hashes, ledger and config agree")


def _check_numbers(path: Path, model: str, asked: dict[str, Any], scratch: Path) -> tuple[list[LayerNumbers], list[Check]]:
    name = "numbers: largest error / bound"
    answer, failure = run("convert.numbers", {**asked, "artifact": str(path), "model": model}, scratch)
    if answer is None:
        return [], [at_most(name, math.nan, 1, "ratio", failure)]
    layers = [LayerNumbers(**item) for item in answer["layers"]]
    if not layers:
        return [], []
    by_error = sorted(layers, key=lambda layer: (-layer.worst, layer.snr_db))
    over = [f"{layer.tensor} {layer.worst:.3g}" for layer in by_error if not layer.worst <= 1]
    weakest = [f"{layer.tensor} {layer.snr_db:.1f} dB" for layer in sorted(layers, key=lambda layer: layer.snr_db)]
    detail = f"beyond the bound: {', '.join(over[:5])}" if over else f"lowest signal to noise: {', '.join(weakest[:5])}"
    return layers, [at_most(name, by_error[0].worst, 1, "ratio", detail)]


def _check_modules(name: str, runtime: str, manifest: Manifest, dtypes: dict[str, str], *, dequantized: bool) -> Check:
    """That every module the ledger quantized is held in the codes it was written in after loading, and not as a float; or, where the
    runtime says that it dequantizes at load, that every one is there and none of them as codes that it would take for weights. A runtime
    that merges experts has no module for each of them, and is said to make floats of them."""
    promised = {}
    merged = 0
    for entry in manifest.ledger:
        if entry["decision"] != "quantize":
            continue
        for stored, *_ in entry["parts"]:
            module = stored if "experts" in entry or manifest.format in GRAPHS else entry["module"]
            if "experts" in entry and RUNTIMES[runtime].merges is not None and module not in dtypes:
                merged += 1
                continue
            if SCHEMES[entry["scheme"]].lookup and RUNTIMES[runtime].products_only:
                continue
            names = (f"{stored}.weight", f"{stored}.weight_packed", f"{stored}._weight_qdata")
            promised[module] = DTYPES[next(dtype for name, dtype, _ in entry["outputs"] if name in names)].torch_name
    if dequantized:
        floats = {DTYPES[name].torch_name for name in FLOATS}
        left = [f"{module} is {dtypes.get(module, 'absent')}" for module in promised if dtypes.get(module) not in floats]
        detail = "; ".join(left[:3]) or "it decodes them while it loads: nothing is held or multiplied in 8 bit here"
        return at_least(f"{name}: modules dequantized at load", len(promised) - len(left), len(promised), "modules", detail)
    wrong = [f"{module} is {dtypes.get(module, 'absent')}" for module, dtype in promised.items() if dtypes.get(module) != dtype]
    said = [*wrong[:3], *([f"{merged} layers of experts are floats there"] if merged else [])]
    return at_least(f"{name}: modules in 8 bit", len(promised) - len(wrong), len(promised), "modules", "; ".join(said))


def _check_cache(runtime: str, manifest: Manifest, answer: dict[str, Any]) -> Check:
    """That the runtime keeps keys and values in eight bits, with the scales that were written for them."""
    written = sum(name.endswith(".k_scale") for entry in manifest.ledger for name, _, _ in entry["outputs"])
    found = answer["cache_scales"] if answer["cache_dtype"].startswith("fp8") else 0
    return at_least(f"{runtime}: layers with an 8-bit cache", found, written, "layers", f"its cache is {answer['cache_dtype']}")


def _check_quality(runtime: str, found: Divergence, bounds: Quality) -> list[Check]:
    finite = math.isfinite(found.kl_nats) and math.isfinite(found.perplexity)
    tail = f"99th percentile {found.kl_nats_p99:.4f}" if finite else ""
    perplexities = f"{found.perplexity:.3f} against {found.source_perplexity:.3f}"
    ratio = found.perplexity_ratio
    measured = [
        at_most(f"{runtime}: kl_nats", found.kl_nats, bounds.kl_nats, "nats", tail, found.kl_interval),
        at_least(f"{runtime}: top1", found.top1, bounds.top1, "share", interval=found.top1_interval),
        at_most(f"{runtime}: perplexity_ratio", ratio, bounds.perplexity_ratio, "ratio", perplexities, found.ratio_interval),
    ]
    return [holds(f"{runtime}: finite logits", finite), *(_with_doubt(check, found.tokens, "tokens") for check in measured)]


def _with_doubt(check: Check, sample: int, what: str) -> Check:
    """With a word where the sample is too small to tell."""
    doubt = undecided(check, sample, what)
    return replace(check, detail="; ".join(filter(None, (doubt, check.detail)))) if doubt else check


def _check_drift(runtime: str, found: Drift, bounds: Quality) -> list[Check]:
    detail = f"mean cosine {found.cosine:.5f}"
    if found.top1 is not None:
        detail += f"; the same class for {found.top1:.1%}, {found.kl_nats:.5f} nats between the distributions of classes"
    return [
        holds(f"{runtime}: finite hidden states", math.isfinite(found.relative_error)),
        at_most(f"{runtime}: relative_error", found.relative_error, bounds.relative_error, "share", detail),
    ]


def _check_continuation(runtime: str, generated: list[int], expected: list[int], result: RuntimeResult) -> Check:
    """That greedy decoding does not end in one repeated token where the source's does not."""
    share = repeated_share(generated)
    degenerate = len(generated) >= 8 and share > REPEATED_SHARE >= repeated_share(expected)
    detail = f"one token makes up {share:.0%} of {result.continuation.strip()[:120]!r}"
    return holds(f"{runtime}: continuation not degenerate", not degenerate, detail)


def _check_answers(
    runtime: str, result: RuntimeResult, reference: RuntimeResult, answer: dict[str, Any], text: _Text, limit: float
) -> Check:
    """That not many more of the user's prompts are answered wrong than by the source."""
    name, asked = f"{runtime}: answers", len(text.questions)
    if result.answers is None or reference.answers is None:
        return at_most(name, math.nan, limit, "share", f"{runtime} did not continue all {asked} prompts")
    pairs = list(zip(reference.answers.right, result.answers.right, strict=True))
    lost = [i for i, (before, after) in enumerate(pairs) if before and not after]
    gained = sum(after and not before for before, after in pairs)
    written, _ = text.written(answer)
    said = [f"line {text.questions[i].line}: {written[i].strip()[:60]!r}" for i in lost[:3]]
    detail = f"right {sum(result.answers.right)} of {asked}, the source {sum(reference.answers.right)}; lost {len(lost)}, won {gained}"
    value, interval = reference.answers.share - result.answers.share, drop(asked, len(lost), gained)
    return _with_doubt(at_most(name, value, limit, "share less", "; ".join([detail, *said]), interval), asked, "prompts")


def _check_recovery(runtime: str, result: RuntimeResult, recipe: Recipe, limit: float | None) -> list[Check]:
    """That of each task enough of the source's score is left, if there is a limit; of a group without a score of its own, in each part."""
    if limit is None:
        return []
    found = []
    for task in recipe.validation.tasks:
        worst = tasks.lowest(result.tasks, task.name)
        detail = f"{worst.name}: {worst.metric} {worst.score:.4g} over {worst.documents:,} documents"
        share = math.nan if worst.recovery is None else worst.recovery
        check = at_least(f"{runtime}: recovery of {task.name}", share, limit, "of the source", detail, worst.recovery_interval)
        found.append(_with_doubt(check, worst.documents, "documents"))
    return found


def _sees(checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Whether the model reads pictures, and there are some for it."""
    if recipe.validation.images is None:
        return False
    model = build(checkpoint.config, folder=checkpoint.folder, trust_remote_code=recipe.trust_remote_code)
    return model is not None and model.main_input_name == "pixel_values"


def _pictures(recipe: Recipe, artifact: Path) -> _Text:
    processor = load_processor(artifact, trust_remote_code=recipe.trust_remote_code)
    pictures, record = take_pictures(recipe.validation, processor)
    return _Text(pictures, record | {"reference": recipe.validation.reference}, "", [], False, None, [], [], 0, [])


def _asked(tokenizer: Any, progress: Progress) -> tuple[str, list[int], bool]:
    """The question that every program continues, its tokens, and whether it went through the chat template."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": QUESTION}]
        try:
            prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            return prompt, list(tokenizer(prompt, add_special_tokens=False).input_ids), True
        except Exception as error:  # noqa: BLE001  a template is code of the model's; some want more than a question
            progress.say(f"the model's chat template takes no plain question ({error}); it is asked without the template")
    return QUESTION, list(tokenizer(QUESTION).input_ids), False


def _held_out(recipe: Recipe, artifact: Path, progress: Progress) -> _Text:
    validation = recipe.validation
    tokenizer = load_tokenizer(artifact, trust_remote_code=recipe.trust_remote_code)
    tokens, record = take_held_out(validation, tokenizer)
    sequences = len(tokens)
    prompt, prompt_ids, templated = _asked(tokenizer, progress)
    path = Path(validation.prompts) if validation.prompts is not None else None
    questions = read_questions(path) if path else []
    record |= {"reference": validation.reference, **(describe(path, questions) if path else {})}
    chosen = sorted({i * sequences // PASSAGES for i in range(PASSAGES)})
    return _Text(
        tokens,
        record,
        prompt,
        prompt_ids,
        templated,
        tokenizer,
        questions,
        encode(questions, tokenizer),
        validation.answer_tokens,
        [tokens[i, : min(PASSAGE_TOKENS, validation.length // 2)].tolist() for i in chosen],
    )


def _result(name: str, answer: dict[str, Any], text: _Text, found: Divergence | Drift | None) -> RuntimeResult:
    written, passages = text.written(answer)
    return RuntimeResult(
        name=name,
        versions=answer["versions"],
        device=answer["device"],
        weight_bytes=answer["weight_bytes"],
        peak_bytes=answer["peak_bytes"],
        load_seconds=answer["load_seconds"],
        prefill_tokens_per_second=answer["prefill_tokens_per_second"],
        decode_tokens_per_second=answer["decode_tokens_per_second"],
        continuation=text.decode(answer["generated"]),
        divergence=found if isinstance(found, Divergence) else None,
        drift=found if isinstance(found, Drift) else None,
        kernels=answer.get("kernels", {}),
        answers=judge(text.questions, written) if written else None,
        passages=tuple(passages),
    )
