"""What a reader of the report sees as a sentence, and which of it has no Korean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from evenorm.lab.language import Text
from evenorm.lab.results import Analysis

# Names that stand alike in both languages. Numbers, formulas and words of up to two letters are free.
NAMES = re.compile(
    r"ReLU|sigmoid|tanh|GELU|SiLU|SGD|digits|wine|scikit-learn|MNIST|ImageNet|CIFAR|Inception|ResNet|VGG|Adam|evenorm|"
    r"torch|log|sqrt|mean|var|lr|eps|NaN|inf|BN|float(?:16|32|64)|L1|L2|exact|He|Xavier|LSUV|"
    r"[A-Z][\w’'-]+(?: (?:&|and) [A-Z]\w+| et al\.)* (?:19|20)\d\d[a-z]?"
)
WORD = re.compile(r"[A-Za-z]{3,}")
HANGUL = re.compile(r"[가-힣]")
PLOT_TEXTS = {"text", "name", "label", "title", "hovertemplate", "ticktext"}  # what plotly prints of a figure


def untranslated(analysis: Analysis) -> list[str]:
    """Return every sentence of an analysis that a Korean reader would find in English."""
    return sorted({str(sentence) for sentence in sentences(analysis) if lacks_korean(sentence)})


def lacks_korean(sentence: str) -> bool:
    if not WORD.search(NAMES.sub("", sentence)):
        return False
    return not (isinstance(sentence, Text) and HANGUL.search(sentence.korean))


def sentences(analysis: Analysis) -> Iterator[str]:
    """Yield all that is printed of an analysis, but for names (experiment, command, configuration, citations)."""
    claim = analysis.claim
    yield from (analysis.title, claim.question, analysis.protocol, analysis.rule, analysis.answer, *analysis.notes)
    if not claim.korean:
        yield claim.english
    for endpoint in analysis.endpoints:
        yield from (endpoint.name, endpoint.unit, endpoint.favours, endpoint.would_change)
    for published in analysis.published:
        yield from (published.value, published.setting)
    for table in analysis.tables:
        yield table.title
        yield from table.columns
        for row in table.rows:
            yield from row
    for figure in analysis.figures:
        yield from (figure.title, figure.caption)
        yield from plot_texts(figure.plotly)


def plot_texts(value: Any, printed: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        if printed:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from plot_texts(item, key in PLOT_TEXTS)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from plot_texts(item, printed)
