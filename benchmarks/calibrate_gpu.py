"""How long SmoothQuant and GPTQ take for one block of a large model on a GPU, and in how much of its memory, beside the floor.

    python benchmarks/calibrate_gpu.py
    python benchmarks/calibrate_gpu.py --no-phases --peer-python .peers/llmcompressor/bin/python
    python benchmarks/calibrate_gpu.py --device cpu --layers 2 --hidden 256 --ffn 512 --heads 8 --kv-heads 4 --sequences 8 --length 64

Converts a random Llama, by default six layers of Llama-8B's shape, on 128 x 2,048 tokens, twice: as it is, timed from one block to the
next, and with the device waited for around each phase, which takes away what overlaps. The floor is measured first: the block's forward
pass twice, the products X^T X of its four inputs, one Cholesky factorisation and one inverse of a triangle for each, and the column loops.
With ``--peer-python`` llm-compressor does the same to the same tokens, and to a model of two layers, so that what it takes beside its
blocks can be left out.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from measure import ROOT, machine, run_measured, versions
from workload import OFFLINE, add_shape_options, make_workload

from convert.hardware import let_segments_grow

RECIPE = """\
model: {model}
calibration: {{text: {text}, sequences: {sequences}, length: {length}, dtype: {dtype}}}
targets:
  - name: int8
    format: compressed-tensors
    rules: [{{match: linear, scheme: int8-dynamic, algorithm: {algorithm}}}]
"""
#: Tokens to a product and to a forward pass of the floor.
FLOOR_TOKENS = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    add_shape_options(parser, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=32768)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--algorithm", default="[{smoothquant: {alpha: search}}, gptq]")
    parser.add_argument("--dtype", choices=("source", "float32"), default="source")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--workdir", type=Path, default=ROOT / "build/benchmarks")
    parser.add_argument("--no-floor", action="store_true")
    parser.add_argument("--no-phases", action="store_true")
    parser.add_argument("--peer-python", type=Path, help="of llm-compressor's environment; without it no peer is run")
    args = parser.parse_args()
    let_segments_grow()
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    model = make_workload(workdir, args, args.layers).model
    text = workdir / "random.txt"
    generator = random.Random(0)
    text.write_text("".join(generator.choices("abcdefghijklmnopqrstuvwxyz ", k=args.sequences * args.length * 2)))
    result: dict[str, Any] = {"machine": machine(), "versions": versions(args.python, ("torch", "transformers")), "arguments": vars(args)}
    if not args.no_floor and args.device == "cuda":
        result["floor"] = floor(args)
        print("floor, s a block:", {name: round(seconds, 3) for name, seconds in result["floor"].items()}, flush=True)
    result["run"] = run(model, text, workdir / "out", args)
    print("as it is:", json.dumps(result["run"]), flush=True)
    if args.peer_python:
        result["peer"] = peer(text, workdir, args)
        print("llm-compressor:", json.dumps(result["peer"]), flush=True)
    if not args.no_phases:
        phases: dict[str, Phase] = {}
        with watched(phases, args.device):
            result["waited"] = run(model, text, workdir / "out", args)
        # Looked at from phase to phase, so that these say little.
        for name in ("peak_gpu_allocated_gb", "peak_gpu_reserved_gb"):
            result["waited"].pop(name)
        result["phases"] = {name: [phase.seconds / args.layers, phase.peak_gb] for name, phase in phases.items()}
        print("with the device waited for around each phase:", json.dumps(result["waited"]))
        print("s a block and GB at most, by phase; what is inside another is counted in both:")
        for name, (seconds, peak) in result["phases"].items():
            print(f"  {name:24} {seconds:8.3f} {peak:8.2f}")
    print(json.dumps(result, default=str))


def peer(text: Path, workdir: Path, args: argparse.Namespace) -> dict[str, Any]:
    """llm-compressor on the same tokens, with its README's strength of smoothing: its seconds without imports, for ``args.layers`` and for
    two layers, and a block's share of the difference."""
    from convert.text import load_tokenizer, take_tokens

    seconds: dict[int, float] = {}
    for layers in (2, args.layers):
        model = make_workload(workdir, args, layers).model
        wanted = {"sequences": args.sequences, "length": args.length, "purpose": "calibration", "seed": 0}
        drawn, _ = take_tokens(str(text), load_tokenizer(model, trust_remote_code=False), **wanted)
        (tokens := workdir / "tokens.json").write_text(json.dumps(drawn.tolist()))
        program = Path(__file__).with_name("peers") / "llmcompressor_oneshot.py"
        command = [args.peer_python, program, model, workdir / "peer", "SMOOTHQUANT_GPTQ", "--tokens", tokens]
        seconds[layers] = run_measured(list(map(str, command)), env=OFFLINE).answer()["seconds"]
        shutil.rmtree(workdir / "peer")
    per_block = (seconds[args.layers] - seconds[2]) / (args.layers - 2)
    return {"seconds": {str(layers): round(taken, 2) for layers, taken in seconds.items()}, "block_seconds": round(per_block, 2)}


@dataclass(eq=False)
class Phase:
    """What a phase took so far in all blocks, and the most it held of a GPU's memory."""

    seconds: float = 0.0
    peak_gb: float = 0.0


class Clock:
    """A progress that notes when blocks are finished."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @contextmanager
    def stage(self, name: str, total: int, *, unit: str = "bytes") -> Iterator[Callable[[int], None]]:  # noqa: ARG002
        if name != "calibrating":
            yield lambda count: None  # noqa: ARG005
            return
        self.times.append(time.perf_counter())
        yield lambda count: self.times.append(time.perf_counter())  # noqa: ARG005

    def say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


def run(model: Path, text: Path, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One conversion. A block's time is from where its predecessor was solved to where it is, with the second pass of that; the first, with
    what is compiled then, is told apart."""
    import torch

    from convert.export import export
    from convert.pipeline import plan
    from convert.recipe import parse_recipe

    shutil.rmtree(out, ignore_errors=True)
    recipe = RECIPE.format(model=model, text=text, sequences=args.sequences, length=args.length, dtype=args.dtype, algorithm=args.algorithm)
    clock = Clock()
    started = time.perf_counter()
    job = plan(parse_recipe(recipe, "benchmark.yaml", name="benchmark"))
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    artifact = export(job, out, clock, device=args.device)[0]
    ended = time.perf_counter()
    blocks = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    solved = (artifact.manifest.calibration or {}).get("solved", {})
    digests = {file.name: file.sha256 for file in artifact.manifest.files}
    return {
        "seconds": round(ended - started, 2),
        "first_block_seconds": round(blocks[0], 3),
        "block_seconds": [round(seconds, 3) for seconds in blocks[1:]],
        "median_block_seconds": round(statistics.median(blocks[1:] or blocks), 3),
        "peak_gpu_allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if args.device == "cuda" else None,
        "peak_gpu_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if args.device == "cuda" else None,
        "peak_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "share_of_rounding_error": round(
            statistics.fmean(seen["output_error"] / seen["output_error_rounded"] for seen in solved.values() if "output_error" in seen), 3
        )
        if solved
        else None,
        "alphas": dict(Counter(seen.get("alpha") for seen in solved.values()).most_common()),
        "weights_sha256": digests.get("model.safetensors"),
    }


@contextmanager
def watched(phases: dict[str, Phase], device: str) -> Iterator[None]:
    """Has our own functions counted, the device waited for before and after each."""
    import torch

    from convert import groups, lanes, loading, observe, solve
    from convert.algorithms import gptq, rtn, smoothing

    places: list[tuple[Any, str, str]] = [
        (loading.Skeleton, "load", "load"),
        (lanes.Stand, "run", "run both passes"),
        (observe.Observer, "take", "statistics, in a run"),
        (groups, "find_groups", "find groups"),
        (solve, "smooth_block", "smooth"),
        (smoothing, "search_alpha", "search alpha, in smooth"),
        (gptq, "factorise", "factorise"),
        (gptq, "quantize_together", "columns and scales"),
        (rtn, "tile_scales", "scales, in columns"),
        (solve, "output_errors", "output errors"),
        (solve.quantize, "encode", "encode"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]

    opened: list[Phase] = []

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
            for phase in opened:
                phase.peak_gb = max(phase.peak_gb, torch.cuda.max_memory_allocated() / 1e9)
            torch.cuda.reset_peak_memory_stats()

    def timed(function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait()
            phase = phases.setdefault(label, Phase())
            opened.append(phase)
            started = time.perf_counter()
            try:
                found = function(*args, **kwargs)
                return list(found) if label == "encode" else found
            finally:
                wait()
                opened.remove(phase)
                phase.seconds += time.perf_counter() - started

        return call

    try:
        for owner, name, label in places:
            setattr(owner, name, timed(getattr(owner, name), label))
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def floor(args: argparse.Namespace) -> dict[str, float]:
    """Seconds that a block takes at least, by phase, for as many tokens."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    from convert.algorithms import gptq
    from formats.scheme import SCHEMES

    tokens, device = args.sequences * args.length, "cuda"
    per = max(1, FLOOR_TOKENS // args.length)
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.ffn, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        num_hidden_layers=1, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device), torch.no_grad():
        layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
        x = torch.randn(per, args.length, args.hidden, dtype=torch.bfloat16)
        embeddings = LlamaRotaryEmbedding(config)(x, torch.arange(args.length)[None])
        shown = per * args.length
        found = {"forward, twice": 2 * best(partial(layer, x, position_embeddings=embeddings, attention_mask=None)) * tokens / shown}
        del layer, x, embeddings
        head = args.hidden // args.heads
        shapes = (
            (args.hidden, (args.hidden, args.kv_heads * head, args.kv_heads * head)),
            (args.hidden, (args.hidden,)),
            (args.hidden, (args.ffn, args.ffn)),
            (args.ffn, (args.hidden,)),
        )
        found |= dict.fromkeys(("hessians", "factorise", "columns"), 0.0)
        for columns, rows in shapes:
            x = torch.randn(shown, columns, dtype=torch.bfloat16)
            found["hessians"] += best(lambda x=x: torch.mm(x.T, x, out_dtype=torch.float32)) * tokens / shown
            hessian = torch.mm(x.T, x, out_dtype=torch.float32)
            del x
            found["factorise"] += best(lambda hessian=hessian: gptq.factorise(hessian))
            factor = gptq.factorise(hessian)
            weights = [torch.randn(count, columns) * 0.02 for count in rows]
            found["columns"] += best(
                lambda weights=weights, factor=factor: gptq.quantize_together(
                    weights, SCHEMES["int8-dynamic"].weight, scale_dtype=torch.bfloat16, factor=factor
                )
            )
            del hessian, factor, weights
    torch.cuda.empty_cache()
    return {**found, "together": sum(found.values())}


def best(function: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of the fastest of a few rounds, after one that is not counted."""
    import torch

    seconds = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
