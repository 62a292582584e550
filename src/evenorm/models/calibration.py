"""What a calibration found, as data: layer by layer, and as a table."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

COLUMNS = ("layer", "samples", "mean shift", "variance ratio", "standard error")
WIDTH = 80  # of the table


@dataclass(frozen=True)
class LayerCalibration:
    """What a calibration changed in one layer.

    Args:
        name: the layer's dotted name.
        samples: the rows of its inputs that were used.
        batches: in how many batches they came.
        mean_shift: the largest move of a channel's mean, in units of the new sqrt(running_var + eps), by which the
            layer divides; inf where the old mean was not a number.
        variance_ratio: the smallest and the largest ratio of a channel's new variance to its old one, eps added to
            both; inf where the old variance was not a number.
        standard_error: the largest standard error of a channel's new mean, in the same unit, by how the batches
            differ; None where there was one batch.
    """

    name: str
    samples: int
    batches: int
    mean_shift: float
    variance_ratio: tuple[float, float]
    standard_error: float | None


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did: ``print`` it for a table, `to_dict` for JSON.

    Args:
        layers: one entry for each layer that got new statistics, in the order in which they were reached.
        untouched: the layers that kept theirs, by name, and why.
        batches: how many batches were read, of all workers together.
        passes: how often the data were read.
        stopped_early: whether `tolerance` was reached before the data ended.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    >>> calibration = evenorm.calibrate(model, [torch.randn(16, 4) for _ in range(10)])
    >>> calibration.batches, calibration.layers[0].samples
    (10, 160)
    """

    layers: tuple[LayerCalibration, ...]
    untouched: dict[str, str] = field(default_factory=dict)
    batches: int = 0
    passes: int = 1
    stopped_early: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold; a number that is not finite becomes None."""
        content = asdict(self)
        for layer in content["layers"]:
            layer["mean_shift"] = _finite(layer["mean_shift"])
            layer["variance_ratio"] = [_finite(ratio) for ratio in layer["variance_ratio"]]
        content["layers"] = list(content["layers"])
        return content

    def __str__(self) -> str:
        """Return a table of at most 80 columns, and below it what was left alone."""
        rows = [
            (
                layer.name,
                str(layer.samples),
                f"{layer.mean_shift:.3g}",
                " to ".join(f"{ratio:.3g}" for ratio in layer.variance_ratio),
                "-" if layer.standard_error is None else f"{layer.standard_error:.2g}",
            )
            for layer in self.layers
        ]
        widths = [max(len(row[column]) for row in (COLUMNS, *rows)) for column in range(len(COLUMNS))]
        widths[0] = max(min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(COLUMNS) - 1)), 5)
        lines = [_line(row, widths) for row in (COLUMNS, tuple("-" * width for width in widths), *rows)]
        early = ", stopped early" if self.stopped_early else ""
        passes = f" in each of {self.passes} passes" if self.passes > 1 else ""
        batches = f"{self.batches} batch{'es' * (self.batches != 1)}"
        lines += ["", f"{batches}{passes}{early}; shift and error in standard deviations"]
        lines += [f"untouched: {name} ({reason})" for name, reason in self.untouched.items()]
        return "\n".join(lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *others = cells
    if len(first) > widths[0]:  # the end of a dotted name says more than its start
        first = ".." + first[-(widths[0] - 2) :]
    aligned = [first.ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
    return "  ".join(aligned).rstrip()


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
