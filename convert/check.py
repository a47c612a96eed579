"""Proves artifacts: promises, numbers and runtimes, each in a process of its own, against the limits of the recipe."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from convert.divergence import compare_logits
from convert.progress import Progress
from convert.recipe import Recipe, Target, Validation
from convert.report import Check, Divergence, LayerNumbers, Report, RuntimeResult, at_least, at_most, holds, manifest_digest
from convert.runtimes import RUNTIMES
from formats.dtypes import DTYPES
from formats.errors import InputError, MachineError, OctavoError
from formats.manifest import Manifest, read_manifest
from formats.scheme import SCHEMES, Quality

NEW_TOKENS = 32
QUESTION = "What is the capital of France?"
TEXTS = Path(__file__).parent / "texts"

#: A continuation in which one token makes up this share, and does not in the source's, is degenerate.
REPEATED_SHARE = 0.8


@dataclass(frozen=True)
class _Text:
    """Held-out tokens (sequences, length), what they were made of, and a prompt to continue."""

    tokens: np.ndarray
    record: dict[str, Any]
    prompt: str
    prompt_ids: list[int]
    tokenizer: Any


def require_runtimes(target: Target) -> None:
    """Raises :class:`MachineError` when a runtime that the target names is not here: an unproven artifact cannot pass."""
    for name in target.runtimes:
        for distribution in RUNTIMES[name].needs:
            try:
                version(distribution)
            except PackageNotFoundError:
                raise MachineError(
                    f"{target.name}: runtime {name} needs {distribution}, which is not installed; run: pip install {distribution}"
                ) from None


def check(artifacts: Sequence[Path], recipe: Recipe, progress: Progress, *, device: str = "cpu") -> list[Report]:
    """Proves artifacts that were made by ``recipe``, in the order given.

    The source runs once for all of them. Raises :class:`InputError` when the text is too short or the model has no
    tokenizer, :class:`MachineError` when the source does not fit in memory; a runtime that fails is a failed check, not an error.
    """
    manifests = [read_manifest(path) for path in artifacts]
    model = _pinned(manifests[0])
    with tempfile.TemporaryDirectory(prefix=".check-", dir=artifacts[0].parent) as scratch_name:
        scratch = Path(scratch_name)
        text = _validation_text(recipe.validation, artifacts[0], trust_remote_code=recipe.trust_remote_code)
        np.save(scratch / "tokens.npy", text.tokens)
        progress.say(f"running the source on {text.tokens.size:,} held-out tokens")
        request = _request(recipe, scratch, text, device)
        dtype = "auto" if recipe.validation.reference == "source" else recipe.validation.reference
        source = {**request, "artifact": str(artifacts[0]), "model": model, "dtype": dtype, "logits": str(scratch / "source.f32")}
        answer, failure = _run("convert.runtimes.source", source, scratch)
        if answer is None:
            raise MachineError(f"{model}: the source could not be run for comparison: {failure}")
        reference = _result("source", answer, text, None)
        reports = []
        for path, manifest in zip(artifacts, manifests, strict=True):
            target = next(item for item in recipe.targets if item.name == manifest.target)
            reports.append(
                _check_one(path, manifest, recipe, target, model, request, text, reference, int(answer["vocabulary"]), scratch, progress)
            )
        return reports


def _check_one(
    path: Path,
    manifest: Manifest,
    recipe: Recipe,
    target: Target,
    model: str,
    request: dict[str, Any],
    text: _Text,
    reference: RuntimeResult,
    vocabulary: int,
    scratch: Path,
    progress: Progress,
) -> Report:
    progress.say(f"{target.name}: checking promises and numbers")
    checks = [_check_promises(path)]
    layers, found = _check_numbers(path, model, request, scratch)
    checks += found
    results = []
    for name in target.runtimes:
        progress.say(f"{target.name}: running it in {name}")
        runtime_request = {**request, "artifact": str(path), "dtype": "auto", "logits": str(scratch / "artifact.f32")}
        answer, failure = _run(RUNTIMES[name].program, runtime_request, scratch)
        checks.append(holds(f"{name}: loads and runs", answer is not None, failure))
        if answer is None:
            continue
        try:
            divergence = compare_logits(scratch / "source.f32", scratch / "artifact.f32", text.tokens, vocabulary)
        except OctavoError as error:
            checks.append(holds(f"{name}: finite logits", False, str(error)))
            continue
        result = _result(name, answer, text, divergence)
        results.append(result)
        checks.append(_check_modules(name, manifest, answer["module_dtypes"]))
        checks += _check_quality(name, divergence, target.bounds())
        checks.append(_check_continuation(name, answer["generated"], reference, result))
    return Report(
        recipe=recipe.name,
        target=target.name,
        manifest_sha256=manifest_digest(path),
        checks=tuple(checks),
        layers=tuple(layers),
        source=reference,
        runtimes=tuple(results),
        validation=text.record,
        prompt=text.prompt,
    )


def _check_promises(path: Path) -> Check:
    done = subprocess.run([sys.executable, "-m", "formats.verify", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return at_most("promises", math.inf, 0, "broken", _last_lines(done.stderr))
    findings = json.loads(done.stdout)["findings"]
    detail = "; ".join(f"{item['where']}: {item['what']}" for item in findings[:3])
    return at_most("promises", len(findings), 0, "broken", detail or "files, hashes, ledger and config agree")


def _check_numbers(path: Path, model: str, request: dict[str, Any], scratch: Path) -> tuple[list[LayerNumbers], list[Check]]:
    name = "numbers: largest error / bound"
    answer, failure = _run("convert.numbers", {**request, "artifact": str(path), "model": model}, scratch)
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


def _check_modules(runtime: str, manifest: Manifest, dtypes: dict[str, str]) -> Check:
    """That every module the ledger quantized is held in eight bits after loading, and not as a float."""
    promised = {
        entry["module"]: DTYPES[SCHEMES[entry["scheme"]].weight.grid.dtype].torch_name
        for entry in manifest.ledger
        if entry["decision"] == "quantize"
    }
    wrong = [f"{module} is {dtypes.get(module, 'absent')}" for module, dtype in promised.items() if dtypes.get(module) != dtype]
    return at_least(f"{runtime}: modules in 8 bit", len(promised) - len(wrong), len(promised), "modules", "; ".join(wrong[:3]))


def _check_quality(runtime: str, found: Divergence, bounds: Quality) -> list[Check]:
    finite = math.isfinite(found.kl_nats) and math.isfinite(found.perplexity)
    tail = f"99th percentile {found.kl_nats_p99:.4f}" if finite else ""
    perplexities = f"{found.perplexity:.3f} against {found.source_perplexity:.3f}"
    return [
        holds(f"{runtime}: finite logits", finite),
        at_most(f"{runtime}: kl_nats", found.kl_nats, bounds.kl_nats, "nats", tail),
        at_least(f"{runtime}: top1", found.top1, bounds.top1, "share"),
        at_most(f"{runtime}: perplexity_ratio", found.perplexity_ratio, bounds.perplexity_ratio, "ratio", perplexities),
    ]


def _check_continuation(runtime: str, generated: list[int], reference: RuntimeResult, result: RuntimeResult) -> Check:
    """That greedy decoding does not end in one repeated token where the source's does not."""
    share = _repeated_share(generated)
    degenerate = len(generated) >= 8 and share > REPEATED_SHARE and result.continuation != reference.continuation
    detail = f"one token makes up {share:.0%} of {result.continuation.strip()[:120]!r}"
    return holds(f"{runtime}: continuation not degenerate", not degenerate, detail)


def _repeated_share(tokens: list[int]) -> float:
    return max(Counter(tokens).values()) / len(tokens) if tokens else 0.0


def _validation_text(validation: Validation, artifact: Path, *, trust_remote_code: bool) -> _Text:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(artifact), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001  tokenizers fail in as many ways as there are tokenizers
        raise InputError(f"{artifact}: its tokenizer cannot be loaded, so there is nothing to compare on ({error})") from None
    text, name = _read_text(validation.text)
    start = (
        [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
    )
    body = validation.length - len(start)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    sequences = validation.tokens // validation.length
    if len(ids) < sequences * body:
        raise InputError(
            f"validation text {name}: {len(ids):,} tokens, {sequences * body:,} are needed; give a longer text or fewer validation.tokens"
        )
    tokens = np.array([[*start, *ids[i * body : (i + 1) * body]] for i in range(sequences)], dtype=np.int64)
    prompt, prompt_ids = QUESTION, tokenizer(QUESTION).input_ids
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": QUESTION}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    record = {
        "text": name,
        "reference": validation.reference,
        "tokens": int(tokens.size),
        "length": validation.length,
        "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    return _Text(tokens, record, prompt, list(prompt_ids), tokenizer)


def _read_text(name: str) -> tuple[str, str]:
    if name == "sample":
        return (TEXTS / "validation.txt").read_text(encoding="utf-8"), "Moby-Dick (sample)"
    path = Path(name)
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            content = "\n\n".join(str(json.loads(line)["text"]) for line in content.splitlines() if line.strip())
    except OSError as error:
        raise InputError(f"validation text {name}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'validation text {name}: each line must be a JSON object with a "text" ({error})') from None
    return content, path.name


def _request(recipe: Recipe, scratch: Path, text: _Text, device: str) -> dict[str, Any]:
    return {
        "tokens": str(scratch / "tokens.npy"),
        "prompt": text.prompt_ids,
        "new_tokens": NEW_TOKENS,
        "device": device,
        "threads": len(os.sched_getaffinity(0)),
        "trust_remote_code": recipe.trust_remote_code,
    }


def _run(program: str, request: dict[str, Any], scratch: Path) -> tuple[dict[str, Any] | None, str]:
    """A program's answer, or None and why there is none."""
    (scratch / "request.json").write_text(json.dumps(request))
    answer = scratch / "answer.json"
    answer.unlink(missing_ok=True)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", program, str(scratch / "request.json"), str(answer)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode == 0 and answer.exists():
        return json.loads(answer.read_text()), ""
    if done.returncode < 0:
        return None, f"it was killed by signal {-done.returncode}" + (", most likely for want of memory" if done.returncode == -9 else "")
    return None, _last_lines(done.stderr)


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return " ".join(lines[-2:])[-600:] or "it said nothing"


def _result(name: str, answer: dict[str, Any], text: _Text, divergence: Divergence | None) -> RuntimeResult:
    return RuntimeResult(
        name=name,
        versions=answer["versions"],
        device=answer["device"],
        weight_bytes=answer["weight_bytes"],
        peak_bytes=answer["peak_bytes"],
        load_seconds=answer["load_seconds"],
        prefill_tokens_per_second=answer["prefill_tokens_per_second"],
        decode_tokens_per_second=answer["decode_tokens_per_second"],
        continuation=text.tokenizer.decode(answer["generated"], skip_special_tokens=True),
        divergence=divergence,
    )


def _pinned(manifest: Manifest) -> str:
    origin, commit = manifest.source["origin"], manifest.source["commit"]
    return f"{origin}@{commit}" if commit else str(origin)
