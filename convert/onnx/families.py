"""What a decoder computes, family by family: one description each, from which the graph is written.

Names and arithmetic are those of transformers 5.23 (``models/<family>/modeling_<family>.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from formats.errors import FormatError


@dataclass(frozen=True)
class Family:
    """Where a family keeps its modules, and what it does differently. Names of a block's modules are relative to it; none: it has no such.

    ``inputs``: what makes queries, keys and values, one module each or one for all; ``up``: gate and up likewise, or up alone where
    nothing is gated. ``offset``: what is added to the weights of norms. ``normed_heads``: queries and keys are normed, head by head.
    """

    embedding: str = "model.embed_tokens"
    positions: str = ""
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    before_attention: str = "input_layernorm"
    inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    normed_heads: tuple[str, str] | None = None
    output: str = "self_attn.o_proj"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    down: str = "mlp.down_proj"
    after_mlp: str = ""
    norm_kind: str = "rms"
    offset: float = 0.0
    scaled_embedding: bool = False


_LLAMA = Family()
_NORMED = replace(_LLAMA, normed_heads=("self_attn.q_norm", "self_attn.k_norm"))
_GEMMA = replace(_LLAMA, offset=1.0, scaled_embedding=True)
_GEMMA2 = replace(
    _GEMMA,
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)

#: ``model_type`` -> its description. To add a family is a line here and a line in the tests.
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "smollm3": _LLAMA,
    "qwen3": _NORMED,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, normed_heads=_NORMED.normed_heads),
    "phi3": replace(_LLAMA, inputs=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    "gpt2": Family(
        embedding="transformer.wte",
        positions="transformer.wpe",
        blocks="transformer.h",
        norm="transformer.ln_f",
        before_attention="ln_1",
        inputs=("attn.c_attn",),
        output="attn.c_proj",
        before_mlp="ln_2",
        up=("mlp.c_fc",),
        gated=False,
        down="mlp.c_proj",
        norm_kind="layer",
    ),
}

#: Activations that the standard has an operator for, or two; of Gelu, its ``approximate``.
ACTIVATIONS = {"silu": "", "relu": "", "gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
#: Ways to compute frequencies, as transformers calls them (``modeling_rope_utils.py``).
_ROPES = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")


@dataclass(frozen=True)
class Rotary:
    """Angles a position: ``frequencies`` (turned features / 2,) in radians; cosines and sines are multiplied by ``factor``. In a call whose
    last position is ``switch`` or more, all positions have those of ``long``, or of ``stretch``, where there is either."""

    frequencies: tuple[float, ...]
    factor: float
    switch: int = 0
    long: tuple[float, ...] = ()
    stretch: Stretch | None = None


@dataclass(frozen=True)
class Stretch:
    """Frequencies of a longer text ("dynamic NTK"): base' ** (-2i / turned), where
    base' = base * (factor * length / trained - (factor - 1)) ** (turned / (turned - 2))."""

    base: float
    factor: float
    trained: int


@dataclass(frozen=True)
class Layer:
    """``window``: how many positions a token sees, itself included, None for all; ``rotary``: the name of its angles, none where empty."""

    window: int | None
    rotary: str


@dataclass(frozen=True)
class Decoder:
    """One model: its family, its sizes, and what of its configuration changes the arithmetic. Soft caps are 0 where there are none."""

    family: Family
    layers: tuple[Layer, ...]
    rotaries: Mapping[str, Rotary]
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    up_size: int
    vocabulary: int
    context_length: int
    epsilon: float
    activation: str
    attention_scale: float
    attention_softcap: float
    softcap: float

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        """Features of queries, keys and values."""
        return self.heads * self.head_size, self.kv_heads * self.head_size, self.kv_heads * self.head_size


def describe_decoder(config: Mapping[str, Any]) -> Decoder:
    """The decoder that a ``config.json`` asks for. Raises :class:`FormatError` for a family, or a setting, that no graph is known for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    name = str(config.get("model_type"))
    family = FAMILIES.get(name)
    if family is None:
        raise FormatError(f"no graph is known for the architecture {name!r}; known are {', '.join(FAMILIES)}")
    parsed: Any = CONFIG_MAPPING[name].from_dict(dict(config))
    heads = int(parsed.num_attention_heads)
    size = int(getattr(parsed, "head_dim", None) or parsed.hidden_size // heads)
    scalar = getattr(parsed, "query_pre_attn_scalar", None)
    _require_plain(name, parsed)
    layers = _layers(family, parsed)
    return Decoder(
        family=family,
        layers=layers,
        rotaries={kind: _rotary(name, parsed, kind, size) for kind in dict.fromkeys(layer.rotary for layer in layers) if kind},
        hidden_size=int(parsed.hidden_size),
        heads=heads,
        kv_heads=int(getattr(parsed, "num_key_value_heads", None) or heads),
        head_size=size,
        up_size=int(getattr(parsed, "intermediate_size", None) or getattr(parsed, "n_inner", None) or 4 * parsed.hidden_size),
        vocabulary=int(parsed.vocab_size),
        context_length=int(parsed.max_position_embeddings),
        epsilon=float(getattr(parsed, "rms_norm_eps", None) or parsed.layer_norm_epsilon),
        activation=_activation(name, parsed),
        attention_scale=float(scalar or size) ** -0.5,
        attention_softcap=float(getattr(parsed, "attn_logit_softcapping", None) or 0),
        softcap=float(getattr(parsed, "final_logit_softcapping", None) or 0),
    )


def _activation(name: str, parsed: Any) -> str:
    found = str(getattr(parsed, "hidden_activation", None) or getattr(parsed, "hidden_act", None) or parsed.activation_function)
    if found not in ACTIVATIONS:
        raise FormatError(f"no graph is known for {name} with the activation {found!r}; known are {', '.join(ACTIVATIONS)}")
    return found


def _require_plain(name: str, parsed: Any) -> None:
    """Settings that change the arithmetic and that the graph does not know."""
    odd = {
        "scale_attn_weights": getattr(parsed, "scale_attn_weights", True) is False,
        "scale_attn_by_inverse_layer_idx": bool(getattr(parsed, "scale_attn_by_inverse_layer_idx", False)),
        "add_cross_attention": bool(getattr(parsed, "add_cross_attention", False)),
        "use_bidirectional_attention": bool(getattr(parsed, "use_bidirectional_attention", False)),
    }
    for setting, found in odd.items():
        if found:
            raise FormatError(f"no graph is known for {name} with {setting}: {getattr(parsed, setting)}")


def _layers(family: Family, parsed: Any) -> tuple[Layer, ...]:
    count = int(parsed.num_hidden_layers)
    window = getattr(parsed, "sliding_window", None)
    kinds = getattr(parsed, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    turned = getattr(parsed, "no_rope_layers", None) or [1] * count  # of SmolLM3, which writes 0 where there is none
    return tuple(
        Layer(
            window=int(window) if window and kind == "sliding_attention" else None,
            rotary="" if family.positions or not turns else kind if _by_kind(parsed) else "rotary",
        )
        for kind, turns in zip(kinds, turned, strict=True)
    )


def _by_kind(parsed: Any) -> bool:
    """Whether layers of each type have angles of their own."""
    return any(isinstance(value, dict) for value in (parsed.rope_parameters or {}).values())


def _rotary(name: str, parsed: Any, kind: str, head_size: int) -> Rotary:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    layer_type = kind if _by_kind(parsed) else None
    parameters = parsed.rope_parameters[layer_type] if layer_type else parsed.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in _ROPES:
        raise FormatError(f"no graph is known for {name} with rope_type {rope_type!r}; known are {', '.join(_ROPES)}")
    if rope_type != "default":
        compute = partial(ROPE_INIT_FUNCTIONS[rope_type], parsed, torch.device("cpu"), layer_type=layer_type)
        frequencies, factor = compute()
        short = tuple(frequencies.float().tolist())
        if rope_type == "longrope":
            switch = int(parameters["original_max_position_embeddings"])
            return Rotary(short, float(factor), switch, tuple(compute(seq_len=switch + 1)[0].float().tolist()))
        if rope_type == "dynamic":
            trained = int(parsed.max_position_embeddings)
            return Rotary(short, float(factor), trained, (), Stretch(float(parameters["rope_theta"]), float(parameters["factor"]), trained))
    else:
        turned = int(head_size * parameters.get("partial_rotary_factor", 1.0))
        frequencies, factor = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned)), 1.0
    return Rotary(tuple(frequencies.float().tolist()), float(factor))
