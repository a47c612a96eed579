"""llm-compressor's ``oneshot`` on a folder, without calibration, as its README does it: load the model, quantize, save compressed.

    PEER_PYTHON benchmarks/peers/llmcompressor_oneshot.py MODEL OUT INT8

Schemes are presets of compressed-tensors (``quantization/quant_scheme.py``): INT8, also called W8A8, has int8 weights by channel and
dynamic int8 activations by token; FP8_DYNAMIC the same in E4M3. Prints one line of JSON: seconds to import, and seconds without
imports.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("scheme", metavar="SCHEME", choices=("INT8", "FP8_DYNAMIC"))
    args = parser.parse_args()

    started = time.perf_counter()
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    imported = time.perf_counter()
    recipe = QuantizationModifier(targets="Linear", scheme=args.scheme, ignore=["lm_head"])
    oneshot(model=args.model, recipe=recipe, output_dir=args.out, save_compressed=True)
    finished = time.perf_counter()
    print(
        json.dumps(
            {
                "tool": f"llmcompressor {version('llmcompressor')} oneshot",
                "scheme": args.scheme,
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "import_seconds": imported - started,
                "seconds": finished - imported,
            }
        )
    )


if __name__ == "__main__":
    main()
