"""What an experiment hands to the report: plain data, no torch, no plotting, no HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Verdict(str, Enum):
    """The four answers that a measurement can give to a claim."""

    REPRODUCED = "REPRODUCED"
    WEAK = "WEAK"
    INCONCLUSIVE = "INCONCLUSIVE"
    CONTRADICTED = "CONTRADICTED"


@dataclass(frozen=True)
class Claim:
    """A sentence of the document that evenorm implements, or of a paper, and the question it raises."""

    korean: str  # the document's own sentence; empty where a later paper makes the claim
    english: str
    source: str  # paper and section
    question: str


@dataclass(frozen=True)
class Published:
    """A number that somebody else measured, with the setting it was measured in."""

    value: str
    setting: str
    source: str


@dataclass(frozen=True)
class Endpoint:
    """One paired comparison: its estimate, its interval, and the verdict under a margin fixed beforehand."""

    name: str
    unit: str
    estimate: float
    low: float  # 95 % interval
    high: float
    p_value: float  # exact sign-flip test
    margin: float
    verdict: Verdict
    seeds: int
    favours: str  # what a value beyond the margin means, in words
    would_change: str  # what observation would change the verdict

    @property
    def bare_unit(self) -> str:
        """The unit without what it means: "doublings" of "doublings: log₂(a / b)"."""
        return self.unit.split(": ")[0]


@dataclass(frozen=True)
class Figure:
    """A plot as plotly's own JSON structure, with the words that stand under it."""

    title: str
    caption: str
    plotly: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A small table of results: every cell is already text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Analysis:
    """All that one experiment found, computed from stored trials alone."""

    experiment: str
    title: str
    claim: Claim
    protocol: str  # data, network, arms, optimizer, seeds: enough to repeat it
    rule: str  # the verdict rule, as it was fixed before the run
    verdict: Verdict
    answer: str  # the result in one plain sentence
    endpoints: tuple[Endpoint, ...]
    figures: tuple[Figure, ...]
    published: tuple[Published, ...]
    command: str
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()  # limits of the measurement, said plainly
    seeds: int = 0
    configuration: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Endpoint | None:
        """The comparison that the verdict is about: the first of those with the same one, else the first."""
        alike = (endpoint for endpoint in self.endpoints if endpoint.verdict is self.verdict)
        return next(alike, self.endpoints[0] if self.endpoints else None)
