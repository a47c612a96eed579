"""Whether memory grows with the model: octavo's peak for a shallow and a deep Llama of the same width.

    python benchmarks/memory.py
    python benchmarks/memory.py --full-size
    python benchmarks/memory.py --full-size --scheme onnx-int8
    python benchmarks/memory.py --scheme int8-gptq --layers 4 12 --hidden 512 --ffn 1792 --heads 8 --vocab 8192

The default width is reduced, so that the two sources take 5.4 GB of disk and an output 2.5 GB; ``--full-size`` takes Llama-3.1-8B's width,
23.4 GB and 10.9 GB. Prints a table, and one line of JSON after it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from measure import ROOT, delete, run_measured, settle
from workload import CALIBRATED, GRAPHS, OFFLINE, RECIPES, add_shape_options, make_workload, octavo_command, require_converted

FULL_SIZE = {"hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256}
REDUCED = {"hidden": 2048, "ffn": 7168, "heads": 16, "kv_heads": 4, "vocab": 32768}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 40])
    add_shape_options(parser, **REDUCED)
    parser.add_argument("--full-size", action="store_true", help="Llama-3.1-8B's width instead")
    parser.add_argument("--scheme", choices=(*RECIPES, *CALIBRATED, *GRAPHS), default="int8")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs octavo (default: this one)")
    parser.add_argument("--workdir", type=Path, default=ROOT / "build/benchmarks", help="for checkpoints, kept, and outputs, deleted")
    args = parser.parse_args()
    if args.full_size:
        vars(args).update(FULL_SIZE)
    workdir = args.workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    out = workdir / "out"
    torch_alone = run_measured([args.python, "-c", "import torch"]).peak_resident_bytes
    rows = []
    for layers in args.layers:
        workload = make_workload(workdir, args, layers)
        delete(out)
        settle(workload.model)
        usage = run_measured(octavo_command(args.python, args.scheme, workload.model, out, args.device), env=OFFLINE)
        require_converted(workload, out, "octavo")
        delete(out)
        rows.append(
            {
                "layers": layers,
                "source_bytes": workload.size_bytes,
                "largest_tensor_bytes": workload.largest_tensor_bytes,
                "peak_resident_bytes": usage.peak_resident_bytes,
                "peak_anonymous_bytes": usage.peak_anonymous_bytes,
                "wall_seconds": usage.wall_seconds,
            }
        )
    print("| layers | source MB | largest tensor MB | peak resident MB | of it anonymous MB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        names = ("source_bytes", "largest_tensor_bytes", "peak_resident_bytes", "peak_anonymous_bytes")
        print(f"| {row['layers']} | " + " | ".join(f"{row[name] / 1e6:,.0f}" for name in names) + " |")
    print(f"\nPython with torch imported, and nothing else: {torch_alone / 1e6:,.0f} MB resident")
    print(json.dumps({"scheme": args.scheme, "device": args.device, "torch_alone_bytes": torch_alone, "runs": rows}))


if __name__ == "__main__":
    main()
