"""docs/peers.md says what is measured."""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "peers.md"


@pytest.fixture(scope="module")
def measured() -> list[str]:
    with warnings.catch_warnings():  # other tools' own, at import and at work
        warnings.simplefilter("ignore")
        pytest.importorskip("fvcore", reason="fvcore is a test dependency: pip install --group test")
        import peers

        return peers.tables()


@pytest.mark.parametrize("number", [0, 1], ids=["calibration", "folding"])
def test_the_tables_are_those_measured(measured, number):
    if torch.__version__.partition("+")[0] != pinned("torch") or importlib.metadata.version("fvcore") != pinned(
        "fvcore"
    ):
        pytest.skip("the page shows what the pinned versions do")
    assert measured[number] in PAGE.read_text(encoding="utf-8"), f"the page is stale:\n{measured[number]}"


def test_the_page_names_the_versions():
    page = PAGE.read_text(encoding="utf-8")
    assert f"torch {pinned('torch')}" in page
    assert f"fvcore {pinned('fvcore')}" in page


def pinned(name: str) -> str:
    lines = (PAGE.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))
