"""Why a layer's running statistics are not those of the data: one function a cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from evenorm.doctor.findings import Finding, Severity, counted, short
from evenorm.doctor.live import Network, dropouts
from evenorm.doctor.measure import LayerMeasured, Measured
from evenorm.doctor.padding import Padding
from evenorm.doctor.streams import mixed, mixed_finding

CALIBRATE = "evenorm.calibrate(model, data)"
FAR = 0.1  # standard deviations, beyond chance, from which on running and exact statistics differ
FEW = 8  # samples a batch
LONG = 99  # batches that an average goes back over, from which on most were of other weights; torch's default: 19


@dataclass(frozen=True)
class Case:
    """One layer whose running statistics are not those of the data."""

    name: str
    layer: LayerMeasured
    network: Network
    measured: Measured

    @property
    def evidence(self) -> dict[str, float | int | str]:
        """How far off, and what chance would do."""
        return {
            "mean off by (standard deviations)": short(self.layer.mean_shift),
            "by chance": short(self.layer.noise),
            "exact / running variance": short(self.layer.ratio),
        }


def averaged(case: Case) -> Iterator[Finding]:
    """Weights that are an average of many, with statistics of other weights."""
    if any(name.rpartition(".")[2] == "n_averaged" for name, _ in case.network.model.named_buffers()):
        yield Finding(
            "averaged-weights",
            Severity.ERROR,
            case.name,
            {},
            "the weights are an average, the running statistics those of other weights",
            f"{CALIBRATE}, after averaging; without data evenorm.merge_statistics",
        )


def drifted(case: Case) -> Iterator[Finding]:
    """A layer that is frozen by halves, whose statistics have left it, or which the network has left."""
    live = next((record.live for record in case.network.records if record.name == case.name), None)
    if live is None or live.weight is None:
        return
    held = bool(getattr(live, "frozen", False))
    if held or not live.weight.requires_grad:
        yield Finding(
            "frozen-drifted",
            Severity.ERROR,
            case.name,
            {
                "statistics": "frozen" if held else "moving",
                "weight": "trained" if live.weight.requires_grad else "frozen",
            },
            "the layer's statistics are frozen, and the network in front of it has moved on"
            if held
            else "weight and bias are frozen, and the statistics moved on in train(): they are of other data",
            f"evenorm.unfreeze(model); {CALIBRATE}; evenorm.freeze(model)"
            if held
            else f"{CALIBRATE} on its own data; then evenorm.freeze(model), which holds statistics too",
        )


def dropout_shift(case: Case) -> Iterator[Finding]:
    """Dropout upstream, and running variances above the exact ones, which come without dropout."""
    found = dropouts(case.network).get(case.name)
    called = case.measured.dropped.get(case.name)
    if found is None and called is not None:
        found = "a dropout that forward calls", called, False
    if found is not None and case.layer.ratio < 0.97:
        source, p, direct = found
        expected: dict[str, float | int | str] = {"expected where the mean is 0": round(1 - p, 3)} if direct else {}
        yield Finding(
            "dropout-shift",
            Severity.ERROR,
            case.name,
            {"dropout": source, "p": p, **expected},
            f"{source} (p = {p:g}) in front of it raised the variance in train(); in eval() it is "
            f"{case.layer.ratio:.2f} of what the running statistics say",
            f"{CALIBRATE}, which runs without dropout; better, put dropout behind the last batch norm",
        )


def padding_shift(case: Case) -> Iterator[Finding]:
    """Padding in the input, another share of it than in training."""
    padding = case.measured.padding
    if padding is not None and padding.matters:
        yield padding_finding("padding", Severity.ERROR, case.name, padding)


def mixed_batches(case: Case) -> Iterator[Finding]:
    """Batches of several streams: the running statistics are those of the last few."""
    if mixed(case.layer, case.measured.padding):
        yield mixed_finding(Severity.ERROR, case.name, case.layer)


def noisy(case: Case) -> Iterator[Finding]:
    """Statistics that are as far off as an average over the last few batches is by chance."""
    layer = case.layer
    if layer.distance > FAR and layer.samples > FEW:
        return
    last = f"{counted(round(2 / layer.step - 1), 'batch', 'batches')}" if layer.step else "batches"
    yield Finding(
        "small-batches" if layer.samples <= FEW else "noisy-statistics",
        Severity.ERROR,
        case.name,
        {"momentum": layer.step, "samples a batch": short(layer.samples)},
        f"momentum {layer.step:g} averages over the last {last} of {counted(round(layer.samples), 'sample')} or "
        "so, and these differ too much for that",
        f"{CALIBRATE}; train with larger batches, a smaller momentum, or average=evenorm.Cumulative()",
    )


def lagging(case: Case) -> Iterator[Finding]:
    """An average over so many batches that most of them were of other weights."""
    step = case.layer.step
    batches = 2 / step - 1 if step else math.inf
    if batches >= LONG:
        over = (
            f"momentum {step:g} averages over the last {batches:.0f} batches or so"
            if step
            else ("momentum None averages over all batches since the first")
        )
        yield Finding(
            "lagging-statistics",
            Severity.ERROR,
            case.name,
            {"momentum": step or "None"},
            f"{over}, and the weights have changed since: the running statistics are those of older weights",
            f"{CALIBRATE} after training; or train with a larger momentum, torch's 0.1",
        )


def foreign(case: Case) -> Iterator[Finding]:
    """Statistics that are complete, and not those of these weights on these data."""
    yield Finding(
        "foreign-statistics",
        Severity.ERROR,
        case.name,
        {},
        "the running statistics are not those of these weights on these data: weights were averaged or changed "
        "after, several streams or too few or sorted batches made them, or the data are of another kind",
        CALIBRATE,
    )


REASONS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    averaged,
    drifted,
    dropout_shift,
    padding_shift,
    mixed_batches,
    noisy,
    lagging,
    foreign,
)


def padding_finding(code: str, severity: Severity, name: str, padding: Padding) -> Finding:
    """Return what there is to say of padding in the input."""
    return Finding(
        code,
        severity,
        name,
        {
            "padded positions": short(padding.share),
            "between batches, more or less by": short(padding.spread),
            "share of the input's variance": short(padding.made),
        },
        f"{padding.share:.0%} of the input's positions are padding, which enters the statistics as if it were data",
        "evenorm.convert(model), and pass mask= to the layers: padding then counts for nothing",
    )
