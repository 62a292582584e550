"""The GPU engine without Triton: how work is cut, and what happens where the engine cannot be used."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import CASES
from evenorm.engines import triton
from evenorm.engines.triton.plan import LARGEST_TILE, MOST_WARPS, PER_WARP, TILE, make_plan, regular
from evenorm.moments import virtual_batches
from truth import Call

sizes = st.integers(1, 5000)


@settings(max_examples=200, deadline=None)
@given(
    samples=st.integers(1, 700),
    channels=sizes,
    positions=st.one_of(st.just(1), sizes, st.just(224 * 224)),
    rows=st.booleans(),
    size=st.integers(1, 9),
    itemsize=st.sampled_from([2, 4]),
    twice=st.booleans(),
)
def test_every_value_is_in_one_tile(samples, channels, positions, rows, size, itemsize, twice):
    groups = len(virtual_batches(samples, samples // size + 1) or [samples])
    rows = rows or positions == 1
    plan = make_plan(samples, channels, positions, rows, groups, itemsize, twice)
    starts = [g * plan.base + min(g, plan.extra) * plan.unit for g in range(groups + 1)]
    assert (starts[0], starts[-1] * plan.positions) == (0, samples * positions)
    sizes_of_groups = [(b - a) * plan.positions // positions for a, b in itertools.pairwise(starts)]
    assert groups == 1 or regular(sizes_of_groups, samples)
    down = math.ceil(max(b - a for a, b in itertools.pairwise(starts)) / plan.block_n)
    assert plan.tiles == down * math.ceil(plan.positions / plan.block_l)
    assert plan.chunks * plan.per_chunk >= plan.tiles > (plan.chunks - 1) * plan.per_chunk
    assert plan.blocks * plan.block_c >= channels
    inner = plan.channels if plan.rows else plan.positions
    assert inner % plan.align == 0
    told = plan.sizes
    assert (told[0] if plan.rows else told[1]) * plan.align == inner
    elements = plan.block_c * plan.block_n * plan.block_l
    assert elements <= (LARGEST_TILE if plan.whole else TILE)
    assert 1 <= plan.warps <= MOST_WARPS
    assert elements <= plan.warps * PER_WARP


@pytest.mark.parametrize("shape", [(256, 3, 224 * 224), (256, 2048, 49), (256, 64, 112 * 112), (65536, 256, 1)])
def test_large_inputs_fill_a_large_device(shape):
    for rows in (False, True):
        plan = make_plan(*shape, rows or shape[2] == 1, 1, 2, True)
        assert plan.programs >= 7 * 132


@pytest.mark.parametrize(("side", "busy"), [(112, 0.97), (56, 0.97), (28, 0.94), (14, 0.76), (224, 0.97)])
def test_few_lanes_of_a_tile_of_planes_idle(side, busy):
    plan = make_plan(256, 64, side * side, False, 1, 2, True)
    assert 256 * side * side / (plan.tiles * plan.block_n * plan.block_l) > busy
    assert plan.block_n * plan.block_l == TILE
    assert plan.block_l * 2 >= 128  # bytes


def test_one_sample_is_not_cut_into_tiles_that_are_not_full():
    assert make_plan(1, 3, 2048 * 9 + 64, False, 1, 2).block_l == TILE


def test_rows_are_cut_finer_where_nothing_is_left_to_merge():
    plan = make_plan(256, 64, 56 * 56, True, 1, 2, True)
    assert 1500 < plan.programs < 2500
    assert 3500 < plan.finely.programs < 4600
    assert plan.finely.chunks * plan.finely.per_chunk >= plan.tiles


def test_groups_as_virtual_batches_are_cut():
    assert regular([3, 3, 2], 8)
    assert regular([4, 4], 8)
    assert not regular([2, 3, 3], 8)
    assert not regular([8, 0], 8)
    assert not regular([3, 3], 8)


def test_one_warning_where_a_gpu_cannot_be_used(monkeypatch):
    monkeypatch.setattr(triton, "_registered", ["Triton is not installed: No module named 'triton'"])
    monkeypatch.setattr(triton, "_usable", {})
    with pytest.warns(UserWarning, match="GPU engine is not used, torch's operations are: Triton is not installed"):
        assert not triton._takes(0, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton._takes(0, torch.float32)


def test_switched_off_is_no_warning(monkeypatch):
    monkeypatch.setenv("EVENORM_ENGINE", "off")
    monkeypatch.setattr(triton, "_registered", [])
    monkeypatch.setattr(triton, "_usable", {})
    assert not triton._takes(0, torch.float32)
    assert triton.available() == "switched off by EVENORM_ENGINE=off"


def test_a_device_too_old_for_a_dtype_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "_registered", [None])
    monkeypatch.setattr(triton, "_probed", {0: None})
    monkeypatch.setattr(triton, "_usable", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert triton._takes(0, torch.float16)
    with pytest.warns(UserWarning, match=r"bfloat16 needs compute capability 8\.0, device 0 has 7\.5"):
        assert not triton._takes(0, torch.bfloat16)


def test_two_threads_register_the_operators_once(monkeypatch):
    calls = []

    def load():
        calls.append(1)
        time.sleep(0.1)  # both threads would be here
        return "twice" if len(calls) > 1 else "once"

    monkeypatch.setattr(triton, "_registered", [])
    monkeypatch.setattr(triton, "_load", load)
    found = []
    threads = [threading.Thread(target=lambda: found.append(triton.available(0))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["once", "once"]


@pytest.fixture
def launches(monkeypatch):
    """Let two devices seem to be there; their launches, in this list, raise what stands in `launches.errors`."""
    seen = SimpleNamespace(tensors=[], devices=[], errors=[], capturing=False)
    zeros = torch.zeros

    def make(*shape, device):
        seen.devices.append(device)
        return zeros(*shape)

    def moments(x, mask, splits):
        seen.tensors.append(x)
        if seen.errors:
            raise seen.errors.pop()

    for name, value in (("_registered", [None]), ("_probed", {}), ("_usable", {}), ("_interpreted", lambda: False)):
        monkeypatch.setattr(triton, name, value)
    monkeypatch.setattr(triton, "operators", SimpleNamespace(moments=moments), raising=False)
    monkeypatch.setattr(torch, "zeros", make)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen.capturing)
    return seen


def test_each_device_is_tried_once_and_answers_for_itself(launches):
    launches.errors = [RuntimeError("no kernel image")]
    with pytest.warns(UserWarning, match="no kernel image"):
        assert not triton._takes(1, torch.float32)
    assert triton._takes(0, torch.float32)
    assert not triton._takes(1, torch.float32)
    assert triton._takes(0, torch.bfloat16)
    assert launches.devices == ["cuda:1", "cuda:0"]


def test_a_want_of_memory_is_not_remembered(launches):
    launches.errors = [torch.OutOfMemoryError("CUDA out of memory")]
    with pytest.warns(UserWarning, match="out of memory"):
        assert not triton._takes(0, torch.float32)
    assert triton._takes(0, torch.float32)


def test_a_capture_loads_nothing_and_its_answer_is_not_remembered(launches):
    launches.capturing = True
    with pytest.warns(UserWarning, match="run a step before"):
        assert not triton._takes(0, torch.float32)
    assert not launches.tensors
    launches.capturing = False
    assert triton._takes(0, torch.float32)


def test_the_first_use_among_fake_tensors_launches_with_memory(launches):
    with FakeTensorMode():
        assert triton._takes(0, torch.float32)
    assert type(launches.tensors[0]) is torch.Tensor


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_why_the_engine_is_not_there(monkeypatch):
    monkeypatch.delenv("EVENORM_ENGINE", raising=False)
    assert triton._load() == "torch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "evenorm.engines.triton.operators", raising=False)
    for name in ("backward", "curves", "forward", "launch", "operators", "tiles", "track"):
        monkeypatch.delitem(sys.modules, f"evenorm.engines.triton.{name}", raising=False)
        monkeypatch.delattr(triton, name, raising=False)  # where another test has imported it
    assert triton._load().startswith("Triton is not installed")


@pytest.mark.parametrize("name", ["4-D", "4-D, channels_last", "4-D, sliced", "4-D, expanded", "4-D, offset"])
def test_all_of_a_case_lies_on_the_device_that_is_asked_for(name):
    """As the tests on a GPU have it, layouts included; here it is a device without data."""
    case, seen = CASES[name], []

    def record(x, state, training, activation, residual, mask):
        seen.extend([x, residual, mask, *state])
        return (x + residual) * (state.weight * state.bias).sum()

    with pytest.raises(NotImplementedError, match="no data"):  # the results of such a device cannot come back
        Call(case, True, with_residual=True, with_mask=True, device="meta").answer(record)
    assert len(seen) == 7
    assert {tensor.device.type for tensor in seen} == {"meta"}
    assert seen[0].stride() == case.make().stride()
    assert case.noise(2, "meta").stride() == case.noise(2).stride()
