"""Times calibrated INT8 and FP8 W8A8: octavo and llm-compressor on the same tokens, whole processes, beside the floor of GPTQ.

    python benchmarks/export_sample.py build/benchmarks/sample
    python benchmarks/calibrate.py build/benchmarks/sample --text TEXT

Both run on a CPU with all its cores. The floor is what both must compute, by torch alone: two forward passes of the blocks in bfloat16 or
float32, whichever is faster there, and one half of each X^T X in float32. With ``--text``, held-out, the artifacts are compared with their
source by benchmarks/quality.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import ROOT, Usage, delete, machine, run_measured, settle, versions
from workload import OFFLINE

HERE = Path(__file__).resolve().parent
#: By name: octavo's scheme and algorithm, and llm-compressor's scheme.
ALGORITHMS = {
    "gptq": ("int8-dynamic", "gptq", "GPTQ"),
    "smoothquant-gptq": ("int8-dynamic", "[{smoothquant: {alpha: search}}, gptq]", "SMOOTHQUANT_GPTQ"),
    "smoothquant": ("int8-dynamic", "{smoothquant: {alpha: search}}", "SMOOTHQUANT"),
    "rtn": ("int8-dynamic", "rtn", "INT8"),
    "fp8-dynamic": ("fp8-dynamic", "rtn", "FP8_DYNAMIC"),
    "fp8-static": ("fp8-static", "rtn", "FP8"),
    "fp8-static-gptq": ("fp8-static", "gptq", "FP8"),
}
CALIBRATION = "calibration: {{sequences: {sequences}, length: {length}, dtype: {dtype}}}\n"
RECIPE = """\
model: {model}
{calibration}targets:
  - name: int8
    format: compressed-tensors
    rules: [{{match: linear, scheme: {scheme}, algorithm: {algorithm}}}]
"""
TOKENS = """\
import json, sys
from pathlib import Path
from convert.text import load_tokenizer, take_tokens
model, sequences, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tokenizer = load_tokenizer(Path(model), trust_remote_code=False)
tokens, _ = take_tokens("sample", tokenizer, sequences=sequences, length=length, purpose="calibration", seed=0)
print(json.dumps({"tokens": tokens.tolist()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Llama's folder, bfloat16")
    parser.add_argument("--algorithms", nargs="+", choices=tuple(ALGORITHMS), default=["gptq", "smoothquant-gptq"])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=("source", "float32"), default="source", help="octavo's calibration.dtype")
    parser.add_argument("--peer-dtype", default="auto", help="llm-compressor's precision; float32 is faster on a CPU without bfloat16")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--text", type=Path, help="held-out text; without it nothing is compared")
    parser.add_argument("--text-tokens", type=int, default=18_432)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--peer-python", type=Path, default=ROOT / ".peers/llmcompressor/bin/python")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--workdir", type=Path, default=ROOT / "build/benchmarks")
    args = parser.parse_args()
    if not args.skip_peer and not args.peer_python.exists():
        raise SystemExit(f"{args.peer_python}: not there; build it as benchmarks/README.md says, or give --peer-python or --skip-peer")
    model, workdir = args.model.resolve(), args.workdir.resolve() / "calibrate"
    workdir.mkdir(parents=True, exist_ok=True)
    env = OFFLINE | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    drawn = run_measured([args.python, "-c", TOKENS, str(model), str(args.sequences), str(args.length)], env=env).answer()
    tokens = workdir / "tokens.json"
    tokens.write_text(json.dumps(drawn["tokens"]))
    floor = run_measured([args.python, __file__, "--floor", str(model), str(args.length)], env=env).answer()
    floor_seconds = args.sequences * floor["seconds_a_sequence"]
    rows: list[dict[str, Any]] = [{"tool": "floor", "algorithm": "", "wall_seconds": floor_seconds}]
    artifacts = []
    for number in range(args.rounds):
        for algorithm in args.algorithms:
            scheme, ours, theirs = ALGORITHMS[algorithm]
            recipe = workdir / f"{algorithm}.yaml"
            calibration = CALIBRATION.format(sequences=args.sequences, length=args.length, dtype=args.dtype)
            calibration = "" if ours == "rtn" and scheme.endswith("dynamic") else calibration
            recipe.write_text(RECIPE.format(model=model, calibration=calibration, scheme=scheme, algorithm=ours), encoding="utf-8")
            out = {"octavo": workdir / f"octavo-{algorithm}", "llm-compressor": workdir / f"llm-compressor-{algorithm}"}
            commands = {
                "octavo": [args.python, "-m", "convert", "convert", str(recipe), "--out", str(out["octavo"]), "--no-check", "--quiet"],
                "llm-compressor": [
                    str(args.peer_python), str(HERE / "peers/llmcompressor_oneshot.py"), str(model), str(out["llm-compressor"]), theirs,
                    "--tokens", str(tokens), "--dtype", args.peer_dtype,
                ],
            }  # fmt: skip
            for tool, command in commands.items():
                if tool != "octavo" and args.skip_peer:
                    continue
                delete(out[tool])
                settle(model)
                usage = run_measured(command, env=env)
                rows.append({"tool": tool, "algorithm": algorithm, "round": number, **usage.record()})
                print(f"{tool}, {algorithm}: {_said(usage)}", file=sys.stderr, flush=True)
                artifacts += [out[tool] / "int8" if tool == "octavo" else out[tool]] if number == 0 else []
    print(table(rows))
    if args.text:
        compared = [args.python, str(HERE / "quality.py"), str(model), *map(str, artifacts), "--text", str(args.text.resolve())]
        compared += ["--tokens", str(args.text_tokens), "--length", str(args.length), "--json", str(workdir / "quality.json")]
        print("\n" + subprocess.run(compared, check=True, capture_output=True, text=True).stdout)
    facts = machine() | {"octavo": versions(args.python, ("torch", "transformers"))}
    if not args.skip_peer:
        facts["peer"] = versions(str(args.peer_python), ("llmcompressor", "compressed-tensors", "torch", "transformers"))
    print(json.dumps({"machine": facts, "floor": floor, "rows": rows}))


def table(rows: list[dict[str, Any]]) -> str:
    """The fastest of the rounds, as Markdown; the floor has no process of its own to count memory in."""
    lines = ["| algorithm | tool | wall s | CPU s | peak resident MB | of it anonymous MB |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    lines += [f"| | floor | {rows[0]['wall_seconds']:.1f} | | | |"]
    for algorithm, tool in dict.fromkeys((row["algorithm"], row["tool"]) for row in rows[1:]):
        row = min((row for row in rows[1:] if (row["algorithm"], row["tool"]) == (algorithm, tool)), key=lambda row: row["wall_seconds"])
        cells = [f"{row['wall_seconds']:.1f}", f"{row['user_seconds'] + row['system_seconds']:.1f}"]
        cells += [f"{row[name] / 1e6:,.0f}" for name in ("peak_resident_bytes", "peak_anonymous_bytes")]
        lines.append("| " + " | ".join([algorithm, tool, *cells]) + " |")
    return "\n".join(lines)


def _said(usage: Usage) -> str:
    return (
        f"{usage.wall_seconds:.1f} s, {usage.user_seconds + usage.system_seconds:.1f} s of CPU, {usage.peak_resident_bytes / 1e6:,.0f} MB"
    )


def _floor(model: str, length: int) -> dict[str, float]:
    """Seconds a sequence, with all cores and nothing else: the fastest of a few."""
    import time

    import torch
    from transformers import AutoModel

    blocks = AutoModel.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True).eval()
    config = blocks.config
    ids = torch.arange(length)[None]

    def best(function: Any, rounds: int = 4) -> float:
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    with torch.no_grad():
        forward = best(lambda: blocks(input_ids=ids, use_cache=False))
        blocks.float()
        forward = min(forward, best(lambda: blocks(input_ids=ids, use_cache=False)))
        products = 0.0
        for features in (config.hidden_size, config.hidden_size, config.hidden_size, config.intermediate_size):
            x = torch.randn(length, features)
            hessian = torch.zeros(features, features)
            products += best(lambda x=x, hessian=hessian: hessian.addmm_(x.T, x)) / 2
    return {
        "forward": forward,
        "products": products * config.num_hidden_layers,
        "seconds_a_sequence": 2 * forward + products * config.num_hidden_layers,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--floor"]:
        print(json.dumps(_floor(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
