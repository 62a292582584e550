"""Batches that are not alike: sorted, or of several streams of data that share a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from evenorm.doctor.findings import Finding, Severity, short
from evenorm.doctor.measure import LayerMeasured
from evenorm.doctor.padding import Padding

# By number of clusters, the share of a normal variable's variance that they explain at best (Max 1960): what
# batches that differ without being of several streams come near.
BY_CHANCE = {2: 0.637, 3: 0.810, 4: 0.883, 5: 0.920}
LOOKED_AT = 256  # batches


def mixed(layer: LayerMeasured, padding: Padding | None) -> bool:
    """Tell whether batches differ more than random ones: these have 1/N of the variance between them.

    Or more, by chance: up to chi square's 99.9 % quantile, for B - 1 degrees of freedom, by Wilson and Hilferty.
    """
    batches = len(layer.batch_means)
    if batches < 4 or (padding is not None and padding.matters):  # padding makes batches differ too
        return False
    small = 2 / (9 * (batches - 1))
    by_chance = (1 - small + 3.09 * math.sqrt(small)) ** 3 / layer.samples
    return layer.between > max(0.1, by_chance)


def mixed_finding(severity: Severity, name: str, layer: LayerMeasured) -> Finding:
    """Return what there is to say of a layer whose batches differ more than random ones."""
    means = (layer.batch_means[:LOOKED_AT] - layer.batch_means[:LOOKED_AT].mean(0)) / layer.deviation
    streams, explained = clusters(means @ torch.linalg.svd(means, full_matrices=False)[2][0])
    number = {2: "two", 3: "three", 4: "four", 5: "five"}.get(streams)
    return Finding(
        "mixed-streams",
        severity,
        name,
        {
            "share of the variance between batches": short(layer.between),
            "by chance": short(1 / layer.samples),
            "clusters of batches": streams or "none",
            "share of that between them": short(explained),
        },
        f"{layer.between:.0%} of the variance lies between batches, {1 / layer.samples:.1%} would by chance: "
        + (
            f"{number} streams of data go through one layer"
            if number
            else "batches are sorted, or of several streams"
        ),
        "mix the streams in every batch; or give each stream batch norm layers of its own",
    )


def clusters(scores: Tensor) -> tuple[int, float]:
    """Return into how many clusters B numbers fall, 0 where they do not, and what share of the variance is between.

    The fewest that leave less than 0.4 of what chance leaves within them; a ramp, of sorted data, leaves half.
    """
    ordered = scores.double().sort().values
    total = float((ordered - ordered.mean()).square().sum())
    for number, by_chance in BY_CHANCE.items():
        if len(ordered) >= 4 * number and total > 0:
            explained = 1 - _within(ordered, number) / total
            if 1 - explained < 0.4 * (1 - by_chance):
                return number, explained
    return 0, 0.0


def _within(ordered: Tensor, number: int) -> float:
    """Return the least sum of squares within so many runs of sorted numbers, each of two at least."""
    size = len(ordered)
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    squares = torch.cat([ordered.new_zeros(1), ordered.square().cumsum(0)])
    start, end = torch.arange(size + 1).unsqueeze(1), torch.arange(size + 1)
    count = (end - start).clamp(min=1)
    cost = (squares - squares.unsqueeze(1)) - (sums - sums.unsqueeze(1)).square() / count  # of a run [start, end)
    cost = torch.where(end - start >= 2, cost, torch.inf)
    best = cost[0]
    for _ in range(number - 1):
        best = (best.unsqueeze(1) + cost).amin(0)
    return max(float(best[size]), 0.0)
