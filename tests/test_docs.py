"""Every example that a reader can see runs: the Python blocks of the pages, and the public docstrings."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

import evenorm

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^\s*(?:```+|~~~+)\s*\{?(?:code-block\}\s*)?py", re.MULTILINE | re.IGNORECASE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(page: Path) -> list[tuple[int, str]]:
    """Return each Python block of a page with the number of the line before its first."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


@pytest.fixture(autouse=True)
def _own_folder_and_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example that writes a file writes it there
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, source in blocks(page):
        # The empty lines make a traceback point into the page.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", evenorm.__all__)
def test_the_examples_of_a_docstring_run(name):
    imported = {"torch": torch, "evenorm": evenorm}
    found = doctest.DocTestFinder().find(getattr(evenorm, name), name, globs=imported)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    for example in found:
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_is_passed_over(page):
    """A fence written otherwise (indented, ``py``, ``Python``) would never run, and nobody would know."""
    assert len(FENCE.findall(page.read_text(encoding="utf-8"))) == len(blocks(page))
