"""The plots of a diagnosis, as plotly's JSON structure: scores, the gap by depth, and each layer's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evenorm.doctor.findings import LayerView, Scores
from evenorm.doctor.text import harmless
from evenorm.lab.plots import axis, figure

LAYERS = 24  # that get a plot of their own, the worst
CHANNELS = 512  # of a layer that are drawn

Plot = dict[str, Any]  # title, caption, plotly, and whether it is of the whole network


def figures(scores: Scores | None, layers: Sequence[LayerView]) -> list[Plot]:
    """Return the plots in the order of the page."""
    found = []
    if scores is not None:
        found.append(_scores(scores))
    measured = [view for view in layers if view.mean_shift is not None]
    if measured:
        found.append(_by_depth(measured))
    worst = sorted(layers, key=lambda view: -(view.mean_shift or 0) - (view.log_ratio or 0))
    chosen = {view.name for view in worst[:LAYERS]}
    found += [_layer(view) for view in layers if view.name in chosen and view.running_mean]
    return found


def _scores(scores: Scores) -> Plot:
    names = ["running<br>(eval)", "exact", "the batch's<br>own (train)"]
    colours = ["var(--vermilion)", "var(--blue)", "var(--green)"]
    bars = {
        "type": "bar",
        "x": names,
        "y": [scores.running, scores.exact, scores.batch],
        "marker": {"color": colours},
    }
    return {
        "title": f"{scores.measure.capitalize()} by three kinds of statistics",
        "caption": "What exact statistics give back was lost through the running ones; what only the batch's own "
        "give, the network has learnt to take from its batch.",
        "plotly": figure([bars], axis(""), axis(scores.measure, rangemode="tozero")),
        "of_network": True,
    }


def _by_depth(views: list[LayerView]) -> Plot:
    names = [harmless(view.name or "the model") for view in views]
    rows = (
        ("distance of means (standard deviations)", "var(--vermilion)", [view.mean_shift for view in views]),
        ("distance of variances (logarithm of the ratio)", "var(--blue)", [view.log_ratio for view in views]),
        ("distance of means that chance makes", "var(--green)", [view.noise for view in views]),
    )
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(range(1, len(views) + 1)),
            "y": values,
            "text": names,
            "marker": {"color": colour},
            "line": {"color": colour},
        }
        for name, colour, values in rows
    ]
    return {
        "title": "Running against exact statistics, by depth",
        "caption": "Root mean square over the channels of each layer, from input to output.",
        "plotly": figure(
            traces,
            axis("batch norm layer, from the input on", tick0=1, dtick=-(-len(views) // 12)),
            axis("distance", rangemode="tozero"),
        ),
        "of_network": True,
    }


def _layer(view: LayerView) -> Plot:
    step = -(-len(view.running_mean) // CHANNELS)
    channels = list(range(0, len(view.running_mean), step))
    rows = (
        ("running mean", "var(--vermilion)", "circle", view.running_mean),
        ("exact mean", "var(--blue)", "circle-open", view.exact_mean),
        ("running variance", "var(--orange)", "square", view.running_var),
        ("exact variance", "var(--sky)", "square-open", view.exact_var),
    )
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": channels,
            "y": [values[channel] for channel in channels],
            "marker": {"color": colour, "symbol": symbol},
        }
        for name, colour, symbol, values in rows
        if values
    ]
    some = "" if step == 1 else f" One of {step} channels is shown."
    return {
        "title": harmless(view.name or "the model"),
        "caption": f"Running{' and exact' if view.exact_mean else ''} statistics of each channel.{some}",
        "plotly": figure(traces, axis("channel"), axis("")),
        "of_network": False,
    }
