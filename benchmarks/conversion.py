"""Times whole conversions, each in a process of its own: octavo, llm-compressor's two ways, and the floor under them all.

    python benchmarks/conversion.py --layers 8 --rounds 3

Every round runs the tools in turn, so that a machine that slows down slows them all. Before each run its output is deleted, what is
dirty goes to the disk, and the source is read once. Prints a table of medians and writes everything to benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import ROOT, Usage, delete, machine, run_measured, settle, size_bytes, versions
from workload import OFFLINE, RECIPES, Workload, add_shape_options, make_workload, octavo_command, require_converted

HERE = Path(__file__).resolve().parent
OCTAVO, FLOOR, START_UP = "octavo", "floor", "start-up"
PEERS = {"llm-compressor oneshot": "llmcompressor_oneshot.py", "llm-compressor model_free_ptq": "llmcompressor_model_free.py"}
PRESETS = {"int8": "INT8", "fp8": "FP8_DYNAMIC"}
#: What is imported to measure the start-up; transformers loads its parts on demand, this is the one that every tool needs.
START_UP_PROGRAM = "import torch, transformers"


@dataclass(frozen=True)
class Run:
    """One process. ``seconds`` is what it says of itself: without imports for a peer, of the best way for the floor, else None."""

    scheme: str
    tool: str
    round: int
    usage: dict[str, Any]
    output_bytes: int
    seconds: float | None = None
    answer: dict[str, Any] | None = None


@dataclass(frozen=True)
class Setting:
    """What stays the same through all runs. ``device``: cpu, cuda, or None to leave it to each tool."""

    workload: Workload
    out: Path
    python: str
    peer_python: str | None
    device: str | None

    @property
    def env(self) -> dict[str, str]:
        return OFFLINE | ({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})


def main() -> None:
    args = _parse()
    peer_python = None if args.skip_peers else str(args.peer_python)
    if peer_python and not Path(peer_python).exists():
        raise SystemExit(f"{peer_python}: not there; build it as benchmarks/README.md says, or give --peer-python or --skip-peers")
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    setting = Setting(make_workload(workdir, args, args.layers), workdir / "out", args.python, peer_python, args.device)
    runs: list[Run] = []
    for number in range(args.rounds):
        for scheme in args.schemes:
            for run in _round(setting, scheme, number):
                runs.append(run)
                print(f"round {number + 1}, {scheme}, {run.tool}: {run.usage['wall_seconds']:.2f} s", file=sys.stderr, flush=True)
    facts = machine() | {"octavo": versions(args.python, ("octavo", "torch", "transformers", "safetensors"))}
    if peer_python:
        facts["peers"] = versions(peer_python, ("llmcompressor", "compressed-tensors", "torch", "transformers", "safetensors"))
    print(f"{_title(facts, setting, args.rounds)}\n\n{table(runs)}")
    path = HERE / "results" / f"{args.name or _name(args)}.json"
    path.parent.mkdir(exist_ok=True)
    # Interpreters and folders are this machine's affair.
    arguments = {name: value for name, value in vars(args).items() if name not in ("python", "peer_python", "workdir", "name")}
    result = {"machine": facts, "arguments": arguments, "source_bytes": setting.workload.size_bytes, "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{path}", file=sys.stderr)


def table(runs: Sequence[Run]) -> str:
    """Medians as Markdown. The last column is what a tool takes beyond what it must.

    For octavo: wall time, less the floor, less starting Python with torch and transformers. For a peer: its time without its own
    imports, less the floor. The floor's row is the time of its best way alone, the memory that of the process that tried all ways.
    """
    lines = [
        "| scheme | tool | wall s | x octavo | CPU s | peak resident MB | of it anonymous MB | output MB | beyond floor and start-up s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for scheme in dict.fromkeys(run.scheme for run in runs):
        of_tool: dict[str, list[Run]] = {}
        for run in runs:
            if run.scheme == scheme:
                of_tool.setdefault(run.tool, []).append(run)
        octavo, start_up = (_median(of_tool[tool], "wall_seconds") for tool in (OCTAVO, START_UP))
        floor = _own_seconds(of_tool[FLOOR])
        for tool, its in of_tool.items():
            wall = floor if tool == FLOOR else _median(its, "wall_seconds")
            beyond = {OCTAVO: f"{wall - floor - start_up:.2f}", FLOOR: "", START_UP: ""}
            cells = (
                scheme,
                tool,
                f"{wall:.2f}",
                f"{wall / octavo:.2f}",
                "" if tool == FLOOR else f"{_median(its, 'user_seconds') + _median(its, 'system_seconds'):.2f}",
                f"{_median(its, 'peak_resident_bytes') / 1e6:,.0f}",
                f"{_median(its, 'peak_anonymous_bytes') / 1e6:,.0f}",
                f"{its[0].output_bytes / 1e6:,.1f}" if its[0].output_bytes else "",
                beyond[tool] if tool in beyond else f"{_own_seconds(its) - floor:.2f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _round(setting: Setting, scheme: str, number: int) -> Iterator[Run]:
    """Every tool once; the floor writes as much as octavo wrote."""
    model, out, env = setting.workload.model, setting.out, setting.env
    usage = _run(setting, [setting.python, "-c", START_UP_PROGRAM], env)
    yield Run(scheme, START_UP, number, usage.record(), 0)
    usage = _run(setting, octavo_command(setting.python, scheme, model, out, setting.device), env)
    require_converted(setting.workload, out, f"{OCTAVO} ({scheme})")
    bytes_out = size_bytes(out)
    yield Run(scheme, OCTAVO, number, usage.record(), bytes_out)
    for tool, program in PEERS.items() if setting.peer_python else ():
        usage = _run(setting, [str(setting.peer_python), str(HERE / "peers" / program), str(model), str(out), PRESETS[scheme]], env)
        require_converted(setting.workload, out, f"{tool} ({scheme})")
        answer = usage.answer()
        yield Run(scheme, tool, number, usage.record(), size_bytes(out), answer["seconds"], answer)
    usage = _run(setting, [setting.python, str(HERE / "floor.py"), str(model), str(out), "--bytes-out", str(bytes_out)], env)
    answer = usage.answer()
    yield Run(scheme, FLOOR, number, usage.record(), bytes_out, answer["seconds"], answer)
    delete(out)


def _run(setting: Setting, command: Sequence[str], env: dict[str, str]) -> Usage:
    delete(setting.out)
    settle(setting.workload.model)
    return run_measured(command, env=env)


def _median(runs: Sequence[Run], name: str) -> float:
    return float(statistics.median(run.usage[name] for run in runs))


def _own_seconds(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs if run.seconds is not None)


def _title(facts: dict[str, Any], setting: Setting, rounds: int) -> str:
    machine_words = f"{facts['cores']} cores of {facts['processor']}, {(facts['memory_bytes'] or 0) / 1e9:.0f} GB"
    device = setting.device or "each tool's own choice of device"
    return (
        f"{setting.workload.layers} layers, {setting.workload.size_bytes / 1e9:.2f} GB source; {machine_words}"
        f"{', ' + facts['gpu'] if facts['gpu'] else ''}; {device}; medians of {rounds} rounds"
    )


def _name(args: argparse.Namespace) -> str:
    return f"convert-{args.layers}x{args.hidden}-{args.device or 'auto'}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    add_shape_options(parser, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="passed on to octavo; cpu also hides the GPUs from the peers")
    parser.add_argument("--skip-peers", action="store_true", help="only octavo and the floor")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs octavo (default: this one)")
    parser.add_argument("--peer-python", type=Path, default=ROOT / ".peers/llmcompressor/bin/python", help="one with llm-compressor")
    parser.add_argument("--workdir", type=Path, default=ROOT / "build/benchmarks", help="for checkpoints, kept, and outputs, deleted")
    parser.add_argument("--name", help="of the file under results/ (default: from layers, hidden size and device)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
