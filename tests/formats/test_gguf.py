"""GGUF files of the Llama family: transformers' own loader reads the same tensors and the same config from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter, RopeScalingType
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from formats.errors import FormatError
from formats.gguf import TYPES, GgufFile, open_gguf

#: Block types without an encoder in the gguf package; files of them are made of raw blocks.
RAW_TYPES = ("Q4_K", "Q5_K", "Q6_K")
#: Where the float16 scales lie within a block (ggml-common.h); everything else in a block may be any bits at all.
HALVES = {"F16": (0,), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
FIRST_QUERY = "model.layers.0.self_attn.q_proj.weight"
FIRST_KEY = "model.layers.0.self_attn.k_proj.weight"


@dataclass(frozen=True)
class Llama:
    """A Llama small enough to write in a test."""

    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    layers: int = 2
    ffn: int = 96
    vocabulary: int = 48
    tied: bool = False
    kind: str = "F32"
    head_dim: int | None = None

    @property
    def width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in transformers."""
        query, key = self.heads * self.width, self.kv_heads * self.width
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for i in range(self.layers):
            shapes |= {
                f"model.layers.{i}.input_layernorm.weight": (self.hidden,),
                f"model.layers.{i}.self_attn.q_proj.weight": (query, self.hidden),
                f"model.layers.{i}.self_attn.k_proj.weight": (key, self.hidden),
                f"model.layers.{i}.self_attn.v_proj.weight": (key, self.hidden),
                f"model.layers.{i}.self_attn.o_proj.weight": (self.hidden, query),
                f"model.layers.{i}.post_attention_layernorm.weight": (self.hidden,),
                f"model.layers.{i}.mlp.gate_proj.weight": (self.ffn, self.hidden),
                f"model.layers.{i}.mlp.up_proj.weight": (self.ffn, self.hidden),
                f"model.layers.{i}.mlp.down_proj.weight": (self.hidden, self.ffn),
            }
        return shapes if self.tied else {**shapes, "lm_head.weight": (self.vocabulary, self.hidden)}

    def weights(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(5)
        return {name: rng.standard_normal(shape, np.float32) for name, shape in self.shapes().items()}


def gguf_name(name: str, layers: int) -> str:
    stem = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers).get_name(name.removesuffix(".weight"))
    assert stem is not None
    return f"{stem}.weight"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def raw_blocks(kind: str, blocks: int, fill: Callable[[int], np.ndarray]) -> np.ndarray:
    """Any bits at all, but for the exponents of the float16 scales, which are small: what is decoded is finite."""
    _, size_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = fill(blocks * size_bytes).astype(np.uint8).reshape(blocks, size_bytes)
    for offset in HALVES.get(kind, ()):
        raw[:, offset + 1] = raw[:, offset + 1] & 0x8F | 0x20
    return raw


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    if values.ndim == 1:
        return values
    if kind in RAW_TYPES:
        size, _ = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        rng = np.random.default_rng(values.size)
        return raw_blocks(kind, values.size // size, lambda count: rng.integers(0, 256, count)).reshape(values.shape[0], -1)
    return gguf.quants.quantize(values, GGMLQuantizationType[kind])


def describe(writer: GGUFWriter, llama: Llama) -> None:
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(llama.hidden)
    writer.add_block_count(llama.layers)
    writer.add_feed_forward_length(llama.ffn)
    writer.add_head_count(llama.heads)
    writer.add_head_count_kv(llama.kv_heads)
    writer.add_rope_dimension_count(llama.width)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(llama.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<bos>", "<eos>", *(chr(ord("a") + i) for i in range(26)), "ab", "abc"]
    tokens += [f"<{i}>" for i in range(llama.vocabulary - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def write(
    path: Path,
    llama: Llama,
    *,
    change: Callable[[GGUFWriter], None] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
    leave_out: str = "",
    endianness: GGUFEndian = GGUFEndian.LITTLE,
) -> Path:
    """A GGUF file as convert_hf_to_gguf.py and llama-quantize leave it: rows of q and k permuted, vectors in F32."""
    writer = GGUFWriter(path, architecture, endianess=endianness)
    describe(writer, llama)
    if change:
        change(writer)
    for name, values in llama.weights().items():
        stored = gguf_name(name, llama.layers)
        if stored == leave_out:
            continue
        if "q_proj" in name or "k_proj" in name:
            values = permute(values, llama.heads if "q_proj" in name else llama.kv_heads)
        encoded = encode(values, llama.kind)
        writer.add_tensor(stored, encoded, raw_dtype=GGMLQuantizationType[llama.kind] if values.ndim == 2 else None)
    for stored, values in (more or {}).items():
        writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_of(kind: str, **changes: Any) -> Llama:
    """Columns are a multiple of the block: 256 for the K types, 32 for the others, anything for those without blocks."""
    if kind in RAW_TYPES:
        return Llama(hidden=256, ffn=512, layers=1, kind=kind, **changes)
    if kind in ("F32", "F16", "BF16"):
        return Llama(hidden=20, heads=2, kv_heads=1, ffn=37, vocabulary=41, kind=kind, **changes)
    return Llama(kind=kind, **changes)


def whole(file: GgufFile, name: str) -> np.ndarray:
    return file.read(name, 0, file.tensors[name].spec.shape[0])


def as_transformers_reads(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config, defaults spelled out, and the tensors, both through transformers' own loader."""
    described = load_gguf_checkpoint(str(path))["config"]
    config = transformers.LlamaConfig(**described)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    return config.to_dict(), {name: tensor.numpy() for name, tensor in tensors.items()}


# Tensors


@pytest.mark.parametrize("kind", TYPES)
def test_transformers_reads_the_same_tensors_under_the_same_names(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "tiny.gguf", llama_of(kind))
    file = open_gguf(path)
    _, expected = as_transformers_reads(path)
    assert {name: tensor.spec.shape for name, tensor in file.tensors.items()} == {name: values.shape for name, values in expected.items()}
    assert {tensor.spec.dtype for tensor in file.tensors.values()} == {"F32"}
    for name, values in expected.items():
        found = whole(file, name)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found, values, err_msg=name, strict=True)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, None), (4, 2, None), (4, 1, None), (3, 1, None), (1, 1, None), (5, 5, 2), (4, 2, 22)],
    ids=["every head its own", "grouped", "one key", "three heads", "one head", "heads of two rows", "heads wider than the model says"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_the_file_was_made_of_comes_back_to_the_bit(
    tmp_path: Path, heads: int, kv_heads: int, head_dim: int | None, tied: bool
) -> None:
    llama = Llama(hidden=72, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=1, ffn=7, vocabulary=43, tied=tied)
    file = open_gguf(write(tmp_path / "tiny.gguf", llama))
    weights = llama.weights()
    assert file.tensors.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(whole(file, name), values, err_msg=name, strict=True)


def test_transformers_computes_the_same_logits_from_the_config_and_tensors_read_here(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", llama_of("Q8_0", tied=True))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name, dtype=torch.float32)
    file = open_gguf(path)
    mine = transformers.LlamaForCausalLM(transformers.LlamaConfig(**file.config()))
    mine.load_state_dict({name: torch.from_numpy(whole(file, name)) for name in file.tensors}, strict=False)
    mine.tie_weights()
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        torch.testing.assert_close(mine(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-6)


@pytest.fixture(scope="module", params=["F32", "Q4_1", "Q6_K"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufFile, dict[str, np.ndarray]]:
    file = open_gguf(write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", llama_of(request.param)))
    return file, {name: whole(file, name) for name in file.tensors}


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_rows_are_those_of_the_whole_wherever_they_begin_and_end(
    opened: tuple[GgufFile, dict[str, np.ndarray]], data: st.DataObject
) -> None:
    file, expected = opened
    name = data.draw(st.sampled_from([FIRST_QUERY, FIRST_KEY, *expected]))
    rows = expected[name].shape[0]
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    np.testing.assert_array_equal(file.read(name, start, stop), expected[name][start:stop], strict=True)


def test_every_range_that_splits_a_head_is_read(opened: tuple[GgufFile, dict[str, np.ndarray]]) -> None:
    file, expected = opened
    width = file.config()["head_dim"]
    assert file.tensors[FIRST_QUERY].heads > file.tensors[FIRST_KEY].heads
    for name in (FIRST_QUERY, FIRST_KEY):
        for start in (0, 1, width // 2, width - 1):
            for stop in range(start, expected[name].shape[0] + 1):
                np.testing.assert_array_equal(file.read(name, start, stop), expected[name][start:stop])


def test_what_is_read_belongs_to_the_caller(tmp_path: Path) -> None:
    file = open_gguf(write(tmp_path / "tiny.gguf", Llama(layers=1)))
    first = whole(file, FIRST_QUERY)
    assert first.flags.owndata
    assert first.flags.writeable
    assert first.flags.c_contiguous
    first[:] = 0
    assert whole(file, FIRST_QUERY).any()


#: sha256 of the float32s that dequantize_row_<type> of libggml-base 0.25.3 (llama.cpp) makes of ``GOLDEN_BYTES`` in that type.
GOLDEN = {
    "F16": "231d84db9882d37427167b1d28d120167c0ce2b4364ec7e4cae92be0534b7e12",
    "BF16": "cde92de0191f8d74e592a5009e8e5081003741a8207397b1a644c9294bdd785a",
    "Q8_0": "19b56eb3a4120edc7279b6c33e4a8ec7a2f4485dc1e737864dc287efb472758f",
    "Q4_0": "adcb29cf1b0de44f23817b9cc3172aa9d6445b49191b5f02260bb81f8c476dd7",
    "Q4_1": "91439e83e81552bb845146455a527d2aba4c7da08ddc7a82dd1d611e9d078c6e",
    "Q4_K": "14bd25c2d023a6a9ec346f89e384a6d81940b68b418db7dded44ee16bf909e5f",
    "Q5_K": "26192cd0802f12e1a5c0693fe5c204e27ff77132377440286c285c5d4a7b2f6e",
    "Q6_K": "712b4bf1a75017f391a77d71b7727936e9fbb1f259da130eeca12d142d57cf63",
}


def golden_bytes(count: int) -> np.ndarray:
    i = np.arange(count)
    return (i * i * 7 + i * 13 + 5) % 251


@pytest.mark.parametrize("kind", GOLDEN)
def test_blocks_are_decoded_as_llama_cpp_decodes_them(tmp_path: Path, kind: str) -> None:
    size, size_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = 16 if size > 1 else 512
    raw = raw_blocks(kind, blocks, golden_bytes).reshape(8, -1)
    llama = llama_of(kind)

    def add(writer: GGUFWriter) -> None:
        values = raw.view(np.float16) if kind == "F16" else raw
        writer.add_tensor("output.weight", values, raw_dtype=GGMLQuantizationType[kind])

    file = open_gguf(write(tmp_path / "tiny.gguf", replace(llama, tied=True), change=add))
    assert file.tensors["lm_head.weight"].size_bytes == blocks * size_bytes
    assert hashlib.sha256(whole(file, "lm_head.weight").tobytes()).hexdigest() == GOLDEN[kind]


def test_every_type_that_is_read_has_its_golden_bytes_or_is_float32() -> None:
    assert {*GOLDEN, "F32"} == set(TYPES)


# Config


@pytest.mark.parametrize(
    "llama",
    [Llama(), Llama(tied=True), Llama(kv_heads=4), Llama(heads=2, kv_heads=1, head_dim=22)],
    ids=["grouped", "tied", "plain", "wide heads"],
)
def test_the_config_is_the_one_transformers_derives(tmp_path: Path, llama: Llama) -> None:
    path = write(tmp_path / "tiny.gguf", llama)
    config = open_gguf(path).config()
    expected, _ = as_transformers_reads(path)
    assert config["rms_norm_eps"] == 1e-5, "the decimal that somebody wrote, not the float32 nearest to it"
    assert expected.pop("rms_norm_eps") == pytest.approx(config.pop("rms_norm_eps"), rel=1e-6)
    assert config.pop("architectures") == ["LlamaForCausalLM"]
    assert config.pop("rope_theta") == expected["rope_parameters"]["rope_theta"] == 500_000.0
    assert config == {key: expected[key] for key in config}
    assert config["tie_word_embeddings"] is llama.tied


def test_a_padding_token_is_kept_and_what_is_not_there_is_not_invented(tmp_path: Path) -> None:
    config = open_gguf(write(tmp_path / "padded.gguf", Llama(layers=1), change=lambda writer: writer.add_pad_token_id(7))).config()
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 1, 7)
    assert "pad_token_id" not in open_gguf(write(tmp_path / "plain.gguf", Llama(layers=1))).config()


@pytest.mark.parametrize("missing", ["head_count_kv", "freq_base"])
def test_what_llama_cpp_lets_a_file_leave_out_has_its_default(tmp_path: Path, missing: str) -> None:
    llama = Llama(layers=1, kv_heads=4)
    config = open_gguf(write(tmp_path / "tiny.gguf", llama, change=lambda writer: drop(writer, missing))).config()
    assert config["num_key_value_heads"] == 4
    assert config["rope_theta"] == (10_000.0 if missing == "freq_base" else 500_000.0)


def drop(writer: GGUFWriter, ending: str) -> None:
    for fields in writer.kv_data:
        for key in [key for key in fields if key.endswith(ending)]:
            del fields[key]


def put(key: str, value: object) -> Callable[[GGUFWriter], None]:
    """Sets a key, whatever was there before, in the GGUF type that fits the value."""

    def change(writer: GGUFWriter) -> None:
        drop(writer, key)
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)

    return change


ARRAYS = {
    "strings": ["", "a", "\u00fc" * 300],
    "numbers": [1, 2, 3],
    "fractions": [0.5, -1.0],
    "truths": [True, False],
    "one": [7],
}


def test_metadata_is_what_the_package_itself_reads(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        for name, values in ARRAYS.items():
            writer.add_key_value(f"general.{name}", values, gguf.GGUFValueType.ARRAY)

    path = write(tmp_path / "tiny.gguf", Llama(layers=1), change=add)
    fields = open_gguf(path).fields
    theirs = gguf.GGUFReader(path).fields
    assert {name: fields[name] for name in theirs if name in fields} == {name: theirs[name].contents() for name in theirs if name in fields}
    assert {f"general.{name}" for name in ARRAYS} <= fields.keys()


# Refusals

ROW = np.zeros((1, 64), np.float32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another family": ({"architecture": "qwen2"}, "qwen2 family"),
    "experts": ({"change": lambda writer: writer.add_expert_count(8)}, "experts"),
    "linear rope scaling": ({"change": lambda writer: writer.add_rope_scaling_type(RopeScalingType.LINEAR)}, "scaled rotary"),
    "yarn": ({"change": lambda writer: writer.add_rope_scaling_type(RopeScalingType.YARN)}, "scaled rotary"),
    "a scaling factor without a type, which llama.cpp takes for linear": (
        {"change": lambda writer: writer.add_rope_scaling_factor(4.0)},
        "scaled rotary",
    ),
    "a scaling factor under its old name": ({"change": put("llama.rope.scale_linear", 4.0)}, "scaled rotary"),
    "Llama 3.1's scaled frequencies": ({"more": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rope_freqs.weight"),
    "partial rotary embeddings": ({"change": put("llama.rope.dimension_count", 8)}, "rope.dimension_count is 8"),
    "keys of another width": ({"change": put("llama.attention.key_length", 32)}, "key_length is 32"),
    "one part of several": ({"change": put("split.count", 3)}, "split"),
    "a bias": ({"more": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "blk.0.attn_q.bias"),
    "an expert's tensor": ({"more": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 3, 64), np.float32)}}, "ffn_gate_exps"),
    "an unknown tensor at the top": ({"more": {"output_extra.weight": ROW}}, "output_extra.weight"),
    "an unknown tensor in a block": ({"more": {"blk.0.attn_sinks.weight": ROW}}, "attn_sinks"),
    "a tensor that is a block": ({"more": {"blk.0.weight": ROW}}, "blk.0.weight"),
    "a block without a number": ({"more": {"blk.x.attn_q.weight": ROW}}, "blk.x.attn_q.weight"),
    "a block with a number that is spelled oddly": ({"more": {"blk.00.attn_q.weight": ROW}}, "blk.00.attn_q.weight"),
    "a path for a block": ({"more": {"blk.../../etc.attn_q.weight": ROW}}, "would be lost"),
    "a name without an end": ({"more": {"output_norm": np.ones(64, np.float32)}}, "output_norm"),
    "an unsupported type": ({"more": {"output.weight": gguf.quants.quantize(ROW, GGMLQuantizationType.Q5_0)}, "raw": "Q5_0"}, "type Q5_0"),
    "integers": ({"more": {"output.weight": np.zeros((1, 64), np.int32)}}, "type I32"),
    "a cube": ({"more": {"output.weight": np.zeros((2, 3, 64), np.float32)}}, "[2, 3, 64]"),
    "no embedding": ({"leave_out": "token_embd.weight"}, "token_embd.weight is missing"),
    "no blocks": ({"leave_out": "blk.0.attn_q.weight"}, "blk.0.attn_q.weight is missing"),
    "no number of heads": ({"change": lambda writer: drop(writer, "head_count")}, "head_count is missing"),
    "a number of heads for every layer": ({"change": put("llama.attention.head_count", [4, 4])}, "head_count is [4, 4]"),
    "a word for the number of heads": ({"change": put("llama.attention.head_count_kv", "two")}, "head_count_kv is 'two'"),
    "no heads": ({"change": put("llama.attention.head_count", 0)}, "head_count is 0"),
    "half a head": ({"change": put("llama.attention.head_count_kv", 0.5)}, "head_count_kv is 0.5"),
    "heads that do not divide the rows": ({"change": put("llama.attention.head_count", 7)}, "not 7 heads"),
    "heads of an odd width": ({"change": put("llama.attention.head_count", 64)}, "not 64 heads of an even width"),
    "the other byte order": ({"endianness": GGUFEndian.BIG}, "byte order"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_lost_or_misread_is_refused_by_name(tmp_path: Path, case: str) -> None:
    arguments, reason = REFUSED[case]
    arguments = dict(arguments)
    if kind := arguments.pop("raw", None):
        (stored,) = arguments.pop("more").items()
        arguments["change"] = lambda writer: writer.add_tensor(*stored, raw_dtype=GGMLQuantizationType[kind])
    path = write(tmp_path / "tiny.gguf", Llama(layers=1, tied=True), **arguments)
    with pytest.raises(FormatError) as raised:
        open_gguf(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert reason in str(raised.value)


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_a_scaling_factor_that_scales_nothing_is_no_scaling(tmp_path: Path, factor: float) -> None:
    llama = Llama(layers=1)
    path = write(tmp_path / "tiny.gguf", llama, change=lambda writer: writer.add_rope_scaling_factor(factor))
    assert open_gguf(path).tensors.keys() == llama.shapes().keys()


@pytest.mark.parametrize("key", ["embedding_length", "feed_forward_length", "block_count", "context_length", "layer_norm_rms_epsilon"])
def test_a_config_that_lacks_a_number_is_refused_by_its_key(tmp_path: Path, key: str) -> None:
    missing = open_gguf(write(tmp_path / "missing.gguf", Llama(layers=1), change=lambda writer: drop(writer, key)))
    with pytest.raises(FormatError, match=f"{key} is missing"):
        missing.config()

    def misspell(writer: GGUFWriter) -> None:
        (full,) = [known for known in writer.kv_data[0] if known.endswith(f".{key}")]
        put(full, "many")(writer)

    misspelled = open_gguf(write(tmp_path / "misspelled.gguf", Llama(layers=1), change=misspell))
    with pytest.raises(FormatError, match=f"{key} is 'many'"):
        misspelled.config()


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", Llama(layers=1, ffn=32, hidden=32, vocabulary=32))
    content = path.read_bytes()
    last = max(tensor.start + tensor.size_bytes for tensor in open_gguf(path).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 2_500, 41), *range(2_500, last, 4_999), last - 1]:
        cut.write_bytes(content[:length])
        with pytest.raises(FormatError, match=r"cut\.gguf: not a readable GGUF file"):
            open_gguf(cut)


def test_a_file_that_shrinks_after_it_was_opened_is_refused_when_read(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", Llama(layers=1))
    file = open_gguf(path)
    name = max(file.tensors, key=lambda name: file.tensors[name].start)
    with path.open("r+b") as stream:
        stream.truncate(file.tensors[name].start + 4)
    with pytest.raises(FormatError, match="ends early"):
        whole(file, name)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0", b"PK\x03\x04" * 20, b"\0" * 64, b"GGUF" + b"\xff" * 60], ids=repr)
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.gguf: not a readable GGUF file"):
        open_gguf(path)


@pytest.mark.parametrize("make", [lambda _: None, Path.mkdir], ids=["missing", "a folder"])
def test_what_cannot_be_opened_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=r"model\.gguf: not a readable GGUF file"):
        open_gguf(tmp_path / "model.gguf")


def number(value: int, size_bytes: int) -> bytes:
    return value.to_bytes(size_bytes, "little")


HEAD = b"GGUF" + number(3, 4) + number(0, 8)
HOSTILE = {
    "an array of 2**60 numbers": HEAD + number(1, 8) + number(1, 8) + b"k" + number(9, 4) + number(0, 4) + number(2**60, 8),
    "an array of 2**60 strings": HEAD + number(1, 8) + number(1, 8) + b"k" + number(9, 4) + number(8, 4) + number(2**60, 8),
    "a string in an array that is longer than the file": HEAD
    + number(1, 8)
    + number(1, 8)
    + b"k"
    + number(9, 4)
    + number(8, 4)
    + number(1, 8)
    + number(2**62, 8)
    + b"k",
    "arrays within arrays, ten thousand deep": HEAD
    + number(1, 8)
    + number(1, 8)
    + b"k"
    + number(9, 4)
    + (number(9, 4) + number(1, 8)) * 10_000,
    "2**63 keys": HEAD + number(2**63, 8),
    "2**63 tensors": b"GGUF" + number(3, 4) + number(2**63, 8) + number(0, 8),
    "a key of 2**64 - 1 letters": HEAD + number(1, 8) + number(2**64 - 1, 8) + b"k",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_claims_more_than_the_file_has_is_refused_at_once(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(FormatError, match=r"model\.gguf: not a readable GGUF file"):
        open_gguf(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int, Path]:
    """A good file's bytes, how many of them come before the first tensor, and where to write variations."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = write(folder / "good.gguf", Llama(layers=1, hidden=32, ffn=32, vocabulary=32, kind="Q8_0"))
    return path.read_bytes(), min(tensor.start for tensor in open_gguf(path).tensors.values()), folder / "fuzzed.gguf"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_header_changed_at_random_is_refused_or_read_and_nothing_else(small: tuple[bytes, int, Path], data: st.DataObject) -> None:
    content, header_bytes, path = small
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(8, header_bytes - 1))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\0", b"\x01"]))
        changed[start : start + len(new)] = new
    path.write_bytes(changed)
    try:
        file = open_gguf(path)
        file.config()
        for name in file.tensors:
            assert whole(file, name).shape == file.tensors[name].spec.shape
    except FormatError as error:
        assert str(path) in str(error)  # noqa: PT017  the other outcome is right as well
