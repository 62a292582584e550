"""A diagnosis as data: findings, worst first, and what was measured of the whole network."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from evenorm.doctor.findings import Finding, LayerView, Scores, Severity

SCHEMA = 1  # of `Diagnosis.to_dict`; grows when a field changes its meaning or goes


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found. ``print`` it for a table; `to_dict` for JSON; `to_html` for a page.

    Args:
        findings: worst first.
        layers: the batch norm layers, in the order of the network; of a state_dict, by name.
        summary: the answer to the question, in a sentence.
        scores: what was measured with data; None without.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    >>> diagnosis = evenorm.diagnose(model)
    >>> diagnosis.healthy, diagnosis.findings[0].code, diagnosis.to_dict()["schema"]
    (False, 'never-updated', 1)
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerView, ...]
    summary: str
    scores: Scores | None = None

    @property
    def healthy(self) -> bool:
        """Whether nothing above a note was found."""
        return all(finding.severity <= Severity.NOTE for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold; numbers that are not finite become None."""
        content = asdict(self)
        for found in content["findings"]:
            found["severity"] = str(found["severity"])
        return {"schema": SCHEMA, "healthy": self.healthy, **{key: plain(value) for key, value in content.items()}}

    def __str__(self) -> str:
        """Return the summary and the findings, as plain text of at most 80 columns."""
        from evenorm.doctor.text import as_text

        return as_text(self.summary, self.scores, self.findings)

    def to_html(self) -> str:
        """Return one page that needs nothing from outside; takes the packages of ``evenorm[lab]``."""
        from evenorm.doctor.page import as_html

        return as_html(self.summary, self.scores, self.findings, self.layers)


def plain(value: Any) -> Any:
    """Return nested data as lists, dicts, and numbers that JSON knows."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
