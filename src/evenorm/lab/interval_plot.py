"""The small picture of one comparison: estimate, 95 % interval, zero line, margin, as numbers for an SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass

from evenorm.lab.results import Endpoint

_PADDING = 0.12  # of the span on either side, so that no mark touches the edge


@dataclass(frozen=True)
class IntervalPlot:
    """Positions in pixels from the left edge; None where the value is infinite or missing."""

    width: float
    zero: float
    margin: float | None
    band: tuple[float, float] | None  # left edge and width of the zone that counts as "no difference"
    low: float | None
    high: float | None
    estimate: float | None
    open_left: bool  # the interval has no lower end
    open_right: bool


def interval_plot(endpoint: Endpoint, width: float = 220.0) -> IntervalPlot:
    """Where the marks of `endpoint` stand on a line of `width` pixels that always shows zero and the margin.

    The zone from −margin to +margin is the one in which a difference is too small to matter. A negative margin
    ("no worse than") has no such zone, only its line.
    """
    margin = endpoint.margin
    seen = [value for value in (endpoint.low, endpoint.high, endpoint.estimate, margin) if math.isfinite(value)]
    left, right = min([0.0, *seen]), max([0.0, *seen])
    span = (right - left) or 1.0
    left, right = left - _PADDING * span, right + _PADDING * span

    def place(value: float) -> float | None:
        return round(width * (value - left) / (right - left), 1) if math.isfinite(value) else None

    band = None
    if math.isfinite(margin) and margin > 0:
        start = width * max(0.0, (-margin - left) / (right - left))
        band = (round(start, 1), round(width * (margin - left) / (right - left) - start, 1))
    zero = place(0.0)
    assert zero is not None
    return IntervalPlot(
        width=width,
        zero=zero,
        margin=place(margin) if margin else None,
        band=band,
        low=place(endpoint.low),
        high=place(endpoint.high),
        estimate=place(endpoint.estimate),
        open_left=endpoint.low == -math.inf,
        open_right=endpoint.high == math.inf,
    )
