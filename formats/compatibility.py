"""Which runtime loads which format and scheme on which hardware, and with what kind of kernel: a table, and how to ask it.

Every row says where it was read (``read: project:path``) or which run showed it (``seen: what, versions``). What is in no row is not
known; nothing is concluded from its neighbours. :func:`find` takes the first row that fits, of the newest version that has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.existing import ExistingLayer, read_quantization
from formats.safetensors import TensorSpec
from formats.scheme import SCHEMES

#: Kinds of kernels, best first, and what each does with a layer.
KERNELS = {
    "plain": "nothing is quantized",
    "native": "an 8-bit kernel multiplies 8-bit weights with 8-bit activations",
    "fused": "weights stay in 8 bit and are widened inside the product; activations are 16 bit",
    "dequantize": "weights are turned back into 16 bit before the product, for good or at every call",
    "emulated": "8-bit arithmetic is imitated, many times slower than 16 bit",
    "none": "it does not load, does not run, or gives wrong numbers",
}

CPUS = ("cpu", "cpu-vnni", "cpu-amx")
GPUS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
#: ``cpu-vnni``: AVX512-VNNI or AVX-VNNI, no AMX. ``sm_XX``: CUDA's compute capability.
HARDWARE = (*CPUS, *GPUS)

#: The format of a folder in which nothing is quantized, and its scheme.
PLAIN = "plain"


@dataclass(frozen=True)
class Shape:
    """A runtime refuses a layer unless its ``out`` and ``in`` features are multiples of these."""

    rows: int
    columns: int

    def holds(self, shape: tuple[int, int]) -> bool:
        return shape[0] % self.rows == 0 and shape[1] % self.columns == 0

    def __str__(self) -> str:
        needs = [f"{what} features in multiples of {n}" for what, n in (("output", self.rows), ("input", self.columns)) if n > 1]
        return " and ".join(needs)


@dataclass(frozen=True)
class Row:
    """``runtime`` in ``versions``, newest first, on any of ``hardware`` runs any of ``schemes`` in ``format`` by that kind of ``kernel``.

    ``evidence`` begins with ``read:`` or ``seen:``; ``note`` says why and what to do; ``shape`` is what the runtime wants of every layer.
    """

    runtime: str
    versions: tuple[str, ...]
    hardware: tuple[str, ...]
    format: str
    schemes: tuple[str, ...]
    kernel: str
    evidence: str
    note: str = ""
    shape: Shape | None = None


_W8A16_INT8 = ("int8-weight-only", "int8-weight-only-g32", "int8-weight-only-g64", "int8-weight-only-g128")
_W8A8_INT8 = ("int8-dynamic", "int8-dynamic-asymmetric", "int8-static")
_FP8_WHOLE = ("fp8-dynamic", "fp8-static")
#: What only checkpoints made elsewhere have: INT8 weights alone that are not packed, and a scale a tensor with dynamic activations.
UNPACKED, TENSOR_DYNAMIC = "int8-weight-only-unpacked", "fp8-tensor-dynamic"
#: What ends the name under which the table knows a scheme of experts, which readers hold and multiply together, by kernels of their own.
EXPERTS = "-experts"

_BEFORE_FP8 = ("sm_75", "sm_80", "sm_86")
_WITH_FP8 = ("sm_89", "sm_90", "sm_100", "sm_120")
_BEFORE_BLACKWELL = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")
_BLACKWELL = ("sm_100", "sm_120")
_ALL_CT = (*_W8A8_INT8, *_W8A16_INT8, UNPACKED, *_FP8_WHOLE, TENSOR_DYNAMIC, "fp8-weight-only", "fp8-block", "mxfp8")

_ALL_EXPERTS = tuple(f"{scheme}{EXPERTS}" for scheme in _ALL_CT)
_W8A16_EXPERTS = tuple(f"{scheme}{EXPERTS}" for scheme in _W8A16_INT8)
_FP8_EXPERTS = tuple(f"{scheme}{EXPERTS}" for scheme in _FP8_WHOLE)
_MERGED_EXPERTS = ("fp8-dynamic-experts", "fp8-weight-only-experts", *_W8A16_EXPERTS)

_CT = "vllm:vllm/model_executor/layers/quantization/compressed_tensors"
_VLLM_KERNELS = "vllm:vllm/model_executor/kernels/linear"
_VLLM = ("0.32", "0.24")
_VLLM_MOE = "vllm:vllm/model_executor/layers/fused_moe"
_CT_MOE = f"{_CT}/compressed_tensors_moe"
_SGLANG = "sglang:python/sglang/srt/layers/quantization"
_TF = "transformers:src/transformers/quantizers"
_RUN = "on AMD EPYC with AVX512-VNNI, 2026-11-23"
_H100 = "vLLM 0.24.0, torch 2.11.0+cu130, H100, 2026-11-24"
_WIDE = "weights and product are in 16 bit after the first forward: neither memory nor speed is won"
_KEEP_EXPERTS = "keep the experts with a rule"
_MERGING = "all experts of a layer become one float tensor at load: neither memory nor speed is won, and their inputs are not rounded"
_NO_SPEED = "decode is no faster than 16 bit, and the first forward slower"
_BLOCKS = Shape(128, 128)

_TRANSFORMERS = (
    # transformers 5.23 decompresses every layer at its first forward and imitates the activations' rounding.
    Row(
        "transformers",
        ("5.23", "5.19", "4.57.1"),
        ("cpu-vnni",),
        "compressed-tensors",
        ("int8-dynamic", "int8-static", "int8-weight-only", "int8-weight-only-g128", UNPACKED, *_FP8_WHOLE),
        "dequantize",
        f"seen: transformers 5.23, 5.19 and 4.57.1 {_RUN}",
        f"{_WIDE}; {_NO_SPEED}",
    ),
    Row(
        "transformers",
        ("5.23", "5.19", "4.57.1"),
        ("cpu-vnni",),
        "compressed-tensors",
        ("fp8-block",),
        "dequantize",
        f"seen: transformers 5.23, 5.19 and 4.57.1 {_RUN}; 576 columns were refused",
        f"{_WIDE}; {_NO_SPEED}",
        _BLOCKS,
    ),
    Row(
        "transformers",
        ("5.23",),
        ("cpu-vnni",),
        "compressed-tensors",
        ("int8-dynamic-asymmetric", "int8-weight-only-g64", "fp8-weight-only"),
        "dequantize",
        f"seen: transformers 5.23 {_RUN}",
        f"{_WIDE}; {_NO_SPEED}",
    ),
    Row(
        "transformers",
        ("5.23",),
        HARDWARE,
        "compressed-tensors",
        tuple(scheme for scheme in _ALL_CT if scheme != "fp8-block"),
        "dequantize",
        f"read: {_TF}/quantizer_compressed_tensors.py, compressed-tensors:src/compressed_tensors/compressors",
        f"{_WIDE}; {_NO_SPEED}; on sm_89 and newer use_optimized_inference=True takes FP8 kernels",
    ),
    Row(
        "transformers",
        ("5.23",),
        HARDWARE,
        "compressed-tensors",
        ("fp8-block",),
        "dequantize",
        f"read: {_TF}/quantizer_compressed_tensors.py, compressed-tensors:src/compressed_tensors/quantization/lifecycle/forward_helpers.py",
        f"{_WIDE}; {_NO_SPEED}; on sm_89 and newer use_optimized_inference=True takes FP8 kernels",
        _BLOCKS,
    ),
    Row(
        "transformers",
        ("5.23",),
        ("cpu-vnni",),
        "compressed-tensors",
        _MERGED_EXPERTS,
        "dequantize",
        f"seen: transformers 5.23 {_RUN}, small Mixtral, Qwen and DeepSeek models",
        _MERGING,
    ),
    Row(
        "transformers",
        ("5.23",),
        HARDWARE,
        "compressed-tensors",
        _MERGED_EXPERTS,
        "dequantize",
        "read: transformers:src/transformers/integrations/compressed_tensors.py (CompressedTensorsDequantize)",
        _MERGING,
    ),
    Row(
        "transformers",
        ("5.23",),
        HARDWARE,
        "compressed-tensors",
        tuple(scheme for scheme in _ALL_EXPERTS if scheme not in _MERGED_EXPERTS),
        "none",
        f"seen: transformers 5.23 {_RUN}: issues during automatic conversion; read: transformers:src/transformers/integrations/"
        "compressed_tensors.py (CompressedTensorsDequantize takes FP8 with scales a channel and packed INT8)",
        f"it makes one float tensor of a layer's experts, and only from some schemes; {_KEEP_EXPERTS}, or choose fp8-dynamic or "
        "int8-weight-only for them. Those of Llama 4 become Linear modules and load",
    ),
    Row(
        "transformers",
        ("5.23",),
        ("cpu-vnni",),
        "fp8",
        ("fp8-block",),
        "dequantize",
        f"seen: transformers 5.23 {_RUN}; 192 rows were read with wrong scales",
        f"without a GPU the weights become bfloat16 at load; {_NO_SPEED}",
        _BLOCKS,
    ),
    Row(
        "transformers",
        ("5.23",),
        (*CPUS, *_BEFORE_FP8),
        "fp8",
        ("fp8-block",),
        "dequantize",
        f"read: {_TF}/quantizer_finegrained_fp8.py",
        f"below sm_89 the weights become bfloat16 at load; {_NO_SPEED}",
        _BLOCKS,
    ),
    Row(
        "transformers",
        ("5.23",),
        _WITH_FP8,
        "fp8",
        ("fp8-block",),
        "native",
        f"read: {_TF}/quantizer_finegrained_fp8.py, transformers:src/transformers/integrations/finegrained_fp8.py",
        shape=_BLOCKS,
    ),
    Row(
        "transformers",
        ("4.57.1",),
        CPUS,
        "fp8",
        ("fp8-block",),
        "none",
        f"seen: transformers 4.57.1 {_RUN}: No GPU or XPU found",
        "4.57.1 wants a GPU; compressed-tensors loads there",
    ),
    Row(
        "transformers",
        ("5.23",),
        HARDWARE,
        "modelopt",
        ("fp8-static", "fp8-dynamic", "fp8-block", "mxfp8"),
        "none",
        f"seen: transformers 5.23 {_RUN}: it drops the scales without an error",
        "transformers has no reader of ModelOpt and takes the codes for weights; write compressed-tensors for it",
    ),
    Row(
        "transformers",
        ("5.23",),
        ("cpu-vnni",),
        "torchao",
        ("int8-weight-only", "fp8-weight-only"),
        "dequantize",
        f"seen: transformers 5.23 with torchao 0.18 {_RUN}",
        "weights are widened at every call, so decode is no faster than 16 bit unless the model is compiled",
    ),
    Row(
        "transformers",
        ("5.23",),
        ("cpu-vnni",),
        "torchao",
        ("int8-dynamic",),
        "native",
        f"seen: transformers 5.23 with torchao 0.18 {_RUN}; kernel read in torchao:torchao/kernel/intmm.py",
    ),
    Row(
        "transformers",
        ("5.23",),
        (*CPUS, *_BEFORE_FP8),
        "torchao",
        ("fp8-dynamic",),
        "none",
        "read: torchao:torchao/quantization/quant_api.py (asserts sm_89); seen on CPU: requires CUDA >= 8.9",
        "FP8 activations of torchao want sm_89; fp8-weight-only loads",
    ),
    Row(
        "transformers",
        ("5.23",),
        _WITH_FP8,
        "torchao",
        ("fp8-dynamic",),
        "native",
        "read: torchao:torchao/quantization/quant_api.py (from sm_89), torchao:torchao/float8/inference.py (torch._scaled_mm)",
    ),
)

_BITSANDBYTES = (
    Row(
        "bitsandbytes",
        ("0.50.2", "0.48.2"),
        ("cpu-vnni",),
        "bitsandbytes",
        ("llm-int8",),
        "native",
        f"seen: bitsandbytes 0.50.2 with transformers 5.23, 0.48.2 with 4.57.1, {_RUN}; kernel read in "
        "bitsandbytes:bitsandbytes/backends/cpu/ops.py",
    ),
    Row(
        "bitsandbytes",
        ("0.50.2",),
        ("cpu-amx",),
        "bitsandbytes",
        ("llm-int8",),
        "native",
        "read: bitsandbytes:bitsandbytes/backends/cpu/ops.py (torch._int_mm where there is AVX-512)",
    ),
    Row(
        "bitsandbytes",
        ("0.50.2",),
        ("cpu",),
        "bitsandbytes",
        ("llm-int8",),
        "emulated",
        "read: bitsandbytes:bitsandbytes/backends/cpu/ops.py, bitsandbytes/backends/default/ops.py",
        "without AVX-512 the codes are multiplied as floats; choose another format for this CPU",
    ),
    Row(
        "bitsandbytes",
        ("0.50.2",),
        ("sm_90",),
        "bitsandbytes",
        ("llm-int8",),
        "native",
        "seen: bitsandbytes 0.50.2 with transformers 5.17 on an H100, 2026-11-24",
        "prefill at a third of bfloat16's speed and decode at a fifth, at 8B (docs/serving.md): it saves memory, not time",
    ),
    Row(
        "bitsandbytes",
        ("0.50.2",),
        GPUS,
        "bitsandbytes",
        ("llm-int8",),
        "native",
        "read: bitsandbytes:docs/source/installation.mdx (LLM.int8() from 7.5; sm_100 and sm_120 from CUDA 12.8), "
        "bitsandbytes:bitsandbytes/backends/cuda/ops.py",
    ),
)

_VLLM_CPU = (
    Row(
        "vllm",
        ("0.32",),
        ("cpu-vnni",),
        "compressed-tensors",
        ("int8-dynamic", "int8-dynamic-asymmetric", "int8-static"),
        "native",
        f"seen: vllm-cpu 0.32.0 {_RUN}: CPUInt8ScaledMMLinearKernel, 32 tokens in 0.63 to 0.70 s against 0.98 s in bfloat16",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu-amx",),
        "compressed-tensors",
        ("int8-dynamic", "int8-dynamic-asymmetric", "int8-static"),
        "native",
        f"read: {_VLLM_KERNELS}/scaled_mm/cpu.py (CPUInt8ScaledMMLinearKernel asks for a CPU only)",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu-vnni",),
        "compressed-tensors",
        ("fp8-dynamic",),
        "emulated",
        f"seen: vllm-cpu 0.32.0 {_RUN}: 32 tokens in 17 to 40 s against 0.98 s in bfloat16",
        "this CPU has no FP8 product; int8-dynamic is faster than bfloat16 there",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu-amx",),
        "compressed-tensors",
        ("fp8-dynamic",),
        "emulated",
        f"read: {_VLLM_KERNELS}/scaled_mm/cpu.py (CPUFP8W8A8ScaledMMLinearKernel wants AMX-FP8, which AMX before Diamond Rapids lacks)",
        "this CPU has no FP8 product; int8-dynamic has a kernel there",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu-vnni",),
        "compressed-tensors",
        ("fp8-static",),
        "none",
        f"seen: vllm-cpu 0.32.0 {_RUN}: _C::static_scaled_fp8_quant is missing",
        "the CPU build lacks the operation for per-tensor FP8; int8-dynamic and fp8-dynamic load",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu", "cpu-vnni"),
        "compressed-tensors",
        ("fp8-block",),
        "none",
        f"seen: vllm-cpu 0.32.0 {_RUN}; read: {_VLLM_KERNELS}/scaled_mm/cpu.py: requires AMX tile support",
        "block FP8 wants AMX; int8-dynamic loads",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu-amx",),
        "compressed-tensors",
        ("fp8-block",),
        "fused",
        f"read: {_VLLM_KERNELS}/scaled_mm/cpu.py (CPUFp8BlockScaledMMKernel: activations stay in bfloat16)",
        shape=_BLOCKS,
    ),
    Row(
        "vllm",
        ("0.32",),
        CPUS,
        "compressed-tensors",
        ("fp8-weight-only",),
        "none",
        f"seen: vllm-cpu 0.32.0 {_RUN}; read: {_VLLM_KERNELS}/__init__.py (_POSSIBLE_WFP8A16_KERNELS has none for CPU)",
        "no kernel for FP8 weights alone on a CPU; int8-dynamic loads",
    ),
    Row(
        "vllm",
        ("0.32",),
        CPUS,
        "compressed-tensors",
        _W8A16_INT8,
        "none",
        f"seen: vllm-cpu 0.32.0 {_RUN}: Quant type (uint8b128) not supported; read: {_VLLM_KERNELS}/mixed_precision/cpu.py",
        "its weight-only kernels for CPUs are of 4 bit; int8-dynamic loads",
    ),
    Row(
        "vllm",
        ("0.32",),
        CPUS,
        "compressed-tensors",
        ("mxfp8",),
        "none",
        f"read: {_VLLM_KERNELS}/__init__.py (_POSSIBLE_MXFP8_KERNELS has none for CPU)",
        "no MXFP8 kernel for CPUs; int8-dynamic loads",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu", "cpu-vnni"),
        "fp8",
        ("fp8-block",),
        "none",
        f"seen: vllm-cpu 0.32.0 {_RUN}; read: {_VLLM_KERNELS}/scaled_mm/cpu.py: requires AMX tile support",
        "block FP8 wants AMX; compressed-tensors with int8-dynamic loads",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu-amx",),
        "fp8",
        ("fp8-block",),
        "fused",
        f"read: {_VLLM_KERNELS}/scaled_mm/cpu.py (CPUFp8BlockScaledMMKernel: activations stay in bfloat16)",
        shape=_BLOCKS,
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu-vnni",),
        "modelopt",
        ("fp8-static",),
        "none",
        f"seen: vllm-cpu 0.32.0 {_RUN}: _C::static_scaled_fp8_quant is missing",
        "the CPU build lacks the operation for per-tensor FP8; compressed-tensors with int8-dynamic loads",
    ),
)

_VLLM_CUDA = (
    Row(
        "vllm",
        _VLLM,
        (*CPUS, *GPUS),
        "compressed-tensors",
        (UNPACKED,),
        "none",
        f"seen: vllm-cpu 0.32.0 {_RUN}: AssertionError; read: {_CT}/compressed_tensors.py (before any kernel is chosen)",
        "vLLM reads INT8 weights alone as pack-quantized only; write int8-weight-only anew",
    ),
    *(
        Row("vllm", ("0.24",), ("sm_90",), form, schemes, kernel, f"seen: {_H100}: {seen}", note)
        for form, schemes, kernel, seen, note in (
            (
                "compressed-tensors",
                ("int8-dynamic",),
                "native",
                "CutlassInt8ScaledMMLinearKernel, decode 1.5 times bfloat16 at 8B",
                "",
            ),
            (
                "compressed-tensors",
                ("int8-dynamic-asymmetric", "int8-static"),
                "native",
                "CutlassInt8ScaledMMLinearKernel",
                "",
            ),
            (
                "compressed-tensors",
                ("fp8-dynamic",),
                "native",
                "CutlassFP8ScaledMMLinearKernel, decode 1.5 times bfloat16 at 8B",
                "",
            ),
            ("compressed-tensors", ("fp8-static",), "native", "CutlassFP8ScaledMMLinearKernel", ""),
            ("compressed-tensors", ("int8-weight-only", "int8-weight-only-g128"), "fused", "MacheteLinearKernel", ""),
            (
                "compressed-tensors",
                ("fp8-weight-only",),
                "none",
                "Failed to find a kernel that can implement the ScaledMM linear layer",
                "0.32 loads it; with 0.24 choose fp8-dynamic, or set VLLM_TEST_FORCE_FP8_MARLIN=1",
            ),
            (
                "compressed-tensors",
                ("mxfp8",),
                "fused",
                "MarlinMxfp8LinearKernel",
                "MXFP8 products begin with Blackwell: Marlin widens the weights; fp8-dynamic has a kernel",
            ),
            ("modelopt", ("fp8-static",), "native", "CutlassFP8ScaledMMLinearKernel", ""),
        )
    ),
    Row(
        "vllm",
        _VLLM,
        _BEFORE_BLACKWELL,
        "compressed-tensors",
        _W8A8_INT8,
        "native",
        "read: vllm:csrc/quantization/w8a8/cutlass/scaled_mm_entry.cu (sm75, sm80, sm89, sm90), "
        f"{_CT}/schemes/compressed_tensors_w8a8_int8.py (from 7.5)",
    ),
    Row(
        "vllm",
        _VLLM,
        _BLACKWELL,
        "compressed-tensors",
        _W8A8_INT8,
        "none",
        "read: vllm:csrc/quantization/w8a8/cutlass/scaled_mm_c3x_sm120.cu and scaled_mm_c3x_sm100.cu (Int8 not supported), "
        f"{_VLLM_KERNELS}/scaled_mm/cutlass.py (takes the layer all the same); vllm-project/vllm issue 54311",
        "it loads and stops at the first forward; choose fp8-dynamic, "
        "or name sm_90 and serve with VLLM_DISABLED_KERNELS=CutlassInt8ScaledMMLinearKernel, which takes the Triton kernel (issue 54311)",
    ),
    Row(
        "vllm",
        _VLLM,
        GPUS,
        "compressed-tensors",
        _W8A16_INT8,
        "fused",
        f"read: {_CT}/schemes/compressed_tensors_wNa16.py (from 7.5), {_VLLM_KERNELS}/mixed_precision/marlin.py "
        "(groups of 32, 64, 128 or whole rows; ragged tiles are padded)",
    ),
    Row(
        "vllm",
        _VLLM,
        _BEFORE_FP8,
        "compressed-tensors",
        (*_FP8_WHOLE, TENSOR_DYNAMIC, "fp8-weight-only"),
        "fused",
        f"read: {_CT}/compressed_tensors.py (below 8.9 activations are left alone), "
        f"{_CT}/schemes/compressed_tensors_w8a16_fp8.py (from 7.5)",
        "there is no FP8 product before sm_89: Marlin widens the weights and prefill is not faster; int8-dynamic has a kernel",
    ),
    Row(
        "vllm",
        _VLLM,
        _WITH_FP8,
        "compressed-tensors",
        (*_FP8_WHOLE, TENSOR_DYNAMIC),
        "native",
        f"read: {_VLLM_KERNELS}/__init__.py and scaled_mm/cutlass.py, vllm:csrc/quantization/w8a8/cutlass/scaled_mm_entry.cu",
    ),
    Row(
        "vllm",
        ("0.32",),
        _WITH_FP8,
        "compressed-tensors",
        ("fp8-weight-only",),
        "fused",
        f"read: {_VLLM_KERNELS}/__init__.py (_POSSIBLE_WFP8A16_KERNELS) and scaled_mm/marlin.py",
    ),
    Row(
        "vllm",
        ("0.24",),
        _WITH_FP8,
        "compressed-tensors",
        ("fp8-weight-only",),
        "none",
        f"read: {_VLLM_KERNELS}/scaled_mm/marlin.py (refuses from 8.9), {_VLLM_KERNELS}/__init__.py (and is the only one)",
        "0.32 loads it; with 0.24 choose fp8-dynamic, or set VLLM_TEST_FORCE_FP8_MARLIN=1",
    ),
    *(
        Row("vllm", versions, hardware, form, ("fp8-block",), kernel, evidence, note, _BLOCKS)
        for form in ("compressed-tensors", "fp8")
        for versions, hardware, kernel, evidence, note in (
            (
                _VLLM,
                _BEFORE_FP8,
                "fused",
                f"read: {_VLLM_KERNELS}/__init__.py (_POSSIBLE_FP8_BLOCK_KERNELS) and scaled_mm/marlin.py",
                "there is no FP8 product before sm_89: Marlin widens the weights and prefill is not faster; int8-dynamic has a kernel",
            ),
            (
                ("0.32",),
                ("sm_89",),
                "fused",
                f"read: {_VLLM_KERNELS}/__init__.py (Marlin before Triton); vllm-project/vllm issue 58241",
                "CUTLASS has no block FP8 before sm_90, so Marlin widens the weights; fp8-dynamic has a kernel",
            ),
            (
                ("0.24",),
                ("sm_89",),
                "native",
                f"read: {_VLLM_KERNELS}/__init__.py and scaled_mm/marlin.py (refuses from 8.9, so Triton)",
                "",
            ),
            (
                ("0.24",),
                ("sm_90",),
                "native",
                f"seen: {_H100}: CutlassFp8BlockScaledMMKernel (FlashInfer's and DeepGEMM's, taken before it, are compiled on the spot)",
                "",
            ),
            (
                _VLLM,
                ("sm_90", "sm_100", "sm_120"),
                "native",
                f"read: {_VLLM_KERNELS}/__init__.py, vllm:csrc/quantization/w8a8/cutlass/scaled_mm_entry.cu and scaled_mm_c3x_sm120.cu",
                "",
            ),
        )
    ),
    Row(
        "vllm",
        _VLLM,
        _BEFORE_BLACKWELL,
        "compressed-tensors",
        ("mxfp8",),
        "fused",
        f"read: {_CT}/schemes/compressed_tensors_w8a8_mxfp8.py (from 7.5), {_VLLM_KERNELS}/mxfp8/marlin.py",
        "MXFP8 products begin with Blackwell: Marlin widens the weights; fp8-dynamic has a kernel from sm_89",
    ),
    Row(
        "vllm",
        ("0.32",),
        _BLACKWELL,
        "compressed-tensors",
        ("mxfp8",),
        "native",
        f"read: {_VLLM_KERNELS}/mxfp8/flashinfer.py (with FlashInfer installed; Marlin otherwise, or where a shape does not fit)",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("sm_75",),
        "modelopt",
        ("fp8-static",),
        "none",
        "read: vllm:vllm/model_executor/layers/quantization/modelopt.py (from 8.0)",
        "compressed-tensors with int8-dynamic loads there",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("sm_80", "sm_86"),
        "modelopt",
        ("fp8-static",),
        "fused",
        f"read: vllm:vllm/model_executor/layers/quantization/modelopt.py (from 8.0), {_VLLM_KERNELS}/__init__.py (Marlin is what is left)",
        "there is no FP8 product before sm_89; compressed-tensors with int8-dynamic has a kernel",
    ),
    Row(
        "vllm",
        ("0.24",),
        _BEFORE_FP8,
        "modelopt",
        ("fp8-static",),
        "none",
        "read: vllm:vllm/model_executor/layers/quantization/modelopt.py (from 8.9)",
        "compressed-tensors with int8-dynamic has a kernel there",
    ),
    Row(
        "vllm",
        _VLLM,
        _WITH_FP8,
        "modelopt",
        ("fp8-static",),
        "native",
        f"read: vllm:vllm/model_executor/layers/quantization/modelopt.py, {_VLLM_KERNELS}/scaled_mm/cutlass.py",
    ),
    Row(
        "vllm",
        ("0.32",),
        HARDWARE,
        "bitsandbytes",
        ("llm-int8",),
        "none",
        f"seen: vllm-cpu 0.32.0 {_RUN}: Unknown quantization method; read: vllm:vllm/model_executor/layers/quantization/__init__.py",
        "vLLM 0.32 has no bitsandbytes any more; write compressed-tensors",
    ),
)

_VLLM_EXPERTS = (
    *(
        Row("vllm", ("0.24",), ("sm_90",), form, schemes, kernel, f"seen: {_H100}, a small Mixtral: {seen}", note)
        for form, schemes, kernel, seen, note in (
            ("compressed-tensors", ("int8-dynamic-experts", "fp8-dynamic-experts", "fp8-block-experts"), "native", "FusedMoEKernel", ""),
            ("fp8", ("fp8-block-experts",), "native", "FusedMoEKernel", ""),
            (
                "compressed-tensors",
                ("int8-weight-only-experts", "int8-weight-only-g128-experts"),
                "none",
                "compressed_tensors_moe_wna16_marlin.py: assert self.group_size == -1",
                "it wants a group size that neither scheme has; choose int8-dynamic or fp8-dynamic",
            ),
        )
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu-vnni",),
        "compressed-tensors",
        ("int8-dynamic-experts",),
        "none",
        f"seen: vllm-cpu 0.32.0 {_RUN}: No Int8 MoE backend supports the deployment configuration; "
        f"read: {_VLLM_MOE}/experts/cpu_moe.py (CPUExpertsInt8 wants AMX)",
        f"its kernel for INT8 experts wants AMX; {_KEEP_EXPERTS}",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu",),
        "compressed-tensors",
        ("int8-dynamic-experts",),
        "none",
        f"read: {_VLLM_MOE}/experts/cpu_moe.py (CPUExpertsInt8 wants AMX), {_VLLM_MOE}/oracle/int8.py",
        f"its kernel for INT8 experts wants AMX; {_KEEP_EXPERTS}",
    ),
    Row(
        "vllm",
        ("0.32",),
        ("cpu-amx",),
        "compressed-tensors",
        ("int8-dynamic-experts",),
        "native",
        f"read: {_VLLM_MOE}/experts/cpu_moe.py (CPUExpertsInt8), {_VLLM_MOE}/oracle/int8.py",
        shape=Shape(32, 32),
    ),
    Row(
        "vllm",
        ("0.24",),
        CPUS,
        "compressed-tensors",
        ("int8-dynamic-experts",),
        "none",
        f"read: {_VLLM_MOE}/oracle/int8.py (Triton alone)",
        f"0.24 has no kernel for INT8 experts on a CPU; {_KEEP_EXPERTS}",
    ),
    *(
        Row(
            "vllm",
            _VLLM,
            CPUS,
            form,
            schemes,
            "none",
            f"read: {_VLLM_MOE}/oracle/fp8.py, {_VLLM_MOE}/experts/cpu_moe.py (FP8 in blocks alone)",
            f"no kernel for such FP8 experts on a CPU; {_KEEP_EXPERTS}",
        )
        for form, schemes in (("compressed-tensors", _FP8_EXPERTS), ("modelopt", ("fp8-static-experts",)))
    ),
    *(
        Row("vllm", _VLLM, hardware, form, ("fp8-block-experts",), kernel, f"read: {_VLLM_MOE}/{evidence}", note, _BLOCKS)
        for form in ("compressed-tensors", "fp8")
        for hardware, kernel, evidence, note in (
            (("cpu", "cpu-vnni"), "none", "experts/cpu_moe.py (CPUExpertsFp8 wants AMX)", f"block FP8 wants AMX; {_KEEP_EXPERTS}"),
            (("cpu-amx",), "fused", "experts/cpu_moe.py (CPUExpertsFp8: activations stay in bfloat16)", ""),
            (
                _BEFORE_FP8,
                "fused",
                "experts/marlin_moe.py (from 7.5)",
                "there is no FP8 product before sm_89: Marlin widens the weights; int8-dynamic has a kernel for experts",
            ),
            (_WITH_FP8, "native", "oracle/fp8.py, experts/triton_moe.py and deep_gemm_moe.py", ""),
        )
    ),
    Row(
        "vllm",
        _VLLM,
        CPUS,
        "compressed-tensors",
        _W8A16_EXPERTS,
        "none",
        f"read: {_VLLM_MOE}/oracle/int_wna16.py, {_VLLM_MOE}/experts/cpu_moe.py (CPUExpertsInt4 alone)",
        f"its weight-only kernels for experts on a CPU are of 4 bit; {_KEEP_EXPERTS}",
    ),
    Row(
        "vllm",
        _VLLM,
        CPUS,
        "compressed-tensors",
        ("mxfp8-experts",),
        "none",
        f"read: {_VLLM_MOE}/oracle/mxfp8.py (none for CPU)",
        f"no MXFP8 kernel for CPUs; {_KEEP_EXPERTS}",
    ),
    Row(
        "vllm",
        _VLLM,
        HARDWARE,
        "compressed-tensors",
        ("int8-static-experts",),
        "none",
        f"read: {_CT_MOE}/compressed_tensors_moe_w8a8_int8.py (Found static input scales)",
        "INT8 experts want dynamic activations; choose int8-dynamic for them",
    ),
    Row(
        "vllm",
        _VLLM,
        HARDWARE,
        "compressed-tensors",
        ("int8-dynamic-asymmetric-experts",),
        "none",
        f"read: {_CT_MOE}/compressed_tensors_moe_w8a8_int8.py (kInt8DynamicTokenSym: inputs of experts are always rounded symmetrically)",
        "it does not apply zero points to the inputs of experts; choose int8-dynamic for them",
    ),
    Row(
        "vllm",
        _VLLM,
        HARDWARE,
        "compressed-tensors",
        ("fp8-weight-only-experts", f"{UNPACKED}{EXPERTS}", f"{TENSOR_DYNAMIC}{EXPERTS}"),
        "none",
        f"read: {_CT_MOE}/compressed_tensors_moe.py (weights alone: pack-quantized only) and compressed_tensors_moe_w8a8_fp8.py",
        "experts of weights alone must be packed INT8, and FP8 ones have scales a channel and a token, a tensor and a tensor, or blocks; "
        "choose fp8-dynamic or int8-weight-only",
    ),
    Row(
        "vllm",
        _VLLM,
        GPUS,
        "compressed-tensors",
        ("int8-dynamic-experts",),
        "native",
        f"read: {_VLLM_MOE}/oracle/int8.py, {_VLLM_MOE}/experts/triton_moe.py (from 7.5, Blackwell too)",
    ),
    Row(
        "vllm",
        _VLLM,
        GPUS,
        "compressed-tensors",
        _W8A16_EXPERTS,
        "fused",
        f"read: {_VLLM_MOE}/oracle/int_wna16.py, {_VLLM_MOE}/experts/marlin_moe.py (from 7.5), {_CT_MOE}/compressed_tensors_moe.py",
    ),
    Row(
        "vllm",
        _VLLM,
        _BEFORE_FP8,
        "compressed-tensors",
        _FP8_EXPERTS,
        "fused",
        f"read: {_VLLM_MOE}/oracle/fp8.py, {_VLLM_MOE}/experts/marlin_moe.py (from 7.5)",
        "there is no FP8 product before sm_89: Marlin widens the weights; int8-dynamic has a kernel for experts",
    ),
    Row(
        "vllm",
        _VLLM,
        _WITH_FP8,
        "compressed-tensors",
        _FP8_EXPERTS,
        "native",
        f"read: {_VLLM_MOE}/oracle/fp8.py, {_VLLM_MOE}/experts/triton_moe.py and triton_cutlass_moe.py",
    ),
    Row(
        "vllm",
        _VLLM,
        (*_BEFORE_BLACKWELL, "sm_120"),
        "compressed-tensors",
        ("mxfp8-experts",),
        "fused",
        f"read: {_VLLM_MOE}/oracle/mxfp8.py (what is left is Marlin), {_VLLM_MOE}/experts/marlin_moe.py",
        "Marlin widens the weights; fp8-dynamic has a kernel for experts from sm_89",
    ),
    Row(
        "vllm",
        _VLLM,
        ("sm_100",),
        "compressed-tensors",
        ("mxfp8-experts",),
        "native",
        f"read: {_VLLM_MOE}/oracle/mxfp8.py, {_VLLM_MOE}/experts/deep_gemm_moe.py and trtllm_fp8_moe.py",
    ),
    Row(
        "vllm",
        _VLLM,
        _WITH_FP8,
        "modelopt",
        ("fp8-static-experts",),
        "native",
        f"read: vllm:vllm/model_executor/layers/quantization/modelopt.py, {_VLLM_MOE}/experts/triton_moe.py",
    ),
)

_SGLANG_ROWS = (
    Row(
        "sglang",
        ("0.5.23",),
        ("sm_80", "sm_86", "sm_89", "sm_90"),
        "compressed-tensors",
        ("int8-dynamic",),
        "native",
        f"read: {_SGLANG}/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py (from 8.0), "
        "sglang:sgl-kernel/csrc/gemm/int8_gemm_kernel.cu (to sm_90)",
    ),
    Row(
        "sglang",
        ("0.5.23",),
        ("sm_80", "sm_86", "sm_89", "sm_90"),
        "compressed-tensors",
        ("int8-dynamic-asymmetric",),
        "none",
        f"read: {_SGLANG}/compressed_tensors/schemes/compressed_tensors_w8a8_int8.py (activations are always rounded symmetrically)",
        "SGLang does not apply zero points of activations; use int8-dynamic",
    ),
    Row(
        "sglang",
        ("0.5.23",),
        ("sm_75",),
        "compressed-tensors",
        (*_W8A8_INT8, *_W8A16_INT8, *_FP8_WHOLE, "fp8-weight-only"),
        "none",
        f"read: {_SGLANG}/compressed_tensors/schemes (all from 8.0)",
        "SGLang's readers of compressed-tensors begin with sm_80",
    ),
    Row(
        "sglang",
        ("0.5.23",),
        _BLACKWELL,
        "compressed-tensors",
        _W8A8_INT8,
        "none",
        "read: sglang:sgl-kernel/csrc/gemm/int8_gemm_kernel.cu (No implemented int8_scaled_mm for current compute capability)",
        "no INT8 kernel for Blackwell; choose fp8-dynamic",
    ),
    Row(
        "sglang",
        ("0.5.23",),
        ("sm_80", "sm_86", "sm_89", "sm_90"),
        "compressed-tensors",
        _W8A16_INT8,
        "fused",
        f"read: {_SGLANG}/compressed_tensors/schemes/compressed_tensors_wNa16.py (Marlin, from 8.0)",
    ),
    Row(
        "sglang",
        ("0.5.23",),
        ("sm_80", "sm_86"),
        "compressed-tensors",
        (*_FP8_WHOLE, "fp8-weight-only"),
        "fused",
        f"read: {_SGLANG}/compressed_tensors/compressed_tensors.py (below 8.9 activations are left alone), "
        f"{_SGLANG}/compressed_tensors/schemes/compressed_tensors_w8a16_fp8.py (Marlin, from 8.0)",
        "there is no FP8 product before sm_89: Marlin widens the weights and prefill is not faster; int8-dynamic has a kernel",
    ),
    Row(
        "sglang",
        ("0.5.23",),
        ("sm_89", "sm_90", "sm_100"),
        "compressed-tensors",
        _FP8_WHOLE,
        "native",
        f"read: {_SGLANG}/compressed_tensors/schemes/compressed_tensors_w8a8_fp8.py (from 8.9), "
        "sglang:sgl-kernel/csrc/gemm/fp8_gemm_kernel.cu",
    ),
    Row(
        "sglang",
        ("0.5.23",),
        _BEFORE_FP8,
        "modelopt",
        ("fp8-static",),
        "none",
        f"read: {_SGLANG}/modelopt_quant.py (from 8.9)",
        "compressed-tensors with int8-dynamic has a kernel from sm_80",
    ),
    Row(
        "sglang",
        ("0.5.23",),
        ("sm_89", "sm_90", "sm_100"),
        "modelopt",
        ("fp8-static",),
        "native",
        f"read: {_SGLANG}/modelopt_quant.py (from 8.9), sglang:sgl-kernel/csrc/gemm/fp8_gemm_kernel.cu",
    ),
    Row(
        "sglang",
        ("0.5.23",),
        ("sm_80", "sm_86"),
        "fp8",
        ("fp8-block",),
        "fused",
        f"read: {_SGLANG}/fp8.py and fp8_utils.py (Marlin between 8.0 and 8.9)",
        "there is no FP8 product before sm_89",
        _BLOCKS,
    ),
)

_TRT = "read: tensorrt-llm:docs/source/features/quantization.md (hardware support matrix)"
_TENSORRT_LLM = (
    Row("tensorrt-llm", ("1.0",), _WITH_FP8, "modelopt", ("fp8-static",), "native", _TRT),
    Row("tensorrt-llm", ("1.0",), ("sm_80", "sm_86"), "modelopt", ("fp8-static",), "none", _TRT, "FP8 begins with sm_89 there"),
)

_PLAIN = (
    Row(
        "transformers",
        ("5.23", "5.19", "4.57.1"),
        HARDWARE,
        PLAIN,
        (PLAIN,),
        "plain",
        "read: nothing is quantized, so no kernel is asked for",
    ),
    Row("vllm", _VLLM, HARDWARE, PLAIN, (PLAIN,), "plain", "read: nothing is quantized, so no kernel is asked for"),
    Row("sglang", ("0.5.23",), GPUS, PLAIN, (PLAIN,), "plain", "read: nothing is quantized, so no kernel is asked for"),
    Row("tensorrt-llm", ("1.0",), ("sm_80", "sm_86", *_WITH_FP8), PLAIN, (PLAIN,), "plain", _TRT),
)

_ONNXRUNTIME = (
    Row(
        "onnxruntime",
        ("1.32",),
        ("cpu-vnni",),
        "onnx-matmulnbits",
        _W8A16_INT8,
        "native",
        "seen: onnxruntime 1.32 on AMD EPYC with AVX512-VNNI, 2026-11-24",
        "inputs of products are rounded to INT8 (accuracy_level 4), as exported too",
    ),
    Row(
        "onnxruntime",
        ("1.32",),
        ("cpu-vnni",),
        "onnx",
        _W8A16_INT8,
        "native",
        "seen: onnxruntime 1.32 on AMD EPYC with AVX512-VNNI, 2026-11-24",
        "at load DequantizeLinear and MatMul become MatMulNBits, which rounds its inputs to INT8 (accuracy_level 4); "
        "session.qdq_matmulnbits_accuracy_level=1 leaves them floats. With inputs: int8x2 MatMulInteger runs, inputs in two codes",
    ),
    Row(
        "onnxruntime",
        ("1.32",),
        ("cpu-vnni",),
        "onnx",
        ("int8-dynamic",),
        "native",
        "seen: onnxruntime 1.32 on AMD EPYC with AVX512-VNNI, 2026-11-24",
        "an input has one scale for all its tokens",
    ),
    Row(
        "onnxruntime",
        ("1.32",),
        ("cpu-vnni",),
        "onnx",
        ("int8-static",),
        "native",
        "seen: onnxruntime 1.32 on Intel Xeon with AVX512-VNNI, 2026-11-29",
        "every product is MatMulIntegerToFloat since inputs are unsigned codes around 128; with signed ones most ran as floats",
    ),
    Row(
        "onnxruntime",
        ("1.32",),
        ("cpu-vnni",),
        "onnx",
        ("fp8-weight-only", "fp8-static"),
        "dequantize",
        "seen: onnxruntime 1.32 on AMD EPYC with AVX512-VNNI, 2026-11-23",
        "weights are widened at every call, ten times slower than floats",
    ),
)

_ORT_CUDA = (
    Row(
        "onnxruntime-gpu",
        ("1.31",),
        ("sm_90",),
        "onnx",
        ("int8-weight-only",),
        "fused",
        "seen: onnxruntime-gpu 1.31.1 on an H200, 2026-11-29: loaded, compared with the source, no product beside the GPU (MatMulNBits)",
        "products of more than a few tokens are widened first and run in TF32 (use_tf32)",
    ),
    Row(
        "onnxruntime-gpu",
        ("1.31",),
        ("sm_90",),
        "onnx",
        ("int8-weight-only-g32",),
        "fused",
        "seen: onnxruntime-gpu 1.31.1 on an H200, 2026-11-29: loaded and timed, its logits not compared",
        "products of more than a few tokens are widened first and run in TF32 (use_tf32)",
    ),
)

#: What ONNX Runtime does in other programs, and OpenVINO with the same graphs.
_ORT_ELSEWHERE = (("onnxruntime-genai", "0.18", "onnxruntime-genai 0.18"), ("transformers.js", "4.3", "transformers.js 4.3.1 on Node 20"))
_EPYC = "on AMD EPYC with AVX512-VNNI, 2026-11-24"
_WIDENED = "weights are widened at every call, several times slower than floats"
_ONNX_ELSEWHERE = (
    *(
        Row(runtime, (version,), ("cpu-vnni",), form, schemes, kernel, f"seen: {what} {_EPYC}", note)
        for runtime, version, what in _ORT_ELSEWHERE
        for form, schemes, kernel, note in (
            ("onnx", _W8A16_INT8, "native", "MatMulNBits ran, which rounds its inputs to INT8 (not in a browser's WASM)"),
            ("onnx-matmulnbits", _W8A16_INT8, "native", "MatMulNBits ran, which rounds its inputs to INT8"),
            ("onnx", ("int8-dynamic",), "native", "an input has one scale for all its tokens"),
            ("onnx", ("fp8-weight-only",), "dequantize", _WIDENED),
        )
    ),
    *(
        Row(
            runtime,
            (version,),
            ("cpu-vnni",),
            "onnx",
            ("int8-static",),
            "native",
            f"seen: {what} on Intel Xeon with AVX512-VNNI, 2026-11-29",
            "every product is MatMulIntegerToFloat",
        )
        for runtime, version, what in _ORT_ELSEWHERE
    ),
    Row(
        "onnxruntime-genai",
        ("0.18",),
        ("cpu-vnni",),
        "onnx",
        ("fp8-static",),
        "dequantize",
        f"seen: onnxruntime-genai 0.18 {_EPYC}",
        _WIDENED,
    ),
    Row(
        "transformers.js",
        ("4.3",),
        ("cpu-vnni",),
        "onnx",
        ("fp8-static",),
        "none",
        f"seen: transformers.js 4.3.1 on Node 20 {_EPYC}",
        "its ONNX Runtime 1.30 fuses FP8 into a product that takes INT8 alone, and refuses the graph",
    ),
    Row(
        "openvino",
        ("2026.4",),
        ("cpu-vnni",),
        "onnx",
        (*_W8A16_INT8, "int8-dynamic", "int8-static"),
        "native",
        f"seen: OpenVINO 2026.4.1 {_EPYC}",
        "its own graph shows INT8 weights in every product; it rounds inputs of weight-only products to INT8 too",
    ),
    Row(
        "openvino",
        ("2026.4",),
        ("cpu-vnni",),
        "onnx-matmulnbits",
        _W8A16_INT8,
        "native",
        f"seen: OpenVINO 2026.4.1 {_EPYC}",
        "its own graph shows UINT8 weights in every product, whose inputs it rounds to INT8",
    ),
    Row(
        "openvino",
        ("2026.4",),
        ("cpu-vnni",),
        "onnx",
        ("fp8-weight-only", "fp8-static"),
        "dequantize",
        f"seen: OpenVINO 2026.4.1 {_EPYC}",
        "weights become float32 when the graph is compiled; nothing is held in 8 bit",
    ),
)

#: Tables of embeddings, which nothing multiplies with.
_TABLES = tuple(
    Row(runtime, (version,), ("cpu-vnni",), form, ("int8-lookup",), kernel, f"seen: {what} on AMD EPYC with AVX512-VNNI, 2026-11-29", note)
    for runtime, version, what, kernel, note in (
        ("onnxruntime", "1.32", "onnxruntime 1.32", "fused", "the rows that are looked up are widened"),
        *((runtime, version, what, "fused", "the rows that are looked up are widened") for runtime, version, what in _ORT_ELSEWHERE),
        ("openvino", "2026.4", "OpenVINO 2026.4.1", "dequantize", "it gives the same logits, and does not say in what it holds the table"),
    )
    for form in ("onnx", "onnx-matmulnbits")
)

TABLE: tuple[Row, ...] = (
    *_TRANSFORMERS,
    *_BITSANDBYTES,
    *_VLLM_CPU,
    *_VLLM_CUDA,
    *_VLLM_EXPERTS,
    *_SGLANG_ROWS,
    *_TENSORRT_LLM,
    *_ONNXRUNTIME,
    *_ORT_CUDA,
    *_ONNX_ELSEWHERE,
    *_TABLES,
    *_PLAIN,
)

#: Runtimes of the table and their versions, newest first.
VERSIONS: Mapping[str, tuple[str, ...]] = {
    "transformers": ("5.23", "5.19", "4.57.1"),
    "bitsandbytes": ("0.50.2", "0.48.2"),
    "vllm": ("0.32", "0.24"),
    "sglang": ("0.5.23",),
    "tensorrt-llm": ("1.0",),
    "onnxruntime": ("1.32",),
    "onnxruntime-gpu": ("1.31",),
    "onnxruntime-genai": ("0.18",),
    "openvino": ("2026.4",),
    "transformers.js": ("4.3",),
}


def named(scheme: str, *, expert: bool) -> str:
    """What the table calls a scheme."""
    return f"{scheme}{EXPERTS}" if expert else scheme


@dataclass(frozen=True)
class Part:
    """Layers of one ``scheme`` (None: of none that has a name here), and their shapes (out, in), each once."""

    scheme: str | None
    shapes: frozenset[tuple[int, int]]


def find(runtime: str, hardware: str, format: str, scheme: str, *, version: str | None = None) -> Row | None:  # noqa: A002
    """The first row that speaks of this, or None where nothing is known; without ``version`` of the newest version that has one."""
    for asked in (version,) if version else VERSIONS.get(runtime, ()):
        for row in TABLE:
            speaks = (row.runtime, row.format) == (runtime, format) and asked in row.versions
            if speaks and hardware in row.hardware and scheme in row.schemes:
                return row
    return None


def kernel_of(row: Row | None, shapes: Iterable[tuple[int, int]] = ()) -> str:
    """The kind of kernel for layers of ``shapes``: a shape that the runtime refuses is ``none``; no row is ``not known``."""
    if row is None:
        return "not known"
    if row.shape is not None and not all(row.shape.holds(shape) for shape in shapes):
        return "none"
    return row.kernel


def worst(runtime: str, hardware: str, format: str, parts: Sequence[Part], *, version: str | None = None) -> tuple[str, Row | None]:  # noqa: A002
    """The kernel that holds an artifact back, and its row: one that does not load, then one not known, then the slowest."""
    order = ("plain", "native", "fused", "dequantize", "emulated", "not known", "none")
    found = []
    for part in parts:
        row = find(runtime, hardware, format, part.scheme, version=version) if part.scheme else None
        found.append((kernel_of(row, part.shapes), row))
    return max(found, key=lambda pair: order.index(pair[0]))


def parts_of_folder(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], side: Mapping[str, Any] | None = None
) -> tuple[str, tuple[Part, ...]]:
    """The format of a folder, whoever made it, and what it holds; ``plain`` where nothing is quantized.

    Raises :class:`~formats.errors.FormatError` where the quantization cannot be understood.
    """
    existing = read_quantization(config, tensors, side)
    if existing is None or not existing.layers:
        return PLAIN, (Part(PLAIN, frozenset()),)
    shapes: dict[str | None, set[tuple[int, int]]] = {}
    for layer in existing.layers:
        scheme = scheme_of(existing.format, layer)
        expert = re.search(r"\.experts\.\d+\.", layer.module) is not None
        shapes.setdefault(scheme and named(scheme, expert=expert), set()).add(layer.shape)
    return existing.format, tuple(Part(scheme, frozenset(found)) for scheme, found in shapes.items())


def scheme_of(format: str, layer: ExistingLayer) -> str | None:  # noqa: A002
    """The name under which the table knows how a layer is quantized, or None."""
    weight, activation = layer.weight, layer.activation
    if weight is None:
        return None
    if format == "bitsandbytes":
        return "llm-int8"
    facts = (weight.grid, weight.tile, activation and (activation.grid, activation.tile, activation.symmetric, activation.dynamic))
    for scheme in SCHEMES.values():
        wanted = scheme.activation
        spelled = wanted and (wanted.grid, wanted.tile, wanted.symmetric, wanted.dynamic)
        if scheme.name != "llm-int8" and facts == (scheme.weight.grid, scheme.weight.tile, spelled):
            unpacked = format == "compressed-tensors" and weight.grid.kind == "int" and activation is None and not layer.packed
            return UNPACKED if unpacked else scheme.name
    dynamic = SCHEMES["fp8-dynamic"].activation
    static = SCHEMES["fp8-static"].weight
    if (weight.grid, weight.tile) == (static.grid, static.tile) and activation == dynamic:
        return TENSOR_DYNAMIC
    return None


@dataclass(frozen=True)
class Line:
    """One runtime in one version of the matrix: the kernel on each hardware of :data:`HARDWARE`, and the rows that say so."""

    runtime: str
    versions: tuple[str, ...]
    kernels: Mapping[str, str]
    rows: Mapping[str, Row | None]


def matrix(format: str, parts: Sequence[Part]) -> list[Line]:  # noqa: A002
    """The whole table for one artifact; versions of a runtime that agree share a line, runtimes of which nothing is known have none."""
    lines: list[Line] = []
    for runtime, versions in VERSIONS.items():
        for version in versions:
            cells = {hardware: worst(runtime, hardware, format, parts, version=version) for hardware in HARDWARE}
            kernels = {hardware: kernel for hardware, (kernel, _) in cells.items()}
            if set(kernels.values()) == {"not known"}:
                continue
            rows = {hardware: row for hardware, (_, row) in cells.items()}
            if lines and lines[-1].runtime == runtime and lines[-1].kernels == kernels and lines[-1].rows == rows:
                lines[-1] = Line(runtime, (*lines[-1].versions, version), kernels, rows)
            else:
                lines.append(Line(runtime, (version,), kernels, rows))
    return lines


def markdown() -> str:
    """``docs/compatibility.md``: what ``make docs`` writes."""
    out = [
        "# Compatibility\n\nWhich runtime loads what, on which hardware, by what kind of kernel; written by `make docs` from "
        "`formats/compatibility.py`.",
        "What is in no row is not known. `octavo plan` asks this table, and `octavo inspect --matrix DIR` prints it for any folder.\n",
        "| kernel | |\n| --- | --- |",
        *(f"| {name} | {what} |" for name, what in KERNELS.items()),
    ]
    for runtime in VERSIONS:
        out += [
            f"\n## {runtime}\n",
            "| version | hardware | format | schemes | kernel | evidence | note |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in TABLE:
            if row.runtime == runtime:
                note = "; ".join(filter(None, (row.note, str(row.shape) if row.shape else "")))
                cells = (
                    ", ".join(row.versions),
                    " ".join(row.hardware),
                    row.format,
                    ", ".join(row.schemes),
                    row.kernel,
                    row.evidence,
                    note,
                )
                out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out) + "\n"
