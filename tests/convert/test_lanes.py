"""Block by block against the plain forward of the same model, bit for bit."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family

from convert import groups, lanes
from convert.architecture import blocks_of
from convert.crew import crew
from convert.lanes import place_for, walk
from convert.loading import Skeleton
from convert.observe import Observer
from convert.source import open_source


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = folder = save_family(name, root)
            config = json.loads((folder / "config.json").read_text())
            if "sliding_window" in config:
                config |= {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}
                config.pop("layer_types", None)
                (folder / "config.json").write_text(json.dumps(config))
        return made[name]

    return make


def _batches() -> list[dict[str, torch.Tensor]]:
    """Of one and of several sequences, of other lengths, and padded on either side."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 300, size, generator=generator) for size in ((1, 13), (1, 1), (3, 17), (2, 17))]
    masks = [torch.ones_like(item) for item in ids]
    masks[2][0, 11:] = 0
    masks[3][1, :5] = 0
    return [{"input_ids": item} for item in ids[:2]] + [
        {"input_ids": i, "attention_mask": m} for i, m in zip(ids[2:], masks[2:], strict=True)
    ]


def _arguments(folder: Path) -> dict[str, Any]:
    return {"use_cache": False} if FAMILIES[folder.name][0].endswith(("ForCausalLM", "LMHeadModel")) else {}


def _plain(folder: Path, dtype: str, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    import transformers

    model = getattr(transformers, FAMILIES[folder.name][0]).from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    arguments = _arguments(folder)
    with torch.no_grad():
        return [model(**batch, **arguments)[0] for batch in batches]


def _walked(
    folder: Path, dtype: str, batches: list[dict[str, torch.Tensor]], workers: int = 1, **options: Any
) -> tuple[list[torch.Tensor], list[str]]:
    outputs: dict[int, torch.Tensor] = {}
    arguments = _arguments(folder)
    skeleton = Skeleton(open_source(str(folder)), dtype=dtype)
    asked = [{**batch, **arguments} for batch in batches]
    with crew(workers) as hands:
        order = [stand.name for stand in walk(skeleton, asked, finish=lambda i, out: outputs.update({i: out[0]}), crew=hands, **options)]
    assert order == list(blocks_of(skeleton.model))
    return [outputs[i] for i in range(len(batches))], order


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_block_by_block_is_the_plain_forward_to_the_bit(family: str, dtype: str, family_folder: Any) -> None:
    batches = _batches()
    folder = family_folder(family)
    walked, order = _walked(folder, dtype, batches, workers=2)
    assert len(order) == 2
    for got, expected in zip(walked, _plain(folder, dtype, batches), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("to_the_end", [True, False])
@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_probe_goes_along_and_changes_nothing(family_folder: Any, tmp_path: Path, to_the_end: bool, place: str) -> None:
    """It sees what its batch sees at these tokens, behind blocks that were changed too."""
    folder, batches, outputs = family_folder("llama"), _batches(), dict[int, torch.Tensor]()
    asked = [{**batch, "use_cache": False} for batch in batches]
    probe = {"input_ids": batches[0]["input_ids"][:, :5], "use_cache": False}
    skeleton = Skeleton(open_source(str(folder)), dtype="float32")
    finish = (lambda i, out: outputs.update({i: out[0]})) if to_the_end else None
    for number, stand in enumerate(walk(skeleton, asked, finish=finish, probe=probe, place=place, scratch=tmp_path)):
        assert len(stand.arguments) == len(batches)
        whole, beginning = (groups.first_tensor(stand.output(i)) for i in (0, stand.sample))
        torch.testing.assert_close(beginning, whole[:, :5], rtol=1e-5, atol=1e-5)
        assert beginning.shape[1] == 5
        if number == 0:
            stand.module.mlp.down_proj.weight.mul_(-3)
    if to_the_end:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(-3)
            for i, batch in enumerate(asked):
                assert torch.equal(outputs[i], model(**batch)[0])


def test_a_head_in_slabs_is_the_whole_head(family_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "HEAD_SLAB_ELEMENTS", 64 * 128)
    walked, _ = _walked(family_folder("llama"), "float32", _batches())
    for got, expected in zip(walked, _plain(family_folder("llama"), "float32", _batches()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_lane_on_disk_leaves_no_file_and_changes_nothing(family_folder: Any, tmp_path: Path) -> None:
    walked, _ = _walked(family_folder("llama"), "bfloat16", _batches(), place="disk", scratch=tmp_path)
    for got, expected in zip(walked, _plain(family_folder("llama"), "bfloat16", _batches()), strict=True):
        assert torch.equal(got, expected)
    assert list(tmp_path.iterdir()) == []


def test_only_the_block_at_work_is_in_memory(family_folder: Any) -> None:
    skeleton = Skeleton(open_source(str(family_folder("llama"))), dtype="float32")
    for stand in walk(skeleton, [{"input_ids": torch.arange(5)[None]}]):
        real = {name for name, parameter in skeleton.model.named_parameters(remove_duplicate=False) if not parameter.is_meta}
        assert real == {
            "model.embed_tokens.weight",
            "model.norm.weight",
            *(f"{stand.name}.{name}" for name, _ in stand.module.named_parameters()),
        }
        assert skeleton.model.model.embed_tokens.weight.shape[0] == 5


def test_the_caller_keeps_its_gradients_while_walks_are_under_way_and_when_they_end_in_any_order(family_folder: Any) -> None:
    first, second = (
        walk(Skeleton(open_source(str(family_folder("llama"))), dtype="float32"), [{"input_ids": torch.arange(5)[None]}]) for _ in range(2)
    )
    for stands in (first, second):
        next(stands).run(keep=True)
        assert torch.is_grad_enabled()
    first.close()
    second.close()
    assert torch.is_grad_enabled()


def test_what_a_block_is_changed_to_is_what_its_successors_see(family_folder: Any) -> None:
    """Against the plain model with the same change, run without keeping in between."""
    import transformers

    folder = family_folder("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = {"input_ids": torch.arange(3, 20)[None], "use_cache": False}
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        expected = model(**batch).logits
    outputs = []
    for stand in walk(Skeleton(open_source(str(folder)), dtype="float32"), [batch], finish=lambda _, out: outputs.append(out.logits)):
        stand.run(keep=False)
        if stand.name.endswith(".0"):
            stand.module.mlp.down_proj.weight.mul_(1.5)
    assert torch.equal(outputs[0], expected)


def test_of_what_a_stopped_pass_computed_nothing_hangs_on_its_exception(family_folder: Any) -> None:
    skeleton = Skeleton(open_source(str(family_folder("llama"))), dtype="float32")
    computed: list[weakref.ref[torch.Tensor]] = []
    stopped: list[BaseException] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        computed.append(weakref.ref(hidden))
        try:
            return mlp.down_proj(hidden)
        except BaseException as stop:
            stopped.append(stop)
            raise

    with Observer(skeleton, None) as observer:
        stands = walk(skeleton, [{"input_ids": torch.arange(5)[None], "use_cache": False}] * 3)
        stand = next(stands)
        mlp = stand.module.mlp
        mlp.forward = forward
        observer.want([f"{stand.name}.mlp.down_proj"], "absmax")
        stand.run(keep=False, observer=observer)
    assert len(stopped) == 2
    assert [made() for made in computed] == [None, None, None]
    del mlp.forward
    stands.close()


def test_a_lane_lies_where_it_fits() -> None:
    assert place_for(10, on_gpu=True, gpu_free_bytes=20, host_free_bytes=100) == "device"
    assert place_for(11, on_gpu=True, gpu_free_bytes=20, host_free_bytes=100) == "host"
    assert place_for(10, on_gpu=False, gpu_free_bytes=20, host_free_bytes=20) == "host"
    assert place_for(11, on_gpu=False, gpu_free_bytes=20, host_free_bytes=20) == "disk"


def test_the_head_is_where_lanes_stand_last_and_may_see_what_became_of_those_before(family_folder: Any) -> None:
    folder = family_folder("llama")
    batches = _batches()
    expected = _plain(folder, "float32", batches)
    skeleton = Skeleton(open_source(str(folder)), dtype="float32")
    done: dict[int, torch.Tensor] = {}
    order = []
    asked = [{**batch, **_arguments(folder)} for batch in batches]
    for stand in walk(skeleton, asked, finish=lambda i, out: done.update({i: out[0]}), at_head=True):
        order.append(stand.name)
        if stand.name == "lm_head":

            def made(stand: Any = stand) -> Any:
                for i in range(len(batches)):
                    assert list(done) == list(range(i))
                    yield stand.output(i)

            stand.hand_on_as_made(made())
    assert order == [*blocks_of(skeleton.model), "lm_head"]
    assert all(torch.equal(done[i], logits) for i, logits in enumerate(expected))
    assert skeleton.model.lm_head.weight.is_meta
