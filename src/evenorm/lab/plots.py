"""Plots as plotly's JSON structure, written as plain dictionaries. A leaf: neither plotly nor HTML.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, on white and on black.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from evenorm.lab.statistics import paired_interval

Trace: TypeAlias = "dict[str, Any]"

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"


def band(
    name: str, colour: str, x: Sequence[float], curves: Sequence[Sequence[float | None]], **options: Any
) -> list[Trace]:
    """Return a line through the mean of one curve a seed, and its 95 % interval as a band behind it."""
    points = [_spread(values) for values in zip(*curves, strict=True)]
    middle, low, high = ([point[part] for point in points] for part in range(3))
    return area(name, colour, x, low, middle, high, **options)


def area(
    name: str,
    colour: str,
    x: Sequence[float],
    low: Sequence[float | None],
    middle: Sequence[float | None],
    high: Sequence[float | None],
    **options: Any,
) -> list[Trace]:
    """Return a line, and what lies between low and high as a band behind it."""
    edges = {
        "x": [*x, *reversed(x)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": _faint(colour),
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
        "mode": "lines",
    }
    line = {"x": list(x), "y": list(middle), "name": name, "mode": "lines", "line": {"color": colour, "width": 2}}
    return [{"type": "scatter", "legendgroup": name, **part, **options} for part in (edges, line)]


def line(name: str, colour: str, x: Sequence[float], y: Sequence[float], *, dash: str = "solid") -> Trace:
    """Return a plain line."""
    style = {"color": colour, "width": 2, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": name, "x": list(x), "y": list(y), "line": style}


def whiskers(
    name: str, colour: str, x: Sequence[float], values: Sequence[Sequence[float]], **options: Any
) -> Trace:
    """Return a marked line through the mean at each x of one value a seed, with its 95 % interval as whiskers."""
    points = [_spread(group) for group in values]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": name,
        "x": list(x),
        "y": [middle for middle, _, _ in points],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [None if middle is None or high is None else high - middle for middle, _, high in points],
            "arrayminus": [None if middle is None or low is None else middle - low for middle, low, _ in points],
        },
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 7},
        **options,
    }


def points(name: str, colour: str, x: Sequence[Any], y: Sequence[Any], **options: Any) -> Trace:
    """Return plain markers; x or y may be words."""
    style = {"marker": {"color": colour, "size": 7}, "line": {"color": colour, "width": 2}}
    return {"type": "scatter", "mode": "markers", "name": name, "x": list(x), "y": list(y), **style, **options}


def axis(title: str, *, logarithmic: bool = False, **options: Any) -> dict[str, Any]:
    """Return an axis; a logarithmic one shows only the ticks 1, 2, 5 of a decade."""
    scale = {"type": "log", "dtick": "D2"} if logarithmic else {}
    return {"title": {"text": title}, **scale, **options}


def powers(exponents: range) -> dict[str, Any]:
    """Return a logarithmic axis that is labelled at these powers of 10 alone."""
    words = [f"1e{power}" if abs(power) > 3 else f"{10.0**power:g}" for power in exponents]
    return {"type": "log", "tickvals": [10.0**power for power in exponents], "ticktext": words}


def level(y: float, text: str, colour: str = "#888888") -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a dashed horizontal line across the plot, and its label at the right."""
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    style = {"line": {"color": colour, "width": 1, "dash": "dash"}}
    label = {"xref": "paper", "x": 1, "y": y, "xanchor": "right", "yanchor": "bottom", "showarrow": False}
    return {**line, **style}, {**label, "text": text, "font": {"color": colour}}


def figure(traces: Sequence[Trace], x: dict[str, Any], y: dict[str, Any], **layout: Any) -> dict[str, Any]:
    """Return the traces under their two axes."""
    return {"data": list(traces), "layout": {"xaxis": x, "yaxis": y, **layout}}


def buttons(labels: Sequence[str], visible: Sequence[Sequence[bool]]) -> list[dict[str, Any]]:
    """Return a drop-down menu, each entry of which shows its own choice of traces."""
    choices = [
        {"label": label, "method": "restyle", "args": [{"visible": list(shown)}]}
        for label, shown in zip(labels, visible, strict=True)
    ]
    place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    return [{"type": "dropdown", "buttons": choices, "showactive": True, **place}]


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None, float | None]:
    """Return mean, low and high of the values of all seeds; a gap where any seed has none."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return None, None, None
    if len(numbers) == 1:
        return numbers[0], numbers[0], numbers[0]
    interval = paired_interval(numbers)
    return interval.mean, interval.low, interval.high


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"
