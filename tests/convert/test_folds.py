"""Factors of smoothing as plain data."""

from __future__ import annotations

import json

import pytest
import torch

from convert.folds import Fold, read_fold


@pytest.mark.parametrize(
    ("scales", "most"),
    [
        (torch.exp2(torch.randn(768, generator=torch.Generator().manual_seed(0)).round()), 0.7),
        (torch.exp2(torch.arange(-7.0, 8.0)), 2),
        (torch.exp2(torch.arange(-126.0, -110.0)), 2),
        (torch.exp2(torch.arange(112.0, 128.0)), 2),
        (torch.exp2(torch.arange(-8.0, 9.0)), 6),
        (torch.exp2(torch.tensor([-126.0, 0.0, 127.0])), 60),
        (torch.rand(768, generator=torch.Generator().manual_seed(0)) + 0.5, 5.4),
        (torch.tensor([1.0, 2.0, 3.0]), 60),
        (torch.ones(1), 60),
    ],
)
def test_scales_come_back_to_the_bit_and_powers_of_two_are_short(scales: torch.Tensor, most: float) -> None:
    """``most``: bytes of text a scale."""
    told = Fold("up", ("down",), scales, scales, 0.0, 3, torch.float32)
    record = json.loads(json.dumps(told.record()))
    found = read_fold(record)
    assert found.scales.dtype == torch.float32
    assert torch.equal(found.scales, scales)
    assert found.rows is found.scales
    assert len(record["scales"]) <= most * len(scales)


def test_rows_that_several_channels_share_come_back_too() -> None:
    scales = torch.tensor([2.0, 2.0, 0.3, 0.3])
    record = json.loads(json.dumps(Fold("v", ("o",), scales, scales[::2], 0.0, 0, torch.bfloat16).record()))
    found = read_fold(record)
    assert torch.equal(found.rows, scales[::2])
    assert torch.equal(found.scales, scales)
    assert (found.producer, found.consumers, found.order, found.dtype) == ("v", ("o",), 0, torch.bfloat16)
