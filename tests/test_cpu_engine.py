"""What only the C++ engine has to answer for: its operators, threads, instruction sets, loading and sizes.

That its numbers are right case by case is in test_formulas.py and test_functional.py, which run on every engine;
here the shapes are those that its plans treat differently: many chunks, few channels, short planes, wide rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cases import VALUES, Case
from evenorm import formulas, updates
from evenorm.averages import Cumulative, Exponential
from evenorm.engines import cpu
from evenorm.formulas import Setting
from evenorm.moments import Moments
from own_process import run
from truth import Call, complaints

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=f"no C++ engine: {cpu.available()}")

EPS = 1e-5
IDENTITY, RELU, SILU = 0, 1, 3
SHAPES = {
    "one channel": (3, 1, 150, 200),
    "few channels": (2, 3, 200, 211),
    "planes": (5, 20, 41, 43),
    "short planes": (9, 300, 7, 7),
    "planes that make rows": (33, 43, 5, 5),
    "rows": (700, 130),
    "few columns": (20011, 3),
    "wide rows": (40, 1500),
    "long and wide rows": (300, 720),
    "long planes": (1, 2, 70001),
}
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {"contiguous": lambda x: x, "channels_last": channels_last}


def made(
    shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return LAYOUTS[layout]((values * 3 + 1).to(dtype))


def parameters(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, channels, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight[1:2] = 0
    return weight.to(dtype), bias.to(dtype)


def parameter_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def step(x: Tensor, dy: Tensor, residual: Tensor | None, setting: Setting) -> list[Tensor]:
    """Run a training step on the engine; return all its results."""
    weight, bias = parameters(x.shape[1], parameter_dtype(x))
    y, *batch = cpu.train_forward(x, weight, bias, residual, setting)
    saved = None if residual is None else (y if setting.activation == RELU else residual)
    gradients = cpu.train_backward(dy, x, *batch, weight, bias, saved, setting, residual is not None)
    return [y, *batch, *(gradient for gradient in gradients if gradient is not None)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("activation", [IDENTITY, SILU], ids=["identity", "silu"])  # by loops of their own
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_shapes_agree_with_float64(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, activation: int
) -> None:
    x, dy, residual = (made(shape, seed, dtype, layout) for seed in range(3))
    weight, bias = parameters(shape[1], parameter_dtype(x))
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
    z = functional.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.1, EPS) + leaves[3]
    true = functional.silu(z) if activation == SILU else z
    gradients = torch.autograd.grad(true, leaves, dy.double())
    found = step(x, dy, residual, Setting(None, None, EPS, activation, 0.0))
    terms = dy.double().abs().sum() / shape[1]  # of a sum, which may itself be small
    for ours, theirs in zip((found[0], *found[4:]), (true.detach(), *gradients), strict=True):
        scale = theirs.abs().max() if ours.dim() > 1 else terms
        assert (ours.double() - theirs).abs().max() <= DTYPES[dtype] * scale


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["few channels", "few columns", "long planes"])
def test_roundings_of_many_differences_go_both_ways(name: str, layout: str) -> None:
    """Sums in float start from a shift; one of many digits would round x - shift the same way for all large x."""
    x = made(SHAPES[name], 0, layout=layout)
    values = x.double().transpose(0, 1).flatten(1)
    error = (cpu.moments(x).mean[0] - values.mean(1)).abs() / values.std(1)
    assert error.max() <= 3e-9


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("options", ["plain", "mask", "groups", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, ...], layout: str, options: str) -> None:
    x, dy, residual = (made(shape, seed, layout=layout) for seed in range(3))
    mask = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(5)) > 0.3
    splits = [shape[0] // 2, 0, shape[0] - shape[0] // 2]
    setting = Setting(mask if options == "mask" else None, splits if options == "groups" else None, EPS, RELU, 0.0)
    results = []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append(step(x, dy, residual if options == "residual" else None, setting))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_element_is_written(shape: tuple[int, ...], layout: str) -> None:
    torch.set_num_threads(2)
    x, dy, residual = (made(shape, seed, torch.bfloat16, layout) for seed in range(3))
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    mask.view(-1)[1] = False
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # makes torch fill fresh memory with NaN
    try:
        assert torch.empty(5).isnan().all()
        for given in (x, x.float()):
            setting = Setting(mask, None, EPS, RELU, 0.0)
            for result in step(given, dy.to(given.dtype), residual.to(given.dtype), setting):
                assert not result.isnan().any()
            for result in step(given, dy.to(given.dtype), None, setting._replace(mask=None)):
                assert not result.isnan().any()
    finally:
        torch.use_deterministic_algorithms(before)


# How many units in the last place a value may be off; the largest values, which decide a tensor's error, at most 2.
CURVES: dict[int, tuple[Callable[[Tensor], Tensor], float]] = {
    3: (functional.silu, 2.5),
    4: (functional.gelu, 6.0),
    5: (lambda z: functional.elu(z, 1.25), 2.5),
    6: (functional.hardswish, 2.0),
    7: (torch.sigmoid, 2.0),
    8: (torch.tanh, 2.5),
    9: (lambda z: functional.gelu(z, approximate="tanh"), 8.0),
}


@pytest.mark.parametrize("code", CURVES)
def test_activations_are_exact_to_a_few_units_everywhere(code: int) -> None:
    curve, allowed = CURVES[code]
    magnitudes = torch.arange(0x2E000000, 0x42C80000, 997, dtype=torch.int32).view(torch.float32)  # 3e-11 to 100
    x = torch.cat([-magnitudes.flip(0), magnitudes]).view(1, 1, -1)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    setting = Setting(None, None, 0.0, code, 1.25)
    z = x.double().requires_grad_()
    true = curve(z)
    (true_slope,) = torch.autograd.grad(true.sum(), z)
    y = cpu.normalize(x, zero, one, None, None, None, setting)
    slope = cpu.eval_backward(torch.ones_like(x), x, zero, one, None, None, None, setting, False, False)[0]
    unit = torch.finfo(torch.float32).eps
    # Where the true value is small against z it is a difference of larger terms, for sigmoid's tail of exponents.
    scale = true.detach().abs().maximum(torch.tensor(1e-30)) if code in (7, 8) else true.detach().abs() + 1e-3
    inner = x.double().abs() < 15
    assert ((y.double() - true.detach()).abs() / scale)[inner].max() <= allowed * unit
    assert (slope.double() - true_slope).abs().max() <= 6 * unit
    assert (y.double() - true.detach()).abs().max() <= 2 * unit * true.detach().abs().max()


@pytest.mark.parametrize("spread", [0.0, 3e-7], ids=["next to 0", "around it"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sign_beside_a_residual_is_that_of_the_exact_sum(layout: str, spread: float) -> None:
    x, (weight, bias) = made((64, 40, 9, 9), 0, layout=layout), parameters(40)
    mean, var = torch.full((40,), 0.3, dtype=torch.float64), torch.full((40,), 2.0, dtype=torch.float64)
    z = functional.batch_norm(x.double(), mean, var, weight.double(), bias.double(), False, 0.0, EPS)
    residual = (
        z * (spread * torch.sin(1e5 * z) - 1)
    ).float()  # what is left is some units in the last place, or less
    y = cpu.normalize(x, mean, var, weight, bias, residual, Setting(None, None, EPS, RELU, 0.0))
    left = z + residual
    sure = left.abs() > 1e-14
    assert torch.equal((y > 0)[sure], (left > 0)[sure])


def test_a_doubtful_sign_is_found_among_sure_ones() -> None:
    """One element of each channel is next to 0 there; all others would let a bound pass that is too small."""
    channels = 4096
    x, (weight, bias) = made((1, channels, 64), 0), parameters(channels)
    mean, var = torch.full((channels,), 0.3, dtype=torch.float64), torch.full((channels,), 2.0, dtype=torch.float64)
    z = functional.batch_norm(x.double(), mean, var, weight.double(), bias.double(), False, 0.0, EPS)
    residual = torch.full_like(x, 100.0)
    one = z[..., 17]
    residual[..., 17] = (one * (2e-7 * torch.sin(1e5 * one) - 1)).float()
    y = cpu.normalize(x, mean, var, weight, bias, residual, Setting(None, None, EPS, RELU, 0.0))
    left = z + residual
    sure = left.abs() > 1e-14
    assert torch.equal((y > 0)[sure], (left > 0)[sure])


def operands() -> dict[str, tuple[object, ...]]:
    """Arguments of each operator, that between them use every option."""
    x, dy, residual = (made((4, 6, 5, 3), seed) for seed in range(3))
    last = [channels_last(t) for t in (x, dy, residual)]
    weight, bias = parameters(6)
    mask = made((4, 5, 3), 8) > 0
    count, mean, m2 = torch.ops.evenorm.moments.default(x, mask, [1, 3])
    var = m2 / count.unsqueeze(1)
    sliced = made((4, 6, 5, 6), 4)[..., ::2]
    running = torch.zeros(6), torch.ones(6), torch.tensor(2)
    backward = (dy, x, mean, var, weight, bias, None, mask, [1, 3], EPS, RELU, 0.0)
    one = torch.ops.evenorm.moments.default(last[0], None, None)
    batch, none = torch.ops.evenorm.forward_message.default(last[0], None), (None, None)
    behind = (last[1], last[0], batch, weight, bias, None, mask, None, EPS, RELU, 0.0)
    messages, sums = (made((3, numbers), 5, torch.float64).abs() for numbers in (13, 12))
    half = [t.bfloat16() for t in last]
    return {
        "moments": (x, mask, [1, 3]),
        "moments, sliced": (sliced, None, None),
        "normalize": (x, mean, var, weight, bias, residual, mask, [1, 3], EPS, SILU, 0.0),
        "normalize, sliced": (sliced, mean[0], var[0], weight, bias, None, None, None, EPS, RELU, 0.0),
        "train_forward": (last[0], weight, bias, residual, None, None, EPS, RELU, 0.0),
        "train_forward, half": (half[0], weight, None, None, mask, [2, 2], EPS, SILU, 0.0),
        "train_forward, empty": (x[:0], weight, bias, None, None, None, EPS, RELU, 0.0),
        "backward_sums": backward,
        "input_gradient": (*backward, mean, var, False),
        "input_gradient, residual": (*backward, None, None, True),
        "train_backward": (last[1], last[0], *one, weight, bias, None, None, None, EPS, RELU, 0.0, False),
        "train_backward, residual": (dy, last[0], *one, None, None, residual, None, None, EPS, SILU, 0.0, True),
        "step_forward, workers": (
            *(x, weight, bias, None, mask, None, EPS, RELU, 0.0, None, None, None, 0.1, False, 0, None, messages),
        ),
        "step_backward": (*behind, False, None, 0),
        "step_backward, residual": (dy, last[0], batch, *none, residual, None, None, EPS, SILU, 0.0, True, None, 0),
        "step_backward, workers": (*behind, False, sums, 2),
        "forward_message": (x, mask),
        "backward_message": behind,
        "eval_backward": (half[1], half[0], *running[:2], weight, None, None, None, EPS, RELU, 0.0, True, False),
        "eval_backward, frozen": (dy, x, *running[:2], weight, bias, x, mask, EPS, SILU, 0.0, False, True),
        "track_": (*running, count, mean, m2, 0.1, False, 1, torch.tensor(0)),
        "track_, cumulative": (*running, one[0], one[1], one[2], math.nan, False, 0, None),
    }


NAMES = [
    "moments",
    "moments, sliced",
    "normalize",
    "normalize, sliced",
    "train_forward",
    "train_forward, half",
    "train_forward, empty",
    "backward_sums",
    "input_gradient",
    "input_gradient, residual",
    "train_backward",
    "train_backward, residual",
    "step_forward, workers",
    "step_backward",
    "step_backward, residual",
    "step_backward, workers",
    "forward_message",
    "backward_message",
    "eval_backward",
    "eval_backward, frozen",
    "track_",
    "track_, cumulative",
]


@pytest.mark.parametrize("name", NAMES)
def test_operators_pass_torchs_own_checks(name: str) -> None:
    operator = getattr(torch.ops.evenorm, name.split(",")[0]).default
    torch.library.opcheck(operator, operands()[name])


def test_a_compiled_step_is_one_graph_and_moves_the_running_statistics() -> None:
    x = made((8, 6, 5, 5), 0)
    weight, bias = parameters(6)

    def forward(x: Tensor, mean: Tensor, var: Tensor, batches: Tensor) -> Tensor:
        assert cpu.supports(x)
        y, *batch = cpu.train_forward(x, weight, bias, None, Setting(None, None, EPS, RELU, 0.0))
        cpu.track_(mean, var, batches, Moments(*batch), math.nan)
        return y

    plain = [torch.zeros(6), torch.ones(6), torch.tensor(0)]
    compiled = [t.clone() for t in plain]
    run = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(run(x, *compiled), forward(x, *plain), rtol=0, atol=0)
    assert compiled[2] == 2
    for a, b in zip(plain, compiled, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average", [Exponential(0.3), Exponential(0.3, debias=True), Cumulative()], ids=str)
def test_tracking_is_what_updates_define(average: Exponential | Cumulative, dtype: torch.dtype) -> None:
    batches = [made((6, 5, 9), seed) for seed in range(3)]
    batches[1][2, 3] = math.inf
    found, expected = (
        updates.Running(torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype), torch.tensor(0)) for _ in range(2)
    )
    for x in batches:
        batch = cpu.moments(x, None, [2, 4])
        updates.commit_(found, batch, average)
        updates._commit_plainly_(expected, batch.pooled(), average, True)
    assert found.batches == expected.batches
    for a, b in ((found.mean, expected.mean), (found.var, expected.var)):
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_batches_that_a_channel_skips_are_counted() -> None:
    x = made((6, 3), 0)
    x[0, 1] = math.nan
    skipped, mean, var = torch.tensor(0), torch.zeros(3), torch.ones(3)
    cpu.track_(mean, var, None, cpu.moments(x), 0.1, skipped=skipped)
    assert skipped == 1
    assert (mean[1], var[1]) == (0, 1)
    assert not (mean[[0, 2]] == 0).any()


@pytest.mark.parametrize("offset", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_need_not_be_aligned(dtype: torch.dtype, offset: int) -> None:
    setting = Setting(None, None, EPS, RELU, 0.0)
    plain = [made((3, 5, 77), seed, dtype) for seed in range(3)]
    moved = [torch.empty(t.numel() + offset, dtype=dtype)[offset:].view(t.shape).copy_(t) for t in plain]
    for a, b in zip(step(*plain, setting), step(*moved, setting), strict=True):
        assert torch.equal(a, b)


CHECK_SETS = """
import torch
from evenorm import formulas
from evenorm.engines import cpu
assert cpu.available() is None
for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-13), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
    for layout in (lambda x: x, lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1)):
        for code in (0, 1, 3, 4, 8):
            setting = formulas.Setting(None, None, 1e-5, code, 0.0)
            generator = torch.Generator().manual_seed(code)
            x, dy, weight = (torch.randn(s, generator=generator) for s in ((9, 70, 7, 7), (9, 70, 7, 7), (70,)))
            x, dy = layout(x.to(dtype)), layout(dy.to(dtype))
            y, *batch = formulas.train_forward(x, weight, None, None, setting)
            given = (dy, x, *batch, weight, None, None, setting, False)
            pairs = zip(cpu.train_forward(x, weight, None, None, setting), (y, *batch))
            for a, b in (*pairs, *zip(cpu.train_backward(*given)[:3], formulas.train_backward(*given)[:3])):
                assert (a.double() - b.double()).abs().max() <= limit * b.double().abs().max()
print("right")
"""


@pytest.mark.parametrize("instructions", ["v4", "v3", "baseline"])
def test_every_instruction_set_is_right(instructions: str) -> None:
    assert run(CHECK_SETS, EVENORM_INSTRUCTIONS=instructions) == "right"


def test_importing_loads_nothing() -> None:
    code = "import evenorm, torch; print([p for p in torch.ops.loaded_libraries if 'evenorm' in p])"
    assert run(code) == "[]"


def test_the_environment_switches_it_off() -> None:
    code = "import torch; from evenorm.engines import cpu; print(cpu.available(), cpu.supports(torch.ones(2, 3)))"
    assert run(code, EVENORM_ENGINE="off") == "switched off by EVENORM_ENGINE=off False"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("no C++ compiler\n", "no C++ compiler"), (None, "not built: evenorm/_engine.so is not there")],
)
def test_a_missing_library_says_why(
    text: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "_engine_missing.txt").write_text(text)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "engines" / "cpu.py"))
    monkeypatch.delenv("EVENORM_ENGINE", raising=False)
    assert cpu._load() == reason


def test_a_broken_library_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_engine.so").write_text("no library")
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "engines" / "cpu.py"))
    assert str(cpu._load()).startswith("could not be loaded")


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, device="meta"), torch.eye(3).to_sparse()],
    ids=["integers", "meta", "sparse"],
)
def test_what_the_kernels_do_not_take_goes_elsewhere(x: Tensor) -> None:
    assert not cpu.supports(x)


def test_operators_refuse_what_does_not_fit() -> None:
    x, weight = made((4, 6), 0), torch.ones(5)
    setting = Setting(None, None, EPS, RELU, 0.0)
    with pytest.raises(RuntimeError, match=r"weight must have shape"):
        cpu.train_forward(x, weight, None, None, setting)
    with pytest.raises(RuntimeError, match=r"residual must have x's shape"):
        cpu.train_forward(x, None, None, x[:2], setting)
    with pytest.raises(RuntimeError, match=r"splits must add up to 4"):
        cpu.train_forward(x, None, None, None, setting._replace(splits=[1, 2]))
    with pytest.raises(RuntimeError, match=r"unknown activation"):
        cpu.train_forward(x, None, None, None, setting._replace(activation=10))


@pytest.mark.skipif(os.environ.get("EVENORM_SLOW") != "1", reason="9 GB and a minute; EVENORM_SLOW=1 runs it")
@pytest.mark.parametrize("shape", [(2, 1, 2**30 + 5), (2**30 + 5, 2)], ids=["planes", "rows"])
def test_more_elements_than_an_int32_counts(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 2.0, dtype=torch.bfloat16)
    x.view(-1)[-1] = 4
    weight = torch.ones(shape[1])
    y, count, mean, m2 = cpu.train_forward(x, weight, None, None, Setting(None, None, EPS, IDENTITY, 0.0))
    values = x.numel() // shape[1]
    assert count == values
    torch.testing.assert_close(mean[0, -1].item(), 2 + 2 / values, rtol=1e-12, atol=0)
    torch.testing.assert_close(m2[0, -1].item(), 4 - 4 / values, rtol=1e-9, atol=0)
    last = (2 - 2 / values) / math.sqrt(4 / values + EPS)
    torch.testing.assert_close(y.view(-1)[-1].item(), last, rtol=1e-2, atol=0)


# Enough values of a channel for its sums to run in float32; of the second a sample's channels are one row.
LARGE = {"long planes": (8, 6, 20, 41), "short planes": (100, 18, 4, 6)}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "values", [values for values in VALUES if values != "outlier"]
)  # see docs/decisions_cpu.md
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_channels_of_any_scale_are_as_exact_as_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, values: str, layout: str, activation: str | None
) -> None:
    case = Case(values, shape, dtype, layout, values, torch.float32)
    for call in (Call(case, True, activation), Call(case, False, activation, with_residual=True)):
        assert complaints(call) == []


def holes(kind: str, samples: int, *positions: int) -> Tensor | None:
    """Return which positions are valid: all, scattered ones, or the first ones of each sample."""
    if kind in ("whole", "beside"):
        return None
    if kind == "scattered":
        return made((samples, *positions), 8) > 0
    size = math.prod(positions)
    lengths = torch.tensor([1.0, 0, 1 / size, 0.5, 1 - 1 / size, 0.06, 0.34, 0.98]).mul(size).round()
    return (torch.arange(size) < lengths.repeat(samples)[:samples, None]).view(samples, *positions)


BEYOND_CACHES = {"long planes": (9, 128, 64, 32), "short planes": (65, 512, 6, 6)}


@pytest.mark.parametrize("kind", ["whole", "beside", "scattered", "lengths"])  # all but the first with a residual
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", BEYOND_CACHES.values(), ids=BEYOND_CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_larger_than_the_cache(dtype: torch.dtype, shape: tuple[int, ...], layout: str, kind: str) -> None:
    samples, channels, *positions = shape
    x, dy, residual = (made(shape, seed, dtype, layout) for seed in range(3))
    mask = holes(kind, samples, *positions)
    if mask is not None:
        x, dy = (LAYOUTS[layout](given.masked_fill(~mask[:, None], math.nan)) for given in (x, dy))
    activation = (
        IDENTITY if kind == "scattered" else RELU
    )  # without y's 0 there the mask alone tells what is padding
    setting = Setting(mask, [samples // 2, samples - samples // 2], EPS, activation, 0.0)
    weight, bias = parameters(channels)
    extra = None if kind == "whole" else residual
    y, *batch = formulas.train_forward(x.double(), weight, bias, None if extra is None else extra.double(), setting)
    given = (
        dy.double(),
        x.double(),
        *batch,
        weight,
        bias,
        None if extra is None else y,
        setting,
        extra is not None,
    )
    true = [y, *batch, *(gradient for gradient in formulas.train_backward(*given) if gradient is not None)]
    for ours, theirs in zip(step(x, dy, extra, setting), true, strict=True):
        scale = theirs.abs().max() if ours.dim() > 1 else dy.double().nan_to_num().abs().sum() / channels
        assert (ours.double() - theirs).abs().max() <= DTYPES[dtype] * scale
