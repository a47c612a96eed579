"""Which channels of a block scale together: what is found, and that folding changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_family

from convert.groups import Group, find_groups, first_tensor, fold
from convert.lanes import walk
from convert.loading import Skeleton
from convert.source import open_source

ATTENTION = {("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.v_proj", "self_attn.o_proj")}
GATED = {("mlp.up_proj", "mlp.down_proj")}
NORM = {("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj")}
SANDWICH = {("pre_feedforward_layernorm", "mlp.gate_proj", "mlp.up_proj")}

EXPECTED = {
    "llama": ATTENTION | GATED | NORM,
    "qwen2": ATTENTION | GATED | NORM,
    "qwen3": ATTENTION | GATED | NORM,
    "gemma2": ATTENTION | GATED | SANDWICH,
    "gemma3": ATTENTION | GATED | SANDWICH,
    "phi3": {("input_layernorm", "self_attn.qkv_proj"), ("post_attention_layernorm", "mlp.gate_up_proj")},
    "opt": {
        ("self_attn_layer_norm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.v_proj", "self_attn.out_proj"),
        ("final_layer_norm", "fc1"),
        ("fc1", "fc2"),
    },
    # What the norm makes is also what the residual adds to.
    "bert": {("attention.self.value", "attention.output.dense")},
    # Routers read what the norm makes.
    "mixtral": ATTENTION,
}


def _stands(folder: Path) -> Any:
    generator = torch.Generator().manual_seed(2)
    batch: dict[str, Any] = {"input_ids": torch.randint(3, 300, (2, 24), generator=generator)}
    if folder.name != "bert":
        batch["use_cache"] = False
    return walk(Skeleton(open_source(str(folder)), dtype="float32"), [batch])


@pytest.mark.parametrize("family", sorted(EXPECTED))
def test_groups_are_found_by_observation_alone(family: str, tmp_path: Path) -> None:
    for stand in _stands(save_family(family, tmp_path)):
        before = {name: parameter.clone() for name, parameter in stand.module.named_parameters()}
        groups = find_groups(stand)
        assert {(group.producer, *group.consumers) for group in groups} == EXPECTED[family]
        assert all(torch.equal(parameter, before[name]) for name, parameter in stand.module.named_parameters())
        assert {group.offset for group in groups if "norm" in group.producer} <= {1.0 if family.startswith("gemma") else 0.0}


def test_values_behind_several_query_heads_are_traced_to_their_channel(tmp_path: Path) -> None:
    stands = _stands(save_family("llama", tmp_path))
    stand = next(stands)
    group = next(group for group in find_groups(stand) if group.producer == "self_attn.v_proj")
    heads = torch.arange(4) // 2  # two query heads to a head of values, of 16 channels
    assert group.channels is not None
    assert torch.equal(group.channels, (heads[:, None] * 16 + torch.arange(16)).flatten())


def test_folding_leaves_the_function(tmp_path: Path) -> None:
    for stand in _stands(save_family("llama", tmp_path)):
        before = first_tensor(stand.output(0))
        for group in find_groups(stand):
            size = stand.module.get_submodule(group.consumers[0]).in_features
            scales = torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(1)))
            fold(stand.module, group, scales if group.channels is None else scales[: int(group.channels.max()) + 1][group.channels])
        torch.testing.assert_close(first_tensor(stand.output(0)), before, rtol=1e-5, atol=1e-5)


def test_a_norm_rounded_where_it_is_stored_is_made_up_for(tmp_path: Path) -> None:
    stands = _stands(save_family("llama", tmp_path))
    stand = next(stands)
    before = first_tensor(stand.output(0))
    group = Group("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    fold(stand.module, group, torch.linspace(0.3, 3.1, 64), dtype=torch.bfloat16)
    weight = stand.module.input_layernorm.weight
    assert torch.equal(weight, weight.to(torch.bfloat16).float())
    torch.testing.assert_close(first_tensor(stand.output(0)), before, rtol=1e-5, atol=1e-5)
