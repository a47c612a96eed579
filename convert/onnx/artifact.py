"""The files of an ONNX artifact that are no weights: the graph, and what onnxruntime-genai and transformers.js want beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

from convert import __version__
from convert.onnx.families import Decoder, describe_decoder
from convert.onnx.stored import Placed, Stored, Traced
from formats.errors import FormatError
from formats.onnx_graph import METADATA, Initializer, graph_file, lay_out, metadata_packs
from formats.safetensors import Shard, TensorSpec, json_bytes


@dataclass(frozen=True)
class Files:
    """``shards`` are the weight files, ``texts`` what lies beside them and ``config.json``, and ``config`` is what that says: of a graph,
    what is added to the model's own keys."""

    shards: tuple[Shard, ...]
    texts: Mapping[str, bytes]
    config: Mapping[str, Any]


def plan_decoder(
    config: Mapping[str, Any],
    stored: Mapping[str, Stored],
    specs: Sequence[TensorSpec],
    *,
    dtype: str,
    attention: str,
    halves: bool,
    max_file_bytes: int,
    provenance: Mapping[str, Any],
) -> Files:
    """The graph of a decoder whose parameters are ``stored`` (by the model's names) as ``specs`` say. ``provenance``: what the graph's
    metadata says of where it comes from. Raises :class:`FormatError` where no graph is known, or where it has no place for a parameter."""
    from convert.onnx.decoder import build, plan_packs, spare

    decoder = describe_decoder(config)
    unplaced = spare(decoder, stored)
    if unplaced:
        raise FormatError(f"the graph of {config.get('model_type')} has no place for {unplaced[0]} (and {len(unplaced) - 1} more)")
    schemes = _schemes(stored.values())
    name = graph_file(quantized=bool(schemes), dtype=dtype)
    shards, initializers = lay_out(specs, plan_packs(decoder, stored), name, max_file_bytes)
    facts = _facts(schemes, initializers, provenance, ("onnx", "onnx-ir"))
    graph = build(decoder, stored, initializers, dtype=dtype, attention=attention, halves=halves, metadata=facts)
    genai = json_bytes(_genai_config(config, decoder, name, shared=attention == "gqa"))
    return Files(shards, {name: graph, "genai_config.json": genai}, _external(name, shards))


def plan_traced(
    traced: Sequence[Traced],
    placed: Callable[[Traced], Mapping[str, Placed]],
    specs: Callable[[Traced], Sequence[TensorSpec]],
    *,
    halves: bool,
    max_file_bytes: int,
    provenance: Mapping[str, Any],
) -> Files:
    """The traced graphs of a model; what each reads lies as ``specs`` say, its tensors ``placed`` by the checkpoint's names. Raises
    :class:`FormatError` where one reads codes as something else than the weight of a linear layer."""
    from convert.onnx.traced import rewrite

    quantized = any(_schemes(place.product for place in placed(one).values()) for one in traced)
    tools = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers")
    files = Files((), {}, {"transformers.js_config": {"use_external_data_format": {}}})
    for one in traced:
        there = placed(one)
        schemes = _schemes(place.product for place in there.values())
        name = graph_file(quantized=quantized, dtype=one.dtype, stem=one.name)
        shards, initializers = lay_out(specs(one), (), name, max_file_bytes)
        graph = rewrite(
            one,
            there,
            initializers,
            halves=halves,
            metadata=partial(_traced_facts, schemes, initializers, provenance, tools),
        )
        counts = {**files.config["transformers.js_config"]["use_external_data_format"], **_chunks(name, shards)}
        files = Files(
            (*files.shards, *shards), {**files.texts, name: graph}, {"transformers.js_config": {"use_external_data_format": counts}}
        )
    return files


def _traced_facts(
    schemes: Sequence[str],
    initializers: Sequence[Initializer],
    provenance: Mapping[str, Any],
    tools: Sequence[str],
    computed: Sequence[str],
) -> dict[str, str]:
    return _facts(schemes, initializers, {**provenance, "computed": computed}, tools)


def _schemes(stored: Iterable[Stored]) -> list[str]:
    return sorted({item.scheme.name for item in stored if item.scheme})


def _facts(
    schemes: Sequence[str], initializers: Sequence[Initializer], provenance: Mapping[str, Any], tools: Sequence[str]
) -> dict[str, str]:
    """What the graph says of itself, ``tools`` among it: those whose version decides what it looks like."""
    facts = {
        "version": 1,
        "schemes": schemes,
        **provenance,
        "tools": {"octavo": __version__, **{tool: version(tool) for tool in tools}},
        "packs": metadata_packs(initializers),
    }
    return {METADATA: json.dumps(facts)}


def _external(graph: str, shards: Sequence[Shard]) -> dict[str, Any]:
    """What transformers.js must be told of data beside a graph."""
    return {"transformers.js_config": {"use_external_data_format": _chunks(graph, shards)}}


def _chunks(graph: str, shards: Sequence[Shard]) -> dict[str, int]:
    return {graph.rpartition("/")[2]: len(shards)}


def inline_template(sidecars: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer's files with the chat template in ``tokenizer_config.json``, the only place where transformers.js looks for it."""
    found = dict(sidecars)
    template = found.get("chat_template.jinja")
    if template is not None and "tokenizer_config.json" in found:
        settings = json.loads(found["tokenizer_config.json"])
        found["tokenizer_config.json"] = json_bytes({**settings, "chat_template": template.decode()})
    return found


def _genai_config(config: Mapping[str, Any], decoder: Decoder, graph: str, *, shared: bool) -> dict[str, Any]:
    """As the model builder of onnxruntime-genai 0.18 writes it. ``shared``: past and present are one buffer, which GroupQueryAttention can
    fill; the standard's Attention returns new ones."""
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    end = tokens.get("eos_token_id", 0)
    tokens.setdefault("pad_token_id", end[0] if isinstance(end, list) else end)
    return {
        "model": {
            **tokens,
            "context_length": decoder.context_length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph,
                "head_size": decoder.head_size,
                "hidden_size": decoder.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": len(decoder.layers),
                "num_key_value_heads": decoder.kv_heads,
            },
            "type": str(config.get("model_type")),
            "vocab_size": decoder.vocabulary,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": min(decoder.context_length, 8192),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": shared,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
