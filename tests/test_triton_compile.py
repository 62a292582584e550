"""What the GPU engine's kernels compile into, for NVIDIA and AMD, by Triton's own compiler: that needs no GPU.

A driver that launches nothing stands in for the device, so that each kernel is compiled with the arguments that the
engine gives it. `make test-triton` runs this; where there is a GPU, test_triton.py runs the kernels there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evenorm.engines.triton.plan import make_plan

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's compiler is not here, or its interpreter was asked for", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from evenorm.engines.triton import backward, forward, launch, operators, start, track

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
MODULES = (forward, backward, track)
EPS, RELU, SILU = 1e-5, 1, 3
SHARED_EVERYWHERE = 48 * 1024  # bytes a program may have without asking the device for more


class Device:
    """A GPU as Triton's launcher sees it; programs are loaded and launched into nothing."""

    utils: Device
    launcher_cls: Any

    def __init__(self, name: str) -> None:
        self.target, self.number, self.utils = TARGETS[name], list(TARGETS).index(name), self
        self.launches: list[tuple[Any, ...]] = []  # what it would have been told
        self.launcher_cls = self.launcher

    def launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what notes the kernel, the grid and the arguments: behind six things of Triton's own."""
        kernel = source.hash(), metadata.num_warps
        return lambda *told: self.launches.append((*kernel, *told[:3], *told[9:]))

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads


@contextlib.contextmanager
def device(name: str) -> Iterator[Device]:
    """Let the engine find a device of some kind; what was started on another one is forgotten."""
    one = Device(name)
    driver.set_active(one)
    start._compiled.clear()
    yield one
    start._compiled.clear()
    driver._active = None


@pytest.fixture
def sm_90() -> Iterator[Device]:
    with device("sm_90") as one:
        yield one


def compiled() -> dict[str, Any]:
    """Return every kernel compiled so far for the active device, by name and hash."""
    found = {}
    for module in MODULES:
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                cache = kernel.device_caches[driver.active.get_current_device()][0]
                found |= {f"{name} {one.hash}": one for one in cache.values()}
    return found


def spilled(kernel: Any) -> int:
    """Return how many bytes, or registers, the compiler could not keep in registers."""
    if "amdgcn" in kernel.asm:
        return sum(int(number) for number in re.findall(r"gpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"]))
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    told = subprocess.run(
        [assembler, "-v", "--gpu-name=sm_90a", "-o", os.devnull, "/dev/stdin"],
        input=kernel.asm["ptx"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(re.search(r"(\d+) bytes spill stores", told.stderr)[1])


def run_everything(x: Tensor, dy: Tensor, residual: Tensor | None, mask: Tensor | None, code: int) -> None:
    """Call each operator, so that every kernel is compiled as this input needs it."""
    channels = x.shape[1]
    weight, bias, var = torch.ones(3, channels)
    setting = (mask, None, EPS, code, 0.0)
    y, *batch = operators.train_forward(x, weight, bias, residual, *setting)
    saved = None if residual is None else y if code <= 2 else residual
    operators.train_backward(dy, x, *batch, weight, bias, saved, *setting, residual is not None)
    operators.normalize(x, bias, var, weight, bias, residual, *setting)
    given = (dy, x, bias, var, weight, bias, saved, mask, EPS, code, 0.0)
    operators.eval_backward(*given, True, residual is not None)
    operators.track_(bias, var, torch.tensor(0), *batch, 0.1, False, True, torch.tensor(0))


# Whole channels in one tile, and walked over in chunks; 7x7 planes, whose rows are not aligned; few channels.
SHAPES = {
    "large planes": ((2, 8, 64, 64), False),
    "large planes, last": ((4, 64, 56, 56), True),
    "short planes": ((32, 16, 7, 7), False),
    "rows": ((256, 64), False),
}
OPTIONS = {"plain": (False, False, RELU), "residual and mask": (True, True, SILU)}
KINDS = {
    "sm_90": [
        *((name, "plain", "float32") for name in SHAPES),
        *((name, "residual and mask", "bfloat16") for name in SHAPES),
        ("large planes, last", "plain", "bfloat16"),
        ("large planes", "plain", "float16"),
    ],
    "gfx942": [("large planes", "plain", "bfloat16"), ("large planes, last", "residual and mask", "float32")],
}


@pytest.mark.parametrize(
    ("where", "name", "options", "dtype"),
    [(where, *kind) for where, kinds in KINDS.items() for kind in kinds],
)
def test_every_kernel_compiles_without_spills(where: str, name: str, options: str, dtype: str) -> None:
    shape, last = SHAPES[name]
    with_residual, with_mask, code = OPTIONS[options]
    x = torch.ones(shape, dtype=getattr(torch, dtype))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool) if with_mask else None
    with device(where):
        before = compiled()
        run_everything(x, x.clone(), x.clone() if with_residual else None, mask, code)
        new = {key: kernel for key, kernel in compiled().items() if key not in before}
    assert new
    for key, kernel in new.items():
        assert kernel.metadata.shared <= SHARED_EVERYWHERE, key
        # ptxas gives up a register or two for one more program on a multiprocessor.
        assert spilled(kernel) <= 16, f"{key.split()[0]} spills {spilled(kernel)} {kernel.metadata.num_warps} warps"
        signature = kernel.src.signature
        assert {signature[size] for size in ("channels", "positions", "base") if size in signature} == {"i64"}
        assert signature.get("eps", "fp64") == "fp64"


def vector_loads(name: str) -> int:
    """Return how many 16 byte loads the kernels of a name hold."""
    kernels = [kernel for key, kernel in compiled().items() if key.startswith(name)]
    return sum(len(re.findall(r"ld\.global\S*\.v4\.b32", kernel.asm["ptx"])) for kernel in kernels)


@pytest.mark.usefixtures("sm_90")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_read_sixteen_bytes_at_a_time(dtype: torch.dtype, last: bool) -> None:
    x = torch.ones(4, 64, 56, 56, dtype=dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    before = vector_loads("pool_kernel")
    kernels = len(compiled())
    operators.moments(x, None, None)
    if len(compiled()) > kernels:  # else a test before this one has compiled them
        assert vector_loads("pool_kernel") > before
    assert vector_loads("pool_kernel") > 0


@pytest.mark.usefixtures("sm_90")
def test_another_size_compiles_nothing_anew() -> None:
    operators.moments(torch.ones(4, 8, 64, 64), None, None)
    before = compiled()
    for shape in ((5, 8, 64, 64), (64, 4, 64, 64), (3, 16, 128, 96)):
        operators.moments(torch.ones(shape), None, None)
    sizes = [key for key in compiled() if key not in before and key.startswith("pool")]
    assert not sizes


@pytest.mark.usefixtures("sm_90")
def test_offsets_that_need_64_bits_get_them() -> None:
    """Within a tile too, where one spans 2 ** 31 elements: 32 rows of a hundred million channels."""
    huge = make_plan(64, 2**27, 1, True, 1, 4)
    assert huge.wide
    assert not make_plan(2**30, 64, 1, True, 1, 4).wide  # many small tiles, which lie far apart
    small = huge._replace(channels=64, tiles=1, per_chunk=1, chunks=1)  # of the memory for results
    before = compiled()
    launch.pool(launch.Input(torch.ones(8), small, None, False))
    (kernel,) = (kernel for key, kernel in compiled().items() if key not in before)
    offsets = re.findall(r"tensor<\d+x\d+x!tt.ptr<f32>[^>]*>, tensor<\d+x\d+x(i\d+)", kernel.asm["ttir"])
    assert set(offsets) == {"i64"}


def launched(where: Device, call: Callable[[], object]) -> list[tuple[Any, ...]]:
    """Return the launches of a call, with tensors by their dtype and alignment."""
    where.launches.clear()
    call()
    return [
        tuple((told.dtype, told.data_ptr() % 16 == 0) if isinstance(told, Tensor) else told for told in launch)
        for launch in where.launches
    ]


@pytest.mark.parametrize(("name", "options"), [("large planes", "plain"), ("rows", "residual and mask")])
def test_what_is_started_again_is_what_triton_would_launch(name: str, options: str, sm_90: Device) -> None:
    """Each combination of dtype, alignment, activation and missing tensors has its kernel, whatever came before."""
    shape, _ = SHAPES[name]
    with_residual, with_mask, _ = OPTIONS[options]

    def step(dtype: torch.dtype, aligned: bool, code: int) -> None:
        memory = torch.ones(math.prod(shape) + 1, dtype=dtype)
        x = (memory[:-1] if aligned else memory[1:]).view(shape)
        mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool) if with_mask else None
        run_everything(x, x, x if with_residual else None, mask, code)

    half, other = torch.float16, torch.bfloat16
    kinds = [(half, True, RELU), (half, False, RELU), (other, True, RELU), (half, True, SILU)]
    expected = []
    for kind in kinds:
        start._compiled.clear()
        expected.append(launched(sm_90, partial(step, *kind)))
    for _ in range(2):  # the first round fills the memory of what was started
        for kind, wanted in zip(kinds, expected, strict=True):
            assert launched(sm_90, partial(step, *kind)) == wanted
