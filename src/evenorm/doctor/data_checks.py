"""Checks that need data: why running statistics are not those of the data, and what the batch gives besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evenorm.doctor.findings import Finding, Scores, Severity
from evenorm.doctor.live import Network, dropouts
from evenorm.doctor.measure import LayerMeasured, Measured
from evenorm.doctor.padding import Padding

CALIBRATE = "evenorm.calibrate(model, data)"
FAR = 0.1  # standard deviations, beyond chance, from which on running and exact statistics differ
HELPS = 0.2  # the share of the loss from which on a cause counts as one
FEW = 8  # samples a batch
NOISY = 0.15  # a batch's mean is typically so many standard deviations off; or its variance's logarithm twice that
APART = 0.8  # the share of the variance between batches that two clusters explain; 0.64 is what chance does

# Why a layer's statistics are wrong, the likeliest first: the first of these that a layer has explains its harm.
STATISTICS = (
    *("not-finite", "negative-variance", "zero-variance", "averaged-weights", "momentum-zero", "never-updated"),
    *("stale-statistics", "frozen-drifted", "dropout-shift", "padding", "mixed-streams", "small-batches"),
    *("noisy-statistics", "foreign-statistics"),
)
ALWAYS = {"not-finite", "negative-variance"}  # that are errors whatever the data say


@dataclass(frozen=True)
class Case:
    """One layer whose running statistics are not those of the data."""

    name: str
    layer: LayerMeasured
    network: Network
    padding: Padding | None

    @property
    def evidence(self) -> dict[str, float | int | str]:
        """How far off, and what chance would do."""
        return {
            "mean off by (standard deviations)": _short(self.layer.mean_shift),
            "by chance": _short(self.layer.noise),
            "exact / running variance": _short(self.layer.ratio),
        }


def judged(findings: list[Finding], network: Network, measured: Measured) -> list[Finding]:
    """Return the findings with what was measured: new ones, harm, and severities by what it costs."""
    if measured.why_not:
        return [*findings, _not_measured(measured)]
    scores = measured.scores
    explained, done = _explained(findings, network, measured)
    rest = [found for found in findings if not (found.layer in done and found.code in STATISTICS)]
    right = set(measured.layers) - done  # whatever their counters say
    rest = [found for found in rest if not (found.layer in right and found.code == "stale-statistics")]
    rest = [_softened(found, scores, right) for found in rest]
    others = [found for check in CHECKS for found in check(network, measured)]
    dropout = {found.layer for found in explained if found.code == "dropout-shift"}
    if any(found.code == "padding" for found in explained):  # a note would say it again
        others = [found for found in others if found.code != "padding" or found.severity > Severity.NOTE]
    known = [found for found in rest if not (found.code == "dropout-in-front" and found.layer in dropout)]
    return [*explained, *others, *known]


def _explained(findings: list[Finding], network: Network, measured: Measured) -> tuple[list[Finding], set[str]]:
    """Return one finding for each layer whose statistics are off, with its share of the harm, and their names."""
    scores = measured.scores
    distances = _distances(measured)
    finite = {name: min(distance, 100.0) for name, distance in distances.items()}
    explained = []
    for name in distances:
        case = Case(name, measured.layers[name], network, measured.padding)
        known = {found.code: found for found in findings if found.layer == name and found.code in STATISTICS}
        known |= {found.code: found for reason in REASONS for found in reason(case)}
        found = next(known[code] for code in STATISTICS if code in known)
        harm, severity = None, found.severity
        if scores is not None:
            share = finite[name] / sum(finite.values())
            harm = _share_recovered(scores) * share if scores.harmful else None
            severity = _by_cost(found, scores)
        explained.append(replace(found, severity=severity, harm=harm, evidence=found.evidence | case.evidence))
    return explained, set(distances)


def _distances(measured: Measured) -> dict[str, float]:
    """Return how far off the statistics of those layers are where it matters.

    If nothing is farther off than chance would have it, and exact statistics help nevertheless, then the chance
    that is in the running statistics does the harm.
    """
    beyond = {name: layer.distance for name, layer in measured.layers.items() if layer.distance > FAR}
    scores = measured.scores
    if beyond or scores is None or not (scores.harmful and _share_recovered(scores) > HELPS):
        return beyond
    return {name: layer.far for name, layer in measured.layers.items() if layer.far > FAR}


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
    if case.padding is not None and case.padding.matters:
        yield _padding_finding("padding", Severity.ERROR, case.name, case.padding)


def mixed(case: Case) -> Iterator[Finding]:
    """Batches of several streams: the running statistics are those of the last few."""
    if _mixed(case.layer, case.padding):
        yield _mixed_finding(Severity.ERROR, case.name, case.layer)


def noisy(case: Case) -> Iterator[Finding]:
    """Statistics that are as far off as an average over the last few batches is by chance."""
    layer = case.layer
    if layer.distance > FAR and layer.samples > FEW:
        return
    last = 2 / layer.step - 1 if layer.step else math.inf
    yield Finding(
        "small-batches" if layer.samples <= FEW else "noisy-statistics",
        Severity.ERROR,
        case.name,
        {"momentum": layer.step, "samples a batch": _short(layer.samples)},
        f"momentum {layer.step:g} averages over the last {last:.0f} batches of {layer.samples:.0f} samples or so, "
        "and these differ too much for that",
        f"{CALIBRATE}; train with larger batches, a smaller momentum, or average=evenorm.Cumulative()",
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
    mixed,
    noisy,
    foreign,
)


def padded_input(network: Network, measured: Measured) -> Iterator[Finding]:
    """Padding that every batch has in another amount: no statistics fit all."""
    padding = measured.padding
    if padding is None or not padding.matters:
        return
    harm = _harm_of_batches(measured)
    yield replace(_padding_finding("padding", _severity_of_batches(measured), "", padding), harm=harm)


def mixed_streams(network: Network, measured: Measured) -> Iterator[Finding]:
    """Batches that differ more than random ones, where that is most."""
    apart = {name: layer for name, layer in measured.layers.items() if _mixed(layer, measured.padding)}
    if apart:
        name = max(apart, key=lambda name: apart[name].between)
        found = _mixed_finding(_severity_of_batches(measured), name, apart[name])
        yield replace(found, harm=_harm_of_batches(measured))


def small_batches(network: Network, measured: Measured) -> Iterator[Finding]:
    """Batches too small for their own mean and variance to say much, which the network has learnt to live with."""
    noisy = [
        (name, layer)
        for name, layer in measured.layers.items()
        if layer.mean_noise > NOISY or layer.variance_noise > 2 * NOISY
    ]
    if not noisy or any(True for _ in mixed_streams(network, measured)):
        return
    name, layer = max(noisy, key=lambda one: one[1].mean_noise)
    if layer.samples > 32 or (measured.padding is not None and measured.padding.matters):
        return
    yield Finding(
        "small-batches",
        _severity_of_batches(measured),
        "",
        {
            "samples a batch": _short(layer.samples),
            "noisy layers": len(noisy),
            "of": len(measured.layers),
            "noise of a batch's mean (standard deviations)": _short(layer.mean_noise),
            "noise of its variance (logarithm)": _short(layer.variance_noise),
        },
        f"with {layer.samples:.0f} samples a batch, its own mean is off by {layer.mean_noise:.2f} standard "
        f"deviations in {name or 'the layer'}: the network has learnt with noise that eval() does not have",
        "train with larger batches, or with evenorm.BatchNorm(..., renorm=evenorm.Renorm()), or pool over workers",
        _harm_of_batches(measured),
    )


def shared_calls(network: Network, measured: Measured) -> Iterator[Finding]:
    """A layer that runs several times for each batch."""
    for name, layer in measured.layers.items():
        if layer.calls > 1:
            yield Finding(
                "shared-layer",
                Severity.WARNING if measured.scores is not None and measured.scores.harmful else Severity.NOTE,
                name,
                {"uses a batch": _short(layer.calls)},
                f"the layer runs {layer.calls:g} times for each batch: its running statistics mix all of them",
                "give each use a layer of its own; weight and bias may still be shared",
            )


def lost_behind(network: Network, measured: Measured) -> Iterator[Finding]:
    """Channels that a ReLU never lets through, or that lie where a sigmoid or tanh is flat."""
    for name, (kind, lost, channels) in measured.behind.items():
        if lost:
            told = "never let through by the ReLU" if kind == "relu" else f"where the {kind} is flat"
            yield Finding(
                "dead-relu" if kind == "relu" else "saturated",
                Severity.WARNING if lost > channels / 2 else Severity.NOTE,
                name,
                {"activation": kind, "channels": lost, "of": channels},
                f"{lost} of {channels} channels are {told}, on all of the samples looked at",
                f"prune them; if they are many: {CALIBRATE}, a lower learning rate, no weight decay on batch norm",
            )


CHECKS: tuple[Callable[[Network, Measured], Iterator[Finding]], ...] = (
    padded_input,
    mixed_streams,
    small_batches,
    shared_calls,
    lost_behind,
)


def _mixed(layer: LayerMeasured, padding: Padding | None) -> bool:
    """Tell whether batches differ more than random ones: these have at most 1/N of the variance between them."""
    padded = padding is not None and padding.matters  # which makes batches differ
    return not padded and len(layer.batch_means) >= 4 and layer.between > max(0.1, 4 / layer.samples)


def _mixed_finding(severity: Severity, name: str, layer: LayerMeasured) -> Finding:
    means = (layer.batch_means - layer.batch_means.mean(0)) / layer.deviation
    explained = _two_clusters(means @ torch.linalg.svd(means, full_matrices=False)[2][0])
    two = explained > APART and len(means) >= 8
    return Finding(
        "mixed-streams",
        severity,
        name,
        {
            "share of the variance between batches": _short(layer.between),
            "by chance at most": _short(1 / layer.samples),
            "share of that between two clusters": _short(explained),
        },
        f"{layer.between:.0%} of the variance lies between batches, {1 / layer.samples:.1%} would by chance: "
        + ("two streams of data go through one layer" if two else "batches are sorted, or of several streams"),
        "mix the streams in every batch; or give each stream batch norm layers of its own",
    )


def _two_clusters(scores: Tensor) -> float:
    """Return the share of the variance of B numbers that the best cut into two groups explains."""
    ordered = scores.sort().values
    total = float((ordered - ordered.mean()).square().sum())
    best = 0.0
    for cut in range(2, len(ordered) - 1):
        low, high = ordered[:cut].mean(), ordered[cut:].mean()
        best = max(best, float(cut * (len(ordered) - cut) / len(ordered) * (high - low).square()))
    return best / total if total else 0.0


def _padding_finding(code: str, severity: Severity, name: str, padding: Padding) -> Finding:
    return Finding(
        code,
        severity,
        name,
        {
            "padded positions": _short(padding.share),
            "between batches, more or less by": _short(padding.spread),
            "share of the input's variance": _short(padding.made),
        },
        f"{padding.share:.0%} of the input's positions are padding, which enters the statistics as if it were data",
        "evenorm.convert(model), and pass mask= to the layers: padding then counts for nothing",
    )


def _not_measured(measured: Measured) -> Finding:
    return Finding(
        "not-measured",
        Severity.WARNING,
        "",
        {},
        f"the data could not be measured: {measured.why_not}",
        "give data without NaN or inf; or mend the weights first",
    )


def _share_recovered(scores: Scores) -> float:
    share = scores.recovered / scores.lost if scores.lost else 0.0
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 1.0


def _by_cost(found: Finding, scores: Scores) -> Severity:
    """What wrong statistics cost decides: all, or nothing on these data."""
    if found.code in ALWAYS:
        return found.severity
    if not scores.harmful:
        return Severity.NOTE
    return Severity.ERROR if _share_recovered(scores) > HELPS else Severity.NOTE


def _softened(found: Finding, scores: Scores | None, right: set[str]) -> Finding:
    """Return a finding about statistics, which the data do not confirm, as a note."""
    unharmed = found.layer in right or (scores is not None and not scores.harmful)
    quiet = unharmed and found.code in (*STATISTICS, "dropout-in-front")
    return replace(found, severity=Severity.NOTE) if quiet and found.code not in ALWAYS else found


def _harm_of_batches(measured: Measured) -> float | None:
    scores = measured.scores
    return None if scores is None or not scores.harmful else 1 - _share_recovered(scores)


def _severity_of_batches(measured: Measured) -> Severity:
    """What exact statistics do not give back is what the batch itself gives."""
    harm = _harm_of_batches(measured)
    return Severity.ERROR if harm is not None and harm > HELPS else Severity.NOTE


def _short(number: float) -> float | str:
    return float(f"{number:.3g}") if math.isfinite(number) else str(number)
