"""Memory of large outputs: taken again when its tensor is gone and not before, and lent to the kernel when idle."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import evenorm
from evenorm.engines import cpu
from own_process import run

pytestmark = [
    pytest.mark.skipif(cpu.available() is not None, reason="the C++ engine is not there"),
    pytest.mark.skipif(os.environ.get("EVENORM_RECYCLE") == "off", reason="switched off by EVENORM_RECYCLE"),
    pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="torch 2.10 takes no memory of ours"),
]

MEGABYTE = 2**20
ROWS = 8192  # of 64 float32: 2 MB
ROUNDING = 1e-5  # between torch's y and ours, of up to 5


def normalised(x: Tensor) -> Tensor:
    return evenorm.functional.batch_norm(x, None, None, training=True)


def drawn(rows: int = ROWS, seed: int = 0, channels: int = 64) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))


def test_an_output_takes_the_memory_of_one_that_is_gone() -> None:
    x = drawn()
    y = normalised(x)
    before = y.data_ptr()
    del y
    assert normalised(x).data_ptr() == before


def test_what_lives_in_any_way_keeps_its_memory() -> None:
    x = drawn()
    y = normalised(x)
    first, copy = y[:1], y.clone()
    del y
    others = [normalised(drawn(seed=seed)) for seed in range(1, 4)]
    assert len({t.data_ptr() for t in (first, *others)}) == 4
    assert torch.equal(first, copy[:1])


def test_every_element_is_written_over_what_was_there() -> None:
    x, dy = drawn().requires_grad_(), drawn(seed=1)
    for _ in range(2):
        y = evenorm.functional.batch_norm(x, None, None, training=True, activation="relu")
        (dx,) = torch.autograd.grad(y, x, dy)
        assert not y.isnan().any()
        assert not dx.isnan().any()
        with torch.no_grad():
            y.fill_(torch.nan)
            dx.fill_(torch.nan)


def test_sizes_that_vary_share_memory_that_is_nearly_theirs() -> None:
    for rows in (ROWS, ROWS - 100, ROWS + 1000, 2 * ROWS, 3 * ROWS + 7, ROWS):
        x = drawn(rows)
        torch.testing.assert_close(normalised(x), torch.nn.functional.batch_norm(x, None, None, training=True))


def test_threads_may_take_and_let_go_at_once() -> None:
    def work(seed: int) -> bool:
        x = drawn(seed=seed)
        true = torch.nn.functional.batch_norm(x, None, None, training=True)
        kept = [normalised(x) for _ in range(3)]
        return all(torch.allclose(y, true, atol=ROUNDING) for _ in range(10) for y in (*kept, normalised(x)))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not tell")
def test_what_lies_idle_is_lent_to_the_kernel() -> None:
    def lent() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("LazyFree")) * 1024

    x = drawn(6 * ROWS)  # 12 MB
    true = torch.nn.functional.batch_norm(x, None, None, training=True)
    before = lent()
    outputs = [normalised(x) for _ in range(30)]  # 360 MB, of which 256 are kept
    outputs.clear()
    assert lent() - before > 60 * MEGABYTE
    for _ in range(2):
        outputs = [normalised(x) for _ in range(30)]
        assert all(torch.allclose(y, true, atol=ROUNDING) for y in outputs)
        outputs.clear()


TWICE = """
import torch, evenorm
x = torch.randn(8192, 64)
y = evenorm.functional.batch_norm(x, None, None, training=True)
print(y.untyped_storage().resizable())
"""


@pytest.mark.parametrize(("setting", "resizable"), [("on", "False"), ("off", "True")])
def test_the_environment_switches_it_off(setting: str, resizable: str) -> None:
    assert run(TWICE, EVENORM_RECYCLE=setting) == resizable


FORKED = """
import os, torch, warnings, evenorm
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: that is tested
torch.set_num_threads(1)
x = torch.randn(8192, 64)
def mean():
    return float(evenorm.functional.batch_norm(x, None, None, training=True).abs().mean())
before = mean()
child = os.fork()
if child == 0:
    os._exit(0 if mean() == before else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), mean() == before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_goes_on() -> None:
    assert run(FORKED) == "0 True"
