"""What a diagnosis is made of: findings, scores, and what is shown of a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Severity(IntEnum):
    """How much a finding matters: a note is worth knowing, a warning costs something, an error ruins results."""

    NOTE = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        """Return the word in small letters."""
        return self.name.lower()


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, in one layer.

    Args:
        code: a short name that does not change, such as ``stale-statistics``.
        severity: how much it matters.
        layer: the layer's dotted name; "" for the network as a whole.
        evidence: the numbers it rests on, by name.
        cause: what happened, in a sentence.
        cure: a command or a line of code.
        harm: the share of what eval() loses that it explains, where that was measured. What exact statistics give
            back is shared among layers by how far their statistics are off.

    >>> import torch, evenorm
    >>> finding = evenorm.diagnose(torch.nn.BatchNorm1d(3)).findings[0]
    >>> finding.code, str(finding.severity)
    ('never-updated', 'error')
    """

    code: str
    severity: Severity
    layer: str
    evidence: dict[str, float | int | str]
    cause: str
    cure: str
    harm: float | None = None


@dataclass(frozen=True)
class Scores:
    """The network's score on the same samples by three kinds of statistics.

    Args:
        measure: what the score is: "accuracy"; "loss", the lower the better; without labels "agreement", the share
            of samples that get the class that the batch's own statistics give them; or, for outputs of another
            kind, "likeness", the share of their variance that is kept.
        running: by the running statistics, as `eval()` does.
        exact: by exact statistics over the data.
        batch: by each batch's own, as `train()` does, but without dropout.
        samples: how many samples were scored.
        noise: how much of `lost` may be chance.
    """

    measure: str
    running: float
    exact: float
    batch: float
    samples: int
    noise: float = 0.0

    @property
    def lost(self) -> float:
        """What `eval()` loses against the batch's own statistics, or the exact ones where these do better."""
        return max(self._sign * (self.batch - self.running), self.recovered)

    @property
    def recovered(self) -> float:
        """What exact statistics give back of it."""
        return self._sign * (self.exact - self.running)

    @property
    def harmful(self) -> bool:
        """Whether `eval()` loses more than chance would; not a number is a loss."""
        return not self.lost <= self.noise

    @property
    def _sign(self) -> int:
        return -1 if self.measure == "loss" else 1


@dataclass(frozen=True)
class LayerView:
    """What the renderings show of one layer: its running and, with data, its exact statistics, per channel."""

    name: str
    running_mean: tuple[float, ...]
    running_var: tuple[float, ...]
    exact_mean: tuple[float, ...] = ()
    exact_var: tuple[float, ...] = ()
    mean_shift: float | None = None  # the root mean square over channels, in exact standard deviations
    log_ratio: float | None = None  # of the variances, likewise
    noise: float | None = None  # what `mean_shift` would be by chance, with so many samples and updates


def ranked(findings: list[Finding]) -> tuple[Finding, ...]:
    """Return findings worst first: by severity, then by the share of the harm; else in the order they came."""
    return tuple(sorted(findings, key=lambda found: (-found.severity, -(found.harm or 0.0))))


def alike(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Put findings of one code and severity together, in the order of the first of each: many layers, one cause."""
    groups: dict[tuple[str, Severity], list[Finding]] = {}
    for found in findings:
        groups.setdefault((found.code, found.severity), []).append(found)
    return list(groups.values())


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return so many of a noun: "1 channel", "2 channels"; a plural that takes more than an s is given."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def short(number: float) -> float | str:
    """Return a number as evidence shows it: three digits; a word where it is not finite."""
    return float(f"{number:.3g}") if math.isfinite(number) else str(number)
