"""No training step waits for a device, and what it changes stays where it is in memory, as a CUDA graph needs.

Without a device: tensors on "meta" refuse to tell their values to the host, and the code that runs for them is the
code of every device without an engine of its own.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

import evenorm

OPTIONS = {
    "plain": {},
    "activation": {"activation": "silu"},
    "propagate": {"on_nonfinite": "propagate"},
    "renorm": {"renorm": evenorm.Renorm(start=1, r_steps=3, d_steps=3)},
    "cumulative": {"average": evenorm.Cumulative()},
    "debiased": {"average": evenorm.Exponential(0.1, debias=True)},
    "window": {"average": evenorm.Window(2)},
    "virtual batches": {"virtual_batch_size": 3},
    "population": {"on_single": "population"},
}
BLOCKS = {"": (), "in one_update": (evenorm.one_update,), "in no_update": (evenorm.no_update,)}


def some_steps(layer, x, mask, blocks):
    """Two forwards in a block, and one behind it, where a `one_update` has committed."""
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block(layer))
        for _ in range(2):
            y = layer(x, residual=x, mask=mask)
            y.backward(torch.ones_like(y))
    layer(x)
    layer.eval()(x, mask=mask)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_option_asks_the_host(options, blocks, masked):
    layer = evenorm.BatchNorm(4, device="meta", **options)
    x = torch.zeros(6, 4, 5, device="meta", requires_grad=True)
    mask = torch.zeros(6, 5, dtype=torch.bool, device="meta") if masked else None
    some_steps(layer, x, mask, blocks)


def test_asking_would_be_seen():
    """`item`, `bool` and `tolist` raise there."""
    values = torch.zeros(3, device="meta")
    for ask in (lambda: values.sum().item(), lambda: bool(values.any()), lambda: values.tolist()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


@pytest.mark.parametrize("engine", ["cpu", "formulas"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_buffers_change_in_place(options, engine, monkeypatch):
    if engine == "formulas":
        monkeypatch.setattr(evenorm.engines.cpu, "supports", lambda x: False)
    layer = evenorm.BatchNorm(4, **options)
    before = {name: (buffer.data_ptr(), buffer.clone()) for name, buffer in layer.named_buffers()}
    x = torch.randn(6, 4, 5)
    x[:, 1] = torch.nan  # the counter of non-finite batches changes too
    some_steps(layer, x, None, ())
    after = dict(layer.named_buffers())
    assert {name: buffer.data_ptr() for name, buffer in after.items()} == {n: at for n, (at, _) in before.items()}
    changed = {name for name, (_, values) in before.items() if not after[name].equal(values)}
    assert changed >= set(before) - ({"nonfinite_batches"} if options.get("on_nonfinite") == "propagate" else set())
