"""Grids, tiles, and the one equation that a quantized matrix stands for."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.dtypes import DTYPES, from_torch_name, numpy_dtype
from formats.qtensor import QTensor
from formats.scheme import FP8_E4M3, INT8, PER_CHANNEL, PER_TENSOR, PER_TOKEN, SCHEMES, Grid, Quantization, Tile

extents = st.integers(1, 40)
tiles = st.builds(Tile, st.none() | extents, st.none() | extents)


def dequantize_slowly(values: np.ndarray, scale: np.ndarray, tile: Tile) -> np.ndarray:
    """``values * scale`` element by element, in the arithmetic of the definition: no repeat, no broadcast."""
    rows, columns = values.shape
    result = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            row = 0 if tile.rows is None else i // tile.rows
            column = 0 if tile.columns is None else j // tile.columns
            result[i, j] = np.float32(values[i, j]) * np.float32(scale[row, column])
    return result


def example_of(shape: tuple[int, int], tile: Tile, grid: Grid, scale_dtype: torch.dtype) -> QTensor:
    """Random codes under scales that all differ."""
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    values = codes if grid.kind == "int" else (codes.float() * 3).to(torch.float8_e4m3fn)
    count = tile.scale_shape(shape)
    scale = (torch.randperm(math.prod(count), generator=generator).reshape(count) + 1).float() / 64
    return QTensor(values, scale.to(scale_dtype), Quantization(grid, tile))


# Tiles


@given(tiles, extents, extents)
def test_scale_shape_counts_the_tiles_that_the_elements_fall_in(tile: Tile, rows: int, columns: int) -> None:
    fallen = {
        (0 if tile.rows is None else i // tile.rows, 0 if tile.columns is None else j // tile.columns)
        for i, j in itertools.product(range(rows), range(columns))
    }
    count = tile.scale_shape((rows, columns))
    assert fallen == set(itertools.product(range(count[0]), range(count[1])))


@given(tiles, extents, extents, extents)
def test_tiles_of_one_matrix_above_another_add_up_when_the_cut_is_between_tiles(
    tile: Tile, tiles_above: int, below: int, columns: int
) -> None:
    if tile.rows is None:
        return
    above = tiles_above * tile.rows
    whole = tile.scale_shape((above + below, columns))
    assert whole == (tiles_above + tile.scale_shape((below, columns))[0], tile.scale_shape((1, columns))[1])


def test_the_named_tiles_over_a_prime_and_an_empty_matrix() -> None:
    assert PER_TENSOR.scale_shape((13, 7)) == (1, 1)
    assert PER_CHANNEL.scale_shape((13, 7)) == PER_TOKEN.scale_shape((13, 7)) == (13, 1)
    assert Tile(1, 4).scale_shape((13, 7)) == (13, 2)
    assert Tile(128, 128).scale_shape((129, 127)) == (2, 1)
    assert PER_CHANNEL.scale_shape((0, 7)) == (0, 1)
    assert Tile(1, 4).scale_shape((13, 0)) == (13, 0)


# Quantized matrices

NAMED_TILES = {
    "per tensor": PER_TENSOR,
    "per channel": PER_CHANNEL,
    "per group": Tile(1, 4),
    "per column": Tile(None, 1),
    "per group of columns": Tile(None, 5),
    "per block": Tile(3, 4),
    "per block of rows": Tile(3, None),
    "per element": Tile(1, 1),
    "a block larger than the matrix": Tile(128, 128),
}


@pytest.mark.parametrize("grid", [INT8, FP8_E4M3], ids=["int8", "fp8"])
@pytest.mark.parametrize("shape", [(12, 20), (13, 7), (1, 1), (1, 17), (17, 1), (3, 4), (4, 5)], ids=str)
@pytest.mark.parametrize("tile", NAMED_TILES)
def test_dequantize_is_codes_times_scales_element_by_element(tile: str, shape: tuple[int, int], grid: Grid) -> None:
    quantized = example_of(shape, NAMED_TILES[tile], grid, torch.bfloat16)
    expected = dequantize_slowly(quantized.values.float().numpy(), quantized.scale.float().numpy(), NAMED_TILES[tile])
    found = quantized.dequantize()
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected, strict=True)


@settings(deadline=None, max_examples=80)
@given(tiles, extents, extents)
def test_dequantize_is_codes_times_scales_for_any_tile(tile: Tile, rows: int, columns: int) -> None:
    quantized = example_of((rows, columns), tile, INT8, torch.float32)
    expected = dequantize_slowly(quantized.values.numpy(), quantized.scale.numpy(), tile)
    np.testing.assert_array_equal(quantized.dequantize().numpy(), expected, strict=True)


@settings(deadline=None, max_examples=50)
@given(tiles, extents, extents)
def test_the_spread_scale_broadcasts_over_the_values_in_the_dtype_of_the_scale(tile: Tile, rows: int, columns: int) -> None:
    quantized = example_of((rows, columns), tile, INT8, torch.bfloat16)
    spread = quantized.spread_scale()
    assert spread.dtype == torch.bfloat16
    assert torch.broadcast_shapes(spread.shape, quantized.values.shape) == quantized.values.shape


@pytest.mark.parametrize(
    ("values", "scale", "tile"),
    [
        ((13, 7), (13,), PER_CHANNEL),
        ((13, 7), (1, 13), PER_CHANNEL),
        ((13, 7), (12, 1), PER_CHANNEL),
        ((13, 7), (13, 7), PER_CHANNEL),
        ((13, 7), (1, 1), PER_CHANNEL),
        ((13, 7), (), PER_TENSOR),
        ((13, 7), (1,), PER_TENSOR),
        ((13, 7), (13, 1), Tile(1, 4)),
        ((13, 8), (13, 3), Tile(1, 4)),
        ((13, 7), (4, 2), Tile(3, 4)),
        ((7,), (7, 1), PER_CHANNEL),
        ((2, 3, 4), (2, 1), PER_CHANNEL),
    ],
    ids=str,
)
def test_scales_that_do_not_fit_the_values_are_refused(values: tuple[int, ...], scale: tuple[int, ...], tile: Tile) -> None:
    with pytest.raises(ValueError, match=r"expected|unpack"):
        QTensor(torch.zeros(values, dtype=torch.int8), torch.ones(scale), Quantization(INT8, tile))


def test_a_matrix_without_rows_is_a_matrix() -> None:
    quantized = QTensor(torch.zeros(0, 7, dtype=torch.int8), torch.ones(0, 1), Quantization(INT8, PER_CHANNEL))
    assert quantized.dequantize().shape == (0, 7)


# Grids


def test_the_float8_grid_is_the_one_ml_dtypes_has() -> None:
    info = ml_dtypes.finfo(ml_dtypes.float8_e4m3fn)
    assert (FP8_E4M3.high, FP8_E4M3.low) == (float(info.max), float(info.min))
    assert FP8_E4M3.mantissa_bits == info.nmant
    assert 2.0**FP8_E4M3.min_exponent == float(info.smallest_normal)
    assert 2.0 ** (FP8_E4M3.min_exponent - FP8_E4M3.mantissa_bits) == float(info.smallest_subnormal)


def test_the_float8_grid_holds_the_finite_codes_of_torch() -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()]
    assert (finite.min(), finite.max()) == (FP8_E4M3.low, FP8_E4M3.high)
    assert finite.numel() == 254


def test_the_int8_grid_is_symmetric_within_int8() -> None:
    assert -INT8.low == INT8.high == torch.iinfo(torch.int8).max


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_listed_under_its_own_name_with_a_dtype_that_can_be_written(name: str) -> None:
    scheme = SCHEMES[name]
    assert scheme.name == name
    assert DTYPES[scheme.weight.grid.dtype].bits == 8
    assert not scheme.weight.dynamic, "weights are stored, so their scales are"


# Element types


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_and_torch_agree_with_the_table_on_the_size_of_an_element(name: str) -> None:
    assert numpy_dtype(name).itemsize * 8 == DTYPES[name].bits
    assert getattr(torch, DTYPES[name].torch_name).itemsize * 8 == DTYPES[name].bits


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_and_torch_read_the_same_numbers_from_the_same_bytes(name: str) -> None:
    raw = np.arange(64, dtype=np.uint8) if name != "BOOL" else np.array([0, 1] * 32, np.uint8)
    with_torch = torch.from_numpy(raw.copy()).view(getattr(torch, DTYPES[name].torch_name))
    read = with_torch.double() if with_torch.is_floating_point() else with_torch
    np.testing.assert_array_equal(raw.view(numpy_dtype(name)).astype(read.numpy().dtype), read.numpy())


@pytest.mark.parametrize("name", DTYPES)
def test_a_torch_dtype_is_found_with_and_without_its_prefix(name: str) -> None:
    dtype = getattr(torch, DTYPES[name].torch_name)
    assert from_torch_name(str(dtype)) == from_torch_name(str(dtype).removeprefix("torch.")) == name


def test_a_dtype_that_torch_has_and_safetensors_has_not_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        from_torch_name("torch.qint8")
