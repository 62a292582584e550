"""Checks that need data: why running statistics are not those of the data, and what the batch gives besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from evenorm.doctor.findings import Finding, Scores, Severity, counted, short
from evenorm.doctor.live import Network
from evenorm.doctor.measure import Measured
from evenorm.doctor.reasons import CALIBRATE, FAR, REASONS, Case, padding_finding
from evenorm.doctor.streams import mixed, mixed_finding

HELPS = 0.2  # the share of the loss from which on a cause counts as one
NOISY = 0.15  # a batch's mean is typically so many standard deviations off; or its variance's logarithm twice that

# Why a layer's statistics are wrong, the likeliest first: the first of these that a layer has explains its harm.
STATISTICS = (
    *("not-finite", "negative-variance", "zero-variance", "averaged-weights", "momentum-zero", "never-updated"),
    *("stale-statistics", "frozen-drifted", "dropout-shift", "padding", "mixed-streams", "small-batches"),
    *("noisy-statistics", "lagging-statistics", "foreign-statistics"),
)
ALWAYS = {"not-finite", "negative-variance"}  # that are errors whatever the data say


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
        case = Case(name, measured.layers[name], network, measured)
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


def padded_input(network: Network, measured: Measured) -> Iterator[Finding]:
    """Padding that every batch has in another amount: no statistics fit all."""
    padding = measured.padding
    if padding is None or not padding.matters:
        return
    harm = _harm_of_batches(measured)
    yield replace(padding_finding("padding", _severity_of_batches(measured), "", padding), harm=harm)


def mixed_streams(network: Network, measured: Measured) -> Iterator[Finding]:
    """Batches that differ more than random ones, where that is most."""
    apart = {name: layer for name, layer in measured.layers.items() if mixed(layer, measured.padding)}
    if apart:
        name = max(apart, key=lambda name: apart[name].between)
        found = mixed_finding(_severity_of_batches(measured), name, apart[name])
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
            "samples a batch": short(layer.samples),
            "noisy layers": len(noisy),
            "of": len(measured.layers),
            "noise of a batch's mean (standard deviations)": short(layer.mean_noise),
            "noise of its variance (logarithm)": short(layer.variance_noise),
        },
        f"with {counted(round(layer.samples), 'sample')} a batch, its own mean is off by {layer.mean_noise:.2f} "
        f"standard deviations in {name or 'the layer'}: the network has learnt with noise that eval() does not "
        "have",
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
                {"uses a batch": short(layer.calls)},
                f"the layer runs {layer.calls:g} times for each batch: its running statistics mix all of them",
                "give each use a layer of its own; weight and bias may still be shared",
            )


def lost_behind(network: Network, measured: Measured) -> Iterator[Finding]:
    """Channels that a ReLU never lets through, or that lie where a sigmoid or tanh is flat."""
    for name, (kind, lost, channels) in measured.behind.items():
        if lost:
            told = "the ReLU lets nothing through" if kind == "relu" else f"the {kind} is flat"
            yield Finding(
                "dead-relu" if kind == "relu" else "saturated",
                Severity.WARNING if lost > channels / 2 else Severity.NOTE,
                name,
                {"activation": kind, "channels": lost, "of": channels},
                f"{told} in {lost} of {counted(channels, 'channel')}, on all of the samples looked at",
                f"prune them; if they are many: {CALIBRATE}, a lower learning rate, no weight decay on batch norm",
            )


CHECKS: tuple[Callable[[Network, Measured], Iterator[Finding]], ...] = (
    padded_input,
    mixed_streams,
    small_batches,
    shared_calls,
    lost_behind,
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
