"""Compute the population statistics of a network's batch norm layers from data, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer

from evenorm.models.batches import Forward, run
from evenorm.models.calibration import Calibration, LayerCalibration
from evenorm.models.gather import Gathered, Watch, over_workers
from evenorm.models.intact import evaluating, remember_random
from evenorm.models.merge import MEAN, VAR
from evenorm.models.together import merged_over_workers
from evenorm.models.walk import batch_norms, shown
from evenorm.moments import Moments
from evenorm.workers import Group, resolve


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    max_batches: int | None = None,
    sequential: bool = False,
    prior: float = 0,
    process_group: Group = None,
    tolerance: float | None = None,
) -> Calibration:
    r"""Replace the running statistics of a network's batch norm layers by those of the data, in place.

    .. math:: \mu = \frac1n \sum_i x_i, \qquad \sigma^2 = \frac{1}{n - 1} \sum_i (x_i - \mu)^2
              \qquad \text{over all values } x_i \text{ that a channel gets from the data}

    The moments of all batches are merged in float64, so a short last batch counts by its size and the variance
    between batches is in. Takes batch norm of any make. The network runs in evaluation, without dropout; what is
    frozen stays as it is. Everything is gathered first and written once at the end: if the data, the network or
    the user interrupts, the network and the random numbers are left as they were.

    In the one pass over the data each layer normalises by its batch, as in training, so that nothing depends on
    the statistics that are to be replaced. What is left inexact is the noise of the batches that upper layers see:
    use batches as large as in training, or larger.

    Args:
        model: a network, or a single layer.
        data: batches: a tensor, a tuple that starts with the network's inputs (the rest are labels), or a dict of
            arguments. Any iterable; no length is needed.
        forward: called as ``forward(model, batch)`` for networks and batches of any other kind.
        max_batches: read no more than these.
        sequential: read the data once for each layer, and let each layer see the calibrated ones below it, as it
            will in use: no batch's noise is left. The data must give the same batches each time; the random numbers
            are put back before each pass, so shuffling and augmentation repeat themselves.
        prior: by how many samples the old statistics weigh: 0 replaces them. A sample is a row of a layer's input.
            Those of several workers are merged first, as by `merge_statistics`.
        process_group: merge the moments of these workers, each with its own data: a torch ProcessGroup or
            ``"world"``. A worker that fails stops the others.
        tolerance: stop when no mean's standard error is above this many standard deviations, after two batches at
            the earliest; a worker looks at its own data.

    Returns:
        `Calibration`: what changed in each layer, how exact it is, and which layers were left alone.

    Raises:
        TypeError: batches of an unknown kind.
        ValueError: no batch norm that keeps statistics, no data, NaN or inf in the input of a layer, or a batch
            that the network does not take. Nothing is changed.

    Note:
        ``num_batches_tracked`` becomes the number of batches. A layer that is used twice gets the moments of both
        uses. A batch with one value per channel, which has no variance, is normalised by all values so far.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    >>> images = torch.randn(105, 4)
    >>> _ = evenorm.calibrate(model, images.split(10))
    >>> torch.testing.assert_close(model[1].running_var, model[0](images).var(0))

    Source: Wu & Johnson 2021, section 3 ("precise batch norm"); for ``prior``, Schneider et al. 2020, section 3.
    """
    layers, untouched = _find(model)
    resolve(process_group, _running(next(iter(layers.values())))[0])  # before the data are read
    job = _Job(model, data, forward, layers, process_group, tolerance)

    def check() -> None:
        _check(data, max_batches, sequential, prior, tolerance)
        if prior:
            _check_prior(layers)

    restore_random = remember_random()
    with evaluating(model):
        found, batches, read, stopped = job.gather(Watch(layers, list(layers)), max_batches, check)
        if not batches:
            raise ValueError("data gave no batch; nothing was changed")
        if not found:
            raise ValueError(
                f"no batch norm layer was reached, of {', '.join(layers)}; does forward run this network? "
                "Nothing was changed"
            )
        order = list(found)
        old = _old_statistics(layers, process_group if prior else None)
        new = {name: _statistics(old[name], found[name], prior) for name in order}
        for name in order[1:] if sequential else []:
            restore_random()
            watch = Watch(layers, [name])
            watch.known = {known: value for known, value in new.items() if value is not None}
            found |= job.gather_again(watch, read)
            new[name] = _statistics(old[name], found[name], prior)
    statistics = {name: value for name, value in new.items() if value is not None}
    untouched |= {name: "fewer than two values per channel" for name in order if new[name] is None}
    untouched |= {name: "never reached" for name in layers if name not in found}
    reports = tuple(_report(name, layers[name], found[name], *value) for name, value in statistics.items())
    _write_(layers, statistics, {name: found[name].batches for name in statistics})
    return Calibration(reports, untouched, batches, len(order) if sequential else 1, stopped)


@dataclass(frozen=True)
class _Job:
    """What all passes over the data have in common."""

    model: nn.Module
    data: Iterable[Any]
    forward: Forward | None
    layers: dict[str, _BatchNorm]
    group: Group
    tolerance: float | None

    def gather(
        self, watch: Watch, limit: int | None, check: Callable[[], None]
    ) -> tuple[dict[str, Gathered], int, int, bool]:
        """Read the data; return what all workers' layers got, all batches, this worker's, and if it stopped.

        The check comes first, where what is wrong on one worker alone stops the others as well.
        """

        def read() -> tuple[dict[str, Gathered], int, bool]:
            check()
            return self._read(watch, limit, self.tolerance)

        return self._on_all_workers(read)

    def gather_again(self, watch: Watch, batches: int) -> dict[str, Gathered]:
        """Read as many batches once more; return what the layers got on all workers."""

        def read() -> tuple[dict[str, Gathered], int, bool]:
            found, again, stopped = self._read(watch, batches, None)
            if again != batches:
                raise ValueError(
                    f"data gave {batches} batches first and {again} when read again, as sequential=True does; give "
                    "data that can be read many times, a list or a DataLoader; nothing was changed"
                )
            return found, again, stopped

        return self._on_all_workers(read)[0]

    def _read(
        self, watch: Watch, limit: int | None, tolerance: float | None
    ) -> tuple[dict[str, Gathered], int, bool]:
        """Run batches through the network; return what this worker's layers got, how many, and if it stopped."""
        batches = 0
        for batch in islice(self.data, limit):
            watch.batch = batches
            with watch:
                run(self.model, batch, batches, self.forward)
            batches += 1
            if tolerance is not None and _precise(watch.merge_all(), self.layers, tolerance):
                return watch.merge_all(), batches, True
        return watch.merge_all(), batches, False

    def _on_all_workers(
        self, read: Callable[[], tuple[dict[str, Gathered], int, bool]]
    ) -> tuple[dict[str, Gathered], int, int, bool]:
        try:
            found, batches, stopped = read()
        except Exception:
            if self.group is not None:  # the others wait for this worker's message
                over_workers({}, self.layers, self.group, 0, failed=True)
            raise
        merged, total = over_workers(found, self.layers, self.group, batches, failed=False)
        return merged, total, batches, stopped


def _check(data: object, max_batches: object, sequential: bool, prior: object, tolerance: object) -> None:
    if isinstance(data, Tensor) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(
            f"data must be an iterable of batches, got a {type(data).__name__}; for one batch give [batch]"
        )
    if sequential and isinstance(data, Iterator):
        raise ValueError(
            "sequential=True reads the data once for each layer, and a generator can be read once only; give a "
            "list or a DataLoader"
        )
    if max_batches is not None and (isinstance(max_batches, bool) or not isinstance(max_batches, int)):
        raise TypeError(f"max_batches must be an integer, got {max_batches!r}")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be at least 1, got {max_batches}")
    for name, number, least in (("prior", prior, "0 samples or more"), ("tolerance", tolerance, "above 0")):
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, got {number!r}")
        if not (math.isfinite(number) and (number > 0 or (name == "prior" and number == 0))):
            raise ValueError(f"{name} must be {least}, and finite, got {number!r}")


def _find(model: nn.Module) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """Return the layers to calibrate by name, and why others are not."""
    layers: dict[str, _BatchNorm] = {}
    untouched: dict[str, str] = {}
    for dotted, layer in batch_norms(model):
        name = shown(dotted)
        if isinstance(layer.running_mean, UninitializedBuffer):
            raise ValueError(f"{name} is lazy and knows no channels yet; run the network once before")
        if layer.running_mean is None or layer.running_var is None or not layer.track_running_stats:
            untouched[name] = "keeps no running statistics"
        elif getattr(layer, "frozen", False):
            untouched[name] = "frozen"
        else:
            layers[name] = layer
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in untouched.items())
        raise ValueError(f"the network has no batch norm layer to calibrate{f' ({why})' if why else ''}")
    return layers, untouched


def _check_prior(layers: dict[str, _BatchNorm]) -> None:
    for name, layer in layers.items():
        if not all(bool(torch.isfinite(old).all()) for old in _running(layer)):
            raise ValueError(f"{name}: its statistics hold NaN or inf and can be no prior; use prior=0")


def _running(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _old_statistics(layers: dict[str, _BatchNorm], group: Group) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the layers' running statistics, those of all workers merged, so that all go on with the same bits."""
    own = {
        f"{name}.{key}": value
        for name, layer in layers.items()
        for key, value in zip((MEAN, VAR), _running(layer), strict=True)
    }
    merged = merged_over_workers(own, group)
    return {name: (merged[f"{name}.{MEAN}"], merged[f"{name}.{VAR}"]) for name in layers}


def _statistics(old: tuple[Tensor, Tensor], found: Gathered, prior: float) -> tuple[Tensor, Tensor] | None:
    """Return the new mean and unbiased variance, (C,), or None where too few values were seen."""
    values = found.values
    if prior and found.samples:
        old_mean, old_var = (part.to(values.mean.dtype) for part in old)
        count = values.count / found.samples * prior
        values = values + Moments(count, old_mean, old_var * (count - 1).clamp(min=0))
    if values.count < 2:
        return None
    return values.mean, values.variance(correction=1)


def _precise(found: dict[str, Gathered], layers: dict[str, _BatchNorm], tolerance: float) -> bool:
    """Tell whether no mean's standard error is above the tolerance."""
    errors = [
        _standard_error(gathered, layers[name], gathered.values.variance(1)) for name, gathered in found.items()
    ]
    return bool(errors) and all(error is not None and error <= tolerance for error in errors)


def _standard_error(found: Gathered, layer: _BatchNorm, var: Tensor) -> float | None:
    """Return the largest standard error of a mean, in units of what the layer divides by."""
    error = found.standard_error()
    return None if error is None else float((error / (var + layer.eps).sqrt()).max())


def _report(name: str, layer: _BatchNorm, found: Gathered, mean: Tensor, var: Tensor) -> LayerCalibration:
    old_mean, old_var = (old.to(mean.dtype) for old in _running(layer))
    shift = ((mean - old_mean) / (var + layer.eps).sqrt()).abs()
    ratio = (var + layer.eps) / (old_var + layer.eps)
    low, high = ratio.nan_to_num(math.inf, math.inf).aminmax()
    return LayerCalibration(
        name,
        found.samples,
        found.batches,
        float(shift.nan_to_num(math.inf, math.inf).max()),
        (float(low), float(high)),
        _standard_error(found, layer, var),
    )


@torch.no_grad()
def _write_(
    layers: dict[str, _BatchNorm], statistics: dict[str, tuple[Tensor, Tensor]], batches: dict[str, int]
) -> None:
    """Write new statistics into the layers' buffers, all or, if anything interrupts, none."""
    new: list[tuple[Tensor, Tensor]] = []
    for name, pair in statistics.items():
        buffers = dict(layers[name].named_buffers(recurse=False))
        for kind, value in zip(("mean", "var"), pair, strict=True):
            cast = value.to(buffers[f"running_{kind}"].dtype)
            if not torch.isfinite(cast).all():
                raise ValueError(
                    f"{name}: its new running_{kind} is too large for {cast.dtype}; nothing was changed"
                )
            new += [(buffers[key], cast) for key in (f"running_{kind}", f"window_{kind}") if key in buffers]
        if "num_batches_tracked" in buffers:
            new.append((buffers["num_batches_tracked"], torch.tensor(batches[name])))
    old = [buffer.clone() for buffer, _ in new]
    try:
        for buffer, value in new:
            buffer.copy_(value)
    except BaseException:
        for (buffer, _), value in zip(new, old, strict=True):
            buffer.copy_(value)
        raise
