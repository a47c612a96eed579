"""How fast ONNX Runtime decodes and reads with an INT8 graph, beside the float32 graph of the same model, in one run.

    python benchmarks/onnx_speed.py                      # the sample
    python benchmarks/onnx_speed.py --model build/benchmarks/1b
    python benchmarks/onnx_speed.py --device cuda        # where onnxruntime-gpu is installed in the place of onnxruntime

The graphs are made by ``octavo convert``, whose time and peak memory are in the table too. Then each is loaded once, and they take turns:
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

FLOAT32 = "rules: [{match: linear, keep: true, why: the float graph}]"


def coded(scheme: str) -> str:
    return f"rules: [{{match: lm_head, scheme: {scheme}}}, {{match: linear, scheme: {scheme}}}]"


#: What a target says of each graph, beside its name.
GRAPHS = {
    "float32": f"format: onnx, {FLOAT32}",
    "int8": f"format: onnx, {coded('int8-weight-only-g32')}",
    "int8-channel": f"format: onnx, {coded('int8-weight-only')}",
    "int8-ort": f"format: onnx-matmulnbits, options: {{attention: gqa}}, {coded('int8-weight-only-g32')}",
    "int8-ort-g128": f"format: onnx-matmulnbits, options: {{attention: gqa}}, {coded('int8-weight-only-g128')}",
    "int8x2": f"format: onnx, options: {{inputs: int8x2}}, {coded('int8-weight-only')}",
    "w8a8": f"format: onnx, {coded('int8-dynamic')}",
}
RECIPE = """\
model: {model}
targets:
  - {{name: {name}, {target}, runtimes: [onnxruntime]}}
"""


def main() -> None:
    """Converts, measures, prints one line of JSON a graph and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sample:smollm2-135m-instruct")
    parser.add_argument("--graphs", nargs="+", default=["float32", "int8", "int8-ort"], choices=list(GRAPHS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workdir", type=Path, default=ROOT / "build/benchmarks/onnx")
    arguments = parser.parse_args()
    graphs = {name: convert(name, arguments.model, arguments.workdir) for name in arguments.graphs}
    found = measure(graphs, arguments.tokens, arguments.rounds, arguments.threads, arguments.device)
    first = found[arguments.graphs[0]]
    for name, row in found.items():
        ratios = {f"{key} ratio": row[key] / first[key] for key in ("decode", "read_512")}
        print(json.dumps({"graph": name, "device": arguments.device, **row, **ratios}))


def convert(name: str, model: str, workdir: Path) -> Path:
    """The folder of an artifact; what making it took is printed, where it was not there."""
    workdir.mkdir(parents=True, exist_ok=True)
    recipe = workdir / f"{name}.yaml"
    recipe.write_text(RECIPE.format(model=model, name=name, target=GRAPHS[name]))
    out = workdir / Path(model.replace(":", "-")).name
    if (out / name).is_dir():
        return out / name
    usage = run_measured([sys.executable, "-m", "convert", "convert", str(recipe), "--out", str(out), "--no-check"])
    print(json.dumps({"converted": name, "wall_seconds": round(usage.wall_seconds, 2), "peak_bytes": usage.peak_resident_bytes}))
    return out / name


def measure(graphs: dict[str, Path], tokens: int, rounds: int, threads: int, device: str) -> dict[str, dict[str, float]]:
    """Tokens a second, decoded and read, by graph; the best of the rounds. Raises :class:`SystemExit` where there is no such device."""
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    sessions = {}
    for name, folder in graphs.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        started = time.perf_counter()
        path = next(folder.glob("onnx/*.onnx"))
        session = onnxruntime.InferenceSession(str(path), options, providers=list(dict.fromkeys([provider, "CPUExecutionProvider"])))
        if provider not in session.get_providers():
            raise SystemExit(f"{name}: this onnxruntime does not run on {device}")
        sessions[name] = session, time.perf_counter() - started
    found = {name: {"decode": 0.0, "read_512": 0.0, "load_seconds": seconds} for name, (_, seconds) in sessions.items()}
    for _ in range(rounds):
        for name, (session, _) in sessions.items():
            row = found[name]
            row["decode"] = max(row["decode"], tokens / decode(session, 8, tokens, device))
            row["read_512"] = max(row["read_512"], 512 / decode(session, 512, 0, device))
    return found


def decode(session: Any, prompt: int, tokens: int, device: str) -> float:
    """Seconds that ``tokens`` take behind a prompt, or the prompt itself where there are none. The cache stays on the device."""
    import numpy as np
    import onnxruntime

    cache = [item for item in session.get_inputs() if item.name.startswith("past")]
    past = [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32), device) for item in cache]
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
            binding.bind_output(output.name, "cpu" if output.name == "logits" else device)
        session.run_with_iobinding(binding)
        logits, *past = binding.get_outputs()
        ids = np.array([[int(logits.numpy()[0, -1].argmax())]])
        if step or not tokens:
            seconds += time.perf_counter() - started
    return seconds


if __name__ == "__main__":
    main()
