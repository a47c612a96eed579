"""GGUF files of the Llama family, read as the checkpoint they were made from.

Keys and tensor names follow the GGUF specification (ggml/docs/gguf.md) and llama.cpp's ``convert_hf_to_gguf.py``; blocks are decoded
by the ``gguf`` package. llama.cpp stores the rows of q and k in the order its rotary embedding wants; they are put back here.
"""

from __future__ import annotations

import os
import re
import reprlib
import struct
from dataclasses import dataclass
from functools import cached_property, partial
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
_BLOCK_NAME = re.compile(r"blk\.(?P<block>0|[1-9][0-9]{0,5})\.(?P<role>\w+)")
_EMBEDDING = "model.embed_tokens.weight"
_FIRST_QUERY = "model.layers.0.self_attn.q_proj.weight"
_LENGTH = struct.Struct("=Q")


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
        if start == stop:  # no blocks, of which the gguf package makes an error
            return np.empty((0, *tensor.spec.shape[1:]), np.float32)
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
        """``config.json`` of the Llama this file holds. Raises :class:`FormatError` when a key is missing or no number."""
        number, count = partial(_number, self.path, self.fields), partial(_count, self.path, self.fields)
        heads = count("llama.attention.head_count")
        tokens = {
            key: count(f"tokenizer.ggml.{name}_token_id", lowest=0)
            for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
            if f"tokenizer.ggml.{name}_token_id" in self.fields
        }
        theta = float(number("llama.rope.freq_base", 10000.0))
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": count("llama.embedding_length"),
            "intermediate_size": count("llama.feed_forward_length"),
            "num_hidden_layers": count("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": count("llama.attention.head_count_kv", heads),
            "head_dim": self.tensors[_FIRST_QUERY].spec.shape[0] // heads,
            "vocab_size": self.tensors[_EMBEDDING].spec.shape[0],
            "max_position_embeddings": count("llama.context_length"),
            "rms_norm_eps": _shortest(number("llama.attention.layer_norm_rms_epsilon")),
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


def open_gguf(path: Path) -> GgufFile:
    """Reads the header of a GGUF file. Raises :class:`FormatError` for another family, a block type not in :data:`TYPES`,
    or anything that would be lost (scaled or partial rotary embeddings, experts, biases, the other parts of a split file)."""
    reader = _read(path)
    if reader.byte_order == "S":
        raise FormatError(f"{path}: a GGUF in the other byte order; convert from the original checkpoint")
    try:
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("tokenizer.ggml.") or len(field.data) == 1
        }
    except ValueError as error:
        raise FormatError(f"{path}: not a readable GGUF file ({error})") from None
    family = fields.get("general.architecture")
    if family != "llama":
        raise FormatError(f"{path}: a GGUF of the {family} family; only llama is read, convert from the original checkpoint")
    # llama.cpp takes a factor without a type for a linear one, and knows it under an older name too (llama-model.cpp, load_hparams).
    factors = [fields.get(f"llama.rope.{key}") or 1 for key in ("scaling.factor", "scale_linear")]
    if fields.get("llama.expert_count") or fields.get("llama.rope.scaling.type", "none") != "none" or factors != [1, 1]:
        raise FormatError(f"{path}: a GGUF with experts or scaled rotary embeddings; convert from the original checkpoint")
    if fields.get("split.count", 1) not in (0, 1):
        raise FormatError(f"{path}: one part of a split GGUF; join the parts with llama-gguf-split --merge")
    tensors = dict(_tensor(path, fields, tensor) for tensor in reader.tensors)
    for name, spelled in ((_EMBEDDING, "token_embd.weight"), (_FIRST_QUERY, "blk.0.attn_q.weight")):
        if name not in tensors:
            raise FormatError(f"{path}: {spelled} is missing")
    width = tensors[_FIRST_QUERY].spec.shape[0] // _count(path, fields, "llama.attention.head_count")
    for key in ("llama.attention.key_length", "llama.rope.dimension_count"):
        if fields.get(key, width) != width:
            raise FormatError(f"{path}: heads are {width} wide and {key} is {fields[key]}; a Llama checkpoint cannot say so")
    return GgufFile(path, fields, tensors)


def _read(path: Path) -> Any:
    """The gguf package's reader, which takes what lies beyond the end of the file for nothing; here it is an error.

    Without it an array that claims 2**60 numbers keeps the reader busy for as long as there is memory. A vocabulary is a hundred thousand
    strings, each of which the package reads by three calls of its own and two views of a memmap: ten times as long as what is done here.
    """
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            order = self.byte_order if override_order is None else override_order
            return np.frombuffer(self.data, np.dtype(dtype).newbyteorder(order), int(count), offset)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            """Size in bytes, parts, which of them are data, types: an array of numbers as one part, of strings as one each."""
            if raw_type != GGUFValueType.ARRAY or self.byte_order == "S":
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count, start = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64), orig_offs + 12
            types, number = [GGUFValueType.ARRAY, GGUFValueType(kind[0])], self.gguf_scalar_to_np.get(kind[0])
            if not count[0] or types[1] == GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            if number is not None:
                values = self._get(start, number, count[0])
                return 12 + values.nbytes, [kind, count, values], [2], types
            data, strings = np.asarray(self.data), []
            for _ in range(count[0]):
                (length,) = _LENGTH.unpack_from(data, start)  # type: ignore[arg-type]  # NumPy's stubs hide the buffer
                start += 8 + length
                if start > len(data):
                    raise ValueError(f"a string of {length:,} bytes ends behind the file")
                strings.append(data[start - length : start])
            return start - orig_offs, [kind, count, *strings], list(range(2, 2 + len(strings))), types

    try:
        return Reader(path)
    except (OSError, ValueError, IndexError, KeyError, OverflowError, RecursionError, struct.error) as error:
        raise FormatError(f"{path}: not a readable GGUF file ({error})") from None


def _tensor(path: Path, fields: dict[str, Any], tensor: Any) -> tuple[str, GgufTensor]:
    name, role = _huggingface_name(tensor.name)
    kind = tensor.tensor_type.name
    if name is None:
        raise FormatError(f"{path}: {tensor.name} has no counterpart in a Llama checkpoint and would be lost")
    if kind not in TYPES:
        raise FormatError(f"{path}: {tensor.name} is of type {kind}; read are {', '.join(TYPES)}")
    shape = tuple(int(extent) for extent in reversed(tensor.shape))
    if len(shape) not in (1, 2) or 0 in shape:
        raise FormatError(f"{path}: {tensor.name} is of shape {list(shape)}; a Llama has vectors and matrices only")
    heads = 0
    if role in ("attn_q", "attn_k"):
        heads = _count(path, fields, "llama.attention.head_count")
        if role == "attn_k":
            heads = _count(path, fields, "llama.attention.head_count_kv", heads)
        if shape[0] % (2 * heads):
            raise FormatError(f"{path}: {tensor.name} has {shape[0]} rows, which are not {heads} heads of an even width")
    return name, GgufTensor(TensorSpec(name, "F32", shape), kind, int(tensor.data_offset), int(tensor.n_bytes), heads)


def _number(path: Path, fields: dict[str, Any], key: str, default: float | None = None, *, lowest: float = 1e-30) -> float:
    value = fields.get(key, default)
    if value is None:
        raise FormatError(f"{path}: {key} is missing; the file does not describe a Llama")
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value < 2**63:
        raise FormatError(f"{path}: {key} is {reprlib.repr(value)}, not the one number that a Llama has there")
    return value


def _count(path: Path, fields: dict[str, Any], key: str, default: int | None = None, *, lowest: int = 1) -> int:
    value = _number(path, fields, key, default, lowest=lowest)
    if not isinstance(value, int):
        raise FormatError(f"{path}: {key} is {value}, not a whole number")
    return value


def _huggingface_name(name: str) -> tuple[str | None, str]:
    stem, _, suffix = name.rpartition(".")
    if suffix != "weight":
        return None, ""
    if stem in _TOP:
        return f"{_TOP[stem]}.weight", stem
    found = _BLOCK_NAME.fullmatch(stem)
    if found and found["role"] in _BLOCK:
        return f"model.layers.{found['block']}.{_BLOCK[found['role']]}.weight", found["role"]
    return None, ""


def _shortest(value: Any) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))
