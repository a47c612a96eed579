"""Models that read pictures, compared with their source on pictures, and where these come from."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from decoded import put_back
from PIL import Image

from convert import environments, pipeline
from convert.card import render_card
from convert.html import render
from convert.pictures import load_processor, take_pictures
from convert.recipe import Validation, parse_recipe
from convert.report import read_report, report_path
from formats.errors import InputError
from formats.manifest import read_manifest

RECIPE = """\
model: {model}
validation: {{images: {images}, pictures: 6}}
targets:
  - name: q
    format: onnx
    rules: [{{match: linear, scheme: int8-weight-only}}]
    runtimes: [{runtimes}]
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of a photograph that comes with matplotlib (of a US Navy officer, in the public domain), in two folders of five and seven."""
    import matplotlib

    folder = tmp_path_factory.mktemp("images")
    photograph = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    for i in range(12):
        part = folder / ("a" if i < 5 else "b") / f"{i:02}.{'jpg' if i % 2 else 'png'}"
        part.parent.mkdir(exist_ok=True)
        left, upper = 100 * (i % 4), 150 * (i // 4)
        photograph.crop((left, upper, left + 160, upper + 120)).save(part)
    (folder / "a" / "labels.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
    }
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=5)).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 1 else 0.08)
    vit.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def proven(model: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    node = environments.root() / "transformers.js" / environments.STAMP
    runtimes = "onnxruntime, transformers.js" if node.is_file() else "onnxruntime"
    text = RECIPE.format(model=model, images=images, runtimes=runtimes)
    return pipeline.convert(parse_recipe(text, "vit.yaml", name="vit"), tmp_path_factory.mktemp("out"))


def test_what_is_measured_is_what_transformers_loses_with_the_decoded_weights(proven: pipeline.Outcome, model: Path, images: Path) -> None:
    (report,) = proven.reports
    assert [check.name for check in report.checks if not check.passed] == []
    assert "a picture beside it changes nothing" in {check.name.rpartition(": ")[2] for check in report.checks}
    pictures, _ = take_pictures(Validation(images=str(images), pictures=6), load_processor(model, trust_remote_code=False))
    vit = transformers.ViTForImageClassification.from_pretrained(model).eval()
    with torch.no_grad():
        before = vit(torch.from_numpy(pictures)).logits
        assert put_back(vit, proven.artifacts[0].path) == 13
        after = vit(torch.from_numpy(pictures)).logits
    error = ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean()
    kl = torch.nn.functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")
    exported, *others = (run.drift for run in report.runtimes)
    assert exported is not None
    assert exported.vectors == 6
    assert exported.relative_error == pytest.approx(float(error), rel=1e-3)
    assert exported.kl_nats == pytest.approx(float(kl), rel=1e-2)
    assert exported.top1 == float((before.argmax(-1) == after.argmax(-1)).double().mean())
    assert all(other is not None and 0 < other.relative_error < 0.05 for other in others)


def test_reports_and_cards_speak_of_pictures(proven: pipeline.Outcome) -> None:
    out = proven.artifacts[0].path
    report = read_report(report_path(out))
    assert report == proven.reports[0]
    assert (report.validation["unit"], report.validation["tokens"]) == ("pictures", 6)
    card = render_card(report, read_manifest(out))
    assert "6 held-out pictures of images" in card
    assert 'await pipeline("image-classification"' in card
    assert "| same class |" in " ".join(card.split())
    assert "Same class" in render(report, read_manifest(out))


def test_a_folder_is_seen_everywhere_and_rows_come_as_datasets_keeps_them(images: Path, model: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    processor = load_processor(model, trust_remote_code=False)
    files = sorted(path for path in images.rglob("*") if path.suffix in (".png", ".jpg"))
    made = {path.name: processor(images=[Image.open(path).convert("RGB")], return_tensors="np")["pixel_values"][0] for path in files}
    four, record = take_pictures(Validation(images=str(images), pictures=4), processor)
    assert np.array_equal(four, np.stack([made[files[i].name] for i in (0, 3, 6, 9)]))
    assert record["text"] == images.name
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in files[:3]]
    parquet.write_table(
        pyarrow.table({"image": rows, "raw": [row["bytes"] for row in rows], "label": [1, 2, 3]}), tmp_path / "rows.parquet"
    )
    for column in (None, "raw"):
        found, record = take_pictures(Validation(images=str(tmp_path / "rows.parquet"), pictures=2, column=column), processor)
        assert np.array_equal(found, np.stack([made[path.name] for path in files[:2]]))
        assert record["column"] == (column or "image")
    with pytest.raises(InputError, match="row 1 of label holds no bytes of a picture"):
        take_pictures(Validation(images=str(tmp_path / "rows.parquet"), pictures=2, column="label"), processor)


def test_what_cannot_be_used_is_an_error_before_any_work(images: Path, model: Path, tmp_path: Path, recipe_for: Callable[..., Any]) -> None:
    processor = load_processor(model, trust_remote_code=False)
    with pytest.raises(InputError, match="12 pictures, 13 are wanted"):
        take_pictures(Validation(images=str(images), pictures=13), processor)
    with pytest.raises(InputError, match="no such folder"):
        take_pictures(Validation(images="./none", pictures=1), processor)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"bad\.png is no picture that can be read"):
        take_pictures(Validation(images=str(tmp_path / "bad"), pictures=1), processor)

    def as_it_is(images: list[Any], **_: Any) -> dict[str, Any]:
        return {"pixel_values": np.asarray(images[0])[None].transpose(0, 3, 1, 2)}

    buffer = io.BytesIO()
    Image.new("RGB", (10, 20)).save(buffer, "png")
    (tmp_path / "bad" / "bad.png").write_bytes(buffer.getvalue())
    Image.new("RGB", (10, 21)).save(tmp_path / "bad" / "other.png")
    with pytest.raises(InputError, match=r"other\.png \[3, 21, 10\], the first is \[3, 20, 10\]"):
        take_pictures(Validation(images=str(tmp_path / "bad"), pictures=2), as_it_is)
    text = RECIPE.format(model=model, images=images, runtimes="onnxruntime")
    without = text.replace(f"validation: {{images: {images}, pictures: 6}}\n", "")
    with pytest.raises(InputError, match=r"reads pixel_values.*set validation\.images"):
        pipeline.convert(parse_recipe(without, "vit.yaml", name="vit"), tmp_path / "out")
    copy = tmp_path / "unprepared"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((model / name).read_bytes())
    with pytest.raises(InputError, match="no image processor"):
        pipeline.convert(parse_recipe(text.replace(str(model), str(copy)), "vit.yaml", name="vit"), tmp_path / "out")
