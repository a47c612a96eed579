"""onnxruntime-genai's own model builder, ``-p int8`` for a CPU, and its runtime decoding that folder and others in turns.

    PEER_PYTHON benchmarks/peers/genai_builder.py MODEL OUT --artifact artifacts/llama-onnx-int8/onnx-int8

MODEL is a folder of floats (benchmarks/export_sample.py makes one of the sample). Each folder is loaded once, and in every round each
decodes greedily in onnxruntime-genai behind the same prompt; the best round counts: on a shared machine a median says more of the others.
Prints a line of JSON a folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--artifact", type=Path, action="append", default=[], help="a folder to decode beside it")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    if not (args.out / "genai_config.json").exists():
        started = time.perf_counter()
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(args.model), "-o", str(args.out)]
        subprocess.run([*builder, "-p", "int8", "-e", "cpu"], check=True, stdout=subprocess.DEVNULL)
        print(json.dumps({"built": str(args.out), "seconds": round(time.perf_counter() - started, 1)}))
    folders = [args.out, *args.artifact]
    models = {folder: load(folder, args.threads) for folder in folders}
    best = dict.fromkeys(folders, 0.0)
    for _ in range(args.rounds):
        for folder, model in models.items():
            best[folder] = max(best[folder], decode(model, args.tokens))
    versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
    for folder, speed in best.items():
        row = {"folder": str(folder), "tokens_per_second": round(speed, 1), "of_the_builders": round(speed / best[args.out], 3)}
        print(json.dumps({**row, "threads": args.threads, **versions}))


def load(folder: Path, threads: int) -> Any:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    return onnxruntime_genai.Model(config)


def decode(model: Any, count: int) -> float:
    """Tokens a second behind a prompt of eight."""
    import numpy as np
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=8 + count, min_length=8 + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.arange(3, 11, dtype=np.int32))
    generator.generate_next_token()
    started = time.perf_counter()
    for _ in range(count - 1):
        generator.generate_next_token()
    return (count - 1) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
