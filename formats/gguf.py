"""GGUF files of the Llama family, read as the checkpoint they were made from.

Keys and tensor names follow the GGUF specification (ggml/docs/gguf.md) and llama.cpp's ``convert_hf_to_gguf.py``; blocks are decoded
by the ``gguf`` package. llama.cpp stores the rows of q and k in the order its rotary embedding wants; they are put back here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.errors import FormatError
from formats.safetensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

#: Block types that are decoded; each is covered by a test against the gguf package's own encoder or the reference bytes.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class GgufTensor:
    """``spec``: the decoded tensor under its Hugging Face name, F32. ``heads``: rows to put back head by head, 0 for none."""

    spec: TensorSpec
    kind: str
    start: int
    size_bytes: int
    heads: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file: its metadata and where its tensors lie. Reading is thread-safe."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of a tensor, float32; a vector is its own rows."""
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        rows = tensor.spec.shape[0]
        # Rows of a head trade places, so whole heads are read.
        head = rows // tensor.heads if tensor.heads else 1
        first, last = start // head * head, -(-stop // head) * head
        row_bytes = tensor.size_bytes // rows
        raw = os.pread(self._descriptor, (last - first) * row_bytes, tensor.start + first * row_bytes)
        if len(raw) != (last - first) * row_bytes:
            raise FormatError(f"{self.path}: {name} ends early; the file is truncated, fetch it again")
        blocks = np.frombuffer(raw, np.uint8).reshape(last - first, row_bytes)
        values = dequantize(blocks, GGMLQuantizationType[tensor.kind]).reshape(last - first, *tensor.spec.shape[1:])
        if tensor.heads:
            values = values.reshape(-1, head // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        return np.array(values[start - first : stop - first], dtype=np.float32, order="C")

    def config(self) -> dict[str, Any]:
        """``config.json`` of the Llama this file holds."""
        get = self._get
        heads = int(get("llama.attention.head_count"))
        hidden = int(get("llama.embedding_length"))
        tokens = {
            key: int(self.fields[f"tokenizer.ggml.{name}_token_id"])
            for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
            if f"tokenizer.ggml.{name}_token_id" in self.fields
        }
        theta = float(get("llama.rope.freq_base", 10000.0))
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": int(get("llama.feed_forward_length")),
            "num_hidden_layers": int(get("llama.block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(get("llama.attention.head_count_kv", heads)),
            "head_dim": int(get("llama.attention.key_length", get("llama.rope.dimension_count", hidden // heads))),
            "vocab_size": self.tensors["model.embed_tokens.weight"].spec.shape[0],
            "max_position_embeddings": int(get("llama.context_length")),
            "rms_norm_eps": _shortest(get("llama.attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            **tokens,
        }

    @cached_property
    def _descriptor(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    def _get(self, key: str, default: Any = None) -> Any:
        value = self.fields.get(key, default)
        if value is None:
            raise FormatError(f"{self.path}: {key} is missing; the file does not describe a Llama")
        return value


def open_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file. Raises :class:`FormatError` for another family, a block type not in :data:`TYPES`,
    or anything that would be lost (scaled rotary embeddings, experts, biases)."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise FormatError(f"{path}: not a readable GGUF file ({error})") from None
    fields = {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.") or len(field.data) == 1
    }
    family = fields.get("general.architecture")
    if family != "llama":
        raise FormatError(f"{path}: a GGUF of the {family} family; only llama is read, convert from the original checkpoint")
    if fields.get("llama.expert_count") or fields.get("llama.rope.scaling.type", "none") != "none":
        raise FormatError(f"{path}: a GGUF with experts or scaled rotary embeddings; convert from the original checkpoint")
    tensors = {}
    for tensor in reader.tensors:
        name, role = _huggingface_name(tensor.name)
        kind = tensor.tensor_type.name
        if name is None:
            raise FormatError(f"{path}: {tensor.name} has no counterpart in a Llama checkpoint and would be lost")
        if kind not in TYPES:
            raise FormatError(f"{path}: {tensor.name} is of type {kind}; read are {', '.join(TYPES)}")
        shape = tuple(int(extent) for extent in reversed(tensor.shape))
        heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}.get(role)
        tensors[name] = GgufTensor(
            TensorSpec(name, "F32", shape),
            kind,
            int(tensor.data_offset),
            int(tensor.n_bytes),
            int(fields.get(heads, fields["llama.attention.head_count"])) if heads else 0,
        )
    if "model.embed_tokens.weight" not in tensors:
        raise FormatError(f"{path}: token_embd.weight is missing")
    return GgufFile(path, fields, tensors)


def _huggingface_name(name: str) -> tuple[str | None, str]:
    stem, _, suffix = name.rpartition(".")
    if suffix != "weight":
        return None, ""
    if stem in _TOP:
        return f"{_TOP[stem]}.weight", stem
    if stem.startswith("blk."):
        _, block, role = stem.split(".", 2)
        if role in _BLOCK:
            return f"model.layers.{block}.{_BLOCK[role]}.weight", role
    return None, ""


def _shortest(value: Any) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))
