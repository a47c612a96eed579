"""Lists of modules to leave alone mean what transformers takes them for."""

from __future__ import annotations

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from formats.errors import FormatError
from formats.skips import skip_list, skips


@pytest.mark.parametrize(
    ("module", "patterns"),
    [
        ("lm_head", ["lm_head"]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1"]),
        ("model.layers.11.mlp.up_proj", ["model.layers.1"]),
        ("model.layers.11.mlp.up_proj", ["model.layers.1*"]),
        ("mlp.gate_proj", ["mlp.gate"]),
        ("model.decoder.layers.23.fc1", ["fc1"]),
        ("model.xfc1", ["fc1", "b"]),
        ("a.b", ["x|a."]),
        ("pooler.dense", ["pooler.dense.bias"]),
        ("a", []),
    ],
)
def test_readers_leave_a_module_alone_or_not_as_transformers_decides(module: str, patterns: list[str]) -> None:
    assert skips(module, patterns) == (not should_convert_module(module, patterns))


def test_a_list_says_nothing_where_transformers_would_do_the_same() -> None:
    assert skip_list(["a", "b"], ["lm_head"], ["lm_head", "norm"]) is None
    assert skip_list(["a"], ["b", "lm_head"], ["lm_head"]) == ["b", "lm_head"]
    assert skip_list(["a", "lm_head"], [], ["lm_head"]) == []


def test_without_what_is_automatic_there_is_always_a_list() -> None:
    assert skip_list(["a"], ["lm_head"]) == ["lm_head"]
    assert skip_list(["a"], []) == []


def test_a_list_that_would_catch_a_quantized_module_is_an_error() -> None:
    with pytest.raises(FormatError, match="big_lm_head cannot be quantized where lm_head is kept"):
        skip_list(["a", "big_lm_head"], ["lm_head"])
