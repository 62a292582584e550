"""PyTorch's own test definitions of batch norm, run against ours.

The wheel carries them: `module_db` holds the modules with their inputs and the errors they owe, `op_db` the
samples of the function. The small runners here do what PyTorch's test_modules.py and test_ops.py do with them.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn import functional

import evenorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch's test code says of itself is not ours to answer for
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db

INFOS: dict[type[nn.Module], ModuleInfo] = {
    info.module_cls: info for info in module_db if issubclass(info.module_cls, nn.modules.batchnorm._BatchNorm)
}
OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: evenorm.BatchNorm1d,
    nn.BatchNorm2d: evenorm.BatchNorm2d,
    nn.BatchNorm3d: evenorm.BatchNorm3d,
}
LAZY: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: (nn.LazyBatchNorm1d, evenorm.LazyBatchNorm1d),
    nn.BatchNorm2d: (nn.LazyBatchNorm2d, evenorm.LazyBatchNorm2d),
    nn.BatchNorm3d: (nn.LazyBatchNorm3d, evenorm.LazyBatchNorm3d),
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Entry(NamedTuple):
    """One input of torch's database: how to construct the layer, what to call it with, in which mode."""

    kind: type[nn.Module]
    given: ModuleInput
    training: bool
    dtype: torch.dtype

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """Return torch's layer and ours, with the same random state."""
        torchs, ours = (self._construct(kind) for kind in (self.kind, OURS[self.kind]))
        generator = torch.Generator().manual_seed(1)
        for tensor in torchs.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        ours.load_state_dict(torchs.state_dict(), strict=True)
        return torchs, ours

    def layer(self) -> nn.Module:
        return self.pair()[1]

    def _construct(self, kind: type[nn.Module]) -> nn.Module:
        arguments = self.given.constructor_input
        layer = kind(*arguments.args, **(arguments.kwargs | {"dtype": self.dtype}))
        return layer.train(self.training)

    @property
    def x(self) -> Tensor:
        (x,) = self.given.forward_input.args
        assert not self.given.forward_input.kwargs
        return x.detach().clone().requires_grad_()

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.kind.__name__}, {self.given.desc or 'default'}, {mode}, {dtype}"


def entries() -> Iterator[Entry]:
    for kind, info in INFOS.items():
        for dtype in info.dtypes:
            for training in (True, False):
                torch.manual_seed(0)
                inputs = info.module_inputs_func(
                    info, device="cpu", dtype=dtype, requires_grad=True, training=training
                )
                yield from (Entry(kind, given, training, dtype) for given in inputs)


ENTRIES = list(entries())
in_each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)
in_each_double = pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.dtype == torch.float64], ids=str
)


def cotangent(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)


def answer(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return y, all gradients for a random cotangent, and the state afterwards."""
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], cotangent(y), allow_unused=True)
    return [y, *gradients, *layer.state_dict().values()]


def without_counting_empty_batches(entry: Entry, torchs: nn.Module, ours: nn.Module) -> None:
    """Torch counts an empty batch; ours does not: nothing was learned from it."""
    if entry.training and entry.x.numel() == 0:
        assert torchs.num_batches_tracked == 1
        assert ours.num_batches_tracked == 0
        torchs.num_batches_tracked.zero_()


def test_torchs_database_holds_what_is_tested_here() -> None:
    assert set(INFOS) == set(OURS)
    for kind in OURS:
        assert len([entry for entry in ENTRIES if entry.kind is kind]) >= 6 * 4  # two modes, two dtypes
    assert len(samples(torch.float32)) >= 10


@in_each_entry
def test_forward_gradients_and_state_are_torchs(entry: Entry) -> None:
    torchs, ours = entry.pair()
    expected, found = answer(torchs, entry.x), answer(ours, entry.x)
    without_counting_empty_batches(entry, torchs, ours)
    torch.testing.assert_close(found, expected)


@in_each_entry
def test_repr_is_torchs(entry: Entry) -> None:
    torchs, ours = entry.pair()
    assert repr(ours) == repr(torchs)


@in_each_entry
def test_state_goes_both_ways(entry: Entry) -> None:
    torchs, ours = entry.pair()
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert ours.state_dict()._metadata == torchs.state_dict()._metadata
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in torchs.named_parameters()]
    ours(entry.x)
    torchs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(dict(torchs.state_dict()), dict(ours.state_dict()), rtol=0, atol=0)


@in_each_entry
def test_factory_arguments(entry: Entry) -> None:
    """The layer can be made on the meta device, moved to memory, and works as one made there."""
    arguments = entry.given.constructor_input
    kind = OURS[entry.kind]
    on_meta = kind(*arguments.args, **arguments.kwargs, device="meta", dtype=entry.dtype).train(entry.training)
    assert all(tensor.is_meta for tensor in [*on_meta.parameters(), *on_meta.buffers()])
    assert on_meta(entry.x.to("meta")).shape == entry.x.shape
    there = on_meta.to_empty(device="cpu")
    there.load_state_dict(entry.layer().state_dict())
    torch.testing.assert_close(there(entry.x), entry.layer()(entry.x))
    for tensor in [*there.parameters(), *there.buffers()]:
        assert not tensor.is_floating_point() or tensor.dtype == entry.dtype


@in_each_entry
def test_pickles_copies_and_files(entry: Entry) -> None:
    layer = entry.layer()
    layer(entry.x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = entry.layer()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    twins = [pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), loaded]
    expected = answer(copy.deepcopy(layer), entry.x)
    for twin in twins:
        assert type(twin) is type(layer)
        assert twin.training == layer.training
        torch.testing.assert_close(answer(twin, entry.x), expected, rtol=0, atol=0)


@in_each_entry
def test_noncontiguous_inputs(entry: Entry) -> None:
    expected = answer(entry.layer(), entry.x)
    values = entry.x.detach()
    for x in (torch.repeat_interleave(values, 2, -1)[..., ::2], values.mT.contiguous().mT):
        torch.testing.assert_close(answer(entry.layer(), x.requires_grad_()), expected)
    x = entry.x
    y = entry.layer()(x)
    (dx,) = torch.autograd.grad(y, x, torch.repeat_interleave(cotangent(y), 2, -1)[..., ::2])
    torch.testing.assert_close(dx, expected[1])


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.x.dim() in FORMATS], ids=str)
def test_memory_format(entry: Entry) -> None:
    wanted = FORMATS[entry.x.dim()]
    expected = answer(entry.layer(), entry.x)
    for layer_format in (torch.contiguous_format, wanted):
        for x_format in (torch.contiguous_format, wanted):
            x = entry.x.detach().contiguous(memory_format=x_format).requires_grad_()
            found = answer(entry.layer().to(memory_format=layer_format), x)
            torch.testing.assert_close(found, expected)
            assert found[0].is_contiguous(memory_format=x_format)


@in_each_double
def test_gradients_of_first_and_second_order(entry: Entry) -> None:
    layer = entry.layer()
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        fresh = copy.deepcopy(layer)  # training moves the running statistics; each call starts from the same
        return functional_call(fresh, dict(zip(names, parameters, strict=True)), (x,))

    given = [entry.x, *(parameter.detach().requires_grad_() for parameter in layer.parameters())]
    assert gradcheck(call, given, fast_mode=True)
    assert gradgradcheck(call, given, fast_mode=True)


@in_each_entry
def test_modes_differ_as_torchs_do(entry: Entry) -> None:
    torchs, ours = entry.pair()
    differ = []
    for layer in (torchs, ours):
        trained, inferred = copy.deepcopy(layer).train()(entry.x), copy.deepcopy(layer).eval()(entry.x)
        differ.append(not torch.equal(trained, inferred))
    assert differ[0] == differ[1]


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_errors_are_torchs(kind: type[nn.Module]) -> None:
    info = INFOS[kind]
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )
    assert errors
    for error in errors:
        constructor, call = error.module_error_input.constructor_input, error.module_error_input.forward_input
        for family in (kind, OURS[kind]):
            layer = family(*constructor.args, **constructor.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                layer(*call.args, **call.kwargs)


@pytest.mark.parametrize("dimensions", range(1, 7))
@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_wrong_dimensions_are_answered_in_torchs_words(kind: type[nn.Module], dimensions: int) -> None:
    x = torch.randn([3] * dimensions)
    for lazy in (False, True):
        texts = []
        for layer in (kind(3), OURS[kind](3)) if not lazy else (made() for made in LAZY[kind]):
            try:
                layer(x)
            except (ValueError, IndexError) as error:
                texts.append(f"{type(error).__name__}: {error}")
            else:
                texts.append("")
        assert texts[0] == texts[1]


def test_wrong_channels_are_answered_in_torchs_words() -> None:
    text = r"running_mean should contain 4 elements not 3"
    with pytest.raises(RuntimeError, match=text):
        nn.BatchNorm2d(3)(torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=f"^{text}$"):
        evenorm.BatchNorm2d(3)(torch.randn(2, 4, 5, 5))


# The lazy layers, by what PyTorch's test_lazy_modules.py asks of them.


@in_each_entry
def test_lazy_layers_become_torchs_equals(entry: Entry) -> None:
    given, (torchs, ours) = entry.given.constructor_input, LAZY[entry.kind]
    before, after = [], []
    for kind in (torchs, ours):
        layer = kind(*given.args[1:], **(given.kwargs | {"dtype": entry.dtype})).train(entry.training)
        before.append(
            (repr(layer).removeprefix("Lazy"), list(layer.state_dict()), layer.has_uninitialized_params())
        )
        results = answer(layer, entry.x)
        if entry.x.numel() == 0:
            layer.reset_running_stats()  # torch counts an empty batch
            results = results[:2]
        after.append((repr(layer), list(layer.state_dict()), type(layer), results))
    assert before[0] == before[1]
    assert [kind for _, _, kind, _ in after] == [entry.kind, OURS[entry.kind]]
    assert after[0][:2] == after[1][:2]
    torch.testing.assert_close(after[1][3], after[0][3])


@pytest.mark.parametrize("kind", LAZY, ids=lambda kind: kind.__name__)
def test_lazy_layers_load_and_are_loaded(kind: type[nn.Module]) -> None:
    x = torch.randn([4, 3, *[2] * {"1": 0, "2": 2, "3": 3}[kind.__name__[-2]]])
    for source in (kind(3), OURS[kind](3)):
        source(x)
        lazy = LAZY[kind][1]()
        lazy.load_state_dict(source.state_dict())
        assert not lazy.has_uninitialized_params()
        torch.testing.assert_close(lazy.running_mean, source.running_mean)
        torch.testing.assert_close(lazy.eval()(x), source.eval()(x))
    lazy, ready = LAZY[kind][1](), OURS[kind](3)
    with pytest.raises(RuntimeError, match="uninitialized"):
        ready.load_state_dict(lazy.state_dict())
    again = LAZY[kind][1]()
    again.load_state_dict(lazy.state_dict())
    assert again.has_uninitialized_params()


# The function, by op_db's samples.

(INFO,) = [info for info in op_db if info.name == "nn.functional.batch_norm" and not info.variant_test_name]
DTYPES = sorted(INFO.dtypes, key=str)


def samples(dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    return list(INFO.sample_inputs("cpu", dtype, requires_grad=True))


def arguments(sample: Any) -> tuple[Tensor, list[Tensor | None], dict[str, Any]]:
    """Return fresh tensors for a sample, since the running statistics are moved in place."""
    rest = [t if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in sample.args]
    return sample.input.detach().clone().requires_grad_(), rest, sample.kwargs


def answers(function: Any, sample: Any) -> list[Tensor | None]:
    x, rest, options = arguments(sample)
    y = function(x, *rest, **options)
    leaves = [tensor for tensor in (x, *rest) if tensor is not None and tensor.requires_grad]
    gradients = torch.autograd.grad(y, leaves, cotangent(y), allow_unused=True)
    return [y, *gradients, *rest[:2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", range(len(samples(torch.float64))))
def test_samples_of_the_function(at: int, dtype: torch.dtype) -> None:
    sample = samples(dtype)[at]
    found, expected = answers(evenorm.batch_norm, sample), answers(functional.batch_norm, sample)
    tolerance = {torch.bfloat16: 0.02, torch.float16: 2e-3}.get(dtype)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Torch itself scripts some derivatives when forward mode first needs them.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("at", range(len(samples(torch.float64))))
def test_samples_of_the_function_in_higher_orders(at: int) -> None:
    x, rest, options = arguments(samples(torch.float64)[at])
    given = [x, *(tensor for tensor in rest[2:] if tensor is not None)]

    def call(x: Tensor, *affine: Tensor) -> Tensor:
        running = [None if tensor is None else tensor.clone() for tensor in rest[:2]]
        return evenorm.batch_norm(x, *running, *affine, **options)

    assert gradcheck(call, given)
    assert gradgradcheck(call, given, fast_mode=True)
    assert gradcheck(call, given, check_forward_ad=True, check_backward_ad=False)
