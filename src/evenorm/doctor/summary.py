"""The answer to the question, in a sentence: what eval() loses, what comes back, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from evenorm.doctor.findings import Finding, Scores, Severity, counted
from evenorm.doctor.measure import Measured


def summary(findings: Sequence[Finding], layers: int, measured: Measured | None) -> str:
    """Return the first line of a diagnosis, from findings worst first."""
    if not layers:
        return "nothing to examine: there is no batch norm" + (f"; {_cause(findings)}" if findings else "")
    scores = measured.scores if measured is not None else None
    grave = [found for found in findings if found.severity > Severity.NOTE]
    cost = "" if scores is None else _cost(scores)
    if not grave:
        lost = bool(scores and scores.harmful)
        told = "no cause was found" if lost else f"nothing is wrong in {counted(layers, 'batch norm layer')}"
        return f"{cost}: {told}" if cost else told
    return f"{cost}: {_cause(grave)}" if cost else _cause(grave)


def _cost(scores: Scores) -> str:
    if not scores.harmful:
        return "eval() loses nothing"
    if scores.measure == "loss":
        told = f"eval() raises the loss from {scores.batch:.3g} to {scores.running:.3g}"
        return f"{told}; exact statistics give {scores.exact:.3g}"
    lost, back = round(100 * scores.lost), min(round(100 * scores.recovered), round(100 * scores.lost))
    unit = "points" if scores.measure == "accuracy" else f"points of {scores.measure}"
    if back <= 0:
        return f"eval() loses {lost} {unit}; none come back with exact statistics"
    return f"eval() loses {lost} {unit}; {back if back < lost else 'all'} of them come back with exact statistics"


def _cause(findings: Sequence[Finding]) -> str:
    first = findings[0]
    alike = [found for found in findings if found.code == first.code]
    say = HEADLINES.get(first.code)
    return say(first, _layers(alike)) if say is not None else _in_layer(first)


def _layers(findings: Sequence[Finding]) -> str:
    return counted(len({found.layer for found in findings}), "layer")


def _in_layer(found: Finding) -> str:
    return found.cause + (f" ({found.layer})" if found.layer else "")


HEADLINES: dict[str, Callable[[Finding, str], str]] = {
    "stale-statistics": lambda found, layers: (
        f"the running statistics of {layers} are stale (momentum {found.evidence['momentum']:g}, "
        f"{counted(int(found.evidence['updates']), 'update')})"
    ),
    "never-updated": lambda found, layers: f"the running statistics of {layers} were never updated",
    "momentum-zero": lambda found, layers: f"momentum 0 kept the data out of the running statistics of {layers}",
    "not-finite": lambda found, layers: (
        f"NaN or inf in {layers}, first in {found.evidence['tensor']} of {found.layer or 'the network'}"
    ),
    "averaged-weights": lambda found, layers: (
        f"the weights are averaged, the running statistics of {layers} are those of other weights"
    ),
    "frozen-drifted": lambda found, layers: f"{layers} frozen by halves: statistics and weights have drifted apart",
    "dropout-shift": lambda found, layers: f"dropout in front of {layers} raised the running variances",
    "mixed-streams": lambda found, layers: (
        f"batches are sorted, or of several streams that share one layer ({found.layer})"
    ),
    "padding": lambda found, layers: (
        f"padding, {found.evidence['padded positions']:.0%} of all positions, entered the statistics"
    ),
    "small-batches": lambda found, layers: (
        f"batches of {found.evidence['samples a batch']:g} are too small for statistics of their own"
    ),
    "noisy-statistics": lambda found, layers: (
        f"the running statistics of {layers} are those of the last few batches "
        f"(momentum {found.evidence['momentum']:g})"
    ),
    "lagging-statistics": lambda found, layers: (
        f"the running statistics of {layers} are those of older weights (momentum {found.evidence['momentum']})"
    ),
    "foreign-statistics": lambda found, layers: (
        f"the running statistics of {layers} are not those of these weights on these data"
    ),
}
