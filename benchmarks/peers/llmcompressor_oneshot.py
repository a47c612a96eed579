"""llm-compressor's ``oneshot`` on a folder as its README does it: load the model, quantize, save compressed.

    PEER_PYTHON benchmarks/peers/llmcompressor_oneshot.py MODEL OUT INT8
    PEER_PYTHON benchmarks/peers/llmcompressor_oneshot.py MODEL OUT FP8 --text convert/texts/calibration.txt
    PEER_PYTHON benchmarks/peers/llmcompressor_oneshot.py MODEL OUT SMOOTHQUANT_GPTQ --tokens TOKENS

Schemes are presets of compressed-tensors (``quantization/quant_scheme.py``): INT8, also called W8A8, has int8 weights by channel and
dynamic int8 activations by token, FP8_DYNAMIC the same in E4M3; FP8 is static, a scale a tensor, and is calibrated on ``--text``;
FP8_BLOCK has blocks of 128 x 128. SMOOTHQUANT, GPTQ and SMOOTHQUANT_GPTQ end in W8A8 and are calibrated too, with its defaults and the
strength 0.8 that its README gives smoothing; ``--tokens``, JSON, a list of token ids for each sequence, stands for the text. W8A16_CHANNEL
and W8A16_G64 are no presets (W8A16 has groups of 128): int8 weights alone.
Prints one line of JSON: seconds to import, and seconds without imports.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

CALIBRATED = ("FP8", "GPTQ", "SMOOTHQUANT", "SMOOTHQUANT_GPTQ")
GRAIN = {"W8A16_CHANNEL": {"strategy": "channel"}, "W8A16_G64": {"strategy": "group", "group_size": 64}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("scheme", metavar="SCHEME", choices=("INT8", "FP8_DYNAMIC", *GRAIN, *CALIBRATED, "FP8_BLOCK"))
    parser.add_argument("--text", help="what FP8 is calibrated on, UTF-8")
    parser.add_argument("--tokens", type=Path, help="the sequences themselves, JSON")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="its precision: auto (as stored) or float32, faster on a CPU without bfloat16")
    args = parser.parse_args()

    started = time.perf_counter()
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    imported = time.perf_counter()
    if args.scheme in GRAIN:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, **GRAIN[args.scheme]}
        recipe = QuantizationModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    elif args.scheme.startswith("SMOOTHQUANT") or args.scheme == "GPTQ":
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        smoothing = [SmoothQuantModifier(smoothing_strength=0.8)] if args.scheme.startswith("SMOOTHQUANT") else []
        rounding = GPTQModifier if args.scheme.endswith("GPTQ") else QuantizationModifier
        recipe = [*smoothing, rounding(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    else:
        recipe = QuantizationModifier(targets="Linear", scheme=args.scheme, ignore=["lm_head"])
    calibration = _calibration(args) if args.scheme in CALIBRATED else {}
    oneshot(model=args.model, precision=args.dtype, recipe=recipe, output_dir=args.out, save_compressed=True, **calibration)
    finished = time.perf_counter()
    print(
        json.dumps(
            {
                "tool": f"llmcompressor {version('llmcompressor')} oneshot",
                "scheme": args.scheme,
                "dtype": args.dtype,
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "import_seconds": imported - started,
                "seconds": finished - imported,
            }
        )
    )


def _calibration(args: argparse.Namespace) -> dict[str, Any]:
    """Sequences from the beginning of the text, tokenized by the model's own tokenizer."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    if args.tokens is not None:
        rows = json.loads(args.tokens.read_text())
    elif args.text is not None:
        ids = AutoTokenizer.from_pretrained(args.model)(Path(args.text).read_text(encoding="utf-8"), add_special_tokens=False).input_ids
        wanted = args.sequences * args.length
        if len(ids) < wanted:
            raise SystemExit(f"{args.text} has {len(ids):,} tokens, {wanted:,} are wanted")
        rows = [ids[start : start + args.length] for start in range(0, wanted, args.length)]
    else:
        raise SystemExit(f"{args.scheme} is calibrated: give --text or --tokens to calibrate on")
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    return {"dataset": dataset, "max_seq_length": max(map(len, rows)), "num_calibration_samples": len(rows)}


if __name__ == "__main__":
    main()
