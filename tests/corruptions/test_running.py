"""What no header, scale or code gives away, `octavo check` finds by decoding and by running; the manifest vouches for each of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from corruptions import folders
from corruptions.folders import Tensors, edit_config, edit_tensors, vouch

from convert import pipeline
from convert.recipe import parse_recipe
from formats.verify import verify

LAYER = "model.layers.0"


def swap(left: str, right: str) -> Callable[[Path], None]:
    """The tensors of two modules change places."""

    def change(t: Tensors) -> None:
        for part in ("weight", "weight_scale"):
            names = f"{LAYER}.{left}.{part}", f"{LAYER}.{right}.{part}"
            if names[0] in t:
                t[names[0]], t[names[1]] = t[names[1]], t[names[0]]

    return lambda folder: edit_tensors(folder, change)


def rotate_rows(t: Tensors) -> None:
    name = f"{LAYER}.mlp.down_proj.weight"
    t[name] = t[name].roll(1, 0)


def wrong_theta(config: dict[str, Any]) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10.0}
    config["rope_theta"] = 10.0


def rotate_and_swap(folder: Path) -> None:
    edit_tensors(folder, rotate_rows)
    swap("self_attn.q_proj", "self_attn.k_proj")(folder)


#: name -> what is done to the artifact, a check that must fail, and what it must name.
RUNNING: dict[str, tuple[Callable[[Path], Any], str, tuple[str, ...]]] = {
    "rows of a weight rotated, q and k of another swapped": (
        rotate_and_swap,
        "numbers: largest error / bound",
        (f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.self_attn.k_proj.weight"),
    ),
    "norms swapped": (swap("input_layernorm", "post_attention_layernorm"), "transformers: kl_nats", ()),
    "another rope theta": (lambda folder: edit_config(folder, wrong_theta), "transformers: kl_nats", ()),
}


@pytest.fixture(scope="module")
def failed(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, str]]:
    """What `octavo check` says failed, of the good artifact and of each corrupted one, all against one run of the source."""
    import torch

    root = tmp_path_factory.mktemp("running")
    # Weights so large that attention attends, norms that differ: else no order of anything would matter.
    model = make_llama(initializer_range=0.2, num_hidden_layers=1, num_key_value_heads=4)

    def uneven_norms(t: Tensors) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in [name for name in t if "norm" in name]:
            t[name] = (0.5 + torch.rand(t[name].shape, generator=generator)).bfloat16()

    edit_tensors(model, uneven_norms)
    limits = "kl_nats: 0.02, top1: 0.5, perplexity_ratio: 1.5"
    recipe = parse_recipe(folders.recipe(model, {"q": "rules: [{match: linear, scheme: int8-dynamic}]"}, limits), "r.yaml", name="r")
    good = pipeline.convert(recipe, root / "good", check=False).artifacts[0].path
    paths = {"good": good}
    for name, (do, _, _) in RUNNING.items():
        paths[name] = shutil.copytree(good, root / name)
        do(paths[name])
        vouch(paths[name])
        assert verify(paths[name]).findings == (), "no header, scale or code gives it away"
    reports = pipeline.prove(list(paths.values()), recipe)
    return {
        name: {check.name: check.detail for check in report.checks if not check.passed} for name, report in zip(paths, reports, strict=True)
    }


def test_the_good_artifact_passes(failed: Mapping[str, dict[str, str]]) -> None:
    assert failed["good"] == {}


@pytest.mark.parametrize("name", RUNNING)
def test_running_finds_what_verify_cannot(failed: Mapping[str, dict[str, str]], name: str) -> None:
    _, check, named = RUNNING[name]
    assert check in failed[name]
    assert all(tensor in failed[name][check] for tensor in named), failed[name]
