"""How fast ONNX Runtime decodes and reads with an INT8 graph, beside the float32 graph of the same model, in one run.

    python benchmarks/onnx_speed.py                      # the sample
    python benchmarks/onnx_speed.py --model build/benchmarks/1b

Both graphs are made by ``octavo convert``, whose time and peak memory are in the table too. Then each is loaded once, and they take turns:
a few tokens are decoded greedily with inputs and outputs bound and the cache kept as the session returns it, and 512 tokens are read at
once. What is shown is the best round of each and their ratio: on a shared machine a median says more of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from measure import ROOT, run_measured

SCHEMES = {
    "int8": "[{match: lm_head, scheme: int8-weight-only-g32}, {match: linear, scheme: int8-weight-only-g32}]",
    "w8a8": "[{match: lm_head, scheme: int8-dynamic}, {match: linear, scheme: int8-dynamic}]",
    "float32": "[{match: linear, keep: true, why: the float graph}]",
}
RECIPE = """\
model: {model}
targets:
  - {{name: {name}, format: onnx, rules: {rules}, runtimes: [onnxruntime]}}
"""


def main() -> None:
    """Converts, measures, prints one line of JSON a graph and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:smollm2-135m-instruct")
    parser.add_argument("--schemes", nargs="+", default=["float32", "int8"], choices=list(SCHEMES))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workdir", type=Path, default=ROOT / "build/benchmarks/onnx")
    arguments = parser.parse_args()
    graphs = {name: convert(name, arguments.model, arguments.workdir) for name in arguments.schemes}
    found = measure(graphs, arguments.tokens, arguments.rounds, arguments.threads)
    first = found[arguments.schemes[0]]
    for name, row in found.items():
        print(json.dumps({"graph": name, **row, **{f"{key} ratio": row[key] / first[key] for key in ("decode", "read_512")}}))


def convert(name: str, model: str, workdir: Path) -> Path:
    """The folder of an artifact; what making it took is printed."""
    workdir.mkdir(parents=True, exist_ok=True)
    recipe = workdir / f"{name}.yaml"
    recipe.write_text(RECIPE.format(model=model, name=name, rules=SCHEMES[name]))
    out = workdir / Path(model.replace(":", "-")).name
    usage = run_measured([sys.executable, "-m", "convert", "convert", str(recipe), "--out", str(out), "--no-check"])
    print(json.dumps({"converted": name, "wall_seconds": round(usage.wall_seconds, 2), "peak_bytes": usage.peak_resident_bytes}))
    return out / name


def measure(graphs: dict[str, Path], tokens: int, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Tokens a second, decoded and read, by graph; the best of the rounds."""
    import onnxruntime

    sessions = {}
    for name, folder in graphs.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        started = time.perf_counter()
        path = next(folder.glob("onnx/*.onnx"))
        sessions[name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]), time.perf_counter() - started
    found = {name: {"decode": 0.0, "read_512": 0.0, "load_seconds": seconds} for name, (_, seconds) in sessions.items()}
    for _ in range(rounds):
        for name, (session, _) in sessions.items():
            row = found[name]
            row["decode"] = max(row["decode"], tokens / decode(session, 8, tokens))
            row["read_512"] = max(row["read_512"], 512 / decode(session, 512, 0))
    return found


def decode(session: Any, prompt: int, tokens: int) -> float:
    """Seconds that ``tokens`` take behind a prompt, or the prompt itself where there are none."""
    import numpy as np
    import onnxruntime

    cache = [item for item in session.get_inputs() if item.name.startswith("past")]
    past = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)) for item in cache]
    ids, seconds, total = np.arange(3, 3 + prompt, dtype=np.int64)[None], 0.0, 0
    for step in range(tokens + 1):
        binding = session.io_binding()
        total += ids.shape[1]
        started = time.perf_counter()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        for item, value in zip(cache, past, strict=True):
            binding.bind_ortvalue_input(item.name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
        logits, *past = binding.get_outputs()
        ids = np.array([[int(logits.numpy()[0, -1].argmax())]])
        if step or not tokens:
            seconds += time.perf_counter() - started
    return seconds


if __name__ == "__main__":
    main()
