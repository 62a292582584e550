"""Run a network by three kinds of statistics over the same data, which are read once; change nothing in it.

Every batch runs once normalised by its own statistics, while all layers' moments are gathered. Half of them, up to
a limit, run a second time by the running statistics and wait for a third time by the exact ones, which are known
when the data have ended. So the cost stays below three passes, and what waits below `WAITING` bytes.

Legend: B batches, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import Parameter
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm.doctor.around import Around
from evenorm.doctor.findings import Scores
from evenorm.doctor.padding import Padding, padding
from evenorm.doctor.records import Record
from evenorm.doctor.score import Loss, Tally
from evenorm.models.batches import DataError, Forward, arguments, parameters_of, run
from evenorm.models.gather import Gathered, Watch
from evenorm.models.intact import evaluating
from evenorm.moments import Moments

SAMPLES = 10_000  # that are scored
WAITING = 2**28  # bytes of batches that wait for the exact statistics
LOOKED_BEHIND = 128  # samples after which an activation that never acted counts as dead


@dataclass(frozen=True, eq=False)
class LayerMeasured:
    """What the data say of one layer; statistics are (C,), those of batches (B, C).

    Args:
        mean: exact.
        var: exact, unbiased.
        running_mean: as found.
        running_var: as found.
        eps: the layer's.
        batch_means: each batch's own mean.
        batch_vars: each batch's own variance.
        samples: of a batch, typically.
        calls: how often the layer ran for each batch.
        standard_error: of the exact mean, by how batches differ.
        step: the weight of a new batch in the running statistics.
    """

    mean: Tensor
    var: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float
    batch_means: Tensor
    batch_vars: Tensor
    samples: float
    calls: float
    standard_error: Tensor | None
    step: float

    @property
    def deviation(self) -> Tensor:
        """What the layer divides by."""
        return (self.var + self.eps).sqrt()

    @property
    def mean_shift(self) -> float:
        """The distance of running from exact means, in standard deviations: root mean square over channels."""
        return _rms((self.running_mean - self.mean) / self.deviation)

    @property
    def log_ratio(self) -> float:
        """The distance of running from exact variances: root mean square of the ratio's logarithm."""
        return _rms(((self.running_var + self.eps) / (self.var + self.eps)).log())

    @property
    def ratio(self) -> float:
        """The geometric mean over channels of exact over running variance."""
        logs = ((self.var + self.eps) / (self.running_var + self.eps)).log()
        return math.exp(float(logs.mean())) if bool(torch.isfinite(logs).all()) else math.nan

    @property
    def between(self) -> float:
        """The share of the variance that lies between batches."""
        return self.mean_noise**2

    @property
    def mean_noise(self) -> float:
        """How far a batch's mean is from the exact one, typically, in standard deviations."""
        return _rms((self.batch_means - self.mean) / self.deviation)

    @property
    def variance_noise(self) -> float:
        """The spread of the batches' own variances, as of their logarithm."""
        logs = (self.batch_vars + self.eps).log()
        return _rms(logs - logs.mean(0)) if len(logs) > 1 else 0.0

    @property
    def noise(self) -> float:
        """What `mean_shift` would be by chance: by the exact means' error and by the last batches' share."""
        error = 0.0 if self.standard_error is None else _rms(self.standard_error / self.deviation)
        return math.hypot(error, self.mean_noise * self._averaged)

    @property
    def _averaged(self) -> float:
        """What an exponential average leaves of the noise of batches."""
        return math.sqrt(self.step / (2 - self.step))

    @property
    def far(self) -> float:
        """How far running statistics are from the exact ones, in one number; inf where one is no number."""
        far = math.hypot(self.mean_shift, self.log_ratio / 2)
        return math.inf if math.isnan(far) else far

    @property
    def distance(self) -> float:
        """How far running statistics are from the exact ones, beyond chance."""
        return max(self.far - 2 * math.hypot(self.noise, self.variance_noise / 2 * self._averaged), 0.0)


@dataclass(frozen=True)
class Measured:
    """What the data say of a network.

    Args:
        scores: by three kinds of statistics; None where the outputs cannot be scored.
        layers: of the layers that were reached, in that order.
        padding: what of the input is padding.
        behind: by layer, the activation behind it, how many channels it loses, of how many.
        dropped: by layer, the p of the dropout that was called in front of it.
        why_not: why nothing could be measured; "" where it could.
    """

    scores: Scores | None = None
    layers: Mapping[str, LayerMeasured] = field(default_factory=dict)
    padding: Padding | None = None
    behind: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    dropped: Mapping[str, float] = field(default_factory=dict)
    why_not: str = ""


class Keeping(Watch):
    """A watch that keeps what each batch gave to each layer, besides what they give together."""

    def __init__(self, layers: Mapping[str, _BatchNorm], gather: Sequence[str]) -> None:
        """Take the layers by name, and the names of those to gather from."""
        super().__init__(layers, gather)
        self.kept: dict[str, list[Moments]] = {}

    def merge(self, name: str) -> Gathered:
        """Merge what waits, and keep it."""
        self.kept.setdefault(name, []).extend(batch for batch, _, _ in self.waiting.get(name, ()))
        return super().merge(name)


def measure(
    model: nn.Module,
    records: Sequence[Record],
    data: Iterable[Any],
    loss: Loss | None,
    forward: Forward | None,
    max_batches: int | None,
) -> Measured:
    """Run the data through the network; see the module.

    Raises:
        TypeError: data that are no iterable of batches.
        ValueError: no batches, or one that the network does not take.
    """
    if isinstance(data, Tensor) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(
            f"data must be an iterable of batches, got a {type(data).__name__}; for one batch give [batch]"
        )
    layers = {
        record.name: record.live
        for record in records
        if record.live is not None and record.mean is not None and record.var is not None
    }
    try:
        with evaluating(model):
            return _Passes(model, layers, Tally(loss), forward).over(islice(data, max_batches))
    except DataError as error:
        return Measured(why_not=str(error).removesuffix("; nothing was changed"))


@dataclass
class _Passes:
    model: nn.Module
    layers: dict[str, _BatchNorm]
    tally: Tally
    forward: Forward | None

    def over(self, data: Iterable[Any]) -> Measured:
        """Run all that there is to run."""
        watch, around = Keeping(self.layers, list(self.layers)), Around(self.layers)
        waiting: list[_Runnable] = []
        padded: Padding | None = None
        samples, room, number = 0, WAITING, 0
        parameters = parameters_of(self.model)
        for batch in data:
            watch.batch = number
            runnable = _Runnable(self.model, batch, number, self.forward, parameters)
            with watch:
                by_batch = runnable.output()
            padded = padding(runnable.first_input(), padded)
            size = _size(batch)
            if samples < SAMPLES and size <= room and scored(number) and self.tally.takes(by_batch, batch):
                with nullcontext() if around.closed else around:
                    by_running = runnable.output()
                self.tally.add(batch, by_batch, by_running)
                waiting.append(runnable)
                samples, room = samples + self.tally.counts[-1], room - size
                around.closed = samples >= LOOKED_BEHIND
            number += 1
        if not number:
            raise ValueError("data gave no batch; nothing was changed")
        found = {name: gathered for name, gathered in watch.merge_all().items() if gathered.values.count >= 2}
        with _normalising_by(self.layers, found):
            for index, runnable in enumerate(waiting):
                self.tally.add_exact(index, runnable.batch, runnable.output())
        measured = {name: self._measured(name, one, watch.kept[name], number) for name, one in found.items()}
        return Measured(self.tally.scores(), measured, padded, around.lost(), around.dropped)

    def _measured(self, name: str, one: Gathered, kept: list[Moments], batches: int) -> LayerMeasured:
        layer = self.layers[name]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        own = [moments for moments in kept if bool((moments.count > 0).all())]
        return LayerMeasured(
            mean=one.values.mean.double(),
            var=one.values.variance(correction=1).double(),
            running_mean=layer.running_mean.double(),
            running_var=layer.running_var.double(),
            eps=layer.eps,
            batch_means=torch.cat([moments.mean for moments in own]).double(),
            batch_vars=torch.cat([moments.m2 / _column(moments) for moments in own]).double(),
            samples=one.samples / one.batches,
            calls=one.batches / batches,
            standard_error=one.standard_error(),
            step=layer.momentum if layer.momentum is not None else 0.0,
        )


@dataclass
class _Runnable:
    """A batch, ready to be run several times."""

    model: nn.Module
    batch: Any
    number: int
    forward: Forward | None
    parameters: Sequence[Parameter]  # of the network's own forward
    given: tuple[list[Any], dict[str, Any]] | None = None  # what the network is called with, once that is known

    def output(self) -> Any:
        """Run the batch; say where it went wrong."""
        outputs: list[Any] = []
        run(self.model, self.batch, self.number, lambda model, batch: outputs.append(self._call(model, batch)))
        return outputs[0]

    def first_input(self) -> Tensor | None:
        """Return the first tensor that the network is called with, where it is known."""
        if self.given is None:
            return None
        positional, named = self.given
        return next((value for value in (*positional, *named.values()) if isinstance(value, Tensor)), None)

    def _call(self, model: nn.Module, batch: Any) -> Any:
        if self.forward is not None:
            return self.forward(model, batch)
        if self.given is None:
            self.given = arguments(model, batch, self.parameters)
        positional, named = self.given
        return model(*positional, **named)


def scored(number: int) -> bool:
    """Tell whether a batch is scored: half are, in Thue and Morse's order, with which no taking of turns falls in.

    >>> [number for number in range(12) if scored(number)]
    [0, 3, 5, 6, 9, 10]
    """
    return number.bit_count() % 2 == 0


@contextmanager
def _normalising_by(layers: Mapping[str, _BatchNorm], found: Mapping[str, Gathered]) -> Iterator[None]:
    """Let the layers normalise by exact statistics, in tensors of their own; the buffers are not written to."""
    before = [(layer._buffers, dict(layer._buffers)) for layer in layers.values()]
    try:
        for name, one in found.items():
            buffers = layers[name]._buffers
            for key, value in (
                ("running_mean", one.values.mean),
                ("running_var", one.values.variance(correction=1)),
            ):
                old = buffers[key]
                assert old is not None
                buffers[key] = value.to(old.dtype)
        yield
    finally:
        for buffers, contents in before:
            buffers.update(contents)


def _column(moments: Moments) -> Tensor:
    count = moments.count
    return count.reshape(-1, 1) if count.dim() else count


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _size(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return batch.numel() * batch.itemsize
    if isinstance(batch, Mapping):
        return sum(map(_size, batch.values()))
    if isinstance(batch, (tuple, list)):
        return sum(map(_size, batch))
    return 0
