"""What a layer keeps through torch's ways of making, loading and copying it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evenorm
from evenorm import Window


def step(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return y and all gradients of a training forward, for a random cotangent."""
    x = x.clone().requires_grad_()
    y = layer.train()(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


MADE_ON_META: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: on_meta(lambda: evenorm.BatchNorm1d(3)),
    "converted": lambda: evenorm.convert(on_meta(lambda: nn.BatchNorm1d(3))),
    "a window": lambda: on_meta(lambda: evenorm.BatchNorm1d(3, average=Window(4))),
}


@pytest.mark.parametrize("emptied", [False, True], ids=["assign", "to_empty"])
@pytest.mark.parametrize("make", MADE_ON_META.values(), ids=MADE_ON_META)
def test_a_layer_made_on_meta_trains_as_one_that_was_not(make: Callable[[], nn.Module], emptied: bool) -> None:
    torchs = nn.BatchNorm1d(3)
    torchs(torch.randn(8, 3))
    layer = make()
    if emptied:
        layer.to_empty(device="cpu").nonfinite_batches.fill_(777)
    layer.load_state_dict(copy.deepcopy(torchs.state_dict()), assign=not emptied)
    assert {buffer.device.type for buffer in layer.buffers()} == {"cpu"}
    assert layer.nonfinite_batches == 0
    x = torch.randn(16, 3)
    torch.testing.assert_close(step(layer, x), step(torchs, x))
    assert layer.num_batches_tracked == 2
    assert layer(torch.full((4, 3), torch.nan)).isnan().all()
    assert layer.nonfinite_batches == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"on_nonfinite": "raise"}], ids=str)
def test_a_layer_on_meta_trains_on_a_state_dict_that_it_is_handed(options: dict[str, Any], compiled: bool) -> None:
    torch._dynamo.reset()
    layer, base = evenorm.BatchNorm1d(3, **options), evenorm.BatchNorm1d(3, device="meta", **options)
    state, x = copy.deepcopy(layer.state_dict()), torch.randn(8, 3)

    def call(state: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(base, state, (x,))

    found = (torch.compile(call, backend="eager", fullgraph=True) if compiled else call)(state, x)
    torch.testing.assert_close(found, layer(x))
    torch.testing.assert_close(state, dict(layer.state_dict()))
    if "on_nonfinite" in options:
        with pytest.raises(ValueError, match="the batch holds NaN or inf in channel 0"):
            call(state, torch.full((4, 3), torch.nan))


def test_a_layer_made_in_inference_mode_takes_a_checkpoint() -> None:
    with torch.inference_mode():
        layer = evenorm.BatchNorm1d(3)
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict(), assign=True)
    layer(torch.full((4, 3), torch.nan))
    assert layer.nonfinite_batches == 1


@pytest.mark.parametrize("options", [{}, {"average": Window(2)}, {"virtual_batch_size": 2}], ids=str)
def test_a_count_that_is_a_mean_of_counts(options: dict[str, Any]) -> None:
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    one(torch.randn(8, 3)), other(torch.randn(8, 3))
    averaged = {key: (value + other.state_dict()[key]) / 2 for key, value in one.state_dict().items()}
    assert averaged["num_batches_tracked"].dtype == torch.float32
    layer = evenorm.BatchNorm1d(3, **options)
    layer.load_state_dict(copy.deepcopy(averaged), assign=True)
    torchs = nn.BatchNorm1d(3)
    torchs.load_state_dict(averaged, assign=True)
    layers = [layer, evenorm.convert(torchs)]
    for each in layers:
        each(torch.randn(8, 3))
        assert each.num_batches_tracked == 2
        assert each.num_batches_tracked.dtype == torch.int64


def pickled(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_made_in_one_update_learns_from_its_own_forwards(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer, batch = evenorm.BatchNorm1d(3, momentum=1.0), torch.randn(8, 3)
    with evenorm.one_update(layer):
        layer(torch.randn(8, 3))
        ours = copied(layer)
    ours(batch)
    assert ours.num_batches_tracked == 1
    torch.testing.assert_close(ours.running_var, batch.var(0))


def test_converted_in_no_update_has_its_counter() -> None:
    layer = nn.BatchNorm1d(3)
    with evenorm.no_update(layer):
        evenorm.convert(layer)
    layer.on_nonfinite = "raise"
    with pytest.raises(ValueError, match=r"^BatchNorm1d\(3\): the batch holds NaN or inf"):
        layer(torch.full((4, 3), torch.nan))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_cast_of_everything_leaves_counters_whole(dtype: torch.dtype) -> None:
    layer = evenorm.BatchNorm1d(3)
    layer.num_batches_tracked.fill_(4097), layer.nonfinite_batches.fill_(4097)
    layer.type(dtype)
    layer(torch.randn(4, 3).to(dtype)), layer(torch.full((4, 3), torch.nan, dtype=dtype))
    assert layer.num_batches_tracked.item() == layer.nonfinite_batches.item() == 4098


class WithMore(evenorm.BatchNorm1d):
    def __init__(self) -> None:
        super().__init__(3)
        self.register_buffer("table", torch.ones(3))


def test_a_cast_takes_the_buffers_of_a_subclass_as_torch_does() -> None:
    layer = WithMore().half()
    assert (layer.table.dtype, layer.running_mean.dtype) == (torch.float16, torch.float32)
