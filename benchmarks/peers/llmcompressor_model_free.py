"""llm-compressor's ``model_free_ptq`` on a folder: shard after shard, without a model definition, its leanest way to convert.

    PEER_PYTHON benchmarks/peers/llmcompressor_model_free.py MODEL OUT INT8

It takes every two-dimensional weight for a linear layer, so the embedding is named among what to ignore. Prints one line of JSON:
seconds to import, and seconds without imports.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("scheme", metavar="SCHEME", choices=("INT8", "FP8_DYNAMIC"))
    # Without effect on a CPU: compressed-tensors 0.19 runs the shards of a CPU one after another (entrypoints/convert/memory.py).
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="shards at a time (default: one a core)")
    args = parser.parse_args()

    started = time.perf_counter()
    import torch
    from llmcompressor import model_free_ptq

    imported = time.perf_counter()
    ignore = ["lm_head", "model.embed_tokens"]
    model_free_ptq(args.model, args.out, scheme=args.scheme, ignore=ignore, max_workers=args.workers)
    finished = time.perf_counter()
    print(
        json.dumps(
            {
                "tool": f"llmcompressor {version('llmcompressor')} model_free_ptq",
                "scheme": args.scheme,
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "import_seconds": imported - started,
                "seconds": finished - imported,
            }
        )
    )


if __name__ == "__main__":
    main()
