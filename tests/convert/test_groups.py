"""Which channels of a block scale together: what is found, and that folding changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import join_experts, save_family

from convert.architecture import describe
from convert.groups import Group, find_groups, first_tensor, fold, powers_of_two
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
    # Routers read what the norm makes, and nobody says where the experts are.
    "mixtral": ATTENTION,
}


def _names(prefix: str, *last: str) -> list[str]:
    return [f"{prefix}.{i}.{name}" for i in range(4) for name in last]


#: With experts: what reads the norm beside attention, its routers, and whether up feeds down within each expert.
EXPERTS: dict[str, tuple[set[str], tuple[str, ...], str]] = {
    "mixtral": ({*_names("block_sparse_moe.experts", "w1", "w3")}, ("mlp.gate",), "block_sparse_moe.experts.{}.w3 w2"),
    "qwen3_moe": ({*_names("mlp.experts", "gate_proj", "up_proj")}, ("mlp.gate",), "mlp.experts.{}.up_proj down_proj"),
    "qwen2_moe": (
        {
            *_names("mlp.experts", "gate_proj", "up_proj"),
            "mlp.shared_expert.gate_proj",
            "mlp.shared_expert.up_proj",
            "mlp.shared_expert_gate",
        },
        ("mlp.gate",),
        "mlp.experts.{}.up_proj down_proj",
    ),
    # What goes into its experts is multiplied by how much they are asked, so the norm feeds them not alone.
    "llama4": (set(), (), "feed_forward.experts.{}.up_proj down_proj"),
}


def _with_experts(folder: Path) -> Any:
    checkpoint = open_source(str(folder))
    architecture = describe(checkpoint.config, checkpoint.tensors)
    assert architecture is not None
    skeleton = Skeleton(checkpoint, dtype="float32")
    skeleton.find_experts({name: parameter.parts for name, parameter in architecture.parameters.items() if parameter.kind == "expert"})
    skeleton.model.set_experts_implementation("eager")
    batch = {"input_ids": torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(2)), "use_cache": False}
    return skeleton, walk(skeleton, [batch])


@pytest.mark.parametrize("family", [*sorted(EXPERTS), "joined"])
def test_experts_scale_together_with_their_router_and_one_by_one(family: str, tmp_path: Path) -> None:
    """And folding random scales into all of them leaves the block's function as it was, to 1e-5."""
    named = "qwen3_moe" if family == "joined" else family
    folder = save_family(named, tmp_path)
    if family == "joined":
        join_experts(folder, turned=False)
    reading, routers, pair = EXPERTS[named]
    skeleton, stands = _with_experts(folder)
    likely: tuple[Group, ...] = ()
    for stand in stands:
        experts = skeleton.experts_in(stand.name)
        before = first_tensor(stand.output(0)).clone()
        likely = find_groups(stand, likely, experts)
        found = {(group.producer, frozenset(group.consumers), group.routers) for group in likely}
        if reading:
            assert ("post_attention_layernorm", frozenset(reading), routers) in found
        producer, consumer = pair.split()
        for i in range(4):
            up = producer.format(i)
            assert (up, frozenset({f"{up.rpartition('.')[0]}.{consumer}"}), ()) in found
        assert not any("gate" in group.producer or "w1" in group.producer for group in likely), "an activation does not commute"
        assert torch.equal(first_tensor(stand.output(0)), before)
        generator = torch.Generator().manual_seed(1)
        for group in likely:
            matrix = skeleton.weight(f"{stand.name}.{group.consumers[0]}")
            scales = torch.exp(torch.randn(matrix.shape[1], generator=generator))
            scales = scales if group.channels is None else scales[: int(group.channels.max()) + 1][group.channels]
            fold(stand.module, group, powers_of_two(scales) if group.exact else scales, experts=experts)
        torch.testing.assert_close(first_tensor(stand.output(0)), before, rtol=1e-5, atol=1e-5)


def test_a_layer_of_which_an_expert_is_not_known_has_no_group(tmp_path: Path) -> None:
    """No token of the batch need come to it, so that no proof would miss it."""
    skeleton, stands = _with_experts(save_family("mixtral", tmp_path))
    stand = next(stands)
    experts = skeleton.experts_in(stand.name)
    some = {name: place for name, place in experts.items() if not name.endswith("3.w1")}
    assert len(some) == len(experts) - 1
    stand.module.mlp.gate.weight[3] = -stand.module.mlp.gate.weight[:3].abs().sum(dim=0)
    producers = [{group.producer for group in find_groups(stand, (), known)} for known in (experts, some)]
    assert "post_attention_layernorm" in producers[0]
    assert "post_attention_layernorm" not in producers[1]


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


def test_groups_of_a_block_before_are_proved_on_a_probe_alone_and_refused_where_they_do_not_hold(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path)
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    asked, probe = ({"input_ids": each, "use_cache": False} for each in (ids, ids[:1, :6]))
    stands = walk(Skeleton(open_source(str(folder)), dtype="float32"), [asked], probe=probe)
    stand = next(stands)
    found = find_groups(stand)
    stand = next(stands)
    ran: list[int] = []
    run = stand._run
    stand._run = lambda i, dtype=None: (ran.append(i), run(i, dtype))[1]
    assert find_groups(stand, found) is found
    assert set(ran) == {stand.sample} == {1}
    wrong = (Group("self_attn.q_proj", ("self_attn.o_proj",)), *(group for group in found if group.producer != "self_attn.v_proj"))
    assert {(group.producer, *group.consumers) for group in find_groups(stand, wrong)} == EXPECTED["llama"]
    stand.module.mlp.act_fn = torch.nn.Tanh()
    stand.module.mlp.gate_proj.register_forward_hook(lambda _m, _a, output: output.tanh())
    stand.module.mlp.up_proj.register_forward_hook(lambda _m, _a, output: output.tanh())
    assert {(group.producer, *group.consumers) for group in find_groups(stand, found)} == {
        each for each in EXPECTED["llama"] if each[0] != "mlp.up_proj"
    }


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
