"""Writes a Llama of any depth with random weights: the shape, the files and the sizes of the real thing, without a download.

    python benchmarks/make_llama.py OUT --layers 8

The default shape is Llama-3.1-8B's (untied head). Weights are normal with deviation 0.02, norms ones, all bfloat16; the same seed gives
the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from formats.safetensors import INDEX_FILE, TensorSpec, index_json, json_bytes, lay_out

#: Elements of the one random block that every matrix is cut from: a prime, so that no row length divides it and rows differ.
BLOCK_ELEMENTS = 16_777_213
#: How far each matrix starts into the block beyond the one before it; coprime to the block, so no two starts agree for 16 million matrices.
STRIDE_ELEMENTS = 1_000_003
CONTEXT = 131_072
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama, in elements; ``head_dim`` is hidden / heads."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor, in the order a forward pass needs them."""
        attention, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield _bf16("model.embed_tokens.weight", self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield _bf16(f"{prefix}.input_layernorm.weight", self.hidden)
            yield _bf16(f"{prefix}.self_attn.q_proj.weight", attention, self.hidden)
            yield _bf16(f"{prefix}.self_attn.k_proj.weight", key_value, self.hidden)
            yield _bf16(f"{prefix}.self_attn.v_proj.weight", key_value, self.hidden)
            yield _bf16(f"{prefix}.self_attn.o_proj.weight", self.hidden, attention)
            yield _bf16(f"{prefix}.post_attention_layernorm.weight", self.hidden)
            yield _bf16(f"{prefix}.mlp.gate_proj.weight", self.ffn, self.hidden)
            yield _bf16(f"{prefix}.mlp.up_proj.weight", self.ffn, self.hidden)
            yield _bf16(f"{prefix}.mlp.down_proj.weight", self.hidden, self.ffn)
        yield _bf16("model.norm.weight", self.hidden)
        if not self.tied:
            yield _bf16("lm_head.weight", self.vocab, self.hidden)

    def config(self) -> dict[str, Any]:
        """``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }


def make(out: Path, shape: Shape, *, shard_bytes: int, seed: int = 0) -> None:
    """Writes the checkpoint to ``out``, which appears only when it is whole. Memory stays under 150 MB, whatever the size.

    Raises :class:`ValueError` when heads do not divide the hidden size, or key-value heads the heads.
    """
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise ValueError(f"hidden {shape.hidden}, heads {shape.heads}, kv heads {shape.kv_heads}: each must divide, heads of an even size")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    block = _random_block(seed)
    ones = np.ones(shape.hidden, ml_dtypes.bfloat16)
    shards = lay_out(list(shape.tensors()), {"format": "pt"}, shard_bytes)
    matrices = 0
    for shard in shards:
        with (partial / shard.file).open("wb", buffering=0) as stream:
            stream.write(shard.header)
            for item in shard.tensors:
                if len(item.spec.shape) == 1:
                    _write_all(stream.fileno(), ones.view(np.uint8).data)
                    continue
                for part in _cut(block, matrices * STRIDE_ELEMENTS % BLOCK_ELEMENTS, item.spec.elements):
                    _write_all(stream.fileno(), part)
                matrices += 1
    index = index_json(shards)
    if index is not None:
        (partial / INDEX_FILE).write_bytes(index)
    (partial / "config.json").write_bytes(json_bytes(shape.config()))
    (partial / "generation_config.json").write_bytes(json_bytes({"bos_token_id": 0, "eos_token_id": 1}))
    _write_tokenizer(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _bf16(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "BF16", shape)


def _random_block(seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(BLOCK_ELEMENTS, np.float32)
    values *= 0.02
    return values.astype(ml_dtypes.bfloat16)


def _cut(block: np.ndarray, start: int, elements: int) -> Iterator[memoryview]:
    """``elements`` of the block as bytes, beginning at ``start`` and going round."""
    while elements:
        count = min(elements, block.size - start)
        yield block[start : start + count].view(np.uint8).data
        start, elements = 0, elements - count


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: 258 tokens, any text goes round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((BEGIN, END, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, END])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "model_max_length": CONTEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _size_bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    return int(float(text[:-2]) * units[text[-2:].upper()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--ffn", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--tied", action="store_true", help="the embedding is the head, as in Llama-3.2-1B")
    parser.add_argument("--shard-size", type=_size_bytes, default=2 * 10**9, help="for example 2GB (the default) or 500MB")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = Shape(args.layers, args.hidden, args.ffn, args.heads, args.kv_heads, args.vocab, args.tied)
    make(args.out, shape, shard_bytes=args.shard_size, seed=args.seed)


if __name__ == "__main__":
    main()
