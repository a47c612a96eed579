"""Small random models of the families that have to be understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
FFN = {"intermediate_size": 96}
GQA = {"num_key_value_heads": 2}
MLA = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}

#: family -> (model class, config class, settings); all of transformers.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, **FFN, **GQA}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SMALL, **FFN, **GQA}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SMALL, **FFN, **GQA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SMALL, **FFN, **GQA, "head_dim": 16}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {**SMALL, **FFN, **GQA, "pad_token_id": 0}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**SMALL, **FFN, **GQA, "head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SMALL, **FFN, **GQA, "head_dim": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SMALL, **FFN, **GQA, "head_dim": 16}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**SMALL, **FFN}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**SMALL, **FFN, **GQA, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SMALL, **FFN}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "falcon": ("FalconForCausalLM", "FalconConfig", SMALL),
    "bert": ("BertModel", "BertConfig", {**SMALL, **FFN}),
    "roberta": ("RobertaModel", "RobertaConfig", {**SMALL, **FFN}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 300}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SMALL, **FFN, **GQA, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**SMALL, **FFN, **GQA, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**SMALL, **FFN, **GQA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    ),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {**SMALL, **FFN, **MLA, "topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**SMALL, **FFN, **MLA, "q_lora_rank": 24, "n_group": 2, "topk_group": 1}),
    # All experts of a layer in one tensor: (experts, in, out), and (experts, out, in).
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**SMALL, **FFN, **GQA, "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "pad_token_id": 0},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {
            **SMALL,
            **GQA,
            "head_dim": 16,
            "layer_types": ["full_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    # Gates and ups row by row in turn, and biases.
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {**SMALL, **FFN, **GQA, "head_dim": 16, "num_local_experts": 4, "pad_token_id": 0}),
}


#: Of blocks that are not alike: other widths; heads of two sizes, and keys of another block; and an infinite float in its config.
UNEVEN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **SMALL,
            **GQA,
            "num_hidden_layers": 3,
            "head_dim": 16,
            "intermediate_size": [96, 64, 128],
            "layer_types": ["full_attention"] * 3,
            "activation_sparsity_pattern": [0.0] * 3,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 300,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
        },
    ),
    "gemma4": (
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            **SMALL,
            **FFN,
            **GQA,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": 300,
            "hidden_size_per_layer_input": 16,
        },
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **SMALL,
            **FFN,
            **GQA,
            "num_hidden_layers": 4,
            "hybrid_override_pattern": "M*-M",
            "head_dim": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 2,
        },
    ),
}


def save_family(name: str, folder: Path) -> Path:
    """Saves a random model of a family in bfloat16 and returns its folder."""
    import torch
    import transformers

    model_class, config_class, settings = (FAMILIES | UNEVEN)[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).to(torch.bfloat16)
    model.save_pretrained(folder / name)
    return folder / name


def join_experts(folder: Path, *, turned: bool) -> None:
    """Rewrites a checkpoint of separate experts as transformers 5 has it in memory, or with (experts, in, out)."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    separate = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for layer in {name.partition(".experts.")[0] for name in separate}:
        of = {
            projection: torch.stack([separate[f"{layer}.experts.{i}.{projection}.weight"] for i in range(4)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        }
        joined = {"gate_up_proj": torch.cat([of["gate_proj"], of["up_proj"]], 1), "down_proj": of["down_proj"]}
        tensors |= {f"{layer}.experts.{name}": (w.mT if turned else w).contiguous() for name, w in joined.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
