"""Several targets of one recipe: those that share a scheme share the codes, whatever their formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Make

from convert import pipeline
from convert.recipe import parse_recipe
from convert.source import SafetensorsReader
from formats import FORMATS
from formats.manifest import read_manifest
from formats.safetensors import TensorSpec, read_folder
from formats.scheme import SCHEMES

#: Weights that are quantized alike, in every format that holds them.
ALIKE = {
    "int8 channel": [
        ("compressed-tensors", "int8-dynamic"),
        ("compressed-tensors", "int8-weight-only"),
        ("torchao", "int8-dynamic"),
        ("torchao", "int8-weight-only"),
    ],
    "fp8 channel": [("compressed-tensors", "fp8-dynamic"), ("compressed-tensors", "fp8-weight-only"), ("torchao", "fp8-weight-only")],
    "fp8 block": [("compressed-tensors", "fp8-block"), ("fp8", "fp8-block")],
}


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized weight of an artifact, as its format decodes it from disk."""
    manifest = read_manifest(folder)
    reader = SafetensorsReader(read_folder(folder), lambda file: folder / file)
    form, found = FORMATS[manifest.format], {}
    for entry in manifest.ledger:
        if entry["decision"] == "quantize":
            weight = TensorSpec(entry["tensor"], "F32", tuple(entry["shape"]))
            specs = form.layer_tensors(weight, SCHEMES[entry["scheme"]])
            stored = {spec.name: reader.read(spec.name, 0, spec.matrix_shape[0]).reshape(spec.shape) for spec in specs.rows}
            found[entry["tensor"]] = form.decode(weight, stored, SCHEMES[entry["scheme"]]).dequantize()
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", ALIKE)
def test_targets_that_share_a_scheme_hold_identical_weights(case: str, dtype: str, make_llama: Make, tmp_path: Path) -> None:
    model = make_llama(hidden_size=128, intermediate_size=256, num_key_value_heads=4, dtype=dtype)
    line = "  - {{name: t{}, format: {}, rules: [{{match: linear, scheme: {}}}]}}\n"
    targets = "".join(line.format(i, form, scheme) for i, (form, scheme) in enumerate(ALIKE[case]))
    recipe = parse_recipe(f"model: {model}\ntargets:\n{targets}", "job.yaml", name="job")
    first, *others = [decoded(artifact.path) for artifact in pipeline.convert(recipe, tmp_path, check=False).artifacts]
    assert len(first) == 14
    for other in others:
        assert all(torch.equal(weight, other[name]) for name, weight in first.items())
        assert other.keys() == first.keys()
