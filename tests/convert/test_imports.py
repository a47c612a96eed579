"""Imports of what is large."""

import gc
import sys
from pathlib import Path

import pytest

from convert.imports import uncollected


@pytest.fixture(autouse=True)
def _thawed() -> object:
    yield
    gc.unfreeze()


def test_what_was_imported_is_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "octavo_large.py").write_text("import gc\nnumbers = [[] for _ in range(10_000)]\ncollects = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    with uncollected():
        import octavo_large  # type: ignore[import-not-found]
    assert not octavo_large.collects
    assert gc.isenabled()
    assert gc.get_freeze_count() >= 10_000
    del sys.modules["octavo_large"]


def test_where_nothing_was_imported_all_can_be_collected() -> None:
    gc.unfreeze()
    with uncollected():
        import json  # noqa: F401
    assert gc.get_freeze_count() == 0


def test_a_collector_that_was_away_stays_away() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
