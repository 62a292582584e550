"""The GPU engine's numbers, on a GPU, or without one on CPU tensors by Triton's interpreter: `make test-triton`.

What compiles, and into what, is in test_triton_compile.py, which needs no GPU either. The inputs are those of
cases.py; more than one chunk, group or tile comes from plans that are made smaller, since the interpreter is slow.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import evenorm
import truth
from cases import CASES, Case
from evenorm import formulas, updates
from evenorm.averages import Average, Cumulative, Exponential
from evenorm.engines import triton
from evenorm.engines.triton import plan
from evenorm.formulas import Setting
from evenorm.moments import Moments
from truth import Call, complaints

INTERPRETED = triton._interpreted() and importlib.util.find_spec("triton") is not None
GPU = torch.cuda.is_available() and triton.available() is None
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [
    pytest.mark.skipif(not (INTERPRETED or GPU), reason="neither a GPU nor TRITON_INTERPRET=1, see Makefile"),
    # The interpreter computes in numpy, which warns where a device does not.
    pytest.mark.filterwarnings(
        "ignore:(invalid value|overflow|divide by zero|All-NaN slice) encountered:RuntimeWarning"
    ),
]
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU")

EPS = 1e-5
IDENTITY, RELU, SILU = 0, 1, 3
HALF = (torch.bfloat16, torch.float16)
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
TAKEN = [case for case in CASES.values() if case.dtype in DTYPES]


@pytest.fixture
def small_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut small inputs as large ones are cut: several tiles a chunk, several chunks a group, several merges."""
    sizes = {"TILE": 64, "LARGEST_TILE": 32, "ROW": 4, "PLANE_PROGRAMS": 8, "ROW_PROGRAMS": 4, "FEWEST_ROWS": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(plan, name, size)
    monkeypatch.setattr(plan, "PER_WARP", 32)
    monkeypatch.setattr(plan, "MOST_PARTS", 4)
    caches = plan.make_plan, plan.make_merge
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that what a kernel leaves out is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(5, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def made(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values = (values * 3 + 1).to(dtype).to(DEVICE)
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if last else values


def parameters(channels: int) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, channels, generator=torch.Generator().manual_seed(9))
    weight[1:2] = 0
    return weight.to(DEVICE), bias.to(DEVICE)


def step(engine, x: Tensor, dy: Tensor, residual: Tensor | None, setting: Setting) -> list[Tensor]:
    """Run a training step on an engine; return all its results."""
    weight, bias = parameters(x.shape[1])
    y, *batch = engine.train_forward(x, weight, bias, residual, setting)
    code = setting.activation
    saved = None if residual is None or code == IDENTITY else y if code <= 2 else residual
    gradients = engine.train_backward(dy, x, *batch, weight, bias, saved, setting, residual is not None)
    return [y, *batch, *(gradient for gradient in gradients if gradient is not None)]


def compare(found: list[Tensor], true: list[Tensor], dtype: torch.dtype, terms: float) -> None:
    """Judge results of a step: errors in units of the largest value, of a sum's terms where it is a sum."""
    for place, (ours, theirs) in enumerate(zip(found, true, strict=True)):
        assert ours.shape == theirs.shape
        assert not ours.isnan().any(), place
        scale = theirs.double().abs().max() if ours.dim() != 1 else theirs.double().abs().max() + terms
        limit = DTYPES[dtype] if ours.dtype == dtype else 1e-6
        assert (ours.double() - theirs.double()).abs().max() <= limit * scale, place


# Float32 arithmetic rounds each of some steps, and a sum's terms; torch computes these cases in double on a CPU.
UNITS = {torch.float32: 4.0, torch.bfloat16: 1.0, torch.float16: 1.0, torch.float64: 16.0}


def judged(call: Call, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(truth, "ROUNDING", UNITS)
    monkeypatch.setattr(truth, "COMPUTED", UNITS[torch.float32])
    monkeypatch.setattr(truth, "EXACT_ACTIVATIONS", ())  # ReLU too may leave of a channel but a rest of rounding
    return complaints(call)


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_every_case_end_to_end(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `evenorm.batch_norm`: outputs, gradients for a random cotangent, running statistics."""
    calls = [Call(case, True, "relu", with_residual=True, device=DEVICE), Call(case, False, None, device=DEVICE)]
    if math.prod(case.shape):
        calls.append(Call(case, True, "silu", with_residual=True, with_mask=True, device=DEVICE))
    assert triton.supports(case.make(device=DEVICE))
    for call in calls:
        assert judged(call, monkeypatch) == []


@pytest.mark.parametrize("activation", [*truth.ACTIVATIONS, *truth.MODULES])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_activation(activation: str | None, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = truth.MODULES.get(activation, activation)
    for with_residual in (False, True):
        call = Call(CASES["2-D"], training, chosen, with_residual, device=DEVICE)
        assert judged(call, monkeypatch) == []


SHAPES = {
    "planes": (3, 5, 9, 17),
    "short planes": (7, 9, 3, 3),
    "one channel": (3, 1, 11, 13),
    "few channels": (1, 3, 300),
    "rows": (70, 9),
    "few columns": (311, 2),
}
OPTIONS = ("plain", "mask", "groups", "mask and groups", "residual")


def setting_for(options: str, shape: tuple[int, ...], code: int) -> Setting:
    mask = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(5)) > 0.3
    mask[0] = False  # a whole chunk without a valid value
    mask.view(-1)[-2:] = True
    splits = [shape[0] // 3 + (g < shape[0] % 3) for g in range(3)]
    return Setting(
        mask.to(DEVICE) if "mask" in options else None, splits if "groups" in options else None, EPS, code, 0.0
    )


@pytest.mark.usefixtures("small_plans")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_many_chunks_agree_with_the_formulas(shape: tuple[int, ...], last: bool, options: str) -> None:
    x, dy, residual = (made(shape, seed, last=last) for seed in range(3))
    setting = setting_for(options, shape, SILU if options == "residual" else RELU)
    given = (x, dy, residual if options == "residual" else None, setting)
    if options in ("plain", "mask"):
        positions = math.prod(shape[2:])
        rows = last or positions == 1
        assert plan.make_plan(shape[0], shape[1], positions, rows, 1, x.itemsize, True).chunks > 1
    compare(step(triton, *given), step(formulas, *given), torch.float32, float(dy.abs().sum() / shape[1]))


@pytest.mark.usefixtures("small_plans")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_half_precision_in_many_chunks(dtype: torch.dtype, last: bool) -> None:
    shape = SHAPES["planes"]
    x, dy, residual = (made(shape, seed, dtype, last) for seed in range(3))
    given = (x, dy, residual, Setting(None, None, EPS, RELU, 0.0))
    compare(step(triton, *given), step(formulas, *given), dtype, float(dy.float().abs().sum() / shape[1]))


@pytest.mark.usefixtures("small_plans")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_offsets_and_constants_in_many_chunks(last: bool) -> None:
    x = made((6, 5, 40), 0, last=last)
    x[:, 0], x[:, 1] = 1e4 + 0.1, -1e-8  # constants
    x[:, 2] += 1e5
    x[:, 3] *= 1e30
    x[0, 4, 0] += 1e4  # an outlier, where a naive shift would lie
    found, true = triton.moments(x), formulas.moments(x)
    assert torch.equal(found.mean[0, :2].float(), x[0, :2, 0])
    assert torch.equal(found.m2[0, :2], torch.zeros(2, dtype=torch.float64, device=DEVICE))
    for ours, theirs in zip((found.mean[0, 2:], found.m2[0, 2:]), (true.mean[0, 2:], true.m2[0, 2:]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    weight, bias = parameters(5)
    y = triton.train_forward(x, weight, bias, None, Setting(None, None, EPS, IDENTITY, 0.0))[0]
    assert torch.equal(y[:, :2], bias[:2].view(1, 2, 1).expand(6, 2, 40))


@pytest.mark.usefixtures("small_plans")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_channel(bad: float) -> None:
    x, dy = made((6, 5, 40), 0), made((6, 5, 40), 1)
    clean = step(triton, x, dy, None, Setting(None, None, EPS, RELU, 0.0))
    x[3, 2, 17] = bad
    found = step(triton, x, dy, None, Setting(None, None, EPS, RELU, 0.0))
    kept = torch.tensor([0, 1, 3, 4], device=DEVICE)
    assert found[0][:, 2].isnan().all()
    for ours, theirs in zip((found[0], found[4]), (clean[0], clean[4]), strict=True):
        assert torch.equal(ours[:, kept], theirs[:, kept])
    assert torch.equal(found[5][kept], clean[5][kept])


@pytest.mark.parametrize("chunks", ["one", "many"])
def test_an_infinite_value_makes_an_infinite_mean(chunks: str, request: pytest.FixtureRequest) -> None:
    if chunks == "many":
        request.getfixturevalue("small_plans")
    x = made((6, 5, 40), 0)
    x[0, 0, 0] = x[5, 1, 39] = x[3, 2, 17] = math.inf
    x[:, 1] *= -1
    x[0, 3, 0], x[5, 3, 39] = math.inf, -math.inf
    true = x.mean((0, 2))
    for splits in (None, [2, 2, 2]):
        y, *batch = triton.train_forward(x, None, None, None, Setting(None, splits, EPS, IDENTITY, 0.0))
        for found in (Moments(*batch), triton.moments(x, None, splits)):
            running = updates.Running(*(fill(5, device=DEVICE) for fill in (torch.zeros, torch.ones)), counter())
            updates.commit_(running, found, Exponential(1.0), skip_nonfinite=False)
            torch.testing.assert_close(running.mean, true, equal_nan=True)
        assert y[:, :4].isnan().all() == (splits is None)
        assert y[:, 4].isfinite().all()


@pytest.mark.usefixtures("small_plans")
def test_invalid_positions_are_never_read_and_come_out_as_zero() -> None:
    x, dy, residual = (made((5, 4, 30), seed) for seed in range(3))
    setting = setting_for("mask", x.shape, RELU)
    clean = step(triton, x, dy, residual, setting)
    hidden = ~setting.mask.unsqueeze(1).expand_as(x)
    for tensor in (x, dy, residual):
        tensor[hidden] = math.nan
    for ours, theirs in zip(step(triton, x, dy, residual, setting), clean, strict=True):
        assert torch.equal(ours, theirs)
    for output in (clean[0], clean[4], clean[7]):
        assert torch.equal(output[hidden], torch.zeros_like(output[hidden]))


@pytest.mark.usefixtures("small_plans")
def test_a_chunk_may_begin_with_nothing_valid() -> None:
    """Its centre is not 0 then: far from 0 that would cost all digits."""
    x = made((1, 2, 600), 0) + 1e5
    mask = torch.ones(1, 600, dtype=torch.bool, device=DEVICE)
    mask[0, :70] = False
    found, true = triton.moments(x, mask), formulas.moments(x, mask)
    torch.testing.assert_close(found.m2, true.m2, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.mean, true.mean, rtol=1e-12, atol=0)


@pytest.mark.parametrize("splits", [[2, 0, 3], [1, 4], [5, 0]])
def test_groups_cut_in_other_ways(splits: list[int]) -> None:
    x, dy = made((5, 3, 4), 0), made((5, 3, 4), 1)
    given = (x, dy, None, Setting(None, splits, EPS, RELU, 0.0))
    compare(step(triton, *given), step(formulas, *given), torch.float32, float(dy.abs().sum()))


@pytest.mark.usefixtures("small_plans")
@pytest.mark.parametrize("needs_sums", [True, False])
@pytest.mark.parametrize("code", [IDENTITY, RELU, SILU])
def test_evaluation_backward_is_one_pass(code: int, needs_sums: bool) -> None:
    x, dy, residual = (made((4, 6, 5, 7), seed) for seed in range(3))
    weight, bias = parameters(6)
    mean, var = torch.randn(6).to(DEVICE), torch.rand(6).to(DEVICE) + 0.5
    setting = Setting(None, None, EPS, code, 0.0)
    y = formulas.normalize(x, mean, var, weight, bias, residual, setting)
    saved = None if code == IDENTITY else y if code == RELU else residual
    given = (dy, x, mean, var, weight, bias, saved, setting, needs_sums, True)
    found, true = triton.eval_backward(*given), formulas.eval_backward(*given)
    assert [t is None for t in found] == [t is None for t in true]
    pairs = [(a, b) for a, b in zip(found, true, strict=True) if a is not None]
    compare(*(list(side) for side in zip(*pairs, strict=True)), torch.float32, float(dy.abs().sum() / 6))


@pytest.mark.usefixtures("small_plans")
def test_the_parts_of_a_step_make_up_the_step() -> None:
    """As workers pool: moments, normalise, sums and gradient one by one give what the fused step gives."""
    x, dy = made((6, 4, 30), 0), made((6, 4, 30), 1)
    weight, bias = parameters(4)
    setting = Setting(None, [3, 3], EPS, SILU, 0.0)
    y, *batch, dx, dweight, dbias = step(triton, x, dy, None, setting)
    pooled = triton.moments(x, None, [3, 3])
    given = (pooled.mean, pooled.variance(), weight, bias)
    n = pooled.count.unsqueeze(1)
    sums = triton.backward_sums(dy, x, *given, None, setting)
    apart = [
        triton.normalize(x, *given, None, setting),
        *(pooled.count, pooled.mean, pooled.m2),
        triton.input_gradient(dy, x, *given, None, setting, sums[0] / n, sums[1] / n, False)[0],
        sums[1].sum(0).float(),
        sums[0].sum(0).float(),
    ]
    compare(apart, [y, *batch, dx, dweight, dbias], torch.float32, float(dy.abs().sum() / 4))


@pytest.mark.usefixtures("small_plans")
def test_the_same_bits_each_run() -> None:
    given = (*(made((6, 5, 40), seed) for seed in range(3)), Setting(None, None, EPS, SILU, 0.0))
    for a, b in zip(step(triton, *given), step(triton, *given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    "average", [Exponential(0.3), Exponential(0.3, debias=True), Exponential(1.0), Cumulative()], ids=str
)
def test_tracking_is_what_updates_define(average: Average, groups: int) -> None:
    splits = None if groups == 1 else [2, 2, 2]
    batches = [made((6, 5, 9), seed) for seed in range(3)]
    batches[1][2, 3] = math.inf
    for dtype in DTYPES:
        running = [
            updates.Running(*(fill(5, dtype=dtype, device=DEVICE) for fill in (torch.zeros, torch.ones)), counter())
            for _ in range(2)
        ]
        for x in batches:
            batch = triton.moments(x, None, splits)
            updates.commit_(running[0], batch, average)
            updates._commit_plainly_(running[1], batch.pooled(), average, True)
        assert running[0].batches == running[1].batches == 3
        limit = 4 * torch.finfo(dtype).eps
        for a, b in zip(running[0][:2], running[1][:2], strict=True):
            torch.testing.assert_close(a, b, rtol=limit, atol=limit)


def counter() -> Tensor:
    return torch.tensor(0, device=DEVICE)


def test_a_batch_of_one_value_changes_nothing_and_one_without_a_good_channel_does_not_count() -> None:
    for x in (made((1, 3), 0), torch.full((4, 3), math.nan, device=DEVICE)):
        mean, var, batches = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE), counter()
        triton.track_(mean, var, batches, triton.moments(x), 0.1)
        assert (mean.tolist(), var.tolist(), int(batches)) == ([0, 0, 0], [1, 1, 1], 0)
    triton.track_(mean, var, batches, triton.moments(x), 0.1, skip_nonfinite=False)
    assert mean.isnan().all()
    assert batches == 1


def test_batches_that_a_channel_skips_are_counted() -> None:
    x = made((6, 3), 0)
    x[0, 1] = math.nan
    mean, var, skipped = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE), counter()
    triton.track_(mean, var, None, triton.moments(x), 0.1, skipped=skipped)
    assert skipped == 1
    assert (mean[1], var[1]) == (0, 1)
    assert not (mean[::2] == 0).any()


def network(theirs: bool) -> torch.nn.Module:
    layers = torch.nn if theirs else evenorm
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        layers.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Conv2d(6, 4, 3),
        layers.BatchNorm2d(4),
    ).to(DEVICE)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_a_network_trains_as_with_torchs_layers(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of convolutions, whose rounding is not ours
    x, cotangent = made((4, 3, 8, 8), 0, last=last), made((4, 4, 4, 4), 1)
    found = []
    for theirs in (True, False):
        model = network(theirs)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            optimiser.zero_grad()
            (model(x) * cotangent).sum().backward()
            optimiser.step()
        found.append([*model.state_dict().values(), model.eval()(x)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def operands() -> dict[str, tuple[object, ...]]:
    """Arguments of each operator, that between them use every option."""
    x, dy, residual = (made((4, 6, 5, 3), seed) for seed in range(3))
    last = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy, residual)]
    weight, bias = parameters(6)
    mask = made((4, 5, 3), 8) > 0
    count, mean, m2 = triton.operators.moments(x, mask, [2, 2])
    var = m2 / count.unsqueeze(1)
    backward = (dy, x, mean, var, weight, bias, None, mask, [2, 2], EPS, RELU, 0.0)
    one = triton.operators.moments(last[0], None, None)
    running = torch.zeros(6, device=DEVICE), torch.ones(6, device=DEVICE), counter()
    half = [t.bfloat16() for t in last]
    return {
        "moments": (x, mask, [2, 2]),
        "normalize": (last[0], mean, var, weight, bias, residual, mask, [2, 2], EPS, SILU, 0.0),
        "normalize, sliced": (
            made((4, 6, 5, 6), 4)[..., ::2],
            mean[0],
            var[0],
            None,
            None,
            None,
            None,
            None,
            EPS,
            0,
            0.0,
        ),
        "train_forward": (half[0], weight, bias, half[2], mask, [2, 2], EPS, SILU, 0.0),
        "backward_sums": backward,
        "input_gradient": (*backward, mean, var, True),
        "train_backward": (last[1], last[0], *one, weight, None, None, None, None, EPS, RELU, 0.0, False),
        "eval_backward": (dy, x, *running[:2], weight, bias, x, mask, EPS, SILU, 0.0, False, True),
        "track_": (*running, count, mean, m2, 0.1, True, 1, counter()),
    }


NAMES = (
    "moments",
    "normalize",
    "normalize, sliced",
    "train_forward",
    "backward_sums",
    "input_gradient",
    "train_backward",
    "eval_backward",
    "track_",
)


@pytest.mark.parametrize("name", NAMES)
def test_operators_pass_torchs_own_checks(name: str) -> None:
    torch.use_deterministic_algorithms(False)
    assert triton.available() is None
    operator = getattr(torch.ops.evenorm_triton, name.split(",")[0]).default
    given = operands()
    assert set(given) == set(NAMES)
    torch.library.opcheck(operator, given[name])


@pytest.mark.filterwarnings("ignore:<class 'torch.autograd:DeprecationWarning")  # of torch's own tracing
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_compiled_layer_is_one_graph(training: bool) -> None:
    torch.use_deterministic_algorithms(False)
    x, cotangent, residual = (made((4, 6, 5, 3), seed) for seed in range(3))
    x.requires_grad_()
    plain = evenorm.BatchNorm2d(6, activation="relu").to(DEVICE).train(training)
    layer = copy.deepcopy(plain)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        y, expected = compiled(x, residual=residual), plain(x, residual=residual)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        ours, theirs = (torch.autograd.grad(out, x, cotangent)[0] for out in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_go_through_the_formulas() -> None:
    x = made((5, 3), 0).double().requires_grad_()
    assert not triton.supports(x)  # float64 takes the torch path

    def norm(x: Tensor) -> Tensor:
        return evenorm.batch_norm(x.float(), None, None, training=True, activation="silu").double()

    assert torch.autograd.gradgradcheck(norm, x, eps=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3, device="meta"), torch.eye(3).to_sparse()],
    ids=["float64", "meta", "sparse"],
)
def test_what_the_kernels_do_not_take_goes_elsewhere(x: Tensor) -> None:
    assert not triton.supports(x)


def test_tensors_on_two_devices_are_refused() -> None:
    x = made((4, 3), 0)
    with pytest.raises(ValueError, match="must be on x's device"):
        triton.train_forward(x, torch.ones(3, device="meta"), None, None, Setting(None, None, EPS, IDENTITY, 0.0))
    with pytest.raises(ValueError, match="must be on x's device"):
        triton.track_(torch.zeros(3, device=DEVICE), torch.ones(3, device="meta"), None, triton.moments(x), 0.1)


@needs_gpu
def test_a_cuda_graph_replays_the_step() -> None:
    layer, x = evenorm.BatchNorm2d(8, activation="relu").cuda(), torch.randn(4, 8, 9, 9, device="cuda")
    x.requires_grad_()
    cotangent = torch.randn_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(layer(x), x, cotangent)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, cotangent)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    expected = plain(x)
    assert torch.equal(y, expected)
    assert torch.equal(dx, torch.autograd.grad(expected, x, cotangent)[0])
    assert torch.equal(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == plain.num_batches_tracked


@needs_gpu
def test_another_stream_gives_the_same_bits() -> None:
    x, dy = made((64, 32, 28, 28), 0), made((64, 32, 28, 28), 1)
    setting = Setting(None, None, EPS, RELU, 0.0)
    here = step(triton, x, dy, None, setting)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there = step(triton, x, dy, None, setting)
    torch.cuda.current_stream().wait_stream(side)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_autocast_and_a_gradient_scaler() -> None:
    model = network(theirs=False)
    optimiser, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cuda")
    for seed in range(3):
        optimiser.zero_grad()
        with torch.autocast("cuda", torch.float16):
            y = model(made((4, 3, 8, 8), seed))
        assert y.dtype == torch.float16
        scaler.scale(functional.mse_loss(y.float(), torch.zeros_like(y, dtype=torch.float32))).backward()
        scaler.step(optimiser)
        scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model[1].num_batches_tracked == 3


@needs_gpu
@pytest.mark.parametrize("shape", [(2, 1, 2**30 + 5), (2**30 + 5, 2), (3, 2**15, 30000)], ids=str)
def test_more_elements_than_an_int32_counts(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 2.0, dtype=torch.bfloat16, device="cuda")
    x.view(-1)[-1] = 4
    weight = torch.ones(shape[1], device="cuda")
    y, count, mean, m2 = triton.train_forward(x, weight, None, None, Setting(None, None, EPS, IDENTITY, 0.0))
    values = x.numel() // shape[1]
    assert count == values
    torch.testing.assert_close(mean[0, -1].item(), 2 + 2 / values, rtol=1e-9, atol=0)
    torch.testing.assert_close(m2[0, -1].item(), 4 - 4 / values, rtol=1e-5, atol=0)
    last = (2 - 2 / values) / math.sqrt(4 / values + EPS)
    torch.testing.assert_close(y.view(-1)[-1].item(), last, rtol=1e-2, atol=0)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_nothing_waits_for_the_device() -> None:
    layer, x = evenorm.BatchNorm2d(8).cuda(), torch.randn(4, 8, 9, 9, device="cuda", requires_grad=True)
    layer(x).square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).square().mean().backward()
        layer.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_moments_are_the_currency() -> None:
    whole, parts = made((6, 3, 5), 0), made((6, 3, 5), 0).split([2, 4])
    found = Moments(*(t[0] for t in vars(triton.moments(parts[0])).values())) + triton.moments(parts[1]).pooled()
    torch.testing.assert_close(found.m2, triton.moments(whole).m2[0], rtol=1e-6, atol=0)
